//! The configuration of the daemon: the file, then the environment, then flags.
//!
//! Every setting has one name: `join` in the file, `MESHD_JOIN` in the environment, `--join` on the command
//! line. Lists are separated by commas in the environment. What comes later replaces what came before, lists
//! as a whole.

use std::borrow::Cow;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use ipnet::Ipv4Net;
use mesh_core::api::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use mesh_core::path::mtu::RAISED;
use mesh_keys::cluster::{GenesisFields, MAX_ADMIN_KEYS, check_name};
use mesh_keys::{IdentityKey, admin};
use mesh_sys::files::read_limited;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Where the configuration file is, unless `--config` says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/meshd/meshd.toml";

/// TCP port for control sessions.
pub const CONTROL_PORT: u16 = 6783;

/// UDP port of the first lane.
pub const WIREGUARD_PORT: u16 = 6784;

/// Longest file with a public key.
const MAX_KEY_FILE: usize = 4096;

/// The settings as one source gives them; what is absent is left to the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// File with the cluster's password. The same file on every host.
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// File with the cluster's join key, made by `meshctl keygen`. The same file on every host.
    #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
    pub key_file: Option<PathBuf>,
    /// File with a token, made by `meshctl token create`; only for joining. Once this host is a member the file may go.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["password_file", "key_file"])]
    pub token_file: Option<PathBuf>,
    /// Address of a host of the cluster; may be given more than once. The same list on every host: the one
    /// whose own address comes first founds the cluster if there is none. Without it, this host founds one.
    #[arg(long, value_name = "HOST[:PORT]", value_delimiter = ',')]
    pub join: Option<Vec<String>>,
    /// Public key of an administrator, made by `meshctl keygen --admin`, or a file with it; may be given more than
    /// once. If this host founds the cluster, only these keys can sign the removal of nodes. Without it, the
    /// cluster is flat: any member can, and a malicious one cannot be evicted.
    #[arg(long, value_name = "PUBKEY|FILE", value_delimiter = ',')]
    #[serde(alias = "admin-keys")]
    pub admin_key: Option<Vec<String>>,
    /// IPv4 range of the pods, if this host founds the cluster; no network of any host may overlap with it
    /// [default: 10.32.0.0/12].
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub range: Option<Vec<String>>,
    /// Address at which other hosts reach this one, instead of those of its devices; may be given more than once.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub advertise: Option<Vec<String>>,
    /// Label of this host [default: its host name].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Label of the cluster, if this host founds it [default: mesh].
    #[arg(long, value_name = "NAME")]
    pub cluster_name: Option<String>,
    /// Directory for identity, keys and leases [default: /var/lib/meshd].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Unix socket for meshctl and mesh-cni [default: /run/meshd/meshd.sock].
    #[arg(long, value_name = "SOCKET")]
    pub control_socket: Option<PathBuf>,
    /// TCP port for control sessions [default: 6783].
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// UDP port of the tunnel [default: 6784].
    #[arg(long, value_name = "PORT")]
    pub wireguard_port: Option<u16>,
    /// Where /metrics, /healthz and /readyz are served; `off` for nowhere [default: 127.0.0.1:6782].
    #[arg(long, value_name = "IP:PORT")]
    pub metrics_listen: Option<String>,
    /// MTU inside the tunnels, in bytes (1280 to 65000) [default: that of the host's network less 80].
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Seconds from one try to find a larger path MTU to the next (5 to 86400) [default: 600].
    #[arg(long, value_name = "SECONDS")]
    pub mtu_raise: Option<u32>,
    /// The userspace engine [default: mesh-wg beside meshd, else in PATH].
    #[arg(long, value_name = "PATH")]
    pub mesh_wg: Option<PathBuf>,
    /// What to log: off, error, warn, info, debug, trace, or a filter such as info,mesh_core=debug [default: info].
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// Log lines as text or as JSON [default: text].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// The settings of all sources together, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// What admits nodes to the cluster.
    pub secret: SecretSource,
    /// Where to find members, as given.
    pub join: Vec<JoinAddress>,
    /// Admin keys of the cluster, if this host founds it.
    pub admin_key: Vec<IdentityKey>,
    /// IPv4 range of the pods, if this host founds the cluster.
    pub range: Ipv4Net,
    /// Addresses at which other hosts reach this one.
    pub advertise: Vec<IpAddr>,
    /// Label of this host.
    pub name: String,
    /// Label of the cluster.
    pub cluster_name: String,
    /// Directory for identity, keys and leases.
    pub state_dir: PathBuf,
    /// Unix socket of the control API.
    pub control_socket: PathBuf,
    /// TCP port for control sessions.
    pub port: u16,
    /// UDP port of the tunnel.
    pub wireguard_port: u16,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// MTU inside the tunnels.
    pub mtu: Option<u32>,
    /// From one try to find a larger path MTU to the next.
    pub mtu_raise: Duration,
    /// The userspace engine.
    pub mesh_wg: PathBuf,
    /// What to log.
    pub log: String,
    /// The form of log lines.
    pub log_format: LogFormat,
}

