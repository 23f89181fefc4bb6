//! The shell's part in connections that another host carries, without TLS: see `wire`.

use std::collections::BTreeMap;

use mesh_core::node::{CarriedId, CarriedInput, CarriedOutput, Input, PIECE, SessionId, WINDOW};

use mesh_keys::IdentityKey;

use crate::node;
use crate::wire::{Happened, Wire};
use crate::world::World;

/// Names of sessions that are carried begin here: no other link has them.
const FIRST_NAME: u64 = 1 << 40;

/// The carried connections of a process.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    all: BTreeMap<CarriedId, (Wire, Option<SessionId>)>,
    names: u64,
}

impl Connections {
    fn of(&mut self, session: SessionId) -> Option<(CarriedId, &mut Wire)> {
        let mut all = self.all.iter_mut();
        all.find(|(_, (_, name))| *name == Some(session)).map(|(id, (wire, _))| (*id, wire))
    }
}

impl World {
    /// Does what a node wants with a connection.
    pub(crate) fn carry_on(&mut self, at: usize, id: CarriedId, what: CarriedOutput) {
        let me = *self.hosts[at].disk.identity.public().as_bytes();
        let nonce = std::array::from_fn(|_| self.dice.below(256) as u8);
        let Some(process) = self.process(at) else { return };
        let connections = &mut process.carried.all;
        match what {
            CarriedOutput::Begin { dials } => {
                connections.insert(id, (Wire::new(dials, me, nonce, WINDOW as usize), None));
            }
            CarriedOutput::Credit(bytes) => {
                if let Some((wire, _)) = connections.get_mut(&id) {
                    wire.add_credit(bytes as usize);
                }
            }
            CarriedOutput::End => {
                if let Some((_, Some(session))) = connections.remove(&id) {
                    let reason = "the carried connection has ended".to_owned();
                    process.inbox.push_back(Input::SessionClosed { session, reason });
                }
            }
            CarriedOutput::Bytes(bytes) => {
                let Some((wire, _)) = connections.get_mut(&id) else { return };
                let happened = wire.receive(&bytes);
                let taken = CarriedInput::Taken(bytes.len() as u32);
                process.inbox.push_back(Input::Carried { id, what: taken });
                happened.into_iter().for_each(|what| self.heard(at, id, what));
            }
        }
        self.send_pieces(at, id);
    }

    fn heard(&mut self, at: usize, id: CarriedId, what: Happened) {
        let seed = self.settings.seed;
        let known = |peer: [u8; 32]| {
            let keys = self.hosts.iter().map(|host| host.disk.identity.public());
            keys.into_iter().find(|key| *key.as_bytes() == peer)
        };
        let input = match what {
            Happened::Opened { peer, seed: drawn } => match known(peer) {
                Some(peer) => Ok((peer, u64::from_le_bytes(std::array::from_fn(|at| drawn[at])))),
                None => Err(CarriedInput::Ended("it is nobody".to_owned())),
            },
            Happened::Frame(frame) => {
                let Some(process) = self.process(at) else { return };
                let Some((_, Some(session))) = process.carried.all.get(&id) else { return };
                let session = *session;
                process.inbox.push_back(Input::SessionFrame { session, frame: frame.into() });
                return;
            }
        };
        let serves = |peer: &IdentityKey| {
            let mut hosts = self.hosts.iter();
            hosts.any(|host| host.id() == peer.node_id() && host.at != at && host.serves())
        };
        let confirms = input.as_ref().is_ok_and(|(peer, _)| serves(peer));
        let Some(process) = self.process(at) else { return };
        process.confirmed |= confirms;
        let input = match input {
            Err(what) => Input::Carried { id, what },
            Ok((peer, drawn)) => {
                let Some((_, name)) = process.carried.all.get_mut(&id) else { return };
                process.carried.names += 1;
                let session = SessionId(FIRST_NAME + process.carried.names);
                *name = Some(session);
                let secrets = node::session_secrets(seed, drawn);
                Input::CarriedOpened { id, session, peer, secrets }
            }
        };
        process.inbox.push_back(input);
    }

    /// What may be sent on a connection is for the node to hand on.
    fn send_pieces(&mut self, at: usize, id: CarriedId) {
        let Some(process) = self.process(at) else { return };
        let Some((wire, _)) = process.carried.all.get_mut(&id) else { return };
        while let Some(bytes) = wire.take(PIECE) {
            process.inbox.push_back(Input::Carried { id, what: CarriedInput::Bytes(bytes) });
        }
    }

    /// Sends a frame, if the session is carried.
    pub(crate) fn send_carried(&mut self, at: usize, session: SessionId, frame: &[u8]) -> bool {
        let Some(process) = self.process(at) else { return false };
        let Some((id, wire)) = process.carried.of(session) else { return false };
        wire.send(frame);
        self.send_pieces(at, id);
        true
    }

    /// Ends a session, if it is carried.
    pub(crate) fn close_carried(&mut self, at: usize, session: SessionId, reason: &str) {
        let Some(process) = self.process(at) else { return };
        let Some((id, _)) = process.carried.of(session) else { return };
        process.carried.all.remove(&id);
        process.inbox.push_back(Input::Carried { id, what: CarriedInput::Ended(reason.to_owned()) });
    }
}
