//! Frames of control sessions.

use mesh_core::gossip::catalogue::{Kind, Name};
use mesh_core::message::{GroupKeyShare, Hello, Message, Refusal, RefusalCode};
use mesh_keys::join::JoinProof;
use mesh_keys::password::{PasswordFinalization, PasswordRequest, PasswordResponse};
use mesh_keys::{JoinToken, PskCheck, Secret32, WgPublic};

use crate::golden_set::{Entry, assert_complete, variants};
use crate::say;
use crate::world::{WORLD, identity, node};

variants!(name, NAMES: Message {
    Message::Hello(_) => "hello",
    Message::Refuse(_) => "refuse",
    Message::JoinOffer { .. } => "join-offer",
    Message::JoinKey { .. } => "join-key",
    Message::JoinKeyOk { .. } => "join-key-ok",
    Message::JoinPassword { .. } => "join-password",
    Message::JoinPasswordAnswer { .. } => "join-password-answer",
    Message::JoinPasswordFinish { .. } => "join-password-finish",
    Message::JoinPasswordOk => "join-password-ok",
    Message::JoinAsk => "join-ask",
    Message::Welcome { .. } => "welcome",
    Message::Gossip { .. } => "gossip",
    Message::GroupKeys { .. } => "group-keys",
    Message::Want { .. } => "want",
    Message::Push { .. } => "push",
    Message::YourRecord { .. } => "your-record",
    Message::Seen { .. } => "seen",
    Message::GrantAsk => "grant-ask",
    Message::PskProbe { .. } => "psk-probe",
    Message::PskAnswer { .. } => "psk-answer",
    Message::PskOffer { .. } => "psk-offer",
    Message::PskStaged { .. } => "psk-staged",
    Message::PskCommit { .. } => "psk-commit",
    Message::WelcomePart { .. } => "welcome-part",
    Message::TokenAsk { .. } => "token-ask",
    Message::TokenProof { .. } => "token-proof",
    Message::JoinToken { .. } => "join-token",
    Message::JoinTokenOk => "join-token-ok",
    Message::WelcomeNext => "welcome-next",
    Message::Call { .. } => "call",
    Message::Called { .. } => "called",
    Message::Carry { .. } => "carry",
    Message::Taken { .. } => "taken",
    Message::HangUp { .. } => "hang-up",
});

variants!(hello_name, HELLOS: Hello {
    Hello::Joiner { .. } => "joiner",
    Hello::Member { .. } => "member",
});

variants!(code_name, CODES: RefusalCode {
    RefusalCode::Version => "version",
    RefusalCode::NoCluster => "no-cluster",
    RefusalCode::OtherCluster => "other-cluster",
    RefusalCode::NotMember => "not-member",
    RefusalCode::WrongKey => "wrong-key",
    RefusalCode::WrongPassword => "wrong-password",
    RefusalCode::WrongMethod => "wrong-method",
    RefusalCode::Known => "known",
    RefusalCode::Busy => "busy",
    RefusalCode::Protocol => "protocol",
    RefusalCode::Removed => "removed",
    RefusalCode::JoinsClosed => "joins-closed",
    RefusalCode::BadToken => "bad-token",
    // Never sent; another number in each version.
    RefusalCode::Unknown => "unknown",
});

