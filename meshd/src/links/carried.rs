//! Connections that another member carries: what TLS writes goes to the node in pieces, and what the node hands on is
//! read by TLS.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::node::{CarriedId, CarriedInput, PIECE, WINDOW};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{Semaphore, mpsc};

use super::LinkEvent;
use crate::session::{self, TlsIdentity};

/// What the node has to do with a connection. Dropping it ends it, once what came was read.
#[derive(Debug)]
pub(super) struct Connection {
    /// No longer than the window: the node counts.
    came: mpsc::UnboundedSender<Vec<u8>>,
    credit: Arc<Semaphore>,
}

impl Connection {
    /// Begins, as the end that dials or the one that accepts.
    pub(super) fn begin(
        id: CarriedId,
        dials: bool,
        tls: TlsIdentity,
        events: mpsc::Sender<LinkEvent>,
        limit: Duration,
    ) -> Self {
        let (near, far) = tokio::io::duplex(WINDOW as usize);
        let (came, comes) = mpsc::unbounded_channel();
        let credit = Arc::new(Semaphore::new(WINDOW as usize));
        tokio::spawn(pump(id, far, comes, Arc::clone(&credit), events.clone()));
        tokio::spawn(async move {
            let event = match session::carried(near, dials, &tls, limit).await {
                Ok(session) => LinkEvent::CarriedOpened(id, Box::new(session)),
                Err(error) => LinkEvent::Carried(id, CarriedInput::Ended(error.to_string())),
            };
            let _ = events.send(event).await;
        });
        Self { came, credit }
    }

    pub(super) fn receive(&self, bytes: Vec<u8>) {
        // Who has ended says so by itself.
        let _ = self.came.send(bytes);
    }

    pub(super) fn add_credit(&self, bytes: u32) {
        self.credit.add_permits(bytes as usize);
    }
}

/// Hands bytes on in both directions, until TLS has ended or the other end has.
async fn pump(
    id: CarriedId,
    far: DuplexStream,
    mut comes: mpsc::UnboundedReceiver<Vec<u8>>,
    credit: Arc<Semaphore>,
    events: mpsc::Sender<LinkEvent>,
) {
    let (mut from_tls, mut to_tls) = tokio::io::split(far);
    let inwards = async {
        while let Some(bytes) = comes.recv().await {
            let taken = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let event = LinkEvent::Carried(id, CarriedInput::Taken(taken));
            if to_tls.write_all(&bytes).await.is_err() || events.send(event).await.is_err() {
                break;
            }
        }
        let _ = to_tls.shutdown().await;
        // Nothing can be sent any more either.
        credit.close();
        std::future::pending::<()>().await;
    };
    let outwards = async {
        let mut piece = vec![0; PIECE];
        while let Ok(first) = credit.acquire().await {
            let most = PIECE.min(1 + credit.available_permits());
            let Ok(length @ 1..) = from_tls.read(&mut piece[..most]).await else { break };
            first.forget();
            credit.forget_permits(length - 1);
            let bytes = CarriedInput::Bytes(piece[..length].to_vec());
            if events.send(LinkEvent::Carried(id, bytes)).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = outwards => {}
        () = inwards => {}
    }
    let reason = "the session inside has ended".to_owned();
    let _ = events.send(LinkEvent::Carried(id, CarriedInput::Ended(reason))).await;
}
