//! ADD: lease, wire, activate; or leave nothing behind.

use std::time::{Duration, Instant};

use mesh_core::api::{AttachRequest, Attachment, BRIDGE, MacAddr};
use mesh_sys::rtnl::Link;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::error::{CniError, Code};
use crate::invocation::AddCommand;
use crate::lock::Lock;
use crate::result::{Attached, Interface, Ip, Route};
use crate::tombstone;
use crate::wiring::{Container, Host, addresses, next_hop};

/// For the whole operation. The kubelet gives up on a sandbox after two minutes.
const LIMIT: Duration = Duration::from_secs(45);

/// For releasing the lease after a failure, also one by the limit above.
const UNDO_LIMIT: Duration = Duration::from_secs(5);

/// How long a restarting daemon is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long another operation on the same attachment is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// How long the carrier is waited for. It comes within a millisecond of the host's end coming up.
const CARRIER_LIMIT: Duration = Duration::from_millis(500);

/// Attaches the container; returns the result document.
///
/// # Errors
/// Whatever went wrong; everything done before is undone then.
pub(crate) fn add(command: &AddCommand) -> Result<Value, CniError> {
    let begin = Instant::now();
    let conf = &command.conf;
    let mut container = Container::open(&command.netns)?;
    let _lock = Lock::acquire(&conf.state_dir, &command.id, LOCK_LIMIT)?;
    if container.link(command.id.ifname())?.is_some() {
        return Err(CniError::new(
            Code::Exists,
            format!(
                "interface {} exists already in {}; it was left as it is",
                command.id.ifname(),
                command.netns
            ),
        ));
    }
    let host = Host::open()?;
    let daemon = Daemon::new(&conf.socket, PATIENCE, LIMIT)?;
    let mut work = Add { command, container, host, daemon, leased: false, wired: false };
    match work.attach() {
        Ok(attached) => {
            let milliseconds = begin.elapsed().as_millis();
            tracing::info!(attachment = %command.id, host_interface = command.id.host_ifname(), milliseconds, "attached");
            Ok(attached.to_json(conf.version, command.attach.prev_result.as_ref()))
        }
        Err(error) => Err(work.undo(error)),
    }
}

/// An attachment in the making, and what of it exists.
struct Add<'a> {
    command: &'a AddCommand,
    container: Container,
    host: Host,
    daemon: Daemon,
    leased: bool,
    wired: bool,
}

