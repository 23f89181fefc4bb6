//! The plugin against a small daemon in namespaces: what ADD makes, what CHECK sees, what DEL leaves. As root.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]
#![allow(clippy::print_stderr, reason = "tests report what they measured")]

mod rig;

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;
use mesh_sys::rtnl::{AddressSpec, LinkChange, Mac, Route, RouteFilter, RouteKind, VethPeer, VethSpec};
use rig::{Namespace, Outcome, Pod, Rig, address, talk};
use serde_json::{Value, json};

fn check(rig: &Rig, pod: &Pod, prev: &Value) -> Outcome {
    rig.call("CHECK", pod, json!({"cniVersion": prev["cniVersion"], "prevResult": prev})).run()
}

/// Index of a device in a namespace.
fn index(namespace: &Namespace, name: &str) -> u32 {
    namespace.rtnl().link(name).unwrap().unwrap().index
}

/// How many packets each device has sent, as the kernel counts them.
fn transmitted(namespace: &Namespace) -> BTreeMap<String, u64> {
    let text = namespace.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, counters)| {
            let packets = counters.split_whitespace().nth(9).unwrap().parse().unwrap();
            (name.trim().to_owned(), packets)
        })
        .collect()
}

#[test]
fn s041_s045_s046_s047_s048_s049_s051_s052_the_result_tells_what_the_kernel_has() {
    let rig = Rig::new();
    let pod = rig.pod();
    let result = rig.add(&pod);
    assert_eq!(result["cniVersion"], "1.1.0");

    let interfaces = result["interfaces"].as_array().unwrap();
    let names: Vec<_> = interfaces.iter().map(|interface| interface["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["mesh0", &pod.host_ifname(), "eth0"]);
    assert_eq!(interfaces[2]["sandbox"], pod.namespace.path().as_str());
    for (i, namespace) in [(0, &rig.host), (1, &rig.host), (2, &pod.namespace)] {
        let link = namespace.rtnl().link(names[i]).unwrap().unwrap();
        assert_eq!(interfaces[i]["mac"], link.mac.unwrap().to_string());
        assert_eq!(interfaces[i]["mtu"], 1420);
        assert_eq!(link.mtu, 1420);
        assert!(link.up && link.carrier, "{link:?}");
        assert_eq!(interfaces[i].get("sandbox").is_some(), i == 2);
    }
    let lease = &rig.daemon.leases()[0];
    assert_eq!(interfaces[2]["mac"], lease.mac.to_string());

    let ips = result["ips"].as_array().unwrap();
    assert_eq!(ips[0]["address"], format!("{}/32", lease.ipv4));
    assert_eq!(ips[1]["address"], format!("{}/128", lease.ipv6));
    assert_eq!(ips[0]["gateway"], "10.32.0.1");
    assert_eq!(ips[1]["gateway"], "fd00:aa::1");
    assert!(ips.iter().all(|ip| ip["interface"] == 2));
    assert_eq!(
        result["routes"],
        json!([{"dst": "0.0.0.0/0", "gw": "10.32.0.1"}, {"dst": "::/0", "gw": "fd00:aa::1"}])
    );
    assert!(result.get("dns").is_none());
    rig.del(&pod);
    rig.assert_clean();
}

#[test]
fn s095_the_daemon_is_told_which_namespace_it_is() {
    let rig = Rig::new();
    let (pod, other) = (rig.pod(), rig.pod());
    rig.add(&pod);
    rig.add(&other);
    let told: Vec<_> = rig.daemon.requests().into_iter().map(|request| request.netns_id.unwrap()).collect();
    let ids = [&pod, &other].map(|pod| pod.namespace.netns.id());
    assert_eq!(told.iter().map(|id| (id.dev, id.ino)).collect::<Vec<_>>(), ids.map(|id| (id.dev, id.ino)));
    assert_ne!(told[0], told[1]);
    rig.del(&pod);
    rig.del(&other);
    rig.assert_clean();
}

#[test]
fn s056_addresses_are_usable_at_once_and_neighbours_known() {
    let rig = Rig::new();
    let pod = rig.pod();
    let begin = Instant::now();
    let result = rig.add(&pod);
    eprintln!("ADD took {:?}", begin.elapsed());
    let dev = index(&pod.namespace, "eth0");
    let mut rtnl = pod.namespace.rtnl();
    let addresses = rtnl.addresses(Some(dev)).unwrap();
    for i in [0, 1] {
        let net: IpNet = result["ips"][i]["address"].as_str().unwrap().parse().unwrap();
        let found = addresses.iter().find(|address| address.net == net).unwrap();
        assert!(!found.tentative && !found.duplicate, "{found:?}");
    }
    let neighbours = rtnl.neighbours(dev).unwrap();
    for gateway in rig.daemon.gateways() {
        assert!(neighbours.iter().any(|entry| entry.ip == gateway && entry.permanent), "{neighbours:?}");
    }
    for (family, key, value) in [
        ("ipv6", "accept_dad", "0"),
        ("ipv6", "accept_ra", "0"),
        ("ipv6", "accept_redirects", "0"),
        ("ipv6", "disable_ipv6", "0"),
        ("ipv4", "accept_redirects", "0"),
    ] {
        assert_eq!(pod.namespace.sysctl(&["net", family, "conf", "eth0", key]), value, "{family} {key}");
    }
    assert_eq!(pod.namespace.sysctl(&["net", "ipv4", "conf", "all", "accept_redirects"]), "0");
}

#[test]
fn s057_loopback_is_up() {
    let rig = Rig::new();
    let pod = rig.pod();
    assert!(!pod.namespace.rtnl().link("lo").unwrap().unwrap().up);
    rig.add(&pod);
    assert!(pod.namespace.rtnl().link("lo").unwrap().unwrap().up);
    talk(&pod.namespace.netns, &pod.namespace.netns, "127.0.0.1".parse().unwrap());
    talk(&pod.namespace.netns, &pod.namespace.netns, "::1".parse().unwrap());
}

#[test]
fn gateways_and_other_pods_are_reached_over_both_families() {
    let rig = Rig::new();
    let (a, b) = (rig.pod(), rig.pod());
    let result_a = rig.add(&a);
    let result_b = rig.add(&b);
    for i in [0, 1] {
        talk(&a.namespace.netns, &rig.host.netns, rig.daemon.gateways()[i]);
        talk(&rig.host.netns, &a.namespace.netns, address(&result_a, i));
        talk(&a.namespace.netns, &b.namespace.netns, address(&result_b, i));
        talk(&b.namespace.netns, &a.namespace.netns, address(&result_a, i));
    }
}

#[test]
fn ipv6_that_the_runtime_switched_off_is_switched_on_for_our_interface() {
    let rig = Rig::new();
    let pod = rig.pod();
    pod.namespace.set_sysctl(&["net", "ipv6", "conf", "default", "disable_ipv6"], "1");
    let result = rig.add(&pod);
    talk(&pod.namespace.netns, &rig.host.netns, rig.daemon.gateways()[1]);
    check(&rig, &pod, &result).silent();
}

#[test]
fn s025_s026_s043_s044_s064_s069_s075_cycles_in_every_version() {
    let rig = Rig::new();
    let pod = rig.pod();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        for _ in 0..3 {
            let result = rig.call("ADD", &pod, json!({"cniVersion": version})).run().result();
            assert_eq!(result["cniVersion"], version);
            let old = version.starts_with("0.");
            assert_eq!(result["ips"][0].get("version").is_some(), old);
            assert_eq!(result["interfaces"][2].get("mtu").is_some(), version == "1.1.0");
            if version != "0.3.1" {
                check(&rig, &pod, &result).silent();
            }
            let conf = json!({"cniVersion": version, "prevResult": result});
            rig.call("DEL", &pod, conf.clone()).run().silent();
            assert_eq!(pod.namespace.links(), ["lo"]);
            rig.call("DEL", &pod, conf).run().silent();
            rig.assert_clean();
        }
    }
}

#[test]
fn s019_the_plugins_own_namespace_is_refused() {
    let rig = Rig::new();
    let pod = rig.pod();
    let call = rig.call("ADD", &pod, json!({})).env("CNI_NETNS", &rig.host.path());
    let error = call.run().error(8);
    assert!(error["msg"].as_str().unwrap().contains("own network namespace"), "{error}");
    rig.assert_clean();
}

#[test]
fn something_else_than_a_namespace_is_refused() {
    let rig = Rig::new();
    let pod = rig.pod();
    for path in ["/proc/self/ns/mnt", "/etc/hostname", "/nonexistent/ns"] {
        rig.call("ADD", &pod, json!({})).env("CNI_NETNS", path).run().error(8);
    }
    rig.assert_clean();
}

#[test]
fn s042_an_existing_interface_is_refused_and_untouched() {
    let rig = Rig::new();
    let pod = rig.pod();
    let result = rig.add(&pod);
    let before =
        (pod.namespace.rtnl().links().unwrap(), rig.host.rtnl().links().unwrap(), rig.daemon.leases());
    let again = rig.call("ADD", &pod, json!({})).run().error(101);
    assert!(again["msg"].as_str().unwrap().contains("eth0"), "{again}");
    // Another container id for the same namespace and name.
    rig.call("ADD", &pod, json!({})).env("CNI_CONTAINERID", "other").run().error(101);
    rig.call("ADD", &pod, json!({})).env("CNI_IFNAME", "lo").run().error(101);
    let after =
        (pod.namespace.rtnl().links().unwrap(), rig.host.rtnl().links().unwrap(), rig.daemon.leases());
    assert_eq!(before, after);
    check(&rig, &pod, &result).silent();
    // The same id in another namespace: the daemon knows that it is in use.
    let other = Namespace::new("other");
    rig.call("ADD", &pod, json!({})).env("CNI_NETNS", &other.path()).run().error(101);
    assert_eq!(other.links(), ["lo"]);
    check(&rig, &pod, &result).silent();
}

#[test]
fn s060_a_second_interface_comes_and_goes_without_touching_the_first() {
    let rig = Rig::new();
    let pod = rig.pod();
    let first = rig.add(&pod);
    let before = pod.namespace.rtnl().routes(RouteFilter::default()).unwrap();
    let second = rig.call("ADD", &pod, json!({})).env("CNI_IFNAME", "net1").run().result();
    assert_eq!(second["routes"][0]["dst"], "10.32.0.0/12", "the default route belongs to the first");
    for result in [&first, &second] {
        for i in [0, 1] {
            talk(&rig.host.netns, &pod.namespace.netns, address(result, i));
        }
    }
    // The host takes packets of an address at that address's port only: none of the answers may take the other.
    let before_talk = transmitted(&pod.namespace);
    for _ in 0..10 {
        talk(&rig.host.netns, &pod.namespace.netns, address(&second, 0));
        talk(&rig.host.netns, &pod.namespace.netns, address(&second, 1));
    }
    let after_talk = transmitted(&pod.namespace);
    // A neighbour may be asked for, or a multicast group reported, at any moment; an answer each would be more.
    let strays = after_talk["eth0"] - before_talk["eth0"];
    assert!(strays < 10, "{strays} packets by the first interface");
    assert!(after_talk["net1"] >= before_talk["net1"] + 20, "{before_talk:?} {after_talk:?}");
    check(&rig, &pod, &first).silent();
    rig.call("CHECK", &pod, json!({"prevResult": second})).env("CNI_IFNAME", "net1").run().silent();
    rig.call("DEL", &pod, json!({})).env("CNI_IFNAME", "net1").run().silent();
    assert_eq!(pod.namespace.rtnl().routes(RouteFilter::default()).unwrap(), before);
    for family in mesh_sys::rtnl::Family::BOTH {
        let rules = pod.namespace.rtnl().rules(family).unwrap();
        assert!(rules.iter().all(|rule| rule.src.is_none()), "{rules:?}");
    }
    check(&rig, &pod, &first).silent();
    talk(&rig.host.netns, &pod.namespace.netns, address(&first, 0));
}

#[test]
fn s053_s054_s055_a_chain_keeps_its_earlier_results() {
    let rig = Rig::new();
    let pod = rig.pod();
    let prev = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "dummy0", "mac": "02:00:00:00:00:09"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24"}],
    });
    let conf =
        json!({"prevResult": prev, "dns": {"nameservers": ["10.0.0.10"], "search": ["x"]}, "mtu": 1300});
    let result = rig.call("ADD", &pod, conf).run().result();
    assert_eq!(result["interfaces"][0], prev["interfaces"][0]);
    assert_eq!(result["interfaces"][3]["name"], "eth0");
    assert_eq!(result["interfaces"][3]["mtu"], 1300);
    assert_eq!(pod.namespace.rtnl().link("eth0").unwrap().unwrap().mtu, 1300);
    assert_eq!(result["ips"][0], prev["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 3);
    assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.10"], "search": ["x"]}));
    check(&rig, &pod, &result).silent();
}

#[test]
fn s078_s110_check_tolerates_what_later_plugins_add() {
    let rig = Rig::new();
    let pod = rig.pod();
    let mut result = rig.add(&pod);
    let mut rtnl = pod.namespace.rtnl();
    let dev = index(&pod.namespace, "eth0");
    let mac = Mac([2, 0, 0, 0, 9, 9]);
    rtnl.set_link(dev, LinkChange { mac: Some(mac), ..LinkChange::default() }).unwrap();
    rtnl.add_address(dev, AddressSpec::plain("192.0.2.9/32".parse().unwrap())).unwrap();
    rtnl.add_route(Route::dev("192.0.2.0/24".parse().unwrap(), dev, 3)).unwrap();
    result["interfaces"][2]["mac"] = json!(mac.to_string());
    result["interfaces"].as_array_mut().unwrap().push(json!({"name": "bwp0", "mac": "02:00:00:00:00:77"}));
    result["routes"].as_array_mut().unwrap().push(json!({"dst": "192.0.2.0/24"}));
    check(&rig, &pod, &result).silent();
    rig.call("DEL", &pod, json!({"prevResult": result})).run().silent();
    rig.assert_clean();
}

#[test]
fn s077_s079_check_sees_everything_that_is_missing() {
    let rig = Rig::new();
    let pod = rig.pod();
    let result = rig.add(&pod);
    check(&rig, &pod, &result).silent();
    let mut rtnl = pod.namespace.rtnl();
    let mut host = rig.host.rtnl();
    let dev = index(&pod.namespace, "eth0");
    let port = index(&rig.host, &pod.host_ifname());
    let broken = |what: &str| {
        let error = check(&rig, &pod, &result).error(104);
        let text = format!("{} {}", error["msg"], error["details"]);
        assert!(text.contains(what), "{what:?} is not in {text}");
    };

    let mut other = result.clone();
    other["interfaces"][2]["name"] = json!("eth1");
    check(&rig, &pod, &other).error(104);
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.32.9.9/32");
    check(&rig, &pod, &other).error(104);
    let mut other = result.clone();
    other["interfaces"][2]["mac"] = json!("02:00:00:00:00:99");
    check(&rig, &pod, &other).error(104);

    for gateway in rig.daemon.gateways() {
        rtnl.del_neighbour(dev, gateway).unwrap();
        broken(&format!("neighbour entry for gateway {gateway}"));
        rtnl.add_neighbour(dev, gateway, Mac([2, 0, 0, 0, 0xff, 1])).unwrap();
        check(&rig, &pod, &result).silent();
    }
    for route in rtnl.routes(RouteFilter { protocol: Some(118), ..RouteFilter::default() }).unwrap() {
        let RouteKind::Unicast { gateway, .. } = route.kind else { panic!("{route:?}") };
        assert!(rtnl.del_route(route.clone()).unwrap());
        broken(&match gateway {
            Some(_) => format!("route to {}", route.dst),
            None => format!("route to gateway {}", route.dst.addr()),
        });
        rtnl.add_route(route).unwrap();
        check(&rig, &pod, &result).silent();
    }
    for (i, dst) in [(0, "0.0.0.0/0"), (1, "::/0")] {
        let net: IpNet = result["ips"][i]["address"].as_str().unwrap().parse().unwrap();
        assert!(rtnl.del_address(dev, net).unwrap());
        broken(&format!("address {net} is not on eth0"));
        rtnl.add_address(dev, AddressSpec::plain(net)).unwrap();
        // With the last address of a family the kernel has taken away its routes and neighbours.
        rtnl.add_neighbour(dev, rig.daemon.gateways()[i], Mac([2, 0, 0, 0, 0xff, 1])).unwrap();
        for (dst, gateway) in [
            (IpNet::from(rig.daemon.gateways()[i]), None),
            (dst.parse().unwrap(), Some(rig.daemon.gateways()[i])),
        ] {
            let kind = RouteKind::Unicast { dev, gateway, onlink: false, prefsrc: Some(net.addr()) };
            rtnl.add_route(Route { kind, ..Route::dev(dst, dev, 118) }).unwrap();
        }
        check(&rig, &pod, &result).silent();
    }

    host.set_link(port, LinkChange { up: Some(false), ..LinkChange::default() }).unwrap();
    broken("is down");
    host.set_link(port, LinkChange { up: Some(true), master: Some(None), ..LinkChange::default() }).unwrap();
    broken("is not a port of mesh0");
    host.delete_link(&pod.host_ifname()).unwrap();
    broken("there is no interface eth0");

    let stranger = rig.pod();
    rig.call("CHECK", &stranger, json!({"prevResult": result})).run().error(104);
}

#[test]
fn s079_check_needs_the_daemon() {
    let mut rig = Rig::new();
    let pod = rig.pod();
    let result = rig.add(&pod);
    rig.daemon.stop();
    check(&rig, &pod, &result).error(11);
}

#[test]
fn s059_many_containers_at_once() {
    let rig = Rig::new();
    let pods: Vec<Pod> = (0..20).map(|_| rig.pod()).collect();
    let begin = Instant::now();
    let results: Vec<Value> = std::thread::scope(|scope| {
        let running: Vec<_> = pods.iter().map(|pod| scope.spawn(|| rig.add(pod))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    eprintln!("{} ADDs at once took {:?}", pods.len(), begin.elapsed());
    let addresses: std::collections::BTreeSet<_> = results.iter().map(|result| address(result, 0)).collect();
    assert_eq!(addresses.len(), pods.len());
    talk(&pods[0].namespace.netns, &pods[19].namespace.netns, address(&results[19], 1));
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| rig.del(pod));
        }
    });
    rig.assert_clean();
}

