//! The programs of other projects that the verbs run, and the Debian packages that bring them.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{find_program, run};
use crate::machine;

/// A program that we run, where it comes from, and what for.
pub(crate) struct Need {
    /// How it is called.
    program: &'static str,
    /// The Debian 12 package that has it.
    package: &'static str,
    /// What we do with it.
    reason: &'static str,
}

const fn need(program: &'static str, package: &'static str, reason: &'static str) -> Need {
    Need { program, package, reason }
}

/// For building anything at all. (Whoever runs this has linked it with `cc`, so normally nothing is missing.)
pub(crate) const BUILD: &[Need] = &[need("cc", "gcc", "compiles and links the cryptographic libraries")];

/// For the demonstration.
pub(crate) const DEMO: &[Need] = &[
    need("ip", "iproute2", "hosts of the lab are network namespaces"),
    need("nft", "nftables", "shows the firewall tables of a host"),
    need("ping", "iputils-ping", "every pod pings every pod"),
    need("wg", "wireguard-tools", "shows the tunnels of a host"),
];

/// For the test suites that need root, beyond [`DEMO`].
pub(crate) const TEST: &[Need] = &[
    need("busybox", "busybox-static", "root file system of the containers in the plugin's tests"),
    need("conntrack", "conntrack", "clears connection tracking between steps of a test"),
    need("iperf3", "iperf3", "throughput through the tunnels"),
    need("podman", "podman", "a real container runtime for the plugin"),
    need("runc", "runc", "what podman starts containers with"),
    need("python3", "python3", "forges packets in the anti-spoofing tests"),
    need("socat", "socat", "TCP and UDP peers inside pods"),
    need("tcpdump", "tcpdump", "captures of the underlay"),
    need("wireguard-go", "wireguard-go", "the other end in the interoperability tests"),
];

/// For measuring the engine.
pub(crate) const BENCH_ENGINE: &[Need] = &[
    need("ip", "iproute2", "both ends are network namespaces"),
    need("iperf3", "iperf3", "the load"),
    need("ping", "iputils-ping", "latency under load"),
    need("ss", "iproute2", "tells when the load's server listens"),
    need("taskset", "util-linux", "keeps everything on the given processors"),
    need("wg", "wireguard-tools", "configures all engines the same way"),
];

/// For measuring the engine beside the reference implementation.
pub(crate) const BENCH_WIREGUARD_GO: &[Need] =
    &[need("wireguard-go", "wireguard-go", "what we compare ourselves with")];

/// For coverage-guided fuzzing.
pub(crate) const FUZZ: &[Need] = &[need("c++", "g++", "compiles libFuzzer")];

/// Makes sure that all of these programs are there: says what is missing and why, and installs it.
///
/// Fails in one sentence where it cannot install: without root, or on another system than Debian.
pub(crate) fn ensure(needs: &[&[Need]]) -> Result<()> {
    let missing: Vec<&Need> =
        needs.iter().copied().flatten().filter(|need| find_program(need.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // Standard output belongs to the verb: it may have to be JSON.
    eprintln!("These Debian packages are missing:");
    for need in &missing {
        eprintln!("    {:<26} {} ({})", need.package, need.reason, need.program);
    }
    let packages: BTreeSet<&str> = missing.iter().map(|need| need.package).collect();
    let list = packages.iter().copied().collect::<Vec<_>>().join(" ");
    if !machine::is_debian() {
        bail!(
            "this is not Debian: install the programs in brackets with your own package manager ({list} on Debian)"
        );
    }
    if !machine::is_root()? {
        bail!(
            "installing packages needs root: run `apt-get install {list}` as root, or this command with sudo"
        );
    }
    eprintln!("==> apt-get install {list}");
    // A package list that is old or empty is the normal state of a fresh machine.
    run(apt_get().arg("update"))?;
    run(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(&packages))?;
    if let Some(need) = missing.iter().find(|need| find_program(need.program).is_none()) {
        bail!("package {} is installed, but its program {:?} is not found", need.package, need.program);
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["--quiet", "--quiet"]).env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr());
    command
}
