//! Randomness of a run: all of it follows from the seed.

use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore as _, SeedableRng as _};

/// A stream of random choices. Streams of one seed are independent, so that more choices in one part of the
/// simulator leave the others as they were.
pub struct Dice(ChaCha20Rng);

impl Dice {
    /// The stream with a number.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = bound.max(1) as u64;
        usize::try_from(self.0.next_u64() % bound).unwrap_or_default()
    }

    /// Whether something with this chance, in ten thousandths, comes about.
    pub fn chance(&mut self, of_ten_thousand: u32) -> bool {
        self.0.next_u32() % 10_000 < of_ten_thousand
    }

    /// A time between two.
    pub fn span(&mut self, least: Duration, most: Duration) -> Duration {
        let width = u64::try_from(most.saturating_sub(least).as_micros()).unwrap_or(u64::MAX);
        least + Duration::from_micros(self.0.next_u64() % width.saturating_add(1).max(1))
    }

    /// A time between two numbers of seconds.
    pub fn seconds(&mut self, least: u64, most: u64) -> Duration {
        self.span(Duration::from_secs(least), Duration::from_secs(most))
    }

    /// One of several, if there are any.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        if of.is_empty() { None } else { of.get(self.below(of.len())).copied() }
    }

    /// Random bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.rng().fill_bytes(&mut bytes);
        bytes
    }

    /// The generator itself.
    pub fn rng(&mut self) -> &mut ChaCha20Rng {
        &mut self.0
    }
}
