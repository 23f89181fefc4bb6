//! Chaos: what goes wrong, when, and when it is mended.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_keys::NodeId;

use crate::evil;
use crate::host::Host;
use crate::model::SECRET;
use crate::nat::NatKind;
use crate::queue::Event;
use crate::settings::Fault;
use crate::world::World;

/// The end of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relief {
    /// A host is started again.
    Start,
    /// All cuts end.
    Heal,
    /// The network loses no more than before.
    Quiet,
    /// A host is as fast as before.
    Hasten,
    /// A disk takes files again.
    Disk,
}

impl World {
    /// Founds a cluster of `nodes` hosts that start within a few seconds of each other.
    pub fn found(&mut self) {
        let nodes = self.settings.nodes;
        let seeds: Vec<usize> = (0..nodes).collect();
        for at in 0..nodes {
            let nat = if at > 2 { self.some_nat() } else { None };
            self.add_host(seeds.clone(), SECRET, nat);
            let after = self.dice.span(Duration::ZERO, Duration::from_secs(3));
            self.queue.put(after, at, 0, Event::Relief(Relief::Start));
            self.populate(at);
        }
        self.run(Duration::from_secs(20));
        // Decision 7: the first host of the list could found a second cluster if it lost its disk while it reaches
        // nobody. Its operator now gives it another list.
        if let Some(host) = self.hosts.first_mut() {
            host.seeds.rotate_left(1);
        }
    }

    /// Faults happen for the time of the settings.
    pub fn chaos(&mut self) {
        if !self.settings.faults.is_empty() {
            self.queue.put(Duration::ZERO, 0, 0, Event::Fault);
        }
        self.run(self.settings.span);
        self.settings.faults.clear();
    }

    pub(crate) fn next_fault(&mut self) {
        let Some(fault) = self.dice.pick(&self.settings.faults) else { return };
        let pause = self.dice.span(Duration::ZERO, self.settings.fault_pause * 2);
        self.queue.put(pause, 0, 0, Event::Fault);
        let hosts: Vec<usize> = self.running();
        if let Some(at) = self.dice.pick(&hosts)
            && self.dice.chance(3_000)
        {
            self.back_up(at);
        }
        if let Some(at) = self.dice.pick(&hosts) {
            self.fault(fault, at);
        }
    }

    /// The hosts whose daemons run, adversaries left out.
    pub fn running(&self) -> Vec<usize> {
        self.hosts.iter().filter(|host| host.process.is_some() && !host.evil).map(|host| host.at).collect()
    }

    fn later(&mut self, at: usize, least: u64, most: u64, relief: Relief) {
        let after = self.dice.seconds(least, most);
        self.queue.put(after, at, 0, Event::Relief(relief));
    }

    /// A fault happens, to a host if it is about one.
    pub fn fault(&mut self, fault: Fault, at: usize) {
        let now = self.queue.now;
        match fault {
            Fault::Kill => {
                self.say(format!("host{at}: daemon killed"));
                self.kill(at);
                self.later(at, 0, 15, Relief::Start);
            }
            Fault::PowerLoss => {
                self.say(format!("host{at}: power lost"));
                self.power_off(at);
                self.later(at, 1, 60, Relief::Start);
            }
            // With the last disk the cluster is gone.
            Fault::LostDisk if !self.is_elsewhere(at) => {}
            Fault::LostDisk => {
                self.say(format!("host{at} ({}): disk lost", self.hosts[at].id().short()));
                self.power_off(at);
                self.wipe(at);
                self.later(at, 1, 60, Relief::Start);
            }
            Fault::OldDisk => self.restore(at),
            Fault::ClonedDisk => self.clone_disk(at),
            Fault::FullDisk => {
                self.say(format!("host{at}: disk full"));
                self.hosts[at].disk_full = true;
                self.later(at, 1, 20, Relief::Disk);
            }
            Fault::Partition => {
                let count = 2 + self.dice.below(2);
                let parts: BTreeMap<usize, usize> =
                    (0..self.hosts.len()).map(|host| (host, self.dice.below(count))).collect();
                self.say(format!("network splits: {parts:?}"));
                self.network.split(parts, now);
                self.network_changed();
                self.later(at, 5, 90, Relief::Heal);
            }
            Fault::OneWayCut => {
                let to = self.dice.below(self.hosts.len());
                self.say(format!("nothing gets from host{at} to host{to}"));
                self.network.cut(at, to, now);
                self.network_changed();
                self.later(at, 5, 60, Relief::Heal);
            }
            Fault::Loss => {
                self.network.lose_more(2_000);
                self.later(at, 5, 30, Relief::Quiet);
            }
            Fault::Slow => {
                let late = self.dice.seconds(1, 5);
                self.say(format!("host{at} is slow"));
                self.network.slow_down(at, late);
                self.later(at, 5, 60, Relief::Hasten);
            }
            Fault::Outsider => self.overhear_all(),
            Fault::ClockStep => self.step_clock(at),
            Fault::JoinWindow => self.set_join_window(at),
            Fault::Token => self.join_by_token(at),
            Fault::NatReboot => {
                self.say("the NATs forget their mappings".to_owned());
                self.network.reboot_nats();
            }
            Fault::Join => self.join_one(SECRET),
            Fault::Intruder => self.join_one(SECRET + 1),
            Fault::Remove => self.remove_one(at),
            Fault::Evil => {
                let evil = self.hosts.iter().filter(|host| host.evil).count();
                // The founder's word is the root of all: if it lies, no address is safe, by design.
                if at != 0 && evil * 6 < self.settings.nodes {
                    let adversary = evil::any(&mut self.dice);
                    self.turn_evil(at, adversary);
                }
            }
        }
    }

