//! Single expressions: what a rule is made of, one to one as the kernel has them.

use crate::netlink::Body;

use super::table::verdict_data;

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
pub(super) const NFTA_DATA_VALUE: u16 = 1;

/// The verdict register.
const REG_VERDICT: u32 = 0;
/// The first of sixteen 32-bit registers (`NFT_REG32_00`).
const REG32_FIRST: u32 = 8;
/// How many there are.
pub(super) const REGISTERS: usize = 16;

/// One of the kernel's sixteen 4-byte registers. Longer values span consecutive ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(u8);

impl Reg {
    /// The first register.
    pub const FIRST: Self = Self(0);

    /// Register number `index`, 0 to 15.
    #[must_use]
    pub const fn new(index: u8) -> Option<Self> {
        if (index as usize) < REGISTERS { Some(Self(index)) } else { None }
    }

    fn raw(self) -> u32 {
        REG32_FIRST + u32::from(self.0)
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// This chain and its callers let it pass; later hooks still see it.
    Accept,
    /// It ends here.
    Drop,
    /// The next rule.
    Continue,
    /// Back to the calling chain.
    Return,
    /// To that chain and back.
    Jump(String),
    /// To that chain; what follows here is not reached again.
    Goto(String),
}

/// Properties of a packet that are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Meta {
    /// Protocol of the frame (Ethernet type), 2 bytes, network order.
    Protocol,
    /// Mark, 4 bytes, host order.
    Mark,
    /// Name of the device it came in by, 16 bytes.
    Iifname,
    /// Name of the device it leaves by, 16 bytes.
    Oifname,
    /// Hardware type of the device it came in by (`ARPHRD_*`, 1 is Ethernet), 2 bytes, host order.
    Iiftype,
    /// IP version (`NFPROTO_*`: 2 and 10), 1 byte.
    Nfproto,
    /// Transport protocol, behind IPv6 extension headers, 1 byte.
    L4proto,
    /// Unicast, broadcast, multicast (`PACKET_*`), 1 byte.
    Pkttype,
}

impl Meta {
    fn raw(self) -> u32 {
        match self {
            Self::Protocol => 1,
            Self::Mark => 3,
            Self::Iifname => 6,
            Self::Oifname => 7,
            Self::Iiftype => 8,
            Self::Nfproto => 15,
            Self::L4proto => 16,
            Self::Pkttype => 19,
        }
    }
}

/// Connection tracking, host order, 4 bytes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ct {
    /// State, see [`CtState`](super::CtState).
    State,
    /// Status bits (`IPS_*`; 0x20 is DNAT, 0x10 SNAT).
    Status,
    /// Mark.
    Mark,
}

impl Ct {
    fn raw(self) -> u32 {
        match self {
            Self::State => 0,
            Self::Status => 2,
            Self::Mark => 3,
        }
    }
}

/// What a payload offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Base {
    /// Ethernet header.
    Link,
    /// Network header: IPv4, IPv6 or ARP.
    Network,
    /// Transport header.
    Transport,
}

/// A comparison. Order is that of bytes, so it makes sense for network order only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

/// How a rejected packet's sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// ICMP or ICMPv6 with the same meaning: no route.
    NoRoute,
    /// Port unreachable.
    Port,
    /// Host unreachable.
    Host,
    /// Administratively prohibited.
    Prohibited,
    /// TCP reset.
    TcpReset,
}

