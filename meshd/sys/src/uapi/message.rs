//! What the messages say, and how they are written.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::key::{PublicKey, SecretKey, push_hex};

/// What a client asks of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Report everything.
    Get,
    /// Change what the message names, leave the rest.
    Set(SetDevice),
}

/// Changes to a device. `None` and `false` leave things as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SetDevice {
    /// New private key; [`SecretKey::ZERO`] takes it away. Ends all sessions when it differs from the present one.
    pub private_key: Option<SecretKey>,
    /// UDP port to listen on; 0 lets the kernel choose.
    pub listen_port: Option<u16>,
    /// Mark of the tunnel's own UDP packets; 0 means none.
    pub fwmark: Option<u32>,
    /// Remove every peer first.
    pub replace_peers: bool,
    /// Changes to peers, applied in order. One peer may appear more than once.
    pub peers: Vec<SetPeer>,
}

/// Changes to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetPeer {
    /// Which peer. It is created when unknown, unless `update_only` or `remove`.
    pub public_key: PublicKey,
    /// Remove the peer; the other fields are then without effect.
    pub remove: bool,
    /// Do nothing at all when the peer is unknown.
    pub update_only: bool,
    /// New preshared key; [`SecretKey::ZERO`] takes it away.
    pub preshared_key: Option<SecretKey>,
    /// Where to send to until the peer is heard from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0 switches them off.
    pub persistent_keepalive: Option<u16>,
    /// Drop the peer's present prefixes before `allowed_ips` is applied, wherever the line stands in the message.
    pub replace_allowed_ips: bool,
    /// Prefixes to give to or take from the peer, in order, host bits cleared.
    pub allowed_ips: Vec<AllowedIpChange>,
}

impl SetPeer {
    /// A change that only makes sure that the peer exists.
    #[must_use]
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }

    /// A change that removes the peer.
    #[must_use]
    pub fn removal(public_key: PublicKey) -> Self {
        Self { remove: true, ..Self::new(public_key) }
    }
}

/// One `allowed_ip` line of a set request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedIpChange {
    /// The prefix belongs to this peer from now on, and to no other.
    Add(IpNet),
    /// The prefix is taken from this peer; nothing happens when another peer owns it. Written with a leading `-`
    /// (wireguard-tools after 1.0.20250521).
    Remove(IpNet),
}

/// A device as it reports itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// The private key, when one is set.
    pub private_key: Option<SecretKey>,
    /// UDP port in use; 0 while no socket is bound.
    pub listen_port: u16,
    /// Mark of the tunnel's own UDP packets; 0 means none.
    pub fwmark: u32,
    /// All peers.
    pub peers: Vec<Peer>,
}

/// A peer as its device reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The peer's public key.
    pub public_key: PublicKey,
    /// The preshared key, when one is set.
    pub preshared_key: Option<SecretKey>,
    /// Where packets for the peer go: configured, or learned from its authenticated packets.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between keepalives; 0 when off.
    pub persistent_keepalive: u16,
    /// Time of the last completed handshake since the Unix epoch; zero when there was none.
    pub last_handshake_time: Duration,
    /// Bytes received from the peer in authenticated packets, WireGuard's headers included.
    pub rx_bytes: u64,
    /// Bytes sent to the peer, WireGuard's headers included.
    pub tx_bytes: u64,
    /// Prefixes the peer owns.
    pub allowed_ips: Vec<IpNet>,
    /// Always 1 today.
    pub protocol_version: u32,
}

impl Peer {
    /// A peer that has done nothing yet.
    #[must_use]
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: 0,
            last_handshake_time: Duration::ZERO,
            rx_bytes: 0,
            tx_bytes: 0,
            allowed_ips: Vec::new(),
            protocol_version: 1,
        }
    }
}

/// Room for everything of one device or peer but its prefixes. The longest lines are the keys (79 bytes); a peer has
/// at most ten.
const SECTION_ROOM: usize = 640;
/// Room for one `allowed_ip` line: `allowed_ip=-`, 39 characters of address, `/128`, newline.
const PREFIX_ROOM: usize = 60;

