//! The laws of merging, on views made of random statements by a handful of nodes, some of which lie.

mod items;
mod limits;
mod parts;
mod policy;
mod removal;
mod tokens;

use std::net::Ipv4Addr;

use mesh_keys::{GenesisFields, Identity, JoinMode, JoinModes, JoinToken, JoinWindow, WgSecret};
use proptest::prelude::*;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;

use super::*;
use crate::ranges::RangeSet;

const NODES: usize = 5;

fn identities() -> Vec<Identity> {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    (0..NODES).map(|_| Identity::generate(&mut rng)).collect()
}

/// Signs removals in anchored mode.
fn admin() -> Identity {
    Identity::from_bytes(&[0xad; 32])
}

fn genesis(founder: &Identity, anchored: bool) -> Genesis {
    let mut rng = ChaCha20Rng::seed_from_u64(2);
    let mut fields = GenesisFields::flat("laws", founder.public(), JoinModes::KEY_FILE, &mut rng);
    if anchored {
        fields.admin_keys = vec![admin().public()];
    }
    Genesis::new(fields).unwrap()
}

/// What a node does to a view.
#[derive(Clone, Debug)]
enum Act {
    Admit {
        sponsor: usize,
        subject: usize,
    },
    Grant {
        from: usize,
        to: usize,
        blocks: u32,
    },
    /// A grant signed by a node that may not own the range.
    Forge {
        from: usize,
        to: usize,
        block: u8,
    },
    Record {
        node: usize,
        generation: u64,
        version: u64,
        port: u16,
    },
    /// By the admin in anchored mode.
    Remove {
        signer: usize,
        subject: usize,
    },
    /// A removal that keeps whom it likes, with any heir, signed by anyone.
    Oust {
        signer: usize,
        subject: usize,
        heir: usize,
        keep: u8,
    },
    Promise {
        node: usize,
    },
    /// What a node may reclaim by the rules.
    Reclaim {
        node: usize,
    },
    /// What it may not: anything, naming any grants.
    Seize {
        node: usize,
        removed: usize,
        kept: u8,
    },
    /// By the admin in anchored mode.
    Window {
        signer: usize,
        window: JoinWindow,
    },
    /// A join policy that anyone signs, with any serial.
    Dictate {
        signer: usize,
        serial: u64,
        window: JoinWindow,
    },
    /// By the admin in anchored mode. Its secret follows from its number.
    Token {
        signer: usize,
        number: u8,
        uses: u32,
    },
    Revoke {
        signer: usize,
        number: u8,
    },
    AdmitByToken {
        sponsor: usize,
        subject: usize,
        number: u8,
    },
    Fail {
        node: usize,
        window: u64,
        total: u64,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let node = 0..NODES;
    let window = || {
        prop_oneof![Just(JoinWindow::Open), Just(JoinWindow::Closed), (0..9u64).prop_map(JoinWindow::Until)]
    };
    prop_oneof![
        (node.clone(), window()).prop_map(|(signer, window)| Act::Window { signer, window }),
        (node.clone(), 0..4u64, window()).prop_map(|(signer, serial, window)| Act::Dictate {
            signer,
            serial,
            window
        }),
        (node.clone(), 0..3u8, 0..3u32).prop_map(|(signer, number, uses)| Act::Token {
            signer,
            number,
            uses
        }),
        (node.clone(), 0..3u8).prop_map(|(signer, number)| Act::Revoke { signer, number }),
        (node.clone(), node.clone(), 0..3u8).prop_map(|(sponsor, subject, number)| Act::AdmitByToken {
            sponsor,
            subject,
            number
        }),
        (node.clone(), 0..3u64, 0..9u64).prop_map(|(node, window, total)| Act::Fail { node, window, total }),
        (node.clone(), node.clone()).prop_map(|(sponsor, subject)| Act::Admit { sponsor, subject }),
        (node.clone(), node.clone(), 1..600u32).prop_map(|(from, to, blocks)| Act::Grant {
            from,
            to,
            blocks
        }),
        (node.clone(), node.clone(), any::<u8>()).prop_map(|(from, to, block)| Act::Forge {
            from,
            to,
            block
        }),
        (node.clone(), 1..3u64, 0..3u64, 1..4u16).prop_map(|(node, generation, version, port)| Act::Record {
            node,
            generation,
            version,
            port
        }),
        (node.clone(), node.clone()).prop_map(|(signer, subject)| Act::Remove { signer, subject }),
        (node.clone(), node.clone(), node.clone(), any::<u8>())
            .prop_map(|(signer, subject, heir, keep)| { Act::Oust { signer, subject, heir, keep } }),
        node.clone().prop_map(|node| Act::Promise { node }),
        node.clone().prop_map(|node| Act::Reclaim { node }),
        (node.clone(), node, any::<u8>()).prop_map(|(node, removed, kept)| Act::Seize {
            node,
            removed,
            kept
        }),
    ]
}

fn perform(view: &mut View, nodes: &[Identity], act: &Act) {
    let mut delta = Delta::default();
    match act {
        Act::Admit { sponsor, subject } => {
            let subject = nodes[*subject].public();
            delta.admissions.extend(SignedAdmission::issue(
                view.cluster(),
                subject,
                &nodes[*sponsor],
                JoinMode::KeyFile,
                0,
            ));
        }
        Act::Grant { from, to, blocks } => {
            delta.grants.extend(view.grants().grant(
                &nodes[*from],
                nodes[*to].public(),
                *blocks,
                &RangeSet::new(),
            ));
        }
        Act::Forge { from, to, block } => {
            let grant = Grant {
                cluster: view.cluster(),
                parent: BodyId::from_bytes(*view.cluster().as_bytes()),
                network: Ipv4Addr::new(10, 32, *block, 0),
                prefix: 24,
                from: nodes[*from].public(),
                to: nodes[*to].public(),
            };
            delta.grants.push(Signed::sign(&grant, &nodes[*from]).unwrap());
        }
        Act::Record { node, generation, version, port } => {
            let record = NodeRecord {
                cluster: view.cluster(),
                node: nodes[*node].public(),
                generation: *generation,
                version: *version,
                name: format!("node{node}"),
                software: "test".into(),
                salt: 0,
                mesh_ipv4: None,
                control_port: *port,
                endpoints: Vec::new(),
                lanes: vec![LaneInfo {
                    index: 0,
                    key: WgSecret::from_bytes(&[*node as u8 + 1; 32]).public(),
                    port: 6784,
                }],
                start: 0,
                contested: false,
                leaving: false,
            };
            delta.records.push(Signed::sign(&record, &nodes[*node]).unwrap());
        }
        Act::Remove { signer, subject } => {
            let admin = admin();
            let signer = if view.genesis().is_flat() { &nodes[*signer] } else { &admin };
            delta.removals.extend(view.removal(&nodes[*subject].node_id(), signer));
        }
        Act::Oust { signer, subject, heir, keep } => {
            let keep = chosen(nodes.iter().map(Identity::node_id), *keep);
            let (subject, heir) = (nodes[*subject].public(), nodes[*heir].public());
            delta.removals.extend(SignedRemoval::issue(view.cluster(), subject, heir, keep, &nodes[*signer]));
        }
        Act::Window { signer, window } => {
            let admin = admin();
            let signer = if view.genesis().is_flat() { &nodes[*signer] } else { &admin };
            delta.policies.extend(view.issue_policy(*window, signer));
        }
        Act::Dictate { signer, serial, window } => {
            let policy = SignedJoinPolicy::issue(view.cluster(), *serial, *window, &nodes[*signer]);
            delta.policies.extend(policy);
        }
        Act::Token { signer, number, uses } => {
            let admin = admin();
            let signer = if view.genesis().is_flat() { &nodes[*signer] } else { &admin };
            let (id, hash) = (token(view, *number).id, token(view, *number).hash());
            let (cluster, expires) = (view.cluster(), 100);
            let token = Token { cluster, id, hash, expires, uses: *uses, signer: signer.public() };
            delta.tokens.push(Signed::sign(&token, signer).unwrap());
        }
        Act::Revoke { signer, number } => {
            let admin = admin();
            let signer = if view.genesis().is_flat() { &nodes[*signer] } else { &admin };
            let id = token(view, *number).id;
            delta.revocations.extend(SignedRevocation::issue(view.cluster(), id, signer));
        }
        Act::AdmitByToken { sponsor, subject, number } => {
            let mode = JoinMode::Token(token(view, *number).id);
            let (subject, sponsor) = (nodes[*subject].public(), &nodes[*sponsor]);
            delta.admissions.extend(SignedAdmission::issue(view.cluster(), subject, sponsor, mode, 0));
        }
        Act::Fail { node, window, total } => {
            let (cluster, signer) = (view.cluster(), &nodes[*node]);
            let tries = Tries { cluster, node: signer.public(), window: *window, count: 1, total: *total };
            delta.tries.push(Signed::sign(&tries, signer).unwrap());
        }
        Act::Promise { node } => delta.promises.extend(view.promise(&nodes[*node])),
        Act::Reclaim { node } => delta.reclaims.extend(view.reclaim(&nodes[*node])),
        Act::Seize { node, removed, kept } => {
            let removed = nodes[*removed].public();
            let Some(removal) = view.admissions().removals_of(&removed).pop_last() else { return };
            let known = view.grants().ids().chain(view.grants().reclaim_ids()).copied();
            let mut kept = chosen(known, *kept);
            kept.sort_unstable();
            let to = nodes[*node].public();
            let reclaim = Reclaim { cluster: view.cluster(), removed, removal, to, kept };
            delta.reclaims.push(Signed::sign(&reclaim, &nodes[*node]).unwrap());
        }
    }
    view.merge(&delta);
}

/// What the holder of a token has.
fn token(view: &View, number: u8) -> JoinToken {
    JoinToken::generate(&view.cluster(), &mut ChaCha20Rng::seed_from_u64(number.into()))
}

/// The items whose place is a bit of `bits`.
fn chosen<T>(items: impl Iterator<Item = T>, bits: u8) -> Vec<T> {
    items.take(8).enumerate().filter(|(place, _)| bits & (1 << place) != 0).map(|(_, item)| item).collect()
}

fn view_in(anchored: bool, acts: &[Act]) -> View {
    let nodes = identities();
    let mut view = View::new(genesis(&nodes[0], anchored));
    acts.iter().for_each(|act| perform(&mut view, &nodes, act));
    view
}

fn view(acts: &[Act]) -> View {
    view_in(false, acts)
}

/// What follows from a view, of which equal views must say the same.
fn conclusions(view: &View) -> impl PartialEq + std::fmt::Debug + use<> {
    let nodes = identities();
    let members: Vec<NodeId> = view.admissions().members().map(|(id, _)| *id).collect();
    let usable: Vec<RangeSet> = nodes.iter().map(|node| view.usable(&node.public())).collect();
    let due: Vec<_> = nodes.iter().map(|node| (view.promise(node), view.reclaim(node))).collect();
    let tokens: Vec<_> = (0..3).map(|number| redeemed(view, number, Some(50))).collect();
    let authority = (view.join_policy().copied(), tokens);
    (members, view.grants().owners(), view.frozen(), usable, due, authority)
}

/// Whether the token of that number lets somebody in.
fn redeemed(view: &View, number: u8, now: Option<u64>) -> Result<(), TokenRefused> {
    let token = token(view, number);
    view.redeem(&token.id, &token.secret, now).map(drop)
}

fn joined(a: &View, b: &View) -> View {
    let mut joined = a.clone();
    let refused = joined.merge(&b.to_delta()).refused;
    assert_eq!(refused, Vec::<String>::new(), "a closed view is accepted whole");
    joined
}

/// The same when the two may not know the same removals: what these have made void is refused.
fn taught(a: &View, b: &View) -> View {
    let mut taught = a.clone();
    taught.merge(&b.to_delta());
    taught
}

/// With the removals of the others.
fn aware(view: &View, others: &[&View]) -> View {
    let mut aware = view.clone();
    for other in others {
        let mut told = other.to_delta();
        told = Delta { removals: std::mem::take(&mut told.removals), ..Delta::default() };
        assert_eq!(aware.merge(&told).refused, Vec::<String>::new());
    }
    aware
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    proptest::collection::vec(act(), 0..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn merging_is_idempotent_commutative_and_associative(
        anchored: bool, a in acts(), b in acts(), c in acts()
    ) {
        let (mut a, mut b, mut c) = (view_in(anchored, &a), view_in(anchored, &b), view_in(anchored, &c));
        if anchored {
            (a, b, c) = (aware(&a, &[&b, &c]), aware(&b, &[&a, &c]), aware(&c, &[&a, &b]));
        }
        prop_assert_eq!(&joined(&a, &a), &a);
        let ab = joined(&a, &b);
        prop_assert_eq!(&ab, &joined(&b, &a));
        let abc = joined(&ab, &c);
        prop_assert_eq!(&abc, &joined(&a, &joined(&b, &c)));
        prop_assert_eq!(abc.fingerprint(), joined(&c, &joined(&b, &a)).fingerprint());
        prop_assert_eq!(conclusions(&abc), conclusions(&joined(&c, &joined(&b, &a))));
        prop_assert_eq!(conclusions(&abc), conclusions(&joined(&b, &joined(&c, &a))));
    }

    #[test]
    fn copies_that_go_on_telling_each_other_become_equal(
        anchored: bool, acts in proptest::collection::vec(acts(), 4), first in proptest::collection::vec((0..4usize, 0..4usize), 0..8)
    ) {
        let mut copies: Vec<View> = acts.iter().map(|acts| view_in(anchored, acts)).collect();
        for (from, to) in first {
            copies[to] = taught(&copies[to], &copies[from]);
        }
        // Removals get around in as many rounds as there are copies, the rest in as many again.
        for _ in 0..2 * copies.len() {
            for to in 0..copies.len() {
                let from = (to + 1) % copies.len();
                copies[to] = taught(&copies[to], &copies[from]);
            }
        }
        for copy in &copies[1..] {
            prop_assert_eq!(copy, &copies[0]);
            prop_assert_eq!(copy.fingerprint(), copies[0].fingerprint());
            prop_assert_eq!(conclusions(copy), conclusions(&copies[0]));
        }
    }

    #[test]
    fn every_address_has_one_owner_who_is_the_same_everywhere(a in acts(), b in acts()) {
        let (ab, ba) = (joined(&view(&a), &view(&b)), joined(&view(&b), &view(&a)));
        let owners = ab.grants().owners();
        prop_assert_eq!(owners.values().map(RangeSet::len).sum::<u64>(), 1 << 20, "the whole /12, once");
        for block in 0..=255u8 {
            let address = Ipv4Addr::new(10, 32, block, 7);
            let owner = ab.grants().owner_of(address);
            prop_assert_eq!(owner, ba.grants().owner_of(address));
            prop_assert!(owners[&owner.unwrap()].contains(address));
        }
    }

    #[test]
    fn chunks_of_a_view_make_the_view(a in acts(), items in 1usize..5, bytes in 100usize..2000) {
        let a = view(&a);
        let mut copy = View::new(a.genesis().clone());
        for part in a.to_delta().chunks(items, bytes) {
            prop_assert!((1..=items).contains(&part.len()));
            let length = postcard::to_allocvec(&part).unwrap().len();
            prop_assert!(part.len() == 1 || length <= bytes + 10, "{length} bytes");
            prop_assert_eq!(copy.merge(&part).refused, Vec::<String>::new());
        }
        prop_assert_eq!(conclusions(&copy), conclusions(&a));
        prop_assert_eq!(copy, a);
    }

    #[test]
    fn an_earlier_state_and_the_news_make_the_view(
        anchored: bool, a in acts(), b in acts(), more in acts(), late in 0..5usize
    ) {
        let nodes = identities();
        let mut now = view_in(anchored, &a);
        // Written, and then more is merged before it is known that it is.
        let (written, until) = (now.clone(), now.merged_so_far());
        let (few, rest) = b.split_at(late.min(b.len()));
        few.iter().for_each(|act| perform(&mut now, &nodes, act));
        now.drop_news(until);
        rest.iter().for_each(|act| perform(&mut now, &nodes, act));
        let now = taught(&now, &view_in(anchored, &more));

        let mut read = View::new(written.genesis().clone());
        let number = now.merged_so_far() - until;
        prop_assert!(number == 0 || now.news(number - 1).is_none());
        match now.news(number) {
            Some(news) => {
                prop_assert_eq!(read.merge(&written.to_delta()).refused, Vec::<String>::new());
                prop_assert!(written.items().all(|(name, _)| now.content(&name).is_some()), "nothing has gone");
                prop_assert_eq!(read.merge(&news).refused, Vec::<String>::new());
            }
            // Something has gone, so that it has to be written as a whole.
            None => prop_assert_eq!(read.merge(&now.to_delta()).refused, Vec::<String>::new()),
        }
        prop_assert_eq!(conclusions(&read), conclusions(&now));
        prop_assert_eq!(read, now);
    }

    #[test]
    fn a_chain_of_admissions_is_proof_by_itself(a in acts()) {
        let a = view(&a);
        for (_, key) in a.admissions().members() {
            let mut other = View::new(a.genesis().clone());
            other.merge(&Delta { admissions: a.admissions().chain(key), ..Delta::default() });
            prop_assert!(other.admissions().contains(key));
        }
    }
}

#[test]
fn nobody_speaks_for_another() {
    let nodes = identities();
    let mut view = view(&[Act::Admit { sponsor: 0, subject: 1 }, Act::Admit { sponsor: 0, subject: 2 }]);
    let record = NodeRecord {
        cluster: view.cluster(),
        node: nodes[2].public(),
        generation: 9,
        version: 9,
        name: "forged".into(),
        software: String::new(),
        salt: 0,
        mesh_ipv4: None,
        control_port: 1,
        endpoints: Vec::new(),
        lanes: vec![LaneInfo { index: 0, key: WgSecret::from_bytes(&[9; 32]).public(), port: 1 }],
        start: 0,
        contested: false,
        leaving: false,
    };
    let forged = Delta { records: vec![Signed::sign(&record, &nodes[1]).unwrap()], ..Delta::default() };
    let merged = view.merge(&forged);
    assert!(merged.refused[0].contains("does not verify"), "{:?}", merged.refused);
    assert_eq!(view.record(&nodes[2].node_id()), None);
}

#[test]
fn strangers_are_not_admitted_and_say_nothing() {
    let stranger = view(&[
        Act::Admit { sponsor: 3, subject: 4 },
        Act::Record { node: 4, generation: 1, version: 1, port: 1 },
    ]);
    assert_eq!(stranger, view(&[]));
}

#[test]
fn a_range_granted_twice_goes_to_one_and_is_reported() {
    let nodes = identities();
    let mut view = view(&[]);
    for to in [1, 2] {
        perform(&mut view, &nodes, &Act::Forge { from: 0, to, block: 5 });
    }
    let owner = view.grants().owner_of(Ipv4Addr::new(10, 32, 5, 1)).unwrap();
    assert!([nodes[1].public(), nodes[2].public()].contains(&owner));
    assert_eq!(view.grants().conflicts().len(), 1);
}

#[test]
fn records_from_a_newer_version_are_kept_as_they_are() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Newer {
        record: NodeRecord,
        hobby: String,
    }
    impl mesh_keys::Signable for Newer {
        const DOMAIN: &'static str = <NodeRecord as mesh_keys::Signable>::DOMAIN;
        const MAX_LEN: usize = <NodeRecord as mesh_keys::Signable>::MAX_LEN;
    }
    let nodes = identities();
    let mut first = view(&[Act::Record { node: 0, generation: 1, version: 1, port: 5 }]);
    let id = nodes[0].node_id();
    let mut record = first.record(&id).unwrap().clone();
    record.version = 2;
    let newer = Signed::sign(&Newer { record, hobby: "mail".into() }, &nodes[0]).unwrap();
    let as_record = Signed::<NodeRecord>::from_bytes(&newer.to_bytes()).unwrap();
    assert_eq!(
        first.merge(&Delta { records: vec![as_record.clone()], ..Delta::default() }).refused,
        Vec::<String>::new()
    );
    assert_eq!(first.signed_record(&id), Some(&as_record), "passed on with the field we do not know");
}

#[test]
fn news_that_nobody_writes_are_not_kept_for_ever() {
    let name = |number: usize| Name {
        id: [number.to_le_bytes(), [0; 8]].concat().try_into().unwrap(),
        kind: Kind::RECORD,
    };
    let mut view = view(&[]);
    let merged = view.merged_so_far();
    assert_eq!(view.news(0), Some(Delta::default()));
    for number in 0..News::MOST - merged {
        view.news.add([name(number)].into_iter());
    }
    assert!(view.news(News::MOST).is_some() && view.news(News::MOST - 1).is_none());
    view.news.add([name(News::MOST)].into_iter());
    assert_eq!((view.news.names.len(), view.merged_so_far()), (0, News::MOST + 1));
    assert_eq!(view.news(usize::MAX), None, "it has to be written as a whole");
    view.drop_news(News::MOST);
    view.news.add([name(1)].into_iter());
    assert_eq!(view.news(usize::MAX), None, "one is missing");
    view.drop_news(News::MOST + 1);
    assert_eq!((view.news(1), view.news(0)), (Some(Delta::default()), None));
}
