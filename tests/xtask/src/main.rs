//! `cargo xtask`: every step that a developer or the CI takes, under one name each.
//!
//! | verb | what it does | needs root |
//! |---|---|---|
//! | `demo` | builds everything and shows a three-host mesh on this machine | yes |
//! | `test [SUITE]` | all tests, or one suite (`unit`, `netns`, `lab`, `cni`, `fuzz`, `sim`), then a leak check | not for `unit`, `fuzz` and `sim` |
//! | `lint` | format, clippy, documentation, dependency rules, purity rules | no |
//! | `bench SUITE` | measurements, with everything compared in the same run | yes |
//! | `fuzz [TARGET]` | coverage-guided fuzzing of the parsers | no |
//! | `crowd` | sixty real daemons on this machine: split, healed, one removed, one added; figures | yes |
//! | `sim` | simulated clusters: figures, or chaos with a reference model | no |
//!
//! Exit codes: 0 when all went well, 1 when a step failed, 2 when the command line is wrong.

#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool that talks to the terminal"
)]

mod bench;
mod command;
mod crowd;
mod demo;
mod fuzz;
mod leaks;
mod libtest;
mod lint;
mod machine;
mod marker;
mod packages;
mod peers;
mod purity;
mod rust_source;
mod sim;
mod suites;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Developer and CI commands of Hauberk",
    version,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build everything, bring up a mesh of three hosts on this machine and prove that it works
    Demo(demo::Arguments),
    /// Run the tests, then check that they left nothing behind
    Test(suites::Arguments),
    /// Check format, lints, documentation, dependencies and purity rules
    Lint(lint::Arguments),
    /// Measure, beside what we compare ourselves with
    Bench(bench::Arguments),
    /// Fuzz a parser (or all of them in turn), guided by coverage
    Fuzz(fuzz::Arguments),
    /// Bring up sixty real daemons on this machine, split and heal them, remove one, add one, and measure
    Crowd(crowd::Arguments),
    /// Simulate whole nodes under a virtual clock: figures, or chaos with a reference model
    Sim(sim::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = Workspace::find().and_then(|workspace| match cli.verb {
        Verb::Demo(arguments) => demo::run_demo(&workspace, &arguments),
        Verb::Test(arguments) => suites::run_suite(&workspace, &arguments),
        Verb::Lint(arguments) => lint::run_checks(&workspace, &arguments),
        Verb::Bench(arguments) => bench::run_suite(&workspace, &arguments),
        Verb::Fuzz(arguments) => fuzz::run_targets(&workspace, &arguments),
        Verb::Crowd(arguments) => crowd::run_crowd(&workspace, &arguments),
        Verb::Sim(arguments) => sim::run_simulator(&workspace, &arguments),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
