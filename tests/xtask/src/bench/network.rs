//! Two ends in network namespaces of their own, joined by a veth pair, and one carrier between them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::carrier::{Carrier, Program};
use super::load::Family;
use super::middle::{self, Middle, WIRES, Way};
use super::process::{self, Usage};
use crate::command::{capture, run, succeeds};

/// What all carriers of a run have in common.
pub(crate) struct Ground {
    /// MTU of the veth pair, in bytes.
    pub(crate) mtu: u32,
    /// The processors that everything runs on, as `taskset` lists them; `None` for all.
    pub(crate) cpus: Option<String>,
}

/// Both ends with one carrier between them; goes away with everything in it when dropped.
pub(crate) struct Network {
    carrier: Carrier,
    cpus: Option<String>,
    ends: [End; 2],
    engines: Vec<Engine>,
    /// What is between them, unless that is a wire.
    middle: Option<Middle>,
    /// Their public keys, where something is between them.
    keys: Option<[String; 2]>,
}

/// One end: a network namespace.
struct End {
    namespace: String,
    /// Its end of the veth pair.
    underlay: String,
    /// The device of the carrier.
    device: String,
    /// The addresses to send to on this carrier, of each family.
    v4: String,
    v6: String,
}

/// A running engine.
struct Engine {
    process: Child,
    socket: PathBuf,
}

impl Network {
    /// Builds the ends and starts the carrier. When this returns, tunnels have completed a handshake and carry
    /// packets of their full size.
    pub(crate) fn new(carrier: Carrier, program: Option<&Program>, ground: &Ground) -> Result<Self> {
        // From here on the value cleans up after itself, also when a step below fails.
        let ends = [End::new(carrier, 0), End::new(carrier, 1)];
        let mut network =
            Self { carrier, cpus: ground.cpus.clone(), ends, engines: Vec::new(), middle: None, keys: None };
        network.build_underlay(ground.mtu)?;
        match program {
            Some(program) => {
                network.start_engines(program)?;
                network
                    .configure_engines([1, 0].map(|other| format!("{}:{WIREGUARD_PORT}", OUTER_V4[other])))?;
            }
            None if carrier == Carrier::Vxlan => network.build_vxlan()?,
            None => {}
        }
        if carrier != Carrier::Veth {
            network.raise_devices(carrier.mtu(ground.mtu))?;
        }
        network.wait_for_answer()?;
        network.wait_for_full_size(carrier.mtu(ground.mtu))?;
        Ok(network)
    }

    /// Our engine at both ends, and a host between them: see [`Way`]. `relay` is the program that passes on.
    pub(crate) fn across(way: Way, engine: &Program, relay: &Path, ground: &Ground) -> Result<Self> {
        let carrier = Carrier::MeshWg;
        let letter = char::from(b'p' + way as u8);
        let ends = [0, 1].map(|index| End::named(way.name(), &format!("hbkv{index}"), letter, index));
        let mut network =
            Self { carrier, cpus: ground.cpus.clone(), ends, engines: Vec::new(), middle: None, keys: None };
        for index in 0..2 {
            run(Command::new("ip").args(["netns", "add", &network.ends[index].namespace]))?;
            network.ip(index, &["link", "set", "lo", "up"])?;
        }
        let middle = Middle::new(format!("{NAMESPACE_PREFIX}{}-{}-m", std::process::id(), way.name()))?;
        let middle = network.middle.insert(middle);
        for (index, end) in network.ends.iter().enumerate() {
            middle.connect(index, &end.namespace, &end.underlay, ground.mtu)?;
        }
        network.start_engines(engine)?;
        let keys = network.configure_engines([0, 1].map(|index| match way {
            Way::Direct => format!("{}:{WIREGUARD_PORT}", WIRES[1 - index][1]),
            Way::Relay | Way::Forwarder | Way::Dnat => format!("{}:{}", WIRES[index][0], middle::PORT),
        }))?;
        if let Some(middle) = &mut network.middle {
            middle.start(way, relay, lane_addresses(), &keys)?;
        }
        network.keys = Some(keys);
        network.raise_devices(carrier.mtu(ground.mtu))?;
        network.wait_for_answer()?;
        network.wait_for_full_size(carrier.mtu(ground.mtu))?;
        Ok(network)
    }

    /// Processor time of what passes on between the ends, in seconds; `None` when the kernel does.
    pub(crate) fn middle_seconds(&self) -> Result<Option<f64>> {
        self.middle.as_ref().map_or(Ok(None), Middle::seconds)
    }

