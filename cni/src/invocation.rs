//! From environment and standard input to a checked command; a pure function.

use std::collections::BTreeMap;

use mesh_core::api::{AttachmentId, InvalidAttachmentId, PodIdentity};
use serde_json::{Map, Value};

use crate::config::{AttachConf, NetConf};
use crate::error::{CniError, Code};
use crate::fields::{Fields, invalid};
use crate::version::CniVersion;

/// A checked command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// No `CNI_COMMAND`: a person has started the binary.
    About,
    /// VERSION.
    Version(VersionCommand),
    /// ADD.
    Add(Box<AddCommand>),
    /// DEL.
    Del(DelCommand),
    /// CHECK.
    Check(Box<AddCommand>),
    /// STATUS.
    Status(NetConf),
    /// GC.
    Gc(GcCommand),
}

/// What VERSION repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionCommand {
    /// The version that the caller wrote, or our newest.
    pub echoed: String,
}

/// ADD, and CHECK of what ADD made.
#[derive(Clone, Debug, PartialEq)]
pub struct AddCommand {
    /// What is attached.
    pub id: AttachmentId,
    /// Path of the container's network namespace, byte for byte as given.
    pub netns: String,
    /// The pod, when the runtime told.
    pub pod: Option<PodIdentity>,
    /// What every operation needs.
    pub conf: NetConf,
    /// What attaching needs on top.
    pub attach: AttachConf,
}

/// DEL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DelCommand {
    /// What is detached.
    pub id: AttachmentId,
    /// Path of the container's network namespace, when it still has one.
    pub netns: Option<String>,
    /// What every operation needs.
    pub conf: NetConf,
}

/// GC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcCommand {
    /// The attachments to keep; none when the caller sent no list.
    pub valid: Option<Vec<AttachmentId>>,
    /// What every operation needs.
    pub conf: NetConf,
}

/// An invocation by a container runtime.
#[derive(Debug)]
pub struct Invocation;

/// The verbs of the specification.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
    Check,
    Status,
    Gc,
}

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Invocation {
    /// Whether the command reads standard input: without a command there may be a terminal at the other end.
    pub fn reads_stdin(env: Env<'_>) -> bool {
        !variable(env, "CNI_COMMAND").is_empty()
    }

    /// Checks everything that can be checked without looking at the machine.
    ///
    /// # Errors
    /// Code 4 for an environment variable, 6 and 1 for version and encoding, 7 for a field; the message names
    /// the variable or field.
    pub fn parse(env: Env<'_>, stdin: &[u8]) -> Result<Command, CniError> {
        let verb = match variable(env, "CNI_COMMAND").as_str() {
            "" => return Ok(Command::About),
            "VERSION" => return version(stdin).map(Command::Version),
            "ADD" => Verb::Add,
            "DEL" => Verb::Del,
            "CHECK" => Verb::Check,
            "STATUS" => Verb::Status,
            "GC" => Verb::Gc,
            other => {
                let shown: String = other.chars().take(32).collect();
                return Err(CniError::new(
                    Code::Environment,
                    format!("unknown CNI_COMMAND {shown:?}; expected ADD, DEL, CHECK, GC, STATUS or VERSION"),
                ));
            }
        };
        let config = object(stdin)?;
        let version = CniVersion::parse(version_text(&config)?)?;
        command(verb, env, &Fields::top(&config), version).map_err(|error| error.with_version(version))
    }
}

fn command(verb: Verb, env: Env<'_>, top: &Fields<'_>, version: CniVersion) -> Result<Command, CniError> {
    let since = match verb {
        Verb::Add | Verb::Del => CniVersion::V0_3_1,
        Verb::Check => CniVersion::V0_4_0,
        Verb::Status | Verb::Gc => CniVersion::V1_1_0,
    };
    if version < since {
        return Err(CniError::new(
            Code::IncompatibleVersion,
            "this operation is newer than the config's version",
        )
        .with_details(format!("config is {version}, the operation exists since {since}")));
    }
    match verb {
        Verb::Add | Verb::Check => {
            demand(env, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"])?;
            let command = Box::new(AddCommand {
                id: attachment_id(env)?,
                netns: netns(env)?,
                pod: pod(env)?,
                conf: NetConf::parse(top, version)?,
                attach: AttachConf::parse(top, version)?,
            });
            if verb == Verb::Add {
                return Ok(Command::Add(command));
            }
            if command.attach.prev_result.is_none() {
                return Err(top.invalid("prevResult", "missing; CHECK compares with the result of ADD"));
            }
            Ok(Command::Check(command))
        }
        Verb::Del => {
            demand(env, &["CNI_CONTAINERID", "CNI_IFNAME"])?;
            let netns = variable(env, "CNI_NETNS");
            Ok(Command::Del(DelCommand {
                id: attachment_id(env)?,
                netns: if netns.is_empty() { None } else { Some(netns) },
                conf: NetConf::parse(top, version)?,
            }))
        }
        Verb::Status => {
            let conf = NetConf::parse(top, version)?;
            AttachConf::parse(top, version)?;
            Ok(Command::Status(conf))
        }
        Verb::Gc => {
            Ok(Command::Gc(GcCommand { valid: valid_attachments(top)?, conf: NetConf::parse(top, version)? }))
        }
    }
}

/// VERSION works with nothing on standard input, and repeats the caller's version when there is one.
fn version(stdin: &[u8]) -> Result<VersionCommand, CniError> {
    let newest = CniVersion::NEWEST.as_str();
    if stdin.iter().all(u8::is_ascii_whitespace) {
        return Ok(VersionCommand { echoed: newest.to_owned() });
    }
    let config = object(stdin)?;
    let text = version_text(&config)?;
    if text.is_empty() {
        return Ok(VersionCommand { echoed: newest.to_owned() });
    }
    match CniVersion::parse(text) {
        Err(error) if error.code() == Code::Decode => Err(error),
        // A caller with another version asks in order to learn which ones there are.
        Ok(_) | Err(_) => Ok(VersionCommand { echoed: text.to_owned() }),
    }
}

fn object(stdin: &[u8]) -> Result<Map<String, Value>, CniError> {
    let value: Value = serde_json::from_slice(stdin)
        .map_err(|error| CniError::new(Code::Decode, format!("standard input is not JSON: {error}")))?;
    match value {
        Value::Object(map) => Ok(map),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
            Err(CniError::new(Code::Decode, "standard input is JSON, but not an object"))
        }
    }
}

