//! Members that turn against the others ("mesh-evil"). Each holds a valid identity and admission and real sessions,
//! with a real node behind them; what it adds are frames of its own making.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::gossip::catalogue::{Kind, Name, Range, Sum};
use mesh_core::gossip::wire;
use mesh_core::message::Message;
use mesh_core::node::{Node, SessionId};
use mesh_core::ranges::RangeSet;
use mesh_core::view::{Delta, Grant, NodeRecord, Promises, Reclaim, View};
use mesh_keys::frame::GroupKey;
use mesh_keys::{
    Admission, BodyId, Identity, IdentityKey, JoinMode, JoinToken, JoinWindow, NodeId, PskCheck, Removal,
    Signable, Signed, SignedJoinPolicy, SignedRemoval, Token, WgPublic,
};

use crate::dice::Dice;
use crate::evil_datagrams::{Accuser, Babbler, Echo, Impostor};
use crate::network::CONTROL_PORT;
use crate::queue::Event;
use crate::world::World;

/// What an adversary has in hand.
pub struct Insider<'a> {
    /// Its own identity; it has no other.
    pub identity: &'a Identity,
    /// All that members know.
    pub view: &'a View,
    /// Its sessions.
    pub sessions: &'a [SessionId],
    /// The newest key of the group.
    pub group: Option<&'a GroupKey>,
    /// Where members say that they are reached.
    pub addresses: &'a [(NodeId, SocketAddr)],
}

/// A member that means harm.
pub trait Adversary {
    /// What it does, in a word.
    fn name(&self) -> &'static str;

    /// A frame came in.
    fn hear(&mut self, frame: &[u8]) {
        let _ = frame;
    }

    /// A datagram came in.
    fn overhear(&mut self, from: SocketAddr, datagram: &[u8]) {
        let _ = (from, datagram);
    }

    /// What it sends now, on which sessions.
    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let _ = (me, dice);
        Vec::new()
    }

    /// The datagrams that it sends now, and where to.
    fn datagrams(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SocketAddr, Vec<u8>)> {
        let _ = (me, dice);
        Vec::new()
    }
}

/// One of each kind.
pub fn any(dice: &mut Dice) -> Box<dyn Adversary> {
    match dice.below(9) {
        0 => Box::new(Forger),
        1 => Box::new(Replayer::default()),
        2 => Box::new(Granter::default()),
        3 => Box::new(Flooder),
        4 => Box::new(Impostor::default()),
        5 => Box::new(Accuser::default()),
        6 => Box::new(Babbler::default()),
        7 => Box::new(Echo::default()),
        _ => Box::new(Slanderer),
    }
}

fn push(delta: Delta) -> Vec<u8> {
    Message::Push { delta }.encode().to_vec()
}

/// To all sessions.
fn all(me: &Insider<'_>, frame: &[u8]) -> Vec<(SessionId, Vec<u8>)> {
    me.sessions.iter().map(|session| (*session, frame.to_vec())).collect()
}

/// Speaks for others: statements in their names, signed by itself, or theirs with other contents.
pub struct Forger;

/// `value` as its signer would have it, with a signature of somebody else.
fn forged<T: Signable>(value: &T, me: &Identity) -> Vec<Signed<T>> {
    Signed::sign(value, me).into_iter().collect()
}

/// What somebody signed, with one bit changed.
pub(crate) fn altered<T: Signable>(signed: &Signed<T>, dice: &mut Dice) -> Vec<Signed<T>> {
    let mut bytes = signed.to_bytes();
    let place = 65 + dice.below(bytes.len().saturating_sub(65));
    if let Some(byte) = bytes.get_mut(place) {
        *byte ^= 1 << dice.below(8);
    }
    Signed::from_bytes(&bytes).into_iter().collect()
}

