//! `cargo xtask fuzz`: coverage-guided fuzzing with libFuzzer, on the stable toolchain.
//!
//! The coverage instrumentation is a pass of LLVM that stable Rust can run; only the address sanitizer needs a
//! nightly compiler, and safe code has little use for it. The corpus in `tests/fuzz/corpus` is committed, and
//! `cargo xtask test fuzz` replays it. What is found goes to `tests/fuzz/artifacts`, which is not: inputs that break
//! a promise to `TARGET/`, those that only reach new code to `TARGET/found/`. `--merge` takes the few of the latter
//! that cover most into the corpus.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command::{capture, run_within, step};
use crate::packages;
use crate::workspace::Workspace;

/// Instruments every branch with an inline counter and a comparison hook, which is what libFuzzer reads.
const COVERAGE_FLAGS: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // One unit of code per crate: with several, counters and their table can end up out of step.
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
];

/// Longest input that is tried, in bytes: four times the largest limit that a parser has to enforce on a datagram,
/// and enough to cross those of the line and JSON formats.
const MAX_LEN: u32 = 1 << 18;

/// An input that takes longer than this is a finding.
const INPUT_TIMEOUT: Duration = Duration::from_secs(10);

/// More memory than this, in MiB, for one input is a finding.
const MEMORY_LIMIT: u32 = 1024;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The parser to fuzz; default: each in turn
    target: Option<String>,
    /// How long to fuzz each target
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: u64,
    /// Number of processes that share the corpus of a target
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: u32,
    /// Then take the fewest inputs that reach new code into the committed corpus
    #[arg(long)]
    merge: bool,
}

/// Builds the instrumented program and runs it for every chosen target.
pub(crate) fn run_targets(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    packages::ensure(&[packages::BUILD, packages::FUZZ])?;
    let home = workspace.root().join("tests/fuzz");
    let host = host_triple(workspace)?;
    let target_dir = home.join("target");
    let mut build = workspace.cargo();
    // Flags are given with a target, so that build scripts and macros are left as they are; ASCII unit
    // separators keep Cargo from splitting them otherwise.
    build.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE_FLAGS.join("\u{1f}")).env_remove("RUSTFLAGS");
    build.args(["build", "--package", "mesh-fuzz", "--bin", "mesh-fuzz", "--features", "libfuzzer"]);
    build.arg("--target").arg(&host).arg("--target-dir").arg(&target_dir);
    step("build mesh-fuzz with coverage counters").run(&mut build)?;

    let program = target_dir.join(&host).join("debug/mesh-fuzz");
    let known = capture(Command::new(&program).env("HAUBERK_FUZZ_TARGET", "list"))?;
    let known: Vec<&str> = known.lines().collect();
    let targets = match &arguments.target {
        None => known,
        Some(wanted) if known.contains(&wanted.as_str()) => vec![wanted.as_str()],
        Some(wanted) => bail!("there is no fuzz target {wanted:?}; there are {}", known.join(", ")),
    };
    let limit = Duration::from_secs(arguments.minutes * 60);
    for target in targets {
        let corpus = home.join("corpus").join(target);
        let artifacts = home.join("artifacts").join(target);
        let found = artifacts.join("found");
        for dir in [&corpus, &found] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let fuzzer = || {
            let mut fuzzer = Command::new(&program);
            fuzzer.env("HAUBERK_FUZZ_TARGET", target).current_dir(&artifacts);
            fuzzer.arg(format!("-artifact_prefix={}/", artifacts.display()));
            fuzzer.arg(format!("-timeout={}", INPUT_TIMEOUT.as_secs()));
            fuzzer.arg(format!("-rss_limit_mb={MEMORY_LIMIT}"));
            fuzzer
        };
        let mut fuzz = fuzzer();
        // New inputs go into the first directory.
        fuzz.args([&found, &corpus]).args(["-print_final_stats=1", "-print_funcs=0"]);
        fuzz.arg(format!("-max_total_time={}", limit.as_secs())).arg(format!("-max_len={MAX_LEN}"));
        if arguments.jobs > 1 {
            fuzz.arg(format!("-fork={}", arguments.jobs));
        }
        let fuzzing = step(format!("fuzz {target} for {} min", arguments.minutes));
        // libFuzzer ends by itself; the margin is for reading a large corpus.
        run_within(&mut fuzz, limit + Duration::from_secs(300)).with_context(|| {
            format!("fuzz target {target}: the input is in {}", workspace.relative(&artifacts))
        })?;
        fuzzing.done();
        if arguments.merge {
            step(format!("merge into the corpus of {target}"))
                .run(fuzzer().arg("-set_cover_merge=1").args([&corpus, &found]))?;
        }
    }
    Ok(())
}

fn host_triple(workspace: &Workspace) -> Result<String> {
    let mut rustc = Command::new("rustc");
    let version = capture(rustc.arg("-vV").current_dir(workspace.root()))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}
