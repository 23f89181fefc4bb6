//! Routers: a network namespace each, with the outer network on `wan0` and the inner one on `lan0`.
//!
//! Addresses are translated by the kernel's connection tracking. Which outside port a host's port has, and who may
//! send to it, is remembered in maps of our own, because connection tracking knows connections only, and a NAT of
//! RFC 4787 is about more than one. All three maps live as long as packets pass, in either direction:
//!
//! | map | from | to |
//! |---|---|---|
//! | `mapped` | inside address and port, and as much of the destination as the mapping depends on | outside address and port |
//! | `owner` | outside port | inside address and port |
//! | `allowed` | outside port, and as much of the other end as the filter asks for | |
//!
//! A new connection takes the outside port that `mapped` says, or the next one of a counter. When the packet has been
//! translated, the maps learn what became of it (chain `learn`, after translation): a packet that comes in is
//! translated for the owner of its port and then dropped there, unless `allowed` has its sender. A dropped packet
//! leaves no connection behind.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result};
use ipnet::Ipv4Net;
use mesh_sys::netns::NetNs;

use crate::family::Family;
use crate::plan::{GATEWAY, Plan, Segment, inner_port, outer_port, router_macs};
use crate::topology::{Behaviour, Nat, Out};
use crate::underlay::{ip_batch, make_bridge, nft};

/// First of the outside ports.
const FIRST_PORT: u16 = 20_000;

/// Number of the outside ports: the counter begins anew after so many mappings.
const PORTS: u16 = 1 << 14;

/// Makes the segment behind a router and connects the router, whose first process is `pid`, with both sides.
pub(crate) fn plug(plan: Plan<'_>, number: u8, switch: &NetNs, router: &NetNs, pid: i32) -> Result<()> {
    let (above, below) = (plan.above(number), Segment(number));
    let [wan_mac, lan_mac] = router_macs(number);
    make_bridge(switch, &below.bridge())?;
    let mut script = String::new();
    let sides = [
        (outer_port(number), above.bridge(), "wan0", wan_mac),
        (inner_port(number), below.bridge(), "lan0", lan_mac),
    ];
    for (port, bridge, device, mac) in sides {
        writeln!(
            script,
            "link add {port} mtu 1500 type veth peer name {device} address {mac} mtu 1500 netns {pid}"
        )?;
        writeln!(script, "link set {port} master {bridge} addrgenmode none up")?;
    }
    ip_batch(switch, &script)?;

    forward(router, &["wan0", "lan0"])?;
    let mut script = String::new();
    for device in ["wan0", "lan0"] {
        writeln!(script, "link set {device} addrgenmode none up")?;
    }
    writeln!(script, "addr add fe80::{:x}/64 dev wan0 nodad", GATEWAY - number)?;
    writeln!(script, "addr add fe80::{GATEWAY:x}/64 dev lan0 nodad")?;
    for family in Family::BOTH {
        let length = if family == Family::V4 { 24 } else { 64 };
        if let Some(inner) = plan.address(below, GATEWAY, family) {
            writeln!(script, "addr add {inner}/{length} dev lan0{}", nodad(family))?;
        }
        let gateway = plan.address(above, GATEWAY, family);
        if let Some((outer, gateway)) = plan.router_address(number, family).zip(gateway) {
            writeln!(script, "addr add {outer}/{length} dev wan0{}", nodad(family))?;
            let any = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
            writeln!(script, "route add {any} via {gateway} dev wan0")?;
        }
    }
    ip_batch(router, &script)?;
    if let Some(nat) = plan.router(number).nat {
        // Connections must not be remembered for longer than mappings.
        for name in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
            write_sysctl(router, &format!("netfilter/{name}"), &nat.timeout.0.as_secs().to_string())?;
        }
    }
    nft(router, &ruleset(plan, number))
}

