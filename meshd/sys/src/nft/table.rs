//! Tables and chains.

use std::fmt;

use crate::netlink::Body;

use super::Verdict;

pub(super) const NFTA_TABLE_NAME: u16 = 1;
pub(super) const NFTA_TABLE_FLAGS: u16 = 2;
pub(super) const NFTA_TABLE_USE: u16 = 3;
pub(super) const NFTA_TABLE_HANDLE: u16 = 4;
pub(super) const NFTA_TABLE_USERDATA: u16 = 6;
pub(super) const NFTA_TABLE_OWNER: u16 = 7;
pub(super) const TABLE_F_OWNER: u32 = 2;
pub(super) const TABLE_F_PERSIST: u32 = 4;

pub(super) const NFTA_CHAIN_TABLE: u16 = 1;
pub(super) const NFTA_CHAIN_HANDLE: u16 = 2;
pub(super) const NFTA_CHAIN_NAME: u16 = 3;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
pub(super) const NFTA_CHAIN_POLICY: u16 = 5;
pub(super) const NFTA_CHAIN_TYPE: u16 = 7;
pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(super) const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEVS: u16 = 4;
const NFTA_DEVICE_NAME: u16 = 1;

/// Comments are kept as user data: type, length, text with a terminating zero.
const UDATA_COMMENT: u8 = 0;
/// The longest comment that fits its 8-bit length.
pub(super) const MAX_COMMENT: usize = 254;

/// Which packets a table's chains see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// ARP.
    Arp,
    /// Frames that cross a bridge.
    Bridge,
    /// Frames of single devices, at ingress.
    Netdev,
}

impl TableFamily {
    pub(super) fn raw(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Arp => 3,
            Self::Netdev => 5,
            Self::Bridge => 7,
            Self::Ip6 => 10,
        }
    }

    pub(super) fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Inet),
            2 => Some(Self::Ip),
            3 => Some(Self::Arp),
            5 => Some(Self::Netdev),
            7 => Some(Self::Bridge),
            10 => Some(Self::Ip6),
            _ => None,
        }
    }
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Arp => "arp",
            Self::Bridge => "bridge",
            Self::Netdev => "netdev",
        })
    }
}

/// The name of a table: family and name together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// Family.
    pub family: TableFamily,
    /// Name, at most 255 bytes.
    pub name: String,
}

impl Table {
    /// A table name.
    #[must_use]
    pub fn new(family: TableFamily, name: impl Into<String>) -> Self {
        Self { family, name: name.into() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// How a table is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableOptions {
    /// Shown by `nft list`; at most 254 bytes. An existing table keeps the comment it was made with.
    pub comment: Option<String>,
    /// Only the socket that made it may change it, and `nft flush ruleset` of others passes it by
    /// (Linux 5.12). It goes when that socket is closed, unless `persist` is set.
    pub owner: bool,
    /// With `owner`: it stays without its owner, and the next one to claim it takes it over (Linux 6.9).
    pub persist: bool,
}

/// What a base chain is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainKind {
    /// Filtering.
    Filter,
    /// Address translation; sees only the first packet of a connection.
    Nat,
    /// Local output whose route is looked up again after changes.
    Route,
}

/// Where a base chain is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Before the routing decision; in a bridge table, before the forwarding decision.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host; in a bridge table, from port to port.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
    /// At a device, before anything else. For `netdev` and `inet` tables.
    Ingress,
}

impl Hook {
    fn raw(self, family: TableFamily) -> u32 {
        match self {
            Self::Ingress if family == TableFamily::Netdev => 0,
            // In `arp` tables, input is 0 and output 1.
            Self::Input if family == TableFamily::Arp => 0,
            Self::Output if family == TableFamily::Arp => 1,
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
            Self::Ingress => 5,
        }
    }
}

/// What happens to a packet that reaches the end of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It ends.
    Drop,
}

impl Policy {
    fn raw(self) -> u32 {
        match self {
            Self::Accept => 1,
            Self::Drop => 0,
        }
    }
}

/// Where and how a base chain is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// What it is for.
    pub kind: ChainKind,
    /// Where.
    pub hook: Hook,
    /// Order among the chains of a hook, lower first. `inet`: raw −300, mangle −150, dstnat −100,
    /// filter 0, srcnat 100. `bridge`: dstnat −300, filter −200, `br_netfilter` 0, srcnat 300.
    pub priority: i32,
    /// The end of the chain.
    pub policy: Policy,
    /// Devices, for [`Hook::Ingress`].
    pub devices: Vec<String>,
}

