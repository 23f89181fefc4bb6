//! Transactions: all of it, or nothing.

use nix::errno::Errno;

use super::set::{Element, Set, element_bodies};
use super::table::{
    Chain, MAX_COMMENT, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_TABLE_NAME, Table, TableOptions, chain_body,
    header, table_body,
};
use super::{
    Blocking, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET, NFT_MSG_DELSETELEM, NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFT_MSG_NEWTABLE, NFTA_RULE_CHAIN,
    NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NftError, Rule, about, kind,
};
use crate::netlink::{
    Body, Failure, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, Refusal, Reply,
    push_message,
};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_BATCH_GENID: u16 = 1;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Room in the send buffer beyond the batch itself: the kernel counts its own overhead too.
const SEND_SLACK: usize = 64 * 1024;
/// Room for answers: one per refused message.
const RECEIVE_ROOM: usize = 4 << 20;

/// Changes that the kernel makes together or not at all. Nothing is sent before
/// [`Nft::commit`](super::Nft::commit).
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    ops: Vec<Op>,
    generation: Option<u32>,
    sets: u32,
    problem: Option<(String, &'static str)>,
}

#[derive(Debug, Clone)]
struct Op {
    kind: u16,
    flags: u16,
    body: Body,
    what: String,
}

impl Transaction {
    /// An empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuse the whole when anything in nftables changed since this generation was read
    /// ([`Nft::generation`](super::Nft::generation)); the error is then [`NftError::is_stale`].
    pub fn expect_generation(&mut self, generation: u32) -> &mut Self {
        self.generation = Some(generation);
        self
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Number of messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    fn push(&mut self, message: u16, flags: u16, body: Body, what: String) -> &mut Self {
        self.ops.push(Op { kind: kind(message), flags, body, what });
        self
    }

    fn invalid(&mut self, what: String, problem: &'static str) {
        self.problem.get_or_insert((what, problem));
    }

    fn check_comment(&mut self, what: &str, comment: Option<&String>) {
        if comment.is_some_and(|c| c.len() > MAX_COMMENT || c.contains('\0')) {
            self.invalid(what.to_owned(), "a comment has at most 254 bytes and no zero byte");
        }
    }

    /// Makes a table. An existing one is left as it is, with what is in it.
    pub fn add_table(&mut self, table: &Table, options: &TableOptions) -> &mut Self {
        let what = format!("add table {table}");
        self.check_comment(&what, options.comment.as_ref());
        self.push(NFT_MSG_NEWTABLE, NLM_F_CREATE, table_body(table, options), what)
    }

    /// Deletes a table with all that is in it. One that does not exist is success.
    ///
    /// Followed by [`Transaction::add_table`] this replaces a table without a moment in which there is
    /// none.
    pub fn delete_table(&mut self, table: &Table) -> &mut Self {
        // Made first if need be: then there is always one to delete, on every kernel.
        let plain = table_body(table, &TableOptions::default());
        self.push(NFT_MSG_NEWTABLE, NLM_F_CREATE, plain, format!("touch table {table}"));
        let mut body = header(table.family.raw());
        body.str(NFTA_TABLE_NAME, &table.name);
        self.push(NFT_MSG_DELTABLE, 0, body, format!("delete table {table}"))
    }

    /// Makes a chain. An existing base chain of the same properties, or regular chain, is left as it is.
    pub fn add_chain(&mut self, table: &Table, chain: &Chain) -> &mut Self {
        let what = format!("add chain {table} {}", chain.name);
        self.push(NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain_body(table, chain), what)
    }

    /// Deletes an empty chain that nothing jumps to.
    pub fn delete_chain(&mut self, table: &Table, chain: &str) -> &mut Self {
        let mut body = header(table.family.raw());
        body.str(NFTA_CHAIN_TABLE, &table.name).str(NFTA_CHAIN_NAME, chain);
        self.push(NFT_MSG_DELCHAIN, 0, body, format!("delete chain {table} {chain}"))
    }

    /// Deletes all rules of a chain.
    pub fn flush_chain(&mut self, table: &Table, chain: &str) -> &mut Self {
        let mut body = header(table.family.raw());
        body.str(NFTA_RULE_TABLE, &table.name).str(NFTA_RULE_CHAIN, chain);
        self.push(NFT_MSG_DELRULE, 0, body, format!("flush chain {table} {chain}"))
    }

    /// Puts a rule at the end of a chain.
    pub fn add_rule(&mut self, table: &Table, chain: &str, rule: &Rule) -> &mut Self {
        let what = format!("add rule {table} {chain}{}", rule.label());
        if let Some(problem) = rule.problem(table) {
            self.invalid(what.clone(), problem);
        }
        self.push(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule.body(table, chain), what)
    }

    /// Puts a rule at the beginning of a chain.
    pub fn insert_rule(&mut self, table: &Table, chain: &str, rule: &Rule) -> &mut Self {
        let what = format!("insert rule {table} {chain}{}", rule.label());
        if let Some(problem) = rule.problem(table) {
            self.invalid(what.clone(), problem);
        }
        self.push(NFT_MSG_NEWRULE, NLM_F_CREATE, rule.body(table, chain), what)
    }

    /// Deletes one rule by the handle that the listing gave.
    pub fn delete_rule(&mut self, table: &Table, chain: &str, handle: u64) -> &mut Self {
        let mut body = header(table.family.raw());
        body.str(NFTA_RULE_TABLE, &table.name).str(NFTA_RULE_CHAIN, chain).be64(NFTA_RULE_HANDLE, handle);
        self.push(NFT_MSG_DELRULE, 0, body, format!("delete rule {table} {chain} handle {handle}"))
    }

    /// Makes a set or map. An existing one of the same properties is left as it is.
    pub fn add_set(&mut self, table: &Table, set: &Set) -> &mut Self {
        self.sets += 1;
        let what = format!("add set {table} {}", set.name);
        self.check_comment(&what, set.comment.as_ref());
        if set.key.is_empty() {
            self.invalid(what.clone(), "a set needs at least one key field");
        }
        let body = set.body(table, self.sets);
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE, body, what)
    }

