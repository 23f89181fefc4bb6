//! One message from a stream, within limits and without leaving copies of secrets behind.

use std::io::{self, BufRead};

use zeroize::Zeroizing;

/// How much one message may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest line, newline not counted, in bytes.
    pub line: usize,
    /// Whole message, in bytes.
    pub message: usize,
}

impl Limits {
    /// For what a client sends: 8 MiB hold about 20,000 peers with 4 prefixes each. The longest line of any key is
    /// 128 bytes.
    pub const REQUEST: Self = Self { line: 512, message: 8 << 20 };
    /// For what a device answers: more per peer, so more in all.
    pub const RESPONSE: Self = Self { line: 512, message: 32 << 20 };
}

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Reading failed, or timed out.
    #[error("reading the message failed: {0}")]
    Io(#[from] io::Error),
    /// The stream ended inside the message.
    #[error("the message was cut off at line {line}")]
    CutOff {
        /// Line that is not complete, counted from 1.
        line: usize,
    },
    /// A line is too long.
    #[error("line {line} is longer than {max} bytes")]
    LongLine {
        /// The line, counted from 1.
        line: usize,
        /// The limit, in bytes.
        max: usize,
    },
    /// The message is too long.
    #[error("the message is longer than {max} bytes")]
    LongMessage {
        /// The limit, in bytes.
        max: usize,
    },
}

/// Reads up to and including the empty line that closes a message. `None` when the stream ends before the first byte.
///
/// # Errors
/// [`ReadError`]; the stream is then at an undefined place and should be closed.
pub fn read_message(
    stream: &mut impl BufRead,
    limits: Limits,
) -> Result<Option<Zeroizing<Vec<u8>>>, ReadError> {
    let mut message = Collector::new(limits);
    loop {
        let available = match stream.fill_buf() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        if available.is_empty() {
            return message.end_of_stream();
        }
        let (used, done) = message.push(available)?;
        stream.consume(used);
        if done {
            return Ok(Some(message.bytes));
        }
    }
}

/// Gathers a message piece by piece; also serves the asynchronous client.
pub(super) struct Collector {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    limits: Limits,
    line: usize,
    line_start: usize,
}

impl Collector {
    pub(super) fn new(limits: Limits) -> Self {
        Self { bytes: Zeroizing::new(Vec::with_capacity(4096)), limits, line: 1, line_start: 0 }
    }

    /// Takes what belongs to the message. Returns how much was used and whether the message is complete.
    pub(super) fn push(&mut self, available: &[u8]) -> Result<(usize, bool), ReadError> {
        let mut used = 0;
        while used < available.len() {
            let rest = &available[used..];
            let newline = rest.iter().position(|byte| *byte == b'\n');
            let piece = &rest[..newline.map_or(rest.len(), |at| at + 1)];
            self.append(piece)?;
            used += piece.len();
            let length = self.bytes.len() - self.line_start - usize::from(newline.is_some());
            if length > self.limits.line {
                return Err(ReadError::LongLine { line: self.line, max: self.limits.line });
            }
            if newline.is_some() {
                if length == 0 {
                    return Ok((used, true));
                }
                self.line += 1;
                self.line_start = self.bytes.len();
            }
        }
        Ok((used, false))
    }

    pub(super) fn end_of_stream(self) -> Result<Option<Zeroizing<Vec<u8>>>, ReadError> {
        if self.bytes.is_empty() { Ok(None) } else { Err(ReadError::CutOff { line: self.line }) }
    }

    /// Grows by hand: `Vec` would free the old memory without wiping it.
    fn append(&mut self, piece: &[u8]) -> Result<(), ReadError> {
        let needed = self.bytes.len() + piece.len();
        if needed > self.limits.message {
            return Err(ReadError::LongMessage { max: self.limits.message });
        }
        if needed > self.bytes.capacity() {
            let mut larger = Zeroizing::new(Vec::with_capacity(needed.max(2 * self.bytes.capacity())));
            larger.extend_from_slice(&self.bytes);
            self.bytes = larger;
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }
}
