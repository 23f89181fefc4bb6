//! Reading the messages. Every refusal names the key and the line.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use super::key::{KeyError, PublicKey, SecretKey};
use super::message::{AllowedIpChange, Device, Peer, Request, SetDevice, SetPeer};

/// A message that was refused. Nothing of it has been applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {key}: {kind}")]
pub struct ParseError {
    /// Line of the message, counted from 1.
    pub line: usize,
    /// The key on that line, cut to 64 characters; empty when the line has none.
    pub key: String,
    /// What is wrong.
    pub kind: ParseErrorKind,
}

/// What is wrong with a line. Values are quoted only where they cannot be secrets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseErrorKind {
    /// The line has no `=`.
    #[error("expected key=value")]
    NotKeyValue,
    /// The line is not UTF-8.
    #[error("the value is not UTF-8")]
    NotUtf8,
    /// The first line is neither `get=1` nor `set=1`.
    #[error("a request starts with get=1 or set=1")]
    NotARequest,
    /// A get request has further lines.
    #[error("a get request has no further lines")]
    TrailingLine,
    /// The key is unknown, or not known at this place.
    #[error("unknown key {0}")]
    UnknownKey(Place),
    /// The key was given twice where it may stand once.
    #[error("given twice")]
    Twice,
    /// The value must be `true`.
    #[error("the only value is true")]
    NotTrue,
    /// A number is malformed or out of range.
    #[error("expected a number from 0 to {max}")]
    Number {
        /// Greatest value the key takes.
        max: u64,
    },
    /// A key is malformed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An endpoint is not an address and port.
    #[error("{0:?} is not an endpoint: expected 192.0.2.1:51820 or [2001:db8::1]:51820, a port other than 0")]
    Endpoint(String),
    /// A prefix is malformed.
    #[error("{0:?} is not a prefix: expected 192.0.2.0/24 or 2001:db8::/32")]
    Prefix(String),
    /// The peer speaks another version of the protocol.
    #[error("only protocol version 1 is known")]
    ProtocolVersion,
    /// The answer has no `errno` line.
    #[error("the answer ends without errno")]
    NoErrno,
}

/// Where in a message a key stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Before the first `public_key`.
    Device,
    /// After a `public_key`.
    Peer,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Device => "for the device (before the first public_key)",
            Self::Peer => "for a peer",
        })
    }
}

/// Why an answer is not a [`Device`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    /// The device refused the request with this errno (positive).
    #[error("the device refused the request: {}", std::io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// The answer is malformed.
    #[error("malformed answer: {0}")]
    Parse(#[from] ParseError),
}

type Parsed<T> = Result<T, ParseErrorKind>;

struct Line<'a> {
    number: usize,
    key: &'a str,
    value: &'a str,
}

impl Line<'_> {
    fn error(&self, kind: ParseErrorKind) -> ParseError {
        ParseError { line: self.number, key: self.key.chars().take(64).collect(), kind }
    }

    fn at<T>(&self, parsed: Parsed<T>) -> Result<T, ParseError> {
        parsed.map_err(|kind| self.error(kind))
    }
}

/// The lines up to the first empty one.
fn lines(text: &[u8]) -> impl Iterator<Item = Result<Line<'_>, ParseError>> {
    text.split(|byte| *byte == b'\n').take_while(|line| !line.is_empty()).enumerate().map(|(index, line)| {
        let number = index + 1;
        let nowhere = |kind| ParseError { line: number, key: String::new(), kind };
        let line = std::str::from_utf8(line).map_err(|_| nowhere(ParseErrorKind::NotUtf8))?;
        let (key, value) = line.split_once('=').ok_or_else(|| nowhere(ParseErrorKind::NotKeyValue))?;
        Ok(Line { number, key, value })
    })
}

/// Decimal without sign, space or leading plus.
fn number<T: FromStr>(value: &str, max: u64) -> Parsed<T> {
    let refused = ParseErrorKind::Number { max };
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refused);
    }
    value.parse().map_err(|_| refused)
}

fn truth(value: &str) -> Parsed<()> {
    if value == "true" { Ok(()) } else { Err(ParseErrorKind::NotTrue) }
}