    /// Deletes a set or map that no rule uses.
    pub fn delete_set(&mut self, table: &Table, set: &str) -> &mut Self {
        let mut body = header(table.family.raw());
        body.str(1, &table.name).str(super::set::NFTA_SET_NAME, set);
        self.push(NFT_MSG_DELSET, 0, body, format!("delete set {table} {set}"))
    }

    /// Adds elements, in as many messages as it takes. One that is there with the same value is
    /// success; with another value the transaction is refused (EEXIST).
    pub fn add_elements(&mut self, table: &Table, set: &str, elements: &[Element]) -> &mut Self {
        for body in element_bodies(table, set, elements) {
            self.push(NFT_MSG_NEWSETELEM, NLM_F_CREATE, body, format!("add elements to {table} {set}"));
        }
        self
    }

    /// As [`Transaction::add_elements`], but one that is there already refuses the transaction (EEXIST).
    pub fn create_elements(&mut self, table: &Table, set: &str, elements: &[Element]) -> &mut Self {
        for body in element_bodies(table, set, elements) {
            let what = format!("create elements in {table} {set}");
            self.push(NFT_MSG_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, body, what);
        }
        self
    }

    /// Deletes elements; one that is not there refuses the transaction (ENOENT).
    pub fn delete_elements(&mut self, table: &Table, set: &str, elements: &[Element]) -> &mut Self {
        for body in element_bodies(table, set, elements) {
            self.push(NFT_MSG_DELSETELEM, 0, body, format!("delete elements from {table} {set}"));
        }
        self
    }

    /// Deletes all elements of a set.
    pub fn flush_set(&mut self, table: &Table, set: &str) -> &mut Self {
        let mut body = header(table.family.raw());
        body.str(super::set::NFTA_SET_ELEM_LIST_TABLE, &table.name);
        body.str(super::set::NFTA_SET_ELEM_LIST_SET, set);
        self.push(NFT_MSG_DELSETELEM, 0, body, format!("flush set {table} {set}"))
    }
}

