//! Metrics and health for monitoring, on a TCP port: `/metrics`, `/healthz`, `/readyz` and a page that names them.
//!
//! `/healthz` says that the daemon's loop answers; it depends on nothing else, so that a cut network or a full
//! disk does not have every daemon restarted. `/readyz` says whether pods can be attached.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse as _, Response as HttpResponse};
use axum::routing::get;
use mesh_core::api::{ApiError, ErrorCode, SessionStatus, Status};
use mesh_core::node::{Request, Response};
use mesh_core::relay::Dropped;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Sleep;

use crate::api::call;
use crate::daemon::Call;
use crate::datagrams::Datagrams;

/// Connections at a time: further ones wait in the kernel.
const CONNECTIONS: usize = 64;

/// A connection is ended after this time, whatever it is used for.
const LIFETIME: Duration = Duration::from_secs(30);

/// Metrics are computed anew after this time: that takes the node longer the more members there are.
const FRESH: Duration = Duration::from_secs(1);

/// The way to the node, and what it said last.
struct Monitor {
    calls: mpsc::Sender<Call>,
    datagrams: Datagrams,
    /// Locked while the node is asked: whoever asks meanwhile gets the same answer.
    metrics: Mutex<Option<(Instant, Result<String, ApiError>)>>,
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, calls: mpsc::Sender<Call>, datagrams: Datagrams) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    serve_limited(Limited { listener, slots, lifetime: LIFETIME }, calls, datagrams).await;
}

async fn serve_limited(listener: Limited, calls: mpsc::Sender<Call>, datagrams: Datagrams) {
    let routes = Router::new()
        .route("/", get(index))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Arc::new(Monitor { calls, datagrams, metrics: Mutex::new(None) }));
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics server ended");
    }
}

/// A listener whose connections are few and short: every local user may connect.
struct Limited {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    lifetime: Duration,
}

