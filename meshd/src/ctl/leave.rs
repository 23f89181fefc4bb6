//! `leave`: this node gives its addresses away and leaves the cluster.

use std::io::Write as _;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use hyper::Method;
use mesh_core::api::{LeaveStatus, Status};

use super::authority::confirm;
use super::{Client, print};

/// Pause between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct LeaveArguments {
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Do not wait until it is done; `meshctl status` says how far it is
    #[arg(long)]
    no_wait: bool,
    /// Stay after all: possible until the node is no member any more
    #[arg(long, conflicts_with_all = ["yes", "no_wait"])]
    cancel: bool,
}

pub(super) fn leave(client: &Client, how: &LeaveArguments) -> Result<ExitCode> {
    if how.cancel {
        client.order(Method::DELETE, "/v1/leave")?;
        return print("this node stays, and asks other members for addresses");
    }
    let status: Status = client.get("/v1/status")?;
    let Some(cluster) = &status.cluster else { bail!("this node is in no cluster yet") };
    if status.leave.is_none() && !how.yes {
        confirm(&format!(
            "{} ({}) leaves the cluster {} for good: its addresses go to another member, and no pod can be attached here any more. Leave?",
            status.node.name, status.node.id, cluster.name
        ))?;
    }
    if status.leave != Some(LeaveStatus::Left) {
        client.order(Method::POST, "/v1/leave")?;
    }
    if how.no_wait {
        return print("this node is leaving the cluster");
    }
    let mut shown = String::new();
    loop {
        let status: Status = client.get("/v1/status")?;
        match status.leave {
            Some(LeaveStatus::Left) => {
                return print("this node has left the cluster: stop meshd and remove its state directory");
            }
            Some(LeaveStatus::AddressesGiven) => {
                return print(&format!(
                    "the addresses of this node are in other hands; it is a member until an admin key says otherwise: `meshctl remove {} --admin-key-file FILE` on any member",
                    status.node.id
                ));
            }
            Some(LeaveStatus::Leaving { waiting_for }) => {
                // Without the seconds, which change all the time.
                let said: String = waiting_for.chars().filter(|c| !c.is_ascii_digit()).collect();
                if said != shown {
                    writeln!(std::io::stderr(), "waiting for {waiting_for}").context("standard error")?;
                    shown = said;
                }
            }
            None => bail!("somebody has decided that this node stays"),
        }
        thread::sleep(LOOK_EVERY);
    }
}
