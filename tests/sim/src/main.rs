//! `mesh-sim`: the simulator on the command line; `cargo xtask sim` builds and runs it.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use mesh_sim::figures::{self, Costs, Figure, Figures};
use mesh_sim::healing::{self, Outcome};
use mesh_sim::settings::{Fault, Settings};

#[derive(Parser)]
#[command(
    name = "cargo xtask sim",
    about = "Simulates whole nodes under a virtual clock",
    max_term_width = 100
)]
struct Arguments {
    /// Hosts at the start; with chaos, 5 to 30 by the seed unless given
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    nodes: Option<u32>,
    /// Everything random follows from it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Several seeds, A..B (B not included), on all processors
    #[arg(long, value_parser = seeds, conflicts_with = "seed")]
    seeds: Option<(u64, u64)>,
    /// How long faults go on, in minutes of virtual time
    #[arg(long, default_value_t = 5)]
    minutes: u64,
    /// The same in seconds
    #[arg(long, conflicts_with = "minutes")]
    seconds: Option<u64>,
    /// With chaos: as the test suite runs it, whatever is said of nodes, time and pause
    #[arg(long)]
    short: bool,
    /// With chaos: mean pause between two faults, in seconds
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..))]
    pause: u64,
    /// What goes wrong
    #[arg(long, value_enum, default_value_t = Faults::Chaos)]
    faults: Faults,
    /// With chaos: only these faults, by name, with commas
    #[arg(long, value_delimiter = ',', value_parser = fault)]
    only: Vec<Fault>,
    /// With chaos: all faults but these
    #[arg(long, value_delimiter = ',', value_parser = fault)]
    without: Vec<Fault>,
    /// Without chaos: only these figures, by name, with commas
    #[arg(long, value_delimiter = ',', value_parser = figure)]
    figures: Vec<Figure>,
    /// Saves nothing: signatures and agreements are computed by each node, and a cluster that is measured comes about
    /// by itself; for some 100 nodes
    #[arg(long)]
    plain: bool,
    /// Prints everything that happened
    #[arg(long)]
    trail: bool,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Faults {
    /// A network that loses nothing
    None,
    /// The network of the figures: 20 to 120 ms, 2 % loss
    Standard,
    /// Random faults of all kinds
    Chaos,
}

fn seeds(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("two numbers with `..` between them")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok((number(from)?, number(to)?))
}

fn fault(text: &str) -> Result<Fault, String> {
    let names: Vec<&str> = Fault::ALL.iter().map(|fault| fault.name()).collect();
    Fault::named(text).ok_or_else(|| format!("one of {}", names.join(", ")))
}

