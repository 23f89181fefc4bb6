//! Members that send datagrams of their own making: lies, floods, and what they say is from somebody else.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_core::gossip::catalogue::{Content, Kind, Name, Range, Sum};
use mesh_core::gossip::liveness::{Bundle, Life, Statement};
use mesh_core::gossip::wire::{Part, Writer};
use mesh_core::view::View;
use mesh_keys::frame::{KIND, MAX_DATAGRAM, Sealer};
use mesh_keys::{NodeId, Signable, Signed, WgPublic};
use serde::{Deserialize, Serialize};

use crate::dice::Dice;
use crate::evil::{Adversary, Insider, altered};

/// Most datagrams at a time.
const MOST: usize = 24;

/// Datagrams that are remembered.
const HEARD: usize = 300;

type Letters = Vec<(SocketAddr, Vec<u8>)>;

/// A statement about somebody's life as its fields are on the wire, so that it can say what the real one refuses to.
#[derive(Serialize, Deserialize)]
struct FalseStatement {
    cluster: [u8; 8],
    subject: NodeId,
    life: Life,
    accuser: Option<NodeId>,
}

impl Signable for FalseStatement {
    const DOMAIN: &'static str = Statement::DOMAIN;
    const MAX_LEN: usize = Statement::MAX_LEN;
}

/// What `accuser`, or `subject` itself, is made to say of `subject`: signed by somebody else.
fn said(me: &Insider<'_>, subject: NodeId, life: Life, accuser: Option<NodeId>) -> Option<Signed<Statement>> {
    let mut cluster = [0; 8];
    cluster.copy_from_slice(&me.view.cluster().as_bytes()[..8]);
    let signed = Signed::sign(&FalseStatement { cluster, subject, life, accuser }, me.identity).ok()?;
    Signed::from_bytes(&signed.to_bytes()).ok()
}

fn life_item(bundle: &Bundle) -> Option<Part> {
    let bytes = postcard::to_allocvec(bundle).ok()?;
    Some(Part::Item { kind: Kind::LIVENESS, bytes })
}

fn random_life(me: &Insider<'_>, subject: &NodeId, dice: &mut Dice) -> Life {
    let generation = me.view.record(subject).map_or(1, |record| record.generation);
    let incarnation = [0, 0, 1, 2, u32::MAX - 1, u32::MAX];
    Life {
        generation: generation + u64::from(dice.chance(2_000)) * 5,
        incarnation: incarnation[dice.below(incarnation.len())],
    }
}

/// A part that is no use to anybody.
fn lie(me: &Insider<'_>, others: &[NodeId], dice: &mut Dice) -> Option<Part> {
    let (victim, other) = (dice.pick(others)?, dice.pick(others)?);
    let number = u32::from_le_bytes(dice.bytes());
    match dice.below(16) {
        0 => Some(Part::Ping { number }),
        1 => Some(Part::Ack { number }),
        2 => Some(Part::Ask { number, target: victim }),
        3 => Some(Part::Nack { number }),
        9 => Some(Part::Probe { number, relay: Some(other), alarm: dice.chance(5_000) }),
        10 => Some(Part::Pass { to: victim, datagram: dice.bytes::<64>().to_vec() }),
        11 => Some(Part::Passed { datagram: dice.bytes::<64>().to_vec() }),
        12 => Some(Part::LaneHello { key: WgPublic::from_bytes(dice.bytes()), serial: u64::from(number) }),
        13 => Some(Part::LaneSeen {
            key: WgPublic::from_bytes(dice.bytes()),
            serial: (1 << 32) + u64::from(number % 8),
            address: ([192, 0, 2, 1], 9).into(),
            known: false,
        }),
        14 => Some(Part::PassedFrom { address: ([192, 0, 2, 1], 9).into() }),
        15 => Some(Part::LaneAt { address: ([192, 0, 2, 1], 9).into() }),
        // Its own vote, which is its right: the accused answers.
        4 => {
            let life = random_life(me, &victim, dice);
            let accusation = Statement::sign(&me.view.cluster(), victim, life, me.identity).ok()?;
            life_item(&Bundle { subject: victim, alive: None, accusations: vec![accusation] })
        }
        // The votes of others.
        5 => {
            let life = random_life(me, &victim, dice);
            let accusations = said(me, victim, life, Some(other)).into_iter().collect();
            life_item(&Bundle { subject: victim, alive: None, accusations })
        }
        // The last word of the victim: it could never answer an accusation again.
        6 => {
            let life = random_life(me, &victim, dice);
            life_item(&Bundle {
                subject: victim,
                alive: said(me, victim, life, None),
                accusations: Vec::new(),
            })
        }
        7 => {
            let record = altered(me.view.signed_record(&victim)?, dice).pop()?;
            Some(Part::Item { kind: Kind::RECORD, bytes: record.to_bytes() })
        }
        _ => {
            let names: Vec<_> = me.view.items().map(|(name, _)| name).collect();
            let name = dice.pick(&names)?;
            Some(Part::List { range: Range::ALL, names: vec![(name, Content(dice.bytes()))] })
        }
    }
}

