//! Where the simulator touches the node: what it is configured with, and what becomes of its outputs. Everything
//! else of the simulator is the same whatever the node can do.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use mesh_core::api::{ApiError, Backend};
use mesh_core::host::HostState;
use mesh_core::node::{
    CarriedId, CarriedOutput, Config, JoinSecret, LaneConfig, Output, RequestId, Response, Seed, SessionId,
    StartMark, Ticket,
};
use mesh_core::relay::Endpoint;
use mesh_core::state::StateFile;
use mesh_core::time::Time;
use mesh_keys::join::JoinKey;
use mesh_keys::{IdentityKey, JoinToken, NodeId, Secret32, SessionSecrets, WgPublic, WgSecret};
use sha2::{Digest as _, Sha256};

use crate::network::CONTROL_PORT;

/// What a node wants done.
#[derive(Debug)]
pub enum Act {
    /// See [`Output::Dial`].
    Dial(SocketAddr),
    /// See [`Output::Send`].
    Send(SessionId, Vec<u8>),
    /// See [`Output::Carried`].
    Carry(CarriedId, CarriedOutput),
    /// See [`Output::Close`].
    Close(SessionId, String),
    /// See [`Output::Persist`].
    Persist(Ticket, Vec<(StateFile, Vec<u8>)>),
    /// See [`Output::Desired`].
    Desired(u64, Arc<HostState>),
    /// See [`Output::Reply`].
    Reply(RequestId, Result<Response, ApiError>),
    /// See [`Output::Refuse`].
    Refuse(String),
    /// A datagram to the control port of others, from that port.
    Datagram(u16, SocketAddr, Vec<u8>),
    /// See [`Output::Register`].
    Register(NodeId, WgPublic, Endpoint, u64),
    /// Nothing that the simulator has to do.
    Nothing,
    /// See [`Output::Timeout`].
    Wait(Time),
}

/// What an output of the node asks for.
pub fn act(output: Output) -> Act {
    match output {
        Output::Dial { target } => Act::Dial(target),
        Output::Send { session, mut frame } => Act::Send(session, std::mem::take(&mut frame)),
        Output::Carried { id, what } => Act::Carry(id, what),
        Output::Trust { .. } => Act::Nothing,
        Output::Close { session, reason } => Act::Close(session, reason),
        Output::Persist { ticket, files } => {
            let files = files.into_iter().map(|(file, bytes)| (file, bytes.to_vec())).collect();
            Act::Persist(ticket, files)
        }
        Output::Desired { revision, state } => Act::Desired(revision, state),
        Output::Reply(id, answer) => Act::Reply(id, answer),
        Output::Refuse { reason } => Act::Refuse(reason),
        Output::Datagram { to, bytes } => Act::Datagram(CONTROL_PORT, to, bytes),
        Output::Measure { to, bytes } => Act::Datagram(CONTROL_PORT, to, bytes),
        Output::Narrow { .. } => Act::Nothing,
        Output::LaneDatagram { port, to, bytes } => Act::Datagram(port, to, bytes),
        Output::Register { node, key, endpoint, serial } => Act::Register(node, key, endpoint, serial),
        Output::Timeout(next) => Act::Wait(next),
    }
}

/// Name of the only lane.
pub const LANE: &str = "meshwg0";

/// UDP port of the only lane.
pub const LANE_PORT: u16 = 6784;

/// The range of the cluster: 128 blocks of 30 usable addresses, so small that nodes ask each other for more.
pub const RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 20);

/// What the operator of a host decided.
pub struct Plan {
    /// Number of the host.
    pub host: usize,
    /// Addresses of `--join`.
    pub seeds: Vec<SocketAddr>,
    /// Which key file it has.
    pub secret: u8,
    /// What it has instead of one, if it joins so.
    pub token: Option<JoinToken>,
    /// Key of its lane.
    pub lane: WgSecret,
    /// Boot of the host.
    pub boot: String,
    /// What the host remembers of the last start.
    pub previous_start: Option<StartMark>,
    /// See [`Config::max_calls`].
    pub max_calls: usize,
    /// The admin key, should it found the cluster.
    pub admin: Option<IdentityKey>,
    /// The cluster's range, should it found it, and the length of the prefix of blocks.
    pub range: (Ipv4Net, u8),
}

/// The node's configuration.
pub fn config(plan: &Plan) -> Config {
    Config {
        name: format!("host{}", plan.host),
        cluster_name: "sim".to_owned(),
        ipv4_range: plan.range.0,
        block_prefix: plan.range.1,
        secret: match &plan.token {
            Some(token) => JoinSecret::Token(Box::new(token.clone())),
            None => JoinSecret::Key(JoinKey::from_secret(Secret32::from_bytes([plan.secret; 32]))),
        },
        seeds: plan
            .seeds
            .iter()
            .map(|seed| Seed { text: seed.to_string(), addresses: vec![*seed] })
            .collect(),
        advertise: Vec::new(),
        control_port: CONTROL_PORT,
        lanes: vec![LaneConfig::new(0, LANE, LANE_PORT, plan.lane.clone())],
        mtu: None,
        mtu_raise: mesh_core::path::mtu::RAISED,
        software: "sim".to_owned(),
        boot: plan.boot.clone(),
        previous_start: plan.previous_start,
        max_calls: plan.max_calls,
        admin_keys: plan.admin.into_iter().collect(),
        backend: (Backend::Userspace, "simulated".to_owned()),
    }
}

/// Secrets of a session, the same for both ends and for no other session.
pub fn session_secrets(seed: u64, link: u64) -> SessionSecrets {
    let draw = |label: &str| -> [u8; 32] {
        let hash = Sha256::new().chain_update(label).chain_update(seed.to_le_bytes());
        hash.chain_update(link.to_le_bytes()).finalize().into()
    };
    SessionSecrets { join_binding: draw("join"), psk_seed: Secret32::from_bytes(draw("psk")) }
}

/// How the node's clock reads at a moment of the simulation: it begins with the process.
pub fn clock(now: Time, started: Time) -> Time {
    Time::from_origin(now.since(started))
}

/// How long until the node's clock reads `at`.
pub fn until(at: Time, now: Time, started: Time) -> Duration {
    at.since(clock(now, started))
}
