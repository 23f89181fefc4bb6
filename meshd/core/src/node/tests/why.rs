//! What a node says of a flow, and of itself.

use super::paths::{Traffic, id, leader};
use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::api::{Direction, DoctorReport, Finding, Level, Protocol, Verdict, WhyReport, WhyRequest};

fn why(sim: &mut Sim, at: usize, (from, to): (&str, &str)) -> Result<WhyReport, ApiError> {
    let request =
        WhyRequest { from: from.to_owned(), to: to.to_owned(), look: true, ..WhyRequest::default() };
    let asked = sim.request(at, Request::Why(request));
    match sim.answer(at, asked)? {
        Response::Why(report) => Ok(*report),
        other => panic!("{other:?}"),
    }
}

fn between(sim: &mut Sim, at: usize, to: usize) -> WhyReport {
    let ends = (id(sim, at).to_string(), id(sim, to).to_string());
    why(sim, at, (&ends.0, &ends.1)).unwrap()
}

fn doctor(sim: &mut Sim, at: usize) -> DoctorReport {
    let asked = sim.request(at, Request::Doctor { look: true, settings: Ok(Vec::new()) });
    match sim.answer(at, asked).unwrap() {
        Response::Doctor(report) => *report,
        other => panic!("{other:?}"),
    }
}

fn failures(findings: &[Finding]) -> Vec<(Protocol, u16, Direction, Level)> {
    let of = |finding: &Finding| {
        let failure = finding.failure.as_ref()?;
        Some((failure.protocol, failure.port, failure.direction, finding.level))
    };
    findings.iter().filter_map(of).collect()
}

#[test]
fn a_closed_lane_is_named_with_its_direction_at_both_ends() {
    let (udp, lane) = (Protocol::Udp, 6784);
    for forth in [true, false] {
        let mut sim = cluster(240, 3);
        meshed(&mut sim, 10 * SECOND);
        let (leads, follows) = leader(&sim);
        let mut traffic = Traffic::default();
        traffic.seconds(&mut sim, (leads, follows), 5);
        let report = between(&mut sim, leads, follows);
        assert_eq!((report.verdict, failures(&report.findings)), (Verdict::Flows, vec![]), "{report:#?}");
        let (closed, at_leader, at_follower) = if forth {
            ((leads, follows), Direction::ToMember, Direction::FromMember)
        } else {
            ((follows, leads), Direction::FromMember, Direction::ToMember)
        };
        traffic.closed.insert(closed);
        // What does not arrive is not answered; what arrives is, in vain.
        (0..8).for_each(|_| traffic.second(&mut sim, (leads, follows), !forth));
        for (at, to, direction) in [(leads, follows, at_leader), (follows, leads, at_follower)] {
            let report = between(&mut sim, at, to);
            let found = failures(&report.findings);
            assert_eq!(found, [(udp, lane, direction, Level::Problem)], "{report:#?}");
            assert_eq!(report.verdict, Verdict::Stopped);
            let report = doctor(&mut sim, at);
            assert_eq!(failures(&report.findings), [(udp, lane, direction, Level::Problem)], "{report:#?}");
        }
    }
}

#[test]
fn a_member_that_answers_nothing_is_looked_for_when_somebody_asks() {
    let mut sim = cluster(241, 3);
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    sim.cut(0, 1);
    sim.run(20 * SECOND);
    assert!(between(&mut sim, 0, 1).look_again_milliseconds.is_some());
    sim.run(2 * SECOND);
    let report = between(&mut sim, 0, 1);
    let found = failures(&report.findings);
    assert!(found.iter().any(|found| found.0 == Protocol::Udp && found.1 == 6783), "{report:#?}");
    // Whoever asks often has no more probes sent.
    assert_eq!(report.look_again_milliseconds, None);
    sim.heal();
    sim.run(5 * SECOND);
    between(&mut sim, 0, 1);
    sim.run(2 * SECOND);
    let report = between(&mut sim, 0, 1);
    assert_eq!(failures(&report.findings), [], "{report:#?}");
}

#[test]
fn ends_are_found_by_name_id_address_and_pod() {
    let mut sim = cluster(242, 3);
    meshed(&mut sim, 10 * SECOND);
    let pod = sim.attach(0, "pod").unwrap();
    let (mesh, id) = {
        let record = sim.node(0).view().unwrap().record(&id(&sim, 1)).unwrap();
        (record.mesh_ipv4.unwrap().to_string(), id(&sim, 1).to_string())
    };
    let pod = pod.ipv4.to_string();
    for to in [&mesh, &id, &id[..8], &format!("{mesh}:80"), &format!("{id}:80")] {
        let report = why(&mut sim, 0, (&pod, to)).unwrap();
        assert_eq!(report.destination.node.as_ref().map(|node| node.id.as_str()), Some(id.as_str()), "{to}");
        assert_eq!(report.destination.address.map(|address| address.to_string()), Some(mesh.clone()));
        assert!(report.source.attachment.is_some(), "{report:#?}");
        assert_eq!(report.port, to.ends_with(":80").then_some(80));
    }
    for (from, to, says) in [
        (pod.as_str(), "nobody", "field to: \"nobody\" is no address, no node and no pod"),
        ("", &mesh, "field from: it is empty"),
        ("10.32.0.2:80", &mesh, "field from: \"10.32.0.2:80\" has a port"),
        (&pod, "fd00::2", "of two families"),
    ] {
        let error = why(&mut sim, 0, (from, to)).unwrap_err();
        assert!(error.message.contains(says), "{error}");
    }
    let two = (id.as_str(), super::paths::id(&sim, 2).to_string());
    assert_eq!(why(&mut sim, 0, (two.0, &two.1)).unwrap().verdict, Verdict::AskElsewhere);
    assert_eq!(why(&mut sim, 0, (&pod, "192.0.2.77")).unwrap().verdict, Verdict::Stopped);
}
