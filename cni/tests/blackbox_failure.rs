//! The plugin against a small daemon in namespaces: everything that goes wrong. As root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::print_stderr, reason = "tests report what they measured")]

mod rig;

use std::fs::File;
use std::time::{Duration, Instant, SystemTime};

use mesh_core::api::{ErrorCode, Tombstone};
use mesh_sys::rtnl::{LinkChange, Route};
use rig::{Fault, Outcome, Pod, Rig, Step, address, talk};
use serde_json::json;

/// ADD and DEL work as if nothing had happened, and nothing is left.
fn works_again(rig: &Rig, pod: &Pod) {
    rig.del(pod);
    let result = rig.add(pod);
    for i in [0, 1] {
        talk(&rig.host.netns, &pod.namespace.netns, address(&result, i));
    }
    rig.del(pod);
    assert_eq!(pod.namespace.links(), ["lo"]);
    rig.assert_clean();
}

#[test]
fn s031_s058_a_refusal_at_any_step_leaves_nothing() {
    let rig = Rig::new();
    for step in [Step::Attach, Step::Activate] {
        for (refusal, code) in [
            (ErrorCode::NotReady, 11),
            (ErrorCode::Exhausted, 100),
            (ErrorCode::Conflict, 101),
            (ErrorCode::Invalid, 7),
            (ErrorCode::NotFound, 102),
            (ErrorCode::Internal, 102),
        ] {
            let pod = rig.pod();
            rig.daemon.fail(step, Fault::Refuse(refusal));
            rig.call("ADD", &pod, json!({})).run().error(code);
            rig.daemon.heal();
            assert_eq!(pod.namespace.links(), ["lo"]);
            rig.assert_clean();
        }
    }
}

#[test]
fn s058_an_answer_that_makes_no_sense_leaves_nothing() {
    let rig = Rig::new();
    for (step, fault) in
        [(Step::Attach, Fault::Nonsense), (Step::Activate, Fault::Nonsense), (Step::Activate, Fault::Lie)]
    {
        let pod = rig.pod();
        rig.daemon.fail(step, fault);
        rig.call("ADD", &pod, json!({})).run().error(102);
        rig.daemon.heal();
        assert_eq!(pod.namespace.links(), ["lo"]);
        rig.assert_clean();
    }
}

#[test]
fn s058_an_answer_that_never_comes_leaves_nothing() {
    let rig = Rig::new();
    for step in [Step::Attach, Step::Activate] {
        let pod = rig.pod();
        rig.daemon.fail(step, Fault::HangUpAfter);
        rig.call("ADD", &pod, json!({})).run().error(11);
        rig.daemon.heal();
        assert_eq!(pod.namespace.links(), ["lo"]);
        rig.assert_clean();
    }
}

#[test]
fn s058_a_refusal_of_the_kernel_leaves_nothing() {
    let rig = Rig::new();
    let pod = rig.pod();
    let mut rtnl = pod.namespace.rtnl();
    let lo = rtnl.link("lo").unwrap().unwrap().index;
    rtnl.set_link(lo, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    // Somebody else has the gateway's route, and the one that a second interface (of index 2) would get.
    for metric in [0, 2002] {
        rtnl.add_route(Route { metric, ..Route::dev("10.32.0.1/32".parse().unwrap(), lo, 3) }).unwrap();
    }
    let error = rig.call("ADD", &pod, json!({})).run().error(103);
    assert!(error["msg"].as_str().unwrap().contains("10.32.0.1/32"), "{error}");
    assert_eq!(pod.namespace.links(), ["lo"]);
    rig.assert_clean();
}

#[test]
fn s058_s071_a_lease_that_cannot_be_released_gets_a_tombstone() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.daemon.fail(Step::Activate, Fault::Refuse(ErrorCode::Internal));
    rig.daemon.fail(Step::Detach, Fault::Refuse(ErrorCode::NotReady));
    let error = rig.call("ADD", &pod, json!({})).run().error(102);
    assert!(error["details"].as_str().unwrap().contains("lease"), "{error}");
    assert_eq!(rig.tombstones(), [pod.id().tombstone_name()]);
    assert_eq!(rig.host.links(), ["lo", "mesh0"]);
    rig.daemon.heal();
    works_again(&rig, &pod);
}

#[test]
fn a_daemon_that_dies_once_during_add_is_asked_again() {
    let rig = Rig::new();
    for step in [Step::Attach, Step::Activate] {
        let pod = rig.pod();
        rig.daemon.fail_once(step, Fault::HangUpAfter);
        let result = rig.add(&pod);
        talk(&rig.host.netns, &pod.namespace.netns, address(&result, 0));
        works_again(&rig, &pod);
    }
}

#[test]
fn s037_without_daemon_add_is_code_11_and_leaves_nothing() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    rig.daemon.stop();
    let outcome = rig.call("ADD", &pod, json!({})).run();
    assert!(outcome.elapsed < Duration::from_secs(10), "{outcome:?}");
    let error = outcome.error(11);
    let msg = error["msg"].as_str().unwrap();
    assert!(msg.contains("meshd.sock") && msg.contains("journalctl -u meshd"), "{error}");
    assert_eq!(pod.namespace.links(), ["lo"]);
    rig.assert_clean();
    rig.daemon.restart();
    works_again(&rig, &pod);
}

