//! CHECK: is everything still as ADD left it?

use std::time::{Duration, Instant};

use mesh_core::api::{Attachment, AttachmentState, BRIDGE, ErrorCode};
use mesh_sys::rtnl::{Link, Mac};

use crate::daemon::{Daemon, DaemonError};
use crate::error::{CniError, Code};
use crate::invocation::AddCommand;
use crate::wiring::{Container, Host};

/// For the whole operation.
const LIMIT: Duration = Duration::from_secs(10);

/// How long a restarting daemon may take to have everything in place again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Compares the kernel and the daemon with the previous result.
///
/// What later plugins of a chain may have changed is not held against them: the address of the interface is
/// the one that the result names, and more addresses and routes than ours are fine.
///
/// # Errors
/// Code 104 with everything that is missing; 8 and 11 when it cannot be found out.
pub(crate) fn check(command: &AddCommand) -> Result<(), CniError> {
    let (id, conf) = (&command.id, &command.conf);
    let Some(prev) = &command.attach.prev_result else {
        return Err(CniError::new(Code::InvalidConfig, "config field \"prevResult\": missing"));
    };
    let mut problems = Vec::new();
    let mut container = Container::open(&command.netns)?;
    let listed = prev.container_interface(id.ifname(), &command.netns);
    if listed.is_none() {
        problems.push(format!("prevResult does not list {} in {}", id.ifname(), command.netns));
    }
    let attachment = active(&Daemon::new(&conf.socket, PATIENCE, LIMIT)?, command)?;
    match container.link(id.ifname())? {
        None => problems.push(format!("there is no interface {} in {}", id.ifname(), command.netns)),
        Some(link) => {
            let reported = listed.map(|(_, interface)| interface.mac.as_str()).unwrap_or_default();
            if let Some(problem) = wrong_mac(&link, reported, &attachment) {
                problems.push(problem);
            }
            if !link.up {
                problems.push(format!("{} is down", link.name));
            }
            let addresses: Vec<_> = listed.map(|(i, _)| prev.addresses_of(i).collect()).unwrap_or_default();
            problems.extend(
                container.missing(&attachment, &link, &addresses, |dst, gw| prev.lists_route(dst, gw))?,
            );
            problems.extend(host_problems(&attachment, &link)?);
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let first = problems.remove(0);
    Err(problems
        .into_iter()
        .fold(CniError::new(Code::Changed, format!("{id}: {first}")), CniError::with_details))
}

/// The attachment as the daemon knows it, once it is active.
fn active(daemon: &Daemon, command: &AddCommand) -> Result<Attachment, CniError> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let problem = match daemon.attachment(&command.id) {
            Ok(attachment) => match attachment.state {
                AttachmentState::Active => return Ok(attachment),
                AttachmentState::Leased => {
                    CniError::new(Code::Changed, format!("{}: meshd has not activated it", command.id))
                }
            },
            Err(DaemonError::Refused(error)) if error.code == ErrorCode::NotFound => {
                return Err(CniError::new(Code::Changed, format!("{}: meshd does not know it", command.id)));
            }
            Err(error) if error.is_away() => error.into(),
            Err(error) => return Err(error.into()),
        };
        if Instant::now() >= give_up {
            return Err(problem);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wrong_mac(link: &Link, reported: &str, attachment: &Attachment) -> Option<String> {
    let expected = match reported.parse::<Mac>() {
        Ok(mac) => mac,
        Err(_) => Mac(attachment.mac.0),
    };
    if link.mac == Some(expected) {
        if expected.0 != attachment.mac.0 {
            tracing::warn!(interface = link.name, %expected, leased = %attachment.mac, "another plugin has changed the Ethernet address; the host accepts frames from the leased one only");
        }
        return None;
    }
    let found = link.mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string());
    Some(format!("the Ethernet address of {} is {found}, not {expected}", link.name))
}

fn host_problems(attachment: &Attachment, container_end: &Link) -> Result<Vec<String>, CniError> {
    let mut host = Host::open()?;
    let name = &attachment.host_ifname;
    let Some(link) = host.link(name)? else {
        return Ok(vec![format!("there is no host interface {name}")]);
    };
    let bridge = host.link(BRIDGE)?;
    let mut problems = Vec::new();
    if link.peer_index != Some(container_end.index) {
        problems.push(format!("{name} is not the other end of {}", container_end.name));
    }
    if bridge.is_none_or(|bridge| link.master != Some(bridge.index)) {
        problems.push(format!("{name} is not a port of {BRIDGE}"));
    } else if !link.port.is_some_and(|port| port.isolated) {
        problems.push(format!("{name} is not an isolated port of {BRIDGE}"));
    }
    if !link.up {
        problems.push(format!("{name} is down"));
    }
    Ok(problems)
}
