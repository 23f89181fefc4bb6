//! The payload of a gossip datagram, from a member that may lie.

use mesh_core::gossip::catalogue::{Kind, Name};
use mesh_core::gossip::liveness::{Life, Statement};
use mesh_core::gossip::{Event, Gossip, Offered, Store, wire};
use mesh_core::time::Time;
use mesh_core::view::{Delta, View};
use mesh_keys::frame::MAX_PAYLOAD;
use mesh_keys::{NodeId, Signed};

use crate::Target;
use crate::world::WORLD;

pub(crate) const TARGET: Target =
    Target { name: "gossip", run, seeds, words: &[&[0xff; 5], &[1, 1, 0], &[5, 18, 0], &[0x40, 0, 0]] };

/// Datagrams that one datagram may cause.
const MOST: usize = 8;

struct Shelf(View);

impl Store for Shelf {
    fn item(&self, name: &Name) -> Option<Vec<u8>> {
        self.0.item(name)
    }

    fn offer(&mut self, kind: Kind, item: &[u8]) -> Offered {
        let Some(Ok(delta)) = Delta::of_item(kind, item) else { return Offered::Refused };
        match self.0.merge(&delta).new.names().first() {
            Some((name, content)) => Offered::New { name: *name, content: *content, member: None },
            None => Offered::Known,
        }
    }

    fn check(&self, statement: &Signed<Statement>, signer: &NodeId) -> bool {
        self.0.key_of(signer).is_some_and(|key| statement.verify(&key).is_ok())
    }

    fn sign(&self, subject: NodeId, life: Life) -> Option<Signed<Statement>> {
        Statement::sign(&self.0.cluster(), subject, life, &WORLD.founder).ok()
    }
}

fn run(data: &[u8]) {
    let payload = &data[..data.len().min(MAX_PAYLOAD)];
    let mut written = wire::Writer::default();
    for part in wire::read(payload).flatten() {
        written.push(&part);
    }
    let parts = |payload: &[u8]| wire::read(payload).flatten().collect::<Vec<_>>();
    let again = written.take();
    assert!(again.len() <= MAX_PAYLOAD && parts(payload).starts_with(&parts(&again)));

    let mut shelf = Shelf(WORLD.view());
    let (me, peer) = (WORLD.founder.node_id(), WORLD.member.node_id());
    for proved in [true, false] {
        let mut gossip = Gossip::new(me, shelf.0.cluster(), 1, [7; 32], Time::ZERO);
        gossip.start_with(shelf.0.catalogue(), 1);
        gossip.add_member(peer, 1);
        gossip.receive(peer, payload, proved, &mut shelf, Time::ZERO);
        let sent = gossip.take_events();
        let payloads = sent.iter().filter_map(|event| match event {
            Event::Send { payload, .. } => Some(payload.len()),
            Event::Reachable { .. } | Event::Copied { .. } | Event::Fetch { .. } => None,
        });
        let payloads: Vec<usize> = payloads.collect();
        assert!(
            payloads.len() <= MOST && payloads.iter().all(|length| *length <= MAX_PAYLOAD),
            "{payloads:?}"
        );
        assert!(gossip.poll_timeout() >= Time::ZERO);
        gossip.tick(&mut shelf, gossip.poll_timeout());
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let view = WORLD.view();
    let names: Vec<Name> = view.items().map(|(name, _)| name).collect();
    let mut payloads = Vec::new();
    let mut add = |name, parts: &[wire::Part]| {
        let mut writer = wire::Writer::default();
        parts.iter().for_each(|part| assert!(writer.push(part)));
        payloads.push((name, writer.take()));
    };
    add("probe", &[wire::Part::Ping { number: 7 }, wire::Part::Ack { number: 8 }]);
    add(
        "help",
        &[wire::Part::Ask { number: 9, target: WORLD.founder.node_id() }, wire::Part::Nack { number: 1 }],
    );
    add(
        "path",
        &[
            wire::Part::Probe { number: 2, relay: Some(WORLD.founder.node_id()), alarm: true },
            wire::Part::ProbeAnswer { number: 3, ready: true, seen: Some(([192, 0, 2, 1], 6783).into()) },
            wire::Part::Pass { to: WORLD.founder.node_id(), datagram: vec![0x31; 40] },
            wire::Part::PassedFrom { address: ([192, 0, 2, 1], 6783).into() },
            wire::Part::Passed { datagram: vec![0x31; 40] },
            wire::Part::LaneAt { address: ([192, 0, 2, 1], 6784).into() },
        ],
    );
    add("lane-traffic", &[wire::Part::LaneTraffic { lane: 1, received: None, sent: Some(900) }]);
    add("measure", &[wire::Part::Measure { number: 300 }, wire::Part::Measured { number: 4 }]);
    let key = mesh_keys::WgPublic::from_bytes([5; 32]);
    add(
        "lane",
        &[
            wire::Part::LaneHello { key, serial: 4 },
            wire::Part::LaneSeen { key, serial: 4, address: ([192, 0, 2, 1], 6784).into(), known: true },
        ],
    );
    add("want", &[wire::Part::Want(names.clone())]);
    for name in names {
        if let Some(bytes) = view.item(&name) {
            add("item", &[wire::Part::Item { kind: name.kind, bytes }]);
        }
    }
    let statement = Statement::sign(
        &view.cluster(),
        WORLD.founder.node_id(),
        Life { generation: 1, incarnation: 0 },
        &WORLD.member,
    );
    if let Ok(signed) = statement {
        let bundle = mesh_core::gossip::liveness::Bundle {
            subject: WORLD.founder.node_id(),
            alive: None,
            accusations: vec![signed],
        };
        if let Ok(bytes) = postcard::to_allocvec(&bundle) {
            add("accusation", &[wire::Part::Item { kind: Kind::LIVENESS, bytes }]);
        }
    }
    payloads
}