    /// The host between the ends.
    pub(crate) fn middle(&mut self) -> Result<&mut Middle> {
        self.middle.as_mut().context("nothing is between the ends")
    }

    /// What the relay serves: `KEY@ADDRESS` for each end.
    pub(crate) fn lanes(&self) -> Vec<String> {
        let keys = self.keys.iter().flatten();
        keys.zip(lane_addresses()).map(|(key, address)| format!("{key}@{address}")).collect()
    }

    /// What is between the ends.
    pub(crate) fn carrier(&self) -> Carrier {
        self.carrier
    }

    /// A command inside an end.
    pub(crate) fn inside(&self, end: usize, program: impl AsRef<Path>) -> Command {
        let program = program.as_ref();
        let enter = ["netns", "exec", &self.ends[end].namespace];
        let mut command = match &self.cpus {
            Some(cpus) => {
                let mut command = Command::new("taskset");
                command.args(["--cpu-list", cpus, "ip"]);
                command
            }
            None => Command::new("ip"),
        };
        command.args(enter).arg(program);
        command
    }

    /// The address of an end on the carrier.
    pub(crate) fn address(&self, end: usize, family: Family) -> &str {
        match family {
            Family::V4 => &self.ends[end].v4,
            Family::V6 => &self.ends[end].v6,
        }
    }

    /// Processor time of both engines so far, in seconds; `None` when the carrier has none.
    pub(crate) fn engine_seconds(&self) -> Result<Option<f64>> {
        let times = self.of_engines(process::cpu_seconds)?;
        Ok(times.into_iter().reduce(|sum, seconds| sum + seconds))
    }

    /// What the living threads of both engines have used so far; `None` when the carrier has none.
    pub(crate) fn engine_usage(&self) -> Result<Option<Usage>> {
        let usages = self.of_engines(process::usage)?;
        let sum = |a: Usage, b: Usage| Usage { cpu: a.cpu + b.cpu, waits: a.waits + b.waits };
        Ok(usages.into_iter().reduce(sum))
    }

    /// Resident memory of the larger engine, in MiB; `None` when the carrier has none.
    pub(crate) fn engine_memory(&self) -> Result<Option<f64>> {
        Ok(self.of_engines(process::resident_mib)?.into_iter().reduce(f64::max))
    }

    /// Waits until end 1 answers in both families. A session that has expired is renewed on the way.
    pub(crate) fn wait_for_answer(&self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        for family in [Family::V4, Family::V6] {
            while !self.is_answered(family, 56) {
                if Instant::now() >= deadline {
                    bail!("{} does not answer to a ping", self.address(1, family));
                }
            }
        }
        Ok(())
    }

    /// As above, with packets of `mtu` bytes; so a carrier with smaller buffers is told from a slow one.
    fn wait_for_full_size(&self, mtu: u32) -> Result<()> {
        for (family, headers) in [(Family::V4, 20 + 8), (Family::V6, 40 + 8)] {
            if !(0..FULL_SIZE_ATTEMPTS).any(|_| self.is_answered(family, mtu - headers)) {
                bail!("{} does not answer to a ping of {mtu} bytes", self.address(1, family));
            }
        }
        Ok(())
    }

    fn is_answered(&self, family: Family, payload: u32) -> bool {
        let size = payload.to_string();
        // Never in fragments.
        let mut ping = self.inside(0, "ping");
        ping.args(["-n", "-c", "1", "-W", "1", "-M", "do", "-s", &size, self.address(1, family)]);
        succeeds(&mut ping)
    }

    fn of_engines<T>(&self, ask: impl Fn(u32) -> Result<T>) -> Result<Vec<T>> {
        self.engines.iter().map(|engine| ask(engine.process.id())).collect()
    }

    fn ip(&self, end: usize, words: &[&str]) -> Result<()> {
        run(self.inside(end, "ip").args(words))
    }

    fn build_underlay(&self, mtu: u32) -> Result<()> {
        let [a, b] = &self.ends;
        for (index, end) in self.ends.iter().enumerate() {
            run(Command::new("ip").args(["netns", "add", &end.namespace]))?;
            self.ip(index, &["link", "set", "lo", "up"])?;
        }
        let pair = ["type", "veth", "peer", "name", &b.underlay, "netns", &b.namespace];
        self.ip(0, &[&["link", "add", a.underlay.as_str()], &pair[..]].concat())?;
        let mtu = mtu.to_string();
        for (index, end) in self.ends.iter().enumerate() {
            self.add_addresses(index, &end.underlay, OUTER_V4[index], OUTER_V6[index])?;
            self.ip(index, &["link", "set", &end.underlay, "mtu", &mtu, "up"])?;
        }
        Ok(())
    }

