//! Metrics and health for monitoring, on a TCP port: `/metrics`, `/healthz`, `/readyz` and a page that names them.
//!
//! `/healthz` says that the daemon's loop answers; it depends on nothing else, so that a cut network or a full
//! disk does not have every daemon restarted. `/readyz` says whether pods can be attached.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse as _, Response as HttpResponse};
use axum::routing::get;
use mesh_core::api::{ApiError, SessionStatus, Status};
use mesh_core::node::{Request, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::api::call;
use crate::daemon::Call;

/// Serves for ever.
pub async fn serve(listener: TcpListener, calls: mpsc::Sender<Call>) {
    let routes = Router::new()
        .route("/", get(index))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(calls);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics server ended");
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

async fn healthz(State(calls): State<mpsc::Sender<Call>>) -> HttpResponse {
    match call(&calls, Request::Status).await {
        Ok(_) => "ok\n".into_response(),
        Err(error) => unavailable(&error),
    }
}

async fn readyz(State(calls): State<mpsc::Sender<Call>>) -> HttpResponse {
    match call(&calls, Request::Ready).await {
        Ok(_) => "ok\n".into_response(),
        Err(error) => unavailable(&error),
    }
}

async fn metrics(State(calls): State<mpsc::Sender<Call>>) -> HttpResponse {
    match call(&calls, Request::Status).await {
        Ok(Response::Status(status)) => {
            let content =
                [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
            (content, render(&status)).into_response()
        }
        Ok(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Err(error) => unavailable(&error),
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    peer: String,
    name: String,
}

/// The status as OpenMetrics text.
fn render(status: &Status) -> String {
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
    let family = |registry: &mut Registry, name: &str, help: &str| {
        let family = Family::<PeerLabels, Gauge>::default();
        registry.register(name, help, family.clone());
        family
    };
    let session = family(&mut registry, "peer_session_up", "Whether the control session with the peer is up");
    let reachable = family(&mut registry, "peer_reachable", "Whether gossip reaches the peer");
    let ready = family(&mut registry, "peer_tunnel_ready", "Whether traffic to the peer may use the tunnel");
    let handshake =
        family(&mut registry, "peer_handshake_age_seconds", "Seconds since the last handshake with the peer");
    let received = family(&mut registry, "peer_received_bytes", "Bytes received from the peer");
    let sent = family(&mut registry, "peer_sent_bytes", "Bytes sent to the peer");
    for peer in &status.peers {
        let labels = PeerLabels { peer: peer.id.clone(), name: peer.name.clone() };
        let set = |family: &Family<PeerLabels, Gauge>, value: u64| {
            family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&session, u64::from(matches!(peer.session, SessionStatus::Up { .. })));
        set(&reachable, u64::from(peer.gossip.reachable));
        set(&ready, u64::from(peer.tunnel.ready));
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
