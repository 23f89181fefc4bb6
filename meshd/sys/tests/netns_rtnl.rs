//! rtnetlink against the running kernel, checked by packet and by `ip`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;

use std::time::Duration;

use common::{BRIDGE_MAC, GATEWAY4, GATEWAY6, Node, Ns};
use mesh_sys::rtnl::{
    AddrGenMode, AddressSpec, BridgePortChange, BridgeSpec, Event, Family, FdbEntry, LinkChange, Mac,
    Monitor, Route, RouteFilter, RouteKind, Rtnl, RtnlError, Rule, RuleAction, VethPeer, VethSpec,
};
use nix::errno::Errno;

fn veth(name: &str, peer: &str) -> VethSpec {
    let peer = VethPeer { name: peer.into(), mac: None, mtu: None, netns: None };
    VethSpec { name: name.into(), mac: None, mtu: None, master: None, peer }
}

#[test]
fn a_veth_reaches_into_another_namespace() {
    let (here, there) = (Ns::new("here"), Ns::new("there"));
    let mut rtnl = here.rtnl();
    let (near, far): (Mac, Mac) =
        ("02:00:00:00:00:01".parse().unwrap(), "02:00:00:00:00:02".parse().unwrap());
    let index = rtnl
        .create_veth(VethSpec {
            name: "mv0".into(),
            mac: Some(near),
            mtu: Some(1380),
            master: None,
            peer: VethPeer {
                name: "eth0".into(),
                mac: Some(far),
                mtu: Some(1380),
                netns: Some(there.netns.try_clone().unwrap()),
            },
        })
        .unwrap();
    assert!(rtnl.link("eth0").unwrap().is_none(), "the far end must never be here");
    let link = rtnl.link("mv0").unwrap().unwrap();
    assert_eq!((link.index, link.mac, link.mtu, link.up), (index, Some(near), 1380, false));
    assert_eq!(link.kind.as_deref(), Some("veth"));
    let mut inside = there.rtnl();
    let peer = inside.link("eth0").unwrap().unwrap();
    assert_eq!((peer.mac, peer.mtu), (Some(far), 1380));
    assert_eq!(link.peer_index, Some(peer.index));
    assert!(link.peer_netns_id.is_some());

    let change = LinkChange {
        up: Some(true),
        alias: Some("pod default/web".into()),
        txqlen: Some(77),
        addr_gen: Some(AddrGenMode::None),
        ..LinkChange::default()
    };
    rtnl.set_link(index, change.clone()).unwrap();
    inside.set_link(peer.index, change).unwrap();
    let link = rtnl.link_by_index(index).unwrap().unwrap();
    assert_eq!((link.up, link.txqlen, link.alias.as_deref()), (true, 77, Some("pod default/web")));
    assert!(!here.sh("ip -6 addr show dev mv0").contains("fe80"), "the kernel made a link-local address");
    for (ns, ip) in [(&here, "10.1.0.1"), (&there, "10.1.0.2")] {
        let mut rtnl = ns.rtnl();
        let dev = if ip.ends_with('1') { index } else { peer.index };
        rtnl.add_address(dev, AddressSpec::plain(format!("{ip}/32").parse().unwrap())).unwrap();
        rtnl.add_route(Route::dev("10.1.0.0/24".parse().unwrap(), dev, 118)).unwrap();
    }
    assert!(here.pings("10.1.0.2"));

    let again = rtnl.create_veth(veth("mv0", "other")).unwrap_err();
    assert!(again.is_exists(), "{again}");
    assert!(rtnl.delete_link("mv0").unwrap());
    assert!(!rtnl.delete_link("mv0").unwrap());
    assert!(inside.link("eth0").unwrap().is_none(), "the far end goes too");
}

