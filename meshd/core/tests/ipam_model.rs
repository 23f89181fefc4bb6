//! Model check of address ownership: every order of events, up to a bound, with the production code as the nodes.
//!
//! Four members and a range of two blocks. Node 2 is the founder and owns both. A breadth-first search goes
//! through all interleavings of: an owner grants a block to another node; a node hears all that another one
//! knows, or only its grants (never hearing is a partition); node 0 removes node 2; node 1 loses its disk and comes back, under a new identity let in by any node that it finds; node 0
//! removes the identity that was lost; a node reclaims. What a node knows is a [`View`]; what it may use is
//! [`View::usable`] of its own view.
//!
//! What must hold in every state: **no block is used by two nodes that were not removed.**
//!
//! The last tests weaken one rule each, as known designs do, and must find the violation: a search that cannot
//! fail says nothing.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "what is not expected fails the test, and the figures are its result"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mesh_core::ranges::RangeSet;
use mesh_core::view::{Delta, Reclaim, View};
use mesh_keys::{BodyId, Genesis, GenesisFields, Identity, JoinMode, JoinModes, Signed, SignedAdmission};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng as _;

/// The node that removes, and is the heir.
const REMOVER: usize = 0;
/// The node that loses its disk.
const LOSER: usize = 1;
/// The node that is removed: the founder.
const REMOVED: usize = 2;
/// Nodes that run.
const NODES: usize = 4;
/// The identity with which the loser comes back.
const REBORN: usize = 4;

/// What the nodes do; the production rules unless weakened.
#[derive(Clone, Copy)]
struct Rules {
    /// An heir reclaims when everyone has promised, not as soon as it hears of the removal.
    wait_for_promises: bool,
    /// A member uses only what its promises allow, not all that grants give it.
    keep_promises: bool,
    /// Who lost its disk comes back under a new identity, not with the state of an old backup.
    new_identity: bool,
    /// Most grants.
    grants: u8,
    /// Whether the disk is lost at all.
    loss: bool,
}

const RULES: Rules =
    Rules { wait_for_promises: true, keep_promises: true, new_identity: true, grants: 2, loss: true };

/// Everything that differs between two moments. Views are numbered: equal ones have one number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    views: [u16; NODES],
    removed: bool,
    /// The loser has come back.
    reborn: bool,
    /// The lost identity was removed.
    lost_removed: bool,
    grants: u8,
}

#[derive(Clone, Copy, Debug)]
#[expect(dead_code, reason = "shown with a violation")]
enum Event {
    Grant { from: usize, to: usize, block: usize },
    Hear { at: usize, from: usize, what: What },
    Remove,
    LoseDisk { sponsor: usize },
    RemoveLost,
    Reclaim { at: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Everything,
    Grants,
}

/// What one node does by itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    Grant { from: usize, to: usize, block: usize },
    Remove { subject: usize },
    Reclaim { identity: usize },
}

struct Model {
    rules: Rules,
    identities: Vec<Identity>,
    views: Vec<View>,
    /// Each view, to be told.
    deltas: Vec<Delta>,
    numbers: BTreeMap<[u8; 32], u16>,
    /// Results of hearing: they depend on who hears, too, as it promises.
    heard: BTreeMap<(u16, u16, usize, What), u16>,
    /// Results of what a node does by itself; `None` when it cannot.
    done: BTreeMap<(u16, Deed), Option<u16>>,
    /// Results of joining anew: the views of the sponsor and of the new node.
    rejoined: BTreeMap<(u16, usize), Option<(u16, u16)>>,
    /// Which of the two blocks a node may use by a view.
    usable: BTreeMap<(u16, usize), [bool; 2]>,
    /// The view of the loser's backup.
    backup: u16,
}

struct Outcome {
    states: usize,
    views: usize,
    /// States in which the removed node's era has ended in some view.
    reclaimed: usize,
    /// The way to the first violation.
    violation: Option<Vec<Event>>,
}

