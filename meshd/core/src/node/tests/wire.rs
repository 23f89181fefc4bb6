//! What the shell does with a connection that a member carries, without TLS: both ends say who they are, then frames
//! follow. The simulator has it too, so it knows nothing of the node.

use std::collections::VecDeque;

/// What came of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Happened {
    /// Both ends have said who they are.
    Opened {
        /// Key of the other end.
        peer: [u8; 32],
        /// The same at both ends, and drawn anew for each connection.
        seed: [u8; 32],
    },
    /// A frame came.
    Frame(Vec<u8>),
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Wire {
    me: [u8; 32],
    nonce: [u8; 32],
    /// Whether this end begins.
    pub(crate) dials: bool,
    open: bool,
    came: Vec<u8>,
    unsent: VecDeque<u8>,
    credit: usize,
}

impl Wire {
    /// An end with a key and a number that is not used twice, which may send `credit` bytes.
    pub(crate) fn new(dials: bool, me: [u8; 32], nonce: [u8; 32], credit: usize) -> Self {
        let mut wire =
            Self { me, nonce, dials, open: false, came: Vec::new(), unsent: VecDeque::new(), credit };
        if dials {
            wire.introduce();
        }
        wire
    }

    fn introduce(&mut self) {
        self.unsent.extend(self.me);
        self.unsent.extend(self.nonce);
    }

    /// Bytes have come from the other end.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Vec<Happened> {
        self.came.extend_from_slice(bytes);
        let mut happened = Vec::new();
        if !self.open && self.came.len() >= 64 {
            let rest = self.came.split_off(64);
            let (mut peer, mut seed) = ([0; 32], self.nonce);
            peer.copy_from_slice(&self.came[..32]);
            seed.iter_mut().zip(&self.came[32..]).for_each(|(a, b)| *a ^= b);
            self.came = rest;
            self.open = true;
            if !self.dials {
                self.introduce();
            }
            happened.push(Happened::Opened { peer, seed });
        }
        while self.open
            && let Some((length, rest)) = self.came.split_first_chunk::<4>()
            && rest.len() >= u32::from_le_bytes(*length) as usize
        {
            let length = u32::from_le_bytes(*length) as usize;
            happened.push(Happened::Frame(rest[..length].to_vec()));
            self.came.drain(..4 + length);
        }
        happened
    }

    /// A frame is to be sent.
    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.unsent.extend((frame.len() as u32).to_le_bytes());
        self.unsent.extend(frame);
    }

    /// So many more bytes may be sent.
    pub(crate) fn add_credit(&mut self, bytes: usize) {
        self.credit += bytes;
    }

    /// The next bytes for the other end, `most` at a time.
    pub(crate) fn take(&mut self, most: usize) -> Option<Vec<u8>> {
        let length = self.unsent.len().min(self.credit).min(most);
        self.credit -= length;
        (length > 0).then(|| self.unsent.drain(..length).collect())
    }
}