/// What reaches the networks behind routers whose addresses are public: the routes, in the namespace of `at` (`None` is
/// the switch).
pub(crate) fn routes_down(plan: Plan<'_>, at: Option<u8>) -> String {
    let mut script = String::new();
    for (number, _, _) in plan.routers().filter(|(number, _, _)| Some(*number) != at) {
        let way = plan.way_up(Segment(number));
        // The router next to `at` on the way down to this one.
        let next = match at {
            None => way.last().copied(),
            Some(at) => way.iter().position(|above| *above == at).map(|place| way[place - 1]),
        };
        let Some(next) = next else { continue };
        let device = at.map_or_else(|| Segment::PUBLIC.bridge(), |_| "lan0".to_owned());
        let between = way.iter().take_while(|above| Some(**above) != at);
        let translated = between.into_iter().any(|router| plan.router(*router).nat.is_some());
        if let Some(via) = plan.router_address(next, Family::V4).filter(|_| !translated) {
            _ = writeln!(script, "route add {} via {via} dev {device}", plan.net_v4(Segment(number)));
        }
        if let Some((net, via)) = plan.net_v6(Segment(number)).zip(plan.router_address(next, Family::V6)) {
            _ = writeln!(script, "route add {net} via {via} dev {device}");
        }
    }
    script
}

/// Lets a namespace forward packets of both families, without telling anybody of a better way by IPv4: the kernel does so
/// unless it is turned off for all devices and for the one.
pub(crate) fn forward(net: &NetNs, devices: &[&str]) -> Result<()> {
    for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        write_sysctl(net, name, "1")?;
    }
    for device in devices.iter().chain(&["all"]) {
        write_sysctl(net, &format!("ipv4/conf/{device}/send_redirects"), "0")?;
    }
    Ok(())
}

fn write_sysctl(net: &NetNs, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{name}");
    net.run(|| fs::write(&path, value))?.with_context(|| format!("writing {value} to {path}"))
}

fn nodad(family: Family) -> &'static str {
    if family == Family::V6 { " nodad" } else { "" }
}

/// Lets a router forget all its mappings and connections, as when it is started anew. `zone` is a number that it has not
/// had yet: connections of another zone are never found again.
pub(crate) fn rebind(router: &NetNs, zone: u16) -> Result<()> {
    nft(
        router,
        &format!(
            "flush map ip nat mapped\nflush map ip nat owner\nflush set ip nat allowed\n\
             flush chain ip nat zone_in\nadd rule ip nat zone_in ct zone set {zone}\n\
             flush chain ip nat zone_out\nadd rule ip nat zone_out ct zone set {zone}\n"
        ),
    )
}

/// Whether a port may be the outside port of a mapping.
pub(crate) fn is_outside_port(port: u16) -> bool {
    (FIRST_PORT..FIRST_PORT + PORTS).contains(&port)
}

/// Lets other things out of a router from now on. Connections that there are go on.
pub(crate) fn let_out(router: &NetNs, out: Out) -> Result<()> {
    let rules = outgoing(out);
    nft(
        router,
        &format!(
            "flush chain inet firewall outgoing\ntable inet firewall {{\nchain outgoing {{\n{rules}\n}}\n}}\n"
        ),
    )
}

/// The rules for what begins inside.
fn outgoing(out: Out) -> String {
    let only = |protocol| {
        format!(
            "meta l4proto {protocol} accept\nmeta l4proto tcp reject with tcp reset\nreject with icmpx admin-prohibited"
        )
    };
    match out {
        Out::All => "accept".to_owned(),
        Out::Udp => only("udp"),
        Out::Tcp => only("tcp"),
    }
}

/// The rules of a router.
fn ruleset(plan: Plan<'_>, number: u8) -> String {
    let router = plan.router(number);
    let out = outgoing(router.out);
    let ipv6 = if router.has_ipv6() { "" } else { "meta nfproto ipv6 drop\n" };
    let mut rules = format!(
        "table inet firewall {{\n\
         chain forward {{\ntype filter hook forward priority 0; policy drop;\n\
         {ipv6}ct state established,related accept\nct state invalid drop\n\
         iifname lan0 goto outgoing\nct status dnat accept\n}}\n\
         chain outgoing {{\n{out}\n}}\n\
         chain input {{\ntype filter hook input priority 0; policy drop;\n\
         iifname lo accept\nct state established,related accept\nmeta l4proto {{ icmp, icmpv6 }} accept\n}}\n}}\n"
    );
    let outside = plan.router_address(number, Family::V4);
    if let Some((nat, outside)) = router.nat.zip(outside) {
        rules += &translation(nat, &outside.to_string(), plan.net_v4(Segment(number)));
    }
    rules
}

