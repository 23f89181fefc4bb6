//! Every format against bytes that were computed outside of this program, from the layouts in the
//! module documentation alone (Python: `hashlib`, `hmac`, Ed25519 after RFC 8032, X25519 after
//! RFC 7748). A change of any of them makes nodes of different versions strangers to each other.
//!
//! The identities are those with the seeds 01…01, 02…02 and 03…03.
#![allow(clippy::unwrap_used, reason = "tests")]

use mesh_keys::armor::ArmorError;
use mesh_keys::{
    AdminKey, Admission, ClusterId, Genesis, GenesisFields, Identity, IdentityKey, JoinKey, JoinMode,
    JoinModes, JoinToken, JoinWindow, NodeId, PairEnd, PskStep, Secret32, Signed, SignedAdmission,
    SignedJoinPolicy, SignedRemoval, SignedRevocation, SignedToken, Token, Tries, WeakWgKey, WgPublic,
    WgSecret, admin, pair_psk, psk_check,
};

fn identity(byte: u8) -> Identity {
    Identity::from_bytes(&[byte; 32])
}

fn genesis() -> Genesis {
    Genesis::new(GenesisFields {
        name: "demo".to_owned(),
        nonce: [7; 32],
        ipv4_range: GenesisFields::default_ipv4_range(),
        block_prefix: 24,
        founder: identity(1).public(),
        admin_keys: vec![identity(2).public()],
        join_modes: JoinModes::BOTH,
    })
    .unwrap()
}

const PUBLIC_1: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c";
const PUBLIC_2: &str = "8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394";
const NODE_1: &str = "a6af77f9540e681ec5193814216796bc";
const NODE_2: &str = "a9d199952329dd76b39e5e8dd7b6679a";
const CLUSTER: &str = "6dd126cb51f8f388f97d17787b061b640ba1db66c19b93ced767b0c8995d6a89";
const GENESIS: &str = "010464656d6f07070707070707070707070707070707070707070707070707070707070707070a2000000c18\
8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c01\
8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b39403";

#[test]
fn identity_and_node_id() {
    assert_eq!(identity(1).public().to_string(), PUBLIC_1);
    assert_eq!(identity(2).public().to_string(), PUBLIC_2);
    assert_eq!(identity(1).node_id().to_string(), NODE_1);
    assert_eq!(NodeId::of(&PUBLIC_2.parse().unwrap()).to_string(), NODE_2);
    assert_eq!(identity(1).node_id().short(), "a6af77f9");
}

#[test]
fn ed25519_keys_are_those_of_rfc_8032() {
    // RFC 8032, section 7.1, test 1.
    let mut seed = [0; 32];
    hex::decode_to_slice("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60", &mut seed)
        .unwrap();
    assert_eq!(
        Identity::from_bytes(&seed).public().to_string(),
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    );
}

#[test]
fn der_forms_are_those_of_rfc_8410() {
    let key = identity(1);
    assert_eq!(hex::encode(key.public().to_spki_der()), format!("302a300506032b6570032100{PUBLIC_1}"));
    assert_eq!(
        hex::encode(key.to_pkcs8_der().as_slice()),
        format!("302e020100300506032b657004220420{}", "01".repeat(32))
    );
}

#[test]
fn signature_with_its_domain() {
    assert_eq!(
        identity(1).sign("test domain", b"message").to_string(),
        "4fe60400c4b43d191488f52a43e52367fe160cb8c8996d222267235474bbe337\
d5bf6acd66add4471c0a43cbffb73a227141ffae1b4c08aab9519cf3c91b9606"
    );
}

#[test]
fn files_of_one_line() {
    assert_eq!(identity(1).to_text().as_str(), format!("hauberk-identity-1:{}fe6dc8c9\n", "01".repeat(32)));
    let bytes: [u8; 32] = std::array::from_fn(|i| i as u8);
    let line = "hauberk-key-1:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fac7fb397";
    let key = JoinKey::from_secret(Secret32::from_bytes(bytes));
    assert_eq!(key.to_text().trim_end(), line);
    assert_eq!(
        JoinKey::from_text(&line.to_uppercase().replacen("HAUBERK-KEY", "hauberk-key", 1)).unwrap(),
        key
    );
    assert_eq!(
        JoinKey::from_text(identity(1).to_text().as_str()).unwrap_err(),
        ArmorError::OtherKind { expected: "hauberk-key-1", found: "hauberk-identity-1".to_owned() }
    );
}

