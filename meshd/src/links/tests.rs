use std::collections::VecDeque;

use mesh_core::api::Backend;
use mesh_core::node::{
    Config, HostFacts, JoinSecret, LaneConfig, Node, Output, PIECE, Seed, StartMark, WINDOW,
};
use mesh_core::ranges::RangeSet;
use mesh_core::state::{Stored, StoredNode, Writes};
use mesh_core::time::Time;
use mesh_core::view::{Delta, View};
use mesh_keys::join::JoinKey;
use mesh_keys::rand_core::OsRng;
use mesh_keys::{Genesis, GenesisFields, Identity, JoinMode, JoinModes, Secret32, SignedAdmission, WgSecret};
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::*;
use crate::session::MAX_FRAME_UNPROVEN;

const LIMIT: Duration = Duration::from_secs(5);

fn identity(number: u32) -> Identity {
    let mut seed = [0x5a; 32];
    seed[..4].copy_from_slice(&number.to_be_bytes());
    Identity::from_bytes(&seed)
}

fn tls(number: u32) -> TlsIdentity {
    TlsIdentity::new(&identity(number)).unwrap()
}

/// Hands everybody who connects to `links`.
async fn listen(tls: TlsIdentity, events: mpsc::Sender<LinkEvent>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(session) = session::accept(tcp, &tls, LIMIT).await {
                let _ = events.send(LinkEvent::Accepted(Box::new(session))).await;
            }
        }
    });
    address
}

fn end(number: u32) -> (Links, mpsc::Sender<LinkEvent>, mpsc::Receiver<LinkEvent>) {
    let (events, happened) = mpsc::channel(4096);
    (Links::new(tls(number), events.clone(), LIMIT), events, happened)
}

/// The next event of a session.
async fn next(happened: &mut mpsc::Receiver<LinkEvent>) -> LinkEvent {
    timeout(LIMIT, happened.recv()).await.expect("an event").unwrap()
}