#[test]
fn a_daemon_that_comes_back_in_time_is_waited_for() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    rig.daemon.stop();
    let begin = Instant::now();
    let mut child = rig.call("ADD", &pod, json!({})).start();
    std::thread::sleep(Duration::from_secs(1));
    rig.daemon.restart();
    let result = Outcome::of(&mut child, begin).result();
    talk(&pod.namespace.netns, &rig.host.netns, rig.daemon.gateways()[0]);
    assert_eq!(address(&result, 0).to_string(), rig.daemon.leases()[0].ipv4.to_string());
}

#[test]
fn s071_del_without_daemon_removes_the_device_and_leaves_a_tombstone() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    let first = rig.add(&pod);
    rig.daemon.stop();
    for _ in 0..2 {
        let outcome = rig.call("DEL", &pod, json!({})).run();
        assert!(outcome.elapsed < Duration::from_secs(2), "{outcome:?}");
        outcome.silent();
    }
    assert_eq!(pod.namespace.links(), ["lo"]);
    assert_eq!(rig.host.links(), ["lo", "mesh0"]);
    let name = pod.id().tombstone_name();
    assert_eq!(rig.tombstones(), std::slice::from_ref(&name));
    let file = std::fs::read(rig.dir.path().join("state/tombstones").join(name)).unwrap();
    assert_eq!(serde_json::from_slice::<Tombstone>(&file).unwrap().id, pod.id());

    // The daemon is back and has not looked at tombstones yet: ADD of the same id does not fall victim to it.
    rig.daemon.restart();
    let second = rig.add(&pod);
    assert_ne!(address(&first, 0), address(&second, 0), "the old lease was released first");
    assert_eq!(rig.tombstones(), [""; 0]);
    rig.del(&pod);
    rig.assert_clean();
}

#[test]
fn s071_del_with_a_daemon_that_is_not_ready_leaves_a_tombstone() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.add(&pod);
    rig.daemon.fail(Step::Detach, Fault::Refuse(ErrorCode::NotReady));
    rig.del(&pod);
    assert_eq!(rig.tombstones(), [pod.id().tombstone_name()]);
    rig.daemon.heal();
    rig.del(&pod);
    rig.assert_clean();
}

#[test]
fn del_reports_a_lease_that_the_daemon_cannot_release() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.add(&pod);
    rig.daemon.fail(Step::Detach, Fault::Refuse(ErrorCode::Internal));
    rig.call("DEL", &pod, json!({})).run().error(102);
    assert_eq!(rig.host.links(), ["lo", "mesh0"], "the device is gone all the same");
    rig.daemon.heal();
    rig.del(&pod);
    rig.assert_clean();
}

#[test]
fn s064_s065_s066_s067_s068_del_succeeds_whatever_is_missing() {
    let rig = Rig::new();
    let never = rig.pod();
    rig.del(&never);
    for change in [Some(""), Some("/nonexistent/ns"), None] {
        let pod = rig.pod();
        rig.add(&pod);
        let call = rig.call("DEL", &pod, json!({}));
        match change {
            Some(path) => call.env("CNI_NETNS", path),
            None => call.without("CNI_NETNS"),
        }
        .run()
        .silent();
        assert_eq!(pod.namespace.links(), ["lo"]);
        rig.assert_clean();
    }
    let Pod { namespace, container } = rig.pod();
    let pod = Pod { namespace, container: container.clone() };
    rig.add(&pod);
    let path = pod.namespace.path();
    drop(pod);
    let gone = rig.pod();
    rig.call("DEL", &gone, json!({}))
        .env("CNI_CONTAINERID", &container)
        .env("CNI_NETNS", &path)
        .run()
        .silent();
    rig.assert_clean();
}

#[test]
fn s061_killed_while_the_daemon_works() {
    let rig = Rig::new();
    for (step, fault) in [
        (Step::Attach, Fault::StallBefore),
        (Step::Attach, Fault::StallAfter),
        (Step::Activate, Fault::StallBefore),
        (Step::Activate, Fault::StallAfter),
    ] {
        // Both ways on: DEL first, as runtimes do, and ADD at once.
        for del_first in [true, false] {
            let pod = rig.pod();
            rig.daemon.fail(step, fault);
            let mut child = rig.call("ADD", &pod, json!({})).start();
            rig.daemon.wait_for_stall();
            child.kill().unwrap();
            child.wait().unwrap();
            rig.daemon.heal();
            if !del_first && !pod.namespace.links().contains(&"eth0".to_owned()) {
                let result = rig.add(&pod);
                talk(&rig.host.netns, &pod.namespace.netns, address(&result, 0));
            }
            works_again(&rig, &pod);
        }
    }
}