#[test]
fn genesis_document_and_what_follows_from_it() {
    let genesis = genesis();
    assert_eq!(hex::encode(genesis.as_bytes()), GENESIS);
    assert_eq!(genesis.id().to_string(), CLUSTER);
    assert_eq!(genesis.ipv6_range().to_string(), "fd6d:d126:cb51::/48");
    assert_eq!(
        genesis.node_prefix(&identity(1).public(), 0).to_string(),
        "fd6d:d126:cb51:a911:310a:cf42::/96"
    );
    assert_eq!(
        genesis.node_prefix(&identity(1).public(), 1).to_string(),
        "fd6d:d126:cb51:13eb:8065:d77a::/96"
    );
    assert_eq!(Genesis::decode(&hex::decode(GENESIS).unwrap()).unwrap(), genesis);
}

#[test]
fn admission() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let signed =
        SignedAdmission::issue(cluster, identity(2).public(), &identity(1), JoinMode::Password, 300).unwrap();
    assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}{PUBLIC_2}{PUBLIC_1}02ac02"));
    let signature = "f0ad614250aaf67e24ec58dc53d84b605eab400a1e2c252e6cfd8ca8f4323c06\
6a51beb892823eef1910c5fd46e9856f393f3a90a4833c3e9420cd29ed8f3007";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(hex::encode(signed.to_bytes()), format!("01{signature}{}", hex::encode(signed.body())));
    assert_eq!(signed.id().to_string(), "2ad3e8944a15f8d476754817b0529a91a00cb041d9aa0ade8cb4a7027669cc4d");
    let expected = Admission {
        cluster,
        subject: identity(2).public(),
        sponsor: identity(1).public(),
        mode: JoinMode::Password,
        issued_serial: 300,
    };
    assert_eq!(signed.check(&cluster).unwrap(), expected);
}

#[test]
fn removal() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let keep = vec![identity(1).node_id(), identity(3).node_id()];
    let (subject, heir) = (identity(2).public(), identity(3).public());
    let signed = SignedRemoval::issue(cluster, subject, heir, keep, &identity(1)).unwrap();
    let heir = "ed4928c628d1c2c6eae90338905995612959273a5c63f93636c14614ac8737d1";
    let node_3 = "351f60af58eda92d8fbae6ae5de8da53";
    assert_eq!(
        hex::encode(signed.body()),
        format!("{CLUSTER}{PUBLIC_2}{PUBLIC_1}{heir}02{node_3}{NODE_1}00"),
        "the nodes that stay are in ascending order"
    );
    let signature = "d46fcc021be29245ed96601a51f1c5001fce95d02cc16db70ee55fbeb439955a\
fc64d759bcf011c280aaca2ff9961e5ee527d28b03cd363e19ab12ba64229c06";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(signed.id().to_string(), "74b137e26558ce3abf8d1aa841163f2a19a7bc6bbd8dcaac24831fc634cc6dcd");
    assert!(signed.check(&cluster).is_ok());
}

#[test]
fn admin_key_files() {
    let secret = format!("hauberk-admin-1:{}5fa8a684", "02".repeat(32));
    let public = format!("hauberk-admin-public-1:{PUBLIC_2}80575c0a");
    let key = AdminKey::from_text(&secret).unwrap();
    assert_eq!(key.to_text().trim_end(), secret);
    assert_eq!(key.public().to_string(), PUBLIC_2);
    assert_eq!(admin::public_to_text(&key.public()), public);
    assert_eq!(admin::public_from_text(&public), Ok(key.public()));
    assert!(admin::is_public_text(&public) && !admin::is_public_text(&secret));
    assert_eq!(
        admin::public_from_text(&secret).unwrap_err(),
        ArmorError::OtherKind { expected: "hauberk-admin-public-1", found: "hauberk-admin-1".to_owned() }
    );
}

