//! Traffic between two `mesh-wg`.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::support::{Kind, Link, Underlay, eventually, loss, psk, require_root, run};

const MESH: [Kind; 2] = [Kind::Mesh, Kind::Mesh];
const LIMIT: Duration = Duration::from_secs(15);

#[test]
fn both_families_inside_over_ipv4() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    link.check_tcp(48 << 20);
}

#[test]
fn both_families_inside_over_ipv6_with_a_psk() {
    require_root();
    let link = Link::new(MESH, Underlay::V6, Some(&psk()));
    link.check_ping();
    link.check_tcp(48 << 20);
}

#[test]
fn a_wrong_psk_lets_nothing_through() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, Some(&psk()));
    link.set_psk(0, &psk());
    assert_eq!(link.ends[0].namespace.ping_loss("-c 5 -i 0.2 -W 1 10.9.0.2"), 100.0);
    assert_eq!(link.ends[1].namespace.ping_loss("-c 5 -i 0.2 -W 1 fd09::1"), 100.0);
    for end in &link.ends {
        assert_eq!(end.last_handshake(), Duration::ZERO);
    }
}

#[test]
fn a_changed_psk_loses_no_ping_of_a_live_session() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    let before: Vec<_> = link.ends.iter().map(super::support::End::last_handshake).collect();
    let ping = link.ends[0]
        .namespace
        .command("ping")
        .args(["-n", "-c", "1000", "-i", "0.01", "-W", "2", "10.9.0.2"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Four changes, each end in turn first, the other a while later.
    for round in 0..4 {
        thread::sleep(Duration::from_millis(800));
        let psk = psk();
        link.set_psk(round % 2, &psk);
        thread::sleep(Duration::from_millis(700));
        link.set_psk(1 - round % 2, &psk);
    }
    let output = ping.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1000 packets transmitted") && loss(&text) == Some(0.0), "{text}\n{}", link.logs());
    for (end, before) in link.ends.iter().zip(before) {
        assert!(end.last_handshake() > before, "a handshake with the new key took place");
    }
    link.check_ping();
}

#[test]
fn a_peer_that_changes_its_address_is_followed() {
    require_root();
    for (underlay, old, new, shown) in [
        (Underlay::V4, "192.0.2.1/24", "192.0.2.77/24", "192.0.2.77:5001"),
        (Underlay::V6, "2001:db8::1/64", "2001:db8::77/64 nodad", "[2001:db8::77]:5001"),
    ] {
        let link = Link::new(MESH, underlay, None);
        link.check_ping();
        let [a, b] = &link.ends;
        let ping = a
            .namespace
            .command("ping")
            .args(["-n", "-c", "150", "-i", "0.02", "-W", "2", "fd09::2"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_secs(1));
        // Without this the kernel takes the new address away together with the old one.
        a.namespace.exec(&["sysctl", "-qw", "net.ipv4.conf.u0.promote_secondaries=1"]);
        a.namespace.ip(&format!("addr add {new} dev u0"));
        a.namespace.ip(&format!("addr del {} dev u0", old.split(' ').next().unwrap()));
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(loss(&text).unwrap() < 5.0, "{underlay:?}: {text}\n{}", link.logs());
        let endpoint = b.device.state().peers[0].endpoint.unwrap().to_string();
        assert_eq!(endpoint, shown);
        link.check_ping();
    }
}

#[test]
fn a_packet_with_a_foreign_source_is_dropped() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let [a, b] = &link.ends;
    link.check_ping();
    // The other end would answer: it routes the address here, but does not accept it from here.
    a.namespace.ip(&format!("addr add 10.9.0.99/32 dev {}", a.device.interface));
    assert_eq!(a.namespace.ping_loss("-c 3 -i 0.1 -W 1 -I 10.9.0.99 10.9.0.2"), 100.0);
    eventually("the drop is logged", LIMIT, || b.device.log().contains("foreign source address"));
    b.wg(&["peer", &a.keys.public, "allowed-ips", "10.9.0.1/32,fd09::1/128,10.9.0.99/32"]);
    assert_eq!(a.namespace.ping_loss("-c 3 -i 0.1 -W 1 -I 10.9.0.99 10.9.0.2"), 0.0);
}

#[test]
fn a_prefix_given_to_another_peer_is_taken_from_the_first() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let [a, b] = &link.ends;
    link.check_ping();
    let other = crate::support::Keys::generate();
    a.wg(&["peer", &other.public, "allowed-ips", "10.9.0.2/32"]);
    let shown = a.namespace.exec(&["wg", "show", &a.device.interface, "allowed-ips"]);
    assert!(shown.contains(&format!("{}\tfd09::2/128\n", b.keys.public)), "{shown}");
    assert!(shown.contains(&format!("{}\t10.9.0.2/32\n", other.public)), "{shown}");
    assert_eq!(a.namespace.ping_loss("-c 2 -i 0.1 -W 1 10.9.0.2"), 100.0);
    assert_eq!(a.namespace.ping_loss("-c 2 -i 0.1 -W 1 fd09::2"), 0.0);
    a.wg(&["peer", &other.public, "remove"]);
    a.wg(&["peer", &b.keys.public, "allowed-ips", "10.9.0.2/32,fd09::2/128"]);
    link.check_ping();
}

