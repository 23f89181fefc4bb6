//! `cargo xtask test`: which tests there are, what they need, and in which order they run.
//!
//! A suite is told by where its tests are. Tests inside of the crates, and the integration tests of the crates
//! without I/O, are the suite `unit` and run as any user; of `mesh-sys`, those not called `netns…`. Every other integration test builds networks and needs
//! root: those of `mesh-lab`, and files `lab…` of `mesh-tests`, are the suite `lab`, of which `lab_nats` is one by itself, whose
//! output is shown: `nat-matrix`; those of `mesh-cni`, and files
//! `cni…` of `mesh-tests`, the suite `cni`; the rest is `netns`. The crate `mesh-fuzz` is the suite `fuzz`, and the integration
//! tests of `mesh-sim` are the suite `sim`.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::command::{find_program, run, seconds, step};
use crate::leaks::Watch;
use crate::libtest;
use crate::workspace::{Member, Workspace};
use crate::{machine, packages, peers};

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to run
    #[arg(value_enum, default_value_t = Suite::All)]
    suite: Suite,
    /// Only tests whose name contains one of these
    names: Vec<String>,
    /// What runs the tests; default: cargo-nextest when it is installed, else ours
    #[arg(long, value_enum)]
    runner: Option<Runner>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Every suite
    All,
    /// Unit, property and documentation tests
    Unit,
    /// Devices, tunnels and firewall tables in network namespaces
    Netns,
    /// Whole hosts with real daemons
    Lab,
    /// Hosts behind NATs and firewalls of every kind, each with each; prints the table
    NatMatrix,
    /// The plugin, as a container runtime calls it
    Cni,
    /// Replay of the fuzzing corpus and a bounded number of mutations
    Fuzz,
    /// Chaos among simulated nodes
    Sim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Runner {
    /// cargo-nextest
    Nextest,
    /// Ours, with the test binaries as Cargo builds them
    Cargo,
}

impl Suite {
    /// The suite of a test binary.
    pub(crate) fn of(package: &str, kind: &str, binary: &str) -> Self {
        match (package, kind) {
            ("mesh-fuzz", _) => Self::Fuzz,
            ("mesh-sim", "test") => Self::Sim,
            ("mesh-keys" | "mesh-core" | "xtask", "test") => Self::Unit,
            ("mesh-sys", "test") if !binary.starts_with("netns") => Self::Unit,
            ("mesh-lab", "test") => Self::Lab,
            ("mesh-cni", "test") => Self::Cni,
            ("mesh-tests", "test") if binary == "lab_nats" => Self::NatMatrix,
            ("mesh-tests", "test") if binary.starts_with("lab") => Self::Lab,
            ("mesh-tests", "test") if binary.starts_with("cni") => Self::Cni,
            (_, "test") => Self::Netns,
            _ => Self::Unit,
        }
    }

    /// Whether `self`, as the user asked for it, includes a suite of tests.
    pub(crate) fn includes(self, other: Self) -> bool {
        self == Self::All || self == other || (self == Self::Lab && other == Self::NatMatrix)
    }

    /// Whether what its tests print is shown, also when they pass.
    pub(crate) fn is_told(self) -> bool {
        self == Self::NatMatrix
    }

    /// Whether the tests build networks.
    pub(crate) fn needs_root(self) -> bool {
        match self {
            Self::Unit | Self::Fuzz | Self::Sim => false,
            Self::All | Self::Netns | Self::Lab | Self::NatMatrix | Self::Cni => true,
        }
    }

    /// What Cargo has to build for it.
    pub(crate) fn selection(self) -> &'static [&'static str] {
        match self {
            Self::Fuzz => &["--package", "mesh-fuzz"],
            Self::Sim => &["--package", "mesh-sim"],
            Self::All | Self::Unit | Self::Netns | Self::Lab | Self::NatMatrix | Self::Cni => {
                &["--workspace"]
            }
        }
    }

    /// The same choice in nextest's filter language. It names each test binary, because nextest refuses patterns
    /// that match none.
    fn filter<'a>(self, members: impl Iterator<Item = &'a Member>) -> Result<String> {
        let names = |member: &Member, wanted: fn(Self, Self) -> bool| -> Vec<String> {
            let tests = member.targets.iter().filter(|target| target.kind == "test");
            let wanted = tests.filter(|target| wanted(self, Self::of(&member.name, "test", &target.name)));
            wanted.map(|target| format!("binary_id(={}::{})", member.name, target.name)).collect()
        };
        match self {
            Self::All => Ok("all()".to_owned()),
            Self::Fuzz => Ok("package(mesh-fuzz)".to_owned()),
            Self::Unit => {
                let others: Vec<String> = members
                    .flat_map(|member| names(member, |_, of| of != Self::Unit && of != Self::Fuzz))
                    .collect();
                let mut filter = "not package(mesh-fuzz)".to_owned();
                others.iter().for_each(|other| filter.push_str(&format!(" and not {other}")));
                Ok(filter)
            }
            Self::Netns | Self::Lab | Self::NatMatrix | Self::Cni | Self::Sim => {
                let ours: Vec<String> = members.flat_map(|member| names(member, Self::includes)).collect();
                if ours.is_empty() {
                    bail!("there are no tests in the suite {self:?}");
                }
                Ok(ours.join(" or "))
            }
        }
    }
}

