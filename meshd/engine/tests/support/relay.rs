//! A bad path between two devices: drops, duplicates, replays, damages and reorders, the same way each time.
//!
//! The relay has two sockets in the namespace of the first end, and each end takes one of them for the other end.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::{Link, Underlay};

/// Every how many data messages something befalls one of them; 0 is never. Handshakes are not lost, for each loss would
/// cost five seconds.
#[derive(Debug, Default, Clone, Copy)]
pub struct Mischief {
    /// It does not arrive.
    pub drop: u64,
    /// It arrives again at once.
    pub duplicate: u64,
    /// It arrives again after [`AGES`] others, each in turn; and so does every handshake message.
    pub replay: u64,
    /// A copy with one bit changed, each in turn, arrives before it.
    pub damage: u64,
    /// It arrives after 1 to 32 of its successors.
    pub reorder: u64,
}

/// How many messages later replays come: inside of the window that receivers keep for late messages, and beyond.
const AGES: [usize; 3] = [1, 200, 9_000];

/// What befell the messages of both directions.
#[derive(Debug, Default)]
pub struct Counts {
    pub forwarded: AtomicU64,
    pub dropped: AtomicU64,
    pub repeated: AtomicU64,
    pub damaged: AtomicU64,
    pub reordered: AtomicU64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [forwarded, dropped, repeated, damaged, reordered] =
            [&self.forwarded, &self.dropped, &self.repeated, &self.damaged, &self.reordered]
                .map(|count| count.load(Ordering::Relaxed));
        write!(
            f,
            "{forwarded} forwarded, {dropped} dropped, {repeated} repeated, {damaged} damaged, {reordered} reordered"
        )
    }
}

/// A running relay.
pub struct Relay {
    pub counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Puts itself between both ends of `link`, which have not spoken yet.
    pub fn between(link: &Link, mischief: Mischief) -> Self {
        assert_eq!(link.underlay, Underlay::V4);
        let [a, b] = &link.ends;
        let sockets = a.namespace.inside(|| {
            ["127.0.0.1:0", "192.0.2.1:0"].map(|address| {
                let socket = UdpSocket::bind(address).unwrap();
                socket.set_read_timeout(Some(QUIET)).unwrap();
                setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
                socket
            })
        });
        let addresses = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        a.replace_peer(|peer| peer.endpoint = Some(addresses[0]));
        b.replace_peer(|peer| peer.endpoint = Some(addresses[1]));

        let counts = Arc::new(Counts::default());
        let stop = Arc::new(AtomicBool::new(false));
        let [near, far] = sockets.map(Arc::new);
        let to_a = SocketAddr::from(([127, 0, 0, 1], a.port));
        let to_b = link.endpoint(1).parse().unwrap();
        let threads = [(&near, &far, to_b), (&far, &near, to_a)].map(|(from, to, target)| {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            let lane =
                Lane { to, target, mischief, counts, data: 0, late: Vec::new(), past: VecDeque::new() };
            thread::spawn(move || lane.run(&from, &stop))
        });
        Self { counts, stop, threads: threads.into() }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

/// When nothing has come for so long, nothing more is held back.
const QUIET: Duration = Duration::from_millis(20);

/// One direction.
struct Lane {
    to: Arc<UdpSocket>,
    target: SocketAddr,
    mischief: Mischief,
    counts: Arc<Counts>,
    /// Data messages so far.
    data: u64,
    /// Messages held back, with the number of the data message after which they are released.
    late: Vec<(u64, Vec<u8>)>,
    /// What may be replayed, the newest at the back.
    past: VecDeque<Vec<u8>>,
}

impl Lane {
    fn run(mut self, from: &UdpSocket, stop: &AtomicBool) {
        let mut buffer = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            match from.recv(&mut buffer) {
                Ok(length) => self.take(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.release(u64::MAX),
                // A device that is not there (yet, or any more).
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => panic!("the relay cannot receive: {error}"),
            }
        }
    }

    fn take(&mut self, message: &[u8]) {
        let Mischief { drop, duplicate, replay, damage, reorder } = self.mischief;
        if message.first() != Some(&4) {
            self.forward(message, &self.counts.forwarded);
            if replay > 0 {
                self.forward(message, &self.counts.repeated);
                self.late.push((self.data + 500, message.to_vec()));
            }
            return;
        }
        self.data += 1;
        let number = self.data;
        let hit = |every: u64| every > 0 && number.is_multiple_of(every);
        if hit(damage) {
            let mut copy = message.to_vec();
            let bit = (number / damage) as usize % (8 * copy.len());
            copy[bit / 8] ^= 1 << (bit % 8);
            self.forward(&copy, &self.counts.damaged);
        }
        if hit(drop) {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        } else if hit(reorder) {
            self.counts.reordered.fetch_add(1, Ordering::Relaxed);
            self.late.push((number + 1 + number / reorder % 32, message.to_vec()));
        } else {
            self.forward(message, &self.counts.forwarded);
            if replay > 0 {
                self.past.push_back(message.to_vec());
            }
        }
        if hit(duplicate) {
            self.forward(message, &self.counts.repeated);
        }
        if hit(replay) {
            let age = AGES[(number / replay) as usize % AGES.len()];
            if let Some(old) = self.past.len().checked_sub(age).and_then(|index| self.past.get(index)) {
                self.forward(old, &self.counts.repeated);
            }
        }
        if self.past.len() > AGES[2] {
            self.past.pop_front();
        }
        self.release(number);
    }

    fn release(&mut self, now: u64) {
        let due = self.late.extract_if(.., |(when, _)| *when <= now);
        for (_, message) in due.collect::<Vec<_>>() {
            self.forward(&message, &self.counts.forwarded);
        }
    }

    fn forward(&self, message: &[u8], count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
        match self.to.send_to(message, self.target) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => panic!("the relay cannot send to {}: {error}", self.target),
        }
    }
}