/// The members but this one, and where they are reached.
fn others(me: &Insider<'_>) -> (Vec<NodeId>, Vec<(NodeId, SocketAddr)>) {
    let mine = me.identity.node_id();
    let ids = me.view.records().map(|(id, _)| *id).filter(|id| *id != mine).collect();
    (ids, me.addresses.iter().filter(|(id, _)| *id != mine).copied().collect())
}

/// Seals a payload for a member.
fn seal(sealer: &mut Sealer, me: &Insider<'_>, to: &NodeId, payload: &[u8]) -> Option<Vec<u8>> {
    let secret = me.identity.agree(&me.view.admissions().known_key(to)?)?;
    sealer.seal(to, &secret, payload).ok()
}

/// Speaks in the names of others, with the only secrets that it has: its own.
#[derive(Default)]
pub struct Impostor {
    sealers: BTreeMap<NodeId, Sealer>,
}

impl Adversary for Impostor {
    fn name(&self) -> &'static str {
        "impostor"
    }

    fn datagrams(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Letters {
        let Some(key) = me.group else { return Vec::new() };
        let (ids, addresses) = others(me);
        let mut letters = Vec::new();
        for _ in 0..MOST / 2 {
            let (Some(mask), Some((to, address))) = (dice.pick(&ids), dice.pick(&addresses)) else { break };
            let mut writer = Writer::default();
            for _ in 0..=dice.below(3) {
                if let Some(lie) = lie(me, &ids, dice) {
                    writer.push(&lie);
                }
            }
            let sealer = self.sealers.entry(mask).or_insert_with(|| Sealer::new(key, mask, dice.rng()));
            letters.extend(seal(sealer, me, &to, &writer.take()).map(|bytes| (address, bytes)));
        }
        letters
    }
}

/// Accuses all others without end, in its own name and in those of others.
#[derive(Default)]
pub struct Accuser {
    sealer: Option<Sealer>,
}

impl Adversary for Accuser {
    fn name(&self) -> &'static str {
        "accuser"
    }

    fn datagrams(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Letters {
        let Some(key) = me.group else { return Vec::new() };
        let (ids, addresses) = others(me);
        let sealer = self.sealer.get_or_insert_with(|| Sealer::new(key, me.identity.node_id(), dice.rng()));
        let mut letters = Vec::new();
        for victim in ids.iter().take(MOST) {
            let generation = me.view.record(victim).map_or(1, |record| record.generation);
            let life = Life { generation, incarnation: dice.below(4) as u32 };
            let mut accusations: Vec<_> =
                Statement::sign(&me.view.cluster(), *victim, life, me.identity).into_iter().collect();
            accusations.extend(dice.pick(&ids).and_then(|other| said(me, *victim, life, Some(other))));
            let bundle = Bundle { subject: *victim, alive: None, accusations };
            let (Some(part), Some((node, to))) = (life_item(&bundle), dice.pick(&addresses)) else {
                continue;
            };
            let mut writer = Writer::default();
            writer.push(&part);
            letters.extend(seal(sealer, me, &node, &writer.take()).map(|bytes| (to, bytes)));
        }
        letters
    }
}

/// Sends what is no payload, and payloads that ask for all there is.
#[derive(Default)]
pub struct Babbler {
    sealer: Option<Sealer>,
}

