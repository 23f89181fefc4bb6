use std::time::Duration;

use super::*;
use crate::api::{Backend, LaneStatus, NodeName, Pinged, Protocol, Verdict};
use crate::node::{GUARD_OBJECT, Problem};

const SECOND: Duration = Duration::from_secs(1);
const PING: Option<Pinged> = Some(Pinged::Answered { microseconds: 900 });
const NO_PING: Option<Pinged> = Some(Pinged::Unanswered { count: 6 });

fn here() -> NodeName {
    NodeName { id: "01".repeat(16), name: "h1".to_owned(), this_node: true }
}

/// A member with which all is well.
fn member(n: u8) -> Member {
    let ip = IpAddr::from([203, 0, 113, n]);
    let control = SocketAddr::new(ip, 6783);
    let range: IpNet = format!("10.32.{n}.0/24").parse().unwrap();
    Member {
        id: NodeId::from_bytes([n; 16]),
        label: format!("h{n}"),
        reachable: true,
        gossip: Gossip {
            port: 6783,
            addresses: vec![control],
            from: Some(control),
            heard: Some(SECOND),
            probe: Probe::Answered,
            rtt: Some(Duration::from_micros(800)),
        },
        session: Session {
            state: SessionState::None,
            failed: None,
            addresses: vec![control],
            is_calling: false,
        },
        key: Key::Confirmed,
        lanes: vec![lane(ip, 0)],
        path: None,
        mtu: None,
        routes: vec![(range, "meshwg0".to_owned())],
        ranges: vec![range],
    }
}

fn lane(ip: IpAddr, index: u8) -> Lane {
    let port = 6784 + u16::from(index);
    let at = SocketAddr::new(ip, port);
    Lane {
        index,
        port,
        device: Some(format!("meshwg{index}")),
        endpoint: Some(at),
        direct: Some(at),
        handshake: Some(SECOND * 20),
        received: Some(SECOND),
        sent: Some(SECOND),
        silence: None,
    }
}

fn silence(direction: Direction) -> Option<Silence> {
    Some(Silence { direction, sent: 4200, over: SECOND * 14, ended: None })
}

/// The tunnel goes through a relay.
fn relayed(member: &mut Member, why: Why) {
    let path = Path { relay: Some("h9".to_owned()), why, since: SECOND * 8, chosen_here: true, rtt: None };
    member.path = Some(path);
}

fn pod() -> End {
    let port = LocalPort {
        attachment: "c1/eth0".to_owned(),
        pod: Some("pod default/web-0".to_owned()),
        device: "mv0123456789ab".to_owned(),
        standing: Standing::Applied,
    };
    End { text: "10.32.1.2".to_owned(), address: "10.32.1.2".parse().ok(), owner: Owner::Pod(port) }
}

fn remote(member: &Member) -> End {
    let owner =
        Owner::Member { id: member.id, label: member.label.clone(), range: member.ranges.first().copied() };
    End { text: "10.32.2.2".to_owned(), address: "10.32.2.2".parse().ok(), owner }
}

fn flow(member: Member, pinged: Option<Pinged>) -> WhyFacts {
    WhyFacts {
        here: here(),
        waiting_for: None,
        from: pod(),
        to: remote(&member),
        port: None,
        member: Some(member),
        is_applied: true,
        problems: Vec::new(),
        pinged,
        ping: None,
        look_again_milliseconds: None,
    }
}

/// What is said of the flow to a member that is like this.
fn of(pinged: Option<Pinged>, change: impl FnOnce(&mut Member)) -> WhyReport {
    let mut member = member(2);
    change(&mut member);
    why(&flow(member, pinged))
}

use crate::api::WhyReport;

fn failures(report: &WhyReport) -> Vec<(Protocol, u16, Option<u8>, Direction, Level)> {
    let of = |finding: &Finding| {
        let failure = finding.failure.as_ref()?;
        Some((failure.protocol, failure.port, failure.lane, failure.direction, finding.level))
    };
    report.findings.iter().filter_map(of).collect()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in: {text}"));
}

