//! The underlay connects, can be cut, and can be watched. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "measured figures are for people to read")]

mod common;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{clear_pod, hosts};
use mesh_lab::{Family, Host, PingOptions, Scanner, Where, poll_until};

fn reaches(from: &Host, to: &Host, family: Family) -> bool {
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    let target = to.underlay(family).to_string();
    from.exec(&["ping", flag, "-c", "1", "-W", "0.3", &target]).unwrap().status.success()
}

#[test]
fn cuts_stop_both_directions_and_families_and_heal() {
    let lab = hosts("labw-cut", 3);
    let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
    let all = || {
        let pairs = [(&a, &b), (&b, &a), (&a, &c), (&c, &a), (&b, &c), (&c, &b)];
        let mut up = Vec::new();
        for (from, to) in pairs {
            let both = Family::BOTH.map(|family| reaches(from, to, family));
            assert_eq!(both[0], both[1], "{} > {}: families differ", from.name(), to.name());
            if both[0] {
                up.push(format!("{}{}", from.name(), to.name()));
            }
        }
        up.join(" ")
    };
    let whole = "h1h2 h2h1 h1h3 h3h1 h2h3 h3h2";
    assert_eq!(all(), whole);
    lab.cut(&a, &b).unwrap();
    assert_eq!(all(), "h1h3 h3h1 h2h3 h3h2");
    lab.heal(&a, &b).unwrap();
    assert_eq!(all(), whole);
    lab.heal(&a, &b).unwrap();
    lab.cut_groups(&[&[a.clone(), b.clone()], std::slice::from_ref(&c)]).unwrap();
    assert_eq!(all(), "h1h2 h2h1");
    lab.heal_all().unwrap();
    assert_eq!(all(), whole);
    // Everybody reaches the router: a leak to the default route is a frame that can be seen.
    for router in ["198.18.0.254", "fd00:18::fe"] {
        a.exec_ok(&["ping", "-c", "1", "-W", "1", router]).unwrap();
    }
    let fourth = lab.add_host().unwrap();
    assert!(reaches(&fourth, &a, Family::V4) && reaches(&a, &fourth, Family::V6));
}

#[test]
fn pods_in_the_clear_are_found_on_the_underlay() {
    let lab = hosts("labw-clear", 2);
    let (a, b) = (lab.host(0), lab.host(1));
    let (p, q) = (clear_pod(&a, &[&b]), clear_pod(&b, &[&a]));

    // First what an underlay may carry: ARP and neighbour discovery for a UDP packet to the tunnel's port.
    let scanner = Scanner::new(None);
    let inspector = scanner.clone();
    let quiet = lab.capture(&Where::Underlay, move |frame| inspector.inspect(frame)).unwrap();
    a.exec_ok(&["ip", "neigh", "flush", "all"]).unwrap();
    for (number, family) in (1..).zip(Family::BOTH) {
        let to = std::net::SocketAddr::new(b.underlay(family), 6784);
        let any = std::net::SocketAddr::new(a.underlay(family), 6784);
        a.net().run(|| std::net::UdpSocket::bind(any).unwrap().send_to(b"sealed", to).unwrap()).unwrap();
        poll_until("the frame", Duration::from_secs(5), || {
            scanner.tally().0.get("UDP 6784 (WireGuard)").is_some_and(|(frames, _)| *frames >= 2 * number)
        })
        .unwrap();
    }
    let (report, _) = quiet.stop().unwrap();
    eprintln!("{}", scanner.tally());
    // Nobody listens there, and the kernel says so: those two are the only foreign frames.
    let unreachable =
        |finding: &String| finding.starts_with("IP protocol 1 ") || finding.starts_with("ICMPv6 type 1 ");
    assert!(report.findings.keys().all(unreachable), "{report:?}");
    assert!(
        scanner.tally().0.contains_key("ARP") && scanner.tally().0.contains_key("ICMPv6 neighbour disc.")
    );

    let inspector = scanner.clone();
    let underlay = lab.capture(&Where::Underlay, move |frame| inspector.inspect(frame)).unwrap();
    let marked = Arc::new(AtomicU64::new(0));
    let (counter, finder) = (Arc::clone(&marked), scanner.clone());
    let inside = lab
        .capture(&Where::Pod(p.clone()), move |frame| {
            if finder.has_marker(frame.data) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            None
        })
        .unwrap();
    for family in Family::BOTH {
        let options = PingOptions { count: 5, interval: Duration::from_millis(5), ..PingOptions::default() };
        let stats = p.ping(q.address(family), options).unwrap();
        assert!(stats.all_answered(), "{family}: {stats:?}");
        assert_eq!((stats.sent, stats.rtts.len(), stats.duplicates), (5, 5, 0));
        let transfer = p.tcp_send_to(&q, family, 100 << 20).unwrap();
        assert_eq!(transfer.bytes, 100 << 20);
        eprintln!("{family}: {:.2} Gbit/s while captured twice", transfer.gbit_per_second());
    }
    let (inside, _) = inside.stop().unwrap();
    let (report, _) = underlay.stop().unwrap();
    eprintln!("underlay {report:#?}");
    assert!(inside.bytes > 200 << 20, "{inside:?}");
    assert!(marked.load(Ordering::Relaxed) > 1000);
    assert!(report.bytes > 400 << 20, "seen at both ports");
    assert!(report.findings["pod payload in the clear"] > 1000);
    assert_eq!((report.dropped, inside.dropped), (0, 0));
}

#[test]
fn pings_count_what_a_cut_costs() {
    let lab = hosts("labw-ping", 2);
    let (a, b) = (lab.host(0), lab.host(1));
    let (p, q) = (clear_pod(&a, &[&b]), clear_pod(&b, &[&a]));
    let options = PingOptions {
        count: u32::MAX,
        interval: Duration::from_millis(10),
        linger: Duration::from_millis(300),
        ..PingOptions::default()
    };
    for family in Family::BOTH {
        let running = p.start_ping(q.address(family), options).unwrap();
        poll_until("answers", Duration::from_secs(5), || {
            p.ping(q.address(family), PingOptions::default()).unwrap().all_answered()
        })
        .unwrap();
        lab.cut(&a, &b).unwrap();
        let single = PingOptions { linger: Duration::from_millis(200), ..PingOptions::default() };
        assert_eq!(p.ping(q.address(family), single).unwrap().lost, 1);
        lab.heal(&a, &b).unwrap();
        poll_until("answers", Duration::from_secs(5), || {
            p.ping(q.address(family), single).unwrap().all_answered()
        })
        .unwrap();
        let stats = running.stop().unwrap();
        assert!(stats.lost >= 10 && stats.longest_gap >= 10 && stats.received > 0, "{stats:?}");
        assert_eq!(stats.sent, stats.received + stats.lost);
    }
    let nobody: IpAddr = "10.98.0.1".parse().unwrap();
    let options = PingOptions { linger: Duration::from_millis(100), ..PingOptions::default() };
    assert_eq!(p.ping(nobody, options).unwrap().lost, 1);
}