/// Where the secret that admits nodes is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretSource {
    /// In a password file.
    PasswordFile(PathBuf),
    /// In a key file.
    KeyFile(PathBuf),
    /// A token in this file, which a member does not need any more.
    TokenFile(PathBuf),
}

/// An address from `--join`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct JoinAddress {
    /// Name or address of the host.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl std::fmt::Display for JoinAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Settings {
    /// Reads the configuration file. A file that is not there is an empty one, unless it was asked for.
    ///
    /// # Errors
    /// Names the file, the line and the field.
    pub fn from_file(path: &Path, required: bool) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("configuration file {}", path.display()));
            }
        };
        Self::from_toml(&text).with_context(|| format!("configuration file {}", path.display()))
    }

    /// Reads settings. What is said of a mistake names the place and what should be there, never what is there: it may be
    /// a secret.
    fn from_toml(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            anyhow!("line {}: {}", before.matches('\n').count() + 1, error.message())
        })?;
        Self::from_table(table)
    }

    fn from_table(table: toml::Table) -> Result<Self> {
        for (key, value) in &table {
            let alone = toml::Table::from_iter([(key.clone(), value.clone())]);
            if let Err(error) = alone.try_into::<Self>() {
                let message = error.message().to_owned();
                // What was found stands before what was expected.
                let expected = message.rsplit_once("expected ").map_or("something else", |(_, what)| what);
                if message.starts_with("unknown field") {
                    bail!("{key} is no setting; there are {}", expected.trim_start_matches("one of "));
                }
                bail!("{key}: expected {expected}");
            }
        }
        // Each is as it should be alone.
        table.try_into().map_err(|error: toml::de::Error| anyhow!("{}", error.message()))
    }

    /// Reads the variables `MESHD_…`. One that is no setting is refused: most likely it is misspelt. The others are of no
    /// concern, whatever is in them.
    ///
    /// # Errors
    /// Names the variable, never its contents.
    pub fn from_env(vars: impl Iterator<Item = (OsString, OsString)>) -> Result<Self> {
        let mut table = toml::Table::new();
        for (name, value) in vars {
            let name = name.to_string_lossy();
            let Some(key) = name.strip_prefix("MESHD_") else { continue };
            let value =
                value.into_string().map_err(|_| anyhow!("environment variable {name} is not UTF-8"))?;
            let key = key.to_ascii_lowercase().replace('_', "-");
            if key == "config" {
                continue;
            }
            let value = match key.as_str() {
                "join" | "admin-key" | "admin-keys" | "range" | "advertise" => {
                    let items = value.split(',').map(str::trim).filter(|item| !item.is_empty());
                    toml::Value::Array(items.map(|item| toml::Value::String(item.to_owned())).collect())
                }
                "port" | "wireguard-port" | "mtu" | "mtu-raise" => toml::Value::Integer(
                    value
                        .trim()
                        .parse()
                        .with_context(|| format!("environment variable {name} is not a number"))?,
                ),
                _ => toml::Value::String(value),
            };
            table.insert(key, value);
        }
        Self::from_table(table).context("environment variables MESHD_…")
    }

    /// The settings of `self`, each replaced by that of `over` where it has one.
    #[must_use]
    pub fn overlaid(self, over: Self) -> Self {
        // The secrets exclude each other: naming one takes the place of any.
        let given = over.password_file.is_some() || over.key_file.is_some() || over.token_file.is_some();
        let (password_file, key_file, token_file) = if given {
            (over.password_file, over.key_file, over.token_file)
        } else {
            (self.password_file, self.key_file, self.token_file)
        };
        Self {
            password_file,
            key_file,
            token_file,
            join: over.join.or(self.join),
            admin_key: over.admin_key.or(self.admin_key),
            range: over.range.or(self.range),
            advertise: over.advertise.or(self.advertise),
            name: over.name.or(self.name),
            cluster_name: over.cluster_name.or(self.cluster_name),
            state_dir: over.state_dir.or(self.state_dir),
            control_socket: over.control_socket.or(self.control_socket),
            port: over.port.or(self.port),
            wireguard_port: over.wireguard_port.or(self.wireguard_port),
            metrics_listen: over.metrics_listen.or(self.metrics_listen),
            mtu: over.mtu.or(self.mtu),
            mtu_raise: over.mtu_raise.or(self.mtu_raise),
            mesh_wg: over.mesh_wg.or(self.mesh_wg),
            log: over.log.or(self.log),
            log_format: over.log_format.or(self.log_format),
        }
    }

    /// Checks the settings and fills in what is absent.
    ///
    /// # Errors
    /// Names the setting and the likely mistake.
    pub fn check(self) -> Result<Config> {
        self.check_for_secrets()?;
        let secret = match (self.password_file, self.key_file, self.token_file) {
            (Some(file), None, None) => SecretSource::PasswordFile(file),
            (None, Some(file), None) => SecretSource::KeyFile(file),
            (None, None, Some(file)) => SecretSource::TokenFile(file),
            (None, None, None) => bail!(
                "no secret: give --password-file FILE or --key-file FILE (`meshctl keygen > FILE` makes a key), the same file on every host; or --token-file FILE to join by a token"
            ),
            _ => bail!("more than one of password-file, key-file and token-file is given: choose one"),
        };
        let port = nonzero("port", self.port.unwrap_or(CONTROL_PORT))?;
        let wireguard_port = nonzero("wireguard-port", self.wireguard_port.unwrap_or(WIREGUARD_PORT))?;
        if wireguard_port == port {
            bail!(
                "wireguard-port: {port} is the port of the control plane, which takes TCP and UDP: give another one here or for `port`"
            );
        }
        let join = self
            .join
            .unwrap_or_default()
            .iter()
            .map(|text| join_address(text, CONTROL_PORT))
            .collect::<Result<_>>()?;
        let admin_key = admin_keys(&self.admin_key.unwrap_or_default())?;
        let range = match self.range.unwrap_or_default().as_slice() {
            [] => GenesisFields::default_ipv4_range(),
            [one] => ipv4_range(one)?,
            _ => bail!("range: this version takes one IPv4 range; the IPv6 range follows from the cluster"),
        };
        let advertise =
            self.advertise.unwrap_or_default().iter().map(|text| advertised(text)).collect::<Result<_>>()?;
        let name = match self.name {
            Some(name) => name,
            None => nix::unistd::gethostname().context("host name")?.to_string_lossy().into_owned(),
        };
        if name.is_empty() || name.len() > 253 || name.chars().any(char::is_control) {
            bail!("name: {name:?} is not 1 to 253 printable characters");
        }
        let cluster_name = self.cluster_name.unwrap_or_else(|| "mesh".to_owned());
        check_name(&cluster_name).context("cluster-name")?;
        let metrics_listen = match self.metrics_listen.as_deref() {
            None => Some(SocketAddr::from(([127, 0, 0, 1], 6782))),
            Some("off") => None,
            Some(text) => Some(text.parse().with_context(|| {
                format!(
                    "metrics-listen: {text:?} is not IP:PORT, such as 127.0.0.1:6782 or [::1]:6782, nor `off`"
                )
            })?),
        };
        if let Some(mtu) = self.mtu
            && !(1280..=65_000).contains(&mtu)
        {
            bail!("mtu: {mtu} is not 1280 to 65000 bytes; IPv6 needs 1280");
        }
        let mtu_raise = self.mtu_raise.map_or(RAISED, |seconds| Duration::from_secs(seconds.into()));
        if !(Duration::from_secs(5)..=Duration::from_secs(86_400)).contains(&mtu_raise) {
            bail!("mtu-raise: {} is not 5 to 86400 seconds", mtu_raise.as_secs());
        }
        Ok(Config {
            secret,
            join,
            admin_key,
            range,
            advertise,
            name,
            cluster_name,
            state_dir: absolute("state-dir", self.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()))?,
            control_socket: absolute(
                "control-socket",
                self.control_socket.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            )?,
            port,
            wireguard_port,
            metrics_listen,
            mtu: self.mtu,
            mtu_raise,
            mesh_wg: match self.mesh_wg {
                Some(path) => path,
                None => beside_this_program("mesh-wg"),
            },
            log: self.log.unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.unwrap_or_default(),
        })
    }
}