    /// Whether the cluster is on the disk of another host, too, and that is a member.
    pub(crate) fn is_elsewhere(&self, at: usize) -> bool {
        let has_it =
            |host: &Host| !host.evil && host.disk.is_of_a_member() && !self.model.out().contains(&host.id());
        self.hosts.iter().any(|host| host.at != at && has_it(host))
    }

    fn restore(&mut self, at: usize) {
        let count = self.hosts[at].backups.len();
        if count == 0 {
            return;
        }
        let which = self.dice.below(count);
        // The host may run on, and its pods with it: only the daemon is stopped.
        let runs_on = self.dice.chance(5_000);
        let how = if runs_on { ", while its pods run" } else { "" };
        self.say(format!("host{at} ({}): disk put back to an older state{how}", self.hosts[at].id().short()));
        if runs_on {
            self.kill(at);
            self.hosts[at].put_back = true;
        } else {
            self.power_off(at);
        }
        self.hosts[at].disk = self.hosts[at].backups[which].clone();
        self.model.rest_is_forgotten(at);
        self.later(at, 1, 30, Relief::Start);
    }

    fn clone_disk(&mut self, at: usize) {
        if self.clones * 8 >= self.settings.nodes || self.hosts.len() >= self.settings.most_hosts() {
            return;
        }
        self.clones += 1;
        let token = self.hosts[at].token.clone();
        let (seeds, backups) = (self.hosts[at].seeds.clone(), self.hosts[at].backups.clone());
        let disk = match self.dice.below(2 + backups.len()) {
            0 | 1 => self.hosts[at].disk.clone(),
            which => backups[which - 2].clone(),
        };
        // Whoever copies the disk copies the key file with it.
        let copy = self.add_host(seeds, self.hosts[at].secret, None);
        self.hosts[copy].disk = disk;
        self.hosts[copy].token = token;
        let alone = self.dice.chance(5_000);
        let place = if alone { ", which reaches nobody" } else { "" };
        self.say(format!("host{copy} starts with a copy of the disk of host{at}{place}"));
        if alone {
            self.network.isolate(copy, self.queue.now);
            self.later(at, 20, 120, Relief::Heal);
        }
        self.start(copy);
        self.populate(copy);
    }

    fn join_one(&mut self, secret: u8) {
        if let Some(at) = self.newcomer(secret) {
            self.say(format!(
                "host{at} starts{}",
                if secret == SECRET { "" } else { ", without the secret" }
            ));
            self.start(at);
            self.populate(at);
        }
    }

    /// A new host, not started yet, if there may be one more.
    pub(crate) fn newcomer(&mut self, secret: u8) -> Option<usize> {
        if self.hosts.len() >= self.settings.most_hosts() {
            return None;
        }
        let seeds = (0..self.settings.nodes).collect();
        let nat = self.some_nat();
        Some(self.add_host(seeds, secret, nat))
    }

    /// A host has a NAT in front of it, of any kind, or none.
    fn some_nat(&mut self) -> Option<NatKind> {
        let kinds: Vec<NatKind> = NatKind::all().collect();
        self.dice.chance(self.settings.network.nat).then(|| self.dice.pick(&kinds))?
    }

    fn remove_one(&mut self, by: usize) {
        if self.dice.chance(2_000) {
            self.ask_leave(by);
            return;
        }
        let lost: Vec<NodeId> = self.lost(by);
        let subject = match self.dice.pick(&lost) {
            Some(lost) => lost,
            None if self.dice.chance(3_000) => {
                let others: Vec<usize> = self.running().into_iter().filter(|host| *host != by).collect();
                match self.dice.pick(&others) {
                    Some(other) => self.hosts[other].id(),
                    None => return,
                }
            }
            None => return,
        };
        self.say(format!("host{by} is to remove {}", subject.short()));
        self.ask_removal(by, subject);
    }

    /// Members by the account of a host that no disk holds any more.
    pub fn lost(&self, by: usize) -> Vec<NodeId> {
        let Some(view) = self.view(by) else { return Vec::new() };
        let held: Vec<NodeId> =
            self.hosts.iter().filter(|host| !host.retired).map(|host| host.id()).collect();
        view.admissions().members().map(|(id, _)| *id).filter(|id| !held.contains(id)).collect()
    }

    pub(crate) fn network_changed(&mut self) {
        self.links.network_changed(&self.network, &mut self.queue, &mut self.dice);
    }

    pub(crate) fn relieve(&mut self, at: usize, relief: Relief) {
        match relief {
            Relief::Start => {
                if self.hosts[at].process.is_none() {
                    self.say(format!("host{at} starts"));
                    self.start(at);
                }
            }
            Relief::Heal => {
                self.say("network heals".to_owned());
                self.network.heal(self.queue.now);
                self.network_changed();
            }
            Relief::Quiet => self.network.lose_more(0),
            Relief::Hasten => self.network.slow_down(at, Duration::ZERO),
            Relief::Disk => self.hosts[at].disk_full = false,
        }
    }
}