impl Add<'_> {
    fn attach(&mut self) -> Result<Attached, CniError> {
        self.finish_earlier_del()?;
        let attachment = self.lease()?;
        let mtu = self.mtu(&attachment);
        if self.host.delete(&attachment.host_ifname)? {
            tracing::info!(attachment = %attachment.id, "removed the leftover of an ADD that did not finish");
        }
        self.wired = true;
        let host_end = self.host.create_pair(&attachment, mtu, &self.container)?;
        let (container_end, routes) = self.container.configure(&attachment, &host_end)?;
        self.daemon.activate(&attachment.id)?;
        let (bridge, host_end) = self.check_host_end(&host_end)?;
        self.wait_for_carrier();
        let gateways = [attachment.gateway_ipv4.into(), attachment.gateway_ipv6.into()];
        let ips = addresses(&attachment).into_iter().zip(gateways);
        Ok(Attached {
            interfaces: vec![
                interface(&bridge, None)?,
                interface(&host_end, None)?,
                interface(&container_end, Some(&self.command.netns))?,
            ],
            ips: ips.map(|(address, gateway)| Ip { interface: 2, address, gateway }).collect(),
            routes: routes
                .iter()
                .filter_map(|route| next_hop(route).1.map(|gw| Route { dst: route.dst, gw }))
                .collect(),
            dns: self.command.attach.dns.clone(),
        })
    }

    /// The daemon was away when this attachment was last deleted, and has not noticed yet. Were the tombstone
    /// left, the daemon would release the new lease by it.
    fn finish_earlier_del(&self) -> Result<(), CniError> {
        let (id, state_dir) = (&self.command.id, &self.command.conf.state_dir);
        if tombstone::exists(state_dir, id) {
            self.daemon.detach(id)?;
            tombstone::remove(state_dir, id)?;
        }
        Ok(())
    }

    fn lease(&mut self) -> Result<Attachment, CniError> {
        let command = self.command;
        let request = AttachRequest {
            id: command.id.clone(),
            netns: command.netns.clone(),
            network: command.conf.name.clone(),
            pod: command.pod.clone(),
            netns_id: Some(self.container.netns_id()),
        };
        match self.daemon.attach(&request) {
            Ok(attachment) => {
                self.leased = true;
                Ok(attachment)
            }
            Err(error) => {
                // Without an answer there may be a lease. With a device of that name it may be one in use,
                // which only DEL may release.
                self.leased = error.may_have_worked() && self.host.link(&command.id.host_ifname())?.is_none();
                Err(error.into())
            }
        }
    }

    fn mtu(&self, attachment: &Attachment) -> u32 {
        match self.command.attach.mtu {
            Some(mtu) if mtu > attachment.mtu => {
                tracing::warn!(
                    mtu,
                    path_mtu = attachment.mtu,
                    "the configured MTU does not fit into the mesh's paths"
                );
                mtu
            }
            Some(mtu) => mtu,
            None => attachment.mtu,
        }
    }

    /// The daemon has said so; the kernel is asked all the same.
    fn check_host_end(&mut self, made: &Link) -> Result<(Link, Link), CniError> {
        let wrong = |what: String| CniError::new(Code::Daemon, format!("after activation by meshd, {what}"));
        let Some(bridge) = self.host.link(BRIDGE)? else {
            return Err(wrong(format!("there is no bridge {BRIDGE}")));
        };
        let Some(link) = self.host.link(&made.name)?.filter(|link| link.index == made.index) else {
            return Err(wrong(format!("{} is gone", made.name)));
        };
        if link.master != Some(bridge.index) {
            return Err(wrong(format!("{} is not a port of {BRIDGE}", made.name)));
        }
        self.host.set_up(&link)?;
        Ok((bridge, link))
    }

    fn wait_for_carrier(&mut self) {
        let (ifname, give_up) = (self.command.id.ifname(), Instant::now() + CARRIER_LIMIT);
        while Instant::now() < give_up {
            match self.container.link(ifname) {
                Ok(Some(link)) if !link.carrier => std::thread::sleep(Duration::from_millis(1)),
                Ok(_) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot see whether the interface has a carrier");
                    return;
                }
            }
        }
        tracing::warn!(interface = ifname, "no carrier yet");
    }

    fn unwire(&mut self) -> Result<(), CniError> {
        let rules = match self.container.link(self.command.id.ifname()) {
            Ok(Some(link)) => self.container.delete_rules(link.index),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        // The device goes even when its rules cannot; without it they lead nowhere.
        self.host.delete(&self.command.id.host_ifname())?;
        rules
    }

    /// Takes back what was done, last things first. What cannot be taken back is added to the error.
    fn undo(&mut self, mut error: CniError) -> CniError {
        let (id, state_dir) = (&self.command.id, &self.command.conf.state_dir);
        if self.wired {
            match self.unwire() {
                Ok(()) => {}
                // As long as the device is there, the container can use its addresses: they stay leased.
                Err(failure) => return error.with_details(format!("and undoing failed: {failure}")),
            }
        }
        if self.leased {
            self.daemon.extend(UNDO_LIMIT);
            if let Err(failure) = self.daemon.detach(id) {
                error = error.with_details(format!("and the lease could not be released at once: {failure}"));
                if let Err(failure) = tombstone::write(state_dir, id) {
                    error = error.with_details(failure.to_string());
                }
            }
        }
        error
    }
}

fn interface(link: &Link, sandbox: Option<&str>) -> Result<Interface, CniError> {
    let Some(mac) = link.mac else {
        return Err(CniError::new(Code::Kernel, format!("{} has no Ethernet address", link.name)));
    };
    Ok(Interface {
        name: link.name.clone(),
        mac: MacAddr(mac.0),
        mtu: link.mtu,
        sandbox: sandbox.map(str::to_owned),
    })
}
