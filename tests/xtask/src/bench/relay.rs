//! `cargo xtask bench relay`: two engines that reach each other through the relay only, beside the same two by a direct way, through
//! a program that passes on without looking, and through nftables.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value, json};

use super::carrier::Carrier;
use super::flood::Floods;
use super::load::{Direction, Family, Load, Server};
use super::middle::Way;
use super::network::{self, Ground, Network};
use super::samples::Samples;
use crate::command::run;
use crate::workspace::Workspace;
use crate::{machine, packages};

/// Raised when a field of the JSON output changes its meaning or goes away.
const SCHEMA_VERSION: u32 = 1;

#[derive(Args)]
pub(crate) struct Arguments {
    /// How often each way has its turn
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of each measurement in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Also send so many initiations a second to the relay that are none, with the addresses of others; 0: none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    flood: u32,
    /// Measure the release builds
    #[arg(long)]
    release: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What is measured, with its decimals.
const QUANTITIES: [(&str, usize); 5] = [
    ("ping_idle_p50, ms", 3),
    ("ping_idle_p99, ms", 3),
    ("tcp, Gbit/s", 2),
    ("engines, s/GB", 2),
    ("middle, s/GB", 2),
];

/// A way that is up, with somebody to talk to at its end. The server ends before its network.
struct Site {
    way: Way,
    _server: Server,
    network: Network,
}

type Found = BTreeMap<Way, [Samples; QUANTITIES.len()]>;

/// Measures all ways in turns and prints the result. Standard output has nothing but the result.
pub(crate) fn measure(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    machine::require_root("the measurement")?;
    packages::ensure(&[packages::BUILD, packages::BENCH_ENGINE, packages::AEAD])?;
    machine::require_networking()?;
    network::remove_leftovers()?;
    let Some(engine) = Carrier::MeshWg.prepare(workspace, arguments.release)? else { return Ok(()) };
    eprintln!("==> build the relay");
    let mut build = workspace.cargo();
    build.args(["build", "--quiet", "--package", "meshd", "--example", "relay", "--example", "flood"]);
    if arguments.release {
        build.arg("--release");
    }
    run(&mut build)?;
    let profile = if arguments.release { "release" } else { "debug" };
    let examples = workspace.target_dir().join(profile).join("examples");
    let (program, flood) = (examples.join("relay"), examples.join("flood"));
    let ground = Ground { mtu: 1500, cpus: None };

    let mut found = Found::new();
    let mut floods = Floods::default();
    let mut ways = Way::ALL;
    for round in 1..=arguments.rounds {
        let mut sites = Vec::new();
        for way in ways {
            eprintln!("round {round} of {}: start {}", arguments.rounds, way.name());
            let network = Network::across(way, &engine, &program, &ground)?;
            sites.push(Site { way, _server: Server::start(&network)?, network });
        }
        for loaded in [false, true] {
            for site in &sites {
                eprintln!("round {round} of {}: {}", arguments.rounds, site.way.name());
                site.network.wait_for_answer()?;
                let values =
                    if loaded { tcp(site, arguments.seconds)? } else { ping(site, arguments.seconds)? };
                let samples = found.entry(site.way).or_default();
                values.into_iter().for_each(|(at, value)| samples[at].push(value));
            }
        }
        if let Some(site) = sites.iter_mut().find(|site| site.way == Way::Relay && arguments.flood > 0) {
            eprintln!("round {round} of {}: flood", arguments.rounds);
            floods.measure(&mut site.network, &flood, arguments.flood, arguments.seconds)?;
        }
        // Nobody shall always come after the same neighbour.
        ways.rotate_left(1);
    }
    if arguments.json {
        let mut all = as_json(&found, arguments);
        if let Some(all) = all.as_object_mut().filter(|_| arguments.flood > 0) {
            all.extend(floods.as_json());
        }
        println!("{all:#}");
    } else {
        println!("{}", as_text(&found));
        if arguments.flood > 0 {
            println!("{}", floods.as_text());
        }
    }
    Ok(())
}

fn ping(site: &Site, seconds: u32) -> Result<Vec<(usize, f64)>> {
    let values = Load::Ping { streams: 0 }.measure(&site.network, seconds)?;
    Ok((0..).zip(values).collect())
}

fn tcp(site: &Site, seconds: u32) -> Result<Vec<(usize, f64)>> {
    let before = site.network.middle_seconds()?;
    let load = Load::Tcp { family: Family::V4, streams: 1, direction: Direction::Forward };
    let values = load.measure(&site.network, seconds)?;
    let mut all: Vec<(usize, f64)> = (2..).zip(values.iter().copied()).collect();
    let after = site.network.middle_seconds()?;
    if let (Some(before), Some(after), Some(gigabits)) = (before, after, values.first()) {
        all.push((4, (after - before) / (gigabits / 8.0 * f64::from(seconds))));
    }
    Ok(all)
}

/// Bytes for each second of the relay's processor, by those of the engines on the direct way; and the delay that the relay adds at the
/// median, by what the forwarder adds.
fn ratios(found: &Found) -> (Option<f64>, Option<f64>) {
    let median = |way: Way, at: usize| found.get(&way)?[at].median();
    let frugality = || Some(median(Way::Direct, 3)? / median(Way::Relay, 4)?);
    let direct = median(Way::Direct, 0);
    let added = |way| Some(median(way, 0)? - direct?);
    let delay = || Some(added(Way::Relay)? / added(Way::Forwarder)?);
    (frugality(), delay())
}

fn as_text(found: &Found) -> String {
    let mut text = "median (smallest–largest)\n".to_owned();
    text += &format!("{:<20}", "");
    Way::ALL.iter().for_each(|way| text += &format!("  {:>22}", way.name()));
    for (at, (name, decimals)) in QUANTITIES.iter().enumerate() {
        text += &format!("\n{name:<20}");
        for way in Way::ALL {
            let shown = found.get(&way).map(|samples| samples[at].shown(*decimals)).unwrap_or_default();
            text += &format!("  {shown:>22}");
        }
    }
    let (frugality, delay) = ratios(found);
    let shown = |ratio: Option<f64>| ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
    text +=
        &format!("\n\nbytes per processor second, relay / engines on the direct way: {}", shown(frugality));
    text + &format!("\ndelay added at the median, relay / forwarder: {}\n", shown(delay))
}

fn as_json(found: &Found, arguments: &Arguments) -> Value {
    let ways = found.iter().map(|(way, samples)| {
        let values = QUANTITIES
            .iter()
            .zip(samples)
            .map(|((name, _), samples)| ((*name).to_owned(), samples.to_json()));
        (way.name().to_owned(), Value::Object(values.collect()))
    });
    let (frugality, delay) = ratios(found);
    json!({
        "schema_version": SCHEMA_VERSION,
        "suite": "relay",
        "profile": if arguments.release { "release" } else { "debug" },
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "ways": Value::Object(ways.collect::<Map<_, _>>()),
        "ratios": { "bytes_per_processor_second": frugality, "delay_added": delay },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_is_compared_with_the_right_ones() {
        let of = |values: [f64; QUANTITIES.len()]| values.map(|value| Samples::from_iter([value]));
        let found = Found::from([
            (Way::Direct, of([0.1, 0.2, 4.0, 2.0, 0.0])),
            (Way::Relay, of([0.3, 0.4, 3.0, 2.5, 1.0])),
            (Way::Forwarder, of([0.2, 0.3, 3.0, 2.5, 0.5])),
        ]);
        let (frugality, delay) = ratios(&found);
        assert!((frugality.unwrap() - 2.0).abs() < 1e-9 && (delay.unwrap() - 2.0).abs() < 1e-9);
        let text = as_text(&found);
        assert!(text.contains("relay / forwarder: 2.00") && text.contains("4.00 (4.00–4.00)"), "{text}");
        assert_eq!(ratios(&Found::new()), (None, None));
    }
}
