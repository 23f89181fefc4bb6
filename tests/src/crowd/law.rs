//! What a host must say and have: from its daemon's status, and from the kernel and the engine themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use mesh_lab::Host;
use serde_json::Value;

/// What a node says of itself when it was removed.
const REMOVED: &str = "was removed from the cluster";

/// Whether a status is that of a node that is connected with all others of `nodes`: it knows exactly that many, holds
/// each for reachable, has a tunnel to each, and no problem.
pub(super) fn connected(status: &Value, nodes: usize) -> Result<()> {
    ensure!(status["membership"]["state"] == "member", "not a member: {}", status["membership"]);
    let peers = peers(status)?;
    ensure!(peers.len() == nodes - 1, "it knows {} other members, not {}", peers.len(), nodes - 1);
    let silent = peers.iter().filter(|peer| !is_reachable(peer)).count();
    let without = peers.iter().filter(|peer| peer["tunnel"]["ready"] != true).count();
    ensure!(silent + without == 0, "{silent} members are unreachable, {without} have no tunnel");
    no_problem(status)
}

/// Whether a status is that of a node cut from `far`, and from nobody else.
pub(super) fn split(status: &Value, near: &BTreeSet<String>, far: &BTreeSet<String>) -> Result<()> {
    let (mut heard, mut lost) = (0, 0);
    let peers = peers(status)?;
    for peer in peers {
        let id = id_of(peer)?;
        ensure!(near.contains(id) || far.contains(id), "it knows a member that nobody else knows");
        heard += usize::from(far.contains(id) && is_reachable(peer));
        lost += usize::from(near.contains(id) && !is_reachable(peer));
        ensure!(peer["tunnel"]["ready"] == true, "its tunnel to {id} is gone");
    }
    ensure!(peers.len() + 1 == near.len() + far.len(), "it has forgotten members: {} are left", peers.len());
    ensure!(
        heard + lost == 0,
        "{heard} of the other half are still called reachable, and {lost} of its own half unreachable"
    );
    Ok(())
}

/// Whether a member is known no more.
pub(super) fn gone(status: &Value, id: &str) -> Result<()> {
    let known = peers(status)?.iter().any(|peer| peer["id"] == id);
    ensure!(!known, "it is still known");
    Ok(())
}

/// Whether the node itself says that it was removed.
pub(super) fn says_removed(status: &Value) -> Result<()> {
    let said = status["problems"].to_string();
    ensure!(said.contains(REMOVED), "it has heard nothing of it");
    Ok(())
}

fn no_problem(status: &Value) -> Result<()> {
    let problems = status["problems"].as_array().context("the status has no problems, not even none")?;
    ensure!(problems.is_empty(), "it has a problem: {}", status["problems"]);
    Ok(())
}

fn peers(status: &Value) -> Result<&Vec<Value>> {
    status["peers"].as_array().context("the status has no list of peers")
}

fn is_reachable(peer: &Value) -> bool {
    peer["gossip"]["reachable"] == true
}

fn id_of(peer: &Value) -> Result<&str> {
    peer["id"].as_str().context("a peer without an id")
}

/// Who the members are: what each host says of itself.
pub(super) struct Members(BTreeMap<String, Member>);

struct Member {
    id: String,
    addresses: [IpAddr; 2],
}

impl Members {
    /// Asks all hosts.
    ///
    /// # Errors
    /// When one does not answer, or two say the same of themselves.
    pub(super) fn learn(hosts: &[Host]) -> Result<Self> {
        let mut members = BTreeMap::new();
        for host in hosts {
            let status = host.ask("/v1/status")?;
            let address = |field: &str| -> Result<IpAddr> {
                let text = status["addresses"][field].as_str();
                Ok(text.with_context(|| format!("{} has no {field} address", host.name()))?.parse()?)
            };
            let id = status["node"]["id"].as_str().context("a node without an id")?.to_owned();
            let addresses = [address("ipv4")?, address("ipv6")?];
            members.insert(host.name().to_owned(), Member { id, addresses });
        }
        let all = |of: &dyn Fn(&Member) -> String| members.values().map(of).collect::<BTreeSet<_>>().len();
        ensure!(all(&|member| member.id.clone()) == hosts.len(), "two hosts have the same id");
        for family in 0..2 {
            let different = all(&|member| member.addresses[family].to_string());
            ensure!(different == hosts.len(), "two hosts have the same mesh address");
        }
        Ok(Self(members))
    }

