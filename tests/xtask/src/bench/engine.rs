//! `cargo xtask bench engine`: our userspace WireGuard beside plain veth and wireguard-go.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};

use super::network::{Carrier, Network};
use super::samples::Samples;
use crate::command::{capture, run, step};
use crate::workspace::Workspace;
use crate::{machine, packages};

/// Raised when a field of the JSON output changes its meaning or goes away.
const SCHEMA_VERSION: u32 = 1;

/// Port of the iperf3 server; it is alone in its namespace.
const PORT: &str = "5201";

/// Bytes of each small datagram.
const SMALL_DATAGRAM: &str = "64";

#[derive(Args)]
pub(crate) struct Arguments {
    /// How often each carrier has its turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of each measurement in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Measure the release build
    #[arg(long)]
    release: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Carrier, quantity, values.
type Results = BTreeMap<&'static str, BTreeMap<&'static str, Samples>>;

/// What is measured, with the heading of its column, and how many decimals it deserves.
const QUANTITIES: &[(&str, &str, usize)] = &[
    ("tcp_1_stream_gbit_per_s", "1 stream, Gbit/s", 2),
    ("tcp_4_streams_gbit_per_s", "4 streams, Gbit/s", 2),
    ("engine_cpu_s_per_gb", "CPU s per GB, both ends", 2),
    ("ping_under_load_p50_ms", "ping p50 under load, ms", 2),
    ("udp_64_bytes_received_kpps", "64 B received, k/s", 0),
];

/// Measures all carriers in turns and prints the result.
pub(crate) fn measure(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    machine::require_root("the measurement")?;
    packages::ensure(&[packages::BUILD, packages::BENCH_ENGINE])?;
    machine::require_networking()?;
    let mut build = workspace.cargo();
    build.args(["build", "--package", "mesh-engine", "--bin", "mesh-wg"]);
    if arguments.release {
        build.arg("--release");
    }
    if arguments.json {
        // Standard output belongs to the result.
        run(build.arg("--quiet"))?;
    } else {
        step("build mesh-wg").run(&mut build)?;
    }
    let profile = if arguments.release { "release" } else { "debug" };
    let engine = workspace.target_dir().join(profile).join("mesh-wg");

    let mut results = Results::new();
    for round in 1..=arguments.rounds {
        for carrier in Carrier::ALL {
            if !arguments.json {
                println!("round {round} of {}: {}", arguments.rounds, carrier.name());
            }
            let measured = measure_once(&engine, carrier, arguments.seconds)
                .with_context(|| format!("{} in round {round}", carrier.name()))?;
            for (quantity, value) in measured {
                results.entry(carrier.name()).or_default().entry(quantity).or_default().push(value);
            }
        }
    }
    if arguments.json {
        println!("{:#}", as_json(&results, arguments, profile));
    } else {
        print_table(&results);
    }
    Ok(())
}

/// One turn of one carrier.
fn measure_once(engine: &Path, carrier: Carrier, seconds: u32) -> Result<Vec<(&'static str, f64)>> {
    let network = Network::new(engine, carrier)?;
    let _server = Server::start(&network)?;
    let mut measured = Vec::new();

    let before = network.engine_seconds()?;
    let single = received(&load(&network, seconds, &[])?)?;
    let after = network.engine_seconds()?;
    measured.push(("tcp_1_stream_gbit_per_s", single.bits_per_second / 1e9));
    if let (Some(before), Some(after)) = (before, after) {
        measured.push(("engine_cpu_s_per_gb", (after - before) / (single.bytes / 1e9)));
    }

    let parallel = received(&load(&network, seconds, &["--parallel", "4"])?)?;
    measured.push(("tcp_4_streams_gbit_per_s", parallel.bits_per_second / 1e9));

    // The pings start a second into the load and end a second before it does.
    let (loaded, pings) = std::thread::scope(|scope| {
        let load = scope.spawn(|| load(&network, seconds + 2, &[]));
        std::thread::sleep(Duration::from_secs(1));
        let count = (seconds * 50).to_string();
        let pings =
            capture(network.inside(0, "ping").args(["-n", "-i", "0.02", "-c", &count, network.address(1)]));
        (load.join(), pings)
    });
    loaded.map_err(|_panic| anyhow!("the load stopped with a panic"))??;
    measured.push(("ping_under_load_p50_ms", round_trips(&pings?).median().context("no ping was answered")?));

    let small = load(&network, seconds, &["--udp", "--length", SMALL_DATAGRAM, "--bitrate", "0"])?;
    measured.push(("udp_64_bytes_received_kpps", datagrams_per_second(&small)? / 1e3));
    Ok(measured)
}

/// An iperf3 server at end 1.
struct Server(Child);

impl Server {
    fn start(network: &Network) -> Result<Self> {
        let mut command = network.inside(1, "iperf3");
        command.args(["--server", "--port", PORT]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn().context("cannot start iperf3")?);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            // Both families: iperf3 listens on a dual-stack socket.
            let listening = capture(network.inside(1, "ss").args(["-Hltn", &format!("sport = :{PORT}")]))?;
            if !listening.trim().is_empty() {
                return Ok(server);
            }
            if Instant::now() >= deadline {
                bail!("the iperf3 server does not listen");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It goes away with its namespace's last process in any case.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Sends from end 0 to end 1 and gives iperf3's report.
fn load(network: &Network, seconds: u32, options: &[&str]) -> Result<Value> {
    let mut client = network.inside(0, "iperf3");
    client.args(["--client", network.address(1), "--port", PORT, "--time", &seconds.to_string(), "--json"]);
    let report = capture(client.args(options))?;
    serde_json::from_str(&report).context("the report of iperf3")
}

#[derive(Debug, PartialEq)]
struct Received {
    bytes: f64,
    bits_per_second: f64,
}

fn received(report: &Value) -> Result<Received> {
    let sum = &report["end"]["sum_received"];
    let number =
        |field: &str| sum[field].as_f64().with_context(|| format!("iperf3 reports no {field}: {report}"));
    Ok(Received { bytes: number("bytes")?, bits_per_second: number("bits_per_second")? })
}

fn datagrams_per_second(report: &Value) -> Result<f64> {
    let sum = &report["end"]["sum"];
    let number =
        |field: &str| sum[field].as_f64().with_context(|| format!("iperf3 reports no {field}: {report}"));
    Ok((number("packets")? - number("lost_packets")?) / number("seconds")?)
}

/// The times in the output of `ping`, in milliseconds.
fn round_trips(output: &str) -> Samples {
    let time = |line: &str| line.split("time=").nth(1)?.split(' ').next()?.parse().ok();
    output.lines().filter_map(time).collect()
}

fn as_json(results: &Results, arguments: &Arguments, profile: &str) -> Value {
    let carriers: serde_json::Map<String, Value> = results
        .iter()
        .map(|(carrier, quantities)| {
            let values: serde_json::Map<String, Value> =
                quantities.iter().map(|(name, samples)| ((*name).to_owned(), samples.to_json())).collect();
            ((*carrier).to_owned(), values.into())
        })
        .collect();
    json!({
        "schema_version": SCHEMA_VERSION,
        "suite": "engine",
        "profile": profile,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "carriers": carriers,
    })
}

fn print_table(results: &Results) {
    println!("\nmedian (smallest–largest)");
    print!("{:<28}", "");
    for carrier in Carrier::ALL {
        print!("{:>26}", carrier.name());
    }
    println!();
    let none = Samples::default();
    for (quantity, heading, decimals) in QUANTITIES {
        print!("{heading:<28}");
        for carrier in Carrier::ALL {
            let samples = results.get(carrier.name()).and_then(|found| found.get(quantity)).unwrap_or(&none);
            print!("{:>26}", samples.shown(*decimals));
        }
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_iperf3_are_read() {
        let tcp = json!({"end": {"sum_received": {"bytes": 1e9, "bits_per_second": 8e9}}});
        assert_eq!(received(&tcp).unwrap(), Received { bytes: 1e9, bits_per_second: 8e9 });
        let udp = json!({"end": {"sum": {"packets": 300, "lost_packets": 100, "seconds": 2.0}}});
        assert_eq!(datagrams_per_second(&udp).unwrap(), 100.0);
        assert!(received(&udp).unwrap_err().to_string().contains("bytes"));
    }

    #[test]
    fn times_of_ping_are_read() {
        let output = "PING x\n64 bytes from x: icmp_seq=1 ttl=64 time=0.25 ms\n\
                      64 bytes from x: icmp_seq=2 ttl=64 time=0.75 ms\n--- x ping statistics ---\n";
        assert_eq!(round_trips(output).median(), Some(0.5));
    }
}