#[test]
fn a_removed_peer_is_cut_off_and_comes_back() {
    require_root();
    let link = Link::new(MESH, Underlay::V6, None);
    link.check_ping();
    let [a, b] = &link.ends;
    a.wg(&["peer", &b.keys.public, "remove"]);
    assert!(a.device.state().peers.is_empty());
    assert_eq!(b.namespace.ping_loss("-c 3 -i 0.1 -W 1 10.9.0.1"), 100.0);
    link.add_peer(0, None);
    // Side a has no session: its first packet makes one.
    link.check_ping();
}

#[test]
fn a_new_private_key_needs_a_new_peer_at_the_other_end() {
    require_root();
    let mut link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    let keys = crate::support::Keys::generate();
    let [a, b] = &link.ends;
    let file = a.device.secret_file(&keys.private);
    a.wg(&["private-key", &file]);
    assert_eq!(a.namespace.ping_loss("-c 3 -i 0.1 -W 1 10.9.0.2"), 100.0);
    b.wg(&["peer", &a.keys.public, "remove"]);
    link.ends[0].keys = keys;
    link.add_peer(1, None);
    link.check_ping();
}

#[test]
fn the_mtu_is_followed_live() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    for (end, mtu) in [(0, 1280), (1, 1280), (0, 9000), (1, 9000), (0, 1420), (1, 1420)] {
        let end = &link.ends[end];
        end.namespace.ip(&format!("link set {} mtu {mtu}", end.device.interface));
        eventually("the new MTU is noticed", LIMIT, || end.device.log().contains(&format!("mtu={mtu}")));
        link.check_ping();
    }
    link.check_tcp(4 << 20);
}

#[test]
fn packets_larger_than_the_underlay_are_fragmented_outside() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    for end in &link.ends {
        end.namespace.ip(&format!("link set {} mtu 8000", end.device.interface));
    }
    link.check_ping();
    link.check_tcp(8 << 20);
}

#[test]
fn a_mark_is_put_on_what_leaves() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let a = &link.ends[0];
    a.namespace.ip("rule add fwmark 0x4711 prohibit");
    a.wg(&["fwmark", "0x4711"]);
    assert_eq!(a.namespace.exec(&["wg", "show", &a.device.interface, "fwmark"]).trim(), "0x4711");
    assert_eq!(a.namespace.ping_loss("-c 2 -i 0.1 -W 1 10.9.0.2"), 100.0);
    a.wg(&["fwmark", "0"]);
    assert_eq!(a.namespace.exec(&["wg", "show", &a.device.interface, "fwmark"]).trim(), "off");
    link.check_ping();
}

#[test]
fn persistent_keepalives_connect_without_traffic() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let [a, b] = &link.ends;
    a.wg(&["peer", &b.keys.public, "persistent-keepalive", "1"]);
    eventually("a handshake", LIMIT, || !b.last_handshake().is_zero());
    let before = b.device.state().peers[0].rx_bytes;
    eventually("more keepalives", LIMIT, || b.device.state().peers[0].rx_bytes >= before + 2 * 32);
    let shown = a.namespace.exec(&["wg", "show", &a.device.interface, "persistent-keepalive"]);
    assert!(shown.ends_with("\t1\n"), "{shown}");
}

