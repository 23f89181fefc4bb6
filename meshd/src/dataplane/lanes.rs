//! Tunnel devices: their engines, keys and peers.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mesh_core::host::{Lane, LanePeer, Op};
use mesh_core::node::TunnelFacts;
use mesh_keys::{Psk, Secret32, WgPublic, WgSecret};
use mesh_sys::rtnl::{AddrGenMode, Blocking, Link, LinkChange, RtnlError};
use mesh_sys::uapi::{
    self, AllowedIpChange, BlockingClient, ClientError, PublicKey, SecretKey, SetDevice, SetPeer,
};

use super::LaneSecret;

/// Within this time an engine must be up and answer. It takes some 50 ms.
const START_LIMIT: Duration = Duration::from_secs(5);

/// How often a starting engine is looked at.
const START_POLL: Duration = Duration::from_millis(5);

/// An engine that is alive answers within milliseconds, however many peers it has.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// An engine that was started this often within [`CRASH_SPAN`] is left alone until that has passed.
const CRASH_STARTS: usize = 4;

/// See [`CRASH_STARTS`].
const CRASH_SPAN: Duration = Duration::from_secs(10);

/// What an engine gets of our environment: nothing that could hold a secret.
const ENVIRONMENT: [&str; 2] = ["PATH", "LOG_LEVEL"];

/// Why a tunnel device is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaneError {
    /// There is no secret for the device.
    #[error("no private key is known for it")]
    NoKey,
    /// The secret does not belong to the public key.
    #[error("its private key does not belong to the public key {0}")]
    OtherKey(WgPublic),
    /// Something else has the name.
    #[error("a device of kind {kind} is in the way; remove or rename it")]
    Occupied {
        /// What it is.
        kind: String,
    },
    /// The engine cannot be run.
    #[error("cannot run {path}: {source} (is mesh-wg installed there?)")]
    Run {
        /// The program.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The engine gave up.
    #[error("{path} ended with {status}; its own words are in the log")]
    Failed {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// The engine is not up in time.
    #[error("{path} did not come up within {START_LIMIT:?}")]
    Slow {
        /// The program.
        path: PathBuf,
    },
    /// The engine ends again and again.
    #[error(
        "its engine was started {CRASH_STARTS} times within {CRASH_SPAN:?}; it is left alone for a while"
    )]
    Crashing,
    /// The device is not there.
    #[error("the device does not exist")]
    Missing,
    /// A peer without pre-shared key.
    #[error("peer {0} has no pre-shared key: it is not installed")]
    NoPsk(WgPublic),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] ClientError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] RtnlError),
}

/// Starts and configures engines.
#[derive(Debug)]
pub(super) struct Lanes {
    mesh_wg: PathBuf,
    secrets: BTreeMap<String, WgSecret>,
    starts: BTreeMap<String, Vec<Instant>>,
}

impl Lanes {
    pub(super) fn new(mesh_wg: PathBuf, secrets: Vec<LaneSecret>) -> Self {
        let secrets = secrets.into_iter().map(|lane| (lane.device, lane.secret)).collect();
        Self { mesh_wg, secrets, starts: BTreeMap::new() }
    }

