//! Admin keys, the join window, limits on tries, tokens.

use mesh_keys::{AdminKey, JoinToken, JoinWindow, SignedJoinPolicy, SignedRemoval};

use super::scenarios::{SECOND, cluster, meshed};
use super::*;
use crate::api::{ErrorCode, NewToken, RemovalPlan};
use crate::message::Message;

fn admin() -> AdminKey {
    AdminKey::generate(&mut ChaCha20Rng::seed_from_u64(9))
}

/// A cluster with an admin key.
pub(super) fn anchored(seed: u64, hosts: usize) -> Sim {
    let mut sim = Sim::new(seed);
    sim.admin_keys = vec![admin().public()];
    let seeds: Vec<usize> = (0..hosts).collect();
    (0..hosts).for_each(|_| {
        sim.add(&seeds, SimSecret::Key(7));
    });
    (0..hosts).for_each(|host| sim.start(host));
    meshed(&mut sim, 10 * SECOND);
    sim
}

fn ask(sim: &mut Sim, at: usize, request: Request) -> Result<Response, ApiError> {
    let request = sim.request(at, request);
    sim.answer(at, request)
}

fn plan(sim: &mut Sim, at: usize, node: &str) -> Result<RemovalPlan, ApiError> {
    match ask(sim, at, Request::PrepareRemoval(node.to_owned()))? {
        Response::RemovalPlan(plan) => Ok(*plan),
        other => panic!("{other:?}"),
    }
}

fn id(sim: &Sim, host: usize) -> NodeId {
    sim.hosts[host].identity.node_id()
}

/// A host that wants to join the first one.
fn newcomer(sim: &mut Sim, secret: SimSecret) -> usize {
    let host = sim.add(&[0], secret);
    sim.start(host);
    host
}

fn joins(sim: &mut Sim, secret: SimSecret) -> bool {
    let host = newcomer(sim, secret);
    let joined = sim.run_until(20 * SECOND, |sim| sim.node(host).view().is_some()).is_some();
    if !joined {
        sim.kill(host);
    }
    joined
}

#[test]
fn a_removal_signed_by_the_admin_key_is_taken_spread_and_durable() {
    let mut sim = anchored(50, 4);
    let last = id(&sim, 3);
    let error = ask(&mut sim, 1, Request::Remove(last)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Forbidden, "a member cannot sign it");
    let plan = plan(&mut sim, 1, "host3").unwrap();
    assert_eq!((plan.node, plan.heir), (id(&sim, 3), sim.hosts[1].identity.public()));
    assert_eq!(plan.admin_keys, [admin().public()]);
    assert!(plan.alive.as_deref().is_some_and(|why| why.contains("session")), "{:?}", plan.alive);

    let sign = |signer: &Identity, keep: Vec<NodeId>| {
        SignedRemoval::issue(plan.cluster, plan.subject, plan.heir, keep, signer).unwrap()
    };
    let forged = sign(&sim.hosts[1].identity, plan.keep.clone());
    let before = sim.node(1).view().unwrap().clone();
    let policy = SignedJoinPolicy::issue(plan.cluster, 1, JoinWindow::Closed, admin().signer()).unwrap();
    let declare = |removal, policy: Option<SignedJoinPolicy>| {
        let policies = policy.into_iter().collect();
        Request::Declare(Box::new(Delta { removals: vec![removal], policies, ..Delta::default() }))
    };
    let error = ask(&mut sim, 1, declare(forged, Some(policy.clone()))).unwrap_err();
    assert!(error.code == ErrorCode::Forbidden && error.message.contains("no admin key"), "{error}");
    assert_eq!(sim.node(1).view(), Some(&before), "all of it, or nothing");

    let removal = sign(admin().signer(), plan.keep.clone());
    assert_eq!(ask(&mut sim, 1, declare(removal.clone(), Some(policy))), Ok(Response::Done));
    let on_disk = Stored::decode(&sim.hosts[1].disk).unwrap().view.unwrap();
    assert!(on_disk.admissions().is_removed_id(&id(&sim, 3)), "it was durable when it was answered");
    sim.run(2 * SECOND);
    assert!(sim.node(3).is_out());
    for host in 0..3 {
        assert_eq!(
            sim.hosts[host].kernel.lanes["meshwg0"].peers.len(),
            2,
            "host{host} keeps the others only"
        );
        assert_eq!(sim.node(host).view().unwrap().join_window(), JoinWindow::Closed);
    }
    sim.kill(3);
    assert!(!joins(&mut sim, SimSecret::Key(7)), "the removed node may know the key");
    meshed(&mut sim, 5 * SECOND);
    assert_eq!(ask(&mut sim, 1, declare(removal, None)), Ok(Response::Done), "saying it twice does no harm");
}

