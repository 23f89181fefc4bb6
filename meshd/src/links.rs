//! The live control sessions: names for them, a reader task each, and their writers.

mod carried;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::node::{CarriedId, CarriedInput, CarriedOutput, Input, SessionId};
use mesh_keys::{IdentityKey, SessionSecrets};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;
use zeroize::Zeroizing;

use self::carried::Connection;
use crate::session::{
    self, FrameReader, FrameWriter, HandshakeSlot, MAX_FRAME_MEMBER, Remote, Session, SessionError,
    TlsIdentity,
};

/// What happened on the network.
#[derive(Debug)]
pub enum LinkEvent {
    /// Somebody called, and is who it says it is.
    Accepted(Box<Session>),
    /// A call got through.
    Dialled(SocketAddr, Box<Session>),
    /// A call did not.
    DialFailed(SocketAddr, String),
    /// A session is set up on a connection that another member carries.
    CarriedOpened(CarriedId, Box<Session>),
    /// Something has happened with such a connection.
    Carried(CarriedId, CarriedInput),
    /// A frame came in.
    Frame(SessionId, Zeroizing<Vec<u8>>, Turn),
    /// A session ended.
    Closed(SessionId, String),
}

/// The turn of a session: its next frame waits until this one is taken. So no more than one frame of a session waits
/// for the node and one in its reader, and who sends much gets no more turns than the others.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "it ends when it is dropped")] OwnedSemaphorePermit);

/// All live sessions.
#[derive(Debug)]
pub struct Links {
    tls: TlsIdentity,
    events: mpsc::Sender<LinkEvent>,
    limit: Duration,
    live: BTreeMap<SessionId, Link>,
    carried: BTreeMap<CarriedId, Connection>,
    next: u64,
}

#[derive(Debug)]
struct Link {
    writer: FrameWriter,
    /// Tells the reader that the peer is a member; that the session is closed, by going away.
    trust: watch::Sender<bool>,
    remote: Remote,
}

impl Links {
    /// No sessions. What happens is sent to `events`; calls may take `limit`.
    pub fn new(tls: TlsIdentity, events: mpsc::Sender<LinkEvent>, limit: Duration) -> Self {
        Self { tls, events, limit, live: BTreeMap::new(), carried: BTreeMap::new(), next: 0 }
    }

    /// Calls.
    pub fn dial(&self, target: SocketAddr) {
        let (tls, events, limit) = (self.tls.clone(), self.events.clone(), self.limit);
        tokio::spawn(async move {
            let event = match session::dial(target, &tls, limit).await {
                Ok(session) => LinkEvent::Dialled(target, Box::new(session)),
                Err(error) => LinkEvent::DialFailed(target, error.to_string()),
            };
            let _ = events.send(event).await;
        });
    }

    /// Does what the node wants with a connection that another member carries.
    pub fn carry(&mut self, id: CarriedId, what: CarriedOutput) {
        match what {
            CarriedOutput::Begin { dials } => {
                let limit = self.limit * CARRIED_PATIENCE;
                let connection = Connection::begin(id, dials, self.tls.clone(), self.events.clone(), limit);
                self.carried.insert(id, connection);
            }
            CarriedOutput::Bytes(bytes) => {
                if let Some(connection) = self.carried.get(&id) {
                    connection.receive(bytes);
                }
            }
            CarriedOutput::Credit(bytes) => {
                if let Some(connection) = self.carried.get(&id) {
                    connection.add_credit(bytes);
                }
            }
            CarriedOutput::End => {
                self.carried.remove(&id);
            }
        }
    }

    /// Turns an event into the node's input.
    pub fn happened(&mut self, event: LinkEvent) -> Option<Input> {
        match event {
            LinkEvent::Accepted(session) => self.opened(*session, None),
            LinkEvent::Dialled(target, session) => self.opened(*session, Some(target)),
            LinkEvent::DialFailed(target, reason) => Some(Input::DialFailed { target, reason }),
            LinkEvent::CarriedOpened(id, session) => {
                let (session, peer, secrets) = self.adopt(*session);
                Some(Input::CarriedOpened { id, session, peer, secrets })
            }
            LinkEvent::Carried(id, what) => {
                if matches!(what, CarriedInput::Ended(_)) {
                    self.carried.remove(&id);
                }
                Some(Input::Carried { id, what })
            }
            LinkEvent::Frame(session, frame, _) => {
                self.live.contains_key(&session).then_some(Input::SessionFrame { session, frame })
            }
            LinkEvent::Closed(session, reason) => {
                self.live.remove(&session).map(|_| Input::SessionClosed { session, reason })
            }
        }
    }

