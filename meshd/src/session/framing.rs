//! Frames: u32 little-endian length ‖ that many bytes.
//!
//! The reader allocates what has arrived, never what was announced. The writer is a task of its own
//! with a queue bounded in frames and bytes.

use super::{Remote, SessionError};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// Longest frame from or to a peer that has not proved to be a member, in bytes.
pub const MAX_FRAME_UNPROVEN: usize = 64 * 1024;
/// Longest frame from or to a member, in bytes.
pub const MAX_FRAME_MEMBER: usize = 4 * 1024 * 1024;

/// Splits a connection into its two directions. Needs a tokio runtime, for the writing task.
pub(super) fn split<S>(remote: Remote, stream: S) -> (FrameReader, FrameWriter)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    split_with(remote, stream, WRITE_LIMIT)
}

fn split_with<S>(remote: Remote, stream: S, patience: Duration) -> (FrameReader, FrameWriter)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (incoming, outgoing) = tokio::io::split(stream);
    let (queue, queued) = mpsc::channel(QUEUE_FRAMES);
    let (failed_tx, failed) = watch::channel(None);
    let task = tokio::spawn(write_all(outgoing, queued, failed_tx, patience));
    let reader = FrameReader {
        remote,
        incoming: Box::new(incoming),
        max_frame: MAX_FRAME_UNPROVEN,
        length: [0; LENGTH_LEN],
        length_have: 0,
        body: Zeroizing::default(),
        body_have: 0,
        ended: false,
        failed: failed.clone(),
        writing: task.abort_handle(),
    };
    let writer = FrameWriter {
        remote,
        queue,
        space: Arc::new(Semaphore::new(QUEUE_BYTES)),
        max_frame: Arc::new(AtomicUsize::new(MAX_FRAME_UNPROVEN)),
        failed,
        task: task.abort_handle(),
    };
    (reader, writer)
}

/// The incoming direction of a session.
pub struct FrameReader {
    remote: Remote,
    incoming: Box<dyn AsyncRead + Send + Unpin>,
    max_frame: usize,
    length: [u8; LENGTH_LEN],
    length_have: usize,
    body: Zeroizing<Vec<u8>>,
    body_have: usize,
    ended: bool,
    failed: watch::Receiver<Option<WriteFailure>>,
    writing: AbortHandle,
}

impl FrameReader {
    /// The next frame; `None` when the other end has closed the session properly.
    ///
    /// Can be dropped and called again at any time without losing a byte.
    ///
    /// # Errors
    /// [`SessionError::FrameLength`], [`SessionError::CutOff`], [`SessionError::Lost`];
    /// [`SessionError::Stalled`] when the writer had to give up. After an error, and after `None`,
    /// there is nothing more: [`SessionError::Closed`]; but for a frame that is too long only for a peer
    /// that has not proved to be a member: it can be received once longer frames are accepted.
    pub async fn recv(&mut self) -> Result<Option<Zeroizing<Vec<u8>>>, SessionError> {
        if self.ended {
            return Err(SessionError::Closed { remote: self.remote });
        }
        let outcome = self.next().await;
        self.ended = match &outcome {
            Ok(Some(_)) => false,
            Err(SessionError::FrameLength { found, .. }) => !(1..=MAX_FRAME_MEMBER).contains(found),
            Ok(None) | Err(_) => true,
        };
        outcome
    }

    /// Waits until the session's writer has sent what was queued and is gone, which happens when it was dropped;
    /// after `patience` it is ended.
    pub async fn written(&mut self, patience: Duration) {
        let gone = async { while self.failed.changed().await.is_ok() {} };
        if timeout(patience, gone).await.is_err() {
            self.writing.abort();
        }
    }

    /// Sets the longest frame accepted from now on, in bytes, up to [`MAX_FRAME_MEMBER`].
    pub fn set_max_frame(&mut self, bytes: usize) {
        self.max_frame = bytes.min(MAX_FRAME_MEMBER);
    }