    fn of(&self, host: &Host) -> Result<&Member> {
        self.0.get(host.name()).with_context(|| format!("{} is not one of the members", host.name()))
    }

    /// Node id.
    ///
    /// # Errors
    /// When the host was not asked.
    pub(super) fn id(&self, host: &Host) -> Result<&str> {
        Ok(&self.of(host)?.id)
    }

    /// Node ids.
    ///
    /// # Errors
    /// When a host was not asked.
    pub(super) fn ids(&self, hosts: &[Host]) -> Result<BTreeSet<String>> {
        hosts.iter().map(|host| Ok(self.id(host)?.to_owned())).collect()
    }

    /// Mesh addresses of both families.
    ///
    /// # Errors
    /// When a host was not asked.
    pub(super) fn addresses<'a>(&self, hosts: impl IntoIterator<Item = &'a Host>) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for host in hosts {
            addresses.extend(self.of(host)?.addresses);
        }
        Ok(addresses)
    }
}

/// What is in force on a host: tunnels with what they carry, routes, addresses; as the system's own tools say. How long
/// packets may be is left out: that is measured all the time, and starts anew when a member is seen at another address.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Law(BTreeSet<String>);

impl Law {
    /// Of all hosts, in their order.
    ///
    /// # Errors
    /// When a tool fails.
    pub(super) fn of_all(hosts: &[Host]) -> Result<Vec<Self>> {
        hosts.iter().map(Self::of).collect()
    }

    fn of(host: &Host) -> Result<Self> {
        let mut lines = BTreeSet::new();
        for command in [
            &["wg", "show", "meshwg0", "allowed-ips"][..],
            &["ip", "-4", "route", "show", "table", "all", "proto", "118"],
            &["ip", "-6", "route", "show", "table", "all", "proto", "118"],
            &["ip", "-brief", "address", "show", "dev", "mesh0"],
            &["ip", "-brief", "address", "show", "dev", "meshwg0"],
        ] {
            let output = host.exec_ok(command)?;
            ensure!(!output.trim().is_empty(), "{command:?} shows nothing on {}", host.name());
            lines.extend(output.lines().map(in_order));
        }
        Ok(Self(lines))
    }
}

