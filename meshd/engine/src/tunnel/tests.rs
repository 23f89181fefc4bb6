//! Two tunnels talk to each other under a clock that the tests turn.

use std::net::SocketAddr;

use super::*;
use crate::handshake::read_initiation;

const PACKET: [u8; 64] = {
    let mut packet = [0; 64];
    packet[0] = 0x45;
    packet[3] = 64;
    packet
};

/// One end: its tunnel, and what it has received.
struct End {
    keys: Arc<LocalKeys>,
    tunnel: Tunnel,
    address: SocketAddr,
    out: SendBatch,
    packets: usize,
    keepalives: usize,
    refused: Vec<Refused>,
}

#[derive(Debug, PartialEq)]
enum Sealed {
    Sent,
    Staged,
    NoEndpoint,
    BatchFull,
}

fn seal(tunnel: &mut Tunnel, now: Instant, out: &mut SendBatch) -> Sealed {
    let length = PACKET.len() + OVERHEAD;
    if !out.has_space(length) {
        return Sealed::BatchFull;
    }
    match tunnel.reserve(1, length, now, out) {
        Reserved::Ready { session, counter, to } => {
            let space = &mut out.space(length).unwrap()[..length];
            space[HEADER_LEN..HEADER_LEN + PACKET.len()].copy_from_slice(&PACKET);
            session.seal(counter, space).unwrap();
            out.commit(&to, length);
            Sealed::Sent
        }
        Reserved::Stage => {
            tunnel.stage(&PACKET, now, out);
            Sealed::Staged
        }
        Reserved::NoEndpoint => Sealed::NoEndpoint,
        Reserved::BatchFull => Sealed::BatchFull,
    }
}

struct Pair {
    now: Instant,
    indices: Arc<IndexTable>,
    ends: [End; 2],
    /// Messages to this end are lost.
    deaf: [bool; 2],
    initiations: usize,
}

impl End {
    fn new(secret: u8, remote: u8, indices: &Arc<IndexTable>) -> Self {
        let keys = |byte| Arc::new(LocalKeys::new(&SecretKey::new(&[byte; 32])).unwrap());
        let local = keys(secret);
        let mut tunnel =
            Tunnel::new(keys(remote).public, Some(Arc::clone(&local)), Arc::clone(indices), Weak::new());
        tunnel.set_endpoint(SocketAddr::from(([192, 0, 2, remote], 1)));
        let address = SocketAddr::from(([192, 0, 2, secret], 1));
        let out = SendBatch::new(1 << 20);
        Self { keys: local, tunnel, address, out, packets: 0, keepalives: 0, refused: Vec::new() }
    }

    fn receive(&mut self, message: &[u8], from: &Destination, now: Instant) {
        let (tunnel, out) = (&mut self.tunnel, &mut self.out);
        let result = match message[0] {
            1 => {
                let mut message = message.try_into().unwrap();
                let claimed = read_initiation(&self.keys, &mut message).unwrap();
                tunnel.handle_initiation(claimed, from, now, out)
            }
            2 => tunnel.handle_response(message, from, now, out),
            3 => tunnel.handle_cookie(message, now),
            _ => self.receive_data(message, from, now),
        };
        self.refused.extend(result.err());
    }

    /// As the inbound thread does.
    fn receive_data(&mut self, message: &[u8], from: &Destination, now: Instant) -> Result<(), Refused> {
        let index = word(message, 4).unwrap();
        let mut message = message.to_vec();
        let sessions =
            [&self.tunnel.live, &self.tunnel.previous, &self.tunnel.answered].map(|keypair| keypair.as_ref());
        let keypair = sessions.into_iter().flatten().find(|keypair| keypair.session.index() == index);
        let session = Arc::clone(&keypair.ok_or(Refused::UnknownIndex)?.session);
        let (counter, length) = session.open(&mut message).map_err(|_| Refused::NotAuthentic)?;
        let mut run = [Received { counter, length: message.len(), data: length > 0, fresh: false }];
        self.tunnel.receive(&session, from, now, &mut run, &mut self.out)?;
        if length > 0 {
            assert_eq!(message[HEADER_LEN..HEADER_LEN + length], PACKET);
            self.packets += 1;
        } else {
            self.keepalives += 1;
        }
        Ok(())
    }