    async fn next(&mut self) -> Result<Option<Zeroizing<Vec<u8>>>, SessionError> {
        while self.length_have < LENGTH_LEN {
            let got = self.read_length().await?;
            if got == 0 {
                if self.length_have == 0 {
                    return Ok(None);
                }
                return Err(SessionError::CutOff { remote: self.remote });
            }
            self.length_have += got;
        }
        let found = u32::from_le_bytes(self.length) as usize;
        if !(1..=self.max_frame).contains(&found) {
            let (remote, max) = (self.remote, self.max_frame);
            return Err(SessionError::FrameLength { direction: "from", remote, found, max });
        }
        while self.body_have < found {
            if self.body_have == self.body.len() {
                // Not by `resize`: what it moves away from is not wiped.
                let length = found.min((2 * self.body_have).max(FIRST_READ));
                let mut longer = Zeroizing::new(vec![0; length]);
                longer[..self.body_have].copy_from_slice(&self.body);
                self.body = longer;
            }
            let got = self.read_body().await?;
            if got == 0 {
                return Err(SessionError::CutOff { remote: self.remote });
            }
            self.body_have += got;
        }
        self.length_have = 0;
        self.body_have = 0;
        Ok(Some(std::mem::take(&mut self.body)))
    }

    async fn read_length(&mut self) -> Result<usize, SessionError> {
        let into = &mut self.length[self.length_have..];
        read(self.remote, &mut self.incoming, into, &mut self.failed).await
    }

    async fn read_body(&mut self) -> Result<usize, SessionError> {
        let into = &mut self.body[self.body_have..];
        read(self.remote, &mut self.incoming, into, &mut self.failed).await
    }
}

impl fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader")
            .field("remote", &self.remote)
            .field("max_frame", &self.max_frame)
            .finish_non_exhaustive()
    }
}

async fn read(
    remote: Remote,
    incoming: &mut (dyn AsyncRead + Send + Unpin),
    into: &mut [u8],
    failed: &mut watch::Receiver<Option<WriteFailure>>,
) -> Result<usize, SessionError> {
    tokio::select! {
        biased;
        got = incoming.read(into) => got.map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                SessionError::CutOff { remote }
            } else {
                SessionError::Lost { remote, source }
            }
        }),
        failure = write_failure(failed) => Err(failure.for_peer(remote)),
    }
}

/// Waits until writing has failed; for ever if it ended without failing.
async fn write_failure(failed: &mut watch::Receiver<Option<WriteFailure>>) -> WriteFailure {
    match failed.wait_for(Option::is_some).await.ok().and_then(|seen| *seen) {
        Some(failure) => failure,
        None => std::future::pending().await,
    }
}

/// The outgoing direction of a session. Clones share one queue.
///
/// When the last clone is dropped, what is queued is still sent, and then the session is closed
/// properly.
#[derive(Clone)]
pub struct FrameWriter {
    remote: Remote,
    queue: mpsc::Sender<Queued>,
    space: Arc<Semaphore>,
    max_frame: Arc<AtomicUsize>,
    failed: watch::Receiver<Option<WriteFailure>>,
    task: AbortHandle,
}

struct Queued {
    bytes: Zeroizing<Vec<u8>>,
    _space: OwnedSemaphorePermit,
}

impl FrameWriter {
    /// Queues a frame, and waits while the queue is full.
    ///
    /// # Errors
    /// [`SessionError::FrameLength`]: nothing was sent. [`SessionError::Stalled`],
    /// [`SessionError::Lost`], [`SessionError::Closed`]: the session is over.
    pub async fn send(&self, frame: &[u8]) -> Result<(), SessionError> {
        let bytes = self.encode(frame)?;
        let space = Arc::clone(&self.space).acquire_many_owned(permits(&bytes));
        let mut failed = self.failed.clone();
        let _space = tokio::select! {
            space = space => space.map_err(|_| self.over())?,
            failure = write_failure(&mut failed) => return Err(failure.for_peer(self.remote)),
        };
        self.queue.send(Queued { bytes, _space }).await.map_err(|_| self.over())
    }