fn figure(text: &str) -> Result<Figure, String> {
    let names: Vec<&str> = Figure::ALL.iter().map(|figure| figure.name()).collect();
    Figure::named(text).ok_or_else(|| format!("one of {}", names.join(", ")))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let clean = match arguments.faults {
        Faults::Chaos => chaos(&arguments),
        Faults::None | Faults::Standard => figures(&arguments),
    };
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn span(arguments: &Arguments) -> Duration {
    Duration::from_secs(arguments.seconds.unwrap_or(arguments.minutes * 60))
}

fn settings(arguments: &Arguments, seed: u64) -> Settings {
    let nodes = arguments.nodes.map_or(5 + (seed % 26) as usize, |nodes| nodes as usize);
    let mut settings = if arguments.short {
        Settings::short(seed)
    } else {
        let fault_pause = Duration::from_secs(arguments.pause);
        Settings { fault_pause, ..Settings::chaos(nodes, seed, span(arguments)) }
    };
    settings.plain = arguments.plain;
    if !arguments.only.is_empty() {
        settings.faults.retain(|fault| arguments.only.contains(fault));
    }
    settings.faults.retain(|fault| !arguments.without.contains(fault));
    settings
}

fn figures(arguments: &Arguments) -> bool {
    let nodes = arguments.nodes.unwrap_or(10) as usize;
    let span = span(arguments);
    let settings = match arguments.faults {
        Faults::None => Settings::calm(nodes, arguments.seed, span),
        Faults::Standard | Faults::Chaos => Settings::standard(nodes, arguments.seed, span),
    };
    let settings = Settings { plain: arguments.plain, ..settings };
    let which = if arguments.figures.is_empty() { &Figure::ALL[..] } else { &arguments.figures[..] };
    let begun = Instant::now();
    if !arguments.json {
        println!("{:<40} {nodes}", "nodes");
        println!("{:<40} {}", "seed", arguments.seed);
    }
    let taken = |figure: Figure, figures: &Figures, costs: &Costs| {
        if !arguments.json {
            lines(figure, figures, costs);
        }
    };
    let (figures, costs) = match figures::take(settings, which, taken) {
        Ok(taken) => taken,
        Err(error) => {
            eprintln!("error: {error}");
            return false;
        }
    };
    let wall = begun.elapsed().as_secs_f64();
    if arguments.json {
        let seconds = |took: Option<Duration>| took.map(|took| took.as_secs_f64());
        let (tunnel, known) = figures.join_p99.unzip();
        let walls: BTreeMap<&str, f64> =
            costs.wall.iter().map(|(figure, took)| (figure.name(), took.as_secs_f64())).collect();
        let object = serde_json::json!({
            "record_to_all_p99_s": seconds(figures.record_to_all_p99),
            "bytes_per_node_s": figures.bytes_per_node,
            "processor_per_node": costs.busy,
            "crash_known_s": seconds(figures.crash_known),
            "heal_s": seconds(figures.heal),
            "false_unreachable": figures.false_unreachable,
            "first_tunnel_p99_s": seconds(tunnel),
            "newcomer_known_p99_s": seconds(known),
            "removed_p99_s": seconds(figures.removal_p99),
            "breaches": figures.breaches,
            "wall_s": wall,
            "walls_s": walls,
            "minutes": span.as_secs_f64() / 60.0,
            "nodes": nodes,
            "seed": arguments.seed,
            "plain": arguments.plain,
        });
        println!("{object}");
    } else {
        println!("{:<40} {}", "breaches", figures.breaches);
        println!("{:<40} {wall:.1} s", "wall time");
    }
    let missing: Vec<&str> =
        which.iter().filter(|figure| !figures.has(**figure)).map(|figure| figure.name()).collect();
    if !missing.is_empty() {
        eprintln!("error: not reached in the time that there is for it: {}", missing.join(", "));
    }
    figures.breaches == 0 && missing.is_empty()
}

/// Prints a figure, as soon as it is taken: the large ones take long.
fn lines(figure: Figure, figures: &Figures, costs: &Costs) {
    let wall = costs.wall.get(&figure).map_or(0.0, Duration::as_secs_f64);
    let line = |what: &str, value: Option<String>| {
        let value = value.unwrap_or_else(|| "-".to_owned());
        println!("{what:<40} {value:<12} (wall time {wall:.1} s)");
    };
    let seconds = |took: Option<Duration>| took.map(|took| format!("{:.2} s", took.as_secs_f64()));
    match figure {
        Figure::Record => line("a record to all, p99", seconds(figures.record_to_all_p99)),
        Figure::Peace => {
            line("sent per node in peace", figures.bytes_per_node.map(|bytes| format!("{bytes:.0} B/s")));
            let busy = costs.busy.map(|busy| format!("{:.3} %", busy * 100.0));
            line("of one processor, a node in peace", busy);
        }
        Figure::Crash => line("a crash known to all, worst of 5", seconds(figures.crash_known)),
        Figure::Split => line("all equal after a split of 120 s", seconds(figures.heal)),
        Figure::Doubt => {
            line("live nodes called unreachable", figures.false_unreachable.map(|count| count.to_string()));
        }
        Figure::Join => {
            let (tunnel, known) = figures.join_p99.unzip();
            line("first tunnel of a newcomer, p99", seconds(tunnel));
            line("a newcomer known to all, p99", seconds(known));
        }
        Figure::Removal => line("tunnels to the removed gone, p99", seconds(figures.removal_p99)),
    }
}

fn chaos(arguments: &Arguments) -> bool {
    let (from, to) = arguments.seeds.unwrap_or((arguments.seed, arguments.seed + 1));
    let begun = Instant::now();
    let next = std::sync::atomic::AtomicU64::new(from);
    let outcomes = std::sync::Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= to {
                        return;
                    }
                    let outcome = healing::chaos(settings(arguments, seed));
                    report(arguments, seed, &outcome);
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push((seed, outcome));
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_default();
    let broken = outcomes.iter().filter(|(_, outcome)| !outcome.breaches.is_empty()).count();
    let breaches: usize = outcomes.iter().map(|(_, outcome)| outcome.breaches.len()).sum();
    let slowest = outcomes.iter().filter_map(|(_, outcome)| outcome.healed).max();
    let slowest = slowest.map(|took| took.as_secs_f64());
    if arguments.json {
        let object = serde_json::json!({
            "record_to_all_p99_s": null, "bytes_per_node_s": null, "crash_known_s": null, "heal_s": slowest,
            "false_unreachable": null, "breaches": breaches, "wall_s": begun.elapsed().as_secs_f64(),
            "seeds": outcomes.len(), "seeds_with_breaches": broken,
        });
        println!("{object}");
    } else {
        println!(
            "{} seeds, {broken} with breaches ({breaches}); slowest to be whole again {slowest:?} s; wall time {:.1} s",
            outcomes.len(),
            begun.elapsed().as_secs_f64()
        );
    }
    broken == 0
}

fn report(arguments: &Arguments, seed: u64, outcome: &Outcome) {
    if outcome.breaches.is_empty() && !arguments.trail {
        return;
    }
    let lines = if arguments.trail { outcome.trail.len() } else { 0 };
    let mut text = outcome.trail.iter().rev().take(lines).rev().cloned().collect::<Vec<_>>().join("\n");
    for breach in &outcome.breaches {
        let at = breach.at.since_origin().as_secs_f64();
        text.push_str(&format!("\nseed {seed}: {at:.3} s: {}: {}", breach.promise, breach.text));
    }
    eprintln!("{text}\n    again: {}", outcome.replay);
}