/// The words of a line in alphabetical order: the ranges of a tunnel come in any.
fn in_order(line: &str) -> String {
    let mut words: Vec<&str> = line.split_ascii_whitespace().collect();
    if let Some(at) = words.iter().position(|word| *word == "mtu") {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.sort_unstable();
    words.join(" ")
}

/// Whether all is as it was.
///
/// # Errors
/// The first host on which something came or went, and what.
pub(super) fn same(hosts: &[Host], before: &[Law], after: &[Law]) -> Result<()> {
    for ((host, before), after) in hosts.iter().zip(before).zip(after) {
        let went: Vec<_> = before.0.difference(&after.0).collect();
        let came: Vec<_> = after.0.difference(&before.0).collect();
        ensure!(went.is_empty() && came.is_empty(), "on {}: gone {went:?}, new {came:?}", host.name());
    }
    Ok(())
}

/// The WireGuard key of a host.
///
/// # Errors
/// When its engine does not say.
pub(super) fn tunnel_key(host: &Host) -> Result<String> {
    Ok(host.exec_ok(&["wg", "show", "meshwg0", "public-key"])?.trim().to_owned())
}

/// The keys of the peers that the engine of a host has.
///
/// # Errors
/// When it does not say.
pub(super) fn tunnels(host: &Host) -> Result<BTreeSet<String>> {
    Ok(host.exec_ok(&["wg", "show", "meshwg0", "peers"])?.lines().map(str::to_owned).collect())
}

/// A line of several logs that is more than news.
#[derive(Debug)]
pub(super) struct Complaint {
    /// An error that was not meant, or what a program said when it ended.
    pub(super) is_error: bool,
    pub(super) times: usize,
    pub(super) hosts: BTreeSet<String>,
    /// The first one, and who said it.
    pub(super) example: String,
}

/// Warnings, errors and panics in the logs of the daemons, those that differ in figures only together. That a node
/// was removed is an error in its own log; to those who removed it, it is none.
///
/// # Errors
/// When a log cannot be read.
pub(super) fn complaints(hosts: &[Host], removed: Option<&Host>) -> Result<BTreeMap<String, Complaint>> {
    let mut found: BTreeMap<String, Complaint> = BTreeMap::new();
    for host in hosts.iter().filter(|host| host.daemon().is_some()) {
        for line in host.log()?.lines() {
            let Some((is_error, text)) = complaint(line) else { continue };
            let is_meant =
                removed.is_some_and(|removed| removed.name() == host.name()) && text.contains(REMOVED);
            let entry = found.entry(without_figures(text)).or_insert_with(|| Complaint {
                is_error: false,
                times: 0,
                hosts: BTreeSet::new(),
                example: format!("{}: {line}", host.name()),
            });
            entry.is_error |= is_error && !is_meant;
            entry.times += 1;
            entry.hosts.insert(host.name().to_owned());
        }
    }
    Ok(found)
}

/// What a line complains of, and whether it is worse than a warning. A line without a level was not logged but said by
/// a program that ended.
fn complaint(line: &str) -> Option<(bool, &str)> {
    let mut words = line.splitn(2, char::is_whitespace);
    let rest = words.nth(1).unwrap_or_default().trim_start();
    match rest.split_once(' ') {
        Some(("TRACE" | "DEBUG" | "INFO", _)) => None,
        Some(("WARN", text)) => Some((false, text)),
        Some(("ERROR", text)) => Some((true, text)),
        _ => (!line.trim().is_empty()).then_some((true, line)),
    }
}

/// A line in which each word with a digit in it is `#`.
fn without_figures(line: &str) -> String {
    let word = |word: &str| {
        if word.contains(|c: char| c.is_ascii_digit()) { "#".to_owned() } else { word.to_owned() }
    };
    let words: Vec<String> = line.split([' ', '=', ',']).filter(|word| !word.is_empty()).map(word).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(peers: &[(&str, bool, bool)], problems: &[&str]) -> Value {
        let peer = |(id, reachable, ready): &(&str, bool, bool)| json!({"id": id, "gossip": {"reachable": reachable}, "tunnel": {"ready": ready}});
        json!({"membership": {"state": "member"}, "problems": problems, "peers": peers.iter().map(peer).collect::<Vec<_>>()})
    }

    #[test]
    fn a_node_is_connected_with_all_or_not() {
        let whole = [("a", true, true), ("b", true, true)];
        assert!(connected(&status(&whole, &[]), 3).is_ok());
        assert!(connected(&status(&whole, &[]), 4).is_err());
        assert!(connected(&status(&whole, &["x"]), 3).is_err());
        assert!(connected(&status(&[("a", false, true), ("b", true, true)], &[]), 3).is_err());
        assert!(connected(&status(&[("a", true, false), ("b", true, true)], &[]), 3).is_err());
        assert!(connected(&json!({}), 3).is_err());
        assert!(gone(&status(&whole, &[]), "a").is_err() && gone(&status(&whole, &[]), "c").is_ok());
    }

    #[test]
    fn a_split_is_seen_exactly_and_takes_no_tunnel() {
        let (near, far) = (["me", "a"].map(str::to_owned).into(), ["b"].map(str::to_owned).into());
        let split = |peers: &[_]| split(&status(peers, &[]), &near, &far).map_err(|error| error.to_string());
        assert_eq!(split(&[("a", true, true), ("b", false, true)]), Ok(()));
        assert!(split(&[("a", true, true), ("b", true, true)]).is_err());
        assert!(split(&[("a", false, true), ("b", false, true)]).is_err());
        assert!(split(&[("a", true, true), ("b", false, false)]).is_err());
        assert!(split(&[("a", true, true)]).is_err());
    }

    #[test]
    fn complaints_are_told_from_news_and_counted_alike() {
        let line = |level: &str| {
            format!(
                "2026-01-01T00:00:00.1Z {level} meshd::links: session ended remote=198.18.0.7:6783 after=3s"
            )
        };
        assert_eq!(complaint(&line(" INFO")), None);
        assert_eq!(complaint(""), None);
        let warning = line(" WARN");
        let (is_error, text) = complaint(&warning).unwrap();
        assert!(!is_error);
        assert_eq!(without_figures(text), "meshd::links: session ended remote # after #");
        assert!(complaint(&line("ERROR")).unwrap().0);
        assert!(complaint("thread 'main' panicked at src/x.rs:1:2:").unwrap().0);
        assert!(complaint("meshd: control-socket").unwrap().0);
    }
}