impl Model {
    fn new(rules: Rules) -> (Self, State) {
        let identities: Vec<Identity> =
            (0..=REBORN).map(|n| Identity::from_bytes(&[n as u8 + 1; 32])).collect();
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let founder = identities[REMOVED].public();
        let mut fields = GenesisFields::flat("model", founder, JoinModes::KEY_FILE, &mut rng);
        fields.ipv4_range = "10.9.0.0/27".parse().unwrap();
        fields.block_prefix = 28;
        let mut view = View::new(Genesis::new(fields).unwrap());
        for node in [REMOVER, LOSER, 3] {
            admit(&mut view, &identities[REMOVED], &identities[node], node as u64);
        }
        let mut model = Self {
            rules,
            identities,
            views: Vec::new(),
            deltas: Vec::new(),
            numbers: BTreeMap::new(),
            heard: BTreeMap::new(),
            done: BTreeMap::new(),
            rejoined: BTreeMap::new(),
            usable: BTreeMap::new(),
            backup: 0,
        };
        let start = model.number(view);
        model.backup = start;
        let state =
            State { views: [start; NODES], removed: false, reborn: false, lost_removed: false, grants: 0 };
        (model, state)
    }

    fn number(&mut self, view: View) -> u16 {
        let next = u16::try_from(self.views.len()).unwrap();
        let number = *self.numbers.entry(view.fingerprint()).or_insert(next);
        if number == next {
            self.deltas.push(view.to_delta());
            self.views.push(view);
        }
        number
    }

    fn view(&self, number: u16) -> &View {
        &self.views[usize::from(number)]
    }

    /// The identity with which a node runs at present.
    fn identity(&self, state: &State, node: usize) -> usize {
        if node == LOSER && state.reborn && self.rules.new_identity { REBORN } else { node }
    }

    fn blocks(&mut self, number: u16, identity: usize) -> [bool; 2] {
        if let Some(known) = self.usable.get(&(number, identity)) {
            return *known;
        }
        let (view, key) = (self.view(number), self.identities[identity].public());
        let usable = if self.rules.keep_promises { view.usable(&key) } else { view.grants().owned_by(&key) };
        let blocks = [0, 1].map(|block| usable.covers(block_net(block)));
        self.usable.insert((number, identity), blocks);
        blocks
    }

    /// Merges, then promises at once, as a node does before anything else.
    fn learn(&mut self, number: u16, delta: &Delta, identity: usize) -> u16 {
        let mut view = self.view(number).clone();
        view.merge(delta);
        if let Some(promises) = view.promise(&self.identities[identity]) {
            view.merge(&Delta { promises: vec![promises], ..Delta::default() });
        }
        self.number(view)
    }

    fn hear(&mut self, at: u16, from: u16, identity: usize, what: What) -> u16 {
        if let Some(known) = self.heard.get(&(at, from, identity, what)) {
            return *known;
        }
        let all = &self.deltas[usize::from(from)];
        let delta = match what {
            What::Everything => all.clone(),
            What::Grants => Delta { grants: all.grants.clone(), ..Delta::default() },
        };
        let after = self.learn(at, &delta, identity);
        self.heard.insert((at, from, identity, what), after);
        after
    }

    fn successors(&mut self, state: State) -> Vec<(Event, State)> {
        let mut next = Vec::new();
        let with = |node: usize, view: u16| {
            let mut after = state;
            after.views[node] = view;
            after
        };
        for node in 0..NODES {
            let (identity, number) = (self.identity(&state, node), state.views[node]);
            if state.grants < self.rules.grants {
                let usable = self.blocks(number, identity);
                for block in (0..2).filter(|block| usable[*block]) {
                    for to in (0..NODES).filter(|to| *to != node) {
                        let to_identity = self.identity(&state, to);
                        let deed = Deed::Grant { from: identity, to: to_identity, block };
                        if let Some(view) = self.perform(number, deed) {
                            let after = State { grants: state.grants + 1, ..with(node, view) };
                            next.push((Event::Grant { from: node, to, block }, after));
                        }
                    }
                }
            }
            for from in (0..NODES).filter(|from| *from != node && state.views[*from] != number) {
                for what in [What::Everything, What::Grants] {
                    let view = self.hear(number, state.views[from], identity, what);
                    if view != number {
                        next.push((Event::Hear { at: node, from, what }, with(node, view)));
                    }
                }
            }
            if let Some(view) = self.perform(number, Deed::Reclaim { identity }) {
                next.push((Event::Reclaim { at: node }, with(node, view)));
            }
        }
        if !state.removed
            && let Some(view) = self.perform(state.views[REMOVER], Deed::Remove { subject: REMOVED })
        {
            next.push((Event::Remove, State { removed: true, ..with(REMOVER, view) }));
        }
        if self.rules.loss && !state.reborn {
            if self.rules.new_identity {
                for sponsor in (0..NODES).filter(|sponsor| *sponsor != LOSER) {
                    if let Some((theirs, own)) = self.rejoin(state.views[sponsor], sponsor) {
                        let mut after = State { reborn: true, ..with(sponsor, theirs) };
                        after.views[LOSER] = own;
                        next.push((Event::LoseDisk { sponsor }, after));
                    }
                }
            } else if state.views[LOSER] != self.backup {
                let after = State { reborn: true, ..with(LOSER, self.backup) };
                next.push((Event::LoseDisk { sponsor: LOSER }, after));
            }
        }
        if state.reborn
            && self.rules.new_identity
            && !state.lost_removed
            && let Some(view) = self.perform(state.views[REMOVER], Deed::Remove { subject: LOSER })
        {
            next.push((Event::RemoveLost, State { lost_removed: true, ..with(REMOVER, view) }));
        }
        next
    }