#[test]
fn a_node_is_named_by_its_id_the_beginning_of_it_or_its_name() {
    let mut sim = cluster(51, 4);
    meshed(&mut sim, 10 * SECOND);
    let whole = id(&sim, 2).to_string();
    for text in ["host2", &whole, &whole[..8], &whole[..9].to_uppercase()] {
        assert_eq!(plan(&mut sim, 0, text).unwrap().node, id(&sim, 2), "{text}");
    }
    for text in ["host9", &whole[..7], "", "ffffffffffff"] {
        assert_eq!(plan(&mut sim, 0, text).unwrap_err().code, ErrorCode::NotFound, "{text}");
    }
    // Another host has taken the same name.
    sim.kill(3);
    sim.names.insert(3, "host2".to_owned());
    sim.start(3);
    meshed(&mut sim, 10 * SECOND);
    let error = plan(&mut sim, 0, "host2").unwrap_err();
    assert_eq!(error.code, ErrorCode::Ambiguous);
    assert!(error.message.contains(&whole) && error.message.contains(&id(&sim, 3).to_string()), "{error}");
    assert_eq!(plan(&mut sim, 0, &whole[..8]).unwrap().node, id(&sim, 2));
}

#[test]
fn a_removal_plan_tells_whether_the_node_is_alive() {
    let mut sim = cluster(52, 3);
    meshed(&mut sim, 10 * SECOND);
    assert!(plan(&mut sim, 0, "host2").unwrap().alive.is_some());
    assert!(plan(&mut sim, 0, "host0").unwrap().this_node);
    sim.kill(2);
    sim.run(SECOND);
    assert_eq!(plan(&mut sim, 0, "host2").unwrap().alive, None);
}

#[test]
fn a_node_removes_itself_and_the_others_hear_of_it() {
    let mut sim = cluster(59, 3);
    meshed(&mut sim, 10 * SECOND);
    let own = id(&sim, 2);
    assert_eq!(ask(&mut sim, 2, Request::Remove(own)), Ok(Response::Done));
    sim.run(2 * SECOND);
    assert!(sim.node(2).is_out());
    for host in 0..2 {
        assert!(sim.node(host).view().unwrap().admissions().is_removed_id(&own));
        assert_eq!(sim.node(host).session_with(&own), None);
    }
    let error = ask(&mut sim, 2, Request::SetJoinWindow(JoinWindow::Closed)).unwrap_err();
    assert!(error.message.contains("removed"), "{error}");
}

#[test]
fn a_closed_window_keeps_joiners_out_until_it_is_opened_somewhere() {
    let mut sim = cluster(53, 3);
    meshed(&mut sim, 10 * SECOND);
    assert_eq!(ask(&mut sim, 2, Request::SetJoinWindow(JoinWindow::Closed)), Ok(Response::Done));
    sim.run(SECOND);
    let late = newcomer(&mut sim, SimSecret::Key(7));
    sim.run(20 * SECOND);
    assert!(sim.node(late).view().is_none());
    let why = sim.node(late).waiting_for();
    assert!(why.contains("closed") && why.contains("meshctl join-window open"), "{why}");
    assert_eq!(sim.node(0).status().cluster.unwrap().joins_open, Some(false));
    ask(&mut sim, 1, Request::SetJoinWindow(JoinWindow::Open)).unwrap();
    meshed(&mut sim, 60 * SECOND);
    assert!(sim.node(late).view().is_some(), "it tries again by itself");
}

