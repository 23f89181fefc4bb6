//! With `boringtun-cli` at the other end. Rekeying by age is in `aging`, loss in `lossy`.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::stream::Stream;
use crate::support::{Kind, Link, Underlay, eventually, psk, require_root};

const MESH_FIRST: [Kind; 2] = [Kind::Mesh, Kind::Boringtun];
const BORINGTUN_FIRST: [Kind; 2] = [Kind::Boringtun, Kind::Mesh];
const LIMIT: Duration = Duration::from_secs(15);

#[test]
fn traffic_both_ways_without_and_with_a_psk() {
    require_root();
    for (kinds, underlay, psk) in [
        (MESH_FIRST, Underlay::V4, None),
        (BORINGTUN_FIRST, Underlay::V6, None),
        (BORINGTUN_FIRST, Underlay::V4, Some(psk())),
        (MESH_FIRST, Underlay::V6, Some(psk())),
    ] {
        let link = Link::new(kinds, underlay, psk.as_deref());
        link.check_ping();
        link.check_tcp(16 << 20);
    }
}

#[test]
fn a_stream_does_not_notice_new_sessions() {
    require_root();
    for kinds in [MESH_FIRST, BORINGTUN_FIRST] {
        let link = Link::new(kinds, Underlay::V4, Some(&psk()));
        let mesh = &link.ends[usize::from(kinds == BORINGTUN_FIRST)];
        let stream = Stream::start(&link.ends[0].namespace, &link.ends[1].namespace, link.inside(1)[0]);
        stream.crosses("at first", LIMIT);
        let mut waits = Vec::new();
        for _ in 0..4 {
            let before = Instant::now();
            // Changing a key needs `boringtun-cli` to forget its peer; here ours does, and begins anew.
            mesh.replace_peer(|_| {});
            let speak = format!("-c 2 -i 0.05 -W 5 {}", link.inside(usize::from(mesh.number == 1))[0]);
            mesh.namespace.ping_loss(&speak);
            eventually("a new session", LIMIT, || !mesh.last_handshake().is_zero());
            stream.crosses("with a new session", LIMIT);
            waits.push(before.elapsed());
            thread::sleep(Duration::from_millis(30));
        }
        println!("{kinds:?}: {} MiB, the stream went on after {waits:?}", stream.finish() >> 20);
    }
}