fn version(value: &str) -> Parsed<u32> {
    if value == "1" { Ok(1) } else { Err(ParseErrorKind::ProtocolVersion) }
}

fn secret(value: &str) -> Parsed<SecretKey> {
    Ok(SecretKey::from_hex(value.as_bytes())?)
}

fn prefix(value: &str) -> Parsed<IpNet> {
    let refused = || ParseErrorKind::Prefix(value.chars().take(64).collect());
    Ok(value.parse::<IpNet>().map_err(|_| refused())?.trunc())
}

fn endpoint(value: &str) -> Parsed<SocketAddr> {
    let refused = || ParseErrorKind::Endpoint(value.chars().take(80).collect());
    let address = value.parse().ok().or_else(|| scoped_endpoint(value)).ok_or_else(refused)?;
    if address.port() == 0 { Err(refused()) } else { Ok(address) }
}

/// `[fe80::1%eth0]:51820`: what `wg` sends for a link-local endpoint.
fn scoped_endpoint(value: &str) -> Option<SocketAddr> {
    let (host, port) = value.strip_prefix('[')?.rsplit_once("]:")?;
    let (address, scope) = host.split_once('%')?;
    let address: Ipv6Addr = address.parse().ok()?;
    if scope.contains('\0') {
        return None;
    }
    let index = nix::net::if_::if_nametoindex(scope).ok()?;
    Some(SocketAddr::V6(SocketAddrV6::new(address, number(port, u16::MAX.into()).ok()?, 0, index)))
}

/// Sets a field that may be given once.
fn once<T>(field: &mut Option<T>, value: T) -> Parsed<()> {
    if field.is_some() {
        return Err(ParseErrorKind::Twice);
    }
    *field = Some(value);
    Ok(())
}

impl Request {
    /// Reads one request. It ends at the first empty line or the end of `text`; what follows is ignored.
    ///
    /// # Errors
    /// [`ParseError`] names the line, the key and the mistake; values of keys that hold secrets are never quoted.
    pub fn parse(text: &[u8]) -> Result<Self, ParseError> {
        let mut lines = lines(text);
        let nothing = || ParseError { line: 1, key: String::new(), kind: ParseErrorKind::NotARequest };
        let first = lines.next().ok_or_else(nothing)??;
        match (first.key, first.value) {
            ("get", "1") => match lines.next() {
                None => Ok(Self::Get),
                Some(line) => Err(line?.error(ParseErrorKind::TrailingLine)),
            },
            ("set", "1") => SetDevice::parse_lines(lines).map(Self::Set),
            _ => Err(first.error(ParseErrorKind::NotARequest)),
        }
    }
}

impl SetDevice {
    fn parse_lines<'a>(
        lines: impl Iterator<Item = Result<Line<'a>, ParseError>>,
    ) -> Result<Self, ParseError> {
        let mut device = Self::default();
        for line in lines {
            let line = line?;
            let parsed = if line.key == "public_key" {
                PublicKey::from_hex(line.value.as_bytes())
                    .map(|key| device.peers.push(SetPeer::new(key)))
                    .map_err(ParseErrorKind::Key)
            } else if let Some(peer) = device.peers.last_mut() {
                peer.set(line.key, line.value)
            } else {
                device.set(line.key, line.value)
            };
            line.at(parsed)?;
        }
        Ok(device)
    }

    fn set(&mut self, key: &str, value: &str) -> Parsed<()> {
        match key {
            "private_key" => once(&mut self.private_key, secret(value)?),
            "listen_port" => once(&mut self.listen_port, number(value, u16::MAX.into())?),
            "fwmark" => once(&mut self.fwmark, number(value, u32::MAX.into())?),
            "replace_peers" => {
                self.replace_peers = true;
                truth(value)
            }
            _ => Err(ParseErrorKind::UnknownKey(Place::Device)),
        }
    }
}

