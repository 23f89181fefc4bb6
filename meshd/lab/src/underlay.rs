//! The Ethernets between the hosts, public and behind routers: bridges in a network namespace of their own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use mesh_sys::netns::NetNs;

use crate::family::Family;
use crate::network::Network;
use crate::plan::{GATEWAY, Plan, Segment, host_mac, host_port};
use crate::router;

/// Name of the host's interface on the underlay.
pub(crate) const HOST_IFACE: &str = "eth0";

/// Hosts up to this number learn each other's hardware addresses as hosts do.
///
/// The kernel counts what is learned, of one family, for the whole machine and all its namespaces together, and
/// from `gc_thresh2` on (512) throws entries away again while they are in use; n hosts learn about n² of them.
const MOST_THAT_LEARN: usize = 22;

/// How hosts come to know each other's hardware addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Neighbours {
    /// By ARP and neighbour discovery.
    Learned,
    /// Those of hosts up to this number are entered for good: such entries are not counted, and no limit of the
    /// machine has to be raised.
    Entered(u8),
}

/// Entries are made for so many hosts more than the lab begins with.
const ROOM_FOR_MORE: usize = 2;

impl Neighbours {
    /// What a lab of so many hosts needs.
    pub(crate) fn of_lab(hosts: usize) -> Self {
        if hosts <= MOST_THAT_LEARN {
            return Self::Learned;
        }
        Self::Entered(u8::try_from(hosts + ROOM_FOR_MORE).map_or(GATEWAY - 1, |last| last.min(GATEWAY - 1)))
    }
}

/// Makes the public underlay with the gateway's addresses.
pub(crate) fn make_switch(switch: &NetNs, plan: Plan<'_>) -> Result<()> {
    let bridge = Segment::PUBLIC.bridge();
    make_bridge(switch, &bridge)?;
    let mut script = String::new();
    for (family, length, nodad) in [(Family::V4, 24, ""), (Family::V6, 64, " nodad")] {
        if let Some(address) = plan.address(Segment::PUBLIC, GATEWAY, family) {
            writeln!(script, "addr add {address}/{length} dev {bridge}{nodad}")?;
        }
    }
    ip_batch(switch, &script)?;
    no_bridge_netfilter(switch)
}

/// Makes a segment.
pub(crate) fn make_bridge(switch: &NetNs, bridge: &str) -> Result<()> {
    // A bridge that hands frames to iptables would track every packet of the lab in vain.
    ip_batch(
        switch,
        &format!(
            "link add {bridge} type bridge stp_state 0 forward_delay 0 mcast_snooping 0 nf_call_iptables 0 \
             nf_call_ip6tables 0 nf_call_arptables 0\n\
             link set {bridge} mtu 1500 addrgenmode none up\n"
        ),
    )
}

/// Lets the gateway of the public underlay reach the networks behind firewalls. Labs without such have a gateway that
/// forwards nothing: what a host sends there is lost, and can be seen.
pub(crate) fn route_down(switch: &NetNs, plan: Plan<'_>) -> Result<()> {
    let routes = router::routes_down(plan, None);
    if routes.is_empty() {
        return Ok(());
    }
    router::forward(switch, &[&Segment::PUBLIC.bridge()])?;
    ip_batch(switch, &routes)
}

/// Turns off the per-namespace sysctls, where the module br_netfilter is loaded at all.
fn no_bridge_netfilter(switch: &NetNs) -> Result<()> {
    switch.run(|| -> Result<()> {
        for name in ["iptables", "ip6tables", "arptables"] {
            let path = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
            if Path::new(&path).exists() {
                fs::write(&path, "0").with_context(|| format!("writing {path}"))?;
            }
        }
        Ok(())
    })?
}

/// Connects a host, whose first process is `pid`: a veth pair from a port of its segment to `eth0` inside, addresses,
/// default routes.
pub(crate) fn plug(
    switch: &NetNs,
    host: &NetNs,
    pid: i32,
    plan: Plan<'_>,
    number: u8,
    neighbours: Neighbours,
) -> Result<()> {
    let (port, mac, segment) = (host_port(number), host_mac(number), plan.segment_of(number));
    ip_batch(
        switch,
        &format!(
            "link add {port} mtu 1500 type veth peer name {HOST_IFACE} address {mac} mtu 1500 netns {pid}\n\
             link set {port} master {bridge} addrgenmode none up\n",
            bridge = segment.bridge()
        ),
    )?;
    // The link-local address is given by hand: the kernel would check its own for duplicates, which takes up to two
    // seconds, and meanwhile a host that forwards could not ask for its neighbours.
    let mut script = format!("link set {HOST_IFACE} addrgenmode none up\n");
    if plan.host_address(number, Family::V6).is_some() {
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number.into());
        writeln!(script, "addr add {link_local}/64 dev {HOST_IFACE} nodad")?;
    }
    ip_batch(host, &(script + &addresses(plan, number, "add")))?;
    match neighbours {
        Neighbours::Learned => Ok(()),
        Neighbours::Entered(last) if segment == Segment::PUBLIC => {
            ip_batch(host, &all_neighbours(plan, number, last))
        }
        Neighbours::Entered(_) => Ok(()),
    }
}

