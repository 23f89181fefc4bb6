//! The private Ethernet between the hosts: a bridge in a network namespace of its own.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use ipnet::{Ipv4Net, Ipv6Net};
use mesh_sys::netns::NetNs;

use crate::family::Family;

/// The underlay's IPv4 network (RFC 2544, benchmarking: no real host has it).
pub(crate) const NET_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 24);

/// The underlay's IPv6 network.
pub(crate) const NET_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0), 64);

/// Last figure of the router, which every host has as its default route.
pub(crate) const ROUTER: u8 = 254;

/// Name of the host's interface on the underlay.
pub(crate) const HOST_IFACE: &str = "eth0";

const BRIDGE: &str = "underlay";

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
        Self::Entered(u8::try_from(hosts + ROOM_FOR_MORE).map_or(ROUTER - 1, |last| last.min(ROUTER - 1)))
    }
}

/// The underlay address of host `number`, or of [`ROUTER`].
pub(crate) fn address(number: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(198, 18, 0, number).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, number.into()).into(),
    }
}

/// The name of a host's port on the bridge.
pub(crate) fn port(number: u8) -> String {
    format!("port{number}")
}

/// The hardware address of a host's `eth0`: locally administered, and the same in every lab.
fn hardware_address(number: u8) -> String {
    format!("02:00:c6:12:00:{number:02x}")
}

/// Makes the bridge and the router's addresses, and the table for cuts.
pub(crate) fn make_switch(switch: &NetNs) -> Result<()> {
    // A bridge that hands frames to iptables would track every packet of the lab in vain.
    ip_batch(
        switch,
        &format!(
            "link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0 nf_call_iptables 0 \
             nf_call_ip6tables 0 nf_call_arptables 0\n\
             link set {BRIDGE} mtu 1500 addrgenmode none up\n\
             addr add {v4}/{l4} dev {BRIDGE}\n\
             addr add {v6}/{l6} dev {BRIDGE} nodad\n",
            v4 = address(ROUTER, Family::V4),
            l4 = NET_V4.prefix_len(),
            v6 = address(ROUTER, Family::V6),
            l6 = NET_V6.prefix_len(),
        ),
    )?;
    no_bridge_netfilter(switch)?;
    nft(
        switch,
        "table bridge lab {\n\
         set cut {\ntype ifname . ifname\n}\n\
         chain partition {\ntype filter hook forward priority 0\niifname . oifname @cut counter drop\n}\n}\n",
    )
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

/// Connects a host: a veth pair from a port of the bridge to `eth0` inside, addresses, default routes.
pub(crate) fn plug(
    switch: &NetNs,
    host: &NetNs,
    host_pid: i32,
    number: u8,
    neighbours: Neighbours,
) -> Result<()> {
    let (port, mac) = (port(number), hardware_address(number));
    ip_batch(
        switch,
        &format!(
            "link add {port} mtu 1500 type veth peer name {HOST_IFACE} address {mac} mtu 1500 netns {host_pid}\n\
             link set {port} master {BRIDGE} addrgenmode none up\n"
        ),
    )?;
    // Given by hand: the kernel would check its own for duplicates, which takes up to two seconds, and
    // meanwhile a host that forwards could not ask for its neighbours.
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number.into());
    ip_batch(
        host,
        &format!(
            "link set {HOST_IFACE} addrgenmode none up\n\
             addr add {a4}/{l4} brd + dev {HOST_IFACE}\n\
             addr add {a6}/{l6} dev {HOST_IFACE} nodad\n\
             addr add {link_local}/64 dev {HOST_IFACE} nodad\n\
             route add default via {r4} dev {HOST_IFACE}\n\
             route add ::/0 via {r6} dev {HOST_IFACE}\n",
            a4 = address(number, Family::V4),
            l4 = NET_V4.prefix_len(),
            a6 = address(number, Family::V6),
            l6 = NET_V6.prefix_len(),
            r4 = address(ROUTER, Family::V4),
            r6 = address(ROUTER, Family::V6),
        ),
    )?;
    match neighbours {
        Neighbours::Learned => Ok(()),
        Neighbours::Entered(last) => ip_batch(host, &all_neighbours(number, last)),
    }
}

/// Entries for all hosts up to `last`, but for host `number` itself.
fn all_neighbours(number: u8, last: u8) -> String {
    let others = (1..=last).filter(|other| *other != number);
    let entries = others.flat_map(|other| Family::BOTH.map(|family| (address(other, family), other)));
    let lines = entries.map(|(address, other)| {
        format!("neigh add {address} lladdr {} dev {HOST_IFACE} nud permanent\n", hardware_address(other))
    });
    lines.collect()
}

/// Whether frames between two hosts pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Cut,
    Whole,
}

/// Cuts or heals pairs of hosts, every protocol, both directions at once: one nftables transaction.
pub(crate) fn set_links(switch: &NetNs, pairs: &[(u8, u8)], link: Link) -> Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    let mut elements = String::new();
    for (a, b) in pairs {
        let (a, b) = (port(*a), port(*b));
        write!(elements, "\"{a}\" . \"{b}\", \"{b}\" . \"{a}\", ")?;
    }
    // Adding first makes deleting succeed for pairs that were whole already.
    let add = format!("add element bridge lab cut {{ {elements} }}\n");
    match link {
        Link::Cut => nft(switch, &add),
        Link::Whole => nft(switch, &format!("{add}delete element bridge lab cut {{ {elements} }}\n")),
    }
}

/// Heals everything.
pub(crate) fn heal_all(switch: &NetNs) -> Result<()> {
    nft(switch, "flush set bridge lab cut\n")
}

/// Runs `ip -batch` inside a network namespace, with the caller's process ids.
pub(crate) fn ip_batch(net: &NetNs, script: &str) -> Result<()> {
    fed(net, Command::new("ip").args(["-batch", "-"]), script)
}

fn nft(net: &NetNs, script: &str) -> Result<()> {
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
    bail!("{program} refused {script:?}: {}", String::from_utf8_lossy(&output.stderr).trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_of_large_labs_are_told_their_neighbours() {
        assert_eq!(Neighbours::of_lab(22), Neighbours::Learned);
        assert_eq!(Neighbours::of_lab(23), Neighbours::Entered(25));
        assert_eq!(Neighbours::of_lab(253), Neighbours::Entered(253));
        let entries = all_neighbours(2, 3);
        assert_eq!(entries.lines().count(), 4, "{entries}");
        assert!(entries.contains("neigh add 198.18.0.3 lladdr 02:00:c6:12:00:03 dev eth0 nud permanent\n"));
        assert!(entries.contains("neigh add fd00:18::1 lladdr 02:00:c6:12:00:01 dev eth0 nud permanent\n"));
    }
}