    /// Queues a frame if there is room for it.
    ///
    /// # Errors
    /// As [`FrameWriter::send`], and [`SessionError::QueueFull`]: nothing was queued.
    pub fn try_send(&self, frame: &[u8]) -> Result<(), SessionError> {
        let bytes = self.encode(frame)?;
        let full = SessionError::QueueFull { remote: self.remote };
        let Ok(_space) = Arc::clone(&self.space).try_acquire_many_owned(permits(&bytes)) else {
            return Err(if self.queue.is_closed() { self.over() } else { full });
        };
        self.queue.try_send(Queued { bytes, _space }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => full,
            mpsc::error::TrySendError::Closed(_) => self.over(),
        })
    }

    /// Sets the longest frame sent from now on, in bytes, up to [`MAX_FRAME_MEMBER`]; for all clones.
    pub fn set_max_frame(&self, bytes: usize) {
        self.max_frame.store(bytes.min(MAX_FRAME_MEMBER), Ordering::Relaxed);
    }

    /// Ends the session at once, without sending what is queued.
    pub fn abort(&self) {
        self.task.abort();
    }

    fn encode(&self, frame: &[u8]) -> Result<Zeroizing<Vec<u8>>, SessionError> {
        let max = self.max_frame.load(Ordering::Relaxed);
        let length = u32::try_from(frame.len()).ok().filter(|_| (1..=max).contains(&frame.len()));
        let Some(length) = length else {
            let (remote, found) = (self.remote, frame.len());
            return Err(SessionError::FrameLength { direction: "to", remote, found, max });
        };
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH_LEN + frame.len()));
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(frame);
        Ok(bytes)
    }

    fn over(&self) -> SessionError {
        match *self.failed.borrow() {
            Some(failure) => failure.for_peer(self.remote),
            None => SessionError::Closed { remote: self.remote },
        }
    }
}

impl fmt::Debug for FrameWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameWriter")
            .field("remote", &self.remote)
            .field("max_frame", &self.max_frame)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug)]
enum WriteFailure {
    Stalled(Duration),
    Io(io::ErrorKind),
}

impl WriteFailure {
    fn for_peer(self, remote: Remote) -> SessionError {
        match self {
            Self::Stalled(after) => SessionError::Stalled { remote, after },
            Self::Io(kind) => SessionError::Lost { remote, source: kind.into() },
        }
    }
}

async fn write_all(
    mut outgoing: impl AsyncWrite + Unpin,
    mut queued: mpsc::Receiver<Queued>,
    failed: watch::Sender<Option<WriteFailure>>,
    patience: Duration,
) {
    let outcome = write_queue(&mut outgoing, &mut queued, patience).await;
    if let Err(failure) = outcome {
        tracing::debug!(?failure, "a control session can no longer be written to");
        failed.send_replace(Some(failure));
    }
}

async fn write_queue(
    outgoing: &mut (impl AsyncWrite + Unpin),
    queued: &mut mpsc::Receiver<Queued>,
    patience: Duration,
) -> Result<(), WriteFailure> {
    while let Some(first) = queued.recv().await {
        let mut next = Some(first);
        while let Some(frame) = next {
            let mut rest = frame.bytes.as_slice();
            while !rest.is_empty() {
                let written = in_time(patience, outgoing.write(rest)).await?;
                if written == 0 {
                    return Err(WriteFailure::Io(io::ErrorKind::WriteZero));
                }
                rest = &rest[written..];
            }
            next = queued.try_recv().ok();
        }
        in_time(patience, outgoing.flush()).await?;
    }
    in_time(patience, outgoing.shutdown()).await
}

/// Fails when there is no progress at all for `patience`; a slow peer may take its time.
async fn in_time<T>(
    patience: Duration,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, WriteFailure> {
    timeout(patience, step)
        .await
        .map_err(|_| WriteFailure::Stalled(patience))?
        .map_err(|error| WriteFailure::Io(error.kind()))
}

/// Encoded frames are far shorter than 4 GiB, and never longer than the whole queue.
fn permits(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len().min(QUEUE_BYTES)).unwrap_or(u32::MAX)
}

const LENGTH_LEN: usize = 4;
/// Memory grows with what has arrived: from this many bytes on, twofold each time.
const FIRST_READ: usize = 64 * 1024;
const QUEUE_FRAMES: usize = 256;
/// Two frames of the greatest length.
const QUEUE_BYTES: usize = 2 * MAX_FRAME_MEMBER;
/// A little more patience than the operating system has with a connection that is dead.
const WRITE_LIMIT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