impl Settings {
    /// A secret that stands where a file is to be named would go into the log with the next error. It is in the command
    /// line or the environment then, too.
    fn check_for_secrets(&self) -> Result<()> {
        let files = [
            ("password-file", &self.password_file),
            ("key-file", &self.key_file),
            ("token-file", &self.token_file),
        ];
        let files = files.iter().filter_map(|(name, path)| Some((*name, path.as_ref()?.to_string_lossy())));
        let admin_keys = self.admin_key.iter().flatten().filter(|text| !admin::is_public_text(text));
        let admin_keys = admin_keys.map(|text| ("admin-key", Cow::Borrowed(text.as_str())));
        for (name, text) in files.chain(admin_keys) {
            if is_secret(&text) {
                let what = if name == "admin-key" { "the public key, or a file with it" } else { "a file" };
                bail!(
                    "{name}: this is a secret itself, and was to be {what}; others may have seen it by now: make a new one"
                );
            }
        }
        Ok(())
    }
}

/// Whether a text is a key or token, or looks like one.
fn is_secret(text: &str) -> bool {
    let text = text.trim_start();
    (text.starts_with("hauberk-") && text.contains(':'))
        || (text.starts_with("hbt1.") && text.matches('.').count() >= 4)
}

fn nonzero(name: &str, port: u16) -> Result<u16> {
    if port == 0 { bail!("{name}: 0 is no port that others could reach") } else { Ok(port) }
}