/// The text holds secrets, so it must never move: room for all of it is taken at once.
fn buffer(sections: usize, prefixes: usize) -> Zeroizing<String> {
    Zeroizing::new(String::with_capacity((sections + 1) * SECTION_ROOM + prefixes * PREFIX_ROOM))
}

/// Writing to a `String` cannot fail; this keeps that fact in one place.
macro_rules! line {
    ($out:expr, $($format:tt)*) => {{
        let _infallible = writeln!($out, $($format)*);
    }};
}

fn line_secret(out: &mut String, name: &str, key: &SecretKey) {
    out.push_str(name);
    out.push('=');
    push_hex(key.expose(), out);
    out.push('\n');
}

impl Request {
    /// The request as it goes over the socket, closing empty line included.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        match self {
            Self::Get => Zeroizing::new("get=1\n\n".to_owned()),
            Self::Set(set) => set.to_text(),
        }
    }
}

impl SetDevice {
    /// The set request as it goes over the socket, closing empty line included.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let prefixes = self.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        let mut out = buffer(self.peers.len(), prefixes);
        out.push_str("set=1\n");
        if let Some(key) = &self.private_key {
            line_secret(&mut out, "private_key", key);
        }
        if let Some(port) = self.listen_port {
            line!(out, "listen_port={port}");
        }
        if let Some(mark) = self.fwmark {
            line!(out, "fwmark={mark}");
        }
        if self.replace_peers {
            out.push_str("replace_peers=true\n");
        }
        for peer in &self.peers {
            peer.write(&mut out);
        }
        out.push('\n');
        out
    }
}

impl SetPeer {
    fn write(&self, out: &mut String) {
        line!(out, "public_key={}", self.public_key.to_hex());
        if self.update_only {
            out.push_str("update_only=true\n");
        }
        if self.remove {
            out.push_str("remove=true\n");
        }
        if let Some(key) = &self.preshared_key {
            line_secret(out, "preshared_key", key);
        }
        if let Some(endpoint) = self.endpoint {
            line!(out, "endpoint={endpoint}");
        }
        if let Some(seconds) = self.persistent_keepalive {
            line!(out, "persistent_keepalive_interval={seconds}");
        }
        if self.replace_allowed_ips {
            out.push_str("replace_allowed_ips=true\n");
        }
        for change in &self.allowed_ips {
            match change {
                AllowedIpChange::Add(prefix) => line!(out, "allowed_ip={prefix}"),
                AllowedIpChange::Remove(prefix) => line!(out, "allowed_ip=-{prefix}"),
            }
        }
    }
}

impl Device {
    /// The answer to a get request as it goes over the socket, `errno=0` and closing empty line included.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let prefixes = self.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        let mut out = buffer(self.peers.len(), prefixes);
        if let Some(key) = &self.private_key {
            line_secret(&mut out, "private_key", key);
        }
        line!(out, "listen_port={}", self.listen_port);
        if self.fwmark != 0 {
            line!(out, "fwmark={}", self.fwmark);
        }
        for peer in &self.peers {
            peer.write(&mut out);
        }
        out.push_str("errno=0\n\n");
        out
    }
}

impl Peer {
    fn write(&self, out: &mut String) {
        line!(out, "public_key={}", self.public_key.to_hex());
        line_secret(out, "preshared_key", self.preshared_key.as_ref().unwrap_or(&SecretKey::ZERO));
        line!(out, "protocol_version={}", self.protocol_version);
        if let Some(endpoint) = self.endpoint {
            line!(out, "endpoint={endpoint}");
        }
        line!(out, "last_handshake_time_sec={}", self.last_handshake_time.as_secs());
        line!(out, "last_handshake_time_nsec={}", self.last_handshake_time.subsec_nanos());
        line!(out, "tx_bytes={}", self.tx_bytes);
        line!(out, "rx_bytes={}", self.rx_bytes);
        line!(out, "persistent_keepalive_interval={}", self.persistent_keepalive);
        for prefix in &self.allowed_ips {
            line!(out, "allowed_ip={prefix}");
        }
    }
}

/// The answer to a set request: 0 for success, otherwise the negated errno, which is what `wg set` and `wg syncconf`
/// turn into a message.
#[must_use]
pub fn format_errno(errno: i32) -> String {
    format!("errno={errno}\n\n")
}