#[test]
fn s061_killed_at_any_moment() {
    let rig = Rig::new();
    let attach = || {
        let pod = rig.pod();
        let begin = Instant::now();
        rig.add(&pod);
        let took = begin.elapsed();
        rig.del(&pod);
        took
    };
    // The first one takes longer than those after it.
    let whole = (0..5).map(|_| attach()).min().unwrap();
    let mut killed = 0;
    for i in 0..40u32 {
        let pod = rig.pod();
        let mut child = rig.call("ADD", &pod, json!({})).start();
        std::thread::sleep(whole * i / 40);
        // It may have ended by itself; then there is nothing to kill.
        let _ = child.kill();
        if !child.wait().unwrap().success() {
            killed += 1;
        }
        rig.del(&pod);
        assert_eq!(pod.namespace.links(), ["lo"]);
        rig.assert_clean();
    }
    eprintln!("{killed} of 40 were killed before their end");
    assert!(killed >= 5, "too few were killed to prove anything");
    works_again(&rig, &rig.pod());
}

#[test]
fn s061_add_in_a_new_namespace_after_a_kill_without_del() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.daemon.fail(Step::Activate, Fault::StallBefore);
    let mut child = rig.call("ADD", &pod, json!({})).start();
    rig.daemon.wait_for_stall();
    child.kill().unwrap();
    child.wait().unwrap();
    rig.daemon.heal();
    let leased = rig.daemon.leases()[0].ipv4;
    let fresh = rig.pod();
    let result = rig.call("ADD", &fresh, json!({})).env("CNI_CONTAINERID", &pod.container).run().result();
    assert_eq!(address(&result, 0).to_string(), leased.to_string(), "the lease is used again");
    assert_eq!(pod.namespace.links(), ["lo"], "the leftover is gone");
    rig.del(&pod);
    rig.assert_clean();
}

#[test]
fn s082_s086_s087_status_tells_whether_add_can_be_served() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    let status = |rig: &Rig| rig.call("STATUS", &pod, json!({})).run();
    status(&rig).silent();
    rig.daemon.fail(Step::Ready, Fault::Refuse(ErrorCode::Exhausted));
    status(&rig).error(50);
    rig.daemon.heal();
    rig.daemon.fail(Step::Ready, Fault::Refuse(ErrorCode::NotReady));
    File::create(rig.heartbeat()).unwrap();
    status(&rig).error(50);
    rig.daemon.heal();

    rig.daemon.stop();
    status(&rig).silent();
    let heartbeat = File::open(rig.heartbeat()).unwrap();
    heartbeat.set_modified(SystemTime::now() - Duration::from_secs(31)).unwrap();
    status(&rig).error(50);
    heartbeat.set_modified(SystemTime::now() - Duration::from_secs(20)).unwrap();
    status(&rig).silent();
    std::fs::remove_file(rig.heartbeat()).unwrap();
    status(&rig).error(50);
}

#[test]
fn s085_status_answers_within_a_second_when_the_daemon_hangs() {
    let rig = Rig::new();
    let pod = rig.pod();
    rig.daemon.fail(Step::Ready, Fault::StallBefore);
    let outcome = rig.call("STATUS", &pod, json!({})).run();
    eprintln!("STATUS with a hanging daemon took {:?}", outcome.elapsed);
    assert!(outcome.elapsed < Duration::from_millis(1500), "the machine is busy, and still: {outcome:?}");
    outcome.error(50);
}

#[test]
fn s088_s089_s090_s092_s093_s094_gc_removes_what_is_not_listed() {
    let rig = Rig::new();
    let (keep, stale, foreign) = (rig.pod(), rig.pod(), rig.pod());
    let kept = rig.add(&keep);
    rig.add(&stale);
    rig.call("ADD", &foreign, json!({"name": "other"})).run().result();
    let gc = |list: serde_json::Value| {
        rig.call("GC", &keep, json!({"cni.dev/valid-attachments": list})).run().silent();
    };
    gc(json!(null));
    assert_eq!(rig.daemon.leases().len(), 3);
    gc(json!([{"containerID": keep.container, "ifname": "eth0"}]));
    assert_eq!(stale.namespace.links(), ["lo"]);
    assert_eq!(rig.daemon.leases().len(), 2);
    talk(&rig.host.netns, &keep.namespace.netns, address(&kept, 0));
    rig.call("CHECK", &keep, json!({"prevResult": kept})).run().silent();
    gc(json!([{"containerID": keep.container, "ifname": "eth1"}]));
    assert_eq!(keep.namespace.links(), ["lo"]);
    gc(json!([]));
    assert_eq!(rig.daemon.leases().len(), 1, "another network's attachment stays");
    assert!(foreign.namespace.links().contains(&"eth0".to_owned()));
    rig.call("DEL", &foreign, json!({"name": "other"})).run().silent();
    rig.assert_clean();
}

#[test]
fn gc_without_daemon_is_an_error_to_be_tried_again() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    rig.add(&pod);
    rig.daemon.stop();
    rig.call("GC", &pod, json!({"cni.dev/valid-attachments": []})).run().error(11);
    assert!(
        pod.namespace.links().contains(&"eth0".to_owned()),
        "nothing is removed that the daemon was not asked about"
    );
}