fn absolute(name: &str, path: PathBuf) -> Result<PathBuf> {
    if path.is_absolute() { Ok(path) } else { bail!("{name}: {} is not an absolute path", path.display()) }
}

/// Reads `HOST`, `HOST:PORT`, `IPV6` or `[IPV6]:PORT`.
///
/// # Errors
/// Names the text.
pub fn join_address(text: &str, default_port: u16) -> Result<JoinAddress> {
    let bad = || {
        format!(
            "join: {text:?} is not HOST or HOST:PORT (an IPv6 address with a port is written [ADDRESS]:PORT)"
        )
    };
    let address = |host: &str, port: u16| JoinAddress { host: host.to_owned(), port };
    if text.parse::<IpAddr>().is_ok() {
        return Ok(address(text, default_port));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse::<u16>().ok().filter(|port| *port != 0).with_context(bad)?),
        None => (text, default_port),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let name =
        !bare.is_empty() && bare.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    if name || (bare != host && bare.parse::<IpAddr>().is_ok()) {
        Ok(address(bare, port))
    } else {
        bail!(bad())
    }
}

/// Reads public admin keys, each as it is or from a file.
fn admin_keys(texts: &[String]) -> Result<Vec<IdentityKey>> {
    let mut keys = Vec::new();
    for text in texts {
        let key = if admin::is_public_text(text) {
            admin::public_from_text(text).context("admin-key")?
        } else {
            let bytes =
                read_limited(Path::new(text), MAX_KEY_FILE).map(Zeroizing::new).with_context(|| {
                    format!("admin-key: {text:?} is neither a public key nor a file with one")
                })?;
            // The secret one may be in there.
            let contents =
                std::str::from_utf8(&bytes).with_context(|| format!("admin-key file {text} is not text"))?;
            admin::public_from_text(contents).with_context(|| {
                format!("admin-key file {text}: it must hold the public key, which `meshctl keygen --admin` prints; the secret one stays off the nodes")
            })?
        };
        if !key.is_usable() {
            bail!("admin-key: {key} is no valid key");
        }
        keys.push(key);
    }
    keys.sort_unstable();
    keys.dedup();
    if keys.len() > MAX_ADMIN_KEYS {
        bail!("admin-key: {} keys, but a cluster has at most {MAX_ADMIN_KEYS}", keys.len());
    }
    Ok(keys)
}

