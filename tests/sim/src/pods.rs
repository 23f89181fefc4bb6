//! The container runtime of each host: pods come and go, and sometimes a DEL is missed.

use std::net::IpAddr;
use std::time::Duration;

use mesh_core::api::{ApiError, AttachRequest, AttachmentId};
use mesh_core::node::{Request, RequestId, Response};
use mesh_keys::{JoinWindow, NodeId};

use crate::host::Pod;
use crate::queue::Event;
use crate::settings::Chance;
use crate::world::World;

/// Most pods of a host: more than two blocks hold.
const MOST_PODS: usize = 90;

/// Pods that go without a DEL.
const MISSED: Chance = 1_000;

/// What a request was for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// An address for a pod.
    Attach(AttachmentId),
    /// The pod may talk.
    Activate(AttachmentId),
    /// The pod is gone.
    Detach,
    /// A member is removed.
    Remove(NodeId),
    /// The node leaves, or stays after all.
    Leave,
    /// Who may join, and when.
    Decide,
    /// What the removal of a member has to say.
    RemovalPlan(NodeId),
    /// What is said of joining, before something else is said.
    JoinWindow(JoinWindow),
}

impl World {
    /// Pods come and go on a host from now on.
    pub fn populate(&mut self, at: usize) {
        if !self.settings.pod_pause.is_zero() {
            let first = self.dice.span(Duration::ZERO, self.settings.pod_pause * 2);
            self.queue.put(first, at, 0, Event::Pods);
        }
    }

    pub(crate) fn pods_move(&mut self, at: usize) {
        if self.settings.pod_pause.is_zero() {
            return;
        }
        // Some hosts are busier than others.
        let pause = self.settings.pod_pause * (1 + u32::try_from(at % 3).unwrap_or(0)) / 2;
        let pause = self.dice.span(Duration::ZERO, pause * 2);
        self.queue.put(pause, at, 0, Event::Pods);
        if !self.hosts[at].powered {
            return;
        }
        let ready: Vec<AttachmentId> = self.hosts[at]
            .pods
            .iter()
            .filter(|(_, pod)| pod.waits.is_none())
            .map(|(id, _)| id.clone())
            .collect();
        let add = self.hosts[at].pods.len() < MOST_PODS && (ready.is_empty() || self.dice.chance(6_000));
        if add {
            if self.hosts[at].process.is_some() {
                self.attach(at);
            }
        } else if !ready.is_empty() {
            let id = ready[self.dice.below(ready.len())].clone();
            let missed = self.dice.chance(MISSED);
            self.delete(at, &id, missed);
        }
    }

    /// Starts a pod on a host; its name.
    pub fn attach(&mut self, at: usize) -> Option<AttachmentId> {
        self.pod_names += 1;
        let id = AttachmentId::new(format!("h{at}p{}", self.pod_names), "eth0").ok()?;
        let request = AttachRequest {
            id: id.clone(),
            netns: format!("/run/netns/{}", self.pod_names),
            network: "mesh".to_owned(),
            pod: None,
            netns_id: None,
        };
        let name = RequestId(self.requests + 1);
        let pod = Pod { addresses: Vec::new(), waits: Some(name), leaving: false };
        self.hosts[at].pods.insert(id.clone(), pod);
        self.ask(at, Request::Attach(request), Asked::Attach(id.clone()));
        Some(id)
    }

    /// A pod ends. The runtime tells the daemon, unless it misses that; while the daemon is away, the plugin leaves
    /// a note.
    pub fn delete(&mut self, at: usize, id: &AttachmentId, missed: bool) {
        let Some(pod) = self.hosts[at].pods.remove(id) else { return };
        for address in pod.addresses {
            self.model.ends(at, address);
        }
        let host = &mut self.hosts[at];
        if missed {
            host.forgotten.insert(id.clone());
        } else if host.process.is_some() {
            self.ask(at, Request::Detach(id.clone()), Asked::Detach);
        } else {
            host.tombstones.push(id.clone());
        }
    }

    /// All pods of all hosts end.
    pub(crate) fn end_all_pods(&mut self) {
        for at in 0..self.hosts.len() {
            let ids: Vec<AttachmentId> = self.hosts[at].pods.keys().cloned().collect();
            ids.iter().for_each(|id| self.delete(at, id, false));
        }
    }

    /// The daemon is gone: requests that are under way fail, and the runtime deletes these pods.
    pub(crate) fn pods_lose_daemon(&mut self, at: usize) {
        let failed: Vec<AttachmentId> = self.hosts[at]
            .pods
            .iter()
            .filter(|(_, pod)| pod.waits.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for id in failed {
            self.delete(at, &id, false);
        }
    }

    pub(crate) fn answered(&mut self, at: usize, name: RequestId, answer: Result<Response, ApiError>) {
        let Some(asked) = self.asked.remove(&name) else { return };
        match (asked, answer) {
            (Asked::Attach(id), Ok(Response::Attachment(attachment))) => {
                let addresses = [IpAddr::V4(attachment.ipv4), IpAddr::V6(attachment.ipv6)];
                let Some(pod) = self.hosts[at].pods.get_mut(&id) else { return };
                pod.addresses = addresses.to_vec();
                for address in addresses {
                    self.begins(at, address, true);
                }
                let next = RequestId(self.requests + 1);
                if let Some(pod) = self.hosts[at].pods.get_mut(&id) {
                    pod.waits = Some(next);
                }
                self.ask(at, Request::Activate(id.clone()), Asked::Activate(id));
            }
            (Asked::Activate(id), Ok(_)) => {
                if let Some(pod) = self.hosts[at].pods.get_mut(&id) {
                    pod.waits = None;
                }
            }
            (Asked::Attach(id), Err(_)) => {
                self.hosts[at].pods.remove(&id);
            }
            (Asked::Activate(id), Err(_)) => self.delete(at, &id, false),
            (Asked::Remove(id), Ok(_)) => self.say(format!("host{at} has removed {}", id.short())),
            (Asked::Remove(id) | Asked::RemovalPlan(id), Err(error)) => {
                self.say(format!("host{at} cannot remove {}: {error}", id.short()));
            }
            (Asked::Leave, Err(error)) => self.say(format!("host{at} cannot leave: {error}")),
            (Asked::Decide | Asked::JoinWindow(_), Err(error)) => {
                self.say(format!("host{at} cannot decide that: {error}"))
            }
            (asked @ (Asked::RemovalPlan(_) | Asked::JoinWindow(_)), Ok(answer)) => {
                self.prepared(at, &asked, &answer);
            }
            (Asked::Attach(_) | Asked::Decide | Asked::Leave, Ok(_)) | (Asked::Detach, _) => {}
        }
    }
}