    fn perform(&mut self, number: u16, deed: Deed) -> Option<u16> {
        if let Some(known) = self.done.get(&(number, deed)) {
            return *known;
        }
        let after = match deed {
            Deed::Grant { from, to, block } => self.grant(number, from, to, block),
            Deed::Remove { subject } => self.remove(number, subject),
            Deed::Reclaim { identity } => self.reclaim(number, identity),
        };
        self.done.insert((number, deed), after);
        after
    }

    /// The owner hands over one of its blocks.
    fn grant(&mut self, number: u16, from: usize, to: usize, block: usize) -> Option<u16> {
        let view = self.view(number);
        let keep: RangeSet = [block_net(1 - block)].into_iter().collect();
        let to = self.identities[to].public();
        let grant = view.grants().grant(&self.identities[from], to, 1, &keep)?;
        Some(self.learn(number, &Delta { grants: vec![grant], ..Delta::default() }, from))
    }

    fn remove(&mut self, number: u16, subject: usize) -> Option<u16> {
        let remover = &self.identities[REMOVER];
        let removal = self.view(number).removal(&self.identities[subject].node_id(), remover).ok()?;
        Some(self.learn(number, &Delta { removals: vec![removal], ..Delta::default() }, REMOVER))
    }

    /// The loser joins anew: the sponsor admits it, and hands over its view.
    fn rejoin(&mut self, number: u16, sponsor: usize) -> Option<(u16, u16)> {
        if let Some(known) = self.rejoined.get(&(number, sponsor)) {
            return *known;
        }
        let result = self.join_anew(number, sponsor);
        self.rejoined.insert((number, sponsor), result);
        result
    }

    fn join_anew(&mut self, number: u16, sponsor: usize) -> Option<(u16, u16)> {
        let mut view = self.view(number).clone();
        if !view.admissions().contains(&self.identities[sponsor].public()) {
            return None;
        }
        admit(&mut view, &self.identities[sponsor], &self.identities[REBORN], 100);
        let theirs = self.number(view.clone());
        let promises = view.promise_as_newcomer(&self.identities[REBORN]).into_iter().collect();
        view.merge(&Delta { promises, ..Delta::default() });
        Some((theirs, self.number(view)))
    }

    fn reclaim(&mut self, number: u16, identity: usize) -> Option<u16> {
        let (view, signer) = (self.view(number), &self.identities[identity]);
        let reclaims = if self.rules.wait_for_promises {
            view.reclaim(signer)
        } else {
            // What `rmpeer` of older meshes does: whoever removes takes over, by what it knows itself.
            let to = signer.public();
            let unclaimed = view.frozen().into_iter().filter(|frozen| frozen.heir == to.node_id());
            let reclaim = |frozen: mesh_core::view::Frozen| {
                let removed = view.admissions().known_key(&frozen.removed)?;
                let removal = view.admissions().removals_of(&removed).pop_first()?;
                let kept: Vec<BodyId> = view
                    .grants()
                    .granted_by(&removed)
                    .copied()
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .collect();
                let reclaim = Reclaim { cluster: view.cluster(), removed, removal, to, kept };
                Some(Signed::sign(&reclaim, signer).unwrap())
            };
            unclaimed.filter_map(reclaim).collect()
        };
        if reclaims.is_empty() {
            return None;
        }
        Some(self.learn(number, &Delta { reclaims, ..Delta::default() }, identity))
    }