fn ipv4_range(text: &str) -> Result<Ipv4Net> {
    let net: Ipv4Net = text
        .parse()
        .with_context(|| format!("range: {text:?} is not an IPv4 range such as 10.32.0.0/12; the IPv6 range follows from the cluster"))?;
    if net.trunc() != net {
        bail!("range: {net} has bits set after its prefix; did you mean {}?", net.trunc());
    }
    if !(8..=24).contains(&net.prefix_len()) {
        bail!(
            "range: {net} has a prefix of /{}; it must be /8 to /24 (nodes get blocks of /24 out of it)",
            net.prefix_len()
        );
    }
    Ok(net)
}

fn advertised(text: &str) -> Result<IpAddr> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        bail!(
            "advertise: {text:?} has a port: this version advertises addresses only, write {}",
            socket.ip()
        );
    }
    let ip: IpAddr = text.parse().with_context(|| format!("advertise: {text:?} is not an IP address"))?;
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        bail!("advertise: other hosts cannot reach {ip}");
    }
    Ok(ip)
}

/// The program `name` in the directory of this one if it is there, else by PATH.
pub fn beside_this_program(name: &str) -> PathBuf {
    let here = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(name)));
    here.filter(|path| path.is_file()).unwrap_or_else(|| name.into())
}

#[cfg(test)]
mod tests {
    use mesh_keys::AdminKey;
    use mesh_keys::rand_core::OsRng;

    use super::*;

    fn settings(toml: &str) -> Result<Settings> {
        Settings::from_toml(toml)
    }

    fn error(toml: &str) -> String {
        format!("{:#}", settings(toml).and_then(Settings::check).unwrap_err())
    }

    #[test]
    fn later_sources_replace_earlier_ones() {
        let file = settings("password-file = '/f'\nname = 'file'\njoin = ['a', 'b']").unwrap();
        let env = Settings::from_env(
            [("MESHD_NAME", "env"), ("MESHD_JOIN", "c:1, d"), ("PATH", "x"), ("MESHD_MTU", "1300")]
                .map(|(k, v)| (k.into(), v.into()))
                .into_iter(),
        )
        .unwrap();
        let flags =
            Settings { name: Some("flag".into()), key_file: Some("/k".into()), ..Settings::default() };
        let config = file.overlaid(env).overlaid(flags).check().unwrap();
        assert_eq!(config.name, "flag");
        assert_eq!(config.secret, SecretSource::KeyFile("/k".into()));
        assert_eq!(config.join.iter().map(ToString::to_string).collect::<Vec<_>>(), ["c:1", "d:6783"]);
        assert_eq!(config.mtu, Some(1300));
    }

    #[test]
    fn mistakes_are_named() {
        for (toml, words) in [
            ("", "--password-file"),
            ("password-file='/p'\nkey-file='/k'", "choose one"),
            ("token-file='/t'\nkey-file='/k'", "choose one"),
            ("password-file='/p'\nrange=['10.32.1.0/12']", "did you mean 10.32.0.0/12"),
            ("password-file='/p'\nrange=['fd00::/48']", "range"),
            ("password-file='/p'\nrange=['10.0.0.0/30']", "/8 to /24"),
            ("password-file='/p'\njoin=['a:b']", "join"),
            ("password-file='/p'\njoin=['::1:6783:x']", "join"),
            ("password-file='/p'\nadvertise=['127.0.0.1']", "advertise"),
            ("password-file='/p'\nadmin-key=['/no/such/file']", "neither a public key nor a file"),
            ("password-file='/p'\nadmin-key=['hauberk-admin-public-1:00']", "digits"),
            ("password-file='/p'\nadvertise=['192.0.2.1:6783']", "advertise"),
            ("password-file='/p'\nmtu=100", "mtu"),
            ("password-file='/p'\nmtu-raise=4", "mtu-raise"),
            ("password-file='/p'\nport=0", "port"),
            ("password-file='/p'\nport=6784", "wireguard-port"),
            ("password-file='/p'\nadmin-key=[]\nadmin-keys=[]", "duplicate"),
            ("password-file='/p'\nname='a'\nname='b'", "line 3"),
            ("password-file='/p'\nstate-dir='x'", "state-dir"),
            ("password-file='/p'\nmetrics-listen='here'", "metrics-listen"),
            ("pasword-file='/p'", "pasword-file"),
            ("password-file='/p'\nmtu='big'", "mtu"),
        ] {
            let error = error(toml);
            assert!(error.contains(words), "{toml:?}: {error}");
        }
        let env = [("MESHD_JION".into(), "a".into())];
        assert!(format!("{:#}", Settings::from_env(env.into_iter()).unwrap_err()).contains("jion"));
    }

