//! The laws of the difference: nothing to do between equals, and doing it leads to the desired state, whatever
//! was there, wherever it is interrupted.

use std::net::SocketAddr;

use mesh_keys::{Secret32, WgSecret};
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;

use super::*;

fn key(byte: u8) -> WgPublic {
    WgSecret::from_bytes(&[byte + 1; 32]).public()
}

fn net() -> impl Strategy<Value = IpNet> {
    (0..6u8).prop_map(|n| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(10, 32, n, 0), 24)))
}

fn peer() -> impl Strategy<Value = LanePeer> {
    (0..3u8, proptest::option::of(1..3u16), btree_set(net(), 0..3), 0..2u16).prop_map(
        |(psk, port, allowed_ips, keepalive)| LanePeer {
            psk: Psk::from_secret(Secret32::from_bytes([psk; 32])),
            endpoint: port.map(|port| SocketAddr::from(([192, 0, 2, 1], port))),
            force_endpoint: false,
            allowed_ips,
            keepalive,
        },
    )
}

fn lane() -> impl Strategy<Value = Lane> {
    (1..3u16, 0..2u8, 1300..1302u32, btree_map(0..4u8, peer(), 0..4)).prop_map(|(port, own, mtu, peers)| {
        // A prefix belongs to one peer of a device.
        let mut taken = BTreeSet::new();
        let peers = peers
            .into_iter()
            .map(|(byte, mut peer)| {
                peer.allowed_ips.retain(|net| taken.insert(*net));
                (key(byte), peer)
            })
            .collect();
        Lane {
            port,
            public_key: key(100 + own),
            mtu,
            addresses: BTreeSet::from([IpAddr::from([10, 32, 0, own + 1])]),
            peers,
        }
    })
}

fn port() -> impl Strategy<Value = Port> {
    (0..4u8, any::<bool>()).prop_map(|(n, isolated)| Port {
        mac: MacAddr([2, 0, 0, 0, 0, n]),
        ipv4: Ipv4Addr::new(10, 32, 0, n),
        ipv6: Ipv6Addr::from(u128::from(n)),
        mtu: 1420,
        isolated,
    })
}

fn guard() -> impl Strategy<Value = Guard> {
    btree_map("mv[ab]", port(), 0..2).prop_map(|ports| Guard {
        cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
        cluster_ipv6: "fd00::/48".parse().unwrap(),
        bridge_mac: MacAddr([2; 6]),
        ports: ports
            .into_iter()
            .map(|(name, port)| (name, PortGuard { mac: port.mac, ipv4: port.ipv4, ipv6: port.ipv6 }))
            .collect(),
    })
}

fn state() -> impl Strategy<Value = HostState> {
    let bridge =
        (0..2u8, 1400..1402u32, btree_set((1..4u8).prop_map(|n| IpAddr::from([10, 32, 0, n])), 0..3))
            .prop_map(|(mac, mtu, addresses)| Bridge {
                name: "mesh0".into(),
                mac: MacAddr([2, 0, 0, 0, 0, mac]),
                mtu,
                addresses,
            });
    let device = prop_oneof![Just("meshwg0"), Just("meshwg1"), Just("mesh0")].prop_map(str::to_owned);
    let route = (btree_set(device, 1..4), proptest::option::of(1300..1302u32))
        .prop_map(|(devices, mtu)| Route::Devices { devices, source: None, mtu });
    (
        proptest::option::of(guard()),
        proptest::option::of(bridge),
        btree_map("meshwg[01]", lane(), 0..3),
        btree_map("mv[abc]", port(), 0..3),
        btree_map(net(), route, 0..4),
        btree_map("net/ipv4/[ab]", "[01]", 0..3),
    )
        .prop_map(|(guard, bridge, lanes, ports, routes, sysctls)| HostState {
            sysctls,
            guard,
            bridge,
            lanes,
            ports,
            routes,
        })
}

/// The state to be reached: what closes is wanted, and is never taken away.
fn desired() -> impl Strategy<Value = HostState> {
    (state(), guard()).prop_map(|(mut state, guard)| {
        state.guard = Some(guard);
        state.routes.insert("10.32.0.0/12".parse().unwrap(), Route::Unreachable);
        state
    })
}

/// The lanes that a route leads to.
fn lanes_of(route: &Route) -> impl Iterator<Item = &String> {
    let devices = match route {
        Route::Devices { devices, .. } => Some(devices),
        Route::Unreachable => None,
    };
    devices.into_iter().flatten().filter(|name| name.starts_with("meshwg"))
}