    /// As the outbound thread does.
    fn seal(&mut self, now: Instant) -> Sealed {
        seal(&mut self.tunnel, now, &mut self.out)
    }
}

impl Pair {
    fn new() -> Self {
        let indices = Arc::default();
        let ends = [End::new(1, 2, &indices), End::new(2, 1, &indices)];
        Self { now: Instant::now(), indices, ends, deaf: [false; 2], initiations: 0 }
    }

    fn established() -> Self {
        let mut pair = Self::new();
        pair.send(0);
        assert_eq!((pair.ends[1].packets, pair.initiations), (1, 1));
        // The answerer sends, too, so that neither owes or awaits anything.
        pair.send(1);
        pair
    }

    /// Sends one packet from `end` and delivers everything that follows from it.
    fn send(&mut self, end: usize) {
        assert_ne!(self.ends[end].seal(self.now), Sealed::NoEndpoint);
        self.deliver();
    }

    fn deliver(&mut self) {
        while self.ends.iter().any(|end| !end.out.is_empty()) {
            for sender in [0, 1] {
                let messages: Vec<_> =
                    self.ends[sender].out.iter().map(|(to, message)| (*to, message.to_vec())).collect();
                self.ends[sender].out.clear();
                let from = Destination { address: self.ends[sender].address, source: None };
                for (to, message) in messages {
                    self.initiations += usize::from(message[0] == 1);
                    let receiver = &mut self.ends[1 - sender];
                    if to.address == receiver.address && !self.deaf[1 - sender] {
                        receiver.receive(&message, &from, self.now);
                    }
                }
            }
        }
    }