    #[test]
    fn no_mistake_tells_what_might_be_a_secret() {
        let (secret, token) = ("hunter2correcthorse", "hbt1.a.b.hunter2correcthorse.c");
        for toml in [
            format!("password = '{secret}'"),
            format!("password-file = ['{secret}', 1]\nmtu = 1"),
            format!("mtu = '{secret}, expected {secret}'"),
            format!("log-format = '{secret}'\nkey-file = '/k'"),
            format!("name = 'a'\npassword: {secret}"),
            format!("password = {secret}"),
            format!("key-file = 'hauberk-key-1:{secret}'"),
            format!("token-file = '{token}'"),
            format!("key-file = '/k'\nadmin-key = ['hauberk-admin-1:{secret}']"),
        ] {
            let error = error(&toml);
            assert!(!error.contains("hunter2"), "{toml}: {error}");
            let key = toml.lines().next().unwrap().split([' ', ':']).next().unwrap();
            assert!(error.contains(key) || error.contains("line") || error.contains("admin-key"), "{error}");
        }
        let env = |name: &str| [(name.into(), secret.into())].into_iter();
        for name in ["MESHD_PORT", "MESHD_PASSWORD", "MESHD_LOG_FORMAT"] {
            let error = format!("{:#}", Settings::from_env(env(name)).unwrap_err());
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn only_variables_of_ours_have_to_be_text() {
        use std::os::unix::ffi::OsStringExt as _;
        let bytes = || OsString::from_vec(vec![b'M', 0xff]);
        let others = [(bytes(), "x".into()), ("PS1".into(), bytes()), ("MESHD_NAME".into(), "n".into())];
        assert_eq!(Settings::from_env(others.into_iter()).unwrap().name.as_deref(), Some("n"));
        let ours = [("MESHD_NAME".into(), bytes())];
        let error = format!("{:#}", Settings::from_env(ours.into_iter()).unwrap_err());
        assert!(error.contains("MESHD_NAME"), "{error}");
    }

    #[test]
    fn admin_keys_are_given_as_they_are_or_in_files() {
        let dir = tempfile::tempdir().unwrap();
        let [secret, other] = [(); 2].map(|()| AdminKey::generate(&mut OsRng));
        let file = dir.path().join("admin.pub");
        std::fs::write(&file, format!("{}\n", admin::public_to_text(&secret.public()))).unwrap();
        let given = [file.display().to_string(), admin::public_to_text(&other.public())];
        let env =
            [("MESHD_ADMIN_KEYS".into(), given.join(",").into()), ("MESHD_KEY_FILE".into(), "/k".into())];
        let config = Settings::from_env(env.into_iter()).unwrap().check().unwrap();
        let mut expected = vec![secret.public(), other.public()];
        expected.sort_unstable();
        assert_eq!(config.admin_key, expected);

        let secret_file = dir.path().join("admin.key");
        std::fs::write(&secret_file, secret.to_text().as_bytes()).unwrap();
        let refused = error(&format!("key-file='/k'\nadmin-key=['{}']", secret_file.display()));
        assert!(refused.contains("stays off the nodes"), "{refused}");
    }

    #[test]
    fn join_addresses_come_in_all_forms() {
        for (text, shown) in [
            ("host", "host:6783"),
            ("host:1", "host:1"),
            ("192.0.2.1", "192.0.2.1:6783"),
            ("2001:db8::1", "[2001:db8::1]:6783"),
            ("[2001:db8::1]:99", "[2001:db8::1]:99"),
        ] {
            assert_eq!(join_address(text, 6783).unwrap().to_string(), shown);
        }
    }
}