#[tokio::test]
async fn who_sends_much_gets_no_more_turns_than_others() {
    let (mut links, events, mut happened) = end(1);
    let address = listen(tls(1), events).await;
    let greedy = session::dial(address, &tls(2), LIMIT).await.unwrap();
    let modest = session::dial(address, &tls(3), LIMIT).await.unwrap();
    for _ in 0..2 {
        let event = next(&mut happened).await;
        links.happened(event);
    }
    for _ in 0..200 {
        greedy.writer.send(&[1; 1000]).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    modest.writer.send(&[2]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(happened.len() <= 2, "{} frames of two sessions wait for the node", happened.len());
    let mut before = 0;
    loop {
        let LinkEvent::Frame(_, frame, turn) = next(&mut happened).await else { panic!("no frame") };
        drop(turn);
        if *frame == [2] {
            break;
        }
        before += 1;
    }
    assert!(before <= 2, "{before} frames of the other session came first");
    // Nothing of them is lost.
    let mut rest = 0;
    while before + rest < 200 {
        let LinkEvent::Frame(_, frame, _turn) = next(&mut happened).await else { panic!("no frame") };
        assert_eq!(*frame, [1; 1000]);
        rest += 1;
    }
}

#[tokio::test]
async fn a_long_frame_waits_for_trust_and_not_for_ever() {
    let (mut links, events, mut happened) = end(1);
    let address = listen(tls(1), events).await;
    let mut peers = Vec::new();
    for number in [2, 3] {
        let peer = session::dial(address, &tls(number), LIMIT).await.unwrap();
        let event = next(&mut happened).await;
        let Some(Input::SessionOpened { session, .. }) = links.happened(event) else { panic!("no session") };
        peer.writer.set_max_frame(MAX_FRAME_MEMBER);
        peer.writer.send(&vec![7; MAX_FRAME_UNPROVEN + 1]).await.unwrap();
        peers.push((session, peer));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(happened.is_empty(), "neither taken nor refused");
    links.trust(peers[0].0);
    let LinkEvent::Frame(session, frame, _turn) = next(&mut happened).await else { panic!("no frame") };
    assert_eq!((session, frame.len()), (peers[0].0, MAX_FRAME_UNPROVEN + 1));
    let closed = timeout(LATE_TRUST * 2, happened.recv()).await.expect("an end").unwrap();
    let LinkEvent::Closed(session, reason) = closed else { panic!("{closed:?}") };
    assert_eq!(session, peers[1].0);
    assert!(reason.contains("65537 bytes"), "{reason}");
}

#[tokio::test]
async fn a_stranger_has_its_slot_until_nothing_is_left_of_its_session() {
    let (mut links, events, mut happened) = end(1);
    let tls_here = tls(1);
    let address = listen(tls_here.clone(), events).await;
    let mut strangers = Vec::new();
    // As many as one source may have, each closed here at once; the other end does not look.
    for number in 0..16 {
        strangers.push(session::dial(address, &tls(10 + number), LIMIT).await.unwrap());
        let event = next(&mut happened).await;
        let Some(Input::SessionOpened { session, .. }) = links.happened(event) else { panic!("no session") };
        links.close(session);
    }
    assert!(links.live.is_empty());
    let refused = async |number: u32| match session::dial(address, &tls(number), LIMIT).await {
        Ok(mut session) => {
            matches!(timeout(Duration::from_millis(500), session.reader.recv()).await, Ok(Err(_)))
        }
        Err(_) => true,
    };
    assert!(refused(98).await, "their sockets are there still, so there is room for nobody else");
    drop(strangers);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!refused(99).await, "there is room again");
}

/// The view of a cluster of four in which `replacements` nodes came, got addresses, and one was removed each time; and
/// a member.
fn history(replacements: u32) -> (View, u32) {
    let genesis =
        Genesis::new(GenesisFields::flat("old", identity(0).public(), JoinModes::KEY_FILE, &mut OsRng));
    let mut view = View::new(genesis.unwrap());
    let mut members = VecDeque::from([0]);
    for number in 1..=replacements + 3 {
        let newcomer = identity(number);
        let admission = SignedAdmission::issue(
            view.cluster(),
            newcomer.public(),
            &identity(members[0]),
            JoinMode::KeyFile,
            number.into(),
        );
        view.merge(&Delta { admissions: vec![admission.unwrap()], ..Delta::default() });
        let grant = members
            .iter()
            .find_map(|owner| view.grants().grant(&identity(*owner), newcomer.public(), 1, &RangeSet::new()));
        view.merge(&Delta { grants: vec![grant.unwrap()], ..Delta::default() });
        members.push_back(number);
        if members.len() <= 4 {
            continue;
        }
        // The founder stays, and takes over what they had: long chains of heirs take minutes to make.
        let oldest = identity(members.remove(1).unwrap());
        let removal = view.removal(&oldest.node_id(), &identity(members[0])).unwrap();
        view.merge(&Delta { removals: vec![removal], ..Delta::default() });
        for member in &members {
            let promises = view.promise(&identity(*member)).into_iter().collect();
            view.merge(&Delta { promises, ..Delta::default() });
        }
        let reclaims = view.reclaim(&identity(members[0]));
        assert_eq!(view.merge(&Delta { reclaims, ..Delta::default() }).new.len(), 1);
    }
    (view, members[0])
}

/// A node with its links.
struct End {
    node: Node,
    links: Links,
    happened: mpsc::Receiver<LinkEvent>,
    next: Time,
    closed: Vec<String>,
}

impl End {
    fn new(
        number: u32,
        view: Option<View>,
        seeds: Vec<SocketAddr>,
        address: SocketAddr,
        link: (Links, mpsc::Receiver<LinkEvent>),
    ) -> Self {
        let lane = WgSecret::generate(&mut OsRng);
        let node = identity(number).node_id();
        let before = StartMark { node, generation: 0, writes: Writes::default(), superseded: None };
        let config = Config {
            name: format!("node{number}"),
            cluster_name: "unused".into(),
            ipv4_range: GenesisFields::default_ipv4_range(),
            block_prefix: 24,
            admin_keys: Vec::new(),
            secret: JoinSecret::Key(JoinKey::from_secret(Secret32::from_bytes([7; 32]))),
            seeds: seeds.iter().map(|seed| Seed { text: seed.to_string(), addresses: vec![*seed] }).collect(),
            advertise: Vec::new(),
            control_port: address.port(),
            max_calls: 0,
            lanes: vec![LaneConfig::new(0, "meshwg0", 6784, lane)],
            mtu: None,
            mtu_raise: mesh_core::path::mtu::RAISED,
            software: "test".into(),
            boot: "boot".into(),
            previous_start: Some(before),
            backend: (Backend::Userspace, "test".into()),
        };
        let node = StoredNode { generation: 1, ..StoredNode::default() };
        let stored = Stored { view, node, ..Stored::default() };
        let node = Node::new(config, identity(number), stored, [3; 32], Time::ZERO);
        Self { node, links: link.0, happened: link.1, next: Time::ZERO, closed: Vec::new() }
    }

    fn take(&mut self, input: Input, now: Time) {
        self.node.handle(input, now);
        loop {
            let answer = match self.node.poll_output() {
                Output::Timeout(next) => return self.next = next,
                Output::Send { session, frame } => {
                    self.links.send(session, &frame);
                    continue;
                }
                Output::Carried { id, what } => {
                    self.links.carry(id, what);
                    continue;
                }
                Output::Trust { session } => {
                    self.links.trust(session);
                    continue;
                }
                Output::Dial { target } => {
                    self.links.dial(target);
                    continue;
                }
                Output::Close { session, reason } => {
                    self.links.close(session);
                    self.closed.push(reason.clone());
                    Input::SessionClosed { session, reason }
                }
                Output::Persist { ticket, .. } => Input::Persisted(ticket),
                Output::Desired { revision, .. } => Input::Applied { revision, problems: Vec::new() },
                Output::Datagram { .. }
                | Output::LaneDatagram { .. }
                | Output::Measure { .. }
                | Output::Narrow { .. }
                | Output::Register { .. }
                | Output::Reply(..) => continue,
                Output::Refuse { reason } => panic!("{reason}"),
            };
            self.node.handle(answer, now);
        }
    }

    /// What happens next, in time.
    async fn step(&mut self, clock: impl Fn() -> Time) {
        let wait = self.next.since(clock());
        match timeout(wait, self.happened.recv()).await {
            Ok(Some(event)) => {
                if let LinkEvent::Closed(_, reason) = &event {
                    self.closed.push(reason.clone());
                }
                if let Some(input) = self.links.happened(event) {
                    self.take(input, clock());
                }
            }
            Ok(None) => panic!("no events any more"),
            Err(_) => self.take(Input::Tick, clock()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_a_cluster_of_which_twelve_thousand_nodes_were_replaced() {
    let (view, member) = history(12_000);
    let items = view.items().count();
    assert!(items >= 48_000, "{items}");
    let (old, events, old_happened) = end(member);
    let address = listen(tls(member), events).await;
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut old = End::new(member, Some(view), Vec::new(), address, (old, old_happened));
    let (new, _events, new_happened) = end(1_000_000);
    let mut new = End::new(1_000_000, None, vec![address], nobody, (new, new_happened));
    let begun = Instant::now();
    let clock = || Time::from_origin(begun.elapsed());
    // Not the addresses that the seeds are at: they are another host's.
    let host = |ip: [u8; 4]| HostFacts {
        addresses: vec![SocketAddr::from((ip, 0)).ip()],
        underlay_mtu: Some(1500),
        ..HostFacts::default()
    };
    old.take(Input::Host(host([198, 18, 0, 1])), clock());
    new.take(Input::Host(host([198, 18, 0, 2])), clock());
    let joiner = identity(1_000_000).node_id();
    while old.node.view().unwrap().record(&joiner).is_none() {
        tokio::select! {
            () = old.step(clock) => {}
            () = new.step(clock) => {}
        }
        assert!(clock().since_origin() < Duration::from_secs(120), "{:?} {:?}", old.closed, new.closed);
    }
    let (theirs, ours) = (old.node.view().unwrap(), new.node.view().unwrap());
    assert_eq!(ours.cluster(), theirs.cluster());
    assert!(ours.items().count() > items);
}

/// A node's side of a carried connection, and what it knows of it.
struct Carried {
    links: Links,
    happened: mpsc::Receiver<LinkEvent>,
    sent: u32,
    most: u32,
    opened: Option<(SessionId, IdentityKey, SessionSecrets)>,
    frames: Vec<Vec<u8>>,
    ended: bool,
    closed: Option<String>,
}

const ID: CarriedId = CarriedId(1);

impl Carried {
    fn begin(number: u32, dials: bool) -> Self {
        let (mut links, _, happened) = end(number);
        links.carry(ID, CarriedOutput::Begin { dials });
        let (opened, closed) = (None, None);
        Self { links, happened, sent: 0, most: 0, opened, frames: Vec::new(), ended: false, closed }
    }

    /// Takes what has happened; what is for the other end comes out.
    async fn step(&mut self) -> Option<CarriedOutput> {
        let event = timeout(Duration::from_millis(5), self.happened.recv()).await.ok()??;
        match self.links.happened(event)? {
            Input::Carried { id, what: CarriedInput::Bytes(bytes) } => {
                assert!(id == ID && (1..=PIECE).contains(&bytes.len()));
                self.sent += bytes.len() as u32;
                self.most = self.most.max(self.sent);
                Some(CarriedOutput::Bytes(bytes))
            }
            Input::Carried { what: CarriedInput::Taken(bytes), .. } => Some(CarriedOutput::Credit(bytes)),
            Input::Carried { what: CarriedInput::Ended(_), .. } => {
                self.ended = true;
                Some(CarriedOutput::End)
            }
            Input::CarriedOpened { session, peer, secrets, .. } => {
                self.opened = Some((session, peer, secrets));
                self.links.trust(session);
                None
            }
            Input::SessionFrame { frame, .. } => {
                self.frames.push(frame.to_vec());
                None
            }
            Input::SessionClosed { reason, .. } => {
                self.closed = Some(reason);
                None
            }
            Input::Tick
            | Input::WallClock { .. }
            | Input::Host(_)
            | Input::Seeds(_)
            | Input::SessionOpened { .. }
            | Input::DialFailed { .. }
            | Input::Persisted(_)
            | Input::PersistFailed(..)
            | Input::Applied { .. }
            | Input::Datagram { .. }
            | Input::Registered { .. }
            | Input::Tunnels(_)
            | Input::Request(..)
            | Input::Tombstones(_)
            | Input::Remains { .. } => panic!("links tell of sessions only"),
        }
    }

    /// What comes from the other end.
    fn receive(&mut self, what: CarriedOutput) {
        if let CarriedOutput::Credit(bytes) = &what {
            self.sent -= bytes;
        }
        self.links.carry(ID, what);
    }
}

/// A carrier hands everything on until `done`.
async fn carry(a: &mut Carried, b: &mut Carried, mut done: impl FnMut(&Carried, &Carried) -> bool) {
    let begun = Instant::now();
    while !done(a, b) {
        assert!(begun.elapsed() < 2 * LIMIT);
        if let Some(what) = a.step().await {
            b.receive(what);
        }
        if let Some(what) = b.step().await {
            a.receive(what);
        }
    }
}

#[tokio::test]
async fn a_session_goes_through_a_carrier_and_never_has_more_under_way_than_the_window() {
    let (mut a, mut b) = (Carried::begin(1, true), Carried::begin(2, false));
    carry(&mut a, &mut b, |a, b| a.opened.is_some() && b.opened.is_some()).await;
    let (at_a, at_b) = (a.opened.take().unwrap(), b.opened.take().unwrap());
    assert_eq!((at_a.1, at_b.1), (identity(2).public(), identity(1).public()));
    assert_eq!(at_a.2, at_b.2);

    let frames: Vec<Vec<u8>> = (1..=4).map(|number| vec![number; 200_000]).collect();
    for frame in &frames {
        a.links.send(at_a.0, frame);
        b.links.send(at_b.0, frame);
    }
    carry(&mut a, &mut b, |a, b| a.frames.len() == 4 && b.frames.len() == 4).await;
    assert!(a.frames == frames && b.frames == frames);
    assert!(a.most <= WINDOW && b.most <= WINDOW, "{} {}", a.most, b.most);
    assert!(a.most > WINDOW / 2, "{}", a.most);

    // The last words arrive, and then the end.
    a.links.send(at_a.0, b"farewell");
    a.links.close(at_a.0);
    carry(&mut a, &mut b, |a, b| a.ended && b.ended && b.closed.is_some()).await;
    assert_eq!(b.frames.last().map(Vec::as_slice), Some(&b"farewell"[..]));
    assert!(a.links.carried.is_empty() && b.links.carried.is_empty());
}

#[tokio::test]
async fn what_a_carrier_changes_ends_the_session() {
    let (mut a, mut b) = (Carried::begin(1, true), Carried::begin(2, false));
    carry(&mut a, &mut b, |a, b| a.opened.is_some() && b.opened.is_some()).await;
    let session = a.opened.take().unwrap().0;
    a.links.send(session, b"true words");
    let begun = Instant::now();
    while b.closed.is_none() {
        assert!(begun.elapsed() < LIMIT);
        match a.step().await {
            Some(CarriedOutput::Bytes(mut bytes)) => {
                *bytes.last_mut().unwrap() ^= 1;
                b.receive(CarriedOutput::Bytes(bytes));
            }
            Some(CarriedOutput::End) => b.receive(CarriedOutput::End),
            _ => {}
        }
        let _ = b.step().await;
    }
    assert!(b.frames.is_empty());
}

#[tokio::test]
async fn who_is_not_answered_gives_up_and_who_is_hung_up_on_at_once() {
    let mut silent = Carried::begin(1, true);
    let begun = Instant::now();
    while !silent.ended {
        assert!(begun.elapsed() < LIMIT * (CARRIED_PATIENCE + 1));
        let _ = silent.step().await;
    }
    let mut dropped = Carried::begin(1, true);
    dropped.receive(CarriedOutput::End);
    let begun = Instant::now();
    while !dropped.ended {
        assert!(begun.elapsed() < LIMIT);
        let _ = dropped.step().await;
    }
}