    /// Lets time pass, timers firing when they are due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        for rounds in 0.. {
            assert!(rounds < 10_000, "timers fire without end");
            let next = self.ends.iter().filter_map(|e| e.tunnel.poll_timeout(self.now)).min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            for end in &mut self.ends {
                if end.tunnel.poll_timeout(self.now).is_some_and(|due| due <= self.now) {
                    end.tunnel.handle_timeout(self.now, &mut end.out);
                }
            }
            self.deliver();
        }
        self.now = end;
    }

    /// Has an end forget its sessions, as a process that was killed.
    fn begin_anew(&mut self, lost: usize) {
        // Time stamps come from the real clock, in steps of 17 ms.
        std::thread::sleep(Duration::from_millis(17));
        let end = &mut self.ends[lost];
        let (remote, endpoint) = (end.tunnel.remote, end.tunnel.endpoint.unwrap().address);
        let indices = Arc::clone(&self.indices);
        end.tunnel = Tunnel::new(remote, Some(Arc::clone(&end.keys)), indices, Weak::new());
        end.tunnel.set_endpoint(endpoint);
    }

    fn received(&self) -> [usize; 2] {
        [self.ends[0].packets, self.ends[1].packets]
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn psk(byte: u8) -> SecretKey {
    SecretKey::new(&[byte; 32])
}

#[test]
fn packets_wait_for_the_handshake_and_arrive_in_order_of_sending() {
    let mut pair = Pair::new();
    let End { tunnel, out, .. } = &mut pair.ends[0];
    for _ in 0..10 {
        assert_eq!(seal(tunnel, pair.now, out), Sealed::Staged);
    }
    pair.deliver();
    assert_eq!((pair.received(), pair.initiations), ([0, 10], 1));
    assert!(pair.ends[0].tunnel.last_handshake.is_some() && pair.ends[1].tunnel.last_handshake.is_some());
    let (a, b) = (pair.ends[0].tunnel.report(), pair.ends[1].tunnel.report());
    assert_eq!((a.tx_bytes, a.rx_bytes), (b.rx_bytes, b.tx_bytes));
    assert_eq!(a.tx_bytes, 148 + 10 * 96, "what waited confirms the session, no keepalive is needed");
}

#[test]
fn more_packets_than_can_wait_push_out_the_oldest() {
    let mut pair = Pair::new();
    let End { tunnel, out, .. } = &mut pair.ends[0];
    for _ in 0..MAX_STAGED + 50 {
        seal(tunnel, pair.now, out);
    }
    pair.deliver();
    assert_eq!(pair.received(), [0, MAX_STAGED]);
}

#[test]
fn an_idle_tunnel_wants_nothing_until_its_session_ends() {
    let mut pair = Pair::new();
    assert_eq!(pair.ends[0].tunnel.poll_timeout(pair.now), None);
    pair = Pair::established();
    let sent = pair.initiations;
    pair.pass(seconds(400));
    assert_eq!(pair.initiations, sent);
    for end in &pair.ends {
        assert_eq!(end.tunnel.poll_timeout(pair.now), None);
        assert!(end.tunnel.live.is_none(), "keys are wiped when nothing may use them");
    }
    assert_eq!(pair.indices.len(), 0, "and their indices are free");
    pair.send(1);
    assert_eq!(pair.received(), [2, 1], "traffic wakes it again");
}

#[test]
fn traffic_one_way_is_answered_by_keepalives() {
    let mut pair = Pair::established();
    pair.send(0);
    let before = pair.ends[0].keepalives;
    pair.pass(seconds(9));
    assert_eq!(pair.ends[0].keepalives, before);
    pair.pass(seconds(2));
    assert_eq!(pair.ends[0].keepalives, before + 1);
    assert_eq!(pair.initiations, 1, "the keepalive proves that the peer lives");
}

#[test]
fn the_initiator_rekeys_under_traffic_and_nothing_is_lost() {
    for sender in [0, 1] {
        let mut pair = Pair::established();
        for _ in 0..4000 {
            pair.pass(Duration::from_millis(100));
            pair.send(sender);
        }
        assert_eq!(pair.received()[1 - sender], 4001);
        // 400 s: one at the start, then every 120 s when the initiator sends, every 165 s when it only receives.
        let expected = if sender == 0 { 4 } else { 3 };
        assert_eq!(pair.initiations, expected, "sender {sender}");
        assert!(pair.ends.iter().all(|end| end.refused.is_empty()));
    }
}

#[test]
fn a_silent_peer_is_called_anew_and_given_up_after_90_seconds() {
    let mut pair = Pair::established();
    // Until neither owes the other anything.
    pair.pass(seconds(30));
    pair.deaf[1] = true;
    pair.send(0);
    pair.pass(seconds(14));
    assert_eq!(pair.initiations, 1);
    pair.pass(seconds(300));
    // From 15 s on for 90 s, every 5 s and a little.
    assert!((17..=19).contains(&(pair.initiations - 1)), "{}", pair.initiations);
    assert_eq!(pair.ends[0].tunnel.poll_timeout(pair.now), None);
    pair.deaf[1] = false;
    pair.send(0);
    assert_eq!(pair.received(), [1, 2], "the next packet tries again; what waited too long is gone");
}

#[test]
fn a_lost_initiation_is_repeated() {
    let mut pair = Pair::new();
    pair.deaf[1] = true;
    pair.send(0);
    pair.deaf[1] = false;
    pair.pass(seconds(6));
    assert_eq!((pair.received(), pair.initiations), ([0, 1], 2));
}

#[test]
fn a_lost_answer_is_repeated() {
    let mut pair = Pair::new();
    pair.deaf[0] = true;
    pair.send(0);
    pair.pass(seconds(20));
    pair.deaf[0] = false;
    pair.pass(seconds(6));
    assert_eq!(pair.received(), [0, 1]);
}

#[test]
fn both_initiate_at_once_and_agree_on_one_session() {
    for _ in 0..20 {
        let mut pair = Pair::new();
        for end in &mut pair.ends {
            assert_eq!(end.seal(pair.now), Sealed::Staged);
        }
        pair.deliver();
        assert_eq!((pair.received(), pair.initiations), ([1, 1], 2));
        for _ in 0..10 {
            pair.send(0);
            pair.send(1);
        }
        assert_eq!(pair.received(), [11, 11]);
        let roles: Vec<_> =
            pair.ends.iter().map(|e| e.tunnel.live.as_ref().unwrap().initiated_here).collect();
        assert_ne!(roles[0], roles[1], "exactly one end feels bound to rekey");
    }
}

#[test]
fn a_peer_that_began_anew_is_followed_at_once() {
    // Whichever of the two has the smaller key.
    for lost in [0, 1] {
        for initiator in [0, 1] {
            let mut pair = Pair::new();
            pair.send(initiator);
            pair.send(1 - initiator);
            pair.pass(Duration::from_millis(100));
            pair.begin_anew(lost);
            for _ in 0..3 {
                pair.send(lost);
                pair.send(1 - lost);
            }
            assert_eq!(pair.received(), [4, 4], "end {lost} lost its state, end {initiator} had initiated");
        }
    }
}

#[test]
fn a_late_message_from_before_a_peer_began_anew_does_not_bring_its_session_back() {
    for lost in [0, 1] {
        for initiator in [0, 1] {
            let mut pair = Pair::new();
            pair.send(initiator);
            pair.send(1 - initiator);
            let End { tunnel, out, .. } = &mut pair.ends[lost];
            assert_eq!(seal(tunnel, pair.now, out), Sealed::Sent);
            let late = out.iter().next().unwrap().1.to_vec();
            out.clear();
            pair.pass(Duration::from_millis(100));
            pair.begin_anew(lost);
            pair.send(lost);
            let from = Destination { address: pair.ends[lost].address, source: None };
            pair.ends[1 - lost].receive(&late, &from, pair.now);
            pair.send(1 - lost);
            let mut expected = [2, 2];
            expected[1 - lost] = 3;
            assert_eq!(pair.received(), expected, "end {lost} lost its state, end {initiator} had initiated");
        }
    }
}

#[test]
fn a_new_psk_takes_effect_without_losing_a_packet() {
    for first in [0, 1] {
        let mut pair = Pair::established();
        let mut sent = 1;
        let mut turn = |pair: &mut Pair| {
            pair.pass(Duration::from_millis(10));
            pair.send(0);
            pair.send(1);
            sent += 1;
            assert_eq!(pair.received(), [sent, sent]);
        };
        turn(&mut pair);
        // The two ends learn of it a minute apart: more failed handshakes than boringtun's ring has places.
        pair.ends[first].tunnel.set_psk(psk(9));
        for _ in 0..6000 {
            turn(&mut pair);
        }
        let before = pair.ends[0].tunnel.live.as_ref().unwrap().established;
        pair.ends[1 - first].tunnel.set_psk(psk(9));
        turn(&mut pair);
        turn(&mut pair);
        let live = pair.ends[0].tunnel.live.as_ref().unwrap();
        assert!(live.established > before && live.psk_generation == 1, "rekeyed at once");
        for _ in 0..20_000 {
            turn(&mut pair);
        }
    }
}

#[test]
fn a_late_message_of_the_session_before_a_new_psk_does_not_bring_it_back() {
    for late in [0, 1] {
        let mut pair = Pair::established();
        let End { tunnel, out, .. } = &mut pair.ends[late];
        assert_eq!(seal(tunnel, pair.now, out), Sealed::Sent);
        let message = out.iter().next().unwrap().1.to_vec();
        out.clear();
        for end in &mut pair.ends {
            end.tunnel.set_psk(psk(9));
        }
        // The other end begins this time, so that the two sessions differ in who did.
        pair.ends[0].tunnel.rekey_now = false;
        pair.pass(Duration::from_millis(30));
        pair.send(1);
        let from = Destination { address: pair.ends[late].address, source: None };
        pair.ends[1 - late].receive(&message, &from, pair.now);
        for end in &pair.ends {
            let live = end.tunnel.live.as_ref().unwrap();
            assert_eq!((live.psk_generation, end.refused.len()), (1, 0), "late message of end {late}");
        }
    }
}

#[test]
fn a_wrong_psk_lets_nothing_through() {
    let mut pair = Pair::new();
    pair.ends[0].tunnel.set_psk(psk(1));
    pair.ends[1].tunnel.set_psk(psk(2));
    for _ in 0..30 {
        pair.send(0);
        pair.send(1);
        pair.pass(seconds(1));
    }
    assert_eq!(pair.received(), [0, 0]);
    assert!(pair.ends.iter().all(|end| end.tunnel.last_handshake.is_none()));
    pair.ends[0].tunnel.set_psk(psk(2));
    pair.pass(seconds(6));
    assert_eq!(pair.received(), [30, 30], "put right, what waited arrives");
}

#[test]
fn a_new_private_key_ends_all_sessions() {
    let mut pair = Pair::established();
    let keys = Arc::new(LocalKeys::new(&SecretKey::new(&[3; 32])).unwrap());
    pair.ends[0].keys = Arc::clone(&keys);
    pair.ends[0].tunnel.set_local(Some(Arc::clone(&keys)));
    assert!(pair.ends[0].tunnel.live.is_none());
    let indices = Arc::clone(&pair.indices);
    pair.ends[1].tunnel =
        Tunnel::new(keys.public, Some(Arc::clone(&pair.ends[1].keys)), indices, Weak::new());
    pair.send(0);
    assert_eq!(pair.received(), [1, 2]);
    pair.ends[0].tunnel.set_local(None);
    assert_eq!(pair.ends[0].seal(pair.now), Sealed::NoEndpoint);
    assert_eq!(pair.ends[0].tunnel.poll_timeout(pair.now), None);
}

#[test]
fn a_peer_is_followed_to_its_new_address_by_authentic_messages_only() {
    let mut pair = Pair::established();
    let old = pair.ends[0].address;
    let new = SocketAddr::from(([198, 51, 100, 7], 9));
    // A stranger replays a message from elsewhere, and forges another.
    let End { tunnel, out, .. } = &mut pair.ends[0];
    seal(tunnel, pair.now, out);
    let message = out.iter().next().unwrap().1.to_vec();
    pair.deliver();
    let stranger = Destination { address: new, source: None };
    let mut forged = message.clone();
    forged[40] ^= 1;
    forged[8] += 1;
    for message in [&message, &forged] {
        pair.ends[1].receive(message, &stranger, pair.now);
    }
    assert_eq!(pair.ends[1].refused, [Refused::Replayed, Refused::NotAuthentic]);
    assert_eq!(pair.ends[1].tunnel.endpoint.unwrap().address, old);
    // The peer itself moves.
    pair.ends[0].address = new;
    pair.send(0);
    assert_eq!(pair.ends[1].tunnel.endpoint.unwrap().address, new);
    pair.send(1);
    assert_eq!(pair.received()[0], 2);
}

#[test]
fn a_replayed_initiation_changes_nothing() {
    let mut pair = Pair::new();
    let End { tunnel, out, .. } = &mut pair.ends[0];
    seal(tunnel, pair.now, out);
    let initiation = out.iter().next().unwrap().1.to_vec();
    pair.deliver();
    // Also after the tunnel has rekeyed with another preshared key, when a fresh boringtun tunnel would take it.
    for end in &mut pair.ends {
        end.tunnel.set_psk(psk(5));
    }
    pair.pass(seconds(6));
    let stranger = Destination { address: SocketAddr::from(([198, 51, 100, 7], 9)), source: None };
    pair.ends[1].receive(&initiation, &stranger, pair.now);
    assert_eq!(pair.ends[1].refused.last(), Some(&Refused::Replayed));
    assert_eq!(pair.ends[1].tunnel.endpoint.unwrap().address, pair.ends[0].address);
    assert!(pair.ends[1].out.is_empty(), "not even an answer");
}

#[test]
fn initiations_in_quick_succession_are_not_answered() {
    let mut pair = Pair::new();
    for _ in 0..3 {
        let End { tunnel, out, .. } = &mut pair.ends[0];
        tunnel.attempt = None;
        tunnel.initiate(pair.now, out);
        let from = Destination { address: pair.ends[0].address, source: None };
        let initiation = pair.ends[0].out.iter().next().unwrap().1.to_vec();
        pair.ends[0].out.clear();
        pair.ends[1].receive(&initiation, &from, pair.now);
        pair.now += Duration::from_millis(1);
    }
    assert_eq!(pair.ends[1].refused, [Refused::Flood, Refused::Flood]);
}

#[test]
fn the_last_counters_are_refused() {
    let mut pair = Pair::established();
    let from = Destination { address: pair.ends[0].address, source: None };
    for counter in [u64::MAX, REJECT_AFTER_MESSAGES] {
        let mut message = [0; OVERHEAD];
        pair.ends[0].tunnel.live.as_ref().unwrap().session.seal(counter, &mut message).unwrap();
        pair.ends[1].receive(&message, &from, pair.now);
    }
    assert_eq!(pair.ends[1].refused, [Refused::Replayed; 2]);
}

#[test]
fn persistent_keepalives_start_at_once_and_keep_coming() {
    let mut pair = Pair::new();
    pair.ends[0].tunnel.set_keepalive(25);
    pair.pass(Duration::from_millis(1));
    assert_eq!(pair.initiations, 1, "a handshake, without any packet");
    pair.pass(seconds(600));
    assert!((22..=26).contains(&pair.ends[1].keepalives), "{}", pair.ends[1].keepalives);
    pair.ends[0].tunnel.set_keepalive(0);
    let before = pair.ends[1].keepalives;
    pair.pass(seconds(600));
    assert_eq!(pair.ends[1].keepalives, before);
}

#[test]
fn a_cookie_is_used_for_the_next_initiation() {
    let mut pair = Pair::new();
    // A device that is always under load.
    let public = x25519_dalek::PublicKey::from(*pair.ends[1].keys.public.as_bytes());
    let limiter = boringtun::noise::rate_limiter::RateLimiter::new(&public, 0);
    let from = Destination { address: pair.ends[0].address, source: None };
    let mut answers = Vec::new();
    for _ in 0..2 {
        let End { tunnel, out, .. } = &mut pair.ends[0];
        seal(tunnel, pair.now, out);
        tunnel.handle_timeout(pair.now, out);
        let initiation = out.iter().last().unwrap().1.to_vec();
        out.clear();
        let mut cookie = [0; 64];
        let verdict = limiter.verify_packet(Some(from.address.ip()), &initiation, &mut cookie);
        answers.push(verdict.is_ok());
        if verdict.is_err() {
            let from = Destination { address: pair.ends[1].address, source: None };
            pair.ends[0].receive(&cookie, &from, pair.now);
        }
        pair.now += seconds(6);
    }
    assert_eq!(answers, [false, true]);
    assert!(pair.ends[0].refused.is_empty());
}

#[test]
fn a_full_batch_delays_and_loses_nothing() {
    let mut pair = Pair::established();
    let end = &mut pair.ends[0];
    let mut tiny = SendBatch::new(200);
    let mut sent = 0;
    while seal(&mut end.tunnel, pair.now, &mut tiny) == Sealed::Sent {
        sent += 1;
    }
    assert_eq!(sent, 2, "room for twice 96 bytes");
    assert_eq!(seal(&mut end.tunnel, pair.now, &mut tiny), Sealed::BatchFull);
    assert_eq!(end.seal(pair.now), Sealed::Sent);
}

#[test]
fn dropped_tunnels_give_back_their_indices() {
    let pair = Pair::established();
    let Pair { indices, ends, .. } = pair;
    assert_eq!(indices.len(), 2);
    drop(ends);
    assert_eq!(indices.len(), 0);
}
