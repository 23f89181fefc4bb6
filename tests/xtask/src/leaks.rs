//! What a test run must not leave behind: the state of the machine before and after, compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::{capture, find_program};
use crate::machine;
use crate::marker::{self, Marker};

/// How long what is already going away may take: a killed daemon, a namespace without processes.
const SETTLE: Duration = Duration::from_secs(5);

/// Files below these belong to the daemon, the engine, the plugin or the lab.
const OUR_DIRS: &[&str] = &[
    "/etc/cni/net.d",
    "/etc/meshd",
    "/opt/cni/bin",
    "/run/mesh-lab",
    "/run/meshd",
    "/run/netns",
    "/run/wireguard",
    "/var/lib/cni",
    "/var/lib/mesh-lab",
    "/var/lib/meshd",
];

/// What is left of labs that have died: the next lab that needs the room takes it away.
const COLLECTED: &str = "/run/mesh-lab/";

/// Programs that tests start and that may shed their environment, by which others are recognised.
const OUR_PROGRAMS: &[&str] = &["conmon", "mesh-cni", "mesh-wg", "meshctl", "meshd", "wireguard-go"];

/// Settings of the whole host that a daemon in a namespace must not touch.
const SYSCTLS: &[&str] = &[
    "net/bridge/bridge-nf-call-ip6tables",
    "net/bridge/bridge-nf-call-iptables",
    "net/ipv4/conf/all/forwarding",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/all/send_redirects",
    "net/ipv4/fib_multipath_hash_policy",
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/accept_ra",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/fib_multipath_hash_policy",
];

/// The protocol number of our routes and nexthops (`proto` in the output of `ip route`).
const ROUTE_PROTOCOL: &str = "118";

/// Watches one test run.
pub(crate) struct Watch {
    marker: Marker,
    temporary: PathBuf,
    before: Snapshot,
}

/// Everything that counts, by kind.
type Snapshot = BTreeMap<&'static str, BTreeSet<String>>;

impl Watch {
    /// Takes the state of the machine before the run.
    pub(crate) fn start() -> Result<Self> {
        // Short, because tests put unix sockets in it and a socket's path has at most 107 bytes.
        let temporary = PathBuf::from(format!("/tmp/hbk-{}", std::process::id()));
        std::fs::create_dir(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
        Ok(Self { marker: Marker::new("HAUBERK_TEST_RUN"), temporary, before: snapshot()? })
    }

    /// Gives a command of the run its mark and its own directory for temporary files.
    pub(crate) fn prepare(&self, command: &mut Command) {
        self.marker.put_on(command);
        command.env("TMPDIR", &self.temporary);
    }

    /// Fails with the names of everything that the run left behind.
    pub(crate) fn finish(self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        let leaks = loop {
            let leaks = self.leaks()?;
            if leaks.is_empty() || Instant::now() >= deadline {
                break leaks;
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        if leaks.is_empty() {
            std::fs::remove_dir(&self.temporary)?;
            println!("leak check: nothing left behind");
            return Ok(());
        }
        let lines: Vec<String> = leaks.iter().map(|leak| format!("\n    {leak}")).collect();
        bail!("leak check: the tests left {} things behind or changed:{}", leaks.len(), lines.concat())
    }

    fn leaks(&self) -> Result<Vec<Leak>> {
        let carriers = self.marker.carriers().into_iter();
        let mut leaks: Vec<Leak> = carriers
            .map(|found| Leak::new("process", format!("{} {}", found.pid, found.command_line)))
            .collect();
        leaks.extend(files_below(&self.temporary).into_iter().map(|file| Leak::new("temporary file", file)));
        let known: BTreeSet<String> = leaks.iter().map(|leak| leak.what.clone()).collect();
        let difference = difference(&self.before, &snapshot()?).into_iter();
        leaks.extend(difference.filter(|leak| !known.contains(&leak.what)));
        Ok(leaks)
    }
}

/// Something that is there and was not before, or is gone.
#[derive(Debug, PartialEq)]
struct Leak {
    kind: &'static str,
    what: String,
    gone: bool,
}

impl Leak {
    fn new(kind: &'static str, what: String) -> Self {
        Self { kind, what, gone: false }
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}{}",
            self.kind,
            self.what,
            if self.gone { " (was there before, is gone)" } else { "" }
        )
    }
}

fn difference(before: &Snapshot, after: &Snapshot) -> Vec<Leak> {
    let empty = BTreeSet::new();
    let mut leaks = Vec::new();
    for (&kind, now) in after {
        let then = before.get(kind).unwrap_or(&empty);
        leaks.extend(now.difference(then).map(|what| Leak { kind, what: what.clone(), gone: false }));
        // Processes end on their own; everything else that was here has to be here still.
        if kind != "process" {
            let gone = then.difference(now).filter(|what| !what.starts_with(COLLECTED));
            leaks.extend(gone.map(|what| Leak { kind, what: what.clone(), gone: true }));
        }
    }
    leaks
}

fn snapshot() -> Result<Snapshot> {
    let mut snapshot = Snapshot::from([
        ("file", OUR_DIRS.iter().flat_map(|dir| files_below(Path::new(dir))).collect()),
        ("interface", names_in(Path::new("/sys/class/net"))),
        ("mount", mounts()?),
        ("process", programs()),
        ("sysctl", sysctls()),
    ]);
    if let Some(ip) = find_program("ip") {
        let mut lines = BTreeSet::new();
        for family in ["-4", "-6"] {
            let routes = ["route", "show", "table", "all", "proto", ROUTE_PROTOCOL];
            lines.extend(lines_of(Command::new(&ip).arg(family).args(routes))?);
            lines.extend(lines_of(Command::new(&ip).args([family, "rule", "show"]))?);
        }
        lines.extend(lines_of(Command::new(&ip).args(["nexthop", "show", "protocol", ROUTE_PROTOCOL]))?);
        snapshot.insert("route, nexthop or rule", lines);
    }
    if let Some(nft) = find_program("nft")
        && machine::is_root()?
    {
        snapshot.insert("nftables", lines_of(Command::new(nft).args(["list", "tables"]))?);
    }
    Ok(snapshot)
}

fn lines_of(command: &mut Command) -> Result<BTreeSet<String>> {
    Ok(capture(command)?.lines().map(|line| line.trim().to_owned()).collect())
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect()
}

/// Everything below a directory, itself not included; nothing when there is no such directory.
fn files_below(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
            found.insert(entry.path().display().to_string());
        }
    }
    found
}

