//! With Debian's `wireguard-go` at the other end.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::support::{Kind, Link, Underlay, loss, psk, require_root};

const MESH_FIRST: [Kind; 2] = [Kind::Mesh, Kind::Go];
const GO_FIRST: [Kind; 2] = [Kind::Go, Kind::Mesh];

#[test]
fn traffic_both_ways_without_a_psk() {
    require_root();
    // Whoever sends first initiates: once each.
    for (kinds, underlay) in [(MESH_FIRST, Underlay::V4), (GO_FIRST, Underlay::V6)] {
        let link = Link::new(kinds, underlay, None);
        link.check_ping();
        link.check_tcp(16 << 20);
    }
}

#[test]
fn traffic_both_ways_with_a_psk() {
    require_root();
    for (kinds, underlay) in [(GO_FIRST, Underlay::V4), (MESH_FIRST, Underlay::V6)] {
        let link = Link::new(kinds, underlay, Some(&psk()));
        link.check_ping();
        link.check_tcp(16 << 20);
    }
}

#[test]
fn a_wrong_psk_lets_nothing_through() {
    require_root();
    for kinds in [MESH_FIRST, GO_FIRST] {
        let link = Link::new(kinds, Underlay::V4, Some(&psk()));
        link.set_psk(1, &psk());
        assert_eq!(link.ends[0].namespace.ping_loss("-c 3 -i 0.2 -W 1 10.9.0.2"), 100.0);
    }
}

#[test]
fn a_changed_psk_loses_no_ping() {
    require_root();
    for kinds in [MESH_FIRST, GO_FIRST] {
        let link = Link::new(kinds, Underlay::V4, None);
        link.check_ping();
        let before = link.ends[1].last_handshake();
        let ping = link.ends[0]
            .namespace
            .command("ping")
            .args(["-n", "-c", "400", "-i", "0.01", "-W", "2", "10.9.0.2"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_secs(1));
        let psk = psk();
        // The end that initiates at once is told last.
        let mesh = usize::from(kinds == GO_FIRST);
        link.set_psk(1 - mesh, &psk);
        link.set_psk(mesh, &psk);
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(loss(&text), Some(0.0), "{text}\n{}", link.logs());
        assert!(link.ends[1].last_handshake() > before, "a handshake with the new key\n{}", link.logs());
    }
}

#[test]
fn either_end_restarts_the_session_of_a_peer_that_came_back() {
    require_root();
    let link = Link::new(MESH_FIRST, Underlay::V4, None);
    link.check_ping();
    for end in [0, 1, 0, 1] {
        let other = link.ends[1 - end].keys.public.clone();
        link.ends[end].wg(&["peer", &other, "remove"]);
        link.add_peer(end, None);
        // The other end still believes in the old session; the first packet from here ends that.
        let target = format!("-c 3 -i 0.05 -W 5 10.9.0.{}", 2 - end);
        assert_eq!(link.ends[end].namespace.ping_loss(&target), 0.0, "{}", link.logs());
        link.check_ping();
    }
}
