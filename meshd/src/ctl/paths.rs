//! The ways that tunnels take, as text.

use comfy_table::{Table, presets};
use mesh_core::api::{PathStatus, PeerStatus, Status, WayStatus};
use serde_json::{Value, json};

use super::status::{age, short};

/// For programs: the paths of all members.
pub(super) fn json(status: &Status) -> Value {
    let path =
        |peer: &PeerStatus| json!({ "id": peer.id, "name": peer.name, "path": peer.path, "mtu": peer.mtu });
    let paths: Vec<Value> = status.peers.iter().map(path).collect();
    json!({ "schema_version": status.schema_version, "paths": paths })
}

/// For people: a line for each member.
pub(super) fn table(status: &Status) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "PEER",
        "ID",
        "WAY",
        "MTU",
        "RTT",
        "SINCE",
        "WHY",
        "OTHER WAYS",
    ]);
    for peer in &status.peers {
        table.add_row(row(status, peer));
    }
    table.to_string()
}

fn row(status: &Status, peer: &PeerStatus) -> [String; 8] {
    let (name, id) = (peer.name.clone(), short(&peer.id).to_owned());
    let none = || "-".to_owned();
    let Some(path) = &peer.path else {
        let why = "nothing is sent".to_owned();
        return [name, id, way(status, None), mtu(peer), none(), none(), why, none()];
    };
    let (used, others): (Vec<&WayStatus>, Vec<&WayStatus>) =
        path.ways.iter().partition(|way| way.relay == path.relay);
    let others: Vec<String> = others.into_iter().map(|other| other_way(status, other)).collect();
    [
        name,
        id,
        way(status, path.relay.as_deref()),
        mtu(peer),
        used.first().and_then(|used| rtt(used)).unwrap_or_else(none),
        age(path.since_seconds),
        why(path),
        if others.is_empty() { none() } else { others.join(", ") },
    ]
}

/// Of pods' packets, of both families where they differ; and of the tunnel's on the way, where it is less than they need.
fn mtu(peer: &PeerStatus) -> String {
    let Some(mtu) = peer.mtu else { return "-".to_owned() };
    let inside =
        if mtu.ipv4 == mtu.ipv6 { mtu.ipv4.to_string() } else { format!("{}/{}", mtu.ipv4, mtu.ipv6) };
    match mtu.underlay {
        Some(_) if mtu.is_largest => inside,
        Some(underlay) => format!("{inside} ({underlay} outside)"),
        None => format!("{inside} (not measured)"),
    }
}

fn why(path: &PathStatus) -> String {
    if path.chosen_here { path.why.clone() } else { format!("{} (the other end chooses)", path.why) }
}

fn way(status: &Status, relay: Option<&str>) -> String {
    let Some(relay) = relay else { return "direct".to_owned() };
    let name = status.peers.iter().find(|peer| peer.id == relay).map_or(short(relay), |peer| &peer.name);
    format!("through {name}")
}

fn rtt(way: &WayStatus) -> Option<String> {
    Some(format!("{:.1} ms", f64::from(way.rtt_microseconds?) / 1000.0))
}

fn other_way(status: &Status, other: &WayStatus) -> String {
    let what = match (other.usable, rtt(other), other.answered_seconds) {
        (true, Some(rtt), _) => rtt,
        (_, _, Some(seconds)) => format!("no answer for {}", age(seconds)),
        (_, _, None) => "no answer".to_owned(),
    };
    format!("{} ({what})", way(status, other.relay.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_says_what_it_is_of() {
        let of = |ipv4, ipv6, underlay: Option<u32>, is_largest| {
            let peer = json!({
                "id": "", "name": "", "version": "", "advertised": [], "ranges": [], "mesh_ipv4": null,
                "mesh_ipv6": "::", "session": { "state": "down", "reason": null },
                "tunnel": { "ready": true, "endpoint": null, "handshake_age_seconds": null, "rx_bytes": 0, "tx_bytes": 0 },
                "mtu": { "ipv4": ipv4, "ipv6": ipv6, "underlay": underlay, "is_largest": is_largest, "confirmed_seconds": null },
            });
            mtu(&serde_json::from_value(peer).unwrap())
        };
        assert_eq!(of(1420, 1420, Some(1480), true), "1420");
        assert_eq!(of(1232, 1280, Some(1300), false), "1232/1280 (1300 outside)");
        assert_eq!(of(1216, 1280, None, false), "1216/1280 (not measured)");
    }

    #[test]
    fn other_ways_say_what_speaks_against_them() {
        let status: Status = serde_json::from_value(json!({
            "schema_version": 1, "version": "", "node": { "id": "", "name": "", "identity_key": "" },
            "cluster": null, "membership": { "state": "member" }, "addresses": null, "lanes": [], "peers": [],
            "attachments": 0, "problems": [],
        }))
        .unwrap();
        let way = |relay: Option<&str>, rtt_microseconds, answered_seconds, usable| {
            let relay = relay.map(str::to_owned);
            other_way(&status, &WayStatus { relay, rtt_microseconds, answered_seconds, usable })
        };
        assert_eq!(way(None, None, None, false), "direct (no answer)");
        assert_eq!(way(None, Some(900), Some(75), false), "direct (no answer for 75s)");
        assert_eq!(way(Some("0123456789abcdef"), Some(12_340), Some(0), true), "through 01234567 (12.3 ms)");
    }
}
