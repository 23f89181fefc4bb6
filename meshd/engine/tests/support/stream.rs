//! A TCP connection that goes on until it is told to end, every byte of it checked.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Namespace, Pattern, eventually};

/// Bytes per write.
const PIECE: usize = 64 << 10;
/// A connection that moves nothing for so long is broken.
const STALL: Duration = Duration::from_secs(30);

/// A running transfer.
pub struct Stream {
    counts: Arc<Counts>,
    /// The sender and the receiver, until they are joined.
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    stop: AtomicBool,
}

impl Stream {
    /// Connects to `address` in `to` and sends as fast as it goes.
    pub fn start(from: &Namespace, to: &Namespace, address: IpAddr) -> Self {
        let counts = Arc::new(Counts::default());
        let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
        let target = listener.local_addr().unwrap();
        let (sending, receiving) = (Arc::clone(&counts), Arc::clone(&counts));
        let receiver = thread::spawn(move || receive(listener.accept().unwrap().0, &receiving));
        let stream = from.inside(|| TcpStream::connect_timeout(&target, Duration::from_secs(10)).unwrap());
        let sender = thread::spawn(move || send(stream, &sending));
        Self { counts, threads: vec![sender, receiver] }
    }

    /// Bytes that have arrived.
    pub fn received(&self) -> u64 {
        self.counts.received.load(Ordering::Relaxed)
    }

    /// Waits until bytes have arrived that were written after this call, and returns how long that took.
    pub fn crosses(&self, what: &str, limit: Duration) -> Duration {
        let started = Instant::now();
        let sent = self.counts.sent.load(Ordering::Relaxed);
        let over = || self.received() > sent || self.threads.iter().any(JoinHandle::is_finished);
        eventually(&format!("the stream goes on: {what}"), limit, over);
        assert!(self.received() > sent, "the stream ended: {what}");
        started.elapsed()
    }

    /// Ends it; panics unless all that was sent has arrived as it was. Returns the number of bytes.
    pub fn finish(mut self) -> u64 {
        self.counts.stop.store(true, Ordering::Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        let sent = self.counts.sent.load(Ordering::Relaxed);
        assert_eq!(self.received(), sent, "bytes received, and sent");
        sent
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.counts.stop.store(true, Ordering::Relaxed);
    }
}

fn send(mut stream: TcpStream, counts: &Counts) {
    stream.set_write_timeout(Some(STALL)).unwrap();
    let (mut pattern, mut buffer) = (Pattern(1), vec![0; PIECE]);
    while !counts.stop.load(Ordering::Relaxed) {
        pattern.fill(&mut buffer);
        stream.write_all(&buffer).unwrap();
        counts.sent.fetch_add(PIECE as u64, Ordering::Relaxed);
    }
    stream.shutdown(Shutdown::Write).unwrap();
    // The other end closes when it has everything.
    stream.set_read_timeout(Some(STALL)).unwrap();
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
}

fn receive(mut stream: TcpStream, counts: &Counts) {
    stream.set_read_timeout(Some(STALL)).unwrap();
    let (mut pattern, mut expected, mut actual) = (Pattern(1), vec![0; PIECE], vec![0; PIECE]);
    let mut total = 0usize;
    loop {
        // Reads of any length: wait for nothing that is not there.
        let place = total % PIECE;
        if place == 0 {
            pattern.fill(&mut expected);
        }
        match stream.read(&mut actual[place..]).unwrap() {
            0 => return,
            length => {
                let range = place..place + length;
                assert!(expected[range.clone()] == actual[range], "damaged after {total} bytes");
                total += length;
                counts.received.store(total as u64, Ordering::Relaxed);
            }
        }
    }
}