#[test]
fn errors_name_the_operation_the_object_and_the_likely_cause() {
    let ns = Ns::new("err");
    let mut rtnl = ns.rtnl();
    let error = rtnl.set_link(4711, LinkChange { mtu: Some(1400), ..LinkChange::default() }).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENODEV));
    assert!(error.is_missing());
    let text = error.to_string();
    assert!(text.contains("change device 4711") && text.contains("no such network device"), "{text}");
    assert!(matches!(rtnl.link("a/b").unwrap_err(), RtnlError::BadName { .. }));
    rtnl.create_veth(veth("mesh0", "x0")).unwrap();
    let spec = BridgeSpec { name: "mesh0".into(), mac: None, mtu: None, multicast_snooping: false };
    let error = rtnl.create_bridge(spec).unwrap_err();
    assert!(error.to_string().contains("a device of kind veth is in the way"), "{error}");
    let bad = Route {
        kind: RouteKind::Unicast {
            dev: 1,
            gateway: Some("192.0.2.1".parse().unwrap()),
            onlink: false,
            prefsrc: None,
        },
        ..Route::dev("10.9.0.0/24".parse().unwrap(), 1, 118)
    };
    let text = rtnl.add_route(bad).unwrap_err().to_string();
    assert!(text.contains("add route 10.9.0.0/24 via 192.0.2.1"), "{text}");
}

#[test]
fn without_the_right_it_says_so() {
    let ns = Ns::new("perm");
    let error = ns
        .netns
        .run(|| {
            let mut rtnl = mesh_sys::rtnl::Blocking::open().unwrap();
            drop_rights();
            rtnl.delete_link("lo").unwrap_err()
        })
        .unwrap();
    assert!(error.is_permission(), "{error}");
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}

/// Takes all capabilities from the calling thread, and from no other.
#[expect(unsafe_code, reason = "capset has no safe wrapper among our dependencies")]
fn drop_rights() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let none = [0u32; 6];
    // SAFETY: version 3 of the interface reads one header and two sets of three words each, which is
    // what both pointers lead to.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    assert_eq!(result, 0);
}

#[test]
fn a_bridge_made_twice_is_one_bridge() {
    let ns = Ns::new("br");
    let mut rtnl = ns.rtnl();
    let spec = BridgeSpec {
        name: "mesh0".into(),
        mac: Some(BRIDGE_MAC),
        mtu: Some(1400),
        multicast_snooping: false,
    };
    let first = rtnl.create_bridge(spec.clone()).unwrap();
    let second = rtnl.create_bridge(BridgeSpec { mtu: Some(1300), ..spec }).unwrap();
    assert_eq!(first, second);
    let link = rtnl.link("mesh0").unwrap().unwrap();
    assert_eq!((link.mtu, link.mac, link.kind.as_deref()), (1300, Some(BRIDGE_MAC), Some("bridge")));
    assert!(ns.sh("ip -d link show mesh0").contains("mcast_snooping 0"));
}

#[test]
fn bridge_port_settings_are_set_one_by_one_and_read_back() {
    let ns = Ns::new("port");
    let mut rtnl = ns.rtnl();
    let bridge = rtnl
        .create_bridge(BridgeSpec { name: "mesh0".into(), mac: None, mtu: None, multicast_snooping: false })
        .unwrap();
    let port = rtnl.create_veth(VethSpec { master: Some(bridge), ..veth("mv0", "x0") }).unwrap();
    let all = |on| BridgePortChange {
        isolated: Some(on),
        learning: Some(on),
        hairpin: Some(on),
        unicast_flood: Some(on),
        multicast_flood: Some(on),
        broadcast_flood: Some(on),
        neigh_suppress: Some(on),
        locked: Some(on),
    };
    for on in [true, false] {
        rtnl.set_bridge_port(port, all(on)).unwrap();
        let p = rtnl.link("mv0").unwrap().unwrap().port.unwrap();
        let read = [
            p.isolated,
            p.learning,
            p.hairpin,
            p.unicast_flood,
            p.multicast_flood,
            p.broadcast_flood,
            p.neigh_suppress,
            p.locked,
        ];
        assert_eq!(read, [on; 8]);
    }
    rtnl.set_bridge_port(port, BridgePortChange { isolated: Some(true), ..BridgePortChange::default() })
        .unwrap();
    let link = rtnl.link("mv0").unwrap().unwrap();
    assert!(link.port.unwrap().isolated && !link.port.unwrap().hairpin, "only what was given changes");
    assert_eq!(link.master, Some(bridge));
    rtnl.set_link(port, LinkChange { master: Some(None), ..LinkChange::default() }).unwrap();
    let link = rtnl.link("mv0").unwrap().unwrap();
    assert_eq!((link.master, link.port), (None, None));
    let error = rtnl.set_bridge_port(port, all(true)).unwrap_err();
    assert!(error.to_string().contains("change bridge port"), "{error}");
}

