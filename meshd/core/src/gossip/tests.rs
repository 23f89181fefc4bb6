//! One node, and others that are played by the test, honest or not.

use mesh_keys::Identity;
use proptest::prelude::*;

use super::*;

const CLUSTER: ClusterId = ClusterId::from_bytes([5; 32]);
const GENERATION: u64 = 4;
const FACT: Kind = Kind(1);

/// The node is the first of the identities; the last is no member.
struct Keys {
    identities: Vec<Identity>,
    items: BTreeMap<Name, Vec<u8>>,
}

impl Store for Keys {
    fn item(&self, name: &Name) -> Option<Vec<u8>> {
        self.items.get(name).cloned()
    }

    /// A fact is nothing but its name.
    fn offer(&mut self, kind: Kind, item: &[u8]) -> Offered {
        let Some(id) = item.first_chunk().copied().filter(|_| kind == FACT) else { return Offered::Refused };
        let name = Name { id, kind };
        match self.items.insert(name, item.to_vec()) {
            Some(_) => Offered::Known,
            None => Offered::New { name, content: Content([1; 8]), member: None },
        }
    }

    fn check(&self, statement: &Signed<Statement>, signer: &NodeId) -> bool {
        let identity = self.identities.iter().find(|identity| identity.node_id() == *signer);
        identity.is_some_and(|identity| statement.verify(&identity.public()).is_ok())
    }

    fn sign(&self, subject: NodeId, life: Life) -> Option<Signed<Statement>> {
        Statement::sign(&CLUSTER, subject, life, &self.identities[0]).ok()
    }
}

struct Bench {
    gossip: Gossip,
    keys: Keys,
    now: Time,
}

impl Bench {
    fn new(members: usize) -> Self {
        let mut rng = ChaCha20Rng::from_seed([3; 32]);
        let identities: Vec<_> = (0..members + 2).map(|_| Identity::generate(&mut rng)).collect();
        let mut gossip = Gossip::new(identities[0].node_id(), CLUSTER, GENERATION, [1; 32], Time::ZERO);
        for member in &identities[1..=members] {
            gossip.add_member(member.node_id(), GENERATION);
        }
        Self { gossip, keys: Keys { identities, items: BTreeMap::new() }, now: Time::ZERO }
    }

    fn id(&self, place: usize) -> NodeId {
        self.keys.identities[place].node_id()
    }

    fn incarnation(&self) -> u32 {
        self.gossip.life_of(&self.id(0)).unwrap().incarnation
    }

    fn takes(&mut self, from: usize, payload: &[u8]) -> Vec<Event> {
        self.gossip.receive(self.id(from), payload, true, &mut self.keys, self.now);
        self.gossip.take_events()
    }

    /// A statement of `by` about that life of `subject`.
    fn says(&self, by: usize, subject: usize, generation: u64, incarnation: u32) -> Signed<Statement> {
        let life = Life { generation, incarnation };
        Statement::sign(&CLUSTER, self.id(subject), life, &self.keys.identities[by]).unwrap()
    }

    /// What comes of `from`'s accusation of `subject`, with that proof of its life.
    fn accuses(
        &mut self,
        from: usize,
        subject: usize,
        accusation: Signed<Statement>,
        alive: Option<Signed<Statement>>,
    ) -> Vec<Event> {
        let bundle = Bundle { subject: self.id(subject), alive, accusations: vec![accusation] };
        self.takes(from, &life_item(&bundle))
    }

    /// Lets time pass, without an answer from anybody; what was done.
    fn waits(&mut self, span: Duration) -> Vec<Event> {
        let end = self.now + span;
        let mut events = Vec::new();
        let mut ticks = 0;
        while self.gossip.poll_timeout() <= end {
            self.now = self.now.max(self.gossip.poll_timeout());
            self.gossip.tick(&mut self.keys, self.now);
            events.append(&mut self.gossip.take_events());
            ticks += 1;
            assert!(ticks < 100 * (1 + span.as_secs()), "it spins");
        }
        self.now = end;
        events
    }
}

