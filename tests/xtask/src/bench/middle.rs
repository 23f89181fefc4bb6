//! A host between the two ends, which reach each other by way of it only.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::process;
use crate::command::{capture, run, succeeds};

/// How what the ends send to each other gets past the host in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// It is a router, and the ends are each other's endpoints.
    Direct,
    /// It is the endpoint of both, and our relay is there.
    Relay,
    /// It is, and a program passes on whatever comes from one to the other, in batches.
    Forwarder,
    /// It is, and nftables rewrites the addresses, in the kernel.
    Dnat,
}

impl Way {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::Relay, Self::Forwarder, Self::Dnat];

    /// How it is called in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
            Self::Forwarder => "forwarder",
            Self::Dnat => "dnat",
        }
    }
}

/// The host; goes away with everything on it when dropped.
pub(crate) struct Middle {
    namespace: String,
    process: Option<Child>,
    /// Asks our relay what it has counted, and hears it.
    counters: Option<(ChildStdin, BufReader<ChildStdout>)>,
}

/// Where the ends send to when they do not send to each other.
pub(crate) const PORT: u16 = 6783;

/// Addresses on the wires to the two ends: of the host in the middle, and of the end.
pub(crate) const WIRES: [[&str; 2]; 2] = [["192.0.2.17", "192.0.2.18"], ["192.0.2.33", "192.0.2.34"]];

/// The same for who is none of the two.
pub(crate) const STRANGERS_WIRE: [&str; 2] = ["192.0.2.49", "192.0.2.50"];

/// Their prefixes.
const PREFIX: &str = "28";

