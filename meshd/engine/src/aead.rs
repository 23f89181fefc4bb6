//! ChaCha20-Poly1305 of data messages: which implementation does it, and one key of it.
//!
//! Both implementations are assembly and give the same bytes: `ring`, which is always there, and Intel's library, which
//! is faster where the processor has AVX-512 and the host has the library (see [`mesh_sys::ipsec_mb`]).

use std::cell::RefCell;
use std::fmt;
use std::sync::OnceLock;

use clap::ValueEnum;
use mesh_sys::ipsec_mb::{Library, TAG_LEN, Unavailable, Worker};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::noise::NotAuthentic;

/// What encrypts data messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The fastest that there is
    #[default]
    Auto,
    /// The assembly in the program
    Ring,
    /// Intel's library, of the host
    IpsecMb,
}

/// What encrypts data messages from now on.
#[derive(Debug)]
pub enum Chosen {
    /// `ring`, and why not the other, if that would have been taken.
    Ring(Option<Refused>),
    /// Intel's library, in this version.
    IpsecMb(&'static str),
}

/// Why Intel's library is not used.
#[derive(Debug, Error)]
pub enum Refused {
    /// It cannot be.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Never seen; no host's library is trusted without looking.
    #[error("the library encrypts differently from ring")]
    Wrong,
    /// The choice is made once, before the first message.
    #[error("what encrypts has been chosen before")]
    TooLate,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(None) => f.write_str("ring"),
            Self::Ring(Some(refused)) => write!(f, "ring (not ipsec-mb: {refused})"),
            Self::IpsecMb(version) => write!(f, "ipsec-mb {version}"),
        }
    }
}

/// None, or never set: `ring`.
static LIBRARY: OnceLock<Option<&'static Library>> = OnceLock::new();

thread_local! {
    static WORKER: RefCell<Option<Worker>> = RefCell::new(new_worker());
}

fn new_worker() -> Option<Worker> {
    let worker = Worker::new(LIBRARY.get().copied().flatten()?);
    worker.inspect_err(|error| tracing::warn!(%error, "a thread encrypts with ring")).ok()
}

/// Chooses once for the process, before the first message. Without a choice it is `ring`.
///
/// # Errors
/// When Intel's library is asked for and cannot be used, or when the choice has been made.
pub fn choose(choice: Choice) -> Result<Chosen, Refused> {
    let (library, chosen) = match choice {
        Choice::Ring => (None, Chosen::Ring(None)),
        Choice::Auto | Choice::IpsecMb => match load() {
            Ok(library) => (Some(library), Chosen::IpsecMb(library.version())),
            Err(refused) if choice == Choice::IpsecMb => return Err(refused),
            Err(refused) => (None, Chosen::Ring(Some(refused))),
        },
    };
    LIBRARY.set(library).map_err(|_| Refused::TooLate)?;
    Ok(chosen)
}

/// The library for as long as the process lives, if it does what `ring` does.
fn load() -> Result<&'static Library, Refused> {
    let library: &'static Library = Box::leak(Box::new(Library::load()?));
    let mut worker = Worker::new(library)?;
    // Around the sizes at which assembly changes its ways, up to the packets of the largest usual MTU.
    let lengths = (0..=320).chain([511, 512, 513, 1023, 1024, 1025, 1420, 8920]);
    for length in lengths {
        let key = Key::new(&[length as u8; 32]).map_err(|_| Refused::Wrong)?;
        let text: Vec<u8> = (0..length).map(|index| (index * 7) as u8).collect();
        let mut sealed = [text.clone(), text.clone()];
        let [by_ring, by_library] = &mut sealed;
        let tag = key.seal_by_ring(nonce(length), by_ring).map_err(|_| Refused::Wrong)?;
        if worker.seal(&key.bytes, &nonce(length), by_library) != Some(tag) || by_ring != by_library {
            return Err(Refused::Wrong);
        }
        let mut wrong = tag;
        wrong[length as usize % TAG_LEN] ^= 1;
        if worker.open(&key.bytes, &nonce(length), &mut by_ring.clone(), &wrong)
            || !worker.open(&key.bytes, &nonce(length), by_library, &tag)
            || *by_library != text
        {
            return Err(Refused::Wrong);
        }
    }
    Ok(library)
}

/// A key of one direction of a session.
pub(crate) struct Key {
    ring: LessSafeKey,
    bytes: Zeroizing<[u8; 32]>,
}

impl Key {
    pub(crate) fn new(bytes: &[u8; 32]) -> Result<Self, NotAuthentic> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, bytes).map_err(|_| NotAuthentic)?;
        Ok(Self { ring: LessSafeKey::new(key), bytes: Zeroizing::new(*bytes) })
    }

    /// Encrypts `text` in place. Every counter must be used only once.
    pub(crate) fn seal(&self, counter: u64, text: &mut [u8]) -> Result<[u8; TAG_LEN], NotAuthentic> {
        WORKER.with_borrow_mut(|worker| match worker {
            Some(worker) => worker.seal(&self.bytes, &nonce(counter), text).ok_or(NotAuthentic),
            None => self.seal_by_ring(nonce(counter), text),
        })
    }

    fn seal_by_ring(&self, nonce: [u8; 12], text: &mut [u8]) -> Result<[u8; TAG_LEN], NotAuthentic> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag =
            self.ring.seal_in_place_separate_tag(nonce, Aad::empty(), text).map_err(|_| NotAuthentic)?;
        tag.as_ref().try_into().map_err(|_| NotAuthentic)
    }

    /// Decrypts the text before the tag in place; its length. What was not authentic is worthless afterwards.
    pub(crate) fn open(&self, counter: u64, message: &mut [u8]) -> Result<usize, NotAuthentic> {
        WORKER.with_borrow_mut(|worker| match worker {
            Some(worker) => {
                let (text, tag) = message.split_last_chunk_mut::<TAG_LEN>().ok_or(NotAuthentic)?;
                let authentic = worker.open(&self.bytes, &nonce(counter), text, tag);
                authentic.then_some(text.len()).ok_or(NotAuthentic)
            }
            None => {
                let nonce = Nonce::assume_unique_for_key(nonce(counter));
                let text = self.ring.open_in_place(nonce, Aad::empty(), message);
                Ok(text.map_err(|_| NotAuthentic)?.len())
            }
        })
    }
}

/// WireGuard paper, section 5.4.6: 32 bits of zeros and the counter.
fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}