/// A state whose routes lead to no lane that it does not have.
fn whole() -> impl Strategy<Value = HostState> {
    state().prop_map(|mut state| {
        let lanes: BTreeSet<String> = state.lanes.keys().cloned().collect();
        state.routes.retain(|_, route| lanes_of(route).all(|lane| lanes.contains(lane)));
        state
    })
}

/// The same but for what the difference leaves alone on purpose: endpoints that WireGuard has learned, and
/// sysctls that nobody asked for.
fn settled(reached: &HostState, desired: &HostState) -> bool {
    diff(reached, desired).is_empty()
        && reached.guard == desired.guard
        && reached.bridge == desired.bridge
        && reached.ports == desired.ports
        && reached.routes == desired.routes
        && reached.lanes.keys().eq(desired.lanes.keys())
        && reached.lanes.values().zip(desired.lanes.values()).all(|(a, b)| {
            a.peers.keys().eq(b.peers.keys())
                && a.peers.values().zip(b.peers.values()).all(|(a, b)| {
                    a.psk == b.psk
                        && a.allowed_ips == b.allowed_ips
                        && (b.endpoint.is_none() || a.endpoint.is_some())
                })
        })
}

proptest! {
    #[test]
    fn nothing_is_to_do_between_equals(state in state()) {
        prop_assert_eq!(diff(&state, &state), []);
    }

    #[test]
    fn doing_it_leads_to_the_desired_state(mut observed in state(), desired in desired()) {
        for op in diff(&observed, &desired) {
            observed.apply(&op);
        }
        prop_assert!(settled(&observed, &desired), "{:#?}", diff(&observed, &desired));
    }

    #[test]
    fn being_killed_after_any_operation_loses_nothing(mut observed in state(), desired in desired(), after in 0usize..20) {
        for op in diff(&observed, &desired).into_iter().take(after) {
            observed.apply(&op);
        }
        for op in diff(&observed, &desired) {
            observed.apply(&op);
        }
        prop_assert!(settled(&observed, &desired));
    }

    #[test]
    fn what_closes_comes_before_what_opens(observed in state(), desired in desired()) {
        let ops = diff(&observed, &desired);
        let opens = |op: &Op| matches!(op, Op::SetPort { .. } | Op::SetRoute { route: Route::Devices { .. }, .. });
        let closes = |op: &Op| matches!(op, Op::SetGuard(_) | Op::SetRoute { route: Route::Unreachable, .. });
        let first_open = ops.iter().position(opens).unwrap_or(ops.len());
        let last_close = ops.iter().rposition(closes).map_or(0, |at| at + 1);
        prop_assert!(last_close <= first_open);
        let removes_closed = |op: &Op| matches!(op, Op::RemoveRoute { to } if observed.routes.get(to) == Some(&Route::Unreachable));
        prop_assert!(!ops.iter().any(removes_closed));
    }

    #[test]
    fn a_route_leads_only_to_lanes_that_are_there(observed in whole(), desired in whole()) {
        let mut state = observed.clone();
        for op in diff(&observed, &desired) {
            state.apply(&op);
            let gone = state
                .routes
                .iter()
                .flat_map(|(to, route)| lanes_of(route).map(move |lane| (to, lane)))
                .find(|(_, lane)| !state.lanes.contains_key(*lane));
            prop_assert!(gone.is_none(), "{gone:?} after {op:?}");
        }
    }

    #[test]
    fn a_prefix_is_never_without_an_owner_while_it_moves(mut observed in state(), desired in desired()) {
        let held = |state: &HostState, net: &IpNet| {
            state.lanes.values().any(|lane| lane.peers.values().any(|peer| peer.allowed_ips.contains(net)))
        };
        let kept: Vec<IpNet> = desired
            .lanes
            .iter()
            .filter_map(|(device, lane)| Some((lane, observed.lanes.get(device)?)))
            .flat_map(|(lane, before)| {
                let wanted: BTreeSet<IpNet> = lane.peers.values().flat_map(|peer| peer.allowed_ips.clone()).collect();
                let had: BTreeSet<IpNet> = before.peers.values().flat_map(|peer| peer.allowed_ips.clone()).collect();
                wanted.intersection(&had).copied().collect::<Vec<_>>()
            })
            .collect();
        for op in diff(&observed, &desired) {
            observed.apply(&op);
            for net in &kept {
                prop_assert!(held(&observed, net), "{net} has no owner after {op:?}");
            }
        }
    }
}