impl Middle {
    /// A namespace that routes, and nothing in it yet.
    pub(crate) fn new(namespace: String) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", &namespace]))?;
        let middle = Self { namespace, process: None, counters: None };
        middle.sh("ip link set lo up; sysctl -qw net.ipv4.ip_forward=1")?;
        Ok(middle)
    }

    /// Draws the wire to an end, which has the interface `device` then.
    pub(crate) fn connect(&self, index: usize, end: &str, device: &str, mtu: u32) -> Result<()> {
        self.draw(index, WIRES[index], end, device, mtu)
    }

    /// Draws a wire to somebody else, from whom any source address is taken.
    pub(crate) fn connect_stranger(&self, namespace: &str, mtu: u32) -> Result<()> {
        let index = WIRES.len();
        self.draw(index, STRANGERS_WIRE, namespace, "wire", mtu)?;
        // The larger one of the two counts.
        self.sh(&format!("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.wire{index}.rp_filter=0"))
    }

    fn draw(&self, index: usize, wire: [&str; 2], end: &str, device: &str, mtu: u32) -> Result<()> {
        let [here, there] = wire;
        self.sh(&format!(
            "ip link add wire{index} mtu {mtu} type veth peer name {device} mtu {mtu} netns {end} && \
             ip address add {here}/{PREFIX} dev wire{index} && ip link set wire{index} up"
        ))?;
        run(Command::new("ip").args([
            "-n",
            end,
            "address",
            "add",
            &format!("{there}/{PREFIX}"),
            "dev",
            device,
        ]))?;
        run(Command::new("ip").args(["-n", end, "link", "set", device, "up"]))?;
        run(Command::new("ip").args(["-n", end, "route", "add", "default", "via", here]))
    }

    /// Starts what passes on: `ends` are where the ends send from, `keys` their public keys.
    pub(crate) fn start(
        &mut self,
        way: Way,
        program: &Path,
        ends: [String; 2],
        keys: &[String; 2],
    ) -> Result<()> {
        let [a, b] = ends;
        let port = PORT.to_string();
        let arguments = match way {
            Way::Direct => return Ok(()),
            Way::Dnat => return self.rewrite(&a, &b),
            Way::Relay => vec![port, format!("{}@{a}", keys[0]), format!("{}@{b}", keys[1])],
            Way::Forwarder => vec!["--bare".to_owned(), port, a, b],
        };
        let mut command = self.inside(program);
        // Our relay ends when nobody can ask it any more.
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        self.counters = child.stdin.take().zip(child.stdout.take().map(BufReader::new));
        self.process = Some(child);
        let deadline = Instant::now() + START_LIMIT;
        while capture(self.inside(Path::new("ss")).args(["-Hlun", &format!("sport = :{PORT}")]))?
            .trim()
            .is_empty()
        {
            if Instant::now() >= deadline {
                bail!("{} does not listen", program.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn rewrite(&self, a: &str, b: &str) -> Result<()> {
        let [[from_a, _], [from_b, _]] = WIRES;
        let rules = format!(
            "table ip bench {{\n\
             chain before {{ type nat hook prerouting priority -100;\n\
             iifname wire0 udp dport {PORT} dnat to {b}\n\
             iifname wire1 udp dport {PORT} dnat to {a}\n}}\n\
             chain after {{ type nat hook postrouting priority 100;\n\
             oifname wire1 ip protocol udp snat to {from_b}:{PORT}\n\
             oifname wire0 ip protocol udp snat to {from_a}:{PORT}\n}}\n}}\n"
        );
        self.sh(&format!("nft -f - <<'RULES'\n{rules}RULES"))
    }

    /// Processor time of what passes on, in seconds; `None` when the kernel does.
    pub(crate) fn seconds(&self) -> Result<Option<f64>> {
        self.process.as_ref().map(|process| process::cpu_seconds(process.id())).transpose()
    }

    /// What our relay has counted so far, and what its socket had no room for.
    pub(crate) fn counters(&mut self) -> Result<BTreeMap<String, u64>> {
        let (ask, answer) = self.counters.as_mut().context("no relay to ask")?;
        ask.write_all(b"\n")?;
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let mut counters = pairs(&line)?;
        let snmp = capture(self.inside(Path::new("cat")).arg("/proc/net/snmp"))?;
        counters.insert(NO_ROOM.to_owned(), udp_counter(&snmp, "RcvbufErrors").context("no RcvbufErrors")?);
        Ok(counters)
    }

    fn inside(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    fn sh(&self, script: &str) -> Result<()> {
        run(self.inside(Path::new("sh")).args(["-c", script]))
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ended = process.kill();
            let _reaped = process.wait();
        }
        succeeds(Command::new("ip").args(["netns", "del", &self.namespace]));
    }
}

/// Names and values in turns.
fn pairs(line: &str) -> Result<BTreeMap<String, u64>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let pair = |pair: &[&str]| match pair {
        [name, value] => Ok(((*name).to_owned(), value.parse()?)),
        _ => bail!("a name without a value: {line}"),
    };
    words.chunks(2).map(pair).collect()
}

/// A value in `/proc/net/snmp`, where names are in one line and values in the next.
fn udp_counter(snmp: &str, name: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let at = lines.next()?.split(' ').position(|found| found == name)?;
    lines.next()?.split(' ').nth(at)?.parse().ok()
}

/// How what the kernel had no room for is called among the counters.
pub(crate) const NO_ROOM: &str = "no_room";

/// How long what passes on may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let counters = pairs("passed_on 12 lanes 2\n").unwrap();
        assert_eq!(counters, BTreeMap::from([("passed_on".to_owned(), 12), ("lanes".to_owned(), 2)]));
        assert!(pairs("passed_on").is_err() && pairs("passed_on x").is_err());
        let snmp = "Tcp: A B\nTcp: 1 2\nUdp: InDatagrams RcvbufErrors\nUdp: 5 7\nUdpLite: RcvbufErrors\nUdpLite: 0\n";
        assert_eq!(udp_counter(snmp, "RcvbufErrors"), Some(7));
        assert_eq!(udp_counter(snmp, "Missing"), None);
    }
}
