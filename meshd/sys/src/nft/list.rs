//! What is there.

use super::expr::NFTA_DATA_VALUE;
use super::set::{
    ELEM_INTERVAL_END, Element, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_KEY_END, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE,
    NFTA_SET_NAME, NFTA_SET_USERDATA, UDATA_SET_COMMENT, Value,
};
use super::table::{
    NFTA_CHAIN_HANDLE, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME, NFTA_CHAIN_POLICY, NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE, NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_TABLE_FLAGS, NFTA_TABLE_HANDLE,
    NFTA_TABLE_NAME, NFTA_TABLE_OWNER, NFTA_TABLE_USE, NFTA_TABLE_USERDATA, Policy, TABLE_F_OWNER, Table,
    TableFamily, header, read_comment,
};
use super::{
    Blocking, NFT_MSG_GETCHAIN, NFT_MSG_GETGEN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE, NFTA_GEN_ID, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_HANDLE, NFTA_RULE_TABLE,
    NFTA_RULE_USERDATA, NftError, Verdict, about, kind,
};
use crate::netlink::{Attr, Attrs, Message};

/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;

/// A table that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableInfo {
    /// Its name.
    pub table: Table,
    /// Handle: differs when a table was deleted and made anew.
    pub handle: u64,
    /// Number of chains, sets and objects.
    pub objects: u32,
    /// The comment it was made with.
    pub comment: Option<String>,
    /// Netlink port of the socket that owns it, if any.
    pub owner: Option<u32>,
}

/// A chain that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainInfo {
    /// Name.
    pub name: String,
    /// Handle.
    pub handle: u64,
    /// Where it is attached: kind (`filter`, `nat`, `route`), hook number, priority, policy.
    pub base: Option<(String, u32, i32, Policy)>,
}

/// A rule that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleInfo {
    /// Chain.
    pub chain: String,
    /// Handle.
    pub handle: u64,
    /// Comment.
    pub comment: Option<String>,
    /// Names of its expressions in order (`meta`, `cmp`, `immediate`…).
    pub expressions: Vec<String>,
    /// Packets and bytes of its first counter.
    pub counter: Option<(u64, u64)>,
}

/// A set or map that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetInfo {
    /// Name.
    pub name: String,
    /// Comment.
    pub comment: Option<String>,
}

impl Blocking {
    /// All tables of all families and owners.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn tables(&mut self) -> Result<Vec<TableInfo>, NftError> {
        let list = self.socket.dump(kind(NFT_MSG_GETTABLE), &header(0)).map_err(about("list", "tables"))?;
        Ok(list.iter().filter_map(parse_table).collect())
    }

    /// The table of this name, if there is one.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn table(&mut self, table: &Table) -> Result<Option<TableInfo>, NftError> {
        Ok(self.tables()?.into_iter().find(|t| t.table == *table))
    }

    /// The chains of a table.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn chains(&mut self, table: &Table) -> Result<Vec<ChainInfo>, NftError> {
        let list = self
            .socket
            .dump(kind(NFT_MSG_GETCHAIN), &header(table.family.raw()))
            .map_err(about("list chains of", table.to_string()))?;
        Ok(list.iter().filter_map(|m| parse_chain(m, &table.name)).collect())
    }

    /// The rules of a table in their order, chain by chain.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn rules(&mut self, table: &Table) -> Result<Vec<RuleInfo>, NftError> {
        let mut body = header(table.family.raw());
        body.str(NFTA_RULE_TABLE, &table.name);
        let list = self
            .socket
            .dump(kind(NFT_MSG_GETRULE), &body)
            .map_err(about("list rules of", table.to_string()))?;
        Ok(list.iter().filter_map(|m| parse_rule(m, &table.name)).collect())
    }

    /// The sets and maps of a table.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn sets(&mut self, table: &Table) -> Result<Vec<SetInfo>, NftError> {
        let mut body = header(table.family.raw());
        body.str(1, &table.name);
        let list = self
            .socket
            .dump(kind(NFT_MSG_GETSET), &body)
            .map_err(about("list sets of", table.to_string()))?;
        Ok(list.iter().filter_map(parse_set).collect())
    }

    /// The elements of a set or map.
    ///
    /// # Errors
    /// [`NftError`]; [`NftError::is_missing`] when there is no such set.
    pub fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<Element>, NftError> {
        let mut body = header(table.family.raw());
        body.str(NFTA_SET_ELEM_LIST_TABLE, &table.name).str(NFTA_SET_ELEM_LIST_SET, set);
        let list = self
            .socket
            .dump(kind(NFT_MSG_GETSETELEM), &body)
            .map_err(about("list elements of", format!("{table} {set}")))?;
        let mut elements = Vec::new();
        for message in &list {
            let attrs = Attrs::after(&message.body, NFGENMSG);
            let Some(found) = attrs.find(NFTA_SET_ELEM_LIST_ELEMENTS) else { continue };
            elements.extend(found.nested().filter_map(|(_, e)| parse_element(e)));
        }
        Ok(elements)
    }

    /// The generation: a number that every change by anybody raises.
    ///
    /// # Errors
    /// [`NftError`].
    pub fn generation(&mut self) -> Result<u32, NftError> {
        let replies = self
            .socket
            .request(kind(NFT_MSG_GETGEN), 0, &header(0))
            .map_err(about("read", "nftables generation"))?;
        replies
            .first()
            .and_then(|m| Attrs::after(&m.body, NFGENMSG).find(NFTA_GEN_ID))
            .and_then(Attr::be32)
            .ok_or_else(|| NftError::Answer {
                operation: "read",
                object: "nftables generation".into(),
                problem: "no number in it",
            })
    }
}

