//! What must hold at every moment, whatever happens.
//!
//! * **P2**: no address is in use at two hosts at once. In use is what a pod was leased, from the answer of the
//!   daemon until the pod ends or its host loses power, whatever the daemon does meanwhile; and a node's own address,
//!   as long as the kernel has it. Two copies of one disk have the same own address by nature: that alone is not
//!   counted. Whoever was removed is no member: nobody routes to it, and what it uses is not counted, from the
//!   moment in which an honest member knows.
//! * **P2** also: nobody but a member that lies grants a range twice, copies of disks included.
//! * **P3**: whatever an honest node believes of an honest node, that one has signed; nobody is let in by an honest
//!   node without the secret; who is known to be removed stays so.
//! * **P2** also: what a node has leased lies within what is its own by its own account, so that nobody gives away a block
//!   that is in use; no two pods of a host have the same address; and an address that a pod of a host had is given to no
//!   other pod there for 60 s.
//! * **P3** also: nobody is removed that no operator wanted out, and in an anchored cluster only by the admin key; nobody is let in while joining is closed, or by a token
//!   that has ended, by the clock of the one who lets it in.
//! * A node never sends a range to two peers, nor to a member that it knows to be removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use mesh_core::host::HostState;
use mesh_core::leases::QUARANTINE;
use mesh_core::time::Time;
use mesh_core::view::{Grant, NodeRecord, Promises, Reclaim};
use mesh_keys::{Admission, BodyId, IdentityKey, NodeId, Removal, Signable, Signed, memo};

use crate::clocks;
use crate::host::Host;

/// The key file of the cluster.
pub const SECRET: u8 = 7;

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    /// When it was seen.
    pub at: Time,
    /// What is broken.
    pub promise: &'static str,
    /// A sentence.
    pub text: String,
}

/// Another host that uses the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clash {
    /// The host.
    pub host: usize,
    /// Since when.
    pub since: Time,
    /// Whether the two hosts have copies of one disk.
    pub same_disk: bool,
}

#[derive(Clone, Copy, Debug)]
struct Use {
    id: NodeId,
    pod: bool,
    since: Time,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    id: NodeId,
    host: usize,
    /// It has the secret of the cluster.
    invited: bool,
    evil: bool,
}

/// The reference model.
#[derive(Default)]
pub struct Model {
    /// What is broken; at most [`MOST_BREACHES`].
    pub breaches: Vec<Breach>,
    /// Clashes over addresses that a lying member had in hand: it can give them to two.
    pub by_liars: usize,
    uses: BTreeMap<IpAddr, BTreeMap<usize, Use>>,
    known: BTreeMap<IdentityKey, Known>,
    good: BTreeSet<BodyId>,
    out: BTreeSet<NodeId>,
    /// Ranges that a lying member granted.
    tainted: BTreeSet<Ipv4Net>,
    /// The admin key of an anchored cluster.
    admin: Option<IdentityKey>,
    /// Whom operators wanted out.
    unwanted: BTreeSet<NodeId>,
    /// When the last pod with an address ended, by host.
    ended: BTreeMap<(usize, IpAddr), (NodeId, Time)>,
    /// The virtual clock.
    pub(crate) clock: Time,
}

/// Breaches that are noted.
pub const MOST_BREACHES: usize = 20;

impl Model {
    /// Nothing has happened yet, in a cluster with this admin key or in a flat one.
    pub fn new(admin: Option<IdentityKey>) -> Self {
        Self { admin, ..Self::default() }
    }

    /// Notes a breach.
    pub fn breach(&mut self, at: Time, promise: &'static str, text: String) {
        let known = self.breaches.iter().any(|breach| breach.promise == promise && breach.text == text);
        if !known && self.breaches.len() < MOST_BREACHES {
            self.breaches.push(Breach { at, promise, text });
        }
    }

    /// There is a host with this identity.
    pub fn meet(&mut self, host: &Host) {
        let known = Known { id: host.id(), host: host.at, invited: host.secret == SECRET, evil: host.evil };
        self.known.entry(host.disk.identity.public()).or_insert(known);
    }

    /// A host turns against the others.
    pub fn turns_evil(&mut self, host: &Host) {
        if let Some(known) = self.known.get_mut(&host.disk.identity.public()) {
            known.evil = true;
        }
    }

    /// An operator wants a member out.
    pub(crate) fn may_go(&mut self, subject: NodeId) {
        self.unwanted.insert(subject);
    }

    /// The members that honest members know to be out.
    pub fn out(&self) -> &BTreeSet<NodeId> {
        &self.out
    }

    // Addresses.

