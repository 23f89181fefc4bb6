//! Capturing and sending whole frames.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::{Duration, SystemTime};

use common::{Node, Ns};
use mesh_sys::packet::{Capture, CaptureConfig, Direction, PacketError, Sender};

#[test]
fn a_capture_sees_both_directions_with_times_and_loses_nothing() {
    let node = Node::new(1, true);
    let config = CaptureConfig { device: Some("mesh0".into()), ..CaptureConfig::default() };
    let mut capture = Capture::open_in(&node.host.netns, &config).unwrap();
    let before = SystemTime::now();
    node.pods[0].ns.sh("ping -q -n -c 20 -i 0.01 -p 6d657368 10.32.1.1");
    let (mut there, mut back) = (0, 0);
    capture
        .read_for(Duration::from_millis(200), |frame| {
            if frame.data.windows(8).any(|w| w == b"meshmesh") {
                assert!(
                    matches!(frame.direction, Direction::Host | Direction::Outgoing),
                    "{:?}",
                    frame.direction
                );
                there += usize::from(frame.direction == Direction::Host);
                back += usize::from(frame.direction == Direction::Outgoing);
                assert!(frame.time >= before && frame.time <= SystemTime::now());
            }
        })
        .unwrap();
    assert_eq!((there, back), (20, 20));
    let statistics = capture.statistics().unwrap();
    assert!(statistics.received >= 40 && statistics.dropped == 0, "{statistics:?}");
}

#[test]
fn what_does_not_fit_is_counted_as_dropped() {
    let node = Node::new(1, true);
    let config = CaptureConfig { device: Some("mesh0".into()), buffer: 4096, promiscuous: true };
    let mut capture = Capture::open_in(&node.host.netns, &config).unwrap();
    node.pods[0].ns.sh("ping -q -n -c 50 -i 0.002 10.32.1.1");
    let read = capture.read_for(Duration::from_millis(50), |_| {}).unwrap();
    let statistics = capture.statistics().unwrap();
    assert!(statistics.dropped > 0, "{statistics:?}");
    assert_eq!(statistics.received, u64::try_from(read).unwrap() + statistics.dropped);
    assert_eq!(capture.statistics().unwrap(), statistics, "reading the counts must not change them");
}

#[test]
fn frames_larger_than_the_mtu_come_whole() {
    let node = Node::new(2, true);
    let config = CaptureConfig { device: Some("eth0".into()), ..CaptureConfig::default() };
    let mut capture = Capture::open_in(&node.pods[0].ns.netns, &config).unwrap();
    let server = node.pods[1].ns.netns.run(|| std::net::TcpListener::bind("[::]:9").unwrap()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| std::io::copy(&mut server.accept().unwrap().0, &mut std::io::sink()).unwrap());
        let to = std::net::SocketAddr::new(node.pods[1].v4.into(), 9);
        let mut stream = node.pods[0].ns.netns.run(|| std::net::TcpStream::connect(to).unwrap()).unwrap();
        std::io::Write::write_all(&mut stream, &vec![7; 4 << 20]).unwrap();
    });
    let (mut largest, mut payload) = (0, 0usize);
    capture
        .read_for(Duration::from_millis(200), |frame| {
            largest = largest.max(frame.data.len());
            payload += frame.data.iter().filter(|b| **b == 7).count();
        })
        .unwrap();
    assert_eq!(capture.statistics().unwrap().dropped, 0);
    assert!(largest > 1514, "segmentation offload would show larger frames than {largest}");
    assert!(payload >= 4 << 20, "bytes are missing: {payload}");
}

#[test]
fn errors_name_the_device() {
    let ns = Ns::new("pkt");
    let config = CaptureConfig { device: Some("absent0".into()), ..CaptureConfig::default() };
    for error in [
        Capture::open_in(&ns.netns, &config).unwrap_err(),
        Sender::open_in(&ns.netns, "absent0").unwrap_err(),
    ] {
        assert!(matches!(error, PacketError::Socket { .. }));
        assert!(
            error.to_string().contains("absent0") && error.to_string().contains("no such device"),
            "{error}"
        );
    }
    let error = Sender::open_in(&ns.netns, "lo").unwrap().send(&[0; 100_000]).unwrap_err();
    assert!(error.to_string().contains("MTU"), "{error}");
}
