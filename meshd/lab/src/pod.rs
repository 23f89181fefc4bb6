//! Pods: named network namespaces of a host, attached by the plugin.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use mesh_sys::netns::NetNs;

use crate::family::Family;
use crate::host::Host;
use crate::ping::{self, PingOptions, PingStats, RunningPing};
use crate::stream::{self, Server, Transfer};

/// Name of the pod's interface.
pub(crate) const POD_IFACE: &str = "eth0";

/// A pod of a host. Clones are the same pod.
#[derive(Clone, Debug)]
pub struct Pod(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    host: Host,
    name: String,
    net: NetNs,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Pod {
    pub(crate) fn new(host: Host, name: &str, net: NetNs, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Self {
        Self(Arc::new(Inner { host, name: name.to_owned(), net, ipv4, ipv6 }))
    }

    /// Name of the pod inside its host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// `HOST/POD`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.0.host.name(), self.0.name)
    }

    /// The host it runs on.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.0.host
    }

    /// Its address in a family.
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.0.ipv4.into(),
            Family::V6 => self.0.ipv6.into(),
        }
    }

    /// Its network namespace.
    #[must_use]
    pub fn net(&self) -> &NetNs {
        &self.0.net
    }

    /// Starts a command in the pod.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: Command) -> Result<Child> {
        self.0.host.space().spawn(Some(&self.0.net), command)
    }

    /// Runs a command in the pod to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        let mut command = self.0.host.command_of(command)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(self.spawn(command)?.wait_with_output()?)
    }

    /// Pings an address from the pod.
    ///
    /// # Errors
    /// When the socket fails; an answer that does not come is in the result.
    pub fn ping(&self, target: IpAddr, options: PingOptions) -> Result<PingStats> {
        Ok(self.0.net.run(|| ping::ping(target, options, &AtomicBool::new(false)))??)
    }

    /// Pings an address from the pod until told to stop. `options.count` is the limit.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start_ping(&self, target: IpAddr, options: PingOptions) -> Result<RunningPing> {
        let stop = Arc::new(AtomicBool::new(false));
        let (net, stopping) = (self.0.net.try_clone()?, Arc::clone(&stop));
        let thread = thread::Builder::new().name("lab-ping".to_owned()).spawn(move || {
            net.run(|| ping::ping(target, options, &stopping))
                .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        })?;
        Ok(RunningPing { stop, thread })
    }

    /// Pings all targets at once until each has answered or the deadline has come.
    pub(crate) fn sweep(
        &self,
        targets: &[IpAddr],
        deadline: Instant,
    ) -> Result<Vec<Option<std::time::Duration>>> {
        Ok(self.0.net.run(|| ping::sweep(targets, deadline))??)
    }

    /// Listens for transfers on the pod's address.
    pub(crate) fn serve(&self, family: Family) -> Result<Server> {
        let address = self.address(family);
        self.0.net.run(|| Server::start(address))?.with_context(|| format!("in pod {}", self.full_name()))
    }

    /// Sends to a server in another pod.
    pub(crate) fn send(&self, server: &Server, bytes: u64) -> Result<Transfer> {
        static SEED: AtomicU64 = AtomicU64::new(1);
        let seed = SEED.fetch_add(1, Ordering::Relaxed);
        let to = server.address();
        self.0
            .net
            .run(|| stream::send(to, seed, bytes))?
            .with_context(|| format!("from pod {}", self.full_name()))
    }

    /// Sends `bytes` bytes to another pod over TCP; the receiver compares every byte.
    ///
    /// # Errors
    /// When no connection comes about, nothing moves for ten seconds, or a byte arrives changed.
    pub fn tcp_send_to(&self, other: &Self, family: Family, bytes: u64) -> Result<Transfer> {
        self.send(&other.serve(family)?, bytes)
    }

    /// Runs a command in the pod and returns its output; its failure is an error.
    ///
    /// # Errors
    /// When it cannot be started, or fails.
    pub fn exec_ok(&self, command: &[&str]) -> Result<String> {
        succeed(command, &self.exec(command)?)
    }
}

/// The output of a command that has to succeed.
pub(crate) fn succeed(command: &[&str], output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{command:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let mut text = String::new();
    output
        .stdout
        .as_slice()
        .read_to_string(&mut text)
        .with_context(|| format!("{command:?} printed no UTF-8"))?;
    Ok(text)
}
