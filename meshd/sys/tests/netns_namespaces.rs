//! Namespaces: made, entered, listed, deleted, as `ip netns` does.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::process::Command;

use common::Ns;
use mesh_sys::netns::{NetNs, NetNsError};
use mesh_sys::sysctl::Sysctl;

#[test]
fn what_we_make_iproute2_finds_and_the_other_way_round() {
    let ours = Ns::new("a");
    let listed = Command::new("ip").args(["netns", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains(&ours.name));
    let link = Command::new("ip")
        .args(["netns", "exec", &ours.name, "readlink", "/proc/self/ns/net"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&link.stdout).trim(), ours.netns.id().to_string());
    assert!(NetNs::list_named().unwrap().contains(&ours.name));

    let theirs = format!("{}-ip", ours.name);
    assert!(Command::new("ip").args(["netns", "add", &theirs]).status().unwrap().success());
    let opened = NetNs::open_named(&theirs);
    assert!(NetNs::delete_named(&theirs).unwrap());
    let opened = opened.unwrap();
    assert!(!opened.same_as(&ours.netns));
    assert!(!NetNs::delete_named(&theirs).unwrap(), "a second time there is nothing to delete");
}

#[test]
fn a_closure_runs_inside_and_the_caller_stays_outside() {
    let ns = Ns::new("run");
    let before = NetNs::current().unwrap();
    let inside = ns.netns.run(|| NetNs::current().unwrap().id()).unwrap();
    assert_eq!(inside, ns.netns.id());
    assert!(NetNs::current().unwrap().same_as(&before));
}

#[test]
fn a_panic_inside_goes_on_outside() {
    let ns = Ns::new("panic");
    let result = std::panic::catch_unwind(|| ns.netns.run(|| panic!("from inside")));
    let panic = result.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"from inside"));
}

#[test]
fn a_taken_name_is_refused_and_stays_what_it_is() {
    let ns = Ns::new("twice");
    assert!(matches!(NetNs::create_named(&ns.name), Err(NetNsError::Exists { .. })));
    assert!(NetNs::open_named(&ns.name).unwrap().same_as(&ns.netns));
}

#[test]
fn a_socket_made_inside_stays_inside() {
    let ns = Ns::new("socket");
    let listener = ns.netns.run(|| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    assert!(std::net::TcpStream::connect(address).is_err(), "reached from outside");
    ns.netns.run(|| std::net::TcpStream::connect(address).map(drop)).unwrap().unwrap();
}

#[test]
fn a_net_setting_belongs_to_the_namespace_of_the_thread() {
    let ns = Ns::new("sysctl");
    let key = ["net", "ipv4", "ip_forward"];
    let outside = Sysctl::new().get(&key).unwrap();
    let old = ns.netns.run(|| Sysctl::new().set_if_different(&key, "1")).unwrap().unwrap();
    assert_eq!(old.as_deref(), Some("0"));
    assert_eq!(ns.netns.run(|| Sysctl::new().set_if_different(&key, "1")).unwrap().unwrap(), None);
    assert_eq!(ns.sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
    assert_eq!(Sysctl::new().get(&key).unwrap(), outside);
}

#[test]
fn many_namespaces_at_once() {
    let names: Vec<Ns> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|_| scope.spawn(|| Ns::new("many"))).collect();
        workers.into_iter().map(|w| w.join().unwrap()).collect()
    });
    let ids: std::collections::BTreeSet<_> = names.iter().map(|n| n.netns.id()).collect();
    assert_eq!(ids.len(), 8);
}