impl Adversary for Forger {
    fn name(&self) -> &'static str {
        "forger"
    }

    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let mine = me.identity.public();
        let others: Vec<IdentityKey> =
            me.view.admissions().members().map(|(_, key)| *key).filter(|key| *key != mine).collect();
        let (Some(victim), Some(other)) = (dice.pick(&others), dice.pick(&others)) else { return Vec::new() };
        let cluster = me.view.cluster();
        let mut delta = Delta::default();
        if let Some(record) = me.view.record(&victim.node_id()) {
            let record = NodeRecord { generation: record.generation + 100, ..record.clone() };
            delta.records.extend(forged(&record, me.identity));
        }
        if let Some(signed) = me.view.signed_record(&victim.node_id()) {
            delta.records.extend(altered(signed, dice));
        }
        let removal = Removal {
            cluster,
            subject: other,
            signer: victim,
            heir: mine,
            keep: Vec::new(),
            grants: Vec::new(),
        };
        delta.removals.extend(forged(&removal, me.identity));
        if !me.view.genesis().is_flat() {
            // What only an admin key may say, in its own name.
            delta.removals.extend(SignedRemoval::issue(cluster, other, victim, Vec::new(), me.identity));
            let closed = JoinWindow::Closed;
            delta.policies.extend(SignedJoinPolicy::issue(cluster, u64::MAX / 2, closed, me.identity));
            let (secret, signer) = (JoinToken::generate(&cluster, dice.rng()), mine);
            let (id, hash) = (secret.id, secret.hash());
            let token = Token { cluster, id, hash, expires: u64::MAX, uses: 1, signer };
            delta.tokens.extend(Signed::sign(&token, me.identity));
        }
        let newcomer = Identity::generate(dice.rng()).public();
        let admission = Admission {
            cluster,
            subject: newcomer,
            sponsor: victim,
            mode: JoinMode::KeyFile,
            issued_serial: u64::MAX / 2,
        };
        delta.admissions.extend(forged(&admission, me.identity));
        let parents: Vec<Signed<Grant>> = me.view.grants().in_order();
        for parent in &parents {
            delta.grants.extend(altered(parent, dice));
            if let Ok(grant) = parent.decode()
                && grant.to == victim
            {
                let grant = Grant { parent: parent.id(), from: victim, to: mine, ..grant };
                delta.grants.extend(forged(&grant, me.identity));
            }
        }
        let reclaim = Reclaim {
            cluster,
            removed: other,
            removal: BodyId::from_bytes(dice.bytes()),
            to: victim,
            kept: Vec::new(),
        };
        delta.reclaims.extend(forged(&reclaim, me.identity));
        let promises =
            Promises { cluster, node: victim, version: u64::MAX, sponsored: (0, 0), entries: Vec::new() };
        delta.promises.extend(forged(&promises, me.identity));
        all(me, &push(delta))
    }
}

/// Says again what it heard, to anybody, at any time.
#[derive(Default)]
pub struct Replayer {
    heard: Vec<Vec<u8>>,
}

impl Adversary for Replayer {
    fn name(&self) -> &'static str {
        "replayer"
    }

    fn hear(&mut self, frame: &[u8]) {
        if self.heard.len() < 500 {
            self.heard.push(frame.to_vec());
        }
    }

    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let mut frames = Vec::new();
        for _ in 0..4 {
            if let (Some(session), false) = (dice.pick(me.sessions), self.heard.is_empty()) {
                frames.push((session, self.heard[dice.below(self.heard.len())].clone()));
            }
        }
        frames
    }
}

/// Grants the same block to two, and tells each another story.
#[derive(Default)]
pub struct Granter {
    before: Option<View>,
}

impl Adversary for Granter {
    fn name(&self) -> &'static str {
        "granter"
    }

    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let before = self.before.get_or_insert_with(|| me.view.clone());
        let mine = me.identity.public();
        let others: Vec<IdentityKey> =
            me.view.admissions().members().map(|(_, key)| *key).filter(|key| *key != mine).collect();
        let mut frames = Vec::new();
        for session in me.sessions {
            if let Some(to) = dice.pick(&others)
                && let Some(grant) = before.grants().grant(me.identity, to, 1, &RangeSet::new())
            {
                frames.push((*session, push(Delta { grants: vec![grant], ..Delta::default() })));
            }
        }
        frames
    }
}

/// Sends a lot, of which nothing makes sense.
pub struct Flooder;

