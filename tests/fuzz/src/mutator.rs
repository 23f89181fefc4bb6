//! Mutations from a fixed seed, for the bounded search in the ordinary tests.
//!
//! It knows nothing of coverage, which is libFuzzer's part; it finds what lies within a few changes of a real
//! example: lengths that lie, cut-off inputs, fields given twice, numbers at their ends.

/// Longest input that mutation makes, in bytes.
pub const MAX_LEN: usize = 8192;

/// Makes one input after the other out of a corpus.
#[derive(Debug)]
pub struct Mutator<'a> {
    corpus: &'a [Vec<u8>],
    words: &'a [&'a [u8]],
    state: u64,
}

impl<'a> Mutator<'a> {
    /// The same corpus, words and seed give the same inputs.
    #[must_use]
    pub fn new(corpus: &'a [Vec<u8>], words: &'a [&'a [u8]], seed: u64) -> Self {
        Self { corpus, words, state: seed }
    }

    /// The next input: an example of the corpus with 1 to 8 changes.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.example().to_vec();
        for _ in 0..=self.below(8) {
            self.change(&mut input);
        }
        input.truncate(MAX_LEN);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let (start, end) = self.range(input.len());
        match self.below(10) {
            0 => self.poke(input, |old, random| old ^ (1 << (random % 8))),
            1 => self.poke(input, |_, random| random),
            2 => self.poke(input, |_, random| [0, 1, 0x7f, 0x80, 0xff][usize::from(random) % 5]),
            3 => self.poke(input, |old, random| old.wrapping_add(random % 9).wrapping_sub(4)),
            4 => input.truncate(start),
            5 => drop(input.drain(start..end)),
            6 => {
                let part = input[start..end].to_vec();
                let at = self.below(input.len() + 1);
                input.splice(at..at, part);
            }
            7 => {
                let other = self.example();
                let (from, to) = self.range(other.len());
                input.splice(start..end, other[from..to].iter().copied());
            }
            8 => {
                let words = self.words;
                if !words.is_empty() {
                    let word = words[self.below(words.len())];
                    let end = if self.below(2) == 0 { start } else { end };
                    input.splice(start..end, word.iter().copied());
                }
            }
            _ => {
                let byte = self.random() as u8;
                let count = 1 + self.below(32);
                input.splice(start..start, std::iter::repeat_n(byte, count));
            }
        }
    }

    fn poke(&mut self, input: &mut [u8], new: impl FnOnce(u8, u8) -> u8) {
        if !input.is_empty() {
            let at = self.below(input.len());
            input[at] = new(input[at], self.random() as u8);
        }
    }

    fn example(&mut self) -> &'a [u8] {
        let corpus = self.corpus;
        if corpus.is_empty() { &[] } else { &corpus[self.below(corpus.len())] }
    }

    /// A start and an end not before it, mostly near to each other.
    fn range(&mut self, length: usize) -> (usize, usize) {
        let start = self.below(length + 1);
        let span = if self.below(4) == 0 { length } else { 16 };
        (start, (start + self.below(span + 1)).min(length))
    }

    /// A number below `bound`, which is not 0. The bias of the remainder does no harm here.
    fn below(&mut self, bound: usize) -> usize {
        (self.random() % bound as u64) as usize
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
