//! Rules, built from fields and conditions.
//!
//! A condition on an IPv4, IPv6, ARP, TCP… field first makes sure that the packet is of that kind:
//! the kernel would otherwise compare whatever bytes stand at that place. These guards are put in
//! once per rule, by themselves, in the form that `nft list` recognises and leaves out.

use std::net::IpAddr;

use ipnet::IpNet;

use super::expr::{Base, Cmp, Expr, Meta, NatKind, REGISTERS, Reg, Reject, Verdict};
use super::field::{CtState, Field, Layer3, Source};
use super::set::{Part, ifname, key};
use super::table::{MAX_COMMENT, TableFamily, comment_data, header};
use super::{NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, Table};
use crate::netlink::Body;
use crate::rtnl::{Family, Mac, octets};

/// `ARPHRD_ETHER`.
const ARPHRD_ETHER: u16 = 1;
/// Ethernet type of ARP.
const ETH_ARP: u16 = 0x0806;
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;

/// A rule under construction. Conditions hold together; the verdict comes last.
#[derive(Debug, Clone)]
pub struct Rule {
    family: TableFamily,
    exprs: Vec<Expr>,
    comment: Option<String>,
    ethernet: bool,
    layer3: Option<Layer3>,
    l4proto: Option<u8>,
    problem: Option<&'static str>,
}

impl Rule {
    /// An empty rule for tables of this family. It matches everything.
    #[must_use]
    pub fn new(family: TableFamily) -> Self {
        Self {
            family,
            exprs: Vec::new(),
            comment: None,
            ethernet: false,
            layer3: None,
            l4proto: None,
            problem: None,
        }
    }

    /// Any expression, as it is.
    #[must_use]
    pub fn expr(mut self, expr: Expr) -> Self {
        self.exprs.push(expr);
        self
    }

    /// Shown by `nft list` behind the rule and given back by the listing; at most 254 bytes.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// Only packets whose field equals the value.
    #[must_use]
    pub fn eq(self, field: Field, value: impl AsRef<[u8]>) -> Self {
        self.compare(field, Cmp::Eq, value.as_ref())
    }

    /// Only packets whose field does not equal the value.
    #[must_use]
    pub fn ne(self, field: Field, value: impl AsRef<[u8]>) -> Self {
        self.compare(field, Cmp::Ne, value.as_ref())
    }

    /// Only packets whose field equals (or not) the value under the mask.
    #[must_use]
    pub fn masked(mut self, field: Field, mask: impl AsRef<[u8]>, op: Cmp, value: impl AsRef<[u8]>) -> Self {
        let (mask, value) = (mask.as_ref(), value.as_ref());
        if mask.len() != field.len() || value.len() != field.len() {
            return self.invalid("mask and value must be as long as the field");
        }
        self = self.load(&[field]);
        let xor = vec![0; mask.len()];
        self.exprs.push(Expr::Bitwise { reg: Reg::FIRST, mask: mask.to_vec(), xor });
        self.exprs.push(Expr::Cmp { reg: Reg::FIRST, op, value: value.to_vec() });
        self
    }

    /// Only packets whose field lies (or not) between the two values, both included. For values in
    /// network order.
    #[must_use]
    pub fn range(mut self, field: Field, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>, negate: bool) -> Self {
        let (from, to) = (from.as_ref(), to.as_ref());
        if from.len() != field.len() || to.len() != field.len() {
            return self.invalid("both ends of a range must be as long as the field");
        }
        self = self.load(&[field]);
        self.exprs.push(Expr::Range { reg: Reg::FIRST, negate, from: from.to_vec(), to: to.to_vec() });
        self
    }

    /// Only packets whose fields, concatenated, are in the set.
    #[must_use]
    pub fn in_set(mut self, fields: &[Field], set: impl Into<String>) -> Self {
        self = self.load(fields);
        self.exprs.push(Expr::Lookup { reg: Reg::FIRST, set: set.into(), negate: false });
        self
    }

    /// Only packets whose fields, concatenated, are not in the set. A packet that has no such field
    /// (another protocol, too short) is not matched by this either.
    #[must_use]
    pub fn not_in_set(mut self, fields: &[Field], set: impl Into<String>) -> Self {
        self = self.load(fields);
        self.exprs.push(Expr::Lookup { reg: Reg::FIRST, set: set.into(), negate: true });
        self
    }