    fn add_addresses(&self, end: usize, device: &str, v4: &str, v6: &str) -> Result<()> {
        self.ip(end, &["address", "add", &format!("{v4}/24"), "dev", device])?;
        // Nobody else can have it, so it need not wait until duplicates are ruled out.
        self.ip(end, &["address", "add", &format!("{v6}/64"), "dev", device, "nodad"])
    }

    fn build_vxlan(&self) -> Result<()> {
        for (index, end) in self.ends.iter().enumerate() {
            let (here, there) = (OUTER_V4[index], OUTER_V4[1 - index]);
            let kind = ["type", "vxlan", "id", "1", "dstport", "4789", "local", here, "remote", there];
            self.ip(index, &[&["link", "add", end.device.as_str()], &kind[..]].concat())?;
        }
        Ok(())
    }

    fn raise_devices(&self, mtu: u32) -> Result<()> {
        let mtu = mtu.to_string();
        for (index, end) in self.ends.iter().enumerate() {
            self.add_addresses(index, &end.device, &end.v4, &end.v6)?;
            self.ip(index, &["link", "set", &end.device, "mtu", &mtu, "up"])?;
        }
        Ok(())
    }

    fn start_engines(&mut self, program: &Program) -> Result<()> {
        for index in 0..self.ends.len() {
            let end = &self.ends[index];
            let mut command = self.inside(index, &program.path);
            command.args(program.options).arg(&end.device).envs(program.environment.iter().copied());
            // Some log to standard output, which belongs to the results.
            command.stdin(Stdio::null()).stdout(std::io::stderr()).stderr(Stdio::inherit());
            let process =
                command.spawn().with_context(|| format!("cannot start {}", program.path.display()))?;
            let socket = PathBuf::from(format!("{SOCKET_DIR}/{}.sock", end.device));
            self.engines.push(Engine { process, socket });
            self.wait_for_engine(index)?;
        }
        Ok(())
    }