#[test]
fn what_waited_for_the_disk_does_not_hide_what_was_said_later() {
    let mut sim = cluster(62, 2);
    meshed(&mut sim, 10 * SECOND);
    sim.hosts[0].disk_full = true;
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Closed)).unwrap_err();
    sim.hosts[0].disk_full = false;
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Open)).unwrap();
    sim.run(60 * SECOND);
    assert_eq!(sim.node(0).gossip_fingerprint(), sim.node(1).gossip_fingerprint());
    assert_eq!(sim.node(1).view().unwrap().join_window(), JoinWindow::Open);
}

#[test]
fn what_a_member_says_that_is_behind_counts_all_the_same() {
    let mut sim = cluster(63, 3);
    meshed(&mut sim, 10 * SECOND);
    // What the third does not hear of.
    (0..2).for_each(|host| sim.cut(2, host));
    for window in [JoinWindow::Closed, JoinWindow::Open, JoinWindow::Closed, JoinWindow::Open] {
        ask(&mut sim, 0, Request::SetJoinWindow(window)).unwrap();
    }
    sim.run(30 * SECOND);
    ask(&mut sim, 2, Request::SetJoinWindow(JoinWindow::Closed)).unwrap();
    sim.heal();
    meshed(&mut sim, 60 * SECOND);
    for host in 0..3 {
        assert_eq!(sim.node(host).view().unwrap().join_window(), JoinWindow::Closed, "host{host}");
    }
}

#[test]
fn a_statement_that_would_not_be_in_force_is_refused() {
    let mut sim = cluster(64, 2);
    meshed(&mut sim, 10 * SECOND);
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Closed)).unwrap();
    let cluster = sim.node(0).view().unwrap().cluster();
    let policy = SignedJoinPolicy::issue(cluster, 5, JoinWindow::Open, &sim.hosts[0].identity).unwrap();
    let late = Delta { policies: vec![policy], ..Delta::default() };
    let error = ask(&mut sim, 0, Request::Declare(Box::new(late))).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict, "{error}");
    assert_eq!(sim.node(0).view().unwrap().join_window(), JoinWindow::Closed);
}

