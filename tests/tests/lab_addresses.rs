//! Addresses of real daemons: released when a container vanished, counted, run out of, and not taken from the host.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::{Duration, Instant};

use mesh_lab::{Family, Host, Lab, Options, poll_until};
use mesh_tests::{FAMILIES, every, logs, options, reaches_within, up};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

/// What `meshctl status` says, also when it tells of problems by its exit status; `Null` without an answer.
fn status(host: &Host) -> Value {
    let output = host.exec(&["meshctl", "status", "-o", "json"]).unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// What `meshctl status ipam` says, likewise.
fn ipam(host: &Host) -> Value {
    let output = host.exec(&["meshctl", "status", "ipam", "-o", "json"]).unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Leases addresses without attaching anything, until there are none; the error that ends it.
fn lease_all(host: &Host) -> String {
    // As the plugin asks: HTTP on the control socket.
    let script = r#"
import http.client, json, socket
class Control(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/meshd/meshd.sock")
control = Control("meshd")
for n in range(2000):
    body = {"container_id": "c%d" % n, "ifname": "eth0", "netns": "/proc/1/ns/net", "network": "mesh"}
    control.request("POST", "/v1/attachments", json.dumps(body), {"content-type": "application/json"})
    answer = control.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        print(n, answer.status, text)
        break
"#;
    host.exec_ok(&["python3", "-c", script]).unwrap()
}

#[test]
fn a_container_that_vanished_without_a_del_gives_its_address_back_and_no_other_does() {
    let lab = up(Options { nodes: 1, pods: 3, ..options("t-vanish") });
    let host = lab.host(0);
    let freed = host.pod(0).unwrap().address(Family::V4);
    let (alive, other) = (host.pod(1).unwrap(), host.pod(2).unwrap());
    // The namespace of the first goes with all that is in it; nobody calls the plugin.
    let started = Instant::now();
    host.exec_ok(&["ip", "netns", "delete", "p1"]).unwrap();
    // The third only loses its device: its namespace, and so its container, is still there.
    host.exec_ok(&["ip", "netns", "exec", "p3", "ip", "link", "delete", "eth0"]).unwrap();
    let listed = || -> Vec<String> {
        let ports = host.exec_ok(&["ip", "-o", "link", "show", "master", "mesh0"]).unwrap();
        ports.lines().map(str::to_owned).collect()
    };
    poll_until("only one port is left", 10 * SECOND, || listed().len() == 1).unwrap();
    // A daemon that dies meanwhile begins its watch anew, and forgets nothing.
    host.kill9_daemon().unwrap();
    let restarted = Instant::now();
    host.restart_daemon().unwrap();
    host.wait_ready(20 * SECOND).unwrap();
    assert_eq!(status(&host)["attachments"], 3);
    poll_until("the lease is released", 150 * SECOND, || status(&host)["attachments"] == 2)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", logs(&lab)));
    let took = restarted.elapsed();
    println!("the vanished container's lease was released {took:?} after the daemon's start");
    assert!(took >= 60 * SECOND, "too soon to be sure: {took:?}");
    println!("{:?} after it vanished", started.elapsed());
    assert_eq!(ipam(&host)["ipam"]["usage"]["resting"], 1);
    assert_eq!(ipam(&host)["ipam"]["usage"]["leased"], 2);
    for family in ["ipv4", "ipv6"] {
        let gateway = status(&host)["addresses"][family].as_str().unwrap().parse().unwrap();
        let stats = alive.ping(gateway, every(Duration::from_millis(10), 3)).unwrap();
        assert!(stats.all_answered(), "{stats:?}");
    }
    let new = host.add_pod("p4").unwrap();
    assert_ne!(new.address(Family::V4), freed, "the address rests");
    assert_ne!(new.address(Family::V4), other.address(Family::V4));
}

#[test]
fn a_node_without_free_addresses_says_what_would_help_and_its_pods_go_on() {
    let range = ["--range", "10.77.0.0/23"].map(str::to_owned).to_vec();
    let lab = up(Options { nodes: 2, pods: 1, daemon_args: range, ..options("t-exhaust") });
    let (host, peer) = (lab.host(1), lab.host(0).pod(0).unwrap());
    let pod = host.pod(0).unwrap();
    let before = host.status().unwrap()["addresses"].clone();
    let ended = lease_all(&host);
    for words in [
        "252 507 ",
        "exhausted",
        "of its 254, 253 are leased",
        "no other node owns more of the cluster's range 10.77.0.0/23",
    ] {
        assert!(ended.contains(words), "{words:?}: {ended}");
    }
    // What a user of the plugin sees.
    let error = format!("{:#}", host.add_pod("late").unwrap_err());
    assert!(error.contains("code 100: ") && error.contains("no free IPv4 address"), "{error}");
    assert!(error.contains("--range"), "{error}");
    let shown = String::from_utf8(host.exec(&["meshctl", "status", "ipam"]).unwrap().stdout).unwrap();
    for words in ["0 of 254 usable IPv4 addresses free", "SHORTAGE", "h1", "h2 (this node)", "50.0%"] {
        assert!(shown.contains(words), "{words:?}: {shown}");
    }
    assert_eq!(host.exec(&["meshctl", "status"]).unwrap().status.code(), Some(4), "a problem is told");
    for family in FAMILIES {
        reaches_within(&pod, &peer, family, 5 * SECOND);
        reaches_within(&peer, &pod, family, 5 * SECOND);
    }
    let after = ipam(&host);
    let owners = after["ipam"]["owners"].as_array().unwrap();
    let own = owners.iter().find(|owner| owner["this_node"] == true).unwrap();
    assert_eq!(before["owned_ipv4"], own["ipv4"], "{after}");
    assert_eq!(owners.iter().map(|owner| owner["ipv4_addresses"].as_u64().unwrap()).sum::<u64>(), 512);
}

/// A route on the host that is not ours, for a range, over the underlay.
fn add_route(host: &Host, range: &str) {
    let via = if range.contains(':') { "fd00:18::fe" } else { "198.18.0.254" };
    host.exec_ok(&["ip", "route", "add", range, "via", via, "dev", "eth0", "onlink"]).unwrap();
}

fn alone(name: &str) -> Lab {
    Lab::up(Options { nodes: 1, daemons: false, ..options(name) }).unwrap()
}

fn args(more: &[&str]) -> Vec<String> {
    ["--password-file", "/etc/meshd/password"].iter().chain(more).map(|&arg| arg.to_owned()).collect()
}

#[test]
fn a_founder_refuses_a_range_that_its_host_uses_and_names_both() {
    let lab = alone("t-overlap-found");
    let host = lab.host(0);
    host.exec_ok(&["ip", "link", "add", "site0", "type", "bridge"]).unwrap();
    host.exec_ok(&["ip", "addr", "add", "10.40.1.5/16", "dev", "site0"]).unwrap();
    let routes = |host: &Host| {
        let v4 = host.exec_ok(&["ip", "route", "show", "table", "all", "proto", "118"]).unwrap();
        v4 + &host.exec_ok(&["ip", "-6", "route", "show", "table", "all", "proto", "118"]).unwrap()
    };
    let refused = |words: &[&str]| {
        let before = host.log().unwrap_or_default().len();
        host.spawn_daemon_with(args(&[])).unwrap();
        poll_until("the daemon ends", 10 * SECOND, || !host.daemon().unwrap().process.is_alive()).unwrap();
        assert_eq!(host.daemon_ending().unwrap().as_deref(), Some("exited 1"));
        let log = host.log().unwrap()[before..].to_owned();
        let last = log.lines().last().unwrap_or_default();
        for words in words.iter().chain(&["meshd: range", "10.32.0.0/12", "--range"]) {
            assert!(last.contains(words), "{words:?}: {log}");
        }
        assert_eq!(routes(&host), "", "nothing was set up");
    };
    host.exec_ok(&["ip", "link", "set", "site0", "up"]).unwrap();
    refused(&["address 10.40.1.5/16 of device site0", "10.0.0.0/12"]);
    // An address of a device that is down is nobody's.
    host.exec_ok(&["ip", "link", "set", "site0", "down"]).unwrap();
    add_route(&host, "10.0.0.0/8");
    refused(&["route 10.0.0.0/8 via 198.18.0.254 dev eth0", "172.16.0.0/12"]);
    host.exec_ok(&["ip", "route", "delete", "10.0.0.0/8"]).unwrap();
    // A default route is there all the time, and is no overlap.
    host.spawn_daemon_with(args(&[])).unwrap();
    host.wait_ready(20 * SECOND).unwrap();
    assert!(routes(&host).contains("unreachable 10.32.0.0/12"));
}

#[test]
fn a_node_that_joins_into_an_overlap_waits_and_a_later_one_disturbs_nobody() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-overlap-join") });
    let late = lab.add_host().unwrap();
    add_route(&late, "10.0.0.0/8");
    let first = lab.host(0).underlay(Family::V4).to_string();
    late.spawn_daemon_with(args(&["--join", &first])).unwrap();
    let told =
        |host: &Host| status(host)["problems"].to_string().contains("10.0.0.0/8 via 198.18.0.254 dev eth0");
    poll_until("it says so", 20 * SECOND, || told(&late)).unwrap();
    assert!(late.log().unwrap().contains("nothing is set up on this host"));
    let error = format!("{:#}", late.add_pod("p1").unwrap_err());
    assert!(error.contains("code 11: ") && error.contains("10.0.0.0/8"), "{error}");
    let routes = || late.exec_ok(&["ip", "route", "show", "proto", "118"]).unwrap();
    assert_eq!(routes(), "");
    // With the route gone it comes up by itself.
    late.exec_ok(&["ip", "route", "delete", "10.0.0.0/8"]).unwrap();
    late.wait_ready(20 * SECOND).unwrap();
    let pod = late.add_pod("p1").unwrap();
    let peer = lab.host(0).pod(0).unwrap();
    for family in FAMILIES {
        reaches_within(&pod, &peer, family, 10 * SECOND);
    }

    let before = routes();
    let pings = pod.start_ping(peer.address(Family::V4), every(Duration::from_millis(20), 100_000)).unwrap();
    add_route(&late, "10.0.0.0/8");
    poll_until("it is told", 20 * SECOND, || told(&late)).unwrap();
    assert_eq!(routes(), before, "nothing is taken away");
    // The mesh is in force: a restart goes on with it.
    late.kill9_daemon().unwrap();
    late.restart_daemon().unwrap();
    late.wait_ready(20 * SECOND).unwrap();
    assert!(told(&late));
    late.add_pod("p2").unwrap();
    late.exec_ok(&["ip", "route", "delete", "10.0.0.0/8"]).unwrap();
    poll_until("all is well again", 20 * SECOND, || {
        late.exec(&["meshctl", "status"]).is_ok_and(|output| output.status.code() == Some(0))
    })
    .unwrap();
    let stats = pings.stop().unwrap();
    assert!(stats.all_answered(), "{stats:?}\n{}", logs(&lab));
}
