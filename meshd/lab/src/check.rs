//! `lab check`: does every pod reach everything?

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;
use comfy_table::{Table, presets};

use crate::family::Family;
use crate::lab::{Lab, in_parallel};
use crate::pod::Pod;
use crate::wait::poll_until;

/// Payload of each TCP probe.
const TCP_BYTES: u64 = 64 << 10;

/// How a target was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Means {
    Icmp,
    Tcp,
}

/// One question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// `HOST/POD` that asked.
    pub from: String,
    /// `HOST/POD`, or `HOST` for a node's mesh address.
    pub to: String,
    /// What was asked: `ping4`, `ping6`, `tcp4` or `tcp6`.
    pub what: &'static str,
    /// The address asked.
    pub address: IpAddr,
    /// Time to the answer, or why there was none.
    pub outcome: Result<Duration, String>,
}

/// All questions and answers of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// In order of asking pod.
    pub probes: Vec<Probe>,
    /// Hosts whose daemon did not tell its mesh addresses, so that they were not asked, and why.
    pub silent: Vec<(String, String)>,
}

impl CheckReport {
    /// The probes that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Probe> {
        self.probes.iter().filter(|probe| probe.outcome.is_err())
    }

    /// Who reaches whom, as a table: `ok`, or what does not work.
    #[must_use]
    pub fn matrix(&self) -> String {
        let mut columns: Vec<&str> = Vec::new();
        let mut rows: Vec<&str> = Vec::new();
        let mut cells: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for probe in &self.probes {
            if !rows.contains(&probe.from.as_str()) {
                rows.push(&probe.from);
            }
            if !columns.contains(&probe.to.as_str()) {
                columns.push(&probe.to);
            }
            let bad = cells.entry((&probe.from, &probe.to)).or_default();
            if probe.outcome.is_err() {
                bad.push(probe.what);
            }
        }
        // Pods first, then nodes, whoever happened to ask first.
        columns.sort_by_key(|name| (!name.contains('/'), *name));
        rows.sort_unstable();
        let mut table = Table::new();
        table.load_style(presets::UTF8_BORDERS_ONLY);
        table.set_header([&["from \\ to"], columns.as_slice()].concat());
        for row in rows {
            let cell = |column: &&str| match cells.get(&(row, *column)) {
                None => "·".to_owned(),
                Some(bad) if bad.is_empty() => "ok".to_owned(),
                Some(bad) => format!("no {}", bad.join(" ")),
            };
            let line: Vec<String> = std::iter::once(row.to_owned()).chain(columns.iter().map(cell)).collect();
            table.add_row(line);
        }
        table.to_string()
    }
}

struct Target {
    name: String,
    address: IpAddr,
    /// Index of the pod, if it is one: only those take TCP.
    pod: Option<usize>,
}

fn what(means: Means, family: Family) -> &'static str {
    match (means, family) {
        (Means::Icmp, Family::V4) => "ping4",
        (Means::Icmp, Family::V6) => "ping6",
        (Means::Tcp, Family::V4) => "tcp4",
        (Means::Tcp, Family::V6) => "tcp6",
    }
}

