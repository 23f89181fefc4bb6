//! `cargo xtask bench engine`: our userspace WireGuard beside plain veth, VXLAN and the engines of others.

use anyhow::{Context, Error, Result, bail};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::{Value, json};

use super::carrier::{Carrier, Program};
use super::load::Server;
use super::network::{self, Ground, Network};
use super::quantity::{Quantity, TESTS, Test};
use super::report::Report;
use crate::workspace::Workspace;
use crate::{machine, packages};

/// Raised when a field of the JSON output changes its meaning or goes away.
const SCHEMA_VERSION: u32 = 2;

#[derive(Args)]
pub(crate) struct Arguments {
    /// How often each carrier has its turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of each measurement in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Measure these carriers only
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Carrier>,
    /// Measure only tcp4_1, tcp4_4, cpu_per_gb, ping_load_p50 and udp64
    #[arg(long)]
    quick: bool,
    /// MTU of the underlay in bytes; tunnels have 80 less
    #[arg(long, default_value = "1500", value_parser = mtu_parser())]
    mtu: u32,
    /// Keep engines, loads and pings on so many processors [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cores: Option<u32>,
    /// Measure the release build of mesh-wg (the others are release builds anyway)
    #[arg(long)]
    release: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// A carrier that is ready to take turns.
struct Contender {
    carrier: Carrier,
    /// `None` when the kernel does the work.
    program: Option<Program>,
}

/// A carrier in its network, with somebody to talk to. The server ends before its network.
struct Site {
    _server: Server,
    network: Network,
}

/// Measures all carriers in turns and prints the result. Standard output has nothing but the result.
pub(crate) fn measure(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    machine::require_root("the measurement")?;
    packages::ensure(&[packages::BUILD, packages::BENCH_ENGINE, packages::AEAD])?;
    machine::require_networking()?;
    network::remove_leftovers()?;
    let ground = Ground { mtu: arguments.mtu, cpus: arguments.cores.map(first_cpus).transpose()? };

    let quantities = TESTS.iter().flat_map(|test| test.quantities);
    let mut report = Report::new(quantities.filter(|found| arguments.wants(found)).copied().collect());
    let mut contenders = Vec::new();
    for carrier in arguments.carriers() {
        match carrier.prepare(workspace, arguments.release) {
            Ok(program) => contenders.push(Contender { carrier, program }),
            Err(error) => leave_out(&mut report, carrier, "it cannot be had", error)?,
        }
    }
    for round in 1..=arguments.rounds {
        take_turns(&contenders, &ground, arguments, round, &mut report)?;
        contenders.retain(|contender| !report.is_missing(contender.carrier));
        // Nobody shall always come after the same neighbour.
        if !contenders.is_empty() {
            contenders.rotate_left(1);
        }
    }
    if arguments.json {
        println!("{:#}", as_json(&report, arguments));
    } else {
        println!("{}", report.tables());
    }
    Ok(())
}

/// One round. All carriers are up at the same time, idle but for one, so that what is compared with each other is
/// measured within seconds.
fn take_turns(
    contenders: &[Contender],
    ground: &Ground,
    arguments: &Arguments,
    round: u32,
    report: &mut Report,
) -> Result<()> {
    let turn = format!("round {round} of {}", arguments.rounds);
    let mut sites = Vec::new();
    for Contender { carrier, program } in contenders {
        eprintln!("{turn}: start {}", carrier.name());
        match Site::new(*carrier, program.as_ref(), ground) {
            Ok(site) => sites.push(site),
            Err(error) => leave_out(report, *carrier, &format!("{turn}: it does not start"), error)?,
        }
    }
    for test in TESTS {
        let wanted = test.quantities.iter().filter(|quantity| arguments.wants(quantity));
        let names = wanted.map(|quantity| quantity.name).collect::<Vec<_>>().join(", ");
        if names.is_empty() {
            continue;
        }
        let mut remaining = Vec::new();
        for site in sites {
            let carrier = site.network.carrier();
            eprintln!("{turn}: {names}: {}", carrier.name());
            match site.measure(test, arguments.seconds) {
                Ok(values) => {
                    for (quantity, value) in test.quantities.iter().zip(values) {
                        report.push(carrier, quantity, value);
                    }
                    remaining.push(site);
                }
                Err(error) => leave_out(report, carrier, &format!("{turn}: {names}"), error)?,
            }
        }
        sites = remaining;
    }
    Ok(())
}

/// Goes on without a peer, loudly; fails when it is no peer.
fn leave_out(report: &mut Report, carrier: Carrier, when: &str, error: Error) -> Result<()> {
    if !carrier.may_be_missing() {
        return Err(error.context(format!("{}: {when}", carrier.name())));
    }
    let reason = format!("{when}: {error:#}");
    eprintln!("\nLEFT OUT: {}: {reason}\n", carrier.name());
    report.leave_out(carrier, reason);
    Ok(())
}

impl Site {
    fn new(carrier: Carrier, program: Option<&Program>, ground: &Ground) -> Result<Self> {
        let network = Network::new(carrier, program, ground)?;
        Ok(Self { _server: Server::start(&network)?, network })
    }