#[test]
fn nothing_stops_a_flow_with_which_all_is_well() {
    for pinged in [None, PING] {
        let report = of(pinged, |_| {});
        assert_eq!(report.verdict, Verdict::Flows, "{report:#?}");
        assert!(report.findings.iter().all(|finding| finding.level == Level::Ok), "{report:#?}");
        says(&report.summary, &["nothing that h1 knows stops it", "directly"]);
    }
    let idle = of(None, |member| {
        let lane = &mut member.lanes[0];
        (lane.handshake, lane.sent, lane.received) = (None, None, None);
    });
    assert_eq!(idle.verdict, Verdict::Flows);
    says(&idle.summary, &["nothing was sent to h2 of late"]);
}

#[test]
fn a_closed_tunnel_port_is_named_with_its_direction() {
    use Direction::{Both, Either, FromMember, ToMember};
    for (direction, words) in [
        (
            ToMember,
            &["does not arrive at h2", "closed on the way, in the direction from this host to h2"][..],
        ),
        (FromMember, &["h2 receives what this host sends", "in the direction from h2 to this host"][..]),
        (Both, &["in both directions"][..]),
        (
            Either,
            &[
                "this host sends, nothing comes back (sent 4200 bytes in the last 14 s, received 0)",
                "or the answers are",
            ][..],
        ),
    ] {
        for pinged in [None, NO_PING] {
            let report = of(pinged, |member| member.lanes[0].silence = silence(direction));
            assert_eq!(report.verdict, Verdict::Stopped);
            let expected = [(Protocol::Udp, 6784, Some(0), direction, Level::Problem)];
            assert_eq!(failures(&report), expected);
            says(
                &report.summary,
                &["UDP 6784 to 203.0.113.2", "probes on UDP 6783 to the same host are answered"],
            );
            says(&report.summary, words);
        }
    }
}

#[test]
fn each_lane_has_a_port_of_its_own() {
    let report = of(None, |member| {
        let ip = member.gossip.addresses[0].ip();
        member.lanes.push(Lane { silence: silence(Direction::ToMember), port: 7001, ..lane(ip, 1) });
    });
    assert_eq!(failures(&report), [(Protocol::Udp, 7001, Some(1), Direction::ToMember, Level::Problem)]);
}

#[test]
fn through_a_relay_it_flows_and_what_is_wrong_with_the_direct_way_is_said() {
    let report = of(PING, |member| {
        relayed(member, Why::PortClosed);
        let ended = Some(SECOND * 9);
        member.lanes[0].silence = silence(Direction::FromMember).map(|silence| Silence { ended, ..silence });
    });
    assert_eq!(report.verdict, Verdict::Flows, "{report:#?}");
    assert_eq!(failures(&report), [(Protocol::Udp, 6784, Some(0), Direction::FromMember, Level::Warning)]);
    says(&report.summary, &["through the relay h9"]);
    let tunnel = report.findings.iter().find(|finding| finding.failure.is_some()).unwrap();
    says(
        &tunnel.text,
        &["when it was tried last", "until 9 s ago", "UDP 6784 was closed", "from h2 to this host"],
    );
    // A daemon that has started anew knows of no bytes.
    let report = of(PING, |member| relayed(member, Why::PortClosed));
    assert_eq!(failures(&report), [(Protocol::Udp, 6784, Some(0), Direction::Either, Level::Warning)]);
    // The relay does not carry it either.
    let report = of(NO_PING, |member| {
        relayed(member, Why::Lost);
        member.lanes[0].received = Some(SECOND * 60);
    });
    assert_eq!(report.verdict, Verdict::Stopped);
}

#[test]
fn a_control_port_without_answers_is_a_warning_while_the_tunnel_carries() {
    let no_answers = |member: &mut Member| {
        member.gossip.probe = Probe::Unanswered(SECOND * 14);
        member.gossip.heard = Some(SECOND * 90);
    };
    let report = of(PING, no_answers);
    assert_eq!(report.verdict, Verdict::Flows);
    assert_eq!(failures(&report), [(Protocol::Udp, 6783, None, Direction::Either, Level::Warning)]);
    let gossip = report.findings.iter().find(|finding| finding.about == Subject::Gossip).unwrap();
    says(
        &gossip.text,
        &[
            "UDP 6783 is answered by nobody at any of the addresses of h2 (203.0.113.2:6783)",
            "carries all the same",
        ],
    );
    // Its own datagrams come: the direction is known.
    let report = of(PING, |member| {
        no_answers(member);
        member.gossip.heard = Some(SECOND);
    });
    assert_eq!(failures(&report), [(Protocol::Udp, 6783, None, Direction::ToMember, Level::Warning)]);
    // Nothing gets through at all.
    let report = of(NO_PING, |member| {
        no_answers(member);
        member.lanes[0].silence = silence(Direction::Either);
    });
    assert_eq!(report.verdict, Verdict::Stopped);
    says(
        &report.summary,
        &["UDP 6783 is not answered either", "the host of h2 is down, or nothing gets through"],
    );
}

