//! Running the CNI plugin as a container runtime does.

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::host::Host;
use crate::pod::POD_IFACE;

/// Name of the network configuration below `/etc/cni/net.d`.
pub(crate) const CONFLIST_NAME: &str = "10-mesh.conflist";

/// The network configuration as it is shipped.
pub(crate) const CONFLIST: &str = include_str!("../../../deploy/cni/10-mesh.conflist");

/// The versions of the specification that this runtime speaks, in rising order.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A verb of the CNI specification (1.1.0, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Status,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Status => "STATUS",
        }
    }
}

/// The container a verb is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Container<'a> {
    pub(crate) id: &'a str,
    pub(crate) netns: &'a str,
    /// The answer to ADD, which the runtime hands to the later verbs.
    pub(crate) previous: Option<&'a Value>,
}

/// The configuration of the only plugin of the list, as libcni derives it: the plugin's object with the
/// list's name and version, and the earlier result.
fn plugin_config(conflist: &str, previous: Option<&Value>) -> Result<Value> {
    let list: Value = serde_json::from_str(conflist).context("the network configuration list is not JSON")?;
    let plugin = match list["plugins"].as_array().map(Vec::as_slice) {
        Some([plugin]) => plugin,
        _ => bail!("the network configuration list must have exactly one plugin"),
    };
    let mut config = plugin.as_object().context("the plugin's configuration is not an object")?.clone();
    config.insert("name".to_owned(), list["name"].clone());
    config.insert("cniVersion".to_owned(), best_version(&list)?.into());
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    Ok(Value::Object(config))
}

/// The highest version that the list offers and this runtime speaks (specification 1.1.0, section 1: a list
/// that has `cniVersions` leaves the choice to the runtime).
fn best_version(list: &Value) -> Result<&'static str> {
    let offered: Vec<&str> = match list["cniVersions"].as_array() {
        Some(versions) => versions.iter().filter_map(Value::as_str).collect(),
        None => list["cniVersion"].as_str().into_iter().collect(),
    };
    let best = VERSIONS.into_iter().rfind(|version| offered.contains(version));
    best.with_context(|| format!("no version of the network configuration list is known: {offered:?}"))
}

/// Runs the plugin in the host and returns what it printed, `Null` if nothing.
pub(crate) fn run(host: &Host, verb: Verb, container: Option<Container<'_>>) -> Result<Value> {
    let list = host.dir().join("cni").join(CONFLIST_NAME);
    let list = std::fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let config = plugin_config(&list, container.and_then(|container| container.previous))?;
    let mut command = host.command("/opt/cni/bin/mesh-cni");
    command.env("CNI_COMMAND", verb.name()).env("CNI_PATH", "/opt/cni/bin");
    if let Some(container) = container {
        command
            .env("CNI_CONTAINERID", container.id)
            .env("CNI_NETNS", container.netns)
            .env("CNI_IFNAME", POD_IFACE)
            .env("CNI_ARGS", "");
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = host.spawn(command)?;
    let fed = child.stdin.take().context("no standard input")?.write_all(config.to_string().as_bytes());
    let output = child.wait_with_output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let document: Value = serde_json::from_str(&printed).unwrap_or(json!({ "msg": printed.trim() }));
        bail!(
            "mesh-cni {} on {}: code {}: {} {}{}",
            verb.name(),
            host.name(),
            document["code"],
            document["msg"].as_str().unwrap_or_default(),
            document["details"].as_str().unwrap_or_default(),
            String::from_utf8_lossy(&output.stderr).trim(),
        );
    }
    fed.context("the plugin did not read its configuration")?;
    if printed.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&printed)
        .with_context(|| format!("mesh-cni printed something else than JSON: {printed:?}"))
}

/// The two addresses of a result.
pub(crate) fn addresses(result: &Value) -> Result<(Ipv4Addr, Ipv6Addr)> {
    let texts: Vec<&str> =
        result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str()).collect();
    let first = |text: &str| text.split('/').next().unwrap_or_default().to_owned();
    let v4 = texts.iter().find_map(|text| first(text).parse().ok());
    let v6 = texts.iter().find_map(|text| first(text).parse().ok());
    match (v4, v6) {
        (Some(v4), Some(v6)) => Ok((v4, v6)),
        _ => bail!("the plugin's result has not one address of each family: {result}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_list_gives_a_plugin_configuration() {
        let result = json!({ "ips": [{ "address": "10.32.0.2/32" }, { "address": "fd00::2/128" }] });
        let config = plugin_config(CONFLIST, Some(&result)).unwrap();
        assert_eq!(config["type"], "mesh-cni");
        assert_eq!(config["name"], "mesh");
        assert_eq!(config["prevResult"], result);
        // STATUS, which the lab waits by, exists from 1.1.0 on.
        assert_eq!(config["cniVersion"], "1.1.0");
        assert_eq!(addresses(&result).unwrap(), ("10.32.0.2".parse().unwrap(), "fd00::2".parse().unwrap()));
    }

    #[test]
    fn the_runtime_takes_the_best_version_it_knows() {
        let best = |list: Value| best_version(&list).ok();
        assert_eq!(best(json!({ "cniVersion": "0.4.0" })), Some("0.4.0"));
        assert_eq!(
            best(json!({ "cniVersion": "1.0.0", "cniVersions": ["1.1.0", "1.0.0", "9.0.0"] })),
            Some("1.1.0")
        );
        assert_eq!(best(json!({ "cniVersion": "2.0.0" })), None);
        assert_eq!(best(json!({})), None);
    }

    #[test]
    fn a_result_of_one_family_is_refused() {
        assert!(addresses(&json!({ "ips": [{ "address": "10.32.0.2/32" }] })).is_err());
        assert!(addresses(&json!({})).is_err());
        assert!(plugin_config(r#"{"plugins":[]}"#, None).is_err());
    }
}