    /// Devices whose keys we hold.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.secrets.keys()
    }

    /// Makes the device if need be, and gives it key, port and MTU. What is right already is not touched: an
    /// engine that has run since before us keeps its sessions.
    pub(super) fn set(
        &mut self,
        rtnl: &mut Blocking,
        device: &str,
        port: u16,
        key: WgPublic,
        mtu: u32,
    ) -> Result<(), LaneError> {
        let secret = self.secrets.get(device).ok_or(LaneError::NoKey)?;
        if secret.public() != key {
            return Err(LaneError::OtherKey(key));
        }
        let private = SecretKey::new(secret.expose());
        let running = match rtnl.link(device)? {
            None => None,
            Some(link) if link.kind.as_deref() != Some("tun") => {
                return Err(LaneError::Occupied { kind: link.kind.unwrap_or_else(|| "physical".to_owned()) });
            }
            Some(_) => match client(device).get() {
                Ok(found) => Some(found),
                Err(ClientError::NotRunning { .. }) => {
                    tracing::warn!(device, "tunnel device has no engine; it is made anew");
                    rtnl.delete_link(device)?;
                    None
                }
                Err(other) => return Err(other.into()),
            },
        };
        let found = match running {
            Some(found) => found,
            None => self.start(device)?,
        };
        let change = SetDevice {
            private_key: (found.private_key.as_ref() != Some(&private)).then_some(private),
            listen_port: (found.listen_port != port).then_some(port),
            ..SetDevice::default()
        };
        if change != SetDevice::default() {
            client(device).set(&change)?;
        }
        let Some(link) = rtnl.link(device)? else { return Err(LaneError::Missing) };
        if !link.up {
            let change = LinkChange { addr_gen: Some(AddrGenMode::None), ..LinkChange::default() };
            // Without IPv6 there is no such setting; nothing else can be wrong with this request.
            if let Err(error) = rtnl.set_link(link.index, change) {
                tracing::debug!(device, %error, "link-local addresses stay as the kernel makes them");
            }
        }
        if !link.up || link.mtu != mtu {
            rtnl.set_link(
                link.index,
                LinkChange { up: Some(true), mtu: Some(mtu), ..LinkChange::default() },
            )?;
        }
        Ok(())
    }

    fn start(&mut self, device: &str) -> Result<uapi::Device, LaneError> {
        let starts = self.starts.entry(device.to_owned()).or_default();
        starts.retain(|at| at.elapsed() < CRASH_SPAN);
        if starts.len() >= CRASH_STARTS {
            return Err(LaneError::Crashing);
        }
        starts.push(Instant::now());
        tracing::info!(device, engine = %self.mesh_wg.display(), "tunnel engine starts");
        let path = || self.mesh_wg.clone();
        let mut command = Command::new(&self.mesh_wg);
        command.arg(device).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        for name in ENVIRONMENT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        let mut child = command.spawn().map_err(|source| LaneError::Run { path: path(), source })?;
        let deadline = Instant::now() + START_LIMIT;
        // The process that we started ends when its child, the engine, is up in a session of its own.
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => break,
                Ok(Some(status)) => return Err(LaneError::Failed { path: path(), status }),
                Ok(None) if Instant::now() < deadline => sleep(START_POLL),
                Ok(None) => {
                    let ended = child.kill().and_then(|()| child.wait());
                    tracing::debug!(?ended, "engine that does not come up was ended");
                    return Err(LaneError::Slow { path: path() });
                }
                Err(source) => return Err(LaneError::Run { path: path(), source }),
            }
        }
        loop {
            match client(device).get() {
                Ok(found) => return Ok(found),
                Err(ClientError::NotRunning { .. }) if Instant::now() < deadline => sleep(START_POLL),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Carries out a [`Op::SetPeer`] or [`Op::RemovePeer`]; others are none of ours. `known` are the peers that
    /// the device has.
    pub(super) fn peer(&self, op: &Op, known: &mut BTreeSet<(String, WgPublic)>) -> Result<(), LaneError> {
        let (device, change) = match op {
            Op::SetPeer { device, peer, psk, endpoint, keepalive, add_allowed_ips, remove_allowed_ips } => {
                let id = (device.clone(), *peer);
                if psk.is_none() && !known.contains(&id) {
                    return Err(LaneError::NoPsk(*peer));
                }
                let mut change = SetPeer::new(public(peer));
                // Were it gone by now, it must not come back without its key.
                change.update_only = psk.is_none();
                change.preshared_key = psk.as_ref().map(|psk| SecretKey::new(psk.expose()));
                change.endpoint = *endpoint;
                change.persistent_keepalive = *keepalive;
                change.allowed_ips = add_allowed_ips.iter().copied().map(AllowedIpChange::Add).collect();
                change.allowed_ips.extend(remove_allowed_ips.iter().copied().map(AllowedIpChange::Remove));
                known.insert(id);
                (device, change)
            }
            Op::RemovePeer { device, peer } => {
                known.remove(&(device.clone(), *peer));
                (device, SetPeer::removal(public(peer)))
            }
            Op::SetSysctl { .. }
            | Op::SetGuard(_)
            | Op::SetBridge(_)
            | Op::SetLane { .. }
            | Op::AddAddress { .. }
            | Op::RemoveAddress { .. }
            | Op::SetPort { .. }
            | Op::RemovePort { .. }
            | Op::SetRoute { .. }
            | Op::RemoveRoute { .. }
            | Op::RemoveLane { .. }
            | Op::RemoveBridge { .. } => return Ok(()),
        };
        Ok(client(device).set(&SetDevice { peers: vec![change], ..SetDevice::default() })?)
    }
}

/// Deletes the device; its engine ends by that.
pub(super) fn remove(rtnl: &mut Blocking, device: &str) -> Result<(), LaneError> {
    match rtnl.link(device)? {
        None => Ok(()),
        Some(link) if link.kind.as_deref() == Some("tun") => {
            rtnl.delete_link(device)?;
            Ok(())
        }
        Some(link) => Err(LaneError::Occupied { kind: link.kind.unwrap_or_else(|| "physical".to_owned()) }),
    }
}

/// What a device is like, its addresses left out. A device that is down, without key or without engine is like
/// none that anybody wants.
///
/// # Errors
/// The engine lives and does not answer as it should.
pub(super) fn observe(link: &Link) -> Result<Option<Lane>, ClientError> {
    let device = match client(&link.name).get() {
        Ok(device) => device,
        Err(ClientError::NotRunning { .. }) => return Ok(None),
        Err(other) => return Err(other),
    };
    let peers = device.peers.iter().map(|peer| {
        let entry = LanePeer {
            psk: Psk::from_secret(Secret32::from_bytes(
                peer.preshared_key.as_ref().map_or([0; 32], |key| *key.expose()),
            )),
            endpoint: peer.endpoint,
            force_endpoint: false,
            allowed_ips: peer.allowed_ips.iter().copied().collect(),
            keepalive: peer.persistent_keepalive,
        };
        (WgPublic::from_bytes(*peer.public_key.as_bytes()), entry)
    });
    Ok(Some(Lane {
        port: device.listen_port,
        public_key: device
            .private_key
            .as_ref()
            .map_or(NO_KEY, |key| WgSecret::from_bytes(key.expose()).public()),
        mtu: if link.up { link.mtu } else { 0 },
        addresses: BTreeSet::new(),
        peers: peers.collect(),
    }))
}

/// What WireGuard tells of the peers of these devices; devices that do not answer are left out.
pub(super) fn tunnels(devices: &BTreeSet<String>, wall: Duration) -> BTreeMap<WgPublic, TunnelFacts> {
    let mut facts = BTreeMap::new();
    for name in devices {
        let device = match client(name).get() {
            Ok(device) => device,
            Err(error) => {
                tracing::debug!(device = name, %error, "tunnel device does not tell about its peers");
                continue;
            }
        };
        for peer in device.peers {
            let shaken = peer.last_handshake_time;
            let fact = TunnelFacts {
                endpoint: peer.endpoint,
                // Set back clocks make a handshake of the future one of now.
                handshake_age: (!shaken.is_zero()).then(|| wall.saturating_sub(shaken)),
                rx_bytes: peer.rx_bytes,
                tx_bytes: peer.tx_bytes,
            };
            facts.insert(WgPublic::from_bytes(*peer.public_key.as_bytes()), fact);
        }
    }
    facts
}

/// The public key of no device.
pub(super) const NO_KEY: WgPublic = WgPublic::from_bytes([0; 32]);

fn client(device: &str) -> BlockingClient {
    BlockingClient::new(device).with_timeout(ANSWER_LIMIT)
}

fn public(key: &WgPublic) -> PublicKey {
    PublicKey(*key.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_peer_without_pre_shared_key_is_refused_before_anything_is_sent() {
        let lanes = Lanes::new(PathBuf::from("/nonexistent"), Vec::new());
        let peer = WgPublic::from_bytes([7; 32]);
        let op = Op::SetPeer {
            device: "no-such-device".to_owned(),
            peer,
            psk: None,
            endpoint: None,
            keepalive: None,
            add_allowed_ips: BTreeSet::from(["10.32.1.0/24".parse().unwrap()]),
            remove_allowed_ips: BTreeSet::new(),
        };
        let mut known = BTreeSet::new();
        assert!(matches!(lanes.peer(&op, &mut known), Err(LaneError::NoPsk(refused)) if refused == peer));
        assert!(known.is_empty());
    }

    #[test]
    fn an_engine_that_cannot_run_is_not_tried_for_ever() {
        let mut lanes = Lanes::new(PathBuf::from("/nonexistent/mesh-wg"), Vec::new());
        for _ in 0..CRASH_STARTS {
            assert!(matches!(lanes.start("dpw-none"), Err(LaneError::Run { .. })));
        }
        assert!(matches!(lanes.start("dpw-none"), Err(LaneError::Crashing)));
    }
}