#[test]
fn without_a_key_the_failed_call_is_what_stops_it() {
    for (error, words) in [
        (
            "203.0.113.2:6783: cannot connect to 203.0.113.2:6783: Connection refused (os error 111)",
            "connection refused",
        ),
        (
            "203.0.113.2:6783: 203.0.113.2:6783 did not complete the TCP connection within 5s; is a firewall in between?",
            "timed out",
        ),
        ("203.0.113.2:6783: it does not speak TLS", "does not speak TLS"),
    ] {
        let report = of(None, |member| {
            member.key = Key::None;
            member.routes.clear();
            member.session.failed = Some((SECOND * 4, error.to_owned()));
        });
        assert_eq!(report.verdict, Verdict::Stopped);
        assert_eq!(failures(&report), [(Protocol::Tcp, 6783, None, Direction::ToMember, Level::Problem)]);
        says(&report.summary, &["TCP 6783 to h2 (203.0.113.2:6783)", words, "4 s ago"]);
    }
    let waits = of(None, |member| {
        member.key = Key::None;
        member.session.is_calling = true;
    });
    assert_eq!(waits.verdict, Verdict::Stopped);
    says(&waits.summary, &["no key is agreed", "this host is calling now"]);
    let doubted = of(None, |member| member.key = Key::Doubted);
    says(&doubted.summary, &["does not prove that the tunnel key"]);
    // With a key no call is needed.
    let failed = Some((SECOND * 4, "Connection refused".to_owned()));
    let report = of(PING, |member| member.session.failed = failed);
    assert_eq!(report.verdict, Verdict::Flows);
    assert_eq!(failures(&report), [(Protocol::Tcp, 6783, None, Direction::ToMember, Level::Warning)]);
}

#[test]
fn pings_that_are_not_answered_stop_it_unless_a_port_explains_them() {
    let report = of(NO_PING, |_| {});
    assert_eq!(report.verdict, Verdict::Stopped);
    says(&report.summary, &["6 pings through the tunnel to h2 were not answered", "something comes through"]);
}

#[test]
fn the_ends_of_a_flow_are_looked_at() {
    let text = "10.32.9.9".to_owned();
    let at = |owner| End { text: text.clone(), address: text.parse().ok(), owner };
    let LocalPort { attachment, pod, device, .. } = match self::pod().owner {
        Owner::Pod(port) => port,
        other => panic!("{other:?}"),
    };
    let port = |standing| {
        let (attachment, pod, device) = (attachment.clone(), pod.clone(), device.clone());
        Owner::Pod(LocalPort { attachment, pod, device, standing })
    };
    for (owner, stops, words) in [
        (
            port(Standing::Applied),
            false,
            "is the attachment c1/eth0 of this host, pod default/web-0; its port mv0123456789ab",
        ),
        (port(Standing::Leased), true, "not attached yet"),
        (port(Standing::Waiting), true, "does not have its port"),
        (port(Standing::Problem("no such device".to_owned())), true, "no such device"),
        (Owner::ThisNode, false, "is this node, h1"),
        (Owner::Free, true, "no pod has it"),
        (Owner::Nobody, true, "no member that is known here owns it"),
        (Owner::Underlay(Some("h2".to_owned())), true, "the host of h2 outside of the mesh"),
        (Owner::Outside, true, "none of the cluster's addresses"),
    ] {
        let facts = WhyFacts { to: at(owner), member: None, ..flow(member(2), None) };
        let report = why(&facts);
        assert_eq!(report.verdict == Verdict::Stopped, stops, "{report:#?}");
        says(&report.findings[1].text, &[words]);
    }
}