/// Builds everything once, runs the tests, looks for what they left behind.
pub(crate) fn run_suite(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let suite = arguments.suite;
    if suite.needs_root() {
        if !machine::is_root()? {
            bail!(
                "these tests need root, because they create network namespaces and devices: run them as root or \
                 with sudo (`cargo xtask test unit` works without)"
            );
        }
        packages::ensure(&[packages::BUILD, packages::DEMO, packages::TEST, packages::AEAD])?;
        machine::require_networking()?;
    } else {
        packages::ensure(&[packages::BUILD])?;
    }
    let nextest = find_program("cargo-nextest").is_some();
    let runner = arguments.runner.unwrap_or(if nextest { Runner::Nextest } else { Runner::Cargo });
    if runner == Runner::Nextest && !nextest {
        bail!(
            "cargo-nextest is not installed: `cargo install --locked cargo-nextest`, or use `--runner cargo`"
        );
    }

    // Programs and tests in one go: the features of the libraries are then the same for all, and nothing is
    // built twice.
    let mut build = workspace.cargo();
    step("build").run(build.arg("build").args(suite.selection()).args(["--bins", "--tests"]))?;

    if suite.includes(Suite::Netns) {
        peers::install(workspace, &peers::BORINGTUN)?;
    }

    let watch = Watch::start()?;
    let outcome = run_tests(workspace, arguments, runner, &watch);
    let leaks = watch.finish();
    println!("total time: {}", seconds(started.elapsed()));
    match (outcome, leaks) {
        (Err(failed), Err(leaks)) => bail!("{failed:#}; also, {leaks:#}"),
        (outcome, leaks) => outcome.and(leaks),
    }
}

fn run_tests(workspace: &Workspace, arguments: &Arguments, runner: Runner, watch: &Watch) -> Result<()> {
    let suite = arguments.suite;
    // Neither runner does these; first, so that the summary of the rest is what ends the output.
    if suite.includes(Suite::Unit) && arguments.names.is_empty() {
        let mut cargo = workspace.cargo();
        watch.prepare(&mut cargo);
        step("documentation tests").run(cargo.args(["test", "--quiet", "--workspace", "--doc"]))?;
    }
    match runner {
        Runner::Nextest => {
            let mut cargo = workspace.cargo();
            watch.prepare(&mut cargo);
            let filter = suite.filter(workspace.members()?.values())?;
            cargo.args(["nextest", "run"]).args(suite.selection()).args([
                "--no-fail-fast",
                "--filterset",
                &filter,
            ]);
            if suite.is_told() {
                cargo.args(["--success-output", "immediate"]);
            }
            run(cargo.args(&arguments.names))
        }
        Runner::Cargo => libtest::run_all(workspace, suite, &arguments.names, watch),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::workspace::Target;

    #[test]
    fn suites_are_told_by_crate_and_file_name() {
        for (package, kind, file, suite) in [
            ("mesh-keys", "lib", "mesh_keys", Suite::Unit),
            ("mesh-sys", "lib", "mesh_sys", Suite::Unit),
            ("meshd", "bin", "meshctl", Suite::Unit),
            ("mesh-core", "test", "laws", Suite::Unit),
            ("mesh-sys", "test", "packets", Suite::Unit),
            ("mesh-sys", "test", "netns_nft", Suite::Netns),
            ("mesh-engine", "test", "interop", Suite::Netns),
            ("mesh-tests", "test", "fail_closed", Suite::Netns),
            ("mesh-tests", "test", "lab_join", Suite::Lab),
            ("mesh-tests", "test", "lab_nats", Suite::NatMatrix),
            ("mesh-lab", "test", "hosts", Suite::Lab),
            ("mesh-tests", "test", "cni_podman", Suite::Cni),
            ("mesh-cni", "test", "verbs", Suite::Cni),
            ("mesh-fuzz", "test", "replay", Suite::Fuzz),
            ("mesh-sim", "lib", "mesh_sim", Suite::Unit),
            ("mesh-sim", "test", "chaos", Suite::Sim),
        ] {
            assert_eq!(Suite::of(package, kind, file), suite, "{package} {kind} {file}");
        }
    }

    #[test]
    fn nextest_is_told_every_binary_by_name() {
        let target =
            |kind: &str, name: &str| Target { name: name.into(), kind: kind.into(), path: PathBuf::new() };
        let member = |name: &str, targets| Member {
            name: name.into(),
            dir: PathBuf::new(),
            targets,
            depends_on: Vec::new(),
        };
        let members = [
            member("mesh-sys", vec![target("lib", "mesh_sys"), target("test", "netns_nft")]),
            member("mesh-keys", vec![target("test", "laws")]),
            member("mesh-cni", vec![target("test", "attach"), target("test", "conflist")]),
            member("mesh-sim", vec![target("lib", "mesh_sim"), target("test", "chaos")]),
        ];
        let filter = |suite: Suite| suite.filter(members.iter()).map_err(|error| error.to_string());
        assert_eq!(filter(Suite::Netns), Ok("binary_id(=mesh-sys::netns_nft)".into()));
        assert_eq!(
            filter(Suite::Cni),
            Ok("binary_id(=mesh-cni::attach) or binary_id(=mesh-cni::conflist)".into())
        );
        assert_eq!(
            filter(Suite::Unit),
            Ok("not package(mesh-fuzz) and not binary_id(=mesh-sys::netns_nft) and not \
                binary_id(=mesh-cni::attach) and not binary_id(=mesh-cni::conflist) and not \
                binary_id(=mesh-sim::chaos)"
                .into())
        );
        assert_eq!(filter(Suite::Sim), Ok("binary_id(=mesh-sim::chaos)".into()));
        assert_eq!(filter(Suite::Lab), Err("there are no tests in the suite Lab".into()));
    }

    #[test]
    fn only_the_suites_that_build_networks_need_root() {
        assert!(!Suite::Unit.needs_root() && !Suite::Fuzz.needs_root());
        assert!(Suite::All.needs_root() && Suite::Lab.needs_root());
    }
}
