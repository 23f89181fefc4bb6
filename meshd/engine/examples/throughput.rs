//! Measures TCP through two `mesh-wg`, beside plain veth and Debian's `wireguard-go` in the same run. Needs root and
//! iperf3:
//!
//! `cargo build -p mesh-engine && cargo run -p mesh-engine --example throughput [SECONDS [RUNS]]`
//!
//! Prints medians. Both ends and the load share the cores of this machine.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    reason = "a measurement shares the tests' scaffolding, prints, and fails by panicking"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use support::{Kind, Link, Namespace, Underlay, eventually, joined_namespaces, require_root};

/// What one run of iperf3 said.
struct Sample {
    gbits: f64,
    ping_ms: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Gbit/s received and median round trip under load.
fn measure(from: &Namespace, to: &Namespace, address: &str, streams: u32, seconds: u64) -> Sample {
    let mut server =
        to.command("iperf3").args(["-s", "-1"]).stdout(std::process::Stdio::null()).spawn().unwrap();
    eventually("iperf3 listens", Duration::from_secs(5), || to.exec(&["ss", "-Hltn"]).contains(":5201"));
    let interval = "0.05";
    let count = (seconds * 20).saturating_sub(10).max(1).to_string();
    let ping = from
        .command("ping")
        .args(["-n", "-q", "-i", interval, "-c", &count, address])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (time, streams) = (seconds.to_string(), streams.to_string());
    let text = from.exec(&["iperf3", "-c", address, "-t", &time, "-O", "1", "-P", &streams, "-f", "m"]);
    server.wait().unwrap();
    let ping = String::from_utf8_lossy(&ping.wait_with_output().unwrap().stdout).into_owned();
    let ping_ms = ping.rsplit("= ").next().and_then(|v| v.split('/').nth(1)).and_then(|v| v.parse().ok());
    // The last line for the receiver: of the only stream, or the sum.
    let line = text.lines().rfind(|line| line.contains("receiver")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    let at = words.iter().position(|word| word.ends_with("bits/sec")).unwrap();
    Sample { gbits: words[at - 1].parse::<f64>().unwrap() / 1000.0, ping_ms: ping_ms.unwrap_or(f64::NAN) }
}

/// `cpu` reads the processor time of the tunnels on the way, in seconds.
fn row(name: &str, runs: usize, seconds: u64, ends: [&Namespace; 2], address: &str, cpu: impl Fn() -> f64) {
    for streams in [1, 4] {
        let before = cpu();
        let samples: Vec<_> =
            (0..runs).map(|_| measure(ends[0], ends[1], address, streams, seconds)).collect();
        // iperf3 leaves out its first second, the tunnels' clocks do not.
        let gigabytes: f64 = samples.iter().map(|s| s.gbits / 8.0 * (seconds + 1) as f64).sum();
        let gbits = median(samples.iter().map(|sample| sample.gbits).collect());
        let ping = median(samples.iter().map(|sample| sample.ping_ms).collect());
        let per_gigabyte = (cpu() - before) / gigabytes;
        println!(
            "{name:<14} {streams} stream(s): {gbits:>6.2} Gbit/s, {per_gigabyte:>5.2} CPU s per GB in the tunnels, \
             ping under load {ping:.2} ms"
        );
    }
}

fn main() {
    require_root();
    // Logs cost time where there are many.
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().unwrap());
    let seconds = arguments.next().unwrap_or(5);
    let runs = usize::try_from(arguments.next().unwrap_or(3)).unwrap();

    {
        let [a, b] = joined_namespaces();
        row("veth", runs, seconds, [&a, &b], "192.0.2.2", || 0.0);
    }
    for (name, kind) in [("mesh-wg", Kind::Mesh), ("wireguard-go", Kind::Go)] {
        let link = Link::new([kind; 2], Underlay::V4, None);
        link.check_ping();
        let resident = |when: &str| {
            let [a, b] = link.ends.each_ref().map(|end| end.device.resident());
            println!("{name:<14} resident {when}: {a} and {b} KiB");
        };
        resident("with one session");
        let cpu = || link.ends.iter().map(|end| end.device.cpu_seconds()).sum();
        row(name, runs, seconds, link.ends.each_ref().map(|end| &end.namespace), "10.9.0.2", cpu);
        resident("after the load");
    }
}
