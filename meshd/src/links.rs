//! The live control sessions: names for them, a reader task each, and their writers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::node::{Input, SessionId};
use tokio::sync::{mpsc, watch};

use crate::session::{self, FrameReader, FrameWriter, HandshakeSlot, MAX_FRAME_MEMBER, Session, TlsIdentity};

/// What happened on the network.
#[derive(Debug)]
pub enum LinkEvent {
    /// Somebody called, and is who it says it is.
    Accepted(Box<Session>),
    /// A call got through.
    Dialled(SocketAddr, Box<Session>),
    /// A call did not.
    DialFailed(SocketAddr, String),
    /// A frame came in.
    Frame(SessionId, Vec<u8>),
    /// A session ended.
    Closed(SessionId, String),
}

/// All live sessions.
#[derive(Debug)]
pub struct Links {
    tls: TlsIdentity,
    events: mpsc::Sender<LinkEvent>,
    limit: Duration,
    live: BTreeMap<SessionId, Link>,
    next: u64,
}

#[derive(Debug)]
struct Link {
    writer: FrameWriter,
    /// Tells the reader that the peer is a member; that the session is closed, by going away.
    trust: watch::Sender<bool>,
    /// Held until the peer has proved to be a member.
    slot: Option<HandshakeSlot>,
    remote: SocketAddr,
}

impl Links {
    /// No sessions. What happens is sent to `events`; calls may take `limit`.
    pub fn new(tls: TlsIdentity, events: mpsc::Sender<LinkEvent>, limit: Duration) -> Self {
        Self { tls, events, limit, live: BTreeMap::new(), next: 0 }
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

    /// Turns an event into the node's input.
    pub fn happened(&mut self, event: LinkEvent) -> Option<Input> {
        match event {
            LinkEvent::Accepted(session) => Some(self.adopt(*session, None)),
            LinkEvent::Dialled(target, session) => Some(self.adopt(*session, Some(target))),
            LinkEvent::DialFailed(target, reason) => Some(Input::DialFailed { target, reason }),
            LinkEvent::Frame(session, frame) => {
                self.live.contains_key(&session).then_some(Input::SessionFrame { session, frame })
            }
            LinkEvent::Closed(session, reason) => {
                self.live.remove(&session).map(|_| Input::SessionClosed { session, reason })
            }
        }
    }

    fn adopt(&mut self, session: Session, dialled: Option<SocketAddr>) -> Input {
        self.next += 1;
        let id = SessionId(self.next);
        let Session { peer, remote, secrets, reader, writer, slot, .. } = session;
        let (trust, trusted) = watch::channel(false);
        tokio::spawn(read(id, reader, trusted, self.events.clone()));
        self.live.insert(id, Link { writer, trust, slot, remote });
        // A dual-stack socket shows IPv4 peers as mapped addresses.
        let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
        Input::SessionOpened { session: id, peer, dialled, remote, secrets }
    }

    /// Sends a frame. A session whose other end does not keep up is ended: it catches up when it is back.
    pub fn send(&mut self, session: SessionId, frame: &[u8]) {
        let Some(link) = self.live.get(&session) else { return };
        if let Err(error) = link.writer.try_send(frame) {
            tracing::warn!(remote = %link.remote, "session ended: {error}");
            link.writer.abort();
        }
    }

    /// Longer frames may come and go from now on.
    pub fn trust(&mut self, session: SessionId) {
        if let Some(link) = self.live.get_mut(&session) {
            link.writer.set_max_frame(MAX_FRAME_MEMBER);
            link.slot = None;
            link.trust.send_replace(true);
        }
    }

    /// Ends a session once all that was sent is out.
    pub fn close(&mut self, session: SessionId) {
        // The writer sends what is queued when it is dropped, and the reader sees the end.
        self.live.remove(&session);
    }
}

async fn read(
    id: SessionId,
    mut reader: FrameReader,
    mut trusted: watch::Receiver<bool>,
    events: mpsc::Sender<LinkEvent>,
) {
    let reason = loop {
        let frame = tokio::select! {
            biased;
            changed = trusted.changed() => {
                if changed.is_err() {
                    // Closed at this end. What is on its way is read and thrown away for a moment: closing a socket
                    // with unread data would reset the connection, and the last words of ours would be lost.
                    let rest = async { while let Ok(Some(_)) = reader.recv().await {} };
                    let _ = tokio::time::timeout(LAST_WORDS, rest).await;
                    return;
                }
                reader.set_max_frame(MAX_FRAME_MEMBER);
                continue;
            }
            frame = reader.recv() => frame,
        };
        match frame {
            Ok(Some(frame)) => {
                if events.send(LinkEvent::Frame(id, frame)).await.is_err() {
                    return;
                }
            }
            Ok(None) => break "closed by the other end".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    let _ = events.send(LinkEvent::Closed(id, reason)).await;
}

/// How long a closed session is still read from.
const LAST_WORDS: Duration = Duration::from_secs(2);
