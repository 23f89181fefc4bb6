//! The status as text.

use std::fmt::Write as _;

use comfy_table::{Table, presets};
use mesh_core::api::{Backend, Membership, PeerStatus, SessionStatus, Status};

/// One screen: the node, its cluster, lanes, peers and problems.
pub(super) fn overview(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name:<11} {value}");
    };
    line("node", &format!("{} ({})", status.node.name, status.node.id));
    line("version", &status.version);
    match (&status.cluster, &status.membership) {
        (Some(cluster), _) => {
            line(
                "cluster",
                &format!("{} ({}), {} members", cluster.name, short(&cluster.id), cluster.members),
            );
            line("ranges", &format!("{}, {}", cluster.ipv4, cluster.ipv6));
            if let Some(keys) = &cluster.admin_keys {
                line("authority", &authority(keys.len()));
            }
            if cluster.joins_open == Some(false) {
                line("joining", "closed; `meshctl join-window open` opens it");
            }
        }
        (None, Membership::Joining { waiting_for }) => {
            line("cluster", &format!("none yet; waiting for {waiting_for}"))
        }
        (None, Membership::Member) => {}
    }
    if let Some(addresses) = &status.addresses {
        line("addresses", &format!("{}, {}", addresses.ipv4, addresses.ipv6));
        let owned: Vec<String> = addresses.owned_ipv4.iter().map(ToString::to_string).collect();
        line("owns", &format!("{}, {}", owned.join(" "), addresses.owned_ipv6));
        line("pods", &format!("{} attached, {} IPv4 addresses free", status.attachments, addresses.free));
    }
    for lane in &status.lanes {
        let backend = match lane.backend {
            Backend::Kernel => "kernel",
            Backend::Userspace => "userspace",
            Backend::Unknown => "unknown backend",
        };
        let state = if lane.up { "up" } else { "DOWN" };
        line("tunnel", &format!("{} {state}, UDP {}, {backend} ({})", lane.device, lane.port, lane.reason));
        line("", &lane.public_key);
    }
    for problem in &status.problems {
        line("PROBLEM", problem);
    }
    if !status.peers.is_empty() {
        let _ = write!(out, "\n{}", peers(status));
    }
    out
}

/// The other members, a line each.
pub(super) fn peers(status: &Status) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "PEER",
        "ID",
        "MESH ADDRESSES",
        "GOSSIP",
        "ENDPOINT",
        "HANDSHAKE",
        "RECEIVED",
        "SENT",
        "TUNNEL",
    ]);
    for peer in &status.peers {
        table.add_row(row(peer));
    }
    let mut out = format!("{table}\n");
    for peer in &status.peers {
        if let (false, SessionStatus::Down { reason: Some(reason) }) = (peer.gossip.reachable, &peer.session)
        {
            let _ = writeln!(out, "{} ({}) does not answer: {reason}", peer.name, short(&peer.id));
        }
    }
    out
}

fn row(peer: &PeerStatus) -> [String; 9] {
    let none = || "-".to_owned();
    let gossip = match (peer.gossip.reachable, peer.gossip.rtt_microseconds) {
        (true, Some(rtt)) => format!("{:.1} ms", f64::from(rtt) / 1000.0),
        (true, None) => "not heard yet".to_owned(),
        (false, _) => "unreachable".to_owned(),
    };
    let mesh = match peer.mesh_ipv4 {
        Some(ipv4) => format!("{ipv4} {}", peer.mesh_ipv6),
        None => none(),
    };
    [
        peer.name.clone(),
        short(&peer.id).to_owned(),
        mesh,
        gossip,
        peer.tunnel.endpoint.map_or_else(none, |endpoint| endpoint.to_string()),
        peer.tunnel
            .handshake_age_seconds
            .map_or_else(|| "none yet".to_owned(), |seconds| format!("{} ago", age(seconds))),
        bytes(peer.tunnel.rx_bytes),
        bytes(peer.tunnel.tx_bytes),
        match (peer.leaving, peer.tunnel.ready, peer.path.as_ref().and_then(|path| path.relay.as_deref())) {
            (true, ..) => "leaving the cluster".to_owned(),
            (false, true, None) => "ready".to_owned(),
            (false, true, Some(relay)) => format!("ready, through {}", short(relay)),
            (false, false, _) => "agreeing on a key".to_owned(),
        },
    ]
}

fn authority(admin_keys: usize) -> String {
    match admin_keys {
        0 => "flat: any member can remove others; a malicious member cannot be evicted".to_owned(),
        1 => "anchored: one admin key signs removals".to_owned(),
        several => format!("anchored: any of {several} admin keys signs removals"),
    }
}

pub(super) fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut scaled, mut unit) = (count, 0);
    let mut rest = 0;
    while scaled >= 1024 && unit + 1 < units.len() {
        rest = scaled % 1024 * 10 / 1024;
        scaled /= 1024;
        unit += 1;
    }
    let unit = units.get(unit).copied().unwrap_or_default();
    if unit == "B" { format!("{scaled} {unit}") } else { format!("{scaled}.{rest} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_who_can_remove_nodes() {
        assert!(authority(0).starts_with("flat: ") && authority(0).contains("cannot be evicted"));
        assert!(authority(1).starts_with("anchored: one") && authority(3).contains("any of 3"));
    }

    #[test]
    fn sizes_and_ages_read_well() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(5 << 30)],
            ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
        );
        assert_eq!([age(5), age(300), age(7200), age(864_000)], ["5s", "5m", "2h", "10d"]);
    }
}
