//! Nodes of this version among those of newer ones.

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::message::{Hello, Message};
use crate::node::sessions::Phase;

/// Host 1 speaks as a newer version may: of another protocol, with more fields in each message, and messages that
/// nobody else knows between them.
fn as_newer(from: usize, frame: Vec<u8>) -> Vec<Vec<u8>> {
    if from != 1 {
        return vec![frame];
    }
    let mut message = Message::decode(&frame).unwrap();
    if let Message::Hello(hello) = &mut message {
        let (Hello::Joiner { protocol, .. } | Hello::Member { protocol, .. }) = &mut **hello;
        *protocol += 1;
    }
    let longer = [message.encode().to_vec(), vec![1, 2, 3]].concat();
    let unknown = vec![Message::VARIANTS as u8, 9, 9];
    // Before the two take each other for members, nothing may stand where something else is due.
    let among_members = matches!(
        message,
        Message::Gossip { .. } | Message::GroupKeys { .. } | Message::Push { .. } | Message::PskProbe { .. }
    );
    if among_members { vec![longer, unknown] } else { vec![longer] }
}

#[test]
fn a_newer_version_meshes_with_this_one() {
    let mut sim = cluster(31, 3);
    sim.on_wire = as_newer;
    meshed(&mut sim, 10 * SECOND);
    sim.run(60 * SECOND);
    // A session is opened anew, and the key of the tunnel agreed on.
    sim.kill(0);
    sim.run(SECOND);
    sim.start(0);
    meshed(&mut sim, 40 * SECOND);
}

/// Whether the end of a session at host 0 takes the other end for a member.
fn is_member(sim: &Sim, id: &SessionId) -> bool {
    matches!(sim.node(0).sessions.get(id).map(|session| &session.phase), Some(Phase::Member))
}

#[test]
fn an_unknown_message_does_not_end_a_session() {
    let mut sim = cluster(32, 2);
    meshed(&mut sim, 10 * SECOND);
    let session = *sim.node(0).sessions.iter().map(|(id, _)| id).find(|id| is_member(&sim, id)).unwrap();
    sim.input(0, Input::SessionFrame { session, frame: vec![Message::VARIANTS as u8, 1, 2].into() });
    assert!(is_member(&sim, &session));
    sim.input(0, Input::SessionFrame { session, frame: vec![0xff; 9].into() });
    assert!(!is_member(&sim, &session), "unlike one that is malformed");
}

#[test]
fn a_protocol_that_is_too_old_is_refused_with_a_sentence() {
    let mut sim = cluster(33, 2);
    sim.on_wire = |from, frame| match Message::decode(&frame) {
        Ok(Message::Hello(mut hello)) if from == 1 => {
            let (Hello::Joiner { protocol, .. } | Hello::Member { protocol, .. }) = &mut *hello;
            *protocol = crate::message::OLDEST_PROTOCOL - 1;
            vec![Message::Hello(hello).encode().to_vec()]
        }
        _ => vec![frame],
    };
    sim.run(10 * SECOND);
    let members = sim.running().into_iter().filter(|host| sim.node(*host).view().is_some());
    assert_eq!(members.count(), 1, "only who founded it");
}