    fn wait_for_engine(&mut self, index: usize) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        let device = self.ends[index].device.clone();
        loop {
            let engine = &mut self.engines[index];
            if let Some(status) = engine.process.try_wait()? {
                bail!("the engine on {device} ended at once ({status})");
            }
            let socket = engine.socket.exists();
            if socket && succeeds(self.inside(index, "ip").args(["link", "show", "dev", &device])) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the engine on {device} has made no device and socket");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes keys, and the ends each other's peers, at these endpoints. Returns the public keys.
    fn configure_engines(&self, endpoints: [String; 2]) -> Result<[String; 2]> {
        let private =
            [capture(Command::new("wg").arg("genkey"))?, capture(Command::new("wg").arg("genkey"))?];
        let public = [public_key(&private[0])?, public_key(&private[1])?];
        for (index, end) in self.ends.iter().enumerate() {
            let other = 1 - index;
            let allowed = format!("{}/32,{}/128", self.ends[other].v4, self.ends[other].v6);
            let endpoint = &endpoints[index];
            // The key goes in by standard input: an argument would be seen by every user of the machine.
            let mut set = self.inside(index, "wg");
            set.args(["set", &end.device, "listen-port", WIREGUARD_PORT, "private-key", "/dev/stdin"]);
            set.args(["peer", &public[other], "endpoint", endpoint, "allowed-ips", &allowed]);
            feed(&mut set, &private[index])?;
        }
        Ok(public)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Nothing below can be reported better than by what it leaves behind.
        for engine in &self.engines {
            succeeds(Command::new("kill").args(["-TERM", &engine.process.id().to_string()]));
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        for engine in &mut self.engines {
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

impl End {
    fn new(carrier: Carrier, index: usize) -> Self {
        let underlay = format!("hbkv{index}");
        let tunnel = Self::named(carrier.name(), &underlay, char::from(b'a' + carrier as u8), index);
        match carrier {
            Carrier::Veth => {
                let (v4, v6) = (OUTER_V4[index].to_owned(), OUTER_V6[index].to_owned());
                Self { device: underlay, v4, v6, ..tunnel }
            }
            Carrier::Vxlan
            | Carrier::WireguardGo
            | Carrier::Boringtun
            | Carrier::Gotatun
            | Carrier::MeshWg => tunnel,
        }
    }

    /// An end of a tunnel. `letter` is in the name of the UAPI socket too, which all namespaces share.
    fn named(name: &str, underlay: &str, letter: char, index: usize) -> Self {
        let id = std::process::id();
        Self {
            namespace: format!("{NAMESPACE_PREFIX}{id}-{name}-{index}"),
            underlay: underlay.to_owned(),
            device: format!("{DEVICE_PREFIX}{id}{letter}{index}"),
            v4: INNER_V4[index].to_owned(),
            v6: INNER_V6[index].to_owned(),
        }
    }
}

/// Where the ends of a network with something between them send from.
fn lane_addresses() -> [String; 2] {
    WIRES.map(|[_, end]| format!("{end}:{WIREGUARD_PORT}"))
}

/// Removes the namespaces and sockets of earlier runs that could not, because they were interrupted or killed.
pub(crate) fn remove_leftovers() -> Result<()> {
    let list = capture(Command::new("ip").args(["netns", "list"]))?;
    for name in list.lines().filter_map(|line| line.split(' ').next()) {
        if name.strip_prefix(NAMESPACE_PREFIX).is_some_and(is_of_an_ended_run) {
            // Where only we were killed, the engines still run.
            for pid in capture(Command::new("ip").args(["netns", "pids", name]))?.lines() {
                succeeds(Command::new("kill").args(["-KILL", pid.trim()]));
            }
            run(Command::new("ip").args(["netns", "del", name]))?;
        }
    }
    for entry in std::fs::read_dir(SOCKET_DIR).into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name();
        let device = name.to_str().and_then(|name| name.strip_suffix(".sock"));
        if device.and_then(|name| name.strip_prefix(DEVICE_PREFIX)).is_some_and(is_of_an_ended_run) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a name without its prefix begins with the id of a process that is gone.
fn is_of_an_ended_run(name: &str) -> bool {
    let id = name.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    !id.is_empty() && !Path::new("/proc").join(id).exists()
}

fn public_key(private: &str) -> Result<String> {
    Ok(feed(Command::new("wg").arg("pubkey"), private)?.trim().to_owned())
}

/// Runs `wg` with this standard input and gives its standard output.
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

/// In front of the id of our process and the name of the carrier.
pub(crate) const NAMESPACE_PREFIX: &str = "hbk-bench-";

/// In front of the id of our process in the name of a device, which has at most 15 bytes.
const DEVICE_PREFIX: &str = "hb";

/// Where all engines make their sockets, in this and every other namespace.
const SOCKET_DIR: &str = "/var/run/wireguard";

/// Underlay addresses of the two ends (RFC 5737, RFC 3849).
const OUTER_V4: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const OUTER_V6: [&str; 2] = ["2001:db8:1::1", "2001:db8:1::2"];

/// Addresses of the two ends inside a tunnel.
const INNER_V4: [&str; 2] = ["198.51.100.1", "198.51.100.2"];
const INNER_V6: [&str; 2] = ["2001:db8:2::1", "2001:db8:2::2"];

/// UDP port of both engines.
const WIREGUARD_PORT: &str = "51820";

/// How long an engine may take until its device or socket is there, or until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How many packets of the full size may be lost, each for a second.
const FULL_SIZE_ATTEMPTS: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_fit_and_differ() {
        let mut names: Vec<String> = Vec::new();
        for carrier in Carrier::ALL.iter().filter(|carrier| **carrier != Carrier::Veth) {
            names.extend([0, 1].map(|index| End::new(*carrier, index).device));
        }
        // The largest id of a process has seven digits.
        let digits = std::process::id().to_string().len();
        assert!(names.iter().all(|name| name.len() - digits + 7 <= 15), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 2 * (Carrier::ALL.len() - 1));
    }

    #[test]
    fn only_what_ended_runs_left_is_removed() {
        let own = std::process::id();
        assert!(!is_of_an_ended_run(&format!("{own}-gotatun-0")));
        assert!(!is_of_an_ended_run(&format!("{own}c1")));
        // Larger than any id.
        assert!(is_of_an_ended_run("99999999-veth-1"));
        assert!(!is_of_an_ended_run("check"));
    }
}