    /// An address is in use; who else uses it.
    pub fn begins(&mut self, host: usize, id: NodeId, address: IpAddr, pod: bool) -> Vec<Clash> {
        let since = self.clock;
        if pod {
            let rested = self.ended.remove(&(host, address)).filter(|(before, _)| *before == id);
            if let Some((_, ended)) = rested.filter(|(_, ended)| since.since(*ended) < QUARANTINE) {
                let rest = since.since(ended).as_secs_f64();
                self.breach(
                    since,
                    "P2: rest",
                    format!("{address} is leased again at host{host} after {rest:.1} s"),
                );
            }
        }
        let users = self.uses.entry(address).or_default();
        if users.get(&host).is_some_and(|user| user.id == id && (pod || user.pod)) {
            let text = format!("{address} is leased at host{host}, where it is in use already");
            self.breaches.push(Breach { at: since, promise: "P2", text });
        }
        let users = self.uses.entry(address).or_default();
        let mut clashes = Vec::new();
        for (other, user) in users.iter().filter(|(other, _)| **other != host) {
            let same_disk = user.id == id;
            let counted = !self.out.contains(&user.id) && !self.out.contains(&id);
            if counted && (pod || user.pod || !same_disk) {
                clashes.push(Clash { host: *other, since: user.since, same_disk });
            }
        }
        users.insert(host, Use { id, pod, since });
        let tainted = matches!(address, IpAddr::V4(v4) if self.tainted(v4));
        if tainted && !clashes.is_empty() {
            self.by_liars += 1;
            return Vec::new();
        }
        clashes
    }

    fn tainted(&self, address: Ipv4Addr) -> bool {
        self.tainted.iter().any(|net| net.contains(&address))
    }

    /// A host uses an address no longer.
    pub fn ends(&mut self, host: usize, address: IpAddr) {
        if let Some(users) = self.uses.get_mut(&address) {
            if let Some(user) = users.remove(&host).filter(|user| user.pod) {
                self.ended.insert((host, address), (user.id, self.clock));
            }
            if users.is_empty() {
                self.uses.remove(&address);
            }
        }
    }

    /// A host has lost power.
    pub fn all_end(&mut self, host: usize) {
        let (clock, ended) = (self.clock, &mut self.ended);
        self.uses.retain(|address, users| {
            if let Some(user) = users.remove(&host).filter(|user| user.pod) {
                ended.insert((host, *address), (user.id, clock));
            }
            !users.is_empty()
        });
    }

    /// The disk of a host is an older one: what rests now is not on it. A start from a disk of the start before it has
    /// the highest generation, and so passes for one that goes on.
    pub(crate) fn rest_is_forgotten(&mut self, host: usize) {
        self.ended.retain(|(at, _), _| *at != host);
    }

    // Routes.

    /// A node wants its kernel so.
    pub fn wants(&mut self, host: &Host, state: &HostState, now: Time) {
        let Some(view) = host.node().and_then(|node| node.view()) else { return };
        if host.evil {
            return;
        }
        if state.lanes.values().all(|lane| lane.peers.is_empty()) {
            return;
        }
        let me = host.id();
        let lanes: BTreeSet<_> = view
            .records()
            .filter(|(id, _)| **id != me)
            .flat_map(|(_, record)| record.lanes.iter().map(|lane| lane.key))
            .collect();
        let mut found = Vec::new();
        for (device, lane) in &state.lanes {
            let mut ranges: Vec<(bool, u128, u128, IpNet)> = Vec::new();
            for (key, peer) in &lane.peers {
                if !lanes.contains(key) {
                    found.push(format!("host{} has a peer on {device} that is no member", host.at));
                }
                ranges.extend(peer.allowed_ips.iter().map(|net| {
                    let (first, last) = bounds(net);
                    (net.addr().is_ipv4(), first, last, *net)
                }));
            }
            ranges.sort_unstable();
            for pair in ranges.windows(2) {
                if pair[0].0 == pair[1].0 && pair[1].1 <= pair[0].2 {
                    let (one, other) = (pair[0].3, pair[1].3);
                    found.push(format!("host{} sends {one} and {other} to two peers", host.at));
                }
            }
        }
        found.into_iter().for_each(|text| self.breach(now, "one peer for each range", text));
    }

    // Statements.

