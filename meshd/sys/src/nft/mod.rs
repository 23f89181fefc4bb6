//! nftables in process, over netlink: tables, chains, rules, sets, in atomic transactions.
//!
//! Build a [`Transaction`] and hand it to [`Nft::commit`] (async) or [`Blocking::commit`]. The kernel
//! takes all of it or nothing, and the error names the operation that failed. A whole ruleset goes into
//! one transaction; afterwards only elements of sets and maps come and go.
//!
//! A handle belongs to the network namespace in which it was opened. A table made with
//! [`TableOptions::owner`] belongs to the *handle* that made it: keep it open.
//!
//! # What works on kernels without `NFT_BRIDGE_META` and `NF_CONNTRACK_BRIDGE`
//! In a `bridge` table, prerouting at priority −300, each found by effect (see the tests):
//! - `iifname` and `oifname` name the bridge *port*; concatenated with payload fields in one set:
//!   [`Field::Iifname`], [`Field::EtherSaddr`], [`Field::Ip4Saddr`] or [`Field::Ip6Saddr`].
//! - [`Field::ArpSenderMac`], [`Field::ArpSenderIp`] at offsets 8 and 14 of the network header.
//! - [`Field::NdTarget`], after [`Field::Icmp6Type`]: the transport header is found behind IPv6 extension
//!   headers, and a fragment's later parts have none.
//! - `meta protocol`, `pkttype`, mark, payload of any place, verdict maps, counters.
//!
//! Not there: `ct` anything, `meta ibrname`/`obrname`, `broute`, `reject`.

mod batch;
mod expr;
mod field;
mod list;
mod monitor;
mod rule;
mod set;
mod table;

use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use crate::netlink::{Failure, NlSocket, likely_cause};
use crate::netns::{NetNs, NetNsError};

pub use batch::Transaction;
pub use expr::{Base, Cmp, Ct, Expr, Meta, NatKind, Reg, Reject, Verdict};
pub use field::{CtState, Field};
pub use list::{ChainInfo, RuleInfo, SetInfo, TableInfo};
pub use monitor::{Event, Monitor};
pub use rule::Rule;
pub use set::{Element, FieldType, Part, Set, SetData, Value, key};
pub use table::{BaseChain, Chain, ChainKind, Hook, Policy, Table, TableFamily, TableOptions};

const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_DELSET: u16 = 11;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_DELSETELEM: u16 = 14;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_GETGEN: u16 = 16;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_GEN_ID: u16 = 1;

/// The netlink message type of an nftables message.
const fn kind(message: u16) -> u16 {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// The kernel refused a transaction. Nothing of it was done.
    #[error(
        "nftables: {operation} (operation {step} of {of}): {}{}{}{}",
        errno.desc(), detail_text(detail.as_deref()), cause_text(*errno), further_text(*further)
    )]
    Rejected {
        /// The first operation that failed, for example `add rule inet meshd forward ("established")`.
        operation: String,
        /// Its number, from 1; 0 when it was the transaction as a whole.
        step: usize,
        /// Number of operations.
        of: usize,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own sentence, where it gave one.
        detail: Option<String>,
        /// How many more operations failed.
        further: usize,
    },
    /// The kernel refused a listing or look-up.
    #[error("nftables: {operation} {object}: {}{}{}", errno.desc(), detail_text(detail.as_deref()), cause_text(*errno))]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own sentence, where it gave one.
        detail: Option<String>,
    },
    /// The transaction contradicts itself; nothing was sent.
    #[error("nftables: {operation}: {problem}")]
    Invalid {
        /// The operation.
        operation: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The socket failed.
    #[error("nftables: {operation} {object}: {action}: {source}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// The step on the socket.
        action: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The kernel's answer could not be understood.
    #[error("nftables: {operation} {object}: unexpected answer from the kernel: {problem}")]
    Answer {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What was wrong with it.
        problem: &'static str,
    },
    /// A listing changed each time it was read; try again later.
    #[error("nftables: {operation} {object}: the list changed during every attempt to read it")]
    Changing {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
    },
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The async runtime is shutting down.
    #[error("the async runtime ended before the request ran")]
    Stopped,
}

fn detail_text(detail: Option<&str>) -> String {
    detail.map_or_else(String::new, |d| format!(": {d}"))
}

fn cause_text(errno: Errno) -> String {
    match likely_cause(errno) {
        "" => String::new(),
        cause => format!(" ({cause})"),
    }
}

fn further_text(further: usize) -> String {
    match further {
        0 => String::new(),
        n => format!("; {n} further operations failed too"),
    }
}

impl NftError {
    /// The kernel's error number, when it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Rejected { errno, .. } | Self::Kernel { errno, .. } => Some(*errno),
            Self::Socket { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Invalid { .. }
            | Self::Answer { .. }
            | Self::Changing { .. }
            | Self::Namespace(_)
            | Self::Stopped => None,
        }
    }

    /// Whether the right to do this is missing, or the table belongs to another owner.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self.errno(), Some(Errno::EPERM | Errno::EACCES))
    }

    /// Whether a table, chain, set or element was not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.errno() == Some(Errno::ENOENT)
    }

    /// Whether something changed since the expected generation.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Rejected { step: 0, errno: Errno::ERESTART, .. })
    }
}

fn about(operation: &'static str, object: impl Into<String>) -> impl FnOnce(Failure) -> NftError {
    let object = object.into();
    move |failure| match failure {
        Failure::Kernel(r) => NftError::Kernel { operation, object, errno: r.errno, detail: r.detail },
        Failure::Socket { action, source } => NftError::Socket { operation, object, action, source },
        Failure::Malformed(problem) => NftError::Answer { operation, object, problem },
        Failure::Changing => NftError::Changing { operation, object },
        Failure::TooLong => {
            NftError::Invalid { operation: format!("{operation} {object}"), problem: "too long for netlink" }
        }
    }
}