fn life_item(bundle: &Bundle) -> Vec<u8> {
    let mut writer = Writer::default();
    assert!(writer.push_item(Kind::LIVENESS, &postcard::to_allocvec(bundle).unwrap()));
    writer.take()
}

fn sent(events: &[Event]) -> Vec<(NodeId, Vec<Part>)> {
    let parts = |payload: &[u8]| wire::read(payload).map(Result::unwrap).collect();
    let send = |event: &Event| match event {
        Event::Send { to, payload } => Some((*to, parts(payload))),
        Event::Reachable { .. } | Event::Copied { .. } | Event::Fetch { .. } => None,
    };
    events.iter().filter_map(send).collect()
}

fn fact(byte: u8) -> Name {
    Name { id: [byte; 16], kind: FACT }
}

#[test]
fn nobody_else_can_drive_the_incarnation_up() {
    let mut bench = Bench::new(4);
    let last = u32::MAX;
    for (generation, incarnation) in [
        (GENERATION, last),
        (GENERATION, last - 1),
        (GENERATION, 1),
        (GENERATION + 1, 0),
        (u64::MAX, last),
        (0, 0),
    ] {
        let lie = bench.says(1, 0, generation, incarnation);
        bench.accuses(1, 0, lie.clone(), None);
        // A proof of that life it can only sign itself.
        let proof = Statement::sign(
            &CLUSTER,
            bench.id(0),
            Life { generation, incarnation },
            &bench.keys.identities[1],
        );
        bench.accuses(1, 0, lie, proof.ok());
        assert_eq!(bench.incarnation(), 0, "{generation} {incarnation}");
    }
    let stranger = bench.says(5, 0, GENERATION, 0);
    bench.accuses(1, 0, stranger, None);
    let elsewhere = Statement::sign(
        &ClusterId::from_bytes([6; 32]),
        bench.id(0),
        Life { generation: GENERATION, incarnation: 0 },
        &bench.keys.identities[1],
    );
    bench.accuses(1, 0, elsewhere.unwrap(), None);
    let mut forged = bench.says(2, 0, GENERATION, 0).to_bytes();
    forged[9] ^= 1;
    bench.accuses(1, 0, Signed::from_bytes(&forged).unwrap(), None);
    assert_eq!(bench.incarnation(), 0, "no vote, no answer");

    let right = bench.says(1, 0, GENERATION, 0);
    bench.accuses(1, 0, right.clone(), None);
    assert_eq!(bench.incarnation(), 1, "answered at once");
    bench.accuses(1, 0, right, None);
    bench.waits(Duration::from_secs(60));
    assert_eq!(bench.incarnation(), 1, "and once");
}

#[test]
fn one_that_accuses_all_the_time_gets_few_answers_and_all_in_time() {
    let mut bench = Bench::new(9);
    let mut accused = Duration::ZERO;
    for _ in 0..600 {
        let incarnation = bench.incarnation();
        let again = bench.says(1, 0, GENERATION, incarnation);
        bench.accuses(1, 0, again, None);
        bench.waits(Duration::from_millis(100));
        accused = if bench.incarnation() == incarnation {
            accused + Duration::from_millis(100)
        } else {
            Duration::ZERO
        };
        assert!(accused <= Duration::from_secs(4), "others wait for nine seconds");
    }
    assert!((10..=30).contains(&bench.incarnation()), "{} in a minute", bench.incarnation());

    // Of three it must not wait as long: others conclude after 1.5 s.
    bench.waits(Duration::from_millis(300));
    let incarnation = bench.incarnation();
    for by in 1..=3 {
        let accusation = bench.says(by, 0, GENERATION, incarnation);
        bench.accuses(by, 0, accusation, None);
    }
    bench.waits(Duration::from_millis(600));
    assert_eq!(bench.incarnation(), incarnation + 1);
}