#[test]
fn who_proves_nothing_is_not_told_which_cluster_this_is() {
    let mut sim = cluster(65, 2);
    meshed(&mut sim, 10 * SECOND);
    let short = sim.node(0).view().unwrap().cluster().short().to_string();
    let other = sim.add(&[], SimSecret::Key(8));
    sim.start(other);
    sim.run(SECOND);
    sim.kill(other);
    sim.hosts[other].seeds = vec![0];
    sim.start(other);
    let mut refused = 0;
    for _ in 0..5000 {
        sim.step();
        for event in sim.queue.values() {
            if let Event::Deliver { to, frame, .. } = event
                && *to == other
            {
                let text = String::from_utf8_lossy(frame);
                assert!(!text.contains(&short), "{text}");
                refused += usize::from(text.contains("another cluster"));
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn a_window_with_an_end_closes_by_the_clock_and_is_closed_without_one() {
    let mut sim = cluster(54, 2);
    meshed(&mut sim, 10 * SECOND);
    let end = sim.unix.unwrap() + sim.now.since_origin().as_secs() + 60;
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Until(end))).unwrap();
    assert!(joins(&mut sim, SimSecret::Key(7)));
    sim.run(61 * SECOND);
    assert!(!joins(&mut sim, SimSecret::Key(7)));
    // The host's clock is set back.
    let now = sim.unix.unwrap();
    sim.input(0, Input::WallClock { unix_seconds: now });
    assert!(sim.node(0).joins_open().is_ok());
    // A daemon that does not know the time believes nothing with an end.
    sim.kill(0);
    sim.unix = None;
    sim.start(0);
    assert!(sim.node(0).joins_open().is_err());
}

#[test]
fn an_anchored_cluster_says_so_and_a_flat_one_too() {
    let sim = anchored(55, 2);
    let status = sim.node(1).status();
    assert_eq!(status.cluster.unwrap().admin_keys, Some(vec![admin().public().to_string()]));
    assert_eq!(status.problems, Vec::<String>::new());
    let mut sim = cluster(56, 2);
    meshed(&mut sim, 10 * SECOND);
    assert_eq!(sim.node(1).status().cluster.unwrap().admin_keys, Some(Vec::new()));
    sim.kill(1);
    sim.admin_keys = vec![admin().public()];
    sim.start(1);
    let problems = sim.node(1).status().problems;
    assert!(problems.iter().any(|problem| problem.contains("is flat")), "{problems:?}");
}

const RIGHT: &str = "correct horse battery";
const WRONG: &str = "wrong horse battery";

fn with_password(seed: u64, hosts: usize) -> Sim {
    let mut sim = Sim::new(seed);
    sim.add(&[], SimSecret::Password(RIGHT));
    (1..hosts).for_each(|_| {
        sim.add(&[0], SimSecret::Password(RIGHT));
    });
    (0..hosts).for_each(|host| sim.start(host));
    sim
}

#[test]
fn wrong_passwords_are_counted_told_to_all_and_limited_for_each_source() {
    let mut sim = with_password(57, 2);
    meshed(&mut sim, 30 * SECOND);
    let guesser = sim.add(&[0], SimSecret::Password(WRONG));
    for _ in 0..8 {
        sim.start(guesser);
        sim.run(SECOND);
        sim.kill(guesser);
        sim.run(SECOND);
    }
    let sponsor = sim.hosts[0].identity.public();
    for host in 0..2 {
        let tries = *sim.node(host).view().unwrap().tries_of(&sponsor).unwrap();
        assert_eq!(
            (tries.total, tries.count),
            (5, 5),
            "one source has five tries a minute, and host{host} knows"
        );
    }
    assert!(joins(&mut sim, SimSecret::Password(RIGHT)), "others have theirs");
    let (all, right) = (sim.hosts.len(), sim.node(0).view().unwrap().tries_of(&sponsor).unwrap().total);
    assert_eq!((all, right), (4, 5), "a right password does not count");
    sim.hosts[guesser].secret = SimSecret::Password(RIGHT);
    sim.run(60 * SECOND);
    sim.start(guesser);
    meshed(&mut sim, 30 * SECOND);
}

#[test]
fn who_takes_the_answer_and_goes_has_made_a_try() {
    let mut sim = with_password(58, 1);
    meshed(&mut sim, 10 * SECOND);
    // The answer to its first message is all that a guess needs; then its process dies.
    let guesser = newcomer(&mut sim, SimSecret::Password(WRONG));
    let asked = |sim: &Sim| sim.node(0).tries.under_way() > 0;
    assert!(sim.run_until(SECOND, asked).is_some());
    sim.kill(guesser);
    sim.run(SECOND);
    let tries = sim.node(0).view().unwrap().tries_of(&sim.hosts[0].identity.public()).copied();
    assert_eq!(tries.map(|tries| tries.total), Some(1));
}

/// A token that the second host signs.
fn token_for(sim: &mut Sim, uses: u32, lives: u64) -> JoinToken {
    let cluster = sim.node(0).view().unwrap().cluster();
    let token = JoinToken::generate(&cluster, &mut sim.rng);
    let expires = sim.unix.unwrap() + sim.now.since_origin().as_secs() + lives;
    let new = NewToken { id: token.id, hash: token.hash(), expires, uses };
    assert_eq!(ask(sim, 1, Request::CreateToken(new)), Ok(Response::Done));
    sim.run(SECOND);
    token
}

#[test]
fn a_token_lets_one_host_in_which_then_needs_no_secret_and_lets_in_by_tokens_only() {
    let mut sim = cluster(60, 2);
    meshed(&mut sim, 10 * SECOND);
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Closed)).unwrap();
    let token = token_for(&mut sim, 1, 3600);
    let guest = newcomer(&mut sim, SimSecret::Token(token.clone()));
    meshed(&mut sim, 10 * SECOND);
    let key = sim.hosts[guest].identity.public();
    assert!(!sim.node(0).view().unwrap().admissions().knows_join_secret(&key));
    assert!(!plan(&mut sim, 0, &format!("host{guest}")).unwrap().knows_join_secret);

    assert!(!joins(&mut sim, SimSecret::Token(token)), "it was for one host");
    // It restarts, and its token is gone.
    sim.kill(guest);
    sim.hosts[guest].secret = SimSecret::None;
    sim.start(guest);
    ask(&mut sim, 0, Request::SetJoinWindow(JoinWindow::Open)).unwrap();
    meshed(&mut sim, 20 * SECOND);
    let by_key = sim.add(&[guest], SimSecret::Key(7));
    sim.start(by_key);
    sim.run(10 * SECOND);
    assert!(sim.node(by_key).waiting_for().contains("tokens only"), "{}", sim.node(by_key).waiting_for());
    sim.kill(by_key);
    let second = token_for(&mut sim, 1, 3600);
    let next = sim.add(&[guest], SimSecret::Token(second));
    sim.start(next);
    meshed(&mut sim, 20 * SECOND);
}