    /// Does what the map says about the fields; goes on where it says nothing.
    #[must_use]
    pub fn vmap(mut self, fields: &[Field], map: impl Into<String>) -> Self {
        self = self.load(fields);
        self.exprs.push(Expr::VerdictMap { reg: Reg::FIRST, map: map.into() });
        self
    }

    /// Only packets that came in by this device. A `*` at the end stands for any end of the name.
    #[must_use]
    pub fn iifname(self, name: &str) -> Self {
        self.device(Field::Iifname, Cmp::Eq, name)
    }

    /// Only packets that did not.
    #[must_use]
    pub fn iifname_not(self, name: &str) -> Self {
        self.device(Field::Iifname, Cmp::Ne, name)
    }

    /// Only packets that leave by this device. A `*` at the end stands for any end of the name.
    #[must_use]
    pub fn oifname(self, name: &str) -> Self {
        self.device(Field::Oifname, Cmp::Eq, name)
    }

    /// Only packets that do not.
    #[must_use]
    pub fn oifname_not(self, name: &str) -> Self {
        self.device(Field::Oifname, Cmp::Ne, name)
    }

    fn device(mut self, field: Field, op: Cmp, name: &str) -> Self {
        let value = match name.strip_suffix('*') {
            Some("") => return self.invalid("a device name pattern needs a beginning"),
            Some(beginning) => beginning.as_bytes().to_vec(),
            None => ifname(name),
        };
        if name.is_empty() || name.len() > 15 {
            return self.invalid("a device name has 1 to 15 bytes");
        }
        self = self.load(&[field]);
        self.exprs.push(Expr::Cmp { reg: Reg::FIRST, op, value });
        self
    }

    /// Only packets of this IP version.
    #[must_use]
    pub fn ip_version(self, family: Family) -> Self {
        self.require_layer3(match family {
            Family::V4 => Layer3::V4,
            Family::V6 => Layer3::V6,
        })
    }

    /// Only ARP.
    #[must_use]
    pub fn arp(self) -> Self {
        self.require_layer3(Layer3::Arp)
    }

    /// Only this transport protocol (6 TCP, 17 UDP, 132 SCTP, 1 ICMP, 58 ICMPv6).
    #[must_use]
    pub fn l4proto(mut self, proto: u8) -> Self {
        if self.l4proto == Some(proto) {
            return self;
        }
        if self.l4proto.is_some() {
            return self.invalid("two transport protocols in one rule");
        }
        self.l4proto = Some(proto);
        self.compare(Field::L4proto, Cmp::Eq, &[proto])
    }

    /// Only packets from this prefix.
    #[must_use]
    pub fn saddr(self, net: IpNet) -> Self {
        let field = if net.addr().is_ipv4() { Field::Ip4Saddr } else { Field::Ip6Saddr };
        self.prefix(field, net, Cmp::Eq)
    }

    /// Only packets not from this prefix, of the same IP version.
    #[must_use]
    pub fn saddr_not(self, net: IpNet) -> Self {
        let field = if net.addr().is_ipv4() { Field::Ip4Saddr } else { Field::Ip6Saddr };
        self.prefix(field, net, Cmp::Ne)
    }

    /// Only packets to this prefix.
    #[must_use]
    pub fn daddr(self, net: IpNet) -> Self {
        let field = if net.addr().is_ipv4() { Field::Ip4Daddr } else { Field::Ip6Daddr };
        self.prefix(field, net, Cmp::Eq)
    }

    /// Only packets not to this prefix, of the same IP version.
    #[must_use]
    pub fn daddr_not(self, net: IpNet) -> Self {
        let field = if net.addr().is_ipv4() { Field::Ip4Daddr } else { Field::Ip6Daddr };
        self.prefix(field, net, Cmp::Ne)
    }

    fn prefix(self, field: Field, net: IpNet, op: Cmp) -> Self {
        let network = octets(net.network());
        if usize::from(net.prefix_len()) == network.len() * 8 {
            return self.compare(field, op, &network);
        }
        self.masked(field, octets(net.netmask()), op, network)
    }