/// Mount points; the same point twice counts twice.
fn mounts() -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let mut points: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    points.sort_unstable();
    let mut seen = BTreeMap::new();
    let count = |point| {
        let number = seen.entry(point).and_modify(|number| *number += 1).or_insert(1u32);
        if *number == 1 { String::from(point) } else { format!("{point} (mount {number} at this place)") }
    };
    Ok(points.into_iter().map(count).collect())
}

fn programs() -> BTreeSet<String> {
    let ours = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        OUR_PROGRAMS.contains(&name.trim_end())
    };
    marker::processes()
        .into_iter()
        .filter(ours)
        .map(|pid| format!("{pid} {}", marker::command_line(pid)))
        .collect()
}

fn sysctls() -> BTreeSet<String> {
    let read = |name: &&str| {
        let value = std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
        Some(format!("{} = {}", name.replace('/', "."), value.trim()))
    };
    SYSCTLS.iter().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &'static str, what: &[&str]) -> Snapshot {
        Snapshot::from([(kind, what.iter().copied().map(String::from).collect())])
    }

    #[test]
    fn what_came_and_what_went_are_both_named() {
        let leaks = difference(&of("interface", &["eth0", "lo"]), &of("interface", &["lo", "mesh0"]));
        let shown: Vec<String> = leaks.iter().map(Leak::to_string).collect();
        assert_eq!(shown, ["interface: mesh0", "interface: eth0 (was there before, is gone)"]);
    }

    #[test]
    fn what_dead_labs_have_left_may_go_and_what_labs_leave_is_named() {
        let dead = of("file", &["/run/mesh-lab/dead", "/etc/meshd/config.toml"]);
        let leaks = difference(&dead, &of("file", &["/run/mesh-lab/new"]));
        let shown: Vec<String> = leaks.iter().map(Leak::to_string).collect();
        assert_eq!(
            shown,
            ["file: /run/mesh-lab/new", "file: /etc/meshd/config.toml (was there before, is gone)"]
        );
    }

    #[test]
    fn a_process_that_ended_is_no_leak_and_a_new_one_is() {
        assert_eq!(difference(&of("process", &["1 meshd"]), &of("process", &[])), []);
        assert_eq!(difference(&of("process", &[]), &of("process", &["1 meshd"])).len(), 1);
    }

    #[test]
    fn a_run_that_leaves_a_file_or_a_process_fails_with_its_name() {
        let watch = Watch::start().unwrap();
        let mut shell = Command::new("sh");
        watch.prepare(&mut shell);
        assert!(
            shell.args(["-c", "touch \"$TMPDIR/left\"; sleep 77 >/dev/null &"]).status().unwrap().success()
        );
        let (temporary, marker) = (watch.temporary.clone(), Marker::clone(&watch.marker));
        let error = watch.finish().unwrap_err().to_string();
        marker.signal("KILL");
        std::fs::remove_dir_all(temporary).unwrap();
        assert!(error.contains("process: ") && error.contains("sleep 77"), "{error}");
        assert!(error.contains("temporary file: ") && error.contains("/left"), "{error}");
    }
}