fn parse_table(message: &Message) -> Option<TableInfo> {
    let family = TableFamily::from_raw(*message.body.first()?)?;
    let attrs = Attrs::after(&message.body, NFGENMSG);
    let flags = attrs.find(NFTA_TABLE_FLAGS).and_then(Attr::be32).unwrap_or(0);
    Some(TableInfo {
        table: Table { family, name: attrs.find(NFTA_TABLE_NAME)?.string() },
        handle: attrs.find(NFTA_TABLE_HANDLE).and_then(Attr::be64).unwrap_or(0),
        objects: attrs.find(NFTA_TABLE_USE).and_then(Attr::be32).unwrap_or(0),
        comment: attrs.find(NFTA_TABLE_USERDATA).and_then(|d| read_comment(0, d.0)),
        owner: attrs.find(NFTA_TABLE_OWNER).and_then(Attr::be32).filter(|_| flags & TABLE_F_OWNER != 0),
    })
}

fn parse_chain(message: &Message, table: &str) -> Option<ChainInfo> {
    let attrs = Attrs::after(&message.body, NFGENMSG);
    if attrs.find(NFTA_CHAIN_TABLE)?.string() != table {
        return None;
    }
    let base = attrs.find(NFTA_CHAIN_HOOK).map(Attr::nested).and_then(|hook| {
        let priority = hook.find(NFTA_HOOK_PRIORITY).and_then(Attr::be32)?;
        let policy = match attrs.find(NFTA_CHAIN_POLICY).and_then(Attr::be32) {
            Some(0) => Policy::Drop,
            _ => Policy::Accept,
        };
        Some((
            attrs.find(NFTA_CHAIN_TYPE)?.string(),
            hook.find(NFTA_HOOK_HOOKNUM).and_then(Attr::be32)?,
            i32::from_ne_bytes(priority.to_ne_bytes()),
            policy,
        ))
    });
    Some(ChainInfo {
        name: attrs.find(NFTA_CHAIN_NAME)?.string(),
        handle: attrs.find(NFTA_CHAIN_HANDLE).and_then(Attr::be64)?,
        base,
    })
}

fn parse_rule(message: &Message, table: &str) -> Option<RuleInfo> {
    let attrs = Attrs::after(&message.body, NFGENMSG);
    if attrs.find(NFTA_RULE_TABLE)?.string() != table {
        return None;
    }
    let mut expressions = Vec::new();
    let mut counter = None;
    for (_, element) in attrs.find(NFTA_RULE_EXPRESSIONS).map(Attr::nested).into_iter().flatten() {
        let element = element.nested();
        let Some(name) = element.find(1).map(Attr::string) else { continue };
        if name == "counter"
            && counter.is_none()
            && let Some(data) = element.find(2).map(Attr::nested)
        {
            counter = data.find(2).and_then(Attr::be64).zip(data.find(1).and_then(Attr::be64));
        }
        expressions.push(name);
    }
    Some(RuleInfo {
        chain: attrs.find(NFTA_RULE_CHAIN)?.string(),
        handle: attrs.find(NFTA_RULE_HANDLE).and_then(Attr::be64)?,
        comment: attrs.find(NFTA_RULE_USERDATA).and_then(|d| read_comment(0, d.0)),
        expressions,
        counter,
    })
}

fn parse_set(message: &Message) -> Option<SetInfo> {
    let attrs = Attrs::after(&message.body, NFGENMSG);
    Some(SetInfo {
        name: attrs.find(NFTA_SET_NAME)?.string(),
        comment: attrs.find(NFTA_SET_USERDATA).and_then(|d| read_comment(UDATA_SET_COMMENT, d.0)),
    })
}

fn parse_element(element: Attr<'_>) -> Option<Element> {
    let attrs = element.nested();
    let bytes = |kind| {
        let value = attrs.find(kind)?.nested().find(NFTA_DATA_VALUE)?;
        Some(value.0.to_vec())
    };
    let verdict = || parse_verdict(&attrs.find(NFTA_SET_ELEM_DATA)?.nested());
    let flags = attrs.find(NFTA_SET_ELEM_FLAGS).and_then(Attr::be32).unwrap_or(0);
    Some(Element {
        key: bytes(NFTA_SET_ELEM_KEY)?,
        key_end: bytes(NFTA_SET_ELEM_KEY_END),
        interval_end: flags & ELEM_INTERVAL_END != 0,
        value: verdict().map(Value::Verdict).or_else(|| bytes(NFTA_SET_ELEM_DATA).map(Value::Bytes)),
    })
}

fn parse_verdict(data: &Attrs<'_>) -> Option<Verdict> {
    let verdict = data.find(2)?.nested();
    let code = i32::from_ne_bytes(verdict.find(1)?.be32()?.to_ne_bytes());
    let chain = || verdict.find(2).map(Attr::string);
    match code {
        0 => Some(Verdict::Drop),
        1 => Some(Verdict::Accept),
        -1 => Some(Verdict::Continue),
        -3 => chain().map(Verdict::Jump),
        -4 => chain().map(Verdict::Goto),
        -5 => Some(Verdict::Return),
        _ => None,
    }
}