    /// Whether two nodes that were not removed use one block.
    fn violated(&mut self, state: &State) -> bool {
        let mut users = [0, 0];
        for node in 0..NODES {
            let identity = self.identity(state, node);
            let out = (state.removed && identity == REMOVED) || (state.lost_removed && identity == LOSER);
            if out {
                continue;
            }
            let blocks = self.blocks(state.views[node], identity);
            (0..2).for_each(|block| users[block] += usize::from(blocks[block]));
        }
        users.iter().any(|users| *users > 1)
    }

    fn reclaimed(&self, state: &State) -> bool {
        let removed = self.identities[REMOVED].public();
        state.views.iter().any(|number| self.view(*number).grants().is_reclaimed(&removed))
    }
}

fn admit(view: &mut View, sponsor: &Identity, subject: &Identity, serial: u64) {
    let admission =
        SignedAdmission::issue(view.cluster(), subject.public(), sponsor, JoinMode::KeyFile, serial).unwrap();
    let merged = view.merge(&Delta { admissions: vec![admission], ..Delta::default() });
    assert_eq!(merged.refused, Vec::<String>::new());
}

fn block_net(block: usize) -> ipnet::Ipv4Net {
    ["10.9.0.0/28", "10.9.0.16/28"][block].parse().unwrap()
}

/// Breadth first, so that a violation is found by a shortest way.
fn search(rules: Rules, limit: usize) -> Outcome {
    let (mut model, start) = Model::new(rules);
    let mut seen: BTreeSet<State> = BTreeSet::from([start]);
    // The states in the order they were met, each with how it was reached.
    let mut met: Vec<(State, usize, Option<Event>)> = vec![(start, 0, None)];
    let mut queue = VecDeque::from([0]);
    let mut reclaimed = 0;
    let mut violation = None;
    while let Some(at) = queue.pop_front() {
        let state = met[at].0;
        reclaimed += usize::from(model.reclaimed(&state));
        if model.violated(&state) {
            let mut path = Vec::new();
            let mut step = at;
            while let (_, before, Some(event)) = met[step] {
                path.push(event);
                step = before;
            }
            path.reverse();
            violation = Some(path);
            break;
        }
        for (event, next) in model.successors(state) {
            if met.len() < limit && seen.insert(next) {
                queue.push_back(met.len());
                met.push((next, at, Some(event)));
            }
        }
    }
    let outcome = Outcome { states: met.len(), views: model.views.len(), reclaimed, violation };
    println!(
        "{} states, {} different views, {} states after a reclaim, violation: {:?}",
        outcome.states, outcome.views, outcome.reclaimed, outcome.violation
    );
    outcome
}

/// States that a search visits at most: a dev build on one core takes well under a minute for them.
const BOUND: usize = 200_000;

#[test]
fn no_block_is_used_by_two_members() {
    let outcome = search(Rules { loss: false, ..RULES }, BOUND);
    assert!(outcome.violation.is_none(), "{:?}", outcome.violation);
    assert!(outcome.reclaimed > 0, "the search reaches what it is about");
}

#[test]
fn no_block_is_used_by_two_members_when_one_loses_its_disk() {
    let outcome = search(Rules { grants: 1, ..RULES }, BOUND);
    assert!(outcome.violation.is_none(), "{:?}", outcome.violation);
    assert!(outcome.reclaimed > 0, "the search reaches what it is about");
}

#[test]
fn reclaiming_without_promises_is_seen_to_fail() {
    let rules = Rules { wait_for_promises: false, loss: false, ..RULES };
    assert!(search(rules, BOUND).violation.is_some());
}

#[test]
fn promises_that_forbid_nothing_are_seen_to_fail() {
    let rules = Rules { keep_promises: false, loss: false, ..RULES };
    assert!(search(rules, BOUND).violation.is_some());
}

#[test]
fn an_old_disk_under_the_same_identity_is_seen_to_fail() {
    let rules = Rules { new_identity: false, ..RULES };
    assert!(search(rules, BOUND).violation.is_some());
}