#[test]
fn an_expired_or_revoked_token_lets_nobody_in_and_says_so() {
    let mut sim = cluster(61, 2);
    meshed(&mut sim, 10 * SECOND);
    let short = token_for(&mut sim, 9, 30);
    assert!(joins(&mut sim, SimSecret::Token(short.clone())));
    sim.run(30 * SECOND);
    let revoked = token_for(&mut sim, 9, 3600);
    assert_eq!(ask(&mut sim, 1, Request::RevokeToken(revoked.id)), Ok(Response::Done));
    sim.run(SECOND);
    for (token, words) in [(short, "expired"), (revoked, "revoked")] {
        let late = newcomer(&mut sim, SimSecret::Token(token));
        sim.run(10 * SECOND);
        let why = sim.node(late).waiting_for();
        assert!(sim.node(late).view().is_none() && why.contains(words), "{why}");
        sim.kill(late);
    }
}

#[test]
fn a_token_never_leaves_for_who_is_no_member_of_its_cluster() {
    let mut sim = cluster(62, 2);
    meshed(&mut sim, 10 * SECOND);
    let token = token_for(&mut sim, 1, 3600);
    // The first address that the host has is that of another cluster.
    let other = sim.add(&[], SimSecret::Key(8));
    sim.start(other);
    sim.run(SECOND);
    let guest = sim.add(&[other], SimSecret::Token(token.clone()));
    sim.start(guest);
    sim.run(SECOND);
    assert!(sim.node(guest).waiting_for().contains("another cluster"), "{}", sim.node(guest).waiting_for());
    sim.kill(guest);

    // A session with somebody who shows the right document and admissions, but is not the one they are about.
    let view = sim.node(0).view().unwrap().clone();
    let (genesis, chain) =
        (view.genesis().encode(), view.admissions().chain(&sim.hosts[1].identity.public()));
    let liar = Identity::from_bytes(&[66; 32]).public();
    let member = sim.hosts[1].identity.public();
    for (peer, sent) in [(liar, false), (member, true)] {
        let guest = sim.add(&[0], SimSecret::Token(token.clone()));
        sim.cut(guest, 0);
        sim.start(guest);
        let (ours, _) = MemoryChannel::pair(sim.hosts[guest].identity.public(), peer, &[1; 32]);
        let session = SessionId(1 << 40);
        let secrets = SessionSecrets::derive(&ours).unwrap();
        let (dialled, remote) = (Some(address(0)), address(0));
        let node = sim.hosts[guest].node.as_mut().unwrap();
        let mut said = Vec::new();
        for input in [
            Input::SessionOpened { session, peer, dialled, remote, secrets },
            Input::SessionFrame {
                session,
                frame: Message::JoinOffer { key: true, password: false }.encode(),
            },
            Input::SessionFrame {
                session,
                frame: Message::TokenProof { genesis: genesis.clone(), chain: chain.clone() }.encode(),
            },
        ] {
            node.handle(input, sim.now);
            said.extend(std::iter::from_fn(|| match node.poll_output() {
                Output::Timeout(_) => None,
                other => Some(other),
            }));
        }
        let out = said.iter().any(|output| {
            matches!(output, Output::Send { frame, .. }
                if matches!(Message::decode(frame), Ok(Message::JoinToken { .. })))
        });
        assert_eq!(out, sent);
        sim.kill(guest);
    }
}
