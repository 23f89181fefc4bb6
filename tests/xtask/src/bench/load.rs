//! The loads: iperf3 and ping between the two ends, and what their reports say.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::network::Network;
use super::samples::Samples;
use crate::command::capture;

/// Port of the iperf3 server; it is alone in its namespace.
const PORT: &str = "5201";

/// Seconds that iperf3 may take beyond its load, for its own talk through a tunnel full of packets.
const GRACE_SECONDS: u32 = 20;

/// Seconds that are watched for idleness, at least.
const IDLE_SECONDS: u32 = 3;

/// Echo requests for each second, and the time between two of them.
const PINGS_PER_SECOND: u32 = 100;
const PING_INTERVAL: &str = "0.01";

/// What goes on during a measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// Nothing: what do the engines cost that are not needed?
    Nothing,
    /// TCP at full speed.
    Tcp {
        /// IPv4 or IPv6, inside.
        family: Family,
        /// Connections at once.
        streams: u8,
        /// Who sends.
        direction: Direction,
    },
    /// Echo requests beside TCP over IPv4 at full speed.
    Ping {
        /// Connections at once; none when there are the echo requests alone.
        streams: u8,
    },
    /// UDP as fast as the sender can.
    Udp {
        /// Payload of each datagram.
        bytes: u16,
    },
    /// Nothing: how much memory has everything so far taken?
    Memory,
}

/// The version of IP inside a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// End 0, which has opened the connection.
    Forward,
    /// End 1.
    Reverse,
}

impl Load {
    /// Measures for so many seconds, and gives the values of the test's quantities, in their order; fewer where a
    /// carrier without engines has no answer.
    pub(crate) fn measure(self, network: &Network, seconds: u32) -> Result<Vec<f64>> {
        match self {
            Self::Nothing => idleness(network, seconds.max(IDLE_SECONDS)),
            Self::Tcp { family, streams, direction } => tcp(network, seconds, family, streams, direction),
            Self::Ping { streams } => {
                let times = if streams == 0 {
                    ping(network, seconds)?
                } else {
                    ping_under_load(network, seconds, streams)?
                };
                [0.5, 0.99]
                    .map(|share| times.quantile(share).context("no ping was answered"))
                    .into_iter()
                    .collect()
            }
            Self::Udp { bytes } => {
                let (length, window) = (bytes.to_string(), udp_window()?.to_string());
                let options = ["--udp", "--length", &length, "--bitrate", "0", "--window", &window];
                let received = received(&iperf(network, seconds, Family::V4, &options)?)?;
                Ok(vec![received.bytes / f64::from(bytes) / received.seconds / 1e3])
            }
            Self::Memory => Ok(network.engine_memory()?.into_iter().collect()),
        }
    }
}

/// Processor time in milliseconds for each second, and wake-ups for each second, of both engines.
fn idleness(network: &Network, seconds: u32) -> Result<Vec<f64>> {
    let Some(before) = network.engine_usage()? else { return Ok(Vec::new()) };
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = network.engine_usage()?.context("the engines are gone")?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(vec![(after.cpu - before.cpu) * 1e3 / seconds, (after.waits - before.waits) / seconds])
}

/// Throughput in Gbit/s, and processor time of both engines in seconds for each GB.
fn tcp(
    network: &Network,
    seconds: u32,
    family: Family,
    streams: u8,
    direction: Direction,
) -> Result<Vec<f64>> {
    let streams = streams.to_string();
    let mut options = vec!["--parallel", &streams];
    if direction == Direction::Reverse {
        options.push("--reverse");
    }
    let before = network.engine_seconds()?;
    let received = received(&iperf(network, seconds, family, &options)?)?;
    let after = network.engine_seconds()?;
    let cpu = before.zip(after).map(|(before, after)| (after - before) / (received.bytes / 1e9));
    Ok([Some(received.bytes * 8.0 / received.seconds / 1e9), cpu].into_iter().flatten().collect())
}

/// Round-trip times in milliseconds, without those that were lost.
fn ping(network: &Network, seconds: u32) -> Result<Samples> {
    let count = (seconds * PINGS_PER_SECOND).to_string();
    let mut ping = network.inside(0, "ping");
    ping.args(["-n", "-i", PING_INTERVAL, "-c", &count, "-W", "2", network.address(1, Family::V4)]);
    Ok(round_trips(&capture(&mut ping)?))
}

