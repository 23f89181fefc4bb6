//! The thread that drives the tunnels' timers.
//!
//! A peer is *armed* while its tunnel waits for anything. With no peer armed the thread sleeps without limit. A packet
//! brings a tunnel's deadline forward by no less than a second (see `Tunnel::poll_timeout`), so the data path has to
//! wake nobody as long as the thread looks at all armed peers at least once a second.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_sys::udp::SendBatch;

use crate::device::Device;
use crate::peer::Peer;

/// Longest sleep while a peer is armed.
const LONGEST: Duration = Duration::from_secs(1);
/// Shortest sleep: with thousands of peers there is always one due, and looking at all of them costs about 50 ns each.
const SHORTEST: Duration = Duration::from_millis(50);
/// Handshake messages and keepalives are small: this holds more than a thousand.
const BATCH: usize = 192 << 10;

/// What the other threads and the timer thread share.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    armed: Vec<Arc<Peer>>,
    /// Look at once.
    urgent: bool,
    /// The thread sleeps without limit.
    parked: bool,
    stop: bool,
}

impl Timers {
    /// Makes sure that the thread knows of `peer`; called after every use of its tunnel, with its lock released.
    pub(crate) fn arm(&self, peer: &Arc<Peer>) {
        if !peer.armed.load(Ordering::Acquire) && !peer.armed.swap(true, Ordering::AcqRel) {
            let mut inbox = self.inbox();
            inbox.armed.push(Arc::clone(peer));
            if inbox.parked {
                self.wake.notify_one();
            }
        }
    }

    /// As [`Timers::arm`], and has the thread look at once: a change of the configuration is due now.
    pub(crate) fn arm_now(&self, peer: &Arc<Peer>) {
        self.arm(peer);
        self.inbox().urgent = true;
        self.wake.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.inbox().stop = true;
        self.wake.notify_one();
    }

    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until something may be due; appends newly armed peers. False when the thread has to end.
    fn sleep(&self, armed: &mut Vec<Arc<Peer>>, next: Option<Duration>) -> bool {
        let mut inbox = self.inbox();
        if !inbox.stop && !inbox.urgent {
            inbox = match next {
                Some(next) => {
                    let next = next.clamp(SHORTEST, LONGEST);
                    let quiet = |inbox: &mut Inbox| !inbox.stop && !inbox.urgent;
                    let woken = self.wake.wait_timeout_while(inbox, next, quiet);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    inbox.parked = true;
                    let quiet = |inbox: &mut Inbox| !inbox.stop && !inbox.urgent && inbox.armed.is_empty();
                    self.wake.wait_while(inbox, quiet).unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
        inbox.parked = false;
        inbox.urgent = false;
        armed.append(&mut inbox.armed);
        !inbox.stop
    }
}

/// The thread's body.
pub(crate) fn run(device: &Device) {
    let mut armed = Vec::new();
    let mut batch = SendBatch::new(BATCH);
    let mut next = None;
    while device.timers.sleep(&mut armed, next) {
        let now = Instant::now();
        let mut earliest: Option<Instant> = None;
        armed.retain(|peer| {
            if peer.is_gone() {
                return false;
            }
            let deadline = {
                let mut tunnel = peer.tunnel();
                if tunnel.poll_timeout(now).is_some_and(|deadline| deadline <= now) {
                    tunnel.handle_timeout(now, &mut batch);
                }
                let deadline = tunnel.poll_timeout(now);
                if deadline.is_none() {
                    // Under the tunnel's lock: whoever changes the tunnel next arms the peer again.
                    peer.armed.store(false, Ordering::Release);
                }
                deadline
            };
            // A staged packet or two may have come along; room for the next peer's whole queue is not kept.
            if !batch.has_space(BATCH / 2) {
                device.send(0, &mut batch);
            }
            earliest = [earliest, deadline].into_iter().flatten().min();
            deadline.is_some()
        });
        device.send(0, &mut batch);
        next = earliest.map(|earliest| earliest.saturating_duration_since(Instant::now()));
    }
}