#[test]
fn isolated_ports_reach_the_bridge_and_each_other_only_through_it() {
    let node = Node::new(2, true);
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    for gateway in [GATEWAY4, GATEWAY6] {
        assert!(a.ns.pings(gateway), "{gateway} not reached");
    }
    assert!(a.ns.pings(&b.v4.to_string()), "routed through the host, IPv4");
    assert!(a.ns.pings(&b.v6.to_string()), "routed through the host, IPv6");

    // Straight at the other's Ethernet address, past the host's routing: nothing must come through.
    let straight = |on: &common::Pod, to: &common::Pod| {
        let mut rtnl = on.ns.rtnl();
        let eth0 = rtnl.link("eth0").unwrap().unwrap().index;
        rtnl.add_route(Route::dev(format!("{}/32", to.v4).parse().unwrap(), eth0, 118)).unwrap();
        rtnl.add_neighbour(eth0, to.v4.into(), to.mac).unwrap();
    };
    straight(a, b);
    straight(b, a);
    assert!(!a.ns.pings(&b.v4.to_string()), "a frame crossed between isolated ports");
    // The same without isolation does get through: so it is the isolation that stopped it.
    let mut rtnl = node.host.rtnl();
    for pod in [a, b] {
        let change = BridgePortChange { isolated: Some(false), ..BridgePortChange::default() };
        rtnl.set_bridge_port(pod.port_index, change).unwrap();
    }
    assert!(a.ns.pings(&b.v4.to_string()), "the test's own wiring is broken");
}

#[test]
fn a_port_forwards_as_soon_as_we_have_looked() {
    let (host, pod) = (Ns::new("host"), Ns::new("pod"));
    let mut rtnl = host.rtnl();
    let bridge = rtnl
        .create_bridge(BridgeSpec { name: "mesh0".into(), mac: None, mtu: None, multicast_snooping: false })
        .unwrap();
    let up = LinkChange { up: Some(true), ..LinkChange::default() };
    rtnl.set_link(bridge, up.clone()).unwrap();
    for round in 0..5 {
        let mut spec = veth("mv0", "eth0");
        spec.peer.netns = Some(pod.netns.try_clone().unwrap());
        let port = rtnl.create_veth(VethSpec { master: Some(bridge), ..spec }).unwrap();
        rtnl.set_link(port, up.clone()).unwrap();
        let mut inside = pod.rtnl();
        let eth0 = inside.link("eth0").unwrap().unwrap().index;
        assert!(!rtnl.wait_port_forwarding(port, Duration::ZERO).unwrap(), "the other end is down");
        inside.set_link(eth0, up.clone()).unwrap();
        let start = std::time::Instant::now();
        assert!(rtnl.wait_port_forwarding(port, Duration::from_secs(3)).unwrap());
        eprintln!("round {round}: forwarding after {:?}", start.elapsed());
        rtnl.delete_link("mv0").unwrap();
        assert!(rtnl.wait_port_forwarding(port, Duration::ZERO).unwrap_err().is_missing());
    }
}