/// The same; the pings start a second into the load and end a second before it does.
fn ping_under_load(network: &Network, seconds: u32, streams: u8) -> Result<Samples> {
    let streams = streams.to_string();
    let (loaded, pings) = std::thread::scope(|scope| {
        let load = scope.spawn(|| iperf(network, seconds + 2, Family::V4, &["--parallel", &streams]));
        std::thread::sleep(Duration::from_secs(1));
        let pings = ping(network, seconds);
        (load.join(), pings)
    });
    let report = loaded.map_err(|_panic| anyhow!("the load stopped with a panic"))??;
    received(&report)?;
    pings
}

/// The largest socket buffer for UDP, in bytes, that sender and receiver may have; 4 MiB is enough. The usual one is
/// full after 300 small datagrams, which measures how soon the receiver gets a processor and not the carrier.
fn udp_window() -> Result<u64> {
    let limit = |name: &str| -> Result<u64> {
        let path = format!("/proc/sys/net/core/{name}");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.trim().parse().with_context(|| format!("{path} holds no number"))
    };
    Ok(limit("rmem_max")?.min(limit("wmem_max")?).min(4 << 20))
}

/// An iperf3 server at end 1; it ends when dropped.
pub(crate) struct Server(Child);

impl Server {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(network: &Network) -> Result<Self> {
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

/// Runs a load between the ends and gives iperf3's report.
fn iperf(network: &Network, seconds: u32, family: Family, options: &[&str]) -> Result<Value> {
    // iperf3 waits for minutes when a tunnel has died. In the foreground, Ctrl-C reaches it.
    let mut client = network.inside(0, "timeout");
    client.args(["--foreground", "--kill-after", "5", &(seconds + GRACE_SECONDS).to_string(), "iperf3"]);
    client.args(["--client", network.address(1, family), "--port", PORT]);
    client.args(["--time", &seconds.to_string(), "--json"]).args(options);
    report(&mut client, seconds)
}

fn report(client: &mut Command, seconds: u32) -> Result<Value> {
    let output = client.stdin(Stdio::null()).output().context("cannot run iperf3")?;
    // What `timeout` says when it had to end it.
    if output.status.code() == Some(124) {
        bail!("a load of {seconds} s had not ended {GRACE_SECONDS} s later");
    }
    // Errors too are part of the report.
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| {
        format!("iperf3 ({}) said {:?}", output.status, String::from_utf8_lossy(&output.stderr))
    })?;
    match report["error"].as_str() {
        Some(error) => bail!("iperf3: {error}"),
        None => Ok(report),
    }
}

/// What arrived, according to the receiver.
#[derive(Debug, PartialEq)]
struct Received {
    bytes: f64,
    seconds: f64,
}

fn received(report: &Value) -> Result<Received> {
    let sum = &report["end"]["sum_received"];
    let number =
        |field: &str| sum[field].as_f64().with_context(|| format!("iperf3 reports no {field}: {report}"));
    let received = Received { bytes: number("bytes")?, seconds: number("seconds")? };
    if received.bytes <= 0.0 || received.seconds <= 0.0 {
        bail!("nothing arrived in {} s", received.seconds);
    }
    Ok(received)
}

/// The times in the output of `ping`, in milliseconds.
fn round_trips(output: &str) -> Samples {
    let time = |line: &str| line.split("time=").nth(1)?.split(' ').next()?.parse().ok();
    output.lines().filter_map(time).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reports_of_iperf3_are_read() {
        let report = json!({"end": {"sum_received": {"bytes": 1e9, "seconds": 2.0}}});
        assert_eq!(received(&report).unwrap(), Received { bytes: 1e9, seconds: 2.0 });
        let empty = json!({"end": {"sum_received": {"bytes": 0, "seconds": 2.0}}});
        assert!(received(&empty).unwrap_err().to_string().contains("nothing arrived"));
        let other = json!({"end": {}});
        assert!(received(&other).unwrap_err().to_string().contains("bytes"));
    }

    #[test]
    fn errors_of_iperf3_are_told() {
        let mut client = Command::new("echo");
        let error = report(client.arg(r#"{"error": "unable to connect"}"#), 1).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
    }

    #[test]
    fn times_of_ping_are_read() {
        let output = "PING x\n64 bytes from x: icmp_seq=1 ttl=64 time=0.25 ms\n\
                      64 bytes from x: icmp_seq=2 ttl=64 time=0.75 ms\n--- x ping statistics ---\n";
        assert_eq!(round_trips(output).median(), Some(0.5));
    }
}