    fn opened(&mut self, session: Session, dialled: Option<SocketAddr>) -> Option<Input> {
        let Remote::At(remote) = session.remote else { return None };
        // A dual-stack socket shows IPv4 peers as mapped addresses.
        let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
        let (session, peer, secrets) = self.adopt(session);
        Some(Input::SessionOpened { session, peer, dialled, remote, secrets })
    }

    fn adopt(&mut self, session: Session) -> (SessionId, IdentityKey, SessionSecrets) {
        self.next += 1;
        let id = SessionId(self.next);
        let Session { peer, remote, secrets, reader, writer, slot } = session;
        let (trust, trusted) = watch::channel(false);
        // What the other end takes is for it to say: it may take this one for a member already.
        writer.set_max_frame(MAX_FRAME_MEMBER);
        tokio::spawn(read(id, reader, trusted, slot, self.events.clone()));
        self.live.insert(id, Link { writer, trust, remote });
        (id, peer, secrets)
    }

    /// Sends a frame. A session whose other end does not keep up is ended: it catches up when it is back.
    pub fn send(&mut self, session: SessionId, frame: &[u8]) {
        let Some(link) = self.live.get(&session) else { return };
        if let Err(error) = link.writer.try_send(frame) {
            tracing::warn!(remote = %link.remote, "session ended: {error}");
            link.writer.abort();
        }
    }

    /// Longer frames may come from now on.
    pub fn trust(&mut self, session: SessionId) {
        if let Some(link) = self.live.get(&session) {
            link.trust.send_replace(true);
        }
    }

    /// Ends a session once all that was sent is out.
    pub fn close(&mut self, session: SessionId) {
        // The writer sends what is queued when it is dropped, and the reader sees the end.
        self.live.remove(&session);
    }
}

/// Hands on what a session says. `slot` is held until the other end has proved to be a member, or nothing is left of the
/// session.
async fn read(
    id: SessionId,
    mut reader: FrameReader,
    mut trusted: watch::Receiver<bool>,
    mut slot: Option<HandshakeSlot>,
    events: mpsc::Sender<LinkEvent>,
) {
    let turns = Arc::new(Semaphore::new(1));
    // Closed at this end.
    let mut closed = false;
    // A frame that is too long for a stranger, and may be a member's all the same.
    let mut too_long = None;
    let reason = loop {
        let frame = tokio::select! {
            biased;
            changed = trusted.changed() => {
                if changed.is_err() {
                    closed = true;
                    break String::new();
                }
                reader.set_max_frame(MAX_FRAME_MEMBER);
                (slot, too_long) = (None, None);
                continue;
            }
            () = tokio::time::sleep(LATE_TRUST), if too_long.is_some() => break too_long.unwrap_or_default(),
            frame = reader.recv(), if too_long.is_none() => frame,
        };
        match frame {
            Ok(Some(frame)) => {
                let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
                if events.send(LinkEvent::Frame(id, frame, Turn(turn))).await.is_err() {
                    return;
                }
            }
            Ok(None) => break "closed by the other end".to_owned(),
            // What makes the other end a member may wait for the node just now.
            Err(error @ SessionError::FrameLength { found: 1..=MAX_FRAME_MEMBER, .. }) => {
                too_long = Some(error.to_string());
            }
            Err(error) => break error.to_string(),
        }
    };
    if closed {
        // What is on its way is read and thrown away for a moment: closing a socket with unread data would reset the
        // connection, and the last words of ours would be lost.
        let rest = async { while let Ok(Some(_)) = reader.recv().await {} };
        let _ = timeout(LAST_WORDS, rest).await;
    } else if events.send(LinkEvent::Closed(id, reason)).await.is_err() {
        return;
    }
    // The socket is there as long as there is something to send.
    reader.written(LAST_FRAMES).await;
    drop(slot);
}

/// A call through another member may take so many times as long as one without.
const CARRIED_PATIENCE: u32 = 2;

/// How long a frame that is too long for a stranger waits for the other end to be taken for a member.
const LATE_TRUST: Duration = Duration::from_secs(5);

/// How long a closed session is still read from.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// And after that, how long what was queued may take to be sent.
const LAST_FRAMES: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
