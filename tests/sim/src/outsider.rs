//! Somebody on the way between the hosts, who is no member: it keeps what it hears, and sends it again, to whomever,
//! whenever, whole or altered, from any address.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::node::Input;

use crate::network::CONTROL_PORT;
use crate::queue::Event;
use crate::world::World;

/// Datagrams that are remembered; the first half of them for good.
const HEARD: usize = 400;

/// One in so many is heard.
const SHARE: usize = 5;

/// Sent again at a time.
const AGAIN: usize = 8;

/// Pause between two acts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// A datagram as it was on its way.
struct Overheard {
    from: SocketAddr,
    to: usize,
    bytes: Vec<u8>,
}

/// Who listens and repeats.
#[derive(Default)]
pub struct Outsider {
    heard: Vec<Overheard>,
    count: usize,
}

impl Outsider {
    /// A datagram passes by.
    pub(crate) fn overhear(&mut self, from: SocketAddr, to: usize, bytes: &[u8]) {
        self.count += 1;
        if !self.count.is_multiple_of(SHARE) {
            return;
        }
        let overheard = Overheard { from, to, bytes: bytes.to_vec() };
        if self.heard.len() < HEARD {
            self.heard.push(overheard);
        } else {
            let place = HEARD / 2 + (self.count / SHARE) % (HEARD / 2);
            self.heard[place] = overheard;
        }
    }
}

impl World {
    /// An outsider listens from now on.
    pub(crate) fn overhear_all(&mut self) {
        if self.outsider.is_none() {
            self.say("somebody listens on the network".to_owned());
            self.outsider = Some(Outsider::default());
            self.queue.put(PAUSE.1, 0, 0, Event::Outsider);
        }
    }

    pub(crate) fn outsider_acts(&mut self) {
        let Some(outsider) = self.outsider.take() else { return };
        let pause = self.dice.span(PAUSE.0, PAUSE.1);
        self.queue.put(pause, 0, 0, Event::Outsider);
        for _ in 0..AGAIN {
            if !outsider.heard.is_empty() {
                let which = self.dice.below(outsider.heard.len());
                self.repeat(&outsider.heard[which]);
            }
        }
        self.outsider = Some(outsider);
    }

    fn repeat(&mut self, overheard: &Overheard) {
        let mut bytes = overheard.bytes.clone();
        let (mut from, mut to) = (overheard.from, overheard.to);
        match self.dice.below(6) {
            0 => to = self.dice.below(self.hosts.len()),
            1 => {
                from =
                    SocketAddr::new(self.network.place(self.dice.below(self.hosts.len())).own, CONTROL_PORT)
            }
            2 => from.set_port(1 + u16::from_le_bytes(self.dice.bytes()) / 2),
            3 => {
                let place = self.dice.below(bytes.len());
                bytes[place] ^= 1 << self.dice.below(8);
            }
            4 => bytes.truncate(self.dice.below(bytes.len())),
            _ => {}
        }
        // It is not behind the NAT: what it sends gets in by a mapping that is there, from the address this is for.
        let behind_nat = self.network.place(to).nat.is_some();
        if behind_nat && (from != overheard.from || to != overheard.to) {
            return;
        }
        let after = self.network.delay(to, to);
        let epoch = self.hosts[to].epoch;
        self.queue.put(after, to, epoch, Event::Tell(Box::new(Input::Datagram { from, to: None, bytes })));
    }
}