#[test]
fn the_interface_works_on_in_another_namespace() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    let inner = crate::support::Namespace::new();
    let a = &link.ends[0];
    let interface = &a.device.interface;
    a.namespace.ip(&format!("link set {interface} netns {}", inner.name));
    inner.ip(&format!("addr add 10.9.0.1/24 dev {interface}"));
    inner.ip(&format!("link set {interface} up"));
    assert_eq!(inner.ping_loss("-c 3 -i 0.1 -W 2 10.9.0.2"), 0.0, "{}", link.logs());
    // Before the namespace goes, so that the end of the process is its own.
    inner.ip(&format!("link set {interface} netns {}", a.namespace.name));
}

#[test]
fn tcp_is_whole_while_the_network_drops_duplicates_and_reorders() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    // nftables drops one datagram in 50 at random: losses inside of superpackets, retransmissions, reordering.
    for end in &link.ends {
        end.namespace.exec(&["nft", "add table inet lossy"]);
        end.namespace.exec(&["nft", "add chain inet lossy in { type filter hook input priority 0; }"]);
        end.namespace
            .exec(&["nft", "add rule inet lossy in udp dport 5001-5002 numgen random mod 50 == 0 drop"]);
    }
    link.check_tcp(4 << 20);
}

#[test]
fn thousands_of_peers_are_set_listed_and_removed() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    let [a, b] = &link.ends;
    let mut change = mesh_sys::uapi::SetDevice::default();
    for number in 0u32..4000 {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        let mut peer = mesh_sys::uapi::SetPeer::new(mesh_sys::uapi::PublicKey(key));
        peer.endpoint = Some(std::net::SocketAddr::from(([192, 0, 2, 250], 9)));
        let net = std::net::Ipv4Addr::from_bits(0x0b00_0000 + (number << 8));
        let net = ipnet::Ipv4Net::new(net, 24).unwrap().into();
        peer.allowed_ips.push(mesh_sys::uapi::AllowedIpChange::Add(net));
        change.peers.push(peer);
    }
    let client = mesh_sys::uapi::BlockingClient::new(&a.device.interface);
    client.set(&change).unwrap();
    assert_eq!(client.get().unwrap().peers.len(), 4001);
    let shown = a.namespace.exec(&["wg", "show", &a.device.interface, "peers"]);
    assert_eq!(shown.lines().count(), 4001);
    link.check_ping();
    for peer in &mut change.peers {
        peer.remove = true;
    }
    client.set(&change).unwrap();
    assert_eq!(client.get().unwrap().peers.len(), 1);
    assert!(run("wg", &["show", &a.device.interface]).contains(&b.keys.public));
    link.check_ping();
}

/// How often the threads of a process went to sleep so far.
fn sleeps(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let count = |task: std::fs::DirEntry| -> u64 {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    tasks.map(|task| count(task.unwrap())).sum()
}

#[test]
fn an_idle_device_sleeps() {
    require_root();
    // Configured, but without a session. Down, so that the kernel does not look for routers through it.
    let namespace = crate::support::Namespace::new();
    let device = crate::support::Process::start(Kind::Mesh, &namespace);
    let keys = [(); 2].map(|()| crate::support::Keys::generate());
    let file = device.secret_file(&keys[0].private);
    let peer = &keys[1].public;
    namespace.exec(&[
        "wg",
        "set",
        &device.interface,
        "private-key",
        &file,
        "peer",
        peer,
        "endpoint",
        "192.0.2.1:1",
    ]);
    thread::sleep(Duration::from_millis(500));
    let before = sleeps(device.child.id());
    thread::sleep(Duration::from_secs(3));
    assert_eq!(sleeps(device.child.id()), before, "no thread woke up in three seconds");

    // With a session: about once a second, and for what the kernel sends by itself.
    let link = Link::new(MESH, Underlay::V4, None);
    link.check_ping();
    thread::sleep(Duration::from_millis(500));
    let pids = link.ends.each_ref().map(|end| end.device.child.id());
    let before = pids.map(sleeps);
    thread::sleep(Duration::from_secs(3));
    for (pid, before) in pids.into_iter().zip(before) {
        assert!(sleeps(pid) - before <= 30, "{} wake-ups in three seconds", sleeps(pid) - before);
    }
}