    fn measure(&self, test: &Test, seconds: u32) -> Result<Vec<f64>> {
        // Also ends what the test before has left in the queues.
        self.network.wait_for_answer()?;
        test.load.measure(&self.network, seconds)
    }
}

impl Arguments {
    /// The chosen carriers, each once.
    fn carriers(&self) -> impl Iterator<Item = Carrier> {
        let chosen = |carrier: &Carrier| self.only.is_empty() || self.only.contains(carrier);
        Carrier::ALL.iter().copied().filter(chosen)
    }

    fn wants(&self, quantity: &Quantity) -> bool {
        quantity.quick || !self.quick
    }
}

fn mtu_parser() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["1500", "9000"]).try_map(|mtu| mtu.parse())
}

/// The first processors that we may use, as `taskset` lists them.
fn first_cpus(count: u32) -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let allowed = allowed.context("/proc/self/status has no Cpus_allowed_list")?.trim();
    first_of_list(allowed, count as usize)
        .with_context(|| format!("cannot keep to {count} processors: this machine gives us {allowed}"))
}

/// The first numbers of a list such as `0-3,8`; an error when it has fewer.
fn first_of_list(list: &str, count: usize) -> Result<String> {
    let mut cpus: Vec<u32> = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>()?..=last.parse()?);
    }
    if cpus.len() < count {
        bail!("there are only {}", cpus.len());
    }
    Ok(cpus[..count].iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}

fn as_json(report: &Report, arguments: &Arguments) -> Value {
    let mut object = report.to_json();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    object.extend([
        ("schema_version".to_owned(), json!(SCHEMA_VERSION)),
        ("suite".to_owned(), json!("engine")),
        ("profile".to_owned(), json!(if arguments.release { "release" } else { "debug" })),
        ("rounds".to_owned(), json!(arguments.rounds)),
        ("seconds".to_owned(), json!(arguments.seconds)),
        ("mtu".to_owned(), json!(arguments.mtu)),
        ("cores".to_owned(), json!(arguments.cores)),
        ("cpus".to_owned(), json!(cpus)),
    ]);
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_taken_from_the_front() {
        assert_eq!(first_of_list("0-3", 1).unwrap(), "0");
        assert_eq!(first_of_list("2,5-7", 3).unwrap(), "2,5,6");
        assert!(first_of_list("0-1", 3).unwrap_err().to_string().contains('2'));
        assert!(first_of_list("all", 1).is_err());
    }

    #[test]
    fn what_was_chosen_is_measured_once_and_in_the_order_of_the_tables() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            arguments: Arguments,
        }
        let parse = |words: &[&str]| <Line as clap::Parser>::try_parse_from(words).map(|line| line.arguments);
        let chosen = parse(&["x", "--only", "mesh-wg,gotatun,mesh-wg", "--mtu", "9000"]).unwrap();
        assert_eq!(chosen.carriers().collect::<Vec<_>>(), [Carrier::Gotatun, Carrier::MeshWg]);
        assert_eq!(chosen.mtu, 9000);
        assert_eq!(parse(&["x"]).unwrap().carriers().count(), Carrier::ALL.len());
        assert!(parse(&["x", "--only", "kernel"]).is_err());
        assert!(parse(&["x", "--mtu", "1400"]).is_err());
    }
}