    /// Only frames from this Ethernet address.
    #[must_use]
    pub fn ether_saddr(self, mac: Mac) -> Self {
        self.eq(Field::EtherSaddr, mac.0)
    }

    /// Only packets to this port; give the protocol with [`Rule::l4proto`] first.
    #[must_use]
    pub fn dport(self, port: u16) -> Self {
        self.eq(Field::Dport, port.to_be_bytes())
    }

    /// Only packets from this port; give the protocol with [`Rule::l4proto`] first.
    #[must_use]
    pub fn sport(self, port: u16) -> Self {
        self.eq(Field::Sport, port.to_be_bytes())
    }

    /// Only packets in one of these connection states. Not in bridge tables of kernels without
    /// `NF_CONNTRACK_BRIDGE`.
    #[must_use]
    pub fn ct_state(self, states: CtState) -> Self {
        self.masked(Field::CtState, states.0.to_ne_bytes(), Cmp::Ne, [0; 4])
    }

    /// Only packets whose mark has this value under the mask.
    #[must_use]
    pub fn mark(self, mark: u32, mask: u32) -> Self {
        self.masked(Field::Mark, mask.to_ne_bytes(), Cmp::Eq, (mark & mask).to_ne_bytes())
    }

    /// Sets the bits of the mask in the packet's mark to this value and leaves the others.
    #[must_use]
    pub fn set_mark(mut self, mark: u32, mask: u32) -> Self {
        self = self.load(&[Field::Mark]);
        self.exprs.push(Expr::Bitwise {
            reg: Reg::FIRST,
            mask: (!mask).to_ne_bytes().to_vec(),
            xor: (mark & mask).to_ne_bytes().to_vec(),
        });
        self.exprs.push(Expr::SetMark { reg: Reg::FIRST });
        self
    }

    /// Counts what came this far.
    #[must_use]
    pub fn counter(self) -> Self {
        self.expr(Expr::Counter)
    }

    /// Copies the packet's head to a log group.
    #[must_use]
    pub fn log(self, group: u16, prefix: impl Into<String>) -> Self {
        self.expr(Expr::Log { group, prefix: prefix.into(), snaplen: 128 })
    }

    /// Lowers the MSS of TCP connections to what the route can carry: for SYN packets only.
    #[must_use]
    pub fn clamp_mss(self) -> Self {
        // SYN set, RST not: what carries an MSS option.
        self.l4proto(6)
            .masked(Field::Payload { base: Base::Transport, offset: 13, len: 1 }, [0x06], Cmp::Eq, [0x02])
            .expr(Expr::ClampMss)
    }

    /// Source becomes an address of the device the packet leaves by.
    #[must_use]
    pub fn masquerade(self) -> Self {
        self.expr(Expr::Masquerade { random: true })
    }

    /// Source becomes this address.
    #[must_use]
    pub fn snat(self, to: IpAddr) -> Self {
        self.nat(NatKind::Source, to, None)
    }

    /// Destination becomes this address and, where given, port.
    #[must_use]
    pub fn dnat(self, to: IpAddr, port: Option<u16>) -> Self {
        self.nat(NatKind::Destination, to, port)
    }

    fn nat(mut self, kind: NatKind, to: IpAddr, port: Option<u16>) -> Self {
        // The address takes at most the first four registers.
        const PORT: Option<Reg> = Reg::new(4);
        self = self.ip_version(Family::of(to));
        self.exprs.push(Expr::Constant { reg: Reg::FIRST, value: octets(to) });
        let port = match (port, PORT) {
            (Some(port), Some(reg)) => {
                self.exprs.push(Expr::Constant { reg, value: port.to_be_bytes().to_vec() });
                Some(reg)
            }
            _ => None,
        };
        self.expr(Expr::Nat { kind, v6: to.is_ipv6(), addr: Reg::FIRST, port })
    }

    /// It passes.
    #[must_use]
    pub fn accept(self) -> Self {
        self.verdict(Verdict::Accept)
    }

    /// It ends.
    #[must_use]
    pub fn drop(self) -> Self {
        self.verdict(Verdict::Drop)
    }