/// The synchronous handle.
#[derive(Debug)]
pub struct Blocking {
    socket: NlSocket,
    reserved: (usize, usize),
}

impl Blocking {
    /// Opens a handle in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`NftError::Socket`].
    pub fn open() -> Result<Self, NftError> {
        let socket = NlSocket::open(netlink_sys::protocols::NETLINK_NETFILTER, false)
            .map_err(about("open", "socket"))?;
        Ok(Self { socket, reserved: (0, 0) })
    }

    /// Opens a handle in another namespace.
    ///
    /// # Errors
    /// [`NftError::Namespace`], [`NftError::Socket`].
    pub fn open_in(netns: &NetNs) -> Result<Self, NftError> {
        netns.run(Self::open)?
    }

    /// The netlink port by which others see who made a change.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    fn reserve(&mut self, send: usize, receive: usize) -> Result<(), Failure> {
        let wanted = (self.reserved.0.max(send), self.reserved.1.max(receive));
        if wanted != self.reserved {
            self.socket.reserve_buffers(wanted.0, wanted.1)?;
            self.reserved = wanted;
        }
        Ok(())
    }
}

/// The asynchronous handle. Clones share one socket; calls on them take turns. They run on a blocking
/// thread of tokio, because a large transaction keeps the calling thread in the kernel for as long as it
/// takes. A call whose future is dropped still runs to its end.
#[derive(Debug, Clone)]
pub struct Nft {
    inner: Arc<Mutex<Blocking>>,
    port: u32,
}

impl From<Blocking> for Nft {
    fn from(blocking: Blocking) -> Self {
        let port = blocking.port();
        Self { inner: Arc::new(Mutex::new(blocking)), port }
    }
}

impl Nft {
    /// Opens a handle in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`NftError::Socket`].
    pub fn open() -> Result<Self, NftError> {
        Blocking::open().map(Self::from)
    }

    /// Opens a handle in another namespace.
    ///
    /// # Errors
    /// [`NftError::Namespace`], [`NftError::Socket`].
    pub fn open_in(netns: &NetNs) -> Result<Self, NftError> {
        Blocking::open_in(netns).map(Self::from)
    }

    /// The netlink port by which a [`Monitor`] tells our own changes from others'.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Runs several calls on one blocking thread.
    ///
    /// # Errors
    /// What `work` returns; [`NftError::Stopped`].
    pub async fn run<T, F>(&self, work: F) -> Result<T, NftError>
    where
        F: FnOnce(&mut Blocking) -> Result<T, NftError> + Send + 'static,
        T: Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let task = tokio::task::spawn_blocking(move || {
            // A panic in an earlier call leaves at worst unread answers, which are skipped by number.
            work(&mut inner.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match task.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(NftError::Stopped),
            },
        }
    }

    /// Hands a transaction to the kernel; see [`Blocking::commit`].
    ///
    /// # Errors
    /// As [`Blocking::commit`]; [`NftError::Stopped`].
    pub async fn commit(&self, transaction: Transaction) -> Result<(), NftError> {
        self.run(move |nft| nft.commit(&transaction)).await
    }

    /// All tables; see [`Blocking::tables`].
    ///
    /// # Errors
    /// As [`Blocking::tables`]; [`NftError::Stopped`].
    pub async fn tables(&self) -> Result<Vec<TableInfo>, NftError> {
        self.run(Blocking::tables).await
    }

    /// One table; see [`Blocking::table`].
    ///
    /// # Errors
    /// As [`Blocking::table`]; [`NftError::Stopped`].
    pub async fn table(&self, table: &Table) -> Result<Option<TableInfo>, NftError> {
        let table = table.clone();
        self.run(move |nft| nft.table(&table)).await
    }

    /// The chains of a table; see [`Blocking::chains`].
    ///
    /// # Errors
    /// As [`Blocking::chains`]; [`NftError::Stopped`].
    pub async fn chains(&self, table: &Table) -> Result<Vec<ChainInfo>, NftError> {
        let table = table.clone();
        self.run(move |nft| nft.chains(&table)).await
    }

    /// The rules of a table; see [`Blocking::rules`].
    ///
    /// # Errors
    /// As [`Blocking::rules`]; [`NftError::Stopped`].
    pub async fn rules(&self, table: &Table) -> Result<Vec<RuleInfo>, NftError> {
        let table = table.clone();
        self.run(move |nft| nft.rules(&table)).await
    }

    /// The sets of a table; see [`Blocking::sets`].
    ///
    /// # Errors
    /// As [`Blocking::sets`]; [`NftError::Stopped`].
    pub async fn sets(&self, table: &Table) -> Result<Vec<SetInfo>, NftError> {
        let table = table.clone();
        self.run(move |nft| nft.sets(&table)).await
    }

    /// The elements of a set; see [`Blocking::elements`].
    ///
    /// # Errors
    /// As [`Blocking::elements`]; [`NftError::Stopped`].
    pub async fn elements(&self, table: &Table, set: &str) -> Result<Vec<Element>, NftError> {
        let (table, set) = (table.clone(), set.to_owned());
        self.run(move |nft| nft.elements(&table, &set)).await
    }

    /// The generation; see [`Blocking::generation`].
    ///
    /// # Errors
    /// As [`Blocking::generation`]; [`NftError::Stopped`].
    pub async fn generation(&self) -> Result<u32, NftError> {
        self.run(Blocking::generation).await
    }
}
