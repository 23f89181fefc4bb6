//! Two ends in network namespaces of their own, joined by a veth pair, and the engines that can run between them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::{capture, find_program, run, succeeds};

/// Underlay addresses of the two ends (TEST-NET-1).
const OUTER: [&str; 2] = ["192.0.2.1", "192.0.2.2"];

/// MTU of the underlay, in bytes.
const UNDERLAY_MTU: u32 = 1500;

/// MTU inside WireGuard over IPv4 or IPv6 on that underlay.
const TUNNEL_MTU: u32 = UNDERLAY_MTU - 80;

/// How long an engine may take until its device or socket is there.
const START_LIMIT: Duration = Duration::from_secs(10);

/// What carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// The veth pair itself.
    Veth,
    /// Our engine.
    MeshWg,
    /// The reference userspace implementation, as Debian ships it.
    WireguardGo,
}

impl Carrier {
    /// All, in the order in which they take turns.
    pub(crate) const ALL: [Self; 3] = [Self::Veth, Self::WireguardGo, Self::MeshWg];

    /// How it is called in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::MeshWg => "mesh-wg",
            Self::WireguardGo => "wireguard-go",
        }
    }
}

/// Both ends with one carrier between them; goes away with everything in it when dropped.
pub(crate) struct Network {
    ends: [End; 2],
    engines: Vec<Engine>,
}

/// One end: a network namespace.
struct End {
    namespace: String,
    device: String,
    /// The address to send to, on this carrier.
    inner: String,
}

/// A running engine.
struct Engine {
    process: Child,
    socket: PathBuf,
}

impl Network {
    /// Builds the ends and starts the carrier; tunnels have completed a handshake when this returns.
    pub(crate) fn new(mesh_wg: &Path, carrier: Carrier) -> Result<Self> {
        let id = std::process::id();
        let end = |index: usize| match carrier {
            Carrier::Veth => End {
                namespace: format!("hbk-bench-{id}-{index}"),
                device: format!("hbkv{index}"),
                inner: OUTER[index].to_owned(),
            },
            Carrier::MeshWg | Carrier::WireguardGo => End {
                namespace: format!("hbk-bench-{id}-{index}"),
                // In the name of the UAPI socket too, which all namespaces share.
                device: format!("hb{id}w{index}"),
                inner: format!("198.51.100.{}", index + 1),
            },
        };
        // From here on the value cleans up after itself, also when a step below fails.
        let mut network = Self { ends: [end(0), end(1)], engines: Vec::new() };
        network.build_underlay()?;
        match carrier {
            Carrier::Veth => {}
            Carrier::MeshWg => network.start_engines(mesh_wg)?,
            Carrier::WireguardGo => {
                network.start_engines(&find_program("wireguard-go").context("no program wireguard-go")?)?;
            }
        }
        network.wait_for_answer()?;
        Ok(network)
    }

    /// A command inside an end.
    pub(crate) fn inside(&self, end: usize, program: &str) -> Command {
        inside(&self.ends[end], program)
    }

    /// The address of an end on the carrier.
    pub(crate) fn address(&self, end: usize) -> &str {
        &self.ends[end].inner
    }

    /// Processor time of all engines so far, in seconds; `None` when the carrier has none.
    pub(crate) fn engine_seconds(&self) -> Result<Option<f64>> {
        if self.engines.is_empty() {
            return Ok(None);
        }
        let times: Result<Vec<f64>> =
            self.engines.iter().map(|engine| cpu_seconds(engine.process.id())).collect();
        Ok(Some(times?.iter().sum()))
    }