impl Adversary for Babbler {
    fn name(&self) -> &'static str {
        "babbler"
    }

    fn datagrams(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Letters {
        let Some(key) = me.group else { return Vec::new() };
        let (_, addresses) = others(me);
        let sealer = self.sealer.get_or_insert_with(|| Sealer::new(key, me.identity.node_id(), dice.rng()));
        let names: Vec<Name> = me.view.items().map(|(name, _)| name).collect();
        let mut letters = Vec::new();
        for _ in 0..MOST {
            let Some((node, to)) = dice.pick(&addresses) else { break };
            let payload = payload(&names, dice);
            letters.extend(match dice.below(4) {
                // Not even sealed.
                0 => {
                    let mut bytes = dice.bytes::<64>().to_vec();
                    bytes[0] = KIND;
                    bytes.resize(dice.below(2 * MAX_DATAGRAM), 0);
                    Some((to, bytes))
                }
                1 => seal(sealer, me, &node, &payload).map(|mut bytes| {
                    let place = dice.below(bytes.len());
                    bytes[place] ^= 1 << dice.below(8);
                    (to, bytes)
                }),
                _ => seal(sealer, me, &node, &payload).map(|bytes| (to, bytes)),
            });
        }
        letters
    }
}

/// Malformed, or as large as can be.
fn payload(names: &[Name], dice: &mut Dice) -> Vec<u8> {
    let mut writer = Writer::default();
    let made_up = |dice: &mut Dice| Name { id: dice.bytes(), kind: Kind(dice.below(14) as u8) };
    match dice.below(6) {
        // Sums of all ranges of one and two digits, all of them wrong.
        0 => {
            let range = |digits: u8, first: u8| Range::try_from((digits, vec![first])).ok();
            let ranges = (0..=u8::MAX).filter_map(|first| match first & 0x0f {
                0 => range(1, first),
                _ => range(2, first),
            });
            let sums: Vec<(Range, Sum)> =
                ranges.map(|range| (range, Sum(u128::from_le_bytes(dice.bytes())))).collect();
            for some in sums.chunks(50) {
                writer.push(&Part::Sums(some.to_vec()));
            }
        }
        // Items that are nowhere.
        1 => while writer.push(&Part::Have { name: made_up(dice), content: Content(dice.bytes()) }) {},
        // Items that are there, with contents that they do not have.
        2 => {
            let listed = (0..40).filter_map(|_| Some((dice.pick(names)?, Content(dice.bytes()))));
            let part = Part::List { range: Range::ALL, names: listed.collect() };
            writer.push(&part);
        }
        // All that there is, many times.
        3 => {
            let wanted: Vec<Name> = (0..60).filter_map(|_| dice.pick(names)).collect();
            writer.push(&Part::Want(wanted));
        }
        // A part that ends in the middle.
        4 => {
            writer.push(&Part::Ping { number: 1 });
            writer.push(&Part::Item { kind: Kind::GRANT, bytes: dice.bytes::<200>().to_vec() });
            let mut bytes = writer.take();
            bytes.truncate(dice.below(bytes.len()));
            return bytes;
        }
        _ => return dice.bytes::<300>().to_vec(),
    }
    writer.take()
}

/// Says what was true once, and hands on what others have said to it, to everybody.
#[derive(Default)]
pub struct Echo {
    sealer: Option<Sealer>,
    before: Option<View>,
    heard: Vec<Vec<u8>>,
    count: usize,
}

impl Adversary for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn overhear(&mut self, _from: SocketAddr, datagram: &[u8]) {
        // The first ones stay: they are the oldest.
        if self.heard.len() < HEARD {
            self.heard.push(datagram.to_vec());
        } else {
            self.count += 1;
            self.heard[HEARD / 2 + self.count % (HEARD / 2)] = datagram.to_vec();
        }
    }

    fn datagrams(&mut self, me: &Insider<'_>, dice: &mut Dice) -> Letters {
        let Some(key) = me.group else { return Vec::new() };
        let (_, addresses) = others(me);
        let sealer = self.sealer.get_or_insert_with(|| Sealer::new(key, me.identity.node_id(), dice.rng()));
        let before = self.before.get_or_insert_with(|| me.view.clone());
        let names: Vec<Name> = before.items().map(|(name, _)| name).collect();
        let mut letters = Vec::new();
        for _ in 0..MOST / 2 {
            let Some((node, to)) = dice.pick(&addresses) else { break };
            if !self.heard.is_empty() {
                letters.push((to, self.heard[dice.below(self.heard.len())].clone()));
            }
            let mut writer = Writer::default();
            for name in (0..4).filter_map(|_| dice.pick(&names)) {
                if let Some(bytes) = before.item(&name) {
                    writer.push_item(name.kind, &bytes);
                }
            }
            letters.extend(seal(sealer, me, &node, &writer.take()).map(|bytes| (to, bytes)));
        }
        letters
    }
}
