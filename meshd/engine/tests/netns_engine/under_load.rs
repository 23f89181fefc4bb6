//! A TCP stream, every byte of it checked, runs on while everything under it changes.

use std::thread;
use std::time::{Duration, Instant};

use mesh_sys::uapi::SecretKey;

use crate::support::stream::Stream;
use crate::support::{End, Kind, Link, Underlay, eventually, psk, require_root};

const MESH: [Kind; 2] = [Kind::Mesh, Kind::Mesh];
const LIMIT: Duration = Duration::from_secs(15);

/// From the first end to the second; `family` is 0 for IPv4 and 1 for IPv6 inside of the tunnel.
fn stream(link: &Link, family: usize) -> Stream {
    Stream::start(&link.ends[0].namespace, &link.ends[1].namespace, link.inside(1)[family])
}

/// Has an end send something of its own. An end that only receives may have acknowledged all it got, and then has
/// nothing to say by which the other end could learn of its new address or its lost session. WireGuard leaves that to
/// a timer of 15 seconds.
fn speak(link: &Link, end: usize) {
    let target = link.inside(1 - end)[0];
    link.ends[end].namespace.ping_loss(&format!("-c 3 -i 0.05 -W 5 {target}"));
}

/// Segments that TCP has sent once more.
fn retransmitted(end: &End) -> u64 {
    let text = end.namespace.exec(&["cat", "/proc/net/snmp"]);
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "RetransSegs").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// Ends the stream and says how it went.
fn conclude(link: &Link, stream: Stream, started: Instant, what: &str, mut waits: Vec<Duration>) {
    let bytes = stream.finish();
    waits.sort();
    println!(
        "{what}: {} MiB in {:.1} s, {} segments sent again; the stream went on after {:?} at the median, {:?} at most",
        bytes >> 20,
        started.elapsed().as_secs_f64(),
        retransmitted(&link.ends[0]),
        waits[waits.len() / 2],
        waits[waits.len() - 1]
    );
}

/// Changes the preshared key `rounds` times, each end first in turn, and each time waits for the new session.
fn rekey(link: &Link, stream: &Stream, rounds: u8) -> Vec<Duration> {
    let rekey_once = |round: u8| {
        let started = Instant::now();
        let before = link.ends.each_ref().map(End::last_handshake);
        let first = usize::from(round % 2);
        for end in [first, 1 - first] {
            link.ends[end].change_peer(|peer| peer.preshared_key = Some(SecretKey::new(&[round + 1; 32])));
        }
        eventually("both ends have a new session", LIMIT, || {
            link.ends.iter().zip(before).all(|(end, before)| end.last_handshake() > before)
        });
        let wait = stream.crosses("with a new session", LIMIT);
        // A peer may begin 50 handshakes a second; a refused one would be repeated after five seconds.
        thread::sleep(Duration::from_millis(30).saturating_sub(started.elapsed()));
        wait
    };
    (0..rounds).map(rekey_once).collect()
}

#[test]
fn a_stream_does_not_notice_a_hundred_rekeys() {
    require_root();
    for (underlay, family) in [(Underlay::V4, 1), (Underlay::V6, 0)] {
        let link = Link::new(MESH, underlay, Some(&psk()));
        let stream = stream(&link, family);
        let started = Instant::now();
        let waits = rekey(&link, &stream, 50);
        conclude(&link, stream, started, "50 rekeys", waits);
    }
}

#[test]
fn a_stream_to_wireguard_go_does_not_notice_rekeys() {
    require_root();
    // Few: `wireguard-go` is slower than what we send, and each handshake message it loses costs five seconds.
    const ROUNDS: u8 = 4;
    for kinds in [[Kind::Mesh, Kind::Go], [Kind::Go, Kind::Mesh]] {
        let link = Link::new(kinds, Underlay::V4, Some(&psk()));
        let mesh = usize::from(kinds[0] == Kind::Go);
        let stream = stream(&link, 0);
        let started = Instant::now();
        let rekey_once = |round: u8| {
            let before = link.ends[mesh].last_handshake();
            // The end that initiates at once is told last.
            for end in [1 - mesh, mesh] {
                link.ends[end]
                    .change_peer(|peer| peer.preshared_key = Some(SecretKey::new(&[round + 1; 32])));
            }
            eventually("a new session", LIMIT, || link.ends[mesh].last_handshake() > before);
            thread::sleep(Duration::from_millis(30));
            stream.crosses("with a new session", LIMIT)
        };
        let waits = (0..ROUNDS).map(rekey_once).collect();
        conclude(&link, stream, started, &format!("{ROUNDS} rekeys, {kinds:?}"), waits);
    }
}