impl Lab {
    /// Asks from every pod: every other pod and every node by ICMP, every other pod by TCP with a checked
    /// payload, in both families. An address that answers no ping within `patience` is not tried by TCP.
    ///
    /// # Errors
    /// When the check itself cannot be made; what does not answer is in the report.
    pub fn check(&self, patience: Duration) -> Result<CheckReport> {
        let pods = self.pods()?;
        let mut targets = Vec::new();
        for family in Family::BOTH {
            for (index, pod) in pods.iter().enumerate() {
                targets.push(Target {
                    name: pod.full_name(),
                    address: pod.address(family),
                    pod: Some(index),
                });
            }
        }
        let mut silent = Vec::new();
        for host in self.hosts() {
            match host.mesh_addresses() {
                Ok((v4, v6)) => {
                    for address in [v4.into(), v6.into()] {
                        targets.push(Target { name: host.name().to_owned(), address, pod: None });
                    }
                }
                Err(error) => silent.push((host.name().to_owned(), format!("{error:#}"))),
            }
        }
        let servers: Vec<_> = pods
            .iter()
            .map(|pod| Ok([pod.serve(Family::V4)?, pod.serve(Family::V6)?]))
            .collect::<Result<_>>()?;

        let report = Mutex::new(CheckReport { silent, ..CheckReport::default() });
        let deadline = Instant::now() + patience;
        let indices: Vec<usize> = (0..pods.len()).collect();
        in_parallel(&indices, |&index| {
            let pod = &pods[index];
            let others: Vec<&Target> = targets.iter().filter(|target| target.pod != Some(index)).collect();
            let addresses: Vec<IpAddr> = others.iter().map(|target| target.address).collect();
            let answers = pod.sweep(&addresses, deadline)?;
            let mut probes = Vec::new();
            for (target, answer) in others.into_iter().zip(answers) {
                let family = crate::ping::family_of(target.address);
                let mut add = |means, outcome| {
                    probes.push(Probe {
                        from: pod.full_name(),
                        to: target.name.clone(),
                        what: what(means, family),
                        address: target.address,
                        outcome,
                    });
                };
                add(
                    Means::Icmp,
                    answer.ok_or_else(|| format!("no answer within {:.1} s", patience.as_secs_f64())),
                );
                let Some(other) = target.pod else { continue };
                let transfer = if answer.is_some() {
                    let server = &servers[other][usize::from(family == Family::V6)];
                    pod.send(server, TCP_BYTES).map(|done| done.elapsed).map_err(|error| format!("{error:#}"))
                } else {
                    Err("not tried: no answer to ping".to_owned())
                };
                add(Means::Tcp, transfer);
            }
            report.lock().unwrap_or_else(std::sync::PoisonError::into_inner).probes.extend(probes);
            Ok(())
        })?;
        let mut report = report.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        report.probes.sort_by(|a, b| a.from.cmp(&b.from));
        Ok(report)
    }

    /// Waits until every pod has an answer from every other, in both families.
    ///
    /// # Errors
    /// When one has not within `timeout`; the error names the pairs.
    pub fn wait_connected(&self, timeout: Duration) -> Result<()> {
        let pods = self.pods()?;
        let deadline = Instant::now() + timeout;
        let missing = Mutex::new(Vec::new());
        in_parallel(&pods, |pod| {
            let others: Vec<&Pod> =
                pods.iter().filter(|other| other.full_name() != pod.full_name()).collect();
            let addresses: Vec<IpAddr> = Family::BOTH
                .iter()
                .flat_map(|family| others.iter().map(|other| other.address(*family)))
                .collect();
            let answers = pod.sweep(&addresses, deadline)?;
            for (address, answer) in addresses.iter().zip(answers) {
                if answer.is_none() {
                    let pair = format!("{} > {address}", pod.full_name());
                    missing.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(pair);
                }
            }
            Ok(())
        })?;
        let missing = missing.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        anyhow::ensure!(
            missing.is_empty(),
            "no answer to ping within {:.1} s: {}",
            timeout.as_secs_f64(),
            missing.join(", ")
        );
        Ok(())
    }

    /// Waits until every daemon says that it is connected with all others: gossip reaches them, tunnel ready.
    ///
    /// # Errors
    /// When that is not so within `timeout`.
    pub fn wait_meshed(&self, timeout: Duration) -> Result<()> {
        let hosts = self.hosts();
        let others = hosts.len() - 1;
        in_parallel(&hosts, |host| {
            poll_until(&format!("{} connected with {others} peers", host.name()), timeout, || {
                host.status().is_ok_and(|status| {
                    let peers = status["peers"].as_array().map(Vec::as_slice).unwrap_or_default();
                    let ready = |peer: &&serde_json::Value| {
                        peer["gossip"]["reachable"] == true && peer["tunnel"]["ready"] == true
                    };
                    peers.iter().filter(ready).count() >= others
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_matrix_says_what_does_not_work() {
        let probe = |from: &str, to: &str, what, good: bool| Probe {
            from: from.to_owned(),
            to: to.to_owned(),
            what,
            address: IpAddr::from([10, 32, 0, 1]),
            outcome: if good { Ok(Duration::ZERO) } else { Err("x".to_owned()) },
        };
        let report = CheckReport {
            probes: vec![
                probe("h1/p1", "h1", "ping4", true),
                probe("h1/p1", "h2/p1", "ping4", true),
                probe("h1/p1", "h2/p1", "tcp6", false),
                probe("h2/p1", "h1/p1", "ping4", true),
            ],
            silent: Vec::new(),
        };
        assert_eq!(report.failed().count(), 1);
        let matrix = report.matrix();
        let header = matrix.lines().nth(1).unwrap();
        assert!(header.find("h2/p1").unwrap() < header.rfind("h1 ").unwrap(), "{matrix}");
        assert!(matrix.contains("no tcp6"), "{matrix}");
        assert!(matrix.contains("·"), "{matrix}");
    }
}