impl Blocking {
    /// Hands a transaction to the kernel. An empty one is success.
    ///
    /// # Errors
    /// [`NftError::Rejected`] names the first operation that failed; nothing was changed then.
    /// [`NftError::Invalid`] was found before sending.
    pub fn commit(&mut self, transaction: &Transaction) -> Result<(), NftError> {
        if let Some((operation, problem)) = &transaction.problem {
            return Err(NftError::Invalid { operation: operation.clone(), problem });
        }
        if transaction.ops.is_empty() {
            return Ok(());
        }
        let port = self.socket.port();
        let first = self.socket.next_seq();
        let mut bytes = Vec::new();
        let mut begin = batch_header();
        if let Some(generation) = transaction.generation {
            begin.be32(NFNL_BATCH_GENID, generation);
        }
        let send = about("commit", "nftables transaction");
        push_message(&mut bytes, NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, first, port, &begin).map_err(send)?;
        let last = transaction.ops.len() - 1;
        let mut seqs = Vec::with_capacity(transaction.ops.len());
        for (i, op) in transaction.ops.iter().enumerate() {
            let seq = self.socket.next_seq();
            seqs.push(seq);
            // Refusals come without being asked for; one acknowledgement tells that all went well.
            let ack = if i == last { NLM_F_ACK } else { 0 };
            push_message(&mut bytes, op.kind, op.flags | NLM_F_REQUEST | ack, seq, port, &op.body).map_err(
                |_| NftError::Invalid {
                    operation: op.what.clone(),
                    problem: "it is longer than a netlink attribute can be",
                },
            )?;
        }
        let end = self.socket.next_seq();
        let send = about("commit", "nftables transaction");
        push_message(&mut bytes, NFNL_MSG_BATCH_END, NLM_F_REQUEST, end, port, &batch_header())
            .map_err(send)?;

        let send = about("commit", "nftables transaction");
        self.reserve(bytes.len() + SEND_SLACK, RECEIVE_ROOM).map_err(send)?;
        let send = about("commit", "nftables transaction");
        self.socket.send(&bytes).map_err(send)?;
        tracing::trace!(messages = transaction.ops.len(), bytes = bytes.len(), "nftables transaction sent");
        self.outcome(transaction, first, &seqs)
    }

    /// Collects the answers. The kernel made them all inside `send`: refusals in order, the
    /// acknowledgement of the last operation if that one was good, or one refusal of the batch itself.
    fn outcome(&mut self, transaction: &Transaction, first: u32, seqs: &[u32]) -> Result<(), NftError> {
        let last = seqs.last().copied().unwrap_or(first);
        let mut refusals: Vec<Refusal> = Vec::new();
        let mut done = false;
        // More refusals than the buffer holds: those that came are enough to say what is wrong, but the
        // one that would mark the end may be missing.
        let mut overflow = false;
        while !done {
            let receive = about("commit", "nftables transaction");
            let replies =
                match if overflow { self.socket.receive_now() } else { self.socket.receive().map(Some) } {
                    Ok(Some(replies)) => replies,
                    Ok(None) => break,
                    Err(Failure::Socket { source, .. })
                        if source.raw_os_error() == Some(Errno::ENOBUFS as i32) =>
                    {
                        overflow = true;
                        continue;
                    }
                    Err(other) => return Err(receive(other)),
                };
            for reply in replies {
                match reply {
                    Reply::Refused(refusal) if refusal.seq == first || seqs.contains(&refusal.seq) => {
                        done |= refusal.seq == first || refusal.seq == last;
                        refusals.push(refusal);
                    }
                    Reply::Done { seq } if seq == last => done = true,
                    // Left over from an exchange that was given up.
                    Reply::Refused(_) | Reply::Done { .. } | Reply::Data(_) => {}
                }
            }
        }
        if refusals.is_empty() && !done {
            return Err(NftError::Answer {
                operation: "commit",
                object: "nftables transaction".into(),
                problem: "all answers were lost; it is not known whether it was done",
            });
        }
        let Some(refusal) = refusals.first() else { return Ok(()) };
        let at = seqs.iter().position(|s| *s == refusal.seq);
        Err(NftError::Rejected {
            operation: at
                .and_then(|i| transaction.ops.get(i))
                .map_or_else(|| "the transaction as a whole".to_owned(), |op| op.what.clone()),
            step: at.map_or(0, |i| i + 1),
            of: seqs.len(),
            errno: refusal.errno,
            detail: refusal.detail.clone(),
            further: refusals.len() - 1,
        })
    }
}

fn batch_header() -> Body {
    let [hi, lo] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    Body::new(&[0, 0, hi, lo])
}
