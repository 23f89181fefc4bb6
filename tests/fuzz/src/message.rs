//! One frame of a control session.

use mesh_core::message::{Hello, Message, PROTOCOL, Refusal, RefusalCode};
use mesh_keys::{NodeId, PskCheck, WgPublic};

use crate::Target;
use crate::world::WORLD;

pub(crate) const TARGET: Target = Target {
    name: "message",
    run,
    seeds,
    words: &[&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], &[0xff; 4], &[0x7f]],
};

fn run(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let written = message.encode();
    assert!(!message.kind().is_empty());
    assert!(!written.is_empty(), "a {} cannot be written", message.kind());
    // Numbers have more than one encoding, so the bytes may differ from those received; never twice, though.
    let again = Message::decode(&written).expect("what we write we read");
    assert_eq!(again.encode(), written);
    if let Message::Refuse(refusal) = &message {
        let shown = refusal.printable_reason();
        assert!(shown.chars().count() <= Refusal::MAX_REASON && !shown.chars().any(char::is_control));
    }
    if let Message::Push { delta } | Message::Welcome { view: delta, .. } = &message {
        let mut view = WORLD.view();
        view.merge(delta);
        let after = view.fingerprint();
        assert!(
            view.merge(delta).new.is_empty() && view.fingerprint() == after,
            "merging twice is merging once"
        );
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let view = WORLD.view();
    let keys = (WgPublic::from_bytes([1; 32]), WgPublic::from_bytes([2; 32]));
    let check = PskCheck::from_bytes([3; 16]);
    let messages = [
        ("hello", Message::Hello(Box::new(Hello::Joiner { protocol: PROTOCOL, name: "node-c".to_owned() }))),
        ("refusal", Message::Refuse(Refusal::new(RefusalCode::WrongPassword, "the password is wrong"))),
        ("offer", Message::JoinOffer { key: true, password: false }),
        ("welcome", Message::Welcome { genesis: WORLD.genesis.encode(), view: view.to_delta() }),
        ("gossip", Message::Gossip { payload: vec![1, 1, 0, 9] }),
        ("call", Message::Call { link: 2, to: NodeId::from_bytes([4; 16]) }),
        ("carry", Message::Carry { link: 3, bytes: vec![5; 100] }),
        ("want", Message::Want { names: view.items().map(|(name, _)| name).collect() }),
        ("your-record", Message::YourRecord { generation: 3, start: u64::MAX }),
        ("seen", Message::Seen { address: [192, 0, 2, 7].into() }),
        ("push", Message::Push { delta: view.to_delta() }),
        ("psk-offer", Message::PskOffer { keys, epoch: 1, check }),
        ("psk-commit", Message::PskCommit { epoch: u64::MAX, check }),
    ];
    messages.into_iter().map(|(name, message)| (name, message.encode().to_vec())).collect()
}