    /// It ends and its sender is told.
    #[must_use]
    pub fn reject(self, how: Reject) -> Self {
        self.expr(Expr::Reject(how))
    }

    /// To that chain and back.
    #[must_use]
    pub fn jump(self, chain: impl Into<String>) -> Self {
        self.verdict(Verdict::Jump(chain.into()))
    }

    /// To that chain.
    #[must_use]
    pub fn goto(self, chain: impl Into<String>) -> Self {
        self.verdict(Verdict::Goto(chain.into()))
    }

    /// Any verdict.
    #[must_use]
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.expr(Expr::Verdict(verdict))
    }

    fn compare(mut self, field: Field, op: Cmp, value: &[u8]) -> Self {
        if value.is_empty() || value.len() > field.len() {
            return self.invalid("a compared value must have bytes, and not more than the field");
        }
        self = self.load(&[field]);
        self.exprs.push(Expr::Cmp { reg: Reg::FIRST, op, value: value.to_vec() });
        self
    }

    /// Guards, then the fields into consecutive registers.
    fn load(mut self, fields: &[Field]) -> Self {
        for field in fields {
            if matches!(field, Field::EtherSaddr | Field::EtherDaddr) {
                self = self.require_ethernet();
            }
            if let Some(layer3) = field.layer3() {
                self = self.require_layer3(layer3);
            }
            if let Some(proto) = field.icmp() {
                self = self.l4proto(proto);
            }
        }
        let mut next = 0usize;
        for field in fields {
            let (source, len) = field.source();
            let width = field.len().div_ceil(4);
            let reg = u8::try_from(next).ok().and_then(Reg::new);
            let Some(reg) = reg.filter(|_| width > 0 && next + width <= REGISTERS) else {
                return self.invalid("the fields of a lookup must have 1 to 64 bytes together");
            };
            self.exprs.push(match source {
                Source::Meta(key) => Expr::Meta { key, reg },
                Source::Ct(key) => Expr::Ct { key, reg },
                Source::Payload(base, offset) => Expr::Payload { base, offset, len, reg },
            });
            next += width;
        }
        self
    }

    /// Frames of a bridge are Ethernet; elsewhere a packet may have come without such a header.
    fn require_ethernet(mut self) -> Self {
        if !self.ethernet && self.family != TableFamily::Bridge {
            let value = ARPHRD_ETHER.to_ne_bytes().to_vec();
            self.exprs.push(Expr::Meta { key: Meta::Iiftype, reg: Reg::FIRST });
            self.exprs.push(Expr::Cmp { reg: Reg::FIRST, op: Cmp::Eq, value });
        }
        self.ethernet = true;
        self
    }

    fn require_layer3(mut self, layer3: Layer3) -> Self {
        if self.layer3 == Some(layer3) {
            return self;
        }
        if self.layer3.is_some() {
            return self.invalid("fields of two network protocols in one rule");
        }
        self.layer3 = Some(layer3);
        let implied = match self.family {
            TableFamily::Ip => Some(Layer3::V4),
            TableFamily::Ip6 => Some(Layer3::V6),
            TableFamily::Arp => Some(Layer3::Arp),
            TableFamily::Inet | TableFamily::Bridge | TableFamily::Netdev => None,
        };
        if let Some(implied) = implied {
            return if implied == layer3 { self } else { self.invalid("the table never sees this protocol") };
        }
        let (key, value) = match (self.family, layer3) {
            (TableFamily::Inet, Layer3::V4) => (Meta::Nfproto, vec![2]),
            (TableFamily::Inet, Layer3::V6) => (Meta::Nfproto, vec![10]),
            (TableFamily::Inet, Layer3::Arp) => return self.invalid("an inet table never sees ARP"),
            (_, Layer3::V4) => (Meta::Protocol, ETH_IPV4.to_be_bytes().to_vec()),
            (_, Layer3::V6) => (Meta::Protocol, ETH_IPV6.to_be_bytes().to_vec()),
            (_, Layer3::Arp) => (Meta::Protocol, ETH_ARP.to_be_bytes().to_vec()),
        };
        self.exprs.push(Expr::Meta { key, reg: Reg::FIRST });
        self.exprs.push(Expr::Cmp { reg: Reg::FIRST, op: Cmp::Eq, value });
        self
    }

    fn invalid(mut self, problem: &'static str) -> Self {
        self.problem.get_or_insert(problem);
        self
    }

    pub(super) fn problem(&self, table: &Table) -> Option<&'static str> {
        if table.family != self.family {
            return Some("the rule was built for tables of another family");
        }
        if self.comment.as_ref().is_some_and(|c| c.len() > MAX_COMMENT || c.contains('\0')) {
            return Some("a comment has at most 254 bytes and no zero byte");
        }
        self.problem
    }

    pub(super) fn body(&self, table: &Table, chain: &str) -> Body {
        let mut body = header(table.family.raw());
        body.str(NFTA_RULE_TABLE, &table.name).str(NFTA_RULE_CHAIN, chain);
        body.nest(NFTA_RULE_EXPRESSIONS, |list| {
            for expr in &self.exprs {
                expr.write(list);
            }
        });
        if let Some(comment) = &self.comment {
            body.bytes(NFTA_RULE_USERDATA, &comment_data(0, comment));
        }
        body
    }

    pub(super) fn label(&self) -> String {
        self.comment.as_ref().map_or_else(String::new, |c| format!(" ({c:?})"))
    }

    /// Only packets whose field equals this value of a set's type.
    #[must_use]
    pub fn is(self, field: Field, part: &Part) -> Self {
        self.eq(field, key(std::slice::from_ref(part)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(TableFamily::Inet, "t")
    }

    #[test]
    fn guards_are_put_in_once_and_contradictions_are_found() {
        let rule = Rule::new(TableFamily::Inet)
            .saddr("10.0.0.0/8".parse().unwrap())
            .daddr("10.1.0.1/32".parse().unwrap())
            .drop();
        let guards = rule.exprs.iter().filter(|e| matches!(e, Expr::Meta { key: Meta::Nfproto, .. })).count();
        assert_eq!(guards, 1);
        assert!(rule.problem(&table()).is_none());
        let rule = rule.daddr("fd00::/8".parse().unwrap());
        assert!(rule.problem(&table()).unwrap().contains("two network protocols"));
        assert!(Rule::new(TableFamily::Inet).arp().problem(&table()).is_some());
        assert!(Rule::new(TableFamily::Bridge).problem(&table()).unwrap().contains("another family"));
    }

    #[test]
    fn keys_too_long_for_the_registers_are_refused() {
        use Field::{Iifname, Ip6Daddr, Ip6Saddr, Oifname};
        let rule = Rule::new(TableFamily::Inet).in_set(&[Iifname, Oifname, Ip6Saddr, Ip6Daddr], "s");
        assert!(rule.problem(&table()).is_none(), "64 bytes fit");
        let rule =
            Rule::new(TableFamily::Inet).in_set(&[Iifname, Oifname, Ip6Saddr, Ip6Daddr, Field::L4proto], "s");
        assert!(rule.problem(&table()).is_some());
        let empty = Field::Payload { base: Base::Link, offset: 0, len: 0 };
        assert!(Rule::new(TableFamily::Inet).in_set(&[empty], "s").problem(&table()).is_some());
    }

    #[test]
    fn device_patterns_compare_the_beginning_only() {
        let value = |rule: Rule| match rule.exprs.last() {
            Some(Expr::Cmp { value, .. }) => value.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(value(Rule::new(TableFamily::Inet).iifname("mv*")), b"mv");
        assert_eq!(value(Rule::new(TableFamily::Inet).iifname("mv")).len(), 16);
        assert!(Rule::new(TableFamily::Inet).iifname("*").problem(&table()).is_some());
        assert!(Rule::new(TableFamily::Inet).iifname("a-name-of-16-byt").problem(&table()).is_some());
    }

    #[test]
    fn a_comment_longer_than_its_length_byte_is_refused() {
        assert!(Rule::new(TableFamily::Inet).comment("x".repeat(254)).problem(&table()).is_none());
        assert!(Rule::new(TableFamily::Inet).comment("x".repeat(255)).problem(&table()).is_some());
    }
}
