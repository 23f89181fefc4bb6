//! Who owns which addresses, as text.

use std::fmt::Write as _;

use comfy_table::{Table, presets};
use mesh_core::api::{ConflictStatus, IpamStatus, Membership, OwnerStatus, Status, UsageStatus};

use super::status::short;

/// The ranges of the cluster, this node's addresses, the owners a line each, and what would free more.
pub(super) fn table(status: &Status) -> String {
    match (&status.ipam, &status.membership) {
        (Some(ipam), _) => whole(ipam),
        (None, Membership::Joining { waiting_for }) => {
            format!("no addresses yet: this node is in no cluster; waiting for {waiting_for}\n")
        }
        (None, Membership::Member) => "the daemon is of an older version and does not tell\n".to_owned(),
    }
}

fn whole(ipam: &IpamStatus) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<10} {value}");
    };
    line("range", &format!("{} in blocks of /{}, {}", ipam.ipv4, ipam.block_prefix, ipam.ipv6));
    line("this node", &usage(&ipam.usage));
    if ipam.usage.resting > 0 {
        let seconds = ipam.usage.resting_seconds;
        line("at rest", &format!("free again by themselves, the last in {seconds} s"));
    }
    if let Some(shortage) = &ipam.shortage {
        line("SHORTAGE", shortage);
    }
    for conflict in &ipam.conflicts {
        line("CONFLICT", &describe(ipam, conflict));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "OWNER",
        "ID",
        "IPV4 ADDRESSES",
        "OF THE RANGE",
        "IPV4 RANGES",
        "IPV6 PREFIX",
    ]);
    for owner in &ipam.owners {
        table.add_row(row(ipam, owner));
    }
    format!("{out}\n{table}\n")
}

fn usage(usage: &UsageStatus) -> String {
    let UsageStatus { usable, own, leased, resting, resting_seconds: _, free } = usage;
    format!(
        "{free} of {usable} usable IPv4 addresses free; {leased} leased, {resting} at rest, {own} its own"
    )
}

fn row(ipam: &IpamStatus, owner: &OwnerStatus) -> [String; 6] {
    let name = owner.name.as_deref().unwrap_or("(has said nothing yet)");
    let ranges: Vec<String> = owner.ipv4.iter().map(ToString::to_string).collect();
    [
        if owner.this_node { format!("{name} (this node)") } else { name.to_owned() },
        short(&owner.id).to_owned(),
        owner.ipv4_addresses.to_string(),
        share(owner.ipv4_addresses, 1 << (32 - ipam.ipv4.prefix_len())),
        if ranges.is_empty() { "-".to_owned() } else { ranges.join(" ") },
        owner.ipv6.map_or_else(|| "-".to_owned(), |prefix| prefix.to_string()),
    ]
}

fn describe(ipam: &IpamStatus, conflict: &ConflictStatus) -> String {
    let name = |id: &str| {
        let owner = ipam.owners.iter().find(|owner| owner.id == id);
        let name = owner.and_then(|owner| owner.name.as_deref()).unwrap_or("node");
        format!("{name} ({})", short(id))
    };
    format!(
        "{} granted {} twice, by a copied or restored disk; {} does not get it, and asks for others",
        name(&conflict.granter),
        conflict.range,
        name(&conflict.loser)
    )
}

/// A share in percent with one decimal; what is there at all is not shown as nothing.
fn share(part: u64, whole: u64) -> String {
    match (part.saturating_mul(1000) / whole.max(1), part) {
        (0, 1..) => "<0.1%".to_owned(),
        (permille, _) => format!("{}.{}%", permille / 10, permille % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(id: char, name: Option<&str>, nets: &[&str], count: u64) -> OwnerStatus {
        OwnerStatus {
            id: id.to_string().repeat(32),
            name: name.map(str::to_owned),
            this_node: id == 'a',
            ipv4: nets.iter().map(|net| net.parse().unwrap()).collect(),
            ipv4_addresses: count,
            ipv6: name.map(|_| "fd00::/96".parse().unwrap()),
        }
    }

    fn ipam() -> IpamStatus {
        IpamStatus {
            ipv4: "10.32.0.0/12".parse().unwrap(),
            ipv6: "fd00::/48".parse().unwrap(),
            block_prefix: 24,
            owners: vec![
                owner('b', Some("big"), &["10.32.0.0/13", "10.40.0.0/14"], 786_432),
                owner('a', Some("here"), &["10.47.255.0/24"], 256),
                owner('c', None, &[], 0),
            ],
            usage: UsageStatus { usable: 254, own: 1, leased: 250, resting: 2, resting_seconds: 41, free: 1 },
            shortage: Some("ask somebody".to_owned()),
            conflicts: vec![ConflictStatus {
                granter: "b".repeat(32),
                range: "10.33.0.0/24".parse().unwrap(),
                loser: "d".repeat(32),
            }],
        }
    }

    #[test]
    fn the_table_says_who_owns_what_and_what_is_free_here() {
        let text = whole(&ipam());
        let line = |word: &str| text.lines().find(|line| line.contains(word)).unwrap_or_default().to_owned();
        assert_eq!(line("range"), "range      10.32.0.0/12 in blocks of /24, fd00::/48");
        assert_eq!(
            line("this node "),
            "this node  1 of 254 usable IPv4 addresses free; 250 leased, 2 at rest, 1 its own"
        );
        assert!(line("at rest  ").ends_with("the last in 41 s"), "{text}");
        assert!(line("SHORTAGE").ends_with("ask somebody"));
        assert!(line("CONFLICT").contains("big (bbbbbbbb) granted 10.33.0.0/24 twice"), "{text}");
        assert!(line("CONFLICT").contains("node (dddddddd) does not get it"), "{text}");
        for (word, parts) in [
            ("big  ", &["bbbbbbbb", "786432", "75.0%", "10.32.0.0/13 10.40.0.0/14", "fd00::/96"][..]),
            ("here (this node)", &["aaaaaaaa", "256", "<0.1%", "10.47.255.0/24"]),
            ("said nothing", &["cccccccc", " 0 ", "0.0%", " - "]),
        ] {
            assert!(parts.iter().all(|part| line(word).contains(part)), "{word}: {text}");
        }
    }

    #[test]
    fn a_node_with_plenty_has_no_empty_lines() {
        let plenty = IpamStatus {
            usage: UsageStatus { usable: 254, own: 1, leased: 3, free: 250, ..UsageStatus::default() },
            shortage: None,
            conflicts: Vec::new(),
            ..ipam()
        };
        let text = whole(&plenty);
        for word in ["at rest  ", "SHORTAGE", "CONFLICT"] {
            assert!(!text.contains(word), "{text}");
        }
    }
}