impl SetPeer {
    fn set(&mut self, key: &str, value: &str) -> Parsed<()> {
        match key {
            "remove" => {
                self.remove = true;
                truth(value)
            }
            "update_only" => {
                self.update_only = true;
                truth(value)
            }
            "preshared_key" => once(&mut self.preshared_key, secret(value)?),
            "endpoint" => once(&mut self.endpoint, endpoint(value)?),
            "persistent_keepalive_interval" => {
                once(&mut self.persistent_keepalive, number(value, u16::MAX.into())?)
            }
            "replace_allowed_ips" => {
                self.replace_allowed_ips = true;
                truth(value)
            }
            "allowed_ip" => {
                self.allowed_ips.push(match value.strip_prefix('-') {
                    Some(rest) => AllowedIpChange::Remove(prefix(rest)?),
                    None => AllowedIpChange::Add(prefix(value)?),
                });
                Ok(())
            }
            "protocol_version" => version(value).map(drop),
            _ => Err(ParseErrorKind::UnknownKey(Place::Peer)),
        }
    }
}

impl Device {
    /// Reads the answer to a get request. Unknown keys are skipped: a device may know more than this module.
    ///
    /// # Errors
    /// [`ResponseError::Errno`] when the device refused, [`ResponseError::Parse`] when the answer is malformed or
    /// was cut off.
    pub fn parse(text: &[u8]) -> Result<Self, ResponseError> {
        let mut device = Self::default();
        let mut errno = None;
        let mut count = 0;
        for line in lines(text) {
            let line = line?;
            count = line.number;
            let parsed = match line.key {
                "errno" => once(&mut errno, line.at(parse_errno(line.value))?),
                "public_key" => PublicKey::from_hex(line.value.as_bytes())
                    .map(|key| device.peers.push(Peer::new(key)))
                    .map_err(ParseErrorKind::Key),
                key => match device.peers.last_mut() {
                    Some(peer) => peer.set(key, line.value),
                    None => device.set(key, line.value),
                },
            };
            line.at(parsed)?;
        }
        match errno {
            Some(0) => Ok(device),
            Some(errno) => Err(ResponseError::Errno(errno)),
            None => {
                Err(ParseError { line: count + 1, key: "errno".to_owned(), kind: ParseErrorKind::NoErrno }
                    .into())
            }
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Parsed<()> {
        match key {
            "private_key" => self.private_key = Some(secret(value)?).filter(|key| !key.is_zero()),
            "listen_port" => self.listen_port = number(value, u16::MAX.into())?,
            "fwmark" => self.fwmark = number(value, u32::MAX.into())?,
            _ => {}
        }
        Ok(())
    }
}

impl Peer {
    fn set(&mut self, key: &str, value: &str) -> Parsed<()> {
        match key {
            "preshared_key" => self.preshared_key = Some(secret(value)?).filter(|key| !key.is_zero()),
            "protocol_version" => self.protocol_version = version(value)?,
            "endpoint" => self.endpoint = Some(endpoint(value)?),
            "persistent_keepalive_interval" => self.persistent_keepalive = number(value, u16::MAX.into())?,
            "last_handshake_time_sec" => {
                // One less than the greatest, so that the nanoseconds cannot carry it over.
                let seconds = number::<u64>(value, u64::MAX - 1)?.min(u64::MAX - 1);
                self.last_handshake_time = Duration::new(seconds, self.last_handshake_time.subsec_nanos());
            }
            "last_handshake_time_nsec" => {
                let max = 999_999_999;
                let nanos = number::<u32>(value, max)?;
                if u64::from(nanos) > max {
                    return Err(ParseErrorKind::Number { max });
                }
                self.last_handshake_time = Duration::new(self.last_handshake_time.as_secs(), nanos);
            }
            "rx_bytes" => self.rx_bytes = number(value, u64::MAX)?,
            "tx_bytes" => self.tx_bytes = number(value, u64::MAX)?,
            "allowed_ip" => self.allowed_ips.push(prefix(value)?),
            _ => {}
        }
        Ok(())
    }
}

/// Implementations differ on the sign; the size is what counts.
fn parse_errno(value: &str) -> Parsed<i32> {
    number(value.strip_prefix('-').unwrap_or(value), i32::MAX as u64)
}

/// Reads the answer to a set request.
///
/// # Errors
/// As for [`Device::parse`].
pub(super) fn parse_set_answer(text: &[u8]) -> Result<(), ResponseError> {
    Device::parse(text).map(drop)
}
