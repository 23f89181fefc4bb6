//! Links, addresses, routes, nexthops, neighbours, forwarding entries and rules, over rtnetlink.
//!
//! Two faces of one thing: [`Blocking`] for short-lived processes, [`Rtnl`] for async code. A handle
//! belongs to the network namespace in which it was opened and stays there; [`Rtnl::open_in`] opens
//! one elsewhere without moving the caller. The async calls run on a blocking thread of tokio, because
//! the kernel executes a request inside `send`, and waits there for its own locks: making or deleting
//! a device takes milliseconds. A call whose future is dropped still runs to its end.
//!
//! Common to all calls: "already as wanted" is success; deleting what is not there is success and
//! returns `false`; a list is complete and consistent or an error, never a part.
//!
//! Devices are named by index. A name can be given to another device between two calls; an index is
//! never reused while the namespace lives.

mod address;
mod link;
mod monitor;
mod neigh;
mod nexthop;
mod route;
mod rule;
mod types;

use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use crate::netlink::{Body, Failure, Message, NlSocket, likely_cause};
use crate::netns::{NetNs, NetNsError};

pub use address::{Address, AddressSpec};
pub use link::{AddrGenMode, BridgePort, BridgePortChange, BridgeSpec, Link, LinkChange, VethPeer, VethSpec};
pub use monitor::{Event, Monitor};
pub use neigh::{FdbEntry, FdbTarget, Neighbour};
pub use nexthop::{Nexthop, NexthopKind};
pub use route::{Route, RouteFilter, RouteKind, Scope};
pub use rule::{Rule, RuleAction};
pub(crate) use types::octets;
pub use types::{Family, Mac, ParseMacError, check_name};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RtnlError {
    /// The kernel refused. The message says what was tried on which object and what the number
    /// usually means.
    #[error("{operation} {object}: {}{}{}", errno.desc(), detail_text(detail.as_deref()), cause_text(*errno))]
    Kernel {
        /// What was tried, for example `create bridge`.
        operation: &'static str,
        /// On what, for example `mesh0`.
        object: String,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own sentence, where it gave one.
        detail: Option<String>,
    },
    /// The socket failed.
    #[error("{operation} {object}: {action}: {source}")]
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
    #[error("{operation} {object}: unexpected answer from the kernel: {problem}")]
    Answer {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What was wrong with it.
        problem: &'static str,
    },
    /// A list changed each time it was read; try again later.
    #[error("{operation} {object}: the list changed during every attempt to read it")]
    Changing {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
    },
    /// A device name the kernel would not take.
    #[error("device name {name:?} is not usable: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The object exists, with properties that cannot be changed into the wanted ones, or belongs to
    /// somebody else.
    #[error("{operation} {object}: {present} is in the way")]
    Occupied {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What is there instead.
        present: String,
    },
    /// The request contradicts itself.
    #[error("{operation} {object}: {problem}")]
    Invalid {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What is wrong.
        problem: &'static str,
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

impl RtnlError {
    /// The kernel's error number, when it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Kernel { errno, .. } => Some(*errno),
            Self::Socket { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Answer { .. }
            | Self::Changing { .. }
            | Self::BadName { .. }
            | Self::Occupied { .. }
            | Self::Invalid { .. }
            | Self::Namespace(_)
            | Self::Stopped => None,
        }
    }

    /// Whether the right to do this is missing.
    #[must_use]
    pub fn is_permission(&self) -> bool {
        matches!(self.errno(), Some(Errno::EPERM | Errno::EACCES))
    }

    /// Whether the device or object was not there (any more).
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENODEV | Errno::ENOENT | Errno::ESRCH | Errno::ENXIO))
    }

    /// Whether something of that name or key is there already.
    #[must_use]
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Occupied { .. }) || self.errno() == Some(Errno::EEXIST)
    }
}

/// What a failed exchange was about.
pub(crate) fn about(operation: &'static str, object: impl Into<String>) -> impl FnOnce(Failure) -> RtnlError {
    let object = object.into();
    move |failure| match failure {
        Failure::Kernel(r) => RtnlError::Kernel { operation, object, errno: r.errno, detail: r.detail },
        Failure::Socket { action, source } => RtnlError::Socket { operation, object, action, source },
        Failure::Malformed(problem) => RtnlError::Answer { operation, object, problem },
        Failure::Changing => RtnlError::Changing { operation, object },
        Failure::TooLong => {
            RtnlError::Invalid { operation, object, problem: "too much for one netlink message" }
        }
    }
}

/// The synchronous handle.
#[derive(Debug)]
pub struct Blocking {
    socket: NlSocket,
}

impl Blocking {
    /// Opens a handle in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`RtnlError::Socket`].
    pub fn open() -> Result<Self, RtnlError> {
        let socket = NlSocket::open(netlink_sys::protocols::NETLINK_ROUTE, true)
            .map_err(about("open", "rtnetlink"))?;
        Ok(Self { socket })
    }

    /// Opens a handle in another namespace.
    ///
    /// # Errors
    /// [`RtnlError::Namespace`], [`RtnlError::Socket`].
    pub fn open_in(netns: &NetNs) -> Result<Self, RtnlError> {
        netns.run(Self::open)?
    }

    fn request(&mut self, kind: u16, flags: u16, body: &Body) -> Result<Vec<Message>, Failure> {
        self.socket.request(kind, flags, body)
    }

    fn dump(&mut self, kind: u16, body: &Body) -> Result<Vec<Message>, Failure> {
        self.socket.dump(kind, body)
    }
}

/// Turns "it was not there" into `false`.
fn deleted(result: Result<Vec<Message>, Failure>, missing: &[Errno]) -> Result<bool, Failure> {
    match result {
        Ok(_) => Ok(true),
        Err(Failure::Kernel(r)) if missing.contains(&r.errno) => Ok(false),
        Err(other) => Err(other),
    }
}