#[test]
fn a_copy_of_the_key_is_noticed_and_leaves_the_node_able_to_answer() {
    let mut bench = Bench::new(4);
    let copied = |events: &[Event]| events.contains(&Event::Copied { incarnation: 7 });
    let proof = bench.says(0, 0, GENERATION, 7);
    let bundle = Bundle { subject: bench.id(0), alive: Some(proof.clone()), accusations: Vec::new() };
    assert!(copied(&bench.takes(1, &life_item(&bundle))));
    assert_eq!(bench.incarnation(), 7);
    let accusation = bench.says(2, 0, GENERATION, 7);
    assert!(!copied(&bench.accuses(2, 0, accusation, Some(proof))), "once");
    assert_eq!(bench.incarnation(), 8);

    // At the end of the numbers only a new generation helps; nothing overflows or spins.
    let last = bench.says(0, 0, GENERATION, u32::MAX);
    let accusation = bench.says(1, 0, GENERATION, u32::MAX);
    let events = bench.accuses(1, 0, accusation, Some(last));
    assert!(events.contains(&Event::Copied { incarnation: u32::MAX }));
    bench.waits(Duration::from_secs(30));
    assert_eq!(bench.incarnation(), u32::MAX);
}

#[test]
fn an_accused_member_is_pinged_with_what_it_is_accused_of() {
    let mut bench = Bench::new(4);
    let accusation = bench.says(1, 2, GENERATION, 0);
    bench.accuses(1, 2, accusation.clone(), None);
    let accused = bench.id(2);
    let events = bench.waits(Duration::from_secs(5));
    let bundle = Bundle { subject: accused, alive: None, accusations: vec![accusation] };
    let told = sent(&events).into_iter().any(|(to, parts)| {
        let [Part::Ping { .. }, item] = &parts[..] else { return false };
        to == accused
            && *item == Part::Item { kind: Kind::LIVENESS, bytes: postcard::to_allocvec(&bundle).unwrap() }
    });
    assert!(told);
}

#[test]
fn only_those_who_were_asked_can_answer_for_another() {
    for (liar, believed) in [(Some(false), false), (Some(true), true), (None, true)] {
        let mut bench = Bench::new(8);
        // Until a probe is asked of others.
        let mut events = Vec::new();
        let (number, target, helpers) = loop {
            events.append(&mut bench.waits(Duration::from_millis(50)));
            let asks = sent(&events).into_iter().filter_map(|(to, parts)| match parts[..] {
                [Part::Ask { number, target }] => Some((number, target, to)),
                _ => None,
            });
            let asks: Vec<_> = asks.collect();
            if let Some((number, target, _)) = asks.first().copied() {
                break (
                    number,
                    target,
                    asks.iter().filter(|ask| ask.0 == number).map(|ask| ask.2).collect::<Vec<_>>(),
                );
            }
        };
        let place = |id: NodeId| (0..9).find(|place| bench.id(*place) == id).unwrap();
        let others: Vec<_> =
            (1..9).filter(|at| bench.id(*at) != target && !helpers.contains(&bench.id(*at))).collect();
        let from = match liar {
            Some(true) => place(helpers[0]),
            Some(false) => others[0],
            None => place(target),
        };
        let mut writer = Writer::default();
        writer.push(&Part::Ack { number });
        bench.takes(from, &writer.take());
        bench.waits(Duration::from_millis(1_200));
        let accused = bench.gossip.lives.get(&target).is_some_and(Entry::is_accused);
        assert_eq!(!accused, believed, "{liar:?}");
    }
}