    fn build_underlay(&self) -> Result<()> {
        let [a, b] = &self.ends;
        for end in &self.ends {
            run(Command::new("ip").args(["netns", "add", &end.namespace]))?;
            run(inside(end, "ip").args(["link", "set", "lo", "up"]))?;
        }
        let pair = ["link", "add", "hbkv0", "type", "veth", "peer", "name", "hbkv1", "netns", &b.namespace];
        run(inside(a, "ip").args(pair))?;
        for (index, end) in self.ends.iter().enumerate() {
            let device = format!("hbkv{index}");
            run(inside(end, "ip").args(["address", "add", &format!("{}/24", OUTER[index]), "dev", &device]))?;
            run(inside(end, "ip").args(["link", "set", &device, "mtu", &UNDERLAY_MTU.to_string(), "up"]))?;
        }
        Ok(())
    }

    fn start_engines(&mut self, program: &Path) -> Result<()> {
        let private =
            [capture(Command::new("wg").arg("genkey"))?, capture(Command::new("wg").arg("genkey"))?];
        let public = [public_key(&private[0])?, public_key(&private[1])?];
        for end in &self.ends {
            let mut command = inside(end, &program.to_string_lossy());
            command
                .args(["-f", &end.device])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::inherit());
            command.env("LOG_LEVEL", "error");
            let process = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
            let socket = PathBuf::from(format!("/var/run/wireguard/{}.sock", end.device));
            self.engines.push(Engine { process, socket });
            if let Some(engine) = self.engines.last_mut() {
                Self::wait_for_engine(end, engine)?;
            }
        }
        for (index, end) in self.ends.iter().enumerate() {
            let other = 1 - index;
            // The key goes in by standard input: an argument would be seen by every user of the machine.
            let mut set = inside(end, "wg");
            set.args(["set", &end.device, "listen-port", "51820", "private-key", "/dev/stdin"]);
            set.args(["peer", &public[other], "endpoint", &format!("{}:51820", OUTER[other])]);
            set.args(["allowed-ips", &format!("{}/32", self.ends[other].inner)]);
            feed(&mut set, &private[index])?;
            let address = format!("{}/24", end.inner);
            run(inside(end, "ip").args(["address", "add", &address, "dev", &end.device]))?;
            run(inside(end, "ip").args(["link", "set", &end.device, "mtu", &TUNNEL_MTU.to_string(), "up"]))?;
        }
        Ok(())
    }

    fn wait_for_engine(end: &End, engine: &mut Engine) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = engine.process.try_wait()? {
                bail!("the engine on {} ended at once ({status})", end.device);
            }
            let socket = engine.socket.exists();
            if socket && succeeds(inside(end, "ip").args(["link", "show", "dev", &end.device])) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the engine on {} has made no device and socket", end.device);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for_answer(&self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while !succeeds(self.inside(0, "ping").args(["-c", "1", "-W", "1", self.address(1)])) {
            if Instant::now() >= deadline {
                bail!("{} does not answer to a ping", self.address(1));
            }
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Nothing below can be reported better than by what it leaves behind.
        for engine in &mut self.engines {
            succeeds(Command::new("kill").args(["-TERM", &engine.process.id().to_string()]));
            let deadline = Instant::now() + Duration::from_secs(2);
            while engine.process.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ended = engine.process.kill();
            let _reaped = engine.process.wait();
            let _removed = std::fs::remove_file(&engine.socket);
        }
        for end in &self.ends {
            succeeds(Command::new("ip").args(["netns", "del", &end.namespace]));
        }
    }
}

fn inside(end: &End, program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &end.namespace, program]);
    command
}

fn public_key(private: &str) -> Result<String> {
    Ok(feed(Command::new("wg").arg("pubkey"), private)?.trim().to_owned())
}

/// Runs a program with this standard input and gives its standard output.
fn feed(command: &mut Command, input: &str) -> Result<String> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run `wg`")?;
    child.stdin.take().context("no pipe")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("`wg` failed ({})", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// User and system time of a process, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("an engine has ended")?;
    ticks(&stat)
        .map(|ticks| ticks as f64 / TICKS_PER_SECOND)
        .context("cannot read the times in /proc/PID/stat")
}

/// utime and stime (proc(5), fields 14 and 15); the name in field 2 may hold anything, so count after it.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// `USER_HZ` is 100 on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("7 (x"), None);
    }
}
