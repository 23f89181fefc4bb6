//! `cargo xtask bench relay --flood RATE`: initiations with the addresses of both ends and of strangers, marked for the ends
//! and for nobody, in turns, from a third host.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::load::{Direction, Family, Load};
use super::middle::{self, Middle, NO_ROOM, STRANGERS_WIRE};
use super::network::{NAMESPACE_PREFIX, Network};
use super::samples::Samples;
use crate::command::{run, succeeds};

/// What goes on at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Case {
    /// Honest traffic.
    Quiet,
    /// Honest traffic, and the flood goes to a port of the same host at which nobody listens: what its sender and the kernel
    /// take, which share the processors with all others.
    Closed,
    /// Honest traffic, and the flood goes to the relay.
    Flooded,
    /// The flood goes to the relay, and there is nothing else.
    Alone,
}

impl Case {
    const ALL: [Self; 4] = [Self::Quiet, Self::Closed, Self::Flooded, Self::Alone];

    fn name(self) -> &'static str {
        match self {
            Self::Quiet => "no flood",
            Self::Closed => "flood to a closed port",
            Self::Flooded => "flood to the relay",
            Self::Alone => "flood, no traffic",
        }
    }

    /// Where the flood goes.
    fn port(self) -> Option<u16> {
        match self {
            Self::Quiet => None,
            Self::Closed => Some(CLOSED_PORT),
            Self::Flooded | Self::Alone => Some(middle::PORT),
        }
    }
}

/// What is measured, with its decimals.
const QUANTITIES: [(&str, usize); 5] = [
    ("tcp, Gbit/s", 2),
    ("relay, s/s", 3),
    ("sent, 1000/s", 1),
    ("sender, s/s", 3),
    ("relay, us/initiation", 2),
];

const TCP: usize = 0;
const RELAY: usize = 1;
const SENT: usize = 2;
const SENDER: usize = 3;
const EACH: usize = 4;

/// What all rounds have found.
#[derive(Default)]
pub(crate) struct Floods {
    found: BTreeMap<Case, [Samples; QUANTITIES.len()]>,
    /// What the relay has counted under flood, for each initiation that was sent.
    counted: BTreeMap<Case, BTreeMap<String, u64>>,
    sent: BTreeMap<Case, u64>,
    rounds: usize,
}

/// The third host; goes away when dropped.
struct Host(String);

/// A flood that is under way.
struct Flood(Child);

/// What a flood was.
struct Sent {
    count: f64,
    seconds: f64,
    cpu: f64,
}

impl Host {
    fn new(middle: &Middle) -> Result<Self> {
        let host = Self(format!("{NAMESPACE_PREFIX}{}-flood", std::process::id()));
        run(Command::new("ip").args(["netns", "add", &host.0]))?;
        middle.connect_stranger(&host.0, 1500)?;
        Ok(host)
    }

    fn flood(&self, program: &Path, rate: u32, port: u16, lanes: &[String]) -> Result<Flood> {
        let mut command = Command::new("ip");
        // Who floods has processors of its own elsewhere: here it is the last to wait.
        command.args(["netns", "exec", &self.0, "nice", "-n", "-10"]).arg(program);
        command.args([rate.to_string(), format!("{}:{port}", STRANGERS_WIRE[0])]).args(lanes);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Ok(Flood(command.spawn().with_context(|| format!("cannot start {}", program.display()))?))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        succeeds(Command::new("ip").args(["netns", "del", &self.0]));
    }
}