#[test]
fn a_stream_outlives_peers_that_are_removed_and_added() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let stream = stream(&link, 0);
    stream.crosses("at first", LIMIT);
    let started = Instant::now();
    let replace = |round: usize| {
        let end = round % 2;
        let other = &link.ends[1 - end].keys.public;
        link.ends[end].wg(&["peer", other, "remove"]);
        link.add_peer(end, None);
        if end == 1 {
            speak(&link, end);
        }
        stream.crosses("with a peer added anew", LIMIT)
    };
    let waits = (0..6).map(replace).collect();
    conclude(&link, stream, started, "6 peers removed and added", waits);
}

#[test]
fn a_stream_follows_an_end_that_changes_its_address() {
    require_root();
    for (underlay, family) in [(Underlay::V4, 0), (Underlay::V6, 1)] {
        let link = Link::new(MESH, underlay, None);
        let stream = stream(&link, family);
        stream.crosses("at first", LIMIT);
        let started = Instant::now();
        let mut waits = Vec::new();
        // First the sender moves, then the receiver, then both again.
        for (round, end) in [0, 1, 0, 1].into_iter().enumerate() {
            let End { namespace, number, port, .. } = &link.ends[end];
            let address = |round| match (underlay, round) {
                (Underlay::V4, 0) => format!("192.0.2.{number}/24"),
                (Underlay::V4, round) => format!("192.0.2.{number}{round}/24"),
                (Underlay::V6, 0) => format!("2001:db8::{number}/64"),
                (Underlay::V6, round) => format!("2001:db8::{number}{round}/64"),
            };
            let (old, new) = (address(round / 2), address(round / 2 + 1));
            // Without this the kernel takes the new address away together with the old one.
            namespace.exec(&["sysctl", "-qw", "net.ipv4.conf.u0.promote_secondaries=1"]);
            let nodad = if underlay == Underlay::V6 { " nodad" } else { "" };
            namespace.ip(&format!("addr add {new} dev u0{nodad}"));
            namespace.ip(&format!("addr del {old} dev u0"));
            if end == 1 {
                speak(&link, end);
            }
            waits.push(stream.crosses(&format!("end {number} moved to {new}"), LIMIT));
            let host = new.split('/').next().unwrap();
            let shown =
                if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
            let endpoint = || link.ends[1 - end].device.state().peers[0].endpoint.unwrap().to_string();
            eventually(&format!("the other end knows of {shown}"), LIMIT, || endpoint() == shown);
        }
        conclude(&link, stream, started, &format!("4 moves over {underlay:?}"), waits);
    }
}

#[test]
fn a_stream_goes_on_while_mtus_change() {
    require_root();
    for (underlay, family) in [(Underlay::V4, 1), (Underlay::V6, 0)] {
        let link = Link::new(MESH, underlay, None);
        let stream = stream(&link, family);
        stream.crosses("at first", LIMIT);
        let started = Instant::now();
        let mut waits = Vec::new();
        // Of the tunnel and of the underlay, in bytes: narrow, wide, a tunnel too wide for its underlay, as before.
        for (tunnel, under) in
            [(1280, 1500), (1280, 1400), (1420, 1400), (9000, 9100), (8000, 1500), (1420, 1500)]
        {
            for end in &link.ends {
                end.namespace.ip(&format!("link set {} mtu {tunnel}", end.device.interface));
                waits.push(stream.crosses(&format!("tunnel {tunnel}, end {}", end.number), LIMIT));
            }
            // One end alone would lose what the other still sends.
            for end in &link.ends {
                end.namespace.ip(&format!("link set u0 mtu {under}"));
            }
            waits.push(stream.crosses(&format!("tunnel {tunnel}, underlay {under}"), LIMIT));
        }
        conclude(&link, stream, started, &format!("6 MTUs over {underlay:?}"), waits);
    }
}