    /// A node's view has changed.
    pub fn believes(&mut self, host: &mut Host, now: Time) {
        let (at, evil) = (host.at, host.evil);
        let Some(process) = host.process.as_mut() else { return };
        let Some(view) = process.node.view() else { return };
        if evil {
            return;
        }
        let mut strays = Vec::new();
        let own = view.grants().owned_by(&host.disk.identity.public());
        let members = view.admissions();
        if members.contains(&host.disk.identity.public()) {
            let leases = process.node.leases().map(|(_, lease)| lease.ipv4);
            strays.extend(leases.filter(|address| !own.contains(*address)));
        }
        let merged = std::mem::replace(&mut process.judged, view.merged_so_far());
        let delta = view.merged_since(merged).unwrap_or_else(|| view.to_delta());
        let changed = delta.admissions.len() + delta.removals.len() > 0;
        for (key, known) in self.known.iter().filter(|_| changed) {
            if members.was_admitted(key) && !members.contains(key) {
                process.removed.insert(known.id);
                self.out.insert(known.id);
            } else if members.contains(key) && process.removed.contains(&known.id) {
                let text =
                    format!("host{at} knew host{} to be removed, and takes it for a member", known.host);
                self.breaches.push(Breach { at: now, promise: "P3", text });
            }
        }
        let conflicts: Vec<String> = view
            .grants()
            .conflicts()
            .iter()
            .filter(|conflict| {
                let granter = self.known.values().find(|known| known.id == conflict.granter);
                granter.is_none_or(|known| !known.evil)
            })
            .map(|conflict| format!("{} granted {} twice", conflict.granter.short(), conflict.range))
            .collect();
        let unseen = |item: &&Signed<Admission>| !self.good.contains(&item.id());
        let wrongly: Vec<String> = delta
            .admissions
            .iter()
            .filter(unseen)
            .filter_map(|item| clocks::wrongly_admitted(host, item, now))
            .collect();
        wrongly.into_iter().for_each(|text| self.breach(now, "P3: joining", format!("host{at}: {text}")));
        for item in &delta.admissions {
            self.check(item, at, now, |admission: &Admission| admission.sponsor);
            self.check_invited(item, at, now);
        }
        for item in &delta.grants {
            self.check(item, at, now, |grant: &Grant| grant.from);
            if let Ok(grant) = item.decode()
                && self.known.get(&grant.from).is_none_or(|known| known.evil)
                && let Ok(net) = Ipv4Net::new(grant.network, grant.prefix)
            {
                self.tainted.insert(net);
            }
        }
        for item in &delta.records {
            self.check(item, at, now, |record: &NodeRecord| record.node);
        }
        for item in &delta.removals {
            self.check(item, at, now, |removal: &Removal| removal.signer);
            let Ok(removal) = item.decode() else { continue };
            let who = removal.subject.node_id().short();
            self.check_authority(removal.signer, at, now);
            if !self.unwanted.contains(&removal.subject.node_id()) {
                self.breach(
                    now,
                    "P3",
                    format!("host{at} takes {who} for removed, which no operator wanted out"),
                );
            }
        }
        let policies = delta.policies.iter().filter_map(|item| Some(item.decode().ok()?.signer));
        let tokens = delta.tokens.iter().filter_map(|item| Some(item.decode().ok()?.signer));
        let revocations = delta.revocations.iter().filter_map(|item| Some(item.decode().ok()?.signer));
        for signer in policies.chain(tokens).chain(revocations) {
            self.check_authority(signer, at, now);
        }
        for item in &delta.reclaims {
            self.check(item, at, now, |reclaim: &Reclaim| reclaim.to);
        }
        for item in &delta.promises {
            self.check(item, at, now, |promises: &Promises| promises.node);
        }
        conflicts.into_iter().for_each(|text| self.breach(now, "P2: one grant of a range", text));
        // A member that lies can take back what it has granted.
        strays.retain(|address| !self.tainted(*address));
        for address in strays {
            let text = format!("host{at} has leased {address}, which is not its own any more");
            self.breach(now, "P2: given away", text);
        }
    }

    /// Who claims to have signed it, did.
    fn check<T: Signable>(
        &mut self,
        item: &Signed<T>,
        at: usize,
        now: Time,
        signer: impl Fn(&T) -> IdentityKey,
    ) {
        let id = item.id();
        if self.good.contains(&id) {
            return;
        }
        let Ok(body) = item.decode() else {
            return self.breach(now, "P3", format!("host{at} holds a {} that cannot be read", T::DOMAIN));
        };
        let signer = signer(&body);
        let made = match self.known.get(&signer) {
            None if self.admin == Some(signer) => memo::was_signed(&signer, T::DOMAIN, item.body()),
            Some(known) => known.evil || memo::was_signed(&signer, T::DOMAIN, item.body()),
            // An identity that an adversary made up.
            None => self.known.values().any(|known| known.evil),
        };
        if made {
            self.good.insert(id);
        } else {
            let who = signer.node_id().short();
            self.breach(now, "P3", format!("host{at} holds a {} that {who} has not signed", T::DOMAIN));
        }
    }

    /// In an anchored cluster some things are for the admin key to say.
    fn check_authority(&mut self, signer: IdentityKey, at: usize, now: Time) {
        if self.admin.is_some_and(|admin| admin != signer) {
            let who = signer.node_id().short();
            let text = format!("host{at} believes what {who} says, which only the admin key may");
            self.breach(now, "P3: authority", text);
        }
    }

    fn check_invited(&mut self, item: &Signed<Admission>, at: usize, now: Time) {
        let Ok(admission) = item.decode() else { return };
        let by_liar = self.known.get(&admission.sponsor).is_none_or(|known| known.evil);
        let invited = self.known.get(&admission.subject).is_some_and(|known| known.invited);
        if !by_liar && !invited {
            let who = admission.subject.node_id().short();
            self.breach(now, "P3", format!("host{at} takes {who} for a member, which has not the secret"));
        }
    }
}

fn bounds(net: &IpNet) -> (u128, u128) {
    match net {
        IpNet::V4(net) => (u32::from(net.network()).into(), u32::from(net.broadcast()).into()),
        IpNet::V6(net) => (net.network().into(), net.broadcast().into()),
    }
}