/// The asynchronous handle. Clones share one socket; calls on them take turns.
#[derive(Debug, Clone)]
pub struct Rtnl {
    inner: Arc<Mutex<Blocking>>,
}

impl From<Blocking> for Rtnl {
    fn from(blocking: Blocking) -> Self {
        Self { inner: Arc::new(Mutex::new(blocking)) }
    }
}

macro_rules! on_blocking_thread {
    ($( $(#[$doc:meta])* $name:ident ( $($arg:ident : $ty:ty),* ) -> $ret:ty; )*) => {
        impl Rtnl { $(
            $(#[$doc])*
            ///
            /// # Errors
            /// As the method of the same name on [`Blocking`]; [`RtnlError::Stopped`].
            pub async fn $name(&self, $($arg: $ty),*) -> Result<$ret, RtnlError> {
                self.run(move |rtnl| rtnl.$name($(on_blocking_thread!(@pass $arg : $ty)),*)).await
            }
        )* }
    };
    (@pass $arg:ident : String) => { &$arg };
    (@pass $arg:ident : $ty:ty) => { $arg };
}

impl Rtnl {
    /// Opens a handle in the namespace of the calling thread.
    ///
    /// # Errors
    /// [`RtnlError::Socket`].
    pub fn open() -> Result<Self, RtnlError> {
        Blocking::open().map(Self::from)
    }

    /// Opens a handle in another namespace.
    ///
    /// # Errors
    /// [`RtnlError::Namespace`], [`RtnlError::Socket`].
    pub fn open_in(netns: &NetNs) -> Result<Self, RtnlError> {
        Blocking::open_in(netns).map(Self::from)
    }

    /// Runs several calls on one blocking thread, without a hop between them.
    ///
    /// # Errors
    /// What `work` returns; [`RtnlError::Stopped`].
    pub async fn run<T, F>(&self, work: F) -> Result<T, RtnlError>
    where
        F: FnOnce(&mut Blocking) -> Result<T, RtnlError> + Send + 'static,
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
                Err(_) => Err(RtnlError::Stopped),
            },
        }
    }

    /// All links, by index.
    ///
    /// # Errors
    /// As [`Blocking::links`]; [`RtnlError::Stopped`].
    pub async fn links(&self) -> Result<Vec<Link>, RtnlError> {
        self.run(Blocking::links).await
    }

    /// The link of this name, if there is one.
    ///
    /// # Errors
    /// As [`Blocking::link`]; [`RtnlError::Stopped`].
    pub async fn link(&self, name: &str) -> Result<Option<Link>, RtnlError> {
        let name = name.to_owned();
        self.run(move |rtnl| rtnl.link(&name)).await
    }

    /// Deletes a link by name; see [`Blocking::delete_link`].
    ///
    /// # Errors
    /// As [`Blocking::delete_link`]; [`RtnlError::Stopped`].
    pub async fn delete_link(&self, name: &str) -> Result<bool, RtnlError> {
        let name = name.to_owned();
        self.run(move |rtnl| rtnl.delete_link(&name)).await
    }
}

on_blocking_thread! {
    /// The link of this index, if there is one.
    link_by_index(index: u32) -> Option<Link>;
    /// Makes a bridge, or makes an existing one so; returns its index.
    create_bridge(spec: BridgeSpec) -> u32;
    /// Makes a veth pair; returns the near end's index.
    create_veth(spec: VethSpec) -> u32;
    /// Changes what is given of a link.
    set_link(index: u32, change: LinkChange) -> ();
    /// Changes what is given of a bridge port.
    set_bridge_port(index: u32, change: BridgePortChange) -> ();
    /// Waits until a bridge port passes frames.
    wait_port_forwarding(index: u32, at_most: std::time::Duration) -> bool;
    /// The addresses of a device, or of all devices.
    addresses(index: Option<u32>) -> Vec<Address>;
    /// Adds an address, or makes an existing one so.
    add_address(index: u32, spec: AddressSpec) -> ();
    /// Deletes an address.
    del_address(index: u32, net: ipnet::IpNet) -> bool;
    /// The routes that pass the filter.
    routes(filter: RouteFilter) -> Vec<Route>;
    /// Adds a route or replaces our own of the same key.
    add_route(route: Route) -> ();
    /// Replaces a route that was just seen to be the caller's own.
    replace_route(route: Route) -> ();
    /// Deletes a route.
    del_route(route: Route) -> bool;
    /// All nexthops.
    nexthops() -> Vec<Nexthop>;
    /// Adds a nexthop.
    add_nexthop(nexthop: Nexthop) -> ();
    /// Deletes a nexthop.
    del_nexthop(id: u32) -> bool;
    /// The neighbour entries of a device.
    neighbours(index: u32) -> Vec<Neighbour>;
    /// Sets a permanent neighbour entry.
    add_neighbour(index: u32, ip: std::net::IpAddr, mac: Mac) -> ();
    /// Deletes a neighbour entry.
    del_neighbour(index: u32, ip: std::net::IpAddr) -> bool;
    /// The forwarding entries of a bridge port or bridge.
    fdb(index: u32) -> Vec<FdbEntry>;
    /// Sets a static forwarding entry.
    add_fdb(entry: FdbEntry) -> ();
    /// Deletes a forwarding entry.
    del_fdb(entry: FdbEntry) -> bool;
    /// The policy rules of a family.
    rules(family: Family) -> Vec<Rule>;
    /// Adds a policy rule.
    add_rule(rule: Rule) -> ();
    /// Deletes a policy rule.
    del_rule(rule: Rule) -> bool;
}