/// Which end of a connection is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NatKind {
    /// Source.
    Source,
    /// Destination.
    Destination,
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expr {
    /// Loads a property of the packet.
    Meta {
        /// Which.
        key: Meta,
        /// Into.
        reg: Reg,
    },
    /// Sets the packet's mark from a register.
    SetMark {
        /// From.
        reg: Reg,
    },
    /// Loads from connection tracking.
    Ct {
        /// What.
        key: Ct,
        /// Into.
        reg: Reg,
    },
    /// Loads bytes of the packet. A packet too short does not match.
    Payload {
        /// Counted from.
        base: Base,
        /// Offset in bytes.
        offset: u32,
        /// Number of bytes.
        len: u32,
        /// Into.
        reg: Reg,
    },
    /// Goes on only if the comparison holds. A value shorter than what was loaded compares its
    /// beginning.
    Cmp {
        /// What.
        reg: Reg,
        /// How.
        op: Cmp,
        /// With.
        value: Vec<u8>,
    },
    /// Goes on only if the value is (or with `negate`, is not) between the two, both included.
    Range {
        /// What.
        reg: Reg,
        /// The other way round.
        negate: bool,
        /// Lowest.
        from: Vec<u8>,
        /// Highest.
        to: Vec<u8>,
    },
    /// `reg = (reg & mask) ^ xor`.
    Bitwise {
        /// What, in place.
        reg: Reg,
        /// Mask.
        mask: Vec<u8>,
        /// Of the same length.
        xor: Vec<u8>,
    },
    /// Looks the registers up in a set; goes on only if found (or with `negate`, if not).
    Lookup {
        /// The key's first register.
        reg: Reg,
        /// Name of the set.
        set: String,
        /// The other way round.
        negate: bool,
    },
    /// Looks the registers up in a verdict map and does what it says; goes on if not found.
    VerdictMap {
        /// The key's first register.
        reg: Reg,
        /// Name of the map.
        map: String,
    },
    /// Looks the registers up in a map and loads the value; goes on only if found.
    Map {
        /// The key's first register.
        reg: Reg,
        /// Name of the map.
        map: String,
        /// Into.
        into: Reg,
    },
    /// Puts a constant into a register.
    Constant {
        /// Into.
        reg: Reg,
        /// What.
        value: Vec<u8>,
    },
    /// Ends the rule.
    Verdict(Verdict),
    /// Counts packets and bytes.
    Counter,
    /// Ends the packet and tells its sender.
    Reject(Reject),
    /// Copies the packet's head to a group of `nfnetlink_log`.
    Log {
        /// Group.
        group: u16,
        /// At most 127 bytes.
        prefix: String,
        /// Bytes of each packet to copy.
        snaplen: u32,
    },
    /// Source becomes an address of the device the packet leaves by.
    Masquerade {
        /// With a random port.
        random: bool,
    },
    /// Rewrites source or destination from registers.
    Nat {
        /// Which end.
        kind: NatKind,
        /// The address is IPv6.
        v6: bool,
        /// Register of the address.
        addr: Reg,
        /// Register of the port (2 bytes, network order), if it is rewritten too.
        port: Option<Reg>,
    },
    /// Lowers the MSS of a TCP SYN to what the packet's route can carry. Uses the first register.
    ClampMss,
}