pub(crate) fn messages() -> Vec<(String, &'static str, Message)> {
    let token = JoinToken::from_text(
        "hbt1.01234567.6dd126cb51f8f388f97d17787b061b64.000102030405060708090a0b0c0d0e0f.e579975c",
    )
    .unwrap();
    let chain = WORLD.admissions().chain(&identity(2).public());
    let keys = (WgPublic::from_bytes([0x11; 32]), WgPublic::from_bytes([0x12; 32]));
    let share = |epoch, byte| GroupKeyShare { epoch, secret: Secret32::from_bytes([byte; 32]) };
    let wanted = [(1, Kind::RECORD), (2, Kind::LIVENESS), (4, Kind::PROMISES)];
    let member = Hello::Member {
        protocol: 3,
        cluster: WORLD.cluster(),
        chain: chain.clone(),
        record: Box::new(WORLD.signed_record(&node(2)).unwrap().clone()),
    };
    let hellos = [Hello::Joiner { protocol: 3, name: "node-5".to_owned() }, member];
    assert_complete(HELLOS, hellos.iter().map(hello_name));
    let codes = [
        RefusalCode::Version,
        RefusalCode::NoCluster,
        RefusalCode::OtherCluster,
        RefusalCode::NotMember,
        RefusalCode::WrongKey,
        RefusalCode::WrongPassword,
        RefusalCode::WrongMethod,
        RefusalCode::Known,
        RefusalCode::Busy,
        RefusalCode::Protocol,
        RefusalCode::Removed,
        RefusalCode::JoinsClosed,
        RefusalCode::BadToken,
    ];
    assert_complete(CODES, codes.iter().map(code_name).chain(["unknown"]));

    let mut all = Vec::new();
    for hello in hellos {
        let of = hello_name(&hello);
        all.push((format!("hello-{of}"), "who speaks", Message::Hello(Box::new(hello))));
    }
    for code in codes {
        let refusal = Message::Refuse(Refusal::new(code, format!("reason of {}", code_name(&code))));
        all.push((format!("refuse-{}", code_name(&code)), "the session ends", refusal));
    }
    for (check, suffix) in [(Some(PskCheck::from_bytes([0x13; 16])), ""), (None, "-without-key")] {
        let probe = Message::PskProbe { keys, epoch: 498, check };
        all.push((format!("psk-probe{suffix}"), "is it the same pre-shared key?", probe));
    }
    let mut add = |what, message: Message| all.push((name(&message).to_owned(), what, message));
    add("how nodes may join: by password", Message::JoinOffer { key: false, password: true });
    add("proof of the key file", Message::JoinKey { proof: JoinProof::from_bytes([0x14; 32]) });
    add("the sponsor's proof", Message::JoinKeyOk { proof: JoinProof::from_bytes([0x15; 32]) });
    let request = PasswordRequest::from_bytes(std::array::from_fn(|i| i as u8));
    add("first message of OPAQUE", Message::JoinPassword { request });
    let response = Box::new(PasswordResponse::from_bytes(std::array::from_fn(|i| (i * 3) as u8)));
    add("second message of OPAQUE", Message::JoinPasswordAnswer { response });
    let finalization = PasswordFinalization::from_bytes(std::array::from_fn(|i| (i * 5) as u8));
    add("third message of OPAQUE", Message::JoinPasswordFinish { finalization });
    add("the password is right", Message::JoinPasswordOk);
    add("asks to be let in", Message::JoinAsk);
    let view = WORLD.to_delta();
    add("lets in", Message::Welcome { genesis: WORLD.genesis().encode(), view: view.clone() });
    add("a payload of gossip", Message::Gossip { payload: vec![1, 1, 0, 9] });
    add("keys of the group", Message::GroupKeys { keys: vec![share(0, 0x16), share(300, 0x17)] });
    let names = wanted.map(|(byte, kind)| Name { id: *node(byte).as_bytes(), kind }).to_vec();
    add("asks for items", Message::Want { names });
    add("items of all kinds", Message::Push { delta: view.clone() });
    add("what is known of the receiver", Message::YourRecord { generation: 300, start: u64::MAX });
    add("where the session comes from", Message::Seen { address: [192, 0, 2, 7].into() });
    add("asks for addresses", Message::GrantAsk);
    let check = PskCheck::from_bytes([0x18; 16]);
    add("it is the same key", Message::PskAnswer { epoch: 499, check: Some(check) });
    add("use this key", Message::PskOffer { keys, epoch: 500, check });
    add("the key is staged", Message::PskStaged { epoch: 501, check });
    add("the key is used", Message::PskCommit { epoch: 502, check });
    add("a part of the view", Message::WelcomePart { view: view.chunks(3, usize::MAX).swap_remove(0) });
    add("the next part may come", Message::WelcomeNext);
    add("asks for proof of membership", Message::TokenAsk { cluster: WORLD.cluster().prefix() });
    add("proof of membership", Message::TokenProof { genesis: WORLD.genesis().encode(), chain });
    add("a token", Message::JoinToken { id: token.id, secret: token.secret.clone() });
    add("the token is right", Message::JoinTokenOk);
    add("calls a member", Message::Call { link: 300, to: node(0x19) });
    add("a member calls", Message::Called { link: 301, from: node(0x1a) });
    add("carried bytes", Message::Carry { link: 302, bytes: vec![0x1b; 5] });
    add("carried bytes are used up", Message::Taken { link: 303, bytes: 65_536 });
    add("a carried connection ends", Message::HangUp { link: 304, reason: "nobody there".to_owned() });
    assert_complete(NAMES, all.iter().map(|(_, _, message)| name(message)));
    assert_eq!(NAMES.len(), Message::VARIANTS as usize, "how many variants there are");
    all
}

pub(crate) fn entries() -> Vec<Entry> {
    let entry = |(name, what, message): (String, &str, Message)| {
        Entry::bytes(name, what, message.encode().to_vec(), |frame| {
            Ok(Message::decode(frame).map_err(say)?.encode().to_vec())
        })
    };
    messages().into_iter().map(entry).collect()
}