impl axum::serve::Listener for Limited {
    type Io = Passing;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Passing, SocketAddr) {
        loop {
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else {
                return std::future::pending().await;
            };
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    let end = Box::pin(tokio::time::sleep(self.lifetime));
                    return (Passing { stream, end, _slot: slot }, from);
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends.
struct Passing {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _slot: OwnedSemaphorePermit,
}

impl Passing {
    fn alive(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Passing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.alive(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Passing {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.alive(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

async fn index() -> Html<&'static str> {
    Html(
        "<!doctype html><title>meshd</title><h1>meshd</h1><ul><li><a href=/metrics>metrics</a><li><a href=/healthz>healthz</a><li><a href=/readyz>readyz</a></ul><p>On the host: <code>meshctl status</code>",
    )
}

fn unavailable(error: &ApiError) -> HttpResponse {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response()
}

/// Any answer is a good one.
async fn healthz(State(monitor): State<Arc<Monitor>>) -> HttpResponse {
    let (answer, answered) = oneshot::channel();
    let asked = monitor.calls.send(Call { request: Request::Ready, answer }).await;
    if asked.is_ok() && answered.await.is_ok() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping\n").into_response()
    }
}

async fn readyz(State(monitor): State<Arc<Monitor>>) -> HttpResponse {
    match call(&monitor.calls, Request::Ready).await {
        Ok(_) => "ok\n".into_response(),
        Err(error) => unavailable(&error),
    }
}

async fn metrics(State(monitor): State<Arc<Monitor>>) -> HttpResponse {
    let mut last = monitor.metrics.lock().await;
    let metrics = match last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
        Some((_, metrics)) => metrics.clone(),
        None => {
            let metrics = ask_for_metrics(&monitor).await;
            *last = Some((Instant::now(), metrics.clone()));
            metrics
        }
    };
    drop(last);
    match metrics {
        Ok(text) => {
            let content =
                [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
            (content, text).into_response()
        }
        Err(error) => unavailable(&error),
    }
}

async fn ask_for_metrics(monitor: &Monitor) -> Result<String, ApiError> {
    let answer = call(&monitor.calls, Request::Status).await?;
    let Response::Status(status) = answer else {
        return Err(ApiError::new(ErrorCode::Internal, format!("no status, but {answer:?}")));
    };
    Ok(render(&status, &monitor.datagrams))
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: &'static str,
}

/// What this node does as a relay for others.
fn add_relay(registry: &mut Registry, datagrams: &Datagrams) {
    let counters = datagrams.counters();
    let mut count = |name: &str, help: &str, value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    count(
        "relay_passed_datagrams",
        "WireGuard datagrams passed on for others",
        counters.passed_on.load(Ordering::Relaxed),
    );
    count("relay_passed_bytes", "Bytes in these", counters.passed_on_bytes.load(Ordering::Relaxed));
    count(
        "relay_send_failed_datagrams",
        "WireGuard datagrams for others that the kernel refused to send",
        counters.send_failed.load(Ordering::Relaxed),
    );
    count(
        "control_stale_datagrams",
        "Datagrams of the control plane that were dropped because this node did not get to them in time",
        counters.stale.load(Ordering::Relaxed),
    );
    let dropped = Family::<DropLabels, Counter>::default();
    for reason in Dropped::ALL {
        dropped.get_or_create(&DropLabels { reason: reason.name() }).inc_by(counters.dropped(reason));
    }
    registry.register("relay_dropped_datagrams", "WireGuard datagrams that were not passed on", dropped);
    let lanes = Gauge::<i64>::default();
    lanes.set(i64::try_from(datagrams.relay().load().0).unwrap_or(i64::MAX));
    registry.register("relay_lanes", "Lanes of other members that this node relays for", lanes);
}

/// The status as OpenMetrics text.
fn render(status: &Status, datagrams: &Datagrams) -> String {
    let mut registry = Registry::with_prefix("mesh");
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    gauge(
        &mut registry,
        "members",
        "Known members of the cluster, this node included",
        status.cluster.as_ref().map_or(0, |cluster| cluster.members as u64),
    );
    gauge(&mut registry, "attachments", "Pods attached to this node", status.attachments as u64);
    gauge(
        &mut registry,
        "addresses_free",
        "IPv4 addresses this node can lease now",
        status.addresses.as_ref().map_or(0, |addresses| addresses.free),
    );
    gauge(
        &mut registry,
        "addresses_leased",
        "IPv4 addresses this node has leased",
        status.addresses.as_ref().map_or(0, |addresses| addresses.leased),
    );
    gauge(
        &mut registry,
        "problems",
        "Things on this node that are not as they should be",
        status.problems.len() as u64,
    );
    gauge(
        &mut registry,
        "lanes_up",
        "Tunnel devices that are up",
        status.lanes.iter().filter(|lane| lane.up).count() as u64,
    );
    add_relay(&mut registry, datagrams);
    let family = |registry: &mut Registry, name: &str, help: &str| {
        let family = Family::<PeerLabels, Gauge>::default();
        registry.register(name, help, family.clone());
        family
    };
    let session = family(&mut registry, "peer_session_up", "Whether the control session with the peer is up");
    let reachable = family(&mut registry, "peer_reachable", "Whether gossip reaches the peer");
    let ready = family(&mut registry, "peer_tunnel_ready", "Whether traffic to the peer may use the tunnel");
    let relayed = family(&mut registry, "peer_relayed", "Whether the tunnel to the peer takes a relay");
    let handshake =
        family(&mut registry, "peer_handshake_age_seconds", "Seconds since the last handshake with the peer");
    let received = family(&mut registry, "peer_received_bytes", "Bytes received from the peer");
    let sent = family(&mut registry, "peer_sent_bytes", "Bytes sent to the peer");
    for peer in &status.peers {
        let labels = PeerLabels { peer: peer.id.clone(), name: peer.name.clone() };
        let set = |family: &Family<PeerLabels, Gauge>, value: u64| {
            family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(
            &session,
            u64::from(matches!(peer.session, SessionStatus::Up { .. } | SessionStatus::Carried { .. })),
        );
        set(&reachable, u64::from(peer.gossip.reachable));
        set(&ready, u64::from(peer.tunnel.ready));
        set(&relayed, u64::from(peer.path.as_ref().is_some_and(|path| path.relay.is_some())));
        if let Some(age) = peer.tunnel.handshake_age_seconds {
            set(&handshake, age);
        }
        set(&received, peer.tunnel.rx_bytes);
        set(&sent, peer.tunnel.tx_bytes);
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

#[cfg(test)]
mod tests;
