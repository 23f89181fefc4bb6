//! Links and addresses of hosts change while a lab is up. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use common::{binaries, hosts, processes_with};
use mesh_lab::{Behaviour, Family, Host, Impairment, Lab, Nat, Options, Place, ProcessRef, Router, Topology};
use nix::sys::signal::Signal;

/// Whether one of `tries` datagrams gets from one host to an address of another at which that one listens.
fn one_of(tries: usize, from: &Host, to: &Host, family: Family) -> bool {
    let address = SocketAddr::new(to.underlay(family), 7200);
    let receiver = to.net().run(|| UdpSocket::bind(address)).unwrap().unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let any = SocketAddr::new(from.underlay(family), 0);
    let sender = from.net().run(|| UdpSocket::bind(any)).unwrap().unwrap();
    (0..tries).any(|_| {
        let _ = sender.send_to(b"x", address);
        receiver.recv(&mut [0; 8]).is_ok()
    })
}

/// Whether anything gets through, also when the hosts have just given up looking for each other's hardware addresses.
fn gets_through(from: &Host, to: &Host, family: Family) -> bool {
    one_of(20, from, to, family)
}

/// Whether nothing does.
fn is_blocked(from: &Host, to: &Host, family: Family) -> bool {
    !one_of(2, from, to, family)
}

#[test]
fn a_cut_can_be_of_one_direction_only() {
    let lab = hosts("labw-oneway", 3);
    let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
    for family in Family::BOTH {
        assert!(gets_through(&a, &b, family) && gets_through(&b, &a, family));
        lab.cut_one_way(&a, &b).unwrap();
        assert!(is_blocked(&a, &b, family) && gets_through(&b, &a, family));
        assert!(gets_through(&a, &c, family) && gets_through(&c, &b, family));
        assert_eq!(lab.impairment(&a, &b).unwrap(), Impairment::CUT);
        assert_eq!(lab.impairment(&b, &a).unwrap(), Impairment::NONE);
        // Another process sees it, and can end it.
        let other = Lab::open("labw-oneway").unwrap();
        let links = other.links().unwrap();
        assert_eq!(
            links.iter().map(|link| format!("{} {}", link.from, link.to)).collect::<Vec<_>>(),
            ["h1 h2"]
        );
        other.heal(&other.host(1), &other.host(0)).unwrap();
        assert!(gets_through(&a, &b, family) && lab.links().unwrap().is_empty());
    }
}

fn nat() -> Router {
    Router::nat(Nat::new(Behaviour::EndpointIndependent, Behaviour::EndpointIndependent))
}

#[test]
fn cuts_work_through_routers_and_meet_nobody_else() {
    let topology = Topology::default()
        .router("office", nat())
        .router("shop", nat())
        .router("wall", Router::firewall())
        .host("h2", Place::behind("office"))
        .host("h3", Place::behind("office"))
        .host("h4", Place::behind("wall"))
        .host("h5", Place::behind("shop"))
        .host("h6", Place::behind("shop"));
    Lab::down("labw-far").unwrap();
    let options = Options { nodes: 6, topology, daemons: false, ..Options::new("labw-far", binaries()) };
    let lab = Lab::up(options).unwrap();
    let [public, one, two, walled, far] = [0, 1, 2, 3, 4].map(|host| lab.host(host));
    let v4 = Family::V4;
    // The office's hosts share an address; only one of them is cut off, in both directions.
    lab.cut(&public, &one).unwrap();
    assert!(is_blocked(&one, &public, v4) && gets_through(&two, &public, v4));
    lab.heal(&public, &one).unwrap();
    lab.cut_one_way(&public, &one).unwrap();
    for (host, answered) in [(&one, false), (&two, true)] {
        let pinged = host.exec(&["ping", "-c", "1", "-W", "0.3", "198.18.0.1"]).unwrap();
        assert_eq!(pinged.status.success(), answered, "{}", host.name());
    }
    assert!(gets_through(&one, &public, v4), "that direction is whole");
    lab.cut(&one, &two).unwrap();
    assert!(is_blocked(&one, &two, v4));
    lab.heal_all().unwrap();
    assert!(gets_through(&one, &two, v4) && lab.links().unwrap().is_empty());

    for family in Family::BOTH {
        lab.cut(&walled, &public).unwrap();
        assert!(is_blocked(&walled, &public, family));
        lab.heal_all().unwrap();
        assert!(gets_through(&walled, &public, family));
    }
    // What cannot be told apart is refused, and changes nothing.
    let error = lab.cut(&one, &far).unwrap_err().to_string();
    assert!(error.contains("h2 and h5"), "{error}");
    assert!(lab.links().unwrap().is_empty());
}