fn version_text(config: &Map<String, Value>) -> Result<&str, CniError> {
    match config.get("cniVersion") {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => Err(CniError::new(
            Code::Decode,
            "config field \"cniVersion\": expected a string such as \"1.1.0\"",
        )),
    }
}

fn variable(env: Env<'_>, name: &str) -> String {
    env(name).unwrap_or_default()
}

fn demand(env: Env<'_>, names: &[&str]) -> Result<(), CniError> {
    let missing: Vec<&str> = names.iter().copied().filter(|name| variable(env, name).is_empty()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(CniError::new(Code::Environment, format!("missing in the environment: {}", missing.join(", "))))
}

fn attachment_id(env: Env<'_>) -> Result<AttachmentId, CniError> {
    let ifname = variable(env, "CNI_IFNAME");
    if matches!(ifname.as_str(), "all" | "default") {
        return Err(CniError::new(
            Code::Environment,
            format!(
                "CNI_IFNAME: {ifname:?} stands for other interfaces in kernel settings and cannot be used"
            ),
        ));
    }
    AttachmentId::new(variable(env, "CNI_CONTAINERID"), ifname).map_err(|error| {
        let name = match error {
            InvalidAttachmentId::Container(_) => "CNI_CONTAINERID",
            InvalidAttachmentId::Ifname(_) => "CNI_IFNAME",
        };
        CniError::new(Code::Environment, format!("{name}: {error}"))
    })
}

fn netns(env: Env<'_>) -> Result<String, CniError> {
    let path = variable(env, "CNI_NETNS");
    if path.contains('\0') || path.len() > 4095 {
        return Err(CniError::new(Code::Environment, "CNI_NETNS: expected a path of at most 4095 bytes"));
    }
    Ok(path)
}

/// Reads `CNI_ARGS`; keys that are not ours are ignored, whether or not `IgnoreUnknown` is set.
fn pod(env: Env<'_>) -> Result<Option<PodIdentity>, CniError> {
    let text = variable(env, "CNI_ARGS");
    let mut args = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            let shown: String = pair.chars().take(64).collect();
            return Err(CniError::new(Code::Environment, format!("CNI_ARGS: {shown:?} is not KEY=VALUE")));
        };
        args.insert(key, value);
    }
    let value = |key: &str| args.get(key).copied().unwrap_or_default().to_owned();
    let pod = PodIdentity {
        namespace: value("K8S_POD_NAMESPACE"),
        name: value("K8S_POD_NAME"),
        uid: value("K8S_POD_UID"),
    };
    Ok(if pod == PodIdentity::default() { None } else { Some(pod) })
}

const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// The list of GC. No list means that the caller does not know, an empty list that nothing is valid.
fn valid_attachments(top: &Fields<'_>) -> Result<Option<Vec<AttachmentId>>, CniError> {
    if top.list(VALID_ATTACHMENTS)?.is_none() {
        return Ok(None);
    }
    let mut valid = Vec::new();
    for (i, entry) in top.objects(VALID_ATTACHMENTS)?.iter().enumerate() {
        let (Some(container), Some(ifname)) = (entry.text("containerID")?, entry.text("ifname")?) else {
            return Err(invalid(
                &format!("{VALID_ATTACHMENTS}[{i}]"),
                "expected \"containerID\" and \"ifname\"",
            ));
        };
        // An id that breaks the rules was never attached by us; there is nothing to keep.
        valid.extend(AttachmentId::new(container, ifname));
    }
    Ok(Some(valid))
}

#[cfg(test)]
mod tests;