impl Adversary for Flooder {
    fn name(&self) -> &'static str {
        "flooder"
    }

    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let names: Vec<Name> =
            (0..200).map(|_| Name { id: dice.bytes(), kind: Kind(dice.below(12) as u8) }).collect();
        let sums = (0..40).map(|_| (Range::ALL, Sum(u128::from_le_bytes(dice.bytes())))).collect();
        let mut writer = wire::Writer::default();
        writer.push(&wire::Part::Sums(sums));
        writer.push(&wire::Part::Want(names.iter().take(8).copied().collect()));
        let mut frames = all(me, &Message::Want { names }.encode());
        frames.extend(all(me, &Message::Gossip { payload: writer.take() }.encode()));
        for _ in 0..20 {
            frames.extend(all(me, &Message::GrantAsk.encode()));
        }
        if let (Some(session), true) = (dice.pick(me.sessions), dice.chance(2_000)) {
            frames.push((session, dice.bytes::<32>().to_vec()));
        }
        frames
    }
}

/// Lies about itself and about tunnels.
pub struct Slanderer;

impl Adversary for Slanderer {
    fn name(&self) -> &'static str {
        "slanderer"
    }

    fn act(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Vec<(SessionId, Vec<u8>)> {
        let mine = me.identity.public();
        let records: Vec<&NodeRecord> =
            me.view.records().map(|(_, record)| record).filter(|record| record.node != mine).collect();
        let Some(victim) = dice.pick(&records) else { return Vec::new() };
        let mut frames = Vec::new();
        // Its own record, with the tunnel and the addresses of somebody else.
        if let Some(own) = me.view.record(&mine.node_id()) {
            let record = NodeRecord {
                version: own.version + 1,
                lanes: victim.lanes.clone(),
                endpoints: victim.endpoints.clone(),
                mesh_ipv4: victim.mesh_ipv4,
                ..own.clone()
            };
            let records = Signed::sign(&record, me.identity).into_iter().collect();
            frames.extend(all(me, &push(Delta { records, ..Delta::default() })));
        }
        let keys = (WgPublic::from_bytes(dice.bytes()), WgPublic::from_bytes(dice.bytes()));
        let (epoch, check) = (dice.below(usize::MAX) as u64, PskCheck::from_bytes(dice.bytes()));
        for message in [
            Message::YourRecord { generation: epoch, start: epoch },
            Message::Gossip { payload: dice.bytes::<32>().to_vec() },
            Message::PskCommit { epoch, check },
            Message::PskStaged { epoch, check },
            Message::PskOffer { keys, epoch, check },
            Message::PskAnswer { epoch, check: Some(check) },
            Message::PskProbe { keys, epoch, check: None },
        ] {
            frames.extend(all(me, &message.encode()));
        }
        frames
    }
}

/// Pause between two acts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(4));

impl World {
    /// A host turns against the others.
    pub fn turn_evil(&mut self, at: usize, adversary: Box<dyn Adversary>) {
        self.say(format!("host{at} turns evil: {}", adversary.name()));
        self.hosts[at].evil = true;
        self.model.turns_evil(&self.hosts[at]);
        // What it has granted before is looked at with other eyes now.
        self.hosts.iter_mut().flat_map(|host| host.process.as_mut()).for_each(|process| process.judged = 0);
        self.evil.insert(at, adversary);
        self.queue.put(PAUSE.0, at, 0, Event::Evil);
    }

    pub(crate) fn evil_acts(&mut self, at: usize) {
        let Some(adversary) = self.evil.get_mut(&at) else { return };
        let pause = self.dice.span(PAUSE.0, PAUSE.1);
        self.queue.put(pause, at, 0, Event::Evil);
        let host = &self.hosts[at];
        let Some(view) = host.node().and_then(Node::view) else { return };
        let sessions = self.links.sessions_of(at);
        let group = host.disk.group_key();
        let addresses: Vec<_> = view
            .records()
            .filter_map(|(id, record)| Some((*id, SocketAddr::new(*record.endpoints.first()?, CONTROL_PORT))))
            .collect();
        let me = Insider {
            identity: &host.disk.identity,
            view,
            sessions: &sessions,
            group: group.as_ref(),
            addresses: &addresses,
        };
        let frames = adversary.act(&me, &mut self.dice);
        let datagrams = adversary.datagrams(&me, &mut self.dice);
        for (session, frame) in frames {
            self.send_frame(at, session, frame);
        }
        for (to, bytes) in datagrams {
            self.send_datagram(at, CONTROL_PORT, to, bytes);
        }
    }
}
