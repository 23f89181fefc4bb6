//! Namespaces, processes and traffic for the tests with root and for the throughput example.
//!
//! Everything made here is removed on drop: namespaces by name, processes by the handle that started them.

pub mod ethtool;
pub mod mixture;
pub mod refusal;
pub mod relay;
pub mod stream;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mesh_sys::uapi::{AllowedIpChange, BlockingClient, Device, SetDevice, SetPeer, socket_path};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

/// The first act of every test that needs root.
pub fn require_root() {
    assert!(Uid::effective().is_root(), "needs root: run as root or use `cargo xtask test unit`");
}

/// Runs a command to its end and returns what it printed; panics with its error output when it fails.
pub fn run(command: &str, arguments: &[&str]) -> String {
    let output = try_run(command, arguments);
    assert!(
        output.status.success(),
        "{command} {}: {}\n{}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// As [`run`], but the result is the caller's to judge.
pub fn try_run(command: &str, arguments: &[&str]) -> Output {
    let output = Command::new(command).args(arguments).stdin(Stdio::null()).output();
    output
        .unwrap_or_else(|error| panic!("{command} could not be started (is its package installed?): {error}"))
}

/// Waits until `condition` holds, at most `limit`.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A name that nothing else on this machine has, short enough for an interface.
pub fn unique_name(tag: &str) -> String {
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("ew{:x}{tag}{number:x}", std::process::id() & 0xf_ffff)
}

/// A network namespace.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Self {
        let name = format!("enw-{}", unique_name("n"));
        run("ip", &["netns", "add", &name]);
        let namespace = Self { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip` in the namespace; arguments are split at spaces.
    pub fn ip(&self, arguments: &str) -> String {
        let all: Vec<_> = ["-n", &self.name].into_iter().chain(arguments.split(' ')).collect();
        run("ip", &all)
    }

    /// Runs a command in the namespace; panics when it fails.
    pub fn exec(&self, command: &[&str]) -> String {
        run("ip", &[&["netns", "exec", &self.name], command].concat())
    }

    /// As [`Namespace::exec`], but the result is the caller's to judge.
    pub fn try_exec(&self, command: &[&str]) -> Output {
        try_run("ip", &[&["netns", "exec", &self.name], command].concat())
    }

    /// A command that will run in the namespace. `ip` replaces itself by it, so the process is the command's.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).stdin(Stdio::null());
        command
    }

    /// Calls `body` on a thread that lives in the namespace.
    pub fn inside<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let path = format!("/var/run/netns/{}", self.name);
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let file = File::open(&path).unwrap();
                setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                body()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Share of pings that were lost, in percent.
    pub fn ping_loss(&self, arguments: &str) -> f64 {
        let command: Vec<_> = ["ping", "-n"].into_iter().chain(arguments.split(' ')).collect();
        let output = self.try_exec(&command);
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        loss(&text).unwrap_or_else(|| panic!("ping {arguments}: {text}{errors}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let output = try_run("ip", &["netns", "del", &self.name]);
        if !output.status.success() && !thread::panicking() {
            panic!("namespace {} was not removed: {}", self.name, String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Reads `N% packet loss` from the output of ping.
pub fn loss(text: &str) -> Option<f64> {
    let (before, _) = text.split_once("% packet loss")?;
    before.rsplit(' ').next()?.parse().ok()
}

/// Which implementation stands at an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Mesh,
    Go,
    Boringtun,
}

/// A key pair as `wg` makes it, in base64.
#[derive(Clone)]
pub struct Keys {
    pub private: String,
    pub public: String,
}

impl Keys {
    pub fn generate() -> Self {
        let private = run("wg", &["genkey"]).trim().to_owned();
        let mut child =
            Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(private.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        Self { private, public: String::from_utf8(output.stdout).unwrap().trim().to_owned() }
    }
}

/// A fresh preshared key in base64.
pub fn psk() -> String {
    run("wg", &["genpsk"]).trim().to_owned()
}

/// A running userspace WireGuard in the foreground.
pub struct Process {
    pub kind: Kind,
    pub interface: String,
    pub child: Child,
    directory: tempfile::TempDir,
}

impl Process {
    /// Starts `kind` in `namespace` and waits for its socket.
    pub fn start(kind: Kind, namespace: &Namespace) -> Self {
        let interface = unique_name("w");
        Self::start_named(kind, namespace, &interface)
    }

    pub fn start_named(kind: Kind, namespace: &Namespace, interface: &str) -> Self {
        Self::start_prepared(kind, namespace, interface, |_| {}, |_| {})
    }

    /// As [`Process::start_named`]; `prepare` has its say before the process starts, and `started` as soon as it has.
    pub fn start_prepared(
        kind: Kind,
        namespace: &Namespace,
        interface: &str,
        prepare: impl FnOnce(&mut Command),
        started: impl FnOnce(&Child),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let mut command = match kind {
            Kind::Mesh => namespace.command(mesh_wg().to_str().unwrap()),
            Kind::Go => namespace.command("wireguard-go"),
            Kind::Boringtun => namespace.command(boringtun().to_str().unwrap()),
        };
        let (level, option) = match kind {
            Kind::Mesh => ("debug", None),
            Kind::Go => ("verbose", None),
            Kind::Boringtun => ("info", Some("--disable-drop-privileges")),
        };
        prepare(&mut command);
        let level = std::env::var("ENGINE_TEST_LOG").unwrap_or(level.to_owned());
        let child = command
            .args(option)
            .args(["-f", interface])
            .env("LOG_LEVEL", &level)
            .env("WG_LOG_LEVEL", &level)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        started(&child);
        let mut device = Self { kind, interface: interface.to_owned(), child, directory };
        let socket = socket_path(interface);
        let deadline = Instant::now() + Duration::from_secs(10);
        while BlockingClient::at(&socket).get().is_err() {
            let ended = device.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "{kind:?} did not come up ({ended:?}):\n{}",
                device.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
        device
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    pub fn state(&self) -> Device {
        BlockingClient::new(&self.interface).get().unwrap()
    }

    /// A file with a secret for `wg set`, which takes them in no other way.
    pub fn secret_file(&self, secret: &str) -> String {
        let path = self.directory.path().join(unique_name("s"));
        fs::write(&path, secret).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the process to end and returns whether it succeeded.
    pub fn wait(&mut self) -> bool {
        let mut status = None;
        let child = &mut self.child;
        eventually("the device ends", Duration::from_secs(10), || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }

    /// Processor time used so far by all threads, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // After the name in brackets, which may hold spaces: the 12th and 13th words, in hundredths.
        let words = stat.rsplit(')').next().unwrap().split_whitespace();
        words.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.signal(Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(5);
            while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            // Whatever it was waiting for, it must not outlive the test.
            let _ended = self.child.kill();
            let _reaped = self.child.wait();
        }
        if thread::panicking() && std::env::var_os("ENGINE_TEST_SHOW_LOGS").is_some() {
            let _shown = writeln!(std::io::stderr(), "--- log of {}\n{}", self.interface, self.log());
        }
    }
}

/// The program under test: beside the test's or example's own executable.
pub fn mesh_wg() -> PathBuf {
    if let Some(path) = option_env!("CARGO_BIN_EXE_mesh-wg") {
        return path.into();
    }
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap_or(Path::new("/")).join("mesh-wg");
    assert!(path.exists(), "{} is missing: build it with `cargo build -p mesh-engine`", path.display());
    path
}

/// Cloudflare's program, where `cargo xtask test` installs it.
fn boringtun() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(3).unwrap_or(Path::new("/")).join("peers/bin/boringtun-cli");
    assert!(path.exists(), "{} is missing: `cargo xtask test netns` installs it", path.display());
    path
}

/// One end of a [`Link`].
pub struct End {
    pub namespace: Namespace,
    pub device: Process,
    pub keys: Keys,
    /// 1 or 2: the last number in all of its addresses.
    pub number: u8,
    pub port: u16,
}

/// Which family the tunnel runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    V4,
    V6,
}

/// Two namespaces joined by a veth, with a device in each. Underlay 192.0.2.N and 2001:db8::N, inside 10.9.0.N and
/// fd09::N.
pub struct Link {
    pub ends: [End; 2],
    pub underlay: Underlay,
}

/// Two namespaces joined by a veth with underlay addresses.
pub fn joined_namespaces() -> [Namespace; 2] {
    let namespaces = [Namespace::new(), Namespace::new()];
    let [a, b] = [&namespaces[0].name, &namespaces[1].name];
    run("ip", &["-n", a, "link", "add", "u0", "type", "veth", "peer", "name", "u0", "netns", b]);
    for (namespace, number) in namespaces.iter().zip(1..) {
        namespace.ip(&format!("addr add 192.0.2.{number}/24 dev u0"));
        namespace.ip(&format!("addr add 2001:db8::{number}/64 dev u0 nodad"));
        namespace.ip("link set u0 up");
    }
    namespaces
}

impl Link {
    pub fn new(kinds: [Kind; 2], underlay: Underlay, psk: Option<&str>) -> Self {
        let mut kinds = kinds.into_iter();
        Self::of(underlay, psk, |namespace| Process::start(kinds.next().unwrap(), namespace))
    }

    /// With the devices that `start` starts, one for each end.
    pub fn of(underlay: Underlay, psk: Option<&str>, mut start: impl FnMut(&Namespace) -> Process) -> Self {
        let mut number = 0;
        let ends = joined_namespaces().map(|namespace| {
            number += 1;
            let device = start(&namespace);
            let end =
                End { namespace, device, keys: Keys::generate(), number, port: 5000 + u16::from(number) };
            let interface = &end.device.interface;
            end.namespace.ip(&format!("addr add 10.9.0.{number}/24 dev {interface}"));
            end.namespace.ip(&format!("addr add fd09::{number}/64 dev {interface} nodad"));
            let private = end.device.secret_file(&end.keys.private);
            end.wg(&["private-key", &private, "listen-port", &end.port.to_string()]);
            end.namespace.ip(&format!("link set {interface} up"));
            end
        });
        let link = Self { ends, underlay };
        link.add_peer(0, psk);
        link.add_peer(1, psk);
        link
    }

    /// Makes the other end a peer of `end`.
    pub fn add_peer(&self, end: usize, psk: Option<&str>) {
        let (this, other) = (&self.ends[end], &self.ends[1 - end]);
        let endpoint = self.endpoint(1 - end);
        let allowed = format!("10.9.0.{0}/32,fd09::{0}/128", other.number);
        let mut arguments = vec!["peer", &other.keys.public, "endpoint", &endpoint, "allowed-ips", &allowed];
        let file = psk.map(|psk| this.device.secret_file(psk));
        if let Some(file) = &file {
            arguments.extend(["preshared-key", file]);
        }
        this.wg(&arguments);
    }

    /// The addresses of an end inside of the tunnel, IPv4 and IPv6.
    pub fn inside(&self, end: usize) -> [IpAddr; 2] {
        let number = self.ends[end].number;
        [format!("10.9.0.{number}"), format!("fd09::{number}")].map(|address| address.parse().unwrap())
    }

    pub fn endpoint(&self, end: usize) -> String {
        let End { number, port, .. } = self.ends[end];
        match self.underlay {
            Underlay::V4 => format!("192.0.2.{number}:{port}"),
            Underlay::V6 => format!("[2001:db8::{number}]:{port}"),
        }
    }

    pub fn set_psk(&self, end: usize, psk: &str) {
        let this = &self.ends[end];
        let file = this.device.secret_file(psk);
        this.wg(&["peer", &self.ends[1 - end].keys.public, "preshared-key", &file]);
    }

    /// Both ends reach each other, both families, large packets too.
    pub fn check_ping(&self) {
        for end in &self.ends {
            let other = 3 - end.number;
            for arguments in [
                format!("-c 3 -i 0.05 -W 5 10.9.0.{other}"),
                format!("-c 3 -i 0.05 -W 5 fd09::{other}"),
                format!("-c 2 -i 0.05 -W 5 -s 4000 10.9.0.{other}"),
                format!("-c 2 -i 0.05 -W 5 -s 4000 fd09::{other}"),
            ] {
                let loss = end.namespace.ping_loss(&arguments);
                assert!(loss == 0.0, "end {}: ping {arguments}: {loss}% lost\n{}", end.number, self.logs());
            }
        }
    }

    /// Both ends send `bytes` over TCP to the other, which checks every byte.
    pub fn check_tcp(&self, bytes: usize) {
        for (from, to) in [(0, 1), (1, 0)] {
            let number = self.ends[to].number;
            let address: IpAddr = match from {
                0 => format!("10.9.0.{number}").parse().unwrap(),
                _ => format!("fd09::{number}").parse().unwrap(),
            };
            transfer(&self.ends[from].namespace, &self.ends[to].namespace, address, bytes);
        }
    }

    pub fn logs(&self) -> String {
        self.ends.iter().map(|end| format!("--- end {}\n{}\n", end.number, end.device.log())).collect()
    }
}

impl End {
    /// `wg set` with these arguments.
    pub fn wg(&self, arguments: &[&str]) {
        self.namespace.exec(&[&["wg", "set", &self.device.interface], arguments].concat());
    }

    /// Changes the only peer through the configuration socket.
    pub fn change_peer(&self, change: impl FnOnce(&mut SetPeer)) {
        let mut peer = SetPeer::new(self.device.state().peers[0].public_key);
        peer.update_only = true;
        change(&mut peer);
        let change = SetDevice { peers: vec![peer], ..SetDevice::default() };
        BlockingClient::new(&self.device.interface).set(&change).unwrap();
    }

    /// Removes the only peer and adds it again, changed: it is unknown to the device that they ever spoke. (boringtun
    /// knows no other way to change a peer.)
    pub fn replace_peer(&self, change: impl FnOnce(&mut SetPeer)) {
        let old = self.device.state().peers.remove(0);
        let mut peer = SetPeer::new(old.public_key);
        peer.preshared_key = old.preshared_key;
        peer.endpoint = old.endpoint;
        peer.allowed_ips = old.allowed_ips.into_iter().map(AllowedIpChange::Add).collect();
        change(&mut peer);
        let mut remove = SetPeer::new(old.public_key);
        remove.remove = true;
        // Two requests: in one, boringtun removes both.
        for peer in [remove, peer] {
            let change = SetDevice { peers: vec![peer], ..SetDevice::default() };
            BlockingClient::new(&self.device.interface).set(&change).unwrap();
        }
    }

    /// Time of the last handshake with the only peer, since the epoch.
    pub fn last_handshake(&self) -> Duration {
        self.device.state().peers[0].last_handshake_time
    }
}

/// A stream of bytes that is the same on both sides.
pub struct Pattern(pub u64);

impl Pattern {
    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        // xorshift64: every byte depends on its place.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            chunk.copy_from_slice(&self.draw().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Waits for a connection, for a time in which any must come.
fn accept(listener: &TcpListener) -> Option<TcpStream> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let came = poll(&mut fds, PollTimeout::from(15_000u16)).unwrap() > 0;
    came.then(|| listener.accept().unwrap().0)
}

/// Sends `bytes`, a multiple of 64 KiB, and checks every one of them at the other side.
pub fn transfer(from: &Namespace, to: &Namespace, address: IpAddr, bytes: usize) {
    const PIECE: usize = 64 << 10;
    let listener = to.inside(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap());
    let target = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let Some(mut stream) = accept(&listener) else { panic!("nobody connected") };
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let (mut pattern, mut expected, mut actual) = (Pattern(1), vec![0; PIECE], vec![0; PIECE]);
            for piece in 0..bytes / PIECE {
                pattern.fill(&mut expected);
                stream.read_exact(&mut actual).unwrap();
                assert!(expected == actual, "the {piece}th 64 KiB arrived damaged");
            }
            assert_eq!(stream.read(&mut actual).unwrap(), 0, "more arrived than was sent");
        });
        from.inside(|| {
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10)).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
            let (mut pattern, mut buffer) = (Pattern(1), vec![0; PIECE]);
            for _ in 0..bytes / PIECE {
                pattern.fill(&mut buffer);
                stream.write_all(&buffer).unwrap();
            }
        });
        receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