impl Flood {
    /// Ends it.
    fn end(mut self) -> Result<Sent> {
        drop(self.0.stdin.take());
        let mut text = String::new();
        self.0.stdout.take().context("no pipe")?.read_to_string(&mut text)?;
        let status = self.0.wait()?;
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            ["sent", count, "seconds", seconds, "cpu", cpu] => {
                Ok(Sent { count: count.parse()?, seconds: seconds.parse()?, cpu: cpu.parse()? })
            }
            _ => bail!("the flood ended ({status}) and said {text:?}"),
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Floods {
    /// Measures all cases, beginning with another one in each round, on a network with our relay.
    pub(crate) fn measure(
        &mut self,
        network: &mut Network,
        program: &Path,
        rate: u32,
        seconds: u32,
    ) -> Result<()> {
        let host = Host::new(network.middle()?)?;
        let mut cases = Case::ALL;
        cases.rotate_left(self.rounds % Case::ALL.len());
        for case in cases {
            eprintln!("    {}", case.name());
            network.wait_for_answer()?;
            let before = network.middle()?.counters()?;
            let cpu_before = network.middle_seconds()?.context("no relay")?;
            let started = Instant::now();
            let lanes = network.lanes();
            let flood = case.port().map(|port| host.flood(program, rate, port, &lanes)).transpose()?;
            let tcp = if case == Case::Alone {
                std::thread::sleep(std::time::Duration::from_secs(seconds.into()));
                None
            } else {
                let load = Load::Tcp { family: Family::V4, streams: 1, direction: Direction::Forward };
                load.measure(network, seconds)?.first().copied()
            };
            let sent = flood.map(Flood::end).transpose()?;
            let elapsed = started.elapsed().as_secs_f64();
            let cpu = network.middle_seconds()?.context("no relay")? - cpu_before;
            let after = network.middle()?.counters()?;

            let samples = self.found.entry(case).or_default();
            let mut push = |at: usize, value: f64| samples[at].push(value);
            tcp.into_iter().for_each(|value| push(TCP, value));
            push(RELAY, cpu / elapsed);
            let Some(sent) = sent else { continue };
            push(SENT, sent.count / sent.seconds / 1e3);
            push(SENDER, sent.cpu / sent.seconds);
            if case == Case::Alone {
                push(EACH, cpu / sent.count * 1e6);
            }
            *self.sent.entry(case).or_default() += sent.count as u64;
            let counted = self.counted.entry(case).or_default();
            for (name, value) in after {
                // How full the tables are is no count.
                let value = match name.as_str() {
                    "lanes" | "routes" => value.max(counted.get(&name).copied().unwrap_or_default()),
                    _ => counted.get(&name).copied().unwrap_or_default() + value - before[&name],
                };
                counted.insert(name, value);
            }
        }
        self.rounds += 1;
        Ok(())
    }

    fn median(&self, case: Case, at: usize) -> Option<f64> {
        self.found.get(&case)?[at].median()
    }

    /// The honest traffic under flood, by that in another case.
    fn kept(&self, of: Case) -> Option<f64> {
        Some(self.median(Case::Flooded, TCP)? / self.median(of, TCP)?)
    }

    pub(crate) fn as_text(&self) -> String {
        let mut text = format!("{:<20}", "median (smallest–largest)");
        Case::ALL.iter().for_each(|case| text += &format!("  {:>22}", case.name()));
        for (at, (name, decimals)) in QUANTITIES.iter().enumerate() {
            text += &format!("\n{name:<25}");
            for case in Case::ALL {
                let shown = self.found.get(&case).map(|samples| samples[at].shown(*decimals));
                text += &format!("  {:>22}", shown.unwrap_or_default());
            }
        }
        let shown = |ratio: Option<f64>| ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
        text += "\n\nall programs share the processors: what the sender and the kernel take is in \"flood to a closed port\"";
        text += &format!("\ntcp, flood to the relay / no flood: {}", shown(self.kept(Case::Quiet)));
        text += &format!(
            "\ntcp, flood to the relay / flood to a closed port: {}",
            shown(self.kept(Case::Closed))
        );
        for (case, counted) in &self.counted {
            text += &format!("\n{}: {} sent", case.name(), self.sent[case]);
            for (name, value) in counted.iter().filter(|(_, value)| **value > 0) {
                text += &format!(", {name} {value}");
            }
        }
        text += &format!(
            "\n(passed_on has the honest traffic too; {NO_ROOM}: the relay's socket was full, whatever it was)"
        );
        text + "\n"
    }

    /// Fields of the JSON output.
    pub(crate) fn as_json(&self) -> Map<String, Value> {
        let cases = self.found.iter().map(|(case, samples)| {
            let values = QUANTITIES.iter().zip(samples);
            let values = values.map(|((name, _), samples)| ((*name).to_owned(), samples.to_json()));
            (case.name().to_owned(), Value::Object(values.collect()))
        });
        let counted = self.counted.iter().map(|(case, counted)| {
            (case.name().to_owned(), json!({ "sent": self.sent[case], "counted": counted }))
        });
        let cpu = |case| self.found.get(&case).map(|samples| samples[RELAY].to_json());
        Map::from_iter([
            (
                "flood_rate".to_owned(),
                json!(self.median(Case::Flooded, SENT).map(|thousands| thousands * 1e3)),
            ),
            (
                "flood_throughput_ratio".to_owned(),
                json!({ "no_flood": self.kept(Case::Quiet), "closed_port": self.kept(Case::Closed) }),
            ),
            (
                "flood_relay_cpu".to_owned(),
                json!({
                    "seconds_per_second": { "no_flood": cpu(Case::Quiet), "flood": cpu(Case::Flooded), "alone": cpu(Case::Alone) },
                    "microseconds_per_initiation": self.median(Case::Alone, EACH),
                }),
            ),
            ("flood_cases".to_owned(), Value::Object(cases.collect())),
            ("flood_counted".to_owned(), Value::Object(counted.collect())),
        ])
    }
}

/// Nobody listens there.
const CLOSED_PORT: u16 = 6799;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flood_is_compared_with_both() {
        let mut floods = Floods::default();
        for (case, tcp) in [(Case::Quiet, 4.0), (Case::Closed, 2.5), (Case::Flooded, 2.0)] {
            floods.found.entry(case).or_default()[TCP].push(tcp);
            floods.found.entry(case).or_default()[SENT].push(100.0);
        }
        let text = floods.as_text();
        assert!(text.contains("relay / no flood: 0.50") && text.contains("closed port: 0.80"), "{text}");
        let json = floods.as_json();
        assert_eq!(json["flood_rate"], 100_000.0);
        assert_eq!(json["flood_throughput_ratio"], json!({ "no_flood": 0.5, "closed_port": 0.8 }));
        assert!(json["flood_relay_cpu"]["microseconds_per_initiation"].is_null());
    }
}
