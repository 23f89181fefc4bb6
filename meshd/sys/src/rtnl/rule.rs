//! Policy routing rules.

use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::types::octets;
use super::{Blocking, Family, RtnlError, about, check_name, deleted};
use crate::netlink::{Attr, Attrs, Body, Failure, NLM_F_CREATE, NLM_F_EXCL};

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;

const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_OIFNAME: u16 = 17;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;
const FR_ACT_UNREACHABLE: u8 = 7;
const FIB_RULE_INVERT: u32 = 2;
const HEADER: usize = 12;

/// What a matching rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    /// Look in this table.
    Table(u32),
    /// No route to host.
    Unreachable,
    /// Anything else; read only.
    Other(u8),
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// IP version.
    pub family: Family,
    /// Order; lower first.
    pub priority: u32,
    /// What it does.
    pub action: RuleAction,
    /// Only packets that came in by this device (`lo`: made on this host).
    pub iif: Option<String>,
    /// Only packets of sockets bound to this device.
    pub oif: Option<String>,
    /// Only packets from here.
    pub src: Option<IpNet>,
    /// Only packets to there.
    pub dst: Option<IpNet>,
    /// Only packets with this mark under this mask.
    pub fwmark: Option<(u32, u32)>,
    /// The other way round: packets that do not match.
    pub invert: bool,
    /// Take no route whose prefix is this long or shorter.
    pub suppress_prefix_len: Option<u32>,
    /// Who made it.
    pub protocol: u8,
}

impl Blocking {
    /// The rules of a family in their order.
    ///
    /// # Errors
    /// [`RtnlError`].
    pub fn rules(&mut self, family: Family) -> Result<Vec<Rule>, RtnlError> {
        let mut header = [0; HEADER];
        header[0] = family.raw();
        let list = self.dump(RTM_GETRULE, &Body::new(&header)).map_err(about("list", "rules"))?;
        Ok(list.iter().filter(|m| m.kind == RTM_NEWRULE).filter_map(|m| parse(&m.body)).collect())
    }

    /// Adds a rule; the same one is success.
    ///
    /// # Errors
    /// [`RtnlError::Invalid`], or the kernel's refusal.
    pub fn add_rule(&mut self, rule: Rule) -> Result<(), RtnlError> {
        let body = body(&rule)?;
        match self.request(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &body) {
            Ok(_) => Ok(()),
            // The kernel compares every selector, so this is the very same rule.
            Err(Failure::Kernel(r)) if r.errno == Errno::EEXIST => Ok(()),
            Err(other) => Err(about("add rule", object(&rule))(other)),
        }
    }

    /// Deletes a rule; `false` when there is none like it.
    ///
    /// # Errors
    /// [`RtnlError::Invalid`], or the kernel's refusal.
    pub fn del_rule(&mut self, rule: Rule) -> Result<bool, RtnlError> {
        let result = self.request(RTM_DELRULE, 0, &body(&rule)?);
        deleted(result, &[Errno::ENOENT, Errno::ESRCH]).map_err(about("delete rule", object(&rule)))
    }
}

fn object(rule: &Rule) -> String {
    format!("priority {} ({:?}, {:?})", rule.priority, rule.family, rule.action)
}

fn body(rule: &Rule) -> Result<Body, RtnlError> {
    let invalid = |problem| RtnlError::Invalid { operation: "rule", object: object(rule), problem };
    let mut header = [0; HEADER];
    header[0] = rule.family.raw();
    header[1] = rule.dst.map_or(0, |n| n.prefix_len());
    header[2] = rule.src.map_or(0, |n| n.prefix_len());
    let table = match rule.action {
        RuleAction::Table(table) => {
            header[7] = FR_ACT_TO_TBL;
            Some(table)
        }
        RuleAction::Unreachable => {
            header[7] = FR_ACT_UNREACHABLE;
            None
        }
        RuleAction::Other(_) => return Err(invalid("rules of this kind can be read, not made")),
    };
    header[8..12].copy_from_slice(&(if rule.invert { FIB_RULE_INVERT } else { 0 }).to_ne_bytes());
    let mut body = Body::new(&header);
    for (kind, net) in [(FRA_DST, rule.dst), (FRA_SRC, rule.src)] {
        if let Some(net) = net {
            if Family::of(net.addr()) != rule.family {
                return Err(invalid("an address is of the other IP version"));
            }
            body.bytes(kind, &octets(net.addr()));
        }
    }
    for (kind, name) in [(FRA_IIFNAME, &rule.iif), (FRA_OIFNAME, &rule.oif)] {
        if let Some(name) = name {
            check_name(name)?;
            body.str(kind, name);
        }
    }
    body.u32(FRA_PRIORITY, rule.priority);
    if let Some(table) = table {
        body.u32(FRA_TABLE, table);
    }
    if let Some((mark, mask)) = rule.fwmark {
        body.u32(FRA_FWMARK, mark).u32(FRA_FWMASK, mask);
    }
    if let Some(len) = rule.suppress_prefix_len {
        body.u32(FRA_SUPPRESS_PREFIXLEN, len);
    }
    body.u8(FRA_PROTOCOL, rule.protocol);
    Ok(body)
}

fn parse(body: &[u8]) -> Option<Rule> {
    let [family, dst_len, src_len, _tos, table, _, _, action, f0, f1, f2, f3, ..] = *body else {
        return None;
    };
    let attrs = Attrs::after(body, HEADER);
    let net = |kind, len| {
        let ip: IpAddr = attrs.find(kind).and_then(Attr::ip)?;
        IpNet::new(ip, len).ok()
    };
    let number = |kind| attrs.find(kind).and_then(Attr::u32);
    Some(Rule {
        family: Family::from_raw(family)?,
        priority: number(FRA_PRIORITY).unwrap_or(0),
        action: match action {
            FR_ACT_TO_TBL => RuleAction::Table(number(FRA_TABLE).unwrap_or(u32::from(table))),
            FR_ACT_UNREACHABLE => RuleAction::Unreachable,
            other => RuleAction::Other(other),
        },
        iif: attrs.find(FRA_IIFNAME).map(Attr::string),
        oif: attrs.find(FRA_OIFNAME).map(Attr::string),
        src: net(FRA_SRC, src_len),
        dst: net(FRA_DST, dst_len),
        fwmark: number(FRA_FWMARK).zip(number(FRA_FWMASK)),
        invert: u32::from_ne_bytes([f0, f1, f2, f3]) & FIB_RULE_INVERT != 0,
        // The kernel shows "none" as all ones.
        suppress_prefix_len: number(FRA_SUPPRESS_PREFIXLEN).filter(|l| *l != u32::MAX),
        protocol: attrs.find(FRA_PROTOCOL).and_then(Attr::u8).unwrap_or(0),
    })
}