#[test]
fn a_removed_member_is_left_alone_and_has_no_voice() {
    let mut bench = Bench::new(6);
    for byte in 0..4 {
        bench.keys.items.insert(fact(byte), vec![byte; 9]);
        bench.gossip.publish(fact(byte), Content([byte; 8]), bench.now);
    }
    let fingerprint = bench.gossip.fingerprint();
    let accusation = bench.says(1, 2, GENERATION, 0);
    bench.accuses(1, 2, accusation, None);
    assert_ne!(bench.gossip.fingerprint(), fingerprint);
    // Member 1 has asked for something, and is being probed.
    let mut writer = Writer::default();
    writer.push(&Part::Ask { number: 1, target: bench.id(3) });
    bench.takes(1, &writer.take());
    bench.gossip.probe(bench.id(1), bench.now);
    bench.gossip.take_events();

    let gone = bench.id(1);
    bench.gossip.remove_member(&gone);
    assert_eq!(bench.gossip.fingerprint(), fingerprint, "its vote is withdrawn");
    assert!(!bench.gossip.is_reachable(&gone));
    bench.gossip.heard(&gone, bench.now);
    let mut writer = Writer::default();
    writer.push(&Part::Ping { number: 1 });
    assert_eq!(bench.takes(1, &writer.take()), []);
    let late = bench.says(1, 3, GENERATION, 0);
    bench.accuses(2, 3, late, None);
    assert_eq!(bench.gossip.fingerprint(), fingerprint, "nor does anybody vote for it");

    let events = bench.waits(Duration::from_secs(60));
    assert!(sent(&events).iter().all(|(to, _)| *to != gone));
    let about_it = |event: &Event| matches!(event, Event::Reachable { node, .. } if *node == gone);
    assert!(!events.iter().any(about_it) && bench.gossip.unreachable() == 5, "the others do not answer");
    assert!(!bench.gossip.lives.contains_key(&gone));

    // All can go and come, in any order.
    for place in [4, 2, 6, 3, 5] {
        let id = bench.id(place);
        bench.gossip.remove_member(&id);
        bench.waits(Duration::from_secs(3));
    }
    assert_eq!(
        (bench.gossip.unreachable(), bench.gossip.pick(true), bench.gossip.pick(false)),
        (0, None, None)
    );
    bench.gossip.add_member(gone, GENERATION);
    assert!(bench.gossip.is_reachable(&gone));
    assert!(sent(&bench.waits(Duration::from_secs(3))).iter().any(|(to, _)| *to == gone));
}

#[test]
fn a_member_that_is_heard_after_it_was_accused_and_then_dies_is_found_out() {
    let mut bench = Bench::new(9);
    let accusation = bench.says(1, 2, GENERATION, 0);
    bench.accuses(1, 2, accusation, None);
    let dying = bench.id(2);
    bench.waits(Duration::from_secs(2));
    bench.takes(2, &payload_of([Part::Nack { number: 0 }]));
    let found = |events: &[Event]| events.contains(&Event::Reachable { node: dying, reachable: false });
    let spared = bench.gossip.lives[&dying].deadline(10).unwrap().since(bench.now);
    let mut events = bench.waits(spared.min(Duration::from_secs(1)));
    assert!(!found(&events), "it has been heard");
    events.append(&mut bench.waits(Duration::from_secs(10)));
    assert!(found(&events));
}

#[test]
fn an_accusation_is_taken_as_soon_as_the_accuser_is_known() {
    let mut bench = Bench::new(3);
    let accusation = bench.says(4, 2, GENERATION, 0);
    let fingerprint = bench.gossip.fingerprint();
    bench.accuses(1, 2, accusation.clone(), None);
    assert_eq!(bench.gossip.fingerprint(), fingerprint);
    let new = bench.id(4);
    bench.gossip.add_member(new, GENERATION);
    bench.accuses(1, 2, accusation, None);
    assert_ne!(bench.gossip.fingerprint(), fingerprint, "the same bytes again");
}