/// As much of the other end as a behaviour depends on, each with the ` . ` that joins it to what comes before.
fn dependent<'a>(behaviour: Behaviour, address: &'a str, port: &'a str) -> String {
    let parts: &[&str] = match behaviour {
        Behaviour::EndpointIndependent => &[],
        Behaviour::AddressDependent => &[address],
        Behaviour::AddressAndPortDependent => &[address, port],
    };
    parts.iter().map(|part| format!(" . {part}")).collect()
}

/// The table that translates. `ct original` is what the first packet of a connection had, `ct reply` what its answers
/// have.
fn translation(nat: Nat, outside: &str, inside: Ipv4Net) -> String {
    let Nat { mapping, filtering, timeout, hairpin } = nat;
    let kinds = |behaviour| dependent(behaviour, "ipv4_addr", "inet_service");
    // The other end of a connection that began inside, and of one that began outside.
    let called = |behaviour| dependent(behaviour, "ct original ip daddr", "ct original proto-dst");
    let caller = |behaviour| dependent(behaviour, "ct reply ip daddr", "ct reply proto-dst");
    let map = format!("flags dynamic,timeout\ntimeout {timeout}\nsize 65535");
    let (map_kinds, filter_kinds) = (kinds(mapping), kinds(filtering));
    let filter = match filtering {
        Behaviour::EndpointIndependent => String::new(),
        Behaviour::AddressDependent | Behaviour::AddressAndPortDependent => format!(
            "meta l4proto udp ct direction original ct status dnat \
             ct original proto-dst{} != @allowed drop\n",
            caller(filtering)
        ),
    };
    // By a map, because nft takes a bare number for the port's bytes, in the order of this machine.
    let ports: Vec<String> = (0..PORTS).map(|count| format!("{count} : {}", FIRST_PORT + count)).collect();
    let ports = format!("numgen inc mod {PORTS} map {{ {} }}", ports.join(", "));
    // Answers among hosts inside have to come back here, so both ends are translated.
    let (from_outside, between_hosts) = match hairpin {
        false => ("iifname wan0 ", String::new()),
        true => {
            ("", format!("oifname lan0 ip saddr {inside} ct status dnat meta l4proto udp jump map_udp\n"))
        }
    };
    format!(
        "table ip nat {{\n\
         map mapped {{\ntype ipv4_addr . inet_service{map_kinds} : ipv4_addr . inet_service\n{map}\n}}\n\
         map owner {{\ntype inet_service : ipv4_addr . inet_service\n{map}\n}}\n\
         set allowed {{\ntype inet_service{filter_kinds}\n{map}\n}}\n\
         chain zone_in {{\ntype filter hook prerouting priority -350;\n}}\n\
         chain zone_out {{\ntype filter hook output priority -350;\n}}\n\
         chain destination {{\ntype nat hook prerouting priority -100;\n\
         {from_outside}ip daddr {outside} meta l4proto udp dnat ip to udp dport map @owner\n}}\n\
         chain map_udp {{\n\
         meta l4proto udp snat ip to ct original ip saddr . ct original proto-src{called_map} map @mapped\n\
         meta l4proto udp snat to {outside}:{ports}\n}}\n\
         chain source {{\ntype nat hook postrouting priority 100;\n\
         oifname wan0 meta l4proto udp jump map_udp\n{between_hosts}oifname wan0 snat to {outside}\n}}\n\
         chain learn {{\ntype filter hook postrouting priority 150;\n\
         meta l4proto udp ct status snat update @mapped {{ ct original ip saddr . ct original proto-src{called_map} : \
         ct reply ip daddr . ct reply proto-dst }}\n\
         meta l4proto udp ct status snat update @owner {{ ct reply proto-dst : ct original ip saddr . ct original proto-src }}\n\
         meta l4proto udp ct status snat update @allowed {{ ct reply proto-dst{called_filter} }}\n\
         {filter}\
         meta l4proto udp ct status dnat update @mapped {{ ct reply ip saddr . ct reply proto-src{caller_map} : \
         ct original ip daddr . ct original proto-dst }}\n\
         meta l4proto udp ct status dnat update @owner {{ ct original proto-dst : ct reply ip saddr . ct reply proto-src }}\n\
         meta l4proto udp ct status dnat update @allowed {{ ct original proto-dst{caller_filter} }}\n\
         }}\n}}\n",
        called_map = called(mapping),
        called_filter = called(filtering),
        caller_map = caller(mapping),
        caller_filter = caller(filtering),
    )
}