#[test]
fn a_locked_port_takes_no_foreign_source_address() {
    let node = Node::new(1, true);
    let pod = &node.pods[0];
    let mut rtnl = node.host.rtnl();
    let change = BridgePortChange { locked: Some(true), ..BridgePortChange::default() };
    rtnl.set_bridge_port(pod.port_index, change).unwrap();
    assert!(pod.ns.pings(GATEWAY4), "its own address must pass");
    let mut inside = pod.ns.rtnl();
    let eth0 = inside.link("eth0").unwrap().unwrap().index;
    let forged = LinkChange { mac: Some(Mac([2, 0, 0, 0, 0, 0x66])), ..LinkChange::default() };
    inside.set_link(eth0, forged).unwrap();
    assert!(!pod.ns.pings(GATEWAY4), "a forged address passed");
}

#[test]
fn addresses_are_usable_at_once_and_idempotent() {
    let ns = Ns::new("addr");
    let mut rtnl = ns.rtnl();
    let dev = rtnl.create_veth(veth("v0", "v1")).unwrap();
    rtnl.set_link(dev, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    let peer = rtnl.link("v1").unwrap().unwrap().index;
    rtnl.set_link(peer, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    for net in ["10.32.1.1/24", "fd32::1/64"] {
        let spec = AddressSpec::plain(net.parse().unwrap());
        rtnl.add_address(dev, spec.clone()).unwrap();
        rtnl.add_address(dev, spec.clone()).unwrap();
        let found = rtnl.addresses(Some(dev)).unwrap();
        let found: Vec<_> = found.iter().filter(|a| a.net == spec.net).collect();
        assert_eq!(found.len(), 1);
        assert!(!found[0].tentative && found[0].no_prefix_route, "{:?}", found[0]);
    }
    assert!(ns.sh("ip route show dev v0").is_empty(), "the kernel made a prefix route");
    assert!(rtnl.del_address(dev, "10.32.1.1/24".parse().unwrap()).unwrap());
    assert!(!rtnl.del_address(dev, "10.32.1.1/24".parse().unwrap()).unwrap());
    assert!(!rtnl.del_address(4711, "fd32::1/64".parse().unwrap()).unwrap());
}

#[test]
fn unreachable_routes_lie_below_more_specific_ones() {
    let (host, peer) = (Ns::new("host"), Ns::new("peer"));
    let mut rtnl = host.rtnl();
    let mut spec = veth("v0", "eth0");
    spec.peer.netns = Some(peer.netns.try_clone().unwrap());
    let dev = rtnl.create_veth(spec).unwrap();
    let mut inside = peer.rtnl();
    let eth0 = inside.link("eth0").unwrap().unwrap().index;
    for (rtnl, dev, v4, v6) in [
        (&mut rtnl, dev, "10.32.0.1/32", "fd32::1/128"),
        (&mut inside, eth0, "10.32.5.1/32", "fd32:5::1/128"),
    ] {
        rtnl.set_link(dev, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        for net in [v4, v6] {
            rtnl.add_address(dev, AddressSpec::plain(net.parse().unwrap())).unwrap();
        }
    }
    inside.add_route(Route::dev("10.32.0.0/12".parse().unwrap(), eth0, 118)).unwrap();
    inside.add_route(Route::dev("fd32::/16".parse().unwrap(), eth0, 118)).unwrap();

    let wanted: Vec<Route> = [("10.32.0.0/12", "10.32.5.0/24"), ("fd32::/16", "fd32:5::/32")]
        .into_iter()
        .flat_map(|(range, node)| {
            let mut under = Route::unreachable(range.parse().unwrap(), 118);
            under.metric = 4_000_000;
            let mut over = Route::dev(node.parse().unwrap(), dev, 118);
            over.mtu = Some(1380);
            [under, over]
        })
        .collect();
    for route in &wanted {
        rtnl.add_route(route.clone()).unwrap();
        rtnl.add_route(route.clone()).unwrap();
    }
    let mut found = rtnl.routes(RouteFilter { protocol: Some(118), ..RouteFilter::default() }).unwrap();
    let mut normal: Vec<Route> = wanted.iter().map(Route::normalized).collect();
    found.sort();
    normal.sort();
    assert_eq!(found, normal);
    assert!(host.pings("10.32.5.1") && host.pings("fd32:5::1"), "more specific routes win");
    for other in ["10.32.6.1", "fd32:6::1"] {
        let output = host.try_sh(&format!("ping -c1 -W1 -n {other}"));
        assert!(!output.status.success());
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(
            text.to_lowercase().contains("no route to host") || text.contains("unreachable"),
            "{other}: {text}"
        );
    }
    // A changed MTU replaces; a missing route is no error.
    let mut changed = wanted[1].clone();
    changed.mtu = Some(1300);
    rtnl.add_route(changed.clone()).unwrap();
    assert!(host.sh("ip route show 10.32.5.0/24").contains("mtu 1300"));
    assert_eq!(host.sh("ip route show 10.32.5.0/24").lines().count(), 1);
    for route in &wanted {
        assert!(rtnl.del_route(route.clone()).unwrap(), "{route}");
        assert!(!rtnl.del_route(route.clone()).unwrap(), "{route}");
    }
    assert!(rtnl.routes(RouteFilter { protocol: Some(118), ..RouteFilter::default() }).unwrap().is_empty());
}

#[test]
fn a_route_of_somebody_else_is_never_replaced() {
    let ns = Ns::new("foreign");
    let mut rtnl = ns.rtnl();
    for (net, add) in [("10.50.0.0/16", "ip route add"), ("fd50::/16", "ip -6 route add")] {
        ns.sh(&format!("{add} unreachable {net} metric 77 proto static"));
        let mut ours = Route::unreachable(net.parse().unwrap(), 118);
        ours.metric = 77;
        let error = rtnl.add_route(ours.clone()).unwrap_err();
        assert!(matches!(error, RtnlError::Occupied { .. }), "{error}");
        assert!(error.to_string().contains("protocol 4"), "{error}");
        assert!(!rtnl.del_route(ours).unwrap(), "deleted somebody else's route");
        assert!(ns.sh(if net.contains(':') { "ip -6 route" } else { "ip route" }).contains("proto static"));
    }
}

#[test]
fn our_own_route_changes_kind_device_and_gateway_in_place() {
    let ns = Ns::new("change");
    let mut rtnl = ns.rtnl();
    let devs = [("v0", "w0"), ("v1", "w1")].map(|(near, far)| {
        let dev = rtnl.create_veth(veth(near, far)).unwrap();
        rtnl.set_link(dev, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        let far = rtnl.link(far).unwrap().unwrap().index;
        rtnl.set_link(far, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        dev
    });
    for (net, gateway) in [("10.70.0.0/16", "10.99.0.1"), ("fd70::/16", "fd99::1")] {
        let dst = net.parse().unwrap();
        let gateway = Some(gateway.parse().unwrap());
        let kinds = [
            RouteKind::Unreachable,
            RouteKind::Unicast { dev: devs[0], gateway: None, onlink: false, prefsrc: None },
            RouteKind::Unicast { dev: devs[1], gateway: None, onlink: false, prefsrc: None },
            RouteKind::Unicast { dev: devs[1], gateway, onlink: true, prefsrc: None },
            RouteKind::Unreachable,
            RouteKind::Blackhole,
        ];
        for kind in kinds {
            let mut route = Route { kind, ..Route::unreachable(dst, 118) };
            route.metric = 50;
            rtnl.add_route(route.clone()).unwrap();
            let filter =
                RouteFilter { protocol: Some(118), family: Some(Family::of(dst.addr())), table: None };
            assert_eq!(rtnl.routes(filter).unwrap(), [route.normalized()]);
        }
    }
}

#[test]
fn routes_of_other_tables_and_large_table_numbers() {
    let ns = Ns::new("tables");
    let mut rtnl = ns.rtnl();
    let mut route = Route::dev("10.60.0.0/16".parse().unwrap(), 1, 118);
    route.table = 100_000;
    rtnl.add_route(route.clone()).unwrap();
    let filter = RouteFilter { table: Some(100_000), ..RouteFilter::default() };
    assert_eq!(rtnl.routes(filter).unwrap(), [route.normalized()]);
    assert!(rtnl.routes(RouteFilter { table: Some(4242), ..RouteFilter::default() }).unwrap().is_empty());
    assert!(rtnl.del_route(route).unwrap());
}

#[test]
fn permanent_neighbours_and_static_forwarding_entries() {
    let node = Node::new(1, true);
    let pod = &node.pods[0];
    let mut rtnl = node.host.rtnl();
    let bridge = rtnl.link("mesh0").unwrap().unwrap().index;
    let found = rtnl.neighbours(bridge).unwrap();
    for ip in [std::net::IpAddr::from(pod.v4), pod.v6.into()] {
        let entry = found.iter().find(|n| n.ip == ip).expect("entry missing");
        assert!(entry.permanent && entry.mac == Some(pod.mac), "{entry:?}");
    }
    // It is not moved by what the pod claims.
    pod.ns.sh("ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ip route add 10.32.1.1 dev eth0; ping -c1 -W1 10.32.1.1 || true");
    let entry = rtnl
        .neighbours(bridge)
        .unwrap()
        .into_iter()
        .find(|n| n.ip == std::net::IpAddr::from(pod.v4))
        .unwrap();
    assert_eq!(entry.mac, Some(pod.mac));
    let other = Mac([2, 0, 0, 0, 0, 7]);
    rtnl.add_neighbour(bridge, pod.v4.into(), other).unwrap();
    rtnl.add_neighbour(bridge, pod.v4.into(), other).unwrap();
    let entry = rtnl
        .neighbours(bridge)
        .unwrap()
        .into_iter()
        .find(|n| n.ip == std::net::IpAddr::from(pod.v4))
        .unwrap();
    assert_eq!(entry.mac, Some(other));
    assert!(rtnl.del_neighbour(bridge, pod.v4.into()).unwrap());
    assert!(!rtnl.del_neighbour(bridge, pod.v4.into()).unwrap());
    assert!(!rtnl.del_neighbour(4711, pod.v4.into()).unwrap());

    let entry = FdbEntry::on_port(pod.port_index, pod.mac);
    assert!(rtnl.fdb(pod.port_index).unwrap().contains(&entry));
    assert!(rtnl.fdb(bridge).unwrap().contains(&entry), "a bridge lists its ports' entries");
    assert!(
        node.host
            .sh("bridge fdb show br mesh0")
            .contains(&format!("{} dev {} master mesh0 static", pod.mac, pod.port))
    );
    rtnl.add_fdb(entry).unwrap();
    assert!(rtnl.del_fdb(entry).unwrap());
    assert!(!rtnl.del_fdb(entry).unwrap());
}

#[test]
fn rules_are_added_listed_and_deleted() {
    let ns = Ns::new("rules");
    let mut rtnl = ns.rtnl();
    for (family, dst) in [(Family::V4, "10.0.0.0/8"), (Family::V6, "fd00::/8")] {
        let rule = Rule {
            family,
            priority: 5000,
            action: RuleAction::Table(118),
            iif: Some("lo".into()),
            oif: None,
            src: None,
            dst: Some(dst.parse().unwrap()),
            fwmark: Some((0x10, 0xf0)),
            invert: false,
            suppress_prefix_len: None,
            protocol: 118,
        };
        rtnl.add_rule(rule.clone()).unwrap();
        rtnl.add_rule(rule.clone()).unwrap();
        let found: Vec<_> = rtnl.rules(family).unwrap().into_iter().filter(|r| r.protocol == 118).collect();
        assert_eq!(found, std::slice::from_ref(&rule));
        assert!(rtnl.del_rule(rule.clone()).unwrap());
        assert!(!rtnl.del_rule(rule).unwrap());
    }
}

#[test]
fn long_lists_are_complete() {
    let ns = Ns::new("long");
    let mut rtnl = ns.rtnl();
    let dev = rtnl.create_veth(veth("v0", "v1")).unwrap();
    rtnl.set_link(dev, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    for n in 0..3000u32 {
        let ip = std::net::Ipv4Addr::from(0x0a20_0000 + n);
        rtnl.add_route(Route::dev(ipnet::IpNet::new(ip.into(), 32).unwrap(), dev, 118)).unwrap();
    }
    let found = rtnl.routes(RouteFilter { protocol: Some(118), ..RouteFilter::default() }).unwrap();
    assert_eq!(found.len(), 3000);
}

async fn wait_for(monitor: &mut Monitor, wanted: impl Fn(&Event) -> bool) -> Event {
    tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            let event = monitor.next().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    })
    .await
    .expect("no such event within 5 s")
}

#[tokio::test(flavor = "current_thread")]
async fn the_monitor_tells_of_every_kind_of_change() {
    let ns = Ns::new("mon");
    let rtnl = Rtnl::open_in(&ns.netns).unwrap();
    let mut monitor = Monitor::open_in(&ns.netns).unwrap();
    let dev = rtnl.create_veth(veth("v0", "v1")).await.unwrap();
    wait_for(&mut monitor, |e| matches!(e, Event::LinkChanged { name, removed: false, .. } if name == "v0"))
        .await;
    rtnl.set_link(dev, LinkChange { up: Some(true), ..LinkChange::default() }).await.unwrap();
    rtnl.add_address(dev, AddressSpec::plain("10.0.0.1/32".parse().unwrap())).await.unwrap();
    wait_for(&mut monitor, |e| *e == Event::AddrChanged { index: dev }).await;
    let route = Route::dev("10.9.0.0/16".parse().unwrap(), dev, 118);
    rtnl.add_route(route.clone()).await.unwrap();
    wait_for(&mut monitor, |e| {
        matches!(e, Event::RouteChanged { table: 254, protocol: 118, removed: false })
    })
    .await;
    rtnl.del_route(route).await.unwrap();
    wait_for(&mut monitor, |e| matches!(e, Event::RouteChanged { table: 254, protocol: 118, removed: true }))
        .await;
    rtnl.add_neighbour(dev, "10.9.0.1".parse().unwrap(), Mac([2; 6])).await.unwrap();
    wait_for(&mut monitor, |e| *e == Event::NeighChanged { index: dev }).await;
    ns.sh("ip nexthop add id 7 blackhole proto 118");
    wait_for(&mut monitor, |e| *e == Event::NexthopChanged { protocol: 118, removed: false }).await;
    ns.sh("ip nexthop del id 7");
    wait_for(&mut monitor, |e| *e == Event::NexthopChanged { protocol: 118, removed: true }).await;
    ns.sh("ip rule add priority 99 to 10.7.0.0/16 lookup 99");
    wait_for(&mut monitor, |e| *e == Event::RuleChanged).await;
    assert!(rtnl.delete_link("v0").await.unwrap());
    wait_for(&mut monitor, |e| matches!(e, Event::LinkChanged { name, removed: true, .. } if name == "v0"))
        .await;
    assert_eq!(rtnl.link("v0").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overflow_is_told_and_the_monitor_goes_on() {
    let ns = Ns::new("overflow");
    let mut monitor = Monitor::open_in(&ns.netns).unwrap();
    // Nobody reads meanwhile. Each round gives some 40 notices of a few hundred bytes to a buffer of 2 MiB.
    ns.sh("for n in $(seq 1 20000); do echo \"route add unreachable 10.$((n/250)).$((n%250)).0/24 metric $n\"; done | ip -batch -");
    wait_for(&mut monitor, |e| *e == Event::Resync).await;
    ns.sh("ip link add after type veth peer name after2");
    wait_for(&mut monitor, |e| matches!(e, Event::LinkChanged { name, .. } if name == "after")).await;
}
