//! The plugin's configuration: what the runtime sends on standard input.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mesh_core::api;
use tracing::level_filters::LevelFilter;

use crate::error::CniError;
use crate::fields::Fields;
use crate::result::{Dns, PrevResult};
use crate::version::CniVersion;

/// IPv6 needs links of at least this many bytes (RFC 8200, section 5).
pub const MIN_MTU: u32 = 1280;

/// The largest MTU of a veth device.
pub const MAX_MTU: u32 = 65_535;

/// `sun_path` of `sockaddr_un` without its terminating zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// What every operation needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// Version of the specification that the request speaks.
    pub version: CniVersion,
    /// Name of the network.
    pub name: String,
    /// The daemon's control socket.
    pub socket: PathBuf,
    /// The daemon's state directory: tombstones and the plugin's lock file are there.
    pub state_dir: PathBuf,
    /// The daemon's run directory: its heartbeat file is there.
    pub run_dir: PathBuf,
    /// The least severe messages that go to stderr.
    pub log_level: LevelFilter,
}

/// What ADD, CHECK and STATUS need on top.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachConf {
    /// Overrides the daemon's MTU, in bytes.
    pub mtu: Option<u32>,
    /// Goes into the result.
    pub dns: Option<Dns>,
    /// What the plugins before this one made.
    pub prev_result: Option<PrevResult>,
}

impl NetConf {
    /// Reads the fields that every operation uses. Other fields are not looked at, so that DEL and GC work
    /// with whatever ADD was once called with.
    ///
    /// # Errors
    /// Code 7, naming the field.
    pub(crate) fn parse(top: &Fields<'_>, version: CniVersion) -> Result<Self, CniError> {
        let name = top.text("name")?.unwrap_or_default();
        if name.is_empty() {
            return Err(top.invalid("name", "the network needs a name"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !name.chars().all(plain)
            || name.len() > 255
        {
            let why = "a network name starts with a letter or digit and has only letters, digits, '_', '.' and '-' \
                       (at most 255)";
            return Err(top.invalid("name", why));
        }
        // The runtime has found the binary by this field already; its value needs no second check.
        if top.text("type")?.unwrap_or_default().is_empty() {
            return Err(top.invalid("type", "missing; it is the name of the plugin, \"mesh-cni\""));
        }
        let socket = absolute_path(top, "socket", api::DEFAULT_SOCKET)?;
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(top.invalid("socket", format!("a socket's path has at most {MAX_SOCKET_PATH} bytes")));
        }
        let state_dir = absolute_path(top, "stateDir", api::DEFAULT_STATE_DIR)?;
        let beside_socket = socket.parent().and_then(Path::to_str).unwrap_or("/").to_owned();
        let run_dir = absolute_path(top, "runDir", &beside_socket)?;
        let log_level = log_level(top)?;
        Ok(Self { version, name: name.to_owned(), socket, state_dir, run_dir, log_level })
    }
}

impl AttachConf {
    /// Reads the fields that only ADD, CHECK and STATUS use.
    ///
    /// # Errors
    /// Code 7, naming the field.
    pub(crate) fn parse(top: &Fields<'_>, version: CniVersion) -> Result<Self, CniError> {
        refuse_delegation(top)?;
        // Capabilities that are not ours are none of our business; that the objects are objects is.
        top.object("runtimeConfig")?;
        top.object("capabilities")?;
        top.object("args")?;
        let prev_result = match top.object("prevResult")? {
            Some(fields) => Some(PrevResult::parse(&fields, version)?),
            None => None,
        };
        Ok(Self { mtu: mtu(top)?, dns: dns(top)?, prev_result })
    }
}

fn absolute_path(top: &Fields<'_>, name: &str, default: &str) -> Result<PathBuf, CniError> {
    let text = match top.text(name)? {
        Some(text) if !text.is_empty() => text,
        Some(_) | None => default,
    };
    if !text.starts_with('/') || text.contains('\0') || text.len() > 4095 {
        return Err(top.invalid(name, "expected an absolute path"));
    }
    Ok(PathBuf::from(text))
}

fn log_level(top: &Fields<'_>) -> Result<LevelFilter, CniError> {
    match top.text("logLevel")? {
        None | Some("") | Some("info") => Ok(LevelFilter::INFO),
        Some("off") => Ok(LevelFilter::OFF),
        Some("error") => Ok(LevelFilter::ERROR),
        Some("warn") => Ok(LevelFilter::WARN),
        Some("debug") => Ok(LevelFilter::DEBUG),
        Some("trace") => Ok(LevelFilter::TRACE),
        Some(_) => Err(top.invalid("logLevel", "expected one of off, error, warn, info, debug, trace")),
    }
}

/// The daemon leases addresses; another IPAM plugin beside it would give addresses that it does not route.
fn refuse_delegation(top: &Fields<'_>) -> Result<(), CniError> {
    let Some(ipam) = top.object("ipam")? else { return Ok(()) };
    match ipam.text("type")? {
        None | Some("") | Some("mesh") => Ok(()),
        Some(other) => {
            let shown: String = other.chars().take(64).collect();
            Err(ipam.invalid(
                "type",
                format!("{shown:?} is not supported: addresses come from meshd; leave \"ipam\" out or set \"mesh\""),
            ))
        }
    }
}

fn mtu(top: &Fields<'_>) -> Result<Option<u32>, CniError> {
    // 0 is how programs written in Go say "not set".
    let Some(value) = top.number("mtu")?.filter(|value| *value != 0) else { return Ok(None) };
    match u32::try_from(value) {
        Ok(mtu) if (MIN_MTU..=MAX_MTU).contains(&mtu) => Ok(Some(mtu)),
        Ok(_) | Err(_) => Err(top.invalid("mtu", format!("{value} is not between {MIN_MTU} and {MAX_MTU}"))),
    }
}

fn dns(top: &Fields<'_>) -> Result<Option<Dns>, CniError> {
    let Some(dns) = top.object("dns")? else { return Ok(None) };
    let nameservers = dns.texts("nameservers")?;
    if let Some(i) = nameservers.iter().position(|text| text.parse::<IpAddr>().is_err()) {
        return Err(dns.invalid(&format!("nameservers[{i}]"), "expected an IP address"));
    }
    let dns = Dns {
        nameservers,
        domain: dns.text("domain")?.unwrap_or_default().to_owned(),
        search: dns.texts("search")?,
        options: dns.texts("options")?,
    };
    Ok(if dns.is_empty() { None } else { Some(dns) })
}
