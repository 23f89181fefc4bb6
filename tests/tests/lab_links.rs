//! Real daemons behind NATs and firewalls, and on links that delay and lose.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use mesh_lab::{
    Behaviour, Impairment, Lab, Nat, Options, Place, Router, Scanner, Secret, Share, Span, Topology, Where,
};
use mesh_tests::{FAMILIES, every, logs, options, reaches_within, up};

const SECOND: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

fn nat(mapping: Behaviour, filtering: Behaviour) -> Router {
    Router::nat(Nat::new(mapping, filtering))
}

/// h1 is public, h2 and h3 are behind NATs, h4 behind a firewall.
fn town() -> Topology {
    use Behaviour::{AddressAndPortDependent, EndpointIndependent};
    Topology::default()
        .router("cone", nat(EndpointIndependent, EndpointIndependent))
        .router("symmetric", nat(AddressAndPortDependent, AddressAndPortDependent))
        .router("wall", Router::firewall())
        .host("h2", Place::behind("cone"))
        .host("h3", Place::behind("symmetric"))
        .host("h4", Place::behind("wall"))
}

#[test]
fn pods_behind_nats_and_firewalls_reach_each_other() {
    let options = Options { nodes: 4, pods: 1, topology: town(), secret: Secret::Key, ..options("t-town") };
    let start = Instant::now();
    let lab = Lab::up(options).expect("the lab");
    println!("up after {:?}", start.elapsed());
    let scanner = Scanner::new(Some(lab.cluster_ranges().unwrap()));
    let capture = lab.capture(&Where::Underlay, move |frame: &_| scanner.inspect(frame)).unwrap();
    let report = lab.check(30 * SECOND).unwrap();
    let (seen, _) = capture.stop().unwrap();
    println!("everything is reached {:?} after the start of the lab", start.elapsed());
    assert_eq!(report.failed().count(), 0, "{}\n{}", report.matrix(), logs(&lab));
    assert!(seen.frames > 1000 && seen.found == 0 && seen.dropped == 0, "{seen:?}");
    for host in lab.hosts() {
        println!("{}:\n{}", host.name(), host.exec_ok(&["meshctl", "status", "paths"]).unwrap());
    }
}

#[test]
fn tunnels_are_as_slow_and_lossy_as_the_links_below() {
    let lab = up(Options { nodes: 3, pods: 1, secret: Secret::Key, ..options("t-slow") });
    let [a, b, c] = [0, 1, 2].map(|host| lab.host(host));
    let [p, q, r] = [&a, &b, &c].map(|host| host.pod(0).unwrap());
    for family in FAMILIES {
        reaches_within(&p, &q, family, 10 * SECOND);
        reaches_within(&p, &r, family, 10 * SECOND);
    }
    lab.impair(&a, &b, Impairment { delay: Span(20 * MS), loss: Share::percent(2), ..Impairment::NONE })
        .unwrap();
    for family in FAMILIES {
        let stats = p.ping(q.address(family), every(5 * MS, 200)).unwrap();
        let fastest = stats.rtts.iter().min().copied().unwrap_or_default();
        println!(
            "{family:?}: 20 ms and 2% each way: {} of {} lost, fastest {fastest:?}",
            stats.lost, stats.sent
        );
        assert!(fastest >= 40 * MS && fastest < 60 * MS, "{fastest:?}\n{}", logs(&lab));
        // Four of a hundred are, eight of these: none, or more than twice as many, is less likely than one in a thousand.
        assert!((1..=20).contains(&stats.lost), "{stats:?}");
        let aside = p.ping(r.address(family), every(5 * MS, 50)).unwrap();
        assert!(aside.all_answered() && aside.rtts.iter().min() < Some(&(10 * MS)), "{aside:?}");
        let done = p.tcp_send_to(&q, family, 1 << 20).unwrap();
        println!("{family:?}: {:.1} Mbit/s of TCP", done.gbit_per_second() * 1000.0);
    }
}

#[test]
fn meshctl_brings_up_a_topology_file_and_changes_its_links() {
    let options = options("t-file");
    let meshctl = |words: &str| {
        let mut words = words.split_whitespace();
        let mut command = Command::new(&options.binaries.meshctl);
        command.arg("lab").arg(words.next().unwrap()).args(["--name", "t-file"]).args(words);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    };
    let file = std::env::temp_dir().join(format!("t-file-{}.toml", std::process::id()));
    let up = format!("up --pods 1 --key --topology {}", file.display());
    std::fs::write(&file, "[host.h2]\nbehind = \"office\"\n").unwrap();
    let (success, text) = meshctl(&up);
    assert!(!success && text.contains("office") && text.contains("t-file"), "{text}");
    let nat = "{ mapping = \"endpoint-independent\", filtering = \"address-dependent\" }";
    std::fs::write(&file, format!("[router.office]\nnat = {nat}\n[host.h2]\nbehind = \"office\"\n")).unwrap();
    let (success, text) = meshctl(&up);
    std::fs::remove_file(&file).unwrap();
    assert!(success, "{text}");
    // From here on the lab goes with the test.
    let lab = Lab::open("t-file").unwrap();
    lab.set_keep(false);
    assert_eq!(lab.hosts().len(), 2);
    let (p, q) = (lab.host(0).pod(0).unwrap(), lab.host(1).pod(0).unwrap());
    for family in FAMILIES {
        reaches_within(&p, &q, family, 20 * SECOND);
    }
    assert_eq!(
        meshctl("link h1 h2 --delay 30ms"),
        (true, "h1 > h2: delay 30ms\nh2 > h1: delay 30ms\n".to_owned())
    );
    let stats = p.ping(q.address(FAMILIES[0]), every(10 * MS, 10)).unwrap();
    assert!(stats.rtts.iter().min() >= Some(&(60 * MS)), "{stats:?}");
    assert!(meshctl("links").1.contains("delay 30ms"));
    assert!(meshctl("link h1 h2 --clear").0);
    assert_eq!(meshctl("links").1, "nothing happens to any packet\n");
}