#[test]
fn a_renumbered_host_has_other_addresses_and_keeps_its_links() {
    let topology = Topology::default().router("office", nat()).host("h3", Place::behind("office"));
    Lab::down("labw-renumber").unwrap();
    let options = Options { nodes: 3, topology, daemons: false, ..Options::new("labw-renumber", binaries()) };
    let lab = Lab::up(options).unwrap();
    let (a, b, inside) = (lab.host(0), lab.host(1), lab.host(2));
    lab.cut_one_way(&inside, &b).unwrap();
    let mut had = vec![b.underlay(Family::V4)];
    for _ in 0..3 {
        lab.renumber(&b).unwrap();
        let old = *had.last().unwrap();
        assert!(!a.exec(&["ping", "-c", "1", "-W", "0.3", &old.to_string()]).unwrap().status.success());
        had.push(b.underlay(Family::V4));
        for family in Family::BOTH {
            assert!(gets_through(&a, &b, family) && gets_through(&b, &a, family));
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let addresses =
                b.exec_ok(&["ip", flag, "-o", "addr", "show", "dev", "eth0", "scope", "global"]).unwrap();
            assert!(
                addresses.lines().count() == 1 && addresses.contains(&b.underlay(family).to_string()),
                "{addresses}"
            );
            let route = b.exec_ok(&["ip", flag, "route", "show", "default"]).unwrap();
            assert_eq!(route.lines().count(), 1, "{route}");
        }
        assert!(is_blocked(&inside, &b, Family::V4), "the cut holds for the new address");
        assert!(gets_through(&inside, &a, Family::V4));
    }
    assert_ne!(had[1], had[2]);
    // A new host does not get an address that somebody has.
    let private = inside.underlay(Family::V4);
    lab.renumber(&inside).unwrap();
    assert_ne!(inside.underlay(Family::V4), private);
    assert!(gets_through(&inside, &a, Family::V4));
    let fourth = lab.add_host().unwrap();
    assert!(gets_through(&fourth, &a, Family::V4) && gets_through(&fourth, &b, Family::V6));
}

#[test]
fn nothing_of_routers_and_links_is_left_whatever_was_killed() {
    for kill in [false, true] {
        let topology = Topology::default().router("office", nat()).host("h2", Place::behind("office"));
        Lab::down("labw-left").unwrap();
        let options = Options { nodes: 3, topology, daemons: false, ..Options::new("labw-left", binaries()) };
        let lab = Lab::up(options).unwrap();
        lab.cut(&lab.host(0), &lab.host(1)).unwrap();
        let dir = "/run/mesh-lab/labw-left/";
        let processes = processes_with(dir);
        assert_eq!(processes.len(), 5, "switch, router, hosts: {processes:?}");
        if kill {
            let holder = |what: &str| {
                let entries = std::fs::read_dir("/proc").unwrap();
                let pids =
                    entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok());
                let dir = format!("{dir}{what}");
                let ours = |pid: &i32| {
                    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    line.split(|byte| *byte == 0).any(|word| word == dir.as_bytes())
                };
                ProcessRef::of(pids.into_iter().find(ours).unwrap()).unwrap()
            };
            for what in ["router-office", "switch"] {
                let process = holder(what);
                process.signal(Signal::SIGKILL).unwrap();
                process.wait_gone(Duration::from_secs(5)).unwrap();
            }
            assert!(Lab::open("labw-left").unwrap_err().to_string().contains("broken"));
        }
        drop(lab);
        assert_eq!(processes_with(dir), Vec::<String>::new());
        assert!(!std::path::Path::new(dir).exists());
    }
}