/// Gives a host other addresses: those of `old` go, those of `new` come.
pub(crate) fn renumber(host: &NetNs, old: Plan<'_>, new: Plan<'_>, number: u8) -> Result<()> {
    // First away, then there: with two addresses of one network, the kernel would take the second one for a lesser one,
    // and delete it with the first.
    ip_batch(host, &(addresses(old, number, "del") + &addresses(new, number, "add")))
}

/// Adds or deletes a host's addresses, and with them its default routes.
fn addresses(plan: Plan<'_>, number: u8, verb: &str) -> String {
    let mut script = String::new();
    for family in Family::BOTH {
        let gateway = plan.address(plan.segment_of(number), GATEWAY, family);
        let Some((address, gateway)) = plan.host_address(number, family).zip(gateway) else { continue };
        let (length, any, more) = match family {
            Family::V4 => (24, "0.0.0.0/0", " brd +"),
            Family::V6 => (64, "::/0", " nodad"),
        };
        let more = if verb == "add" { more } else { "" };
        let route = format!("route {verb} {any} via {gateway} dev {HOST_IFACE}\n");
        let address = format!("addr {verb} {address}/{length} dev {HOST_IFACE}{more}\n");
        // A route needs an address to reach its gateway.
        script += &if verb == "add" { address + &route } else { route + &address };
    }
    script
}

/// Entries for all hosts up to `last`, but for host `number` itself.
fn all_neighbours(plan: Plan<'_>, number: u8, last: u8) -> String {
    let others = (1..=last).filter(|other| *other != number);
    let entries = others.flat_map(|other| {
        Family::BOTH.map(|family| (plan.address(Segment::PUBLIC, other, family), host_mac(other)))
    });
    let lines = entries.filter_map(|(address, mac)| {
        Some(format!("neigh add {} lladdr {mac} dev {HOST_IFACE} nud permanent\n", address?))
    });
    lines.collect()
}

/// The rules of the switch: cuts, and what has to go through a forwarder.
pub(crate) fn rules(network: &Network) -> Result<String> {
    let plan = network.plan();
    let mut cut_ports = String::new();
    let mut chains: BTreeMap<String, String> = BTreeMap::new();
    for way in &network.ways {
        let (from, to) = (way.from, way.to);
        let verdict = match (way.impairment.cut, &way.forwarder) {
            (true, _) if plan.segment_of(from) == plan.segment_of(to) => {
                // At the bridge, because it also concerns frames to all.
                write!(cut_ports, "\"{}\" . \"{}\", ", host_port(from), host_port(to))?;
                continue;
            }
            (true, _) => "drop".to_owned(),
            (false, Some(forwarder)) => format!("fwd to {}", forwarder.device),
            (false, None) => continue,
        };
        let passage = plan.passage(from, to)?;
        let chain = chains.entry(passage.port).or_default();
        for expression in passage.matches {
            writeln!(chain, "{expression} {verdict}")?;
        }
    }
    let elements = if cut_ports.is_empty() { cut_ports } else { format!("elements = {{ {cut_ports} }}\n") };
    let mut rules = format!(
        "table bridge lab\ndelete table bridge lab\ntable netdev lab\ndelete table netdev lab\n\
         table bridge lab {{\n\
         set cut {{\ntype ifname . ifname\n{elements}}}\n\
         chain partition {{\ntype filter hook forward priority 0\niifname . oifname @cut counter drop\n}}\n}}\n"
    );
    for (port, chain) in chains {
        write!(
            rules,
            "table netdev lab {{\nchain {port} {{\ntype filter hook ingress device {port} priority 0;\n{chain}}}\n}}\n"
        )?;
    }
    Ok(rules)
}

/// Runs `ip -batch` inside a network namespace, with the caller's process ids.
pub(crate) fn ip_batch(net: &NetNs, script: &str) -> Result<()> {
    fed(net, Command::new("ip").args(["-batch", "-"]), script)
}

pub(crate) fn nft(net: &NetNs, script: &str) -> Result<()> {
    fed(net, Command::new("nft").args(["-f", "-"]), script)
}

fn fed(net: &NetNs, command: &mut Command, script: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = net
        .run(|| command.spawn())?
        .with_context(|| format!("running {program:?} (Debian packages iproute2 and nftables)"))?;
    child.stdin.take().context("no standard input")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    // The ports of a NAT alone are a hundred thousand characters.
    let script: String = script.chars().take(2000).collect();
    bail!("{program} refused {script:?}: {}", String::from_utf8_lossy(&output.stderr).trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Topology;

    #[test]
    fn only_hosts_of_large_labs_are_told_their_neighbours() {
        assert_eq!(Neighbours::of_lab(22), Neighbours::Learned);
        assert_eq!(Neighbours::of_lab(23), Neighbours::Entered(25));
        assert_eq!(Neighbours::of_lab(253), Neighbours::Entered(253));
        let (topology, figures) = (Topology::default(), BTreeMap::new());
        let entries = all_neighbours(Plan { topology: &topology, figures: &figures }, 2, 3);
        assert_eq!(entries.lines().count(), 4, "{entries}");
        assert!(entries.contains("neigh add 198.18.0.3 lladdr 02:00:c6:12:00:03 dev eth0 nud permanent\n"));
        assert!(entries.contains("neigh add fd00:18::1 lladdr 02:00:c6:12:00:01 dev eth0 nud permanent\n"));
    }
}