#[test]
fn a_flow_between_two_other_hosts_is_asked_for_there() {
    let (two, three) = (member(2), member(3));
    let facts = WhyFacts { from: remote(&two), to: remote(&three), member: None, ..flow(member(2), None) };
    let report = why(&facts);
    assert_eq!(report.verdict, Verdict::AskElsewhere);
    says(&report.summary, &["ask on h2 or on h3", "meshctl why 10.32.2.2 10.32.2.2"]);
}

#[test]
fn a_port_is_taken_and_policies_are_said_not_to_be_evaluated() {
    let report = why(&WhyFacts { port: Some(80), ..flow(member(2), PING) });
    let policy = report.findings.iter().find(|finding| finding.about == Subject::Policy).unwrap();
    says(&policy.text, &["port 80", "NOT evaluated"]);
    assert_eq!((report.port, report.verdict, policy.level), (Some(80), Verdict::Flows, Level::Note));
}

#[test]
fn problems_of_this_host_stop_what_they_concern() {
    let problem = |object: &str| Problem { object: object.to_owned(), text: "refused".to_owned() };
    for (object, stops) in [
        (GUARD_OBJECT, true),
        ("mesh0", true),
        ("meshwg0", true),
        ("meshwg7", false),
        ("mv999999999999", false),
        ("net/ipv4/ip_forward", true),
        ("10.32.2.0/24", true),
        ("10.32.77.0/24", false),
    ] {
        let report = why(&WhyFacts { problems: vec![problem(object)], ..flow(member(2), None) });
        assert_eq!(report.verdict == Verdict::Stopped, stops, "{object}");
    }
    let report = why(&WhyFacts { is_applied: false, ..flow(member(2), None) });
    assert_eq!(report.verdict, Verdict::Stopped);
    let report =
        why(&WhyFacts { waiting_for: Some("a seed that answers".to_owned()), ..flow(member(2), None) });
    says(&report.summary, &["in no cluster yet", "a seed that answers"]);
    let report = of(None, |member| member.routes.clear());
    says(&report.summary, &["no route for 10.32.2.0/24"]);
}

fn facts(members: Vec<Member>) -> DoctorFacts {
    DoctorFacts {
        here: here(),
        waiting_for: None,
        members,
        is_applied: true,
        problems: Vec::new(),
        lanes: vec![LaneStatus {
            device: "meshwg0".to_owned(),
            backend: Backend::Userspace,
            reason: "a test".to_owned(),
            port: 6784,
            public_key: String::new(),
            up: true,
        }],
        mtu: 1420,
        cluster: Vec::new(),
        networks: Vec::new(),
        is_behind_nat: false,
        unix_seconds: Some(1_900_000_000),
        settings: Ok(Vec::new()),
        look_again_milliseconds: None,
    }
}

/// `all` members, of which the first `count` are changed.
fn some_of(all: u8, count: u8, change: impl Fn(&mut Member)) -> Vec<Member> {
    let of = |n| {
        let mut member = member(n);
        if n < 2 + count {
            change(&mut member);
        }
        member
    };
    (2..2 + all).map(of).collect()
}

#[test]
fn a_well_host_has_nothing_worse_than_notes() {
    let report = doctor(&facts(some_of(5, 0, |_| {})));
    assert_eq!(report.level, Level::Note, "{report:#?}");
    assert!(report.findings.iter().any(|finding| finding.text.contains("all 5 other members are reached")));
}

fn port_findings(members: Vec<Member>) -> Vec<Finding> {
    let report = doctor(&facts(members));
    report.findings.into_iter().filter(|finding| finding.failure.is_some()).collect()
}

#[test]
fn members_for_which_the_same_port_fails_are_told_together() {
    let closed = |member: &mut Member| member.lanes[0].silence = silence(Direction::Either);
    let [found] = &port_findings(some_of(40, 12, closed))[..] else { panic!("several") };
    says(
        &found.text,
        &[
            "UDP 6784 from this host: nothing comes back from 12 of 40 members (h2, h3, h4, h5 and 8 more)",
            "probes on UDP 6783 are answered by all of them",
        ],
    );
    assert_eq!((found.members.len(), found.level), (12, Level::Problem));
    says(found.advice.as_ref().unwrap(), &["is UDP 6784 open", "those hosts"]);
    let [found] = &port_findings(some_of(40, 30, closed))[..] else { panic!("several") };
    says(found.advice.as_ref().unwrap(), &["is UDP 6784 open in the firewall of this host's site?"]);
    // Both directions are groups of their own.
    let mut members = some_of(6, 4, |member| member.lanes[0].silence = silence(Direction::ToMember));
    members[0].lanes[0].silence = silence(Direction::FromMember);
    let found = port_findings(members);
    assert_eq!(found.len(), 2, "{found:#?}");
    says(&found[0].text, &["UDP 6784 from this host to 3 of 6 members", "nothing arrives there"]);
    says(&found[1].text, &["UDP 6784 from h2 to this host: nothing arrives here"]);
}