/// A chain to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Name, at most 127 bytes.
    pub name: String,
    /// Attached to a hook; otherwise reached by jumps only.
    pub base: Option<BaseChain>,
}

impl Chain {
    /// A chain that other chains jump to.
    #[must_use]
    pub fn regular(name: impl Into<String>) -> Self {
        Self { name: name.into(), base: None }
    }

    /// A filter chain at a hook.
    #[must_use]
    pub fn filter(name: impl Into<String>, hook: Hook, priority: i32, policy: Policy) -> Self {
        let base = BaseChain { kind: ChainKind::Filter, hook, priority, policy, devices: Vec::new() };
        Self { name: name.into(), base: Some(base) }
    }

    /// A translation chain at a hook; accepting, as the kernel wants it.
    #[must_use]
    pub fn nat(name: impl Into<String>, hook: Hook, priority: i32) -> Self {
        let base =
            BaseChain { kind: ChainKind::Nat, hook, priority, policy: Policy::Accept, devices: Vec::new() };
        Self { name: name.into(), base: Some(base) }
    }
}

/// The fixed header of every nftables message (`struct nfgenmsg`).
pub(super) fn header(family: u8) -> Body {
    Body::new(&[family, 0, 0, 0])
}

pub(super) fn table_body(table: &Table, options: &TableOptions) -> Body {
    let mut body = header(table.family.raw());
    body.str(NFTA_TABLE_NAME, &table.name);
    let mut flags = 0;
    if options.owner {
        flags |= TABLE_F_OWNER;
    }
    if options.persist {
        flags |= TABLE_F_PERSIST;
    }
    // Without this attribute an existing table's flags are left alone.
    if flags != 0 {
        body.be32(NFTA_TABLE_FLAGS, flags);
    }
    if let Some(comment) = &options.comment {
        body.bytes(NFTA_TABLE_USERDATA, &comment_data(UDATA_COMMENT, comment));
    }
    body
}

pub(super) fn chain_body(table: &Table, chain: &Chain) -> Body {
    let mut body = header(table.family.raw());
    body.str(NFTA_CHAIN_TABLE, &table.name).str(NFTA_CHAIN_NAME, &chain.name);
    if let Some(base) = &chain.base {
        body.nest(NFTA_CHAIN_HOOK, |hook| {
            hook.be32(NFTA_HOOK_HOOKNUM, base.hook.raw(table.family));
            hook.bytes(NFTA_HOOK_PRIORITY, &base.priority.to_be_bytes());
            if !base.devices.is_empty() {
                hook.nest(NFTA_HOOK_DEVS, |devices| {
                    for device in &base.devices {
                        devices.str(NFTA_DEVICE_NAME, device);
                    }
                });
            }
        });
        body.be32(NFTA_CHAIN_POLICY, base.policy.raw());
        body.str(
            NFTA_CHAIN_TYPE,
            match base.kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
                ChainKind::Route => "route",
            },
        );
    }
    body
}

pub(super) fn comment_data(kind: u8, comment: &str) -> Vec<u8> {
    // Longer comments were refused before this.
    let len = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    let mut data = vec![kind, len];
    data.extend_from_slice(&comment.as_bytes()[..usize::from(len) - 1]);
    data.push(0);
    data
}

/// Finds a comment among user data.
pub(super) fn read_comment(kind: u8, mut data: &[u8]) -> Option<String> {
    while let [k, len, rest @ ..] = data {
        let value = rest.get(..usize::from(*len))?;
        if *k == kind {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        data = rest.get(usize::from(*len)..)?;
    }
    None
}

pub(super) fn verdict_data(body: &mut Body, kind: u16, verdict: &Verdict) {
    const NFTA_DATA_VERDICT: u16 = 2;
    const NFTA_VERDICT_CODE: u16 = 1;
    const NFTA_VERDICT_CHAIN: u16 = 2;
    let (code, chain): (i32, Option<&str>) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Continue => (-1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    body.nest(kind, |data| {
        data.nest(NFTA_DATA_VERDICT, |verdict| {
            verdict.bytes(NFTA_VERDICT_CODE, &code.to_be_bytes());
            if let Some(chain) = chain {
                verdict.str(NFTA_VERDICT_CHAIN, chain);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn comments_survive(text in "[ -~]{0,254}") {
            prop_assert_eq!(read_comment(3, &comment_data(3, &text)), Some(text));
        }

        #[test]
        fn any_user_data_ends_without_panic(bytes: Vec<u8>, kind: u8) {
            let _ = read_comment(kind, &bytes);
        }
    }
}
