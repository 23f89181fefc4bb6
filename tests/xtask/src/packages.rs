//! The programs and libraries of other projects that the verbs use, and the Debian packages that bring them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{find_program, run};
use crate::machine;

/// Something of another project that we use, where it comes from, and what for.
pub(crate) struct Need {
    what: What,
    /// The Debian 12 package that has it.
    package: &'static str,
    /// What we do with it.
    reason: &'static str,
}

#[derive(Clone, Copy)]
enum What {
    /// How it is called.
    Program(&'static str),
    /// The file that the dynamic linker looks for.
    Library(&'static str),
}

const fn need(program: &'static str, package: &'static str, reason: &'static str) -> Need {
    Need { what: What::Program(program), package, reason }
}

const fn library(file: &'static str, package: &'static str, reason: &'static str) -> Need {
    Need { what: What::Library(file), package, reason }
}

impl Need {
    fn is_met(&self) -> bool {
        match self.what {
            What::Program(name) => find_program(name).is_some(),
            What::Library(file) => LIBRARY_DIRS.iter().any(|dir| Path::new(dir).join(file).is_file()),
        }
    }

    fn name(&self) -> &'static str {
        match self.what {
            What::Program(name) | What::Library(name) => name,
        }
    }
}

/// Of Debian, and of those who do it differently.
const LIBRARY_DIRS: [&str; 5] =
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/usr/local/lib64"];

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

/// For the engine at its fastest. There is none for other processors.
#[cfg(target_arch = "x86_64")]
pub(crate) const AEAD: &[Need] =
    &[library("libIPSec_MB.so.1", "libipsec-mb1", "encrypts faster where the processor has AVX-512")];
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const AEAD: &[Need] = &[];

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

/// Makes sure that all of these are there: says what is missing and why, and installs it.
///
/// Fails in one sentence where it cannot install: without root, or on another system than Debian.
pub(crate) fn ensure(needs: &[&[Need]]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().copied().flatten().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // Standard output belongs to the verb: it may have to be JSON.
    eprintln!("These Debian packages are missing:");
    for need in &missing {
        eprintln!("    {:<26} {} ({})", need.package, need.reason, need.name());
    }
    let packages: BTreeSet<&str> = missing.iter().map(|need| need.package).collect();
    let list = packages.iter().copied().collect::<Vec<_>>().join(" ");
    if !machine::is_debian() {
        bail!(
            "this is not Debian: install what is in brackets with your own package manager ({list} on Debian)"
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
    if let Some(need) = missing.iter().find(|need| !need.is_met()) {
        bail!("package {} is installed, but its {:?} is not found", need.package, need.name());
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["--quiet", "--quiet"]).env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr());
    command
}