#[test]
fn join_policy() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let window = JoinWindow::Until(1_700_000_000);
    let signed = SignedJoinPolicy::issue(cluster, 300, window, &identity(2)).unwrap();
    assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}ac02{PUBLIC_2}0280e2cfaa06"));
    let signature = "e814a7fb20df88c1f349282f2fdb0bc428ccec16d34dd732ad269392aa4f1dcb\
68e3bf2683b197de0dc1b9c0abfb7acac706deae761493a4787469e3abb8fc0f";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(signed.id().to_string(), "6deaa5d3ec3a759f116799fbd3f56b895550d6100fafecd4dcabe56d92e41ac5");
    assert_eq!(signed.check(&cluster).unwrap().window, window);
    for (window, tag) in [(JoinWindow::Open, "00"), (JoinWindow::Closed, "01")] {
        let signed = SignedJoinPolicy::issue(cluster, 1, window, &identity(2)).unwrap();
        assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}01{PUBLIC_2}{tag}"));
    }
}

#[test]
fn tries() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let tries = Tries { cluster, node: identity(1).public(), window: 28_333_333, count: 7, total: 1000 };
    let signed = Signed::sign(&tries, &identity(1)).unwrap();
    assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}{PUBLIC_1}95aac10d07e807"));
    let signature = "75b8f183e03cc88166ed000e3b1966d76a65f5d1cfeba3db5c50233d6ee82c81\
4629a5481145466ce444f5fb6511d7ca92eb8c64fd8a68e9bbabea542bbee90e";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(signed.id().to_string(), "1a5a51363059492e7d0753abaae9f1d78718dedf76d492fc716a750802acad1a");
    assert_eq!(signed.check(&cluster), Ok(tries));
}

const TOKEN: &str =
    "hbt1.01234567.6dd126cb51f8f388f97d17787b061b64.000102030405060708090a0b0c0d0e0f.e579975c";

#[test]
fn token_and_its_revocation() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let secret = JoinToken::from_text(TOKEN).unwrap();
    assert_eq!(secret.to_text().as_str(), TOKEN);
    assert_eq!(secret.cluster, cluster.prefix());
    let hash = "dbe53d6126ea508ef5a24c73f84bf61f2f9dbf678435d707f8f33db3fefec9c3";
    assert_eq!(secret.hash().to_string(), hash);
    let signer = identity(2).public();
    let expires = 1_700_000_000;
    let token = Token { cluster, id: secret.id, hash: secret.hash(), expires, uses: 300, signer };
    let signed: SignedToken = Signed::sign(&token, &identity(2)).unwrap();
    assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}01234567{hash}80e2cfaa06ac02{PUBLIC_2}"));
    let signature = "0727575fd9126337e9236da65c60a71d4541dfa6d9a34932f1af9e18304231bb\
f33b687e46fb8f4ca8fd83f1f3de10b878d4fd81457f886403ad507799608100";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(signed.id().to_string(), "57933505c98a84507a75ada6e12794029b51aaabd041942a5022b9a6da81a034");
    assert_eq!(signed.check(&cluster), Ok(token));

    let revoked = SignedRevocation::issue(cluster, secret.id, &identity(2)).unwrap();
    assert_eq!(hex::encode(revoked.body()), format!("{CLUSTER}01234567{PUBLIC_2}"));
    let signature = "c351a01492fc3045bd3dbcd4dff6afba8d7dacd09b3cd4441504773e8fcb3dc7\
ef640accb482ff44ebcd00e1a83c587bd86dfc80a9ed1ac9d6dfdf2ed8f00f0f";
    assert_eq!(revoked.signature().to_string(), signature);
    assert_eq!(revoked.id().to_string(), "cf63b32d779709b3bcff456a314a57ce3a7224d45a6c31ec37f54f95bf30b923");
    assert!(revoked.check(&cluster).is_ok());
}