#[test]
fn s059_of_two_adds_for_one_interface_one_wins() {
    let rig = Rig::new();
    for _ in 0..5 {
        let pod = rig.pod();
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let add = || rig.call("ADD", &pod, json!({})).run();
            let running = [scope.spawn(add), scope.spawn(add)];
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(|outcome| outcome.success);
        let [won] = <[Outcome; 1]>::try_from(won).unwrap();
        let result = won.result();
        for outcome in lost {
            outcome.error(101);
        }
        check(&rig, &pod, &result).silent();
        talk(&pod.namespace.netns, &rig.host.netns, rig.daemon.gateways()[0]);
        rig.del(&pod);
    }
    rig.assert_clean();
}

#[test]
fn s070_s128_deleting_the_old_sandbox_does_not_disturb_the_new_one() {
    let rig = Rig::new();
    let (old, new) = (rig.pod(), rig.pod());
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u";
    rig.call("ADD", &old, json!({})).env("CNI_ARGS", args).run().result();
    let result = rig.call("ADD", &new, json!({})).env("CNI_ARGS", args).run().result();
    rig.call("DEL", &old, json!({})).env("CNI_ARGS", args).run().silent();
    check(&rig, &new, &result).silent();
    let leases = rig.daemon.leases();
    assert_eq!(leases.len(), 1);
    let pod = leases[0].pod.as_ref().unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()), ("ns", "web-0", "u"));
}