#[test]
fn a_tunnel_answers_for_a_member_and_brings_it_back() {
    let mut bench = Bench::new(1);
    let peer = bench.id(1);
    let pinged = |events: &[Event]| {
        sent(events).iter().any(|(_, parts)| parts.iter().any(|part| matches!(part, Part::Ping { .. })))
    };
    for _ in 0..60 {
        bench.gossip.heard(&peer, bench.now);
        let events = bench.waits(Duration::from_secs(1));
        assert!(!pinged(&events), "it needs no probe");
    }
    // A probe that is under way is answered by it.
    assert!(pinged(&bench.waits(Duration::from_secs(2))));
    bench.gossip.heard(&peer, bench.now);
    bench.waits(Duration::from_millis(1_100));
    assert!(!bench.gossip.lives.contains_key(&peer), "nobody is accused");

    bench.waits(Duration::from_secs(20));
    assert!(!bench.gossip.is_reachable(&peer));
    bench.gossip.heard(&peer, bench.now);
    assert_eq!(bench.gossip.take_events(), [Event::Reachable { node: peer, reachable: true }]);
    assert!(bench.gossip.is_reachable(&peer));

    // What others say of it does not count while it is heard.
    let mut bench = Bench::new(3);
    let accusation = bench.says(2, 1, GENERATION, 0);
    bench.accuses(2, 1, accusation, None);
    for _ in 0..20 {
        bench.gossip.heard(&peer, bench.now);
        bench.waits(Duration::from_secs(1));
        assert!(bench.gossip.is_reachable(&peer));
    }
}

/// The first datagram of a member's start may be a repetition, and gets one datagram in answer.
#[test]
fn the_first_answer_to_what_may_be_a_repetition_asks_for_proof() {
    let mut bench = Bench::new(3);
    let peer = bench.keys.identities[1].node_id();
    let mut writer = Writer::default();
    writer.push(&Part::Ping { number: 77 });
    let payload = writer.take();
    bench.gossip.receive(peer, &payload, false, &mut bench.keys, bench.now);
    let events = bench.gossip.take_events();
    let sent = sent(&events);
    let (to, parts) = sent.first().unwrap();
    let [Part::Ping { number }, Part::Ack { number: 77 }] = parts[..] else { panic!("{parts:?}") };
    assert_eq!(*to, peer);
    assert!(bench.gossip.proves(&peer, &Part::Ack { number }));
    assert!(!bench.gossip.proves(&peer, &Part::Ack { number: number.wrapping_add(1) }));
    assert!(!bench.gossip.proves(&bench.keys.identities[2].node_id(), &Part::Ack { number }));
    bench.gossip.receive(peer, &payload, true, &mut bench.keys, bench.now);
    assert!(!sent_pings(&bench.gossip.take_events()), "it has proved that already");
}

fn sent_pings(events: &[Event]) -> bool {
    sent(events).iter().flat_map(|(_, parts)| parts).any(|part| matches!(part, Part::Ping { .. }))
}

#[test]
fn what_is_put_in_counts_and_what_is_taken_out_is_not_told() {
    let mut bench = Bench::new(2);
    let empty = bench.gossip.fingerprint();
    bench.gossip.catalogue.set(fact(1), Some(Content([1; 8])));
    let one = bench.gossip.fingerprint();
    assert_ne!(one, empty);
    assert!(bench.gossip.rumours.is_empty(), "what was there before is no news");
    bench.keys.items.insert(fact(2), vec![2; 9]);
    bench.gossip.publish(fact(2), Content([2; 8]), bench.now);
    bench.gossip.remove(fact(2));
    bench.gossip.remove(fact(3));
    assert_eq!(bench.gossip.fingerprint(), one);
    let events = bench.waits(Duration::from_secs(5));
    let told = |part: &Part| matches!(part, Part::Item { kind: FACT, .. });
    assert!(!sent(&events).iter().any(|(_, parts)| parts.iter().any(told)));
}

