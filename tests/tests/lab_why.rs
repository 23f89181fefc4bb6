//! What `meshctl why` and `meshctl doctor` say when a port is closed, in one direction or in both.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Lab, Options, Secret, poll_until};
use mesh_tests::{FAMILIES, every, logs, options, reaches_within, up};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

/// What a command says, and its exit status.
fn ask(host: &Host, words: &[&str]) -> (Value, i32) {
    let output = host.exec(&[&["meshctl"], words, &["-o", "json"]].concat()).unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (report, output.status.code().unwrap())
}

fn text(host: &Host, words: &[&str]) -> String {
    let output = host.exec(&[&["meshctl"], words].concat()).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Protocol, port, direction and level of each port that is said to be closed.
fn failures(report: &Value) -> Vec<String> {
    let of = |finding: &Value| {
        let failure = finding.get("failure")?;
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (protocol, direction) = (word(&failure["protocol"]), word(&failure["direction"]));
        Some(format!("{protocol} {} {direction}: {}", failure["port"], word(&finding["level"])))
    };
    report["findings"].as_array().into_iter().flatten().filter_map(of).collect()
}

fn id(host: &Host) -> String {
    host.status().unwrap()["node"]["id"].as_str().unwrap().to_owned()
}

/// What a host does from now on with packets of that kind to, or from, another one.
fn rule(host: &Host, hook: &str, other: &Host, what: &str) {
    let side = if hook == "output" { "daddr" } else { "saddr" };
    let [v4, v6] = FAMILIES.map(|family| other.underlay(family));
    let rules = format!(
        "table inet t-why {{ chain {hook} {{ type filter hook {hook} priority -300; \
         ip {side} {v4} {what}; ip6 {side} {v6} {what}; }}; }}"
    );
    host.exec_ok(&["nft", &rules]).unwrap();
}

fn no_rules(host: &Host) {
    host.exec_ok(&["nft", "delete table inet t-why"]).unwrap();
}

fn is_relayed(host: &Host, peer: &str) -> bool {
    let status = host.status().unwrap();
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    peers.iter().any(|entry| entry["id"] == *peer && entry["path"]["relay"].is_string())
}

/// Two of the hosts: the one that chooses the path, and the other one.
fn pair(lab: &Lab) -> (Host, Host) {
    let (a, b) = (lab.host(0), lab.host(1));
    if id(&a) < id(&b) { (a, b) } else { (b, a) }
}

#[test]
fn where_all_is_well_nothing_is_found() {
    let lab = up(Options { nodes: 3, pods: 1, secret: Secret::Key, ..options("t-whywell") });
    let [a, b, c] = [0, 1, 2].map(|host| lab.host(host));
    let (p, q) = (a.pod(0).unwrap(), b.pod(0).unwrap());
    for family in FAMILIES {
        reaches_within(&p, &q, family, 10 * SECOND);
        let (from, to) = (p.address(family).to_string(), q.address(family).to_string());
        for host in [&a, &b] {
            let (report, status) = ask(host, &["why", &from, &to]);
            assert_eq!(
                (&report["verdict"], status),
                (&Value::from("flows"), 0),
                "{report:#}\n{}",
                logs(&lab)
            );
            assert_eq!((failures(&report), &report["schema_version"]), (vec![], &Value::from(1)));
            assert!(report.to_string().contains("answers a ping through the tunnel"), "{report:#}");
        }
        assert_eq!(ask(&c, &["why", &from, &to]).1, 5, "neither end is there");
    }
    let (from, to) = (p.address(Family::V4).to_string(), format!("{}:80", q.address(Family::V4)));
    assert!(text(&a, &["why", &from, &to]).contains("NOT evaluated"));
    println!("{}", text(&a, &["why", &from, &to]));
    assert_eq!(ask(&a, &["why", &from, "nobody"]).1, 1);
    assert_eq!(ask(&a, &["why", &from, "198.51.100.7"]).1, 4, "pods do not get there");
    for host in [&a, &b, &c] {
        // What was said and needs no answer is not taken for something that is not answered.
        std::thread::sleep(6 * SECOND);
        let (report, status) = ask(host, &["doctor"]);
        assert_eq!((failures(&report), status), (vec![], 0), "{report:#}");
        assert!(!report.to_string().contains("\"warning\""), "{report:#}");
    }
    println!("{}", text(&a, &["doctor"]));
}

#[test]
fn a_tunnel_port_that_is_closed_in_one_direction_is_named() {
    let lab = up(Options { nodes: 3, pods: 1, secret: Secret::Key, ..options("t-whylane") });
    let (leads, follows) = pair(&lab);
    let (p, q) = (leads.pod(0).unwrap(), follows.pod(0).unwrap());
    let (from, to) = (p.address(Family::V4).to_string(), q.address(Family::V4).to_string());
    for (closing, other, at_leader, at_follower) in
        [(&follows, &leads, "from-member", "to-member"), (&leads, &follows, "to-member", "from-member")]
    {
        reaches_within(&p, &q, Family::V4, 20 * SECOND);
        let ping = p.start_ping(q.address(Family::V4), every(Duration::from_millis(100), u32::MAX)).unwrap();
        std::thread::sleep(3 * SECOND);
        rule(closing, "output", other, "udp dport 6784 drop");
        let start = Instant::now();
        // Nothing is sent by who asks: the pod does.
        let named = |host: &Host, direction: &str, level: &str| {
            let found = ask(host, &["why", &from, &to, "--passive"]);
            failures(&found.0) == [format!("udp 6784 {direction}: {level}")]
        };
        let found = poll_until("the port is named", 12 * SECOND, || {
            named(&leads, at_leader, "problem") && named(&follows, at_follower, "problem")
        });
        assert!(
            found.is_ok(),
            "{:#}\n{:#}",
            ask(&leads, &["why", &from, &to]).0,
            ask(&follows, &["why", &from, &to]).0
        );
        println!("{at_leader}: named at both ends after {:?}", start.elapsed());
        let (_, status) = ask(&leads, &["why", &from, &to, "--passive"]);
        assert_eq!(status, 4);
        println!(
            "{}{}",
            text(&leads, &["why", &from, &to, "--passive"]),
            text(&leads, &["doctor", "--passive"])
        );
        let (report, status) = ask(&leads, &["doctor", "--passive"]);
        assert_eq!((failures(&report), status), (vec![format!("udp 6784 {at_leader}: problem")], 4));

        let peer = id(&follows);
        if closing.name() == leads.name() {
            poll_until("a relay", 60 * SECOND, || is_relayed(&leads, &peer)).unwrap();
            println!("through a relay after {:?}", start.elapsed());
            poll_until("it carries", 10 * SECOND, || ask(&leads, &["why", &from, &to]).1 == 0).unwrap();
            // From time to time the direct way is tried again, for a few seconds.
            for (host, direction) in [(&leads, at_leader), (&follows, at_follower)] {
                let expected = vec![format!("udp 6784 {direction}: warning")];
                let told = poll_until("relay and port are named", 30 * SECOND, || {
                    let (why, status) = ask(host, &["why", &from, &to]);
                    let relayed =
                        why["summary"].as_str().is_some_and(|text| text.contains("through the relay"));
                    let (doctor, well) = ask(host, &["doctor"]);
                    relayed
                        && failures(&why) == expected
                        && failures(&doctor) == expected
                        && (status, well) == (0, 0)
                });
                assert!(told.is_ok(), "{:#}\n{}", ask(host, &["why", &from, &to]).0, logs(&lab));
            }
            println!("{}{}", text(&leads, &["why", &from, &to]), text(&leads, &["doctor"]));
            no_rules(closing);
            poll_until("the direct way", 60 * SECOND, || !is_relayed(&leads, &peer)).unwrap();
            let clear = poll_until("nothing is said of it any more", 30 * SECOND, || {
                [&leads, &follows].iter().all(|host| failures(&ask(host, &["why", &from, &to]).0).is_empty())
            });
            assert!(clear.is_ok(), "{:#}\n{}", ask(&leads, &["why", &from, &to]).0, logs(&lab));
        } else {
            no_rules(closing);
        }
        ping.stop().unwrap();
    }
}

#[test]
fn a_control_port_without_datagrams_is_named() {
    let lab = up(Options { nodes: 3, pods: 1, secret: Secret::Key, ..options("t-whyudp") });
    let (a, b) = (lab.host(0), lab.host(1));
    let (p, q) = (a.pod(0).unwrap(), b.pod(0).unwrap());
    let (from, to) = (p.address(Family::V4).to_string(), q.address(Family::V4).to_string());
    reaches_within(&p, &q, Family::V4, 10 * SECOND);
    let ping = p.start_ping(q.address(Family::V4), every(Duration::from_millis(100), u32::MAX)).unwrap();
    for (hooks, direction) in [(&["output"][..], "to-member"), (&["output", "input"][..], "either")] {
        hooks.iter().for_each(|hook| rule(&a, hook, &b, "udp dport 6783 drop"));
        let named = poll_until("the port is named", 40 * SECOND, || {
            failures(&ask(&a, &["why", &from, &to]).0) == [format!("udp 6783 {direction}: warning")]
        });
        assert!(named.is_ok(), "{:#}\n{}", ask(&a, &["why", &from, &to]).0, logs(&lab));
        let (report, status) = ask(&a, &["why", &from, &to]);
        assert_eq!(status, 0, "the tunnel carries all the same: {report:#}");
        println!("{}{}", text(&a, &["why", &from, &to]), text(&a, &["doctor"]));
        let (report, status) = ask(&a, &["doctor"]);
        assert_eq!(
            (failures(&report), status),
            (vec![format!("udp 6783 {direction}: warning")], 0),
            "{report:#}"
        );
        no_rules(&a);
    }
    ping.stop().unwrap();
}

#[test]
fn without_control_sessions_there_is_no_key_and_the_reason_is_named() {
    let lab =
        Lab::up(Options { nodes: 3, daemons: false, secret: Secret::Key, ..options("t-whytcp") }).unwrap();
    let [shut, late, first] = [0, 1, 2].map(|host| lab.host(host));
    let join = first.underlay(Family::V4).to_string();
    let args = |join: &[&str]| {
        [&["--key-file", "/etc/meshd/key"][..], join].concat().into_iter().map(str::to_owned).collect()
    };
    first.spawn_daemon_with(args(&[])).unwrap();
    first.wait_ready(20 * SECOND).unwrap();
    shut.spawn_daemon_with(args(&["--join", &join])).unwrap();
    shut.wait_ready(20 * SECOND).unwrap();
    // From now on it has no sessions with anybody; datagrams tell it of the member that comes late.
    for (hook, what) in [("output", "drop"), ("input", "drop")] {
        let rules = format!(
            "table inet t-why {{ chain {hook} {{ type filter hook {hook} priority -300; tcp dport 6783 {what}; \
             tcp sport 6783 {what}; }}; }}"
        );
        shut.exec_ok(&["nft", &rules]).unwrap();
    }
    late.spawn_daemon_with(args(&["--join", &join])).unwrap();
    late.wait_ready(20 * SECOND).unwrap();
    let name = late.name().to_owned();
    let named = |host: &Host, peer: &str, says: &str| {
        let (report, status) = ask(host, &["why", host.name(), peer]);
        let summary = report["summary"].as_str().unwrap_or_default();
        status == 4 && summary.contains(says) && failures(&report) == ["tcp 6783 to-member: problem"]
    };
    let found = poll_until("the reason is named", 40 * SECOND, || named(&shut, &name, "timed out"));
    assert!(found.is_ok(), "{:#}\n{}", ask(&shut, &["why", shut.name(), &name]).0, logs(&lab));
    println!("{}{}", text(&shut, &["why", shut.name(), &name]), text(&shut, &["doctor"]));
    let (report, status) = ask(&shut, &["doctor"]);
    assert!(failures(&report).contains(&"tcp 6783 to-member: problem".to_owned()), "{report:#}");
    assert_eq!(status, 4);
    no_rules(&shut);
    let healed = poll_until("a key", 60 * SECOND, || ask(&shut, &["why", shut.name(), &name]).1 == 0);
    assert!(healed.is_ok(), "{:#}\n{}", ask(&shut, &["why", shut.name(), &name]).0, logs(&lab));
}

#[test]
fn a_relay_that_is_in_use_is_named_and_what_is_wrong_with_the_direct_way() {
    let lab = up(Options { nodes: 3, pods: 1, secret: Secret::Key, ..options("t-whyrelay") });
    let (a, b) = (lab.host(0), lab.host(1));
    let (p, q) = (a.pod(0).unwrap(), b.pod(0).unwrap());
    let (from, to) = (p.address(Family::V4).to_string(), q.address(Family::V4).to_string());
    let ping = p.start_ping(q.address(Family::V4), every(Duration::from_millis(100), u32::MAX)).unwrap();
    std::thread::sleep(3 * SECOND);
    lab.cut(&a, &b).unwrap();
    let peer = id(&b);
    poll_until("a relay", 20 * SECOND, || is_relayed(&a, &peer)).unwrap();
    let relay = lab.host(2);
    let carries = poll_until("it carries", 20 * SECOND, || {
        let (report, status) = ask(&a, &["why", &from, &to]);
        let summary = report["summary"].as_str().unwrap_or_default();
        status == 0 && summary.contains(&format!("through the relay {}", relay.name()))
    });
    assert!(carries.is_ok(), "{:#}\n{}", ask(&a, &["why", &from, &to]).0, logs(&lab));
    let named = poll_until("the control port is named", 20 * SECOND, || {
        failures(&ask(&a, &["why", &from, &to]).0).contains(&"udp 6783 either: warning".to_owned())
    });
    assert!(named.is_ok(), "{:#}\n{}", ask(&a, &["why", &from, &to]).0, logs(&lab));
    println!("{}{}", text(&a, &["why", &from, &to]), text(&a, &["doctor"]));
    let (report, status) = ask(&a, &["doctor"]);
    assert!(
        report.to_string().contains(&format!("reached through the relay {}", relay.name())),
        "{report:#}"
    );
    assert_eq!(status, 0, "{report:#}");
    ping.stop().unwrap();
}
