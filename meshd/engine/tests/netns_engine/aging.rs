//! What only time brings about. First in the alphabet, so that it runs while the others do.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::support::{End, Kind, Link, Underlay, loss, psk, require_root};

/// Rekeying by age: the initiator starts a new handshake after 120 seconds. Each implementation has its turn.
#[test]
fn a_rekey_after_two_minutes_loses_no_ping() {
    require_root();
    let links = [
        ([Kind::Mesh, Kind::Go], None),
        ([Kind::Go, Kind::Mesh], Some(psk())),
        ([Kind::Mesh; 2], Some(psk())),
        ([Kind::Mesh, Kind::Boringtun], Some(psk())),
        ([Kind::Boringtun, Kind::Mesh], None),
    ]
    .map(|(kinds, psk)| Link::new(kinds, Underlay::V4, psk.as_deref()));
    let mut pings = Vec::new();
    for link in &links {
        // The first end sends first, so it initiates.
        let ping = link.ends[0]
            .namespace
            .command("ping")
            // Quiet: with a line for each, those that are waited for last would stand still before full pipes.
            .args(["-n", "-q", "-c", "1300", "-i", "0.1", "-W", "5", "10.9.0.2"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        pings.push(ping);
    }
    thread::sleep(Duration::from_secs(5));
    let before: Vec<_> = links.iter().map(|link| link.ends.each_ref().map(End::last_handshake)).collect();
    for ((link, ping), before) in links.iter().zip(pings).zip(before) {
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("1300 packets transmitted"), "{text}");
        assert_eq!(loss(&text), Some(0.0), "{text}\n{}", link.logs());
        // boringtun reports how long ago the last handshake was, instead of when.
        let told = link.ends.iter().zip(before).filter(|(end, _)| end.device.kind != Kind::Boringtun);
        for (end, before) in told {
            let age = end.last_handshake().saturating_sub(before);
            assert!(
                !before.is_zero() && age >= Duration::from_secs(115),
                "rekeyed after {age:?}\n{}",
                link.logs()
            );
        }
    }
}