/// A hostile member has found 5,000 names with the same first digits: they are nevertheless reconciled, in datagrams.
#[test]
fn names_that_begin_alike_reach_a_node_that_lacks_them() {
    let mut benches = [Bench::new(1), Bench::new(1)];
    let ids = [benches[0].id(0), benches[0].id(1)];
    benches[1].keys.identities.swap(0, 1);
    benches[1].gossip = Gossip::new(ids[1], CLUSTER, GENERATION, [2; 32], Time::ZERO);
    benches[1].gossip.add_member(ids[0], GENERATION);
    for number in 0..5_000u16 {
        let mut id = [9; 16];
        id[2..4].copy_from_slice(&number.to_be_bytes());
        // One has most of them, the other some, and some have both.
        for (number, has) in [!number.is_multiple_of(5), number % 9 < 2].into_iter().enumerate() {
            if has || id[3] == 7 {
                benches[number].keys.items.insert(Name { id, kind: FACT }, id.to_vec());
                benches[number].gossip.catalogue.set(Name { id, kind: FACT }, Some(Content([1; 8])));
            }
        }
    }
    let mut now = Time::ZERO;
    while benches[0].gossip.fingerprint() != benches[1].gossip.fingerprint() {
        assert!(now < Time::ZERO + Duration::from_secs(60), "never equal");
        now = now + Duration::from_millis(10);
        for (here, there) in [(0, 1), (1, 0)] {
            let bench = &mut benches[here];
            bench.gossip.tick(&mut bench.keys, now);
            for event in bench.gossip.take_events() {
                if let Event::Send { payload, .. } = event {
                    let bench = &mut benches[there];
                    bench.gossip.receive(ids[here], &payload, true, &mut bench.keys, now);
                }
            }
        }
    }
    assert!(
        benches[0].keys.items.len() > 4_000 && benches[0].keys.items.keys().eq(benches[1].keys.items.keys())
    );
}

/// A node with 20,000 items and 200 members, and what a hostile one may send.
fn rich() -> Bench {
    let mut bench = Bench::new(200);
    for number in 0..20_000u16 {
        let [high, low] = number.to_be_bytes();
        let mut id = [low; 16];
        (id[0], id[1]) = (high.wrapping_mul(37), low);
        id[2] = high;
        let name = Name { id, kind: FACT };
        bench.keys.items.insert(name, vec![low; 1_000]);
        bench.gossip.catalogue.set(name, Some(Content([low; 8])));
    }
    bench
}

fn payload_of(parts: impl IntoIterator<Item = Part>) -> Vec<u8> {
    let mut writer = Writer::default();
    for part in parts {
        if !writer.push(&part) {
            break;
        }
    }
    writer.take()
}

#[test]
fn little_that_is_sent_does_not_make_a_node_send_much() {
    let mut bench = rich();
    let everything = bench.gossip.catalogue.clone();
    let names: Vec<Name> = bench.keys.items.keys().copied().collect();
    let ids: Vec<NodeId> = (2..200).map(|place| bench.id(place)).collect();
    let sums = || Part::Sums(vec![(Range::ALL, Sum(1))]);
    let accusation = |place: usize| {
        let accusations = vec![bench.says(1, place, GENERATION, 0)];
        let bundle = Bundle { subject: bench.id(place), alive: None, accusations };
        Part::Item { kind: Kind::LIVENESS, bytes: postcard::to_allocvec(&bundle).unwrap() }
    };
    let all_ranges = everything.compare(&[(Range::ALL, Sum(1))], 1, 0).sums;
    let wrong: Vec<_> = all_ranges.iter().map(|(range, _)| (*range, Sum(7))).collect();
    let payloads = [
        payload_of((0..400).map(|number| Part::Ping { number })),
        payload_of((0..400).map(|number| Part::Ask { number, target: ids[number as usize % ids.len()] })),
        payload_of((0..400).map(|_| sums())),
        payload_of((0..400).map(|_| Part::Sums(wrong.clone()))),
        payload_of((0..400).map(|_| Part::List { range: Range::ALL, names: Vec::new() })),
        payload_of(names.chunks(5).map(|some| Part::Want(some.to_vec()))),
        payload_of((0..400).map(|_| Part::Want(vec![names[0]; 5]))),
        payload_of((2..200).map(accusation)),
        payload_of((0..400).flat_map(|number| {
            let target = ids[number as usize % ids.len()];
            [
                Part::Ping { number },
                Part::Ask { number, target },
                sums(),
                Part::Want(vec![names[number as usize]]),
            ]
        })),
    ];
    for (number, payload) in payloads.iter().enumerate() {
        // Whether it comes from one that was thought to be dead or not.
        for reachable in [true, false] {
            let id = bench.id(1);
            bench.gossip.set_reachable(id, reachable);
            bench.gossip.take_events();
            let events = bench.takes(1, payload);
            let sends = sent(&events).len();
            assert!(sends <= ANSWERS, "payload {number} causes {sends}");
        }
    }
}