impl Expr {
    /// Appends this expression as an element of a list.
    pub(super) fn write(&self, list: &mut Body) {
        match self {
            Self::Meta { key, reg } => put(list, "meta", |d| {
                d.be32(1, reg.raw()).be32(2, key.raw());
            }),
            Self::SetMark { reg } => put(list, "meta", |d| {
                d.be32(2, Meta::Mark.raw()).be32(3, reg.raw());
            }),
            Self::Ct { key, reg } => put(list, "ct", |d| {
                d.be32(1, reg.raw()).be32(2, key.raw());
            }),
            Self::Payload { base, offset, len, reg } => put(list, "payload", |d| {
                let base = match base {
                    Base::Link => 0,
                    Base::Network => 1,
                    Base::Transport => 2,
                };
                d.be32(1, reg.raw()).be32(2, base).be32(3, *offset).be32(4, *len);
            }),
            Self::Cmp { reg, op, value } => put(list, "cmp", |d| {
                let op = match op {
                    Cmp::Eq => 0,
                    Cmp::Ne => 1,
                    Cmp::Lt => 2,
                    Cmp::Le => 3,
                    Cmp::Gt => 4,
                    Cmp::Ge => 5,
                };
                d.be32(1, reg.raw()).be32(2, op);
                data(d, 3, value);
            }),
            Self::Range { reg, negate, from, to } => put(list, "range", |d| {
                d.be32(1, reg.raw()).be32(2, u32::from(*negate));
                data(d, 3, from);
                data(d, 4, to);
            }),
            Self::Bitwise { reg, mask, xor } => put(list, "bitwise", |d| {
                d.be32(1, reg.raw()).be32(2, reg.raw()).be32(3, len32(mask));
                data(d, 4, mask);
                data(d, 5, xor);
            }),
            Self::Lookup { reg, set, negate } => put(list, "lookup", |d| {
                d.str(1, set).be32(2, reg.raw()).be32(5, u32::from(*negate));
            }),
            Self::VerdictMap { reg, map } => put(list, "lookup", |d| {
                d.str(1, map).be32(2, reg.raw()).be32(3, REG_VERDICT).be32(5, 0);
            }),
            Self::Map { reg, map, into } => put(list, "lookup", |d| {
                d.str(1, map).be32(2, reg.raw()).be32(3, into.raw()).be32(5, 0);
            }),
            Self::Constant { reg, value } => put(list, "immediate", |d| {
                d.be32(1, reg.raw());
                data(d, 2, value);
            }),
            Self::Verdict(verdict) => put(list, "immediate", |d| {
                d.be32(1, REG_VERDICT);
                verdict_data(d, 2, verdict);
            }),
            Self::Counter => put(list, "counter", |d| {
                d.be64(1, 0).be64(2, 0);
            }),
            Self::Reject(how) => put(list, "reject", |d| {
                let (kind, code) = match how {
                    Reject::TcpReset => (1, 0),
                    Reject::NoRoute => (2, 0),
                    Reject::Port => (2, 1),
                    Reject::Host => (2, 2),
                    Reject::Prohibited => (2, 3),
                };
                d.be32(1, kind).u8(2, code);
            }),
            Self::Log { group, prefix, snaplen } => put(list, "log", |d| {
                d.be16(1, *group);
                if !prefix.is_empty() {
                    d.str(2, prefix);
                }
                d.be32(3, *snaplen);
            }),
            Self::Masquerade { random } => put(list, "masq", |d| {
                // NF_NAT_RANGE_PROTO_RANDOM_FULLY
                if *random {
                    d.be32(1, 0x10);
                }
            }),
            Self::Nat { kind, v6, addr, port } => put(list, "nat", |d| {
                let kind = match kind {
                    NatKind::Source => 0,
                    NatKind::Destination => 1,
                };
                d.be32(1, kind).be32(2, if *v6 { 10 } else { 2 }).be32(3, addr.raw()).be32(4, addr.raw());
                if let Some(port) = port {
                    d.be32(5, port.raw()).be32(6, port.raw());
                }
            }),
            Self::ClampMss => clamp_mss(list),
        }
    }
}

/// `tcp option maxseg size set rt mtu`: route's MSS, into network order, over the option's two bytes.
fn clamp_mss(list: &mut Body) {
    const RT_TCPMSS: u32 = 3;
    const HTON: u32 = 1;
    const EXTHDR_TCPOPT: u32 = 1;
    const MAXSEG: u8 = 2;
    let reg = Reg::FIRST.raw();
    put(list, "rt", |d| {
        d.be32(1, reg).be32(2, RT_TCPMSS);
    });
    put(list, "byteorder", |d| {
        d.be32(1, reg).be32(2, reg).be32(3, HTON).be32(4, 2).be32(5, 2);
    });
    put(list, "exthdr", |d| {
        d.u8(2, MAXSEG).be32(3, 2).be32(4, 2).be32(6, EXTHDR_TCPOPT).be32(7, reg);
    });
}

fn put(list: &mut Body, name: &str, fill: impl FnOnce(&mut Body)) {
    list.nest(NFTA_LIST_ELEM, |element| {
        element.str(NFTA_EXPR_NAME, name).nest(NFTA_EXPR_DATA, fill);
    });
}

fn data(body: &mut Body, kind: u16, value: &[u8]) {
    body.nest(kind, |d| {
        d.bytes(NFTA_DATA_VALUE, value);
    });
}

fn len32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
