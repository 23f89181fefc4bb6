//! What is passed on, and what is not.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::Duration;

use mesh_core::node::Input;
use mesh_core::relay::{Dropped, Endpoint};
use mesh_sys::packet::{Capture, CaptureConfig};

use crate::ends::{Engine, RELAY_PORT, Site, inner, outer};

/// WireGuard sends another initiation when one was not answered for so long.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether an end reaches the other by every address, with small and large packets.
pub(crate) fn reaches(site: &Site, from: usize) -> bool {
    let end = &site.ends[from].ns;
    let large = |ip| end.try_sh(&format!("ping -n -c2 -i0.05 -w3 -s4000 {ip}")).status.success();
    inner(site.ends[1 - from].number).into_iter().all(|ip: IpAddr| end.pings(ip) && large(ip))
}

pub(crate) fn connected(engines: [Engine; 2], families: [bool; 2]) -> Site {
    let site = Site::new(engines, families);
    site.register();
    assert!(reaches(&site, 0) && reaches(&site, 1), "{families:?}: {:?}", site.relay.counters());
    site
}

#[test]
fn hosts_without_another_way_talk_through_the_relay_also_from_family_to_family() {
    for families in [[true, true], [false, false], [true, false]] {
        let site = Site::new([Engine::MeshWg; 2], families);
        assert!(!reaches(&site, 0), "there is another way than the relay, or it serves strangers");
        assert_eq!(site.relay.counters().passed_on.load(Ordering::Relaxed), 0);
        assert!(site.relay.counters().dropped(Dropped::Stranger) > 0);
        site.register();
        std::thread::sleep(REKEY_TIMEOUT);
        assert!(reaches(&site, 0) && reaches(&site, 1), "{families:?}: {:?}", site.relay.counters());
        assert!(site.relay.counters().passed_on.load(Ordering::Relaxed) > 16);
    }
}

#[test]
fn any_wireguard_may_be_at_the_ends() {
    connected([Engine::MeshWg, Engine::WireguardGo], [true, true]);
    connected([Engine::WireguardGo, Engine::WireguardGo], [true, false]);
}

#[test]
fn a_session_goes_on_when_an_end_says_that_it_has_moved() {
    let site = connected([Engine::MeshWg; 2], [true, true]);
    let handshake = site.ends[0].last_handshake();
    site.ends[0].listen_at(7_000);
    let before = site.relay.counters().dropped(Dropped::Stranger);
    assert!(!reaches(&site, 0));
    assert!(site.relay.counters().dropped(Dropped::Stranger) > before);
    let endpoint = Endpoint { remote: SocketAddr::new(site.endpoint(0).ip(), 7_000), local: None };
    site.relay.relay().register(site.ends[0].key, endpoint, 2, site.now()).unwrap();
    assert!(reaches(&site, 0) && reaches(&site, 1));
    assert_eq!(site.ends[0].last_handshake(), handshake);
}

#[test]
fn what_is_passed_on_cannot_be_read() {
    const MARKER: &[u8] = b"readable";
    let seen = |capture: &mut Capture| {
        let mut found = 0;
        let frames = capture.read_for(Duration::from_millis(300), |frame| {
            found += usize::from(frame.data.windows(MARKER.len()).any(|window| window == MARKER));
        });
        assert_eq!(capture.statistics().unwrap().dropped, 0);
        (frames.unwrap(), found)
    };
    let site = connected([Engine::MeshWg; 2], [true, true]);
    let mut between = Capture::open_in(&site.between.netns, &CaptureConfig::default()).unwrap();
    let device = Some(site.ends[0].device.clone());
    let inside = CaptureConfig { device, ..CaptureConfig::default() };
    let mut inside = Capture::open_in(&site.ends[0].ns.netns, &inside).unwrap();
    let to = inner(2)[0];
    site.ends[0].ns.sh(&format!("ping -n -c20 -i0.01 -s 800 -p 7265616461626c65 {to}"));
    assert_eq!(seen(&mut inside).1, 40, "the marker is in what is sent");
    let (frames, readable) = seen(&mut between);
    assert!(frames >= 80 && readable == 0, "{readable} of {frames} frames can be read");
}

#[test]
fn gossip_on_the_same_port_is_the_nodes() {
    let mut site = connected([Engine::MeshWg; 2], [true, true]);
    let relay = SocketAddr::new(outer(1, 1, true), RELAY_PORT);
    let send = || {
        let socket = UdpSocket::bind((outer(1, 2, true), 0))?;
        socket.send_to(b"gossip", relay)?;
        socket.local_addr()
    };
    let from = site.ends[0].ns.netns.run(send).unwrap().unwrap();
    let Some(Input::Datagram { from: seen, bytes, .. }) = site.for_the_node() else {
        panic!("nothing for the node")
    };
    assert_eq!((seen, bytes.as_slice()), (from, &b"gossip"[..]));
    assert!(site.for_the_node().is_none(), "nothing of WireGuard's comes to the node");
}