#[test]
fn one_asker_does_not_take_all_the_help_there_is() {
    let mut bench = Bench::new(80);
    let ids: Vec<NodeId> = (3..80).map(|place| bench.id(place)).collect();
    for number in 0..70 {
        let ask = payload_of([Part::Ask { number, target: ids[number as usize] }]);
        bench.takes(1, &ask);
    }
    let ask = payload_of([Part::Ask { number: 1, target: ids[0] }]);
    assert_eq!(sent(&bench.takes(2, &ask)).len(), 1, "another is helped");
}

proptest! {
    #[test]
    fn no_payload_makes_a_node_send_much(
        kinds in prop::collection::vec((1u8..8, any::<u16>()), 1..80),
        garbage in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bench = Bench::new(12);
        for byte in 0..=255 {
            bench.keys.items.insert(fact(byte), vec![byte; 1_100]);
            bench.gossip.catalogue.set(fact(byte), Some(Content([byte; 8])));
        }
        let parts = kinds.iter().map(|(kind, seed)| {
            let number = u32::from(*seed);
            let name = fact(*seed as u8);
            match kind {
                1 => Part::Ping { number },
                2 => Part::Ack { number },
                3 => Part::Ask { number, target: bench.id(1 + usize::from(*seed) % 12) },
                4 => Part::Nack { number },
                5 => Part::Sums(vec![(Range::ALL, Sum(number.into()))]),
                6 => Part::List { range: Range::ALL, names: vec![(name, Content([0; 8]))] },
                _ => Part::Want(vec![name, fact(9)]),
            }
        });
        let mut payload = payload_of(parts);
        payload.extend(garbage);
        let events = bench.takes(1, &payload);
        let count = events.iter().filter(|event| matches!(event, Event::Send { .. })).count();
        prop_assert!(count <= ANSWERS);
        for event in &events {
            let long = matches!(event, Event::Send { payload, .. } if payload.len() > wire::MAX_PAYLOAD);
            prop_assert!(!long);
        }
    }
}

/// A member of five thousand is idle almost all the time: an hour of peace takes far less than 2 % of it, and what there is
/// to do does not grow with the number of members.
#[test]
fn peace_among_five_thousand_costs_next_to_nothing() {
    let mut gossip = Gossip::new(NodeId::from_bytes([255; 16]), CLUSTER, GENERATION, [1; 32], Time::ZERO);
    let mut keys = Bench::new(0).keys;
    for number in 0..5_000u16 {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_be_bytes());
        gossip.add_member(NodeId::from_bytes(id), GENERATION);
    }
    // One that cannot be reached is found among all the others.
    let lost = NodeId::from_bytes([0; 16]);
    gossip.set_reachable(lost, false);
    gossip.take_events();
    let mut ticks = 0;
    while gossip.poll_timeout() < Time::ZERO + Duration::from_secs(3600) {
        let now = gossip.poll_timeout();
        gossip.tick(&mut keys, now);
        for event in gossip.take_events() {
            let Event::Send { to, payload } = event else { continue };
            for part in wire::read(&payload) {
                if let Ok(Part::Ping { number }) = part
                    && to != lost
                {
                    gossip.receive(to, &payload_of([Part::Ack { number }]), true, &mut keys, now);
                }
            }
        }
        ticks += 1;
    }
    // Two probes a second, a comparison each ten; the one that is lost is left to others almost all the time.
    assert!((7_500..8_500).contains(&ticks), "{ticks} ticks");
    assert_eq!(gossip.unreachable(), 1);
}