#[test]
fn doctor_tells_members_that_are_gone_from_closed_ports() {
    let gone = |member: &mut Member| {
        member.reachable = false;
        member.gossip.probe = Probe::Unanswered(SECOND * 2);
        member.gossip.heard = Some(SECOND * 500);
        member.lanes[0].handshake = Some(SECOND * 600);
        (member.lanes[0].sent, member.lanes[0].received) = (None, None);
    };
    let [found] = &port_findings(some_of(9, 2, gone))[..] else { panic!("several") };
    assert_eq!((found.about, found.level), (Subject::Members, Level::Problem));
    says(&found.text, &["nothing comes back from 2 of 9 members (h2, h3) on UDP 6783"]);
    // The tunnel carries: it is the control port.
    let closed = |member: &mut Member| {
        member.gossip.probe = Probe::Unanswered(SECOND * 2);
        member.gossip.heard = None;
    };
    let [found] = &port_findings(some_of(9, 3, closed))[..] else { panic!("several") };
    assert_eq!((found.about, found.level), (Subject::Gossip, Level::Warning));
    says(&found.text, &["UDP 6783 from this host: nothing comes back from 3 of 9 members"]);
    let refused = |member: &mut Member| {
        member.key = Key::None;
        member.session.failed = Some((SECOND, "Connection refused".to_owned()));
    };
    let [found] = &port_findings(some_of(9, 9, refused))[..] else { panic!("several") };
    assert_eq!((found.about, found.level), (Subject::Session, Level::Problem));
    says(
        &found.text,
        &["TCP 6783 from this host to 9 of 9 members", "connection refused", "no key is agreed"],
    );
}

#[test]
fn doctor_says_who_is_behind_a_relay_and_why() {
    let report = doctor(&facts(some_of(9, 2, |member| relayed(member, Why::Unreached))));
    let path = report.findings.iter().find(|finding| finding.about == Subject::Path).unwrap();
    assert_eq!(path.level, Level::Warning);
    says(&path.text, &["h2, h3 are reached through the relay h9 only", "does not answer by itself"]);
}

#[test]
fn doctor_looks_at_the_host() {
    let setting =
        Setting { path: "net/ipv4/ip_forward".to_owned(), before: "0".to_owned(), now: Some("1".to_owned()) };
    let mtu = MtuStatus {
        ipv4: 1232,
        ipv6: 1280,
        underlay: Some(1300),
        is_largest: false,
        confirmed_seconds: Some(3),
    };
    let mut members = some_of(3, 0, |_| {});
    members[1].mtu = Some(mtu);
    let found = doctor(&DoctorFacts {
        problems: vec![Problem { object: GUARD_OBJECT.to_owned(), text: "no nftables".to_owned() }],
        networks: vec!["range 10.32.0.0/12 overlaps".to_owned()],
        is_behind_nat: true,
        unix_seconds: Some(1000),
        settings: Ok(vec![setting]),
        ..facts(members)
    });
    for (about, level, words) in [
        (Subject::Host, Level::Problem, "nftables: no nftables"),
        (Subject::Networks, Level::Problem, "10.32.0.0/12 overlaps"),
        (Subject::Nat, Level::Note, "behind a NAT"),
        (Subject::Mtu, Level::Note, "h3 (1300 bytes outside)"),
        (Subject::Sysctls, Level::Note, "net.ipv4.ip_forward is 1 (was 0)"),
        (Subject::Clock, Level::Problem, "before 2025"),
    ] {
        let finding = found.findings.iter().find(|finding| finding.about == about).expect("a finding");
        assert_eq!(finding.level, level, "{finding:?}");
        says(&finding.text, &[words]);
    }
    assert_eq!(found.level, Level::Problem);
}