#[test]
fn a_foreign_default_route_is_kept() {
    let rig = Rig::new();
    let pod = rig.pod();
    let mut rtnl = pod.namespace.rtnl();
    let spec = VethSpec {
        name: "foreign".into(),
        mac: None,
        mtu: None,
        master: None,
        peer: VethPeer { name: "foreign-peer".into(), mac: None, mtu: None, netns: None },
    };
    let foreign = rtnl.create_veth(spec).unwrap();
    rtnl.set_link(foreign, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    let default: IpNet = "0.0.0.0/0".parse().unwrap();
    rtnl.add_route(Route::dev(default, foreign, 3)).unwrap();
    let result = rig.add(&pod);
    assert_eq!(result["routes"][0], json!({"dst": "10.32.0.0/12", "gw": "10.32.0.1"}));
    assert_eq!(result["routes"][1], json!({"dst": "::/0", "gw": "fd00:aa::1"}));
    let defaults: Vec<_> = rtnl
        .routes(RouteFilter::default())
        .unwrap()
        .into_iter()
        .filter(|route| route.dst == default && route.table == 254)
        .collect();
    assert_eq!(defaults.len(), 1);
    assert_eq!(defaults[0].protocol, 3);
    check(&rig, &pod, &result).silent();
    talk(&pod.namespace.netns, &rig.host.netns, rig.daemon.gateways()[0]);
}