#[test]
fn admission_by_token() {
    let cluster: ClusterId = CLUSTER.parse().unwrap();
    let mode = JoinMode::Token(JoinToken::from_text(TOKEN).unwrap().id);
    let signed = SignedAdmission::issue(cluster, identity(2).public(), &identity(1), mode, 300).unwrap();
    assert_eq!(hex::encode(signed.body()), format!("{CLUSTER}{PUBLIC_2}{PUBLIC_1}03ac0201234567"));
    let signature = "2ca083597657cb5401c27cd5c5cb7331d824e73f0b47279c8eb3fde413210755\
58beea3fccb21f0b3f5f559e96e139dc3787d6f669f23a612c49ed00050de20e";
    assert_eq!(signed.signature().to_string(), signature);
    assert_eq!(signed.id().to_string(), "a71c2a60f65d20f17cfa369181e8058549fe96471c5c314ee7637ad6db3620bd");
    assert_eq!(signed.check(&cluster).unwrap().mode, mode);
}

#[test]
fn join_proofs() {
    let key = JoinKey::from_secret(Secret32::from_bytes(std::array::from_fn(|i| i as u8)));
    let (joiner, sponsor): (IdentityKey, IdentityKey) =
        (PUBLIC_1.parse().unwrap(), PUBLIC_2.parse().unwrap());
    assert_eq!(
        key.client_proof(&[9; 32], &joiner, &sponsor).to_string(),
        "5f2a2d1266a66c133b1d34683cc416ce70b3e70f62c7e57b29b0f7b587bd4b5c"
    );
    assert_eq!(
        key.server_proof(&[9; 32], &joiner, &sponsor).to_string(),
        "fef4673ce5098106afe6c55ef651894afdbc2ab278784e6d3828fcb4c3da5c54"
    );
}

#[test]
fn wireguard_keys_and_the_psk_of_a_pair() {
    let (a, b) = (WgSecret::from_bytes(&[1; 32]), WgSecret::from_bytes(&[2; 32]));
    assert_eq!(a.public().to_string(), "pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk=");
    assert_eq!(b.public().to_string(), "zo060cy2M+x7cMF4FKXHbs0CloUFDTRHRboFhw5YfVk=");
    let end = |id: &str, key: &WgSecret| PairEnd { node: id.parse().unwrap(), wireguard: key.public() };
    let (one, two) = (end(NODE_1, &a), end(NODE_2, &b));
    let seed = Secret32::from_bytes([3; 32]);
    let psk = pair_psk(&seed, &two, &b, &one, 5).unwrap();
    assert_eq!(hex::encode(psk.expose()), "5432e4735f3d1350bef3fa67b019cbc8fb9221a31f33242c120c229df5bc7c01");
    assert_eq!(pair_psk(&seed, &one, &a, &two, 5).unwrap(), psk);
    for (step, expected) in [
        (PskStep::Probe, "a91034743ae2d3fa9d0a2213ded5e940"),
        (PskStep::Answer, "97973eae38c0675ac40530f9fa204383"),
        (PskStep::Offer, "4a65df4df5fff525221cac2897c1de12"),
        (PskStep::Staged, "ea1469f1feb8688d66937122e451bcfc"),
        (PskStep::Commit, "9976680069d7260233974d167a28f8a8"),
    ] {
        assert_eq!(psk_check(&psk, &[9; 32], &one.node, step, 5).to_string(), expected);
    }
}

#[test]
fn a_tunnel_key_of_low_order_gives_no_psk() {
    let secret = WgSecret::from_bytes(&[1; 32]);
    let ours = PairEnd { node: NODE_1.parse().unwrap(), wireguard: secret.public() };
    // The points of order 1, 2, 4 and 8 of the curve, and non-canonical forms of them: u = 0, 1, the two of order 8,
    // p - 1, p, p + 1.
    for weak in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000080",
    ] {
        let mut key = [0; 32];
        hex::decode_to_slice(weak, &mut key).unwrap();
        let theirs = PairEnd { node: NODE_2.parse().unwrap(), wireguard: WgPublic::from_bytes(key) };
        assert_eq!(
            pair_psk(&Secret32::from_bytes([3; 32]), &ours, &secret, &theirs, 5),
            Err(WeakWgKey),
            "{weak}"
        );
    }
}

#[test]
fn x25519_keys_are_those_of_rfc_7748() {
    // RFC 7748, section 6.1, Alice.
    let mut secret = [0; 32];
    hex::decode_to_slice("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a", &mut secret)
        .unwrap();
    assert_eq!(
        hex::encode(WgSecret::from_bytes(&secret).public().as_bytes()),
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    );
}
