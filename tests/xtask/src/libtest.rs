//! A small test runner for machines without cargo-nextest.
//!
//! It keeps the three things that the tests rely on: tests that build networks have a process each and run one
//! after the other; everything has a deadline; and the run ends with one summary line. Unit tests run as Cargo
//! runs them, a process for each test binary.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{capture, run_within, seconds};
use crate::leaks::Watch;
use crate::suites::Suite;
use crate::workspace::Workspace;

/// Longest run of a whole binary of unit tests. The slowest (Argon2id, property tests) take a tenth of it.
const BINARY_LIMIT: Duration = Duration::from_secs(600);

/// Longest run of one test that builds networks; the same as in `.config/nextest.toml`.
const TEST_LIMIT: Duration = Duration::from_secs(300);

/// Runs the test binaries of a suite; `names` chooses tests by parts of their names.
pub(crate) fn run_all(workspace: &Workspace, suite: Suite, names: &[String], watch: &Watch) -> Result<()> {
    let started = Instant::now();
    let mut binaries = test_binaries(workspace, suite)?;
    binaries.retain(|binary| suite.includes(binary.suite));
    // What builds networks comes last, alone.
    binaries.sort_by_key(|binary| binary.suite.needs_root());
    let mut tally = Tally::default();
    for binary in &binaries {
        if binary.suite.needs_root() {
            binary.run_each(names, suite.is_told(), watch, &mut tally)?;
        } else {
            binary.run_together(names, watch, &mut tally)?;
        }
    }
    tally.print(started.elapsed());
    if !tally.failed.is_empty() {
        bail!("{} failed: {}", tally.failed.len(), tally.failed.join(", "));
    }
    if tally.passed == 0 {
        bail!("no test was run: nothing in this suite has such a name");
    }
    Ok(())
}

/// An executable with tests.
#[derive(Debug, PartialEq)]
struct TestBinary {
    suite: Suite,
    /// `package::target`.
    name: String,
    executable: PathBuf,
    package_dir: PathBuf,
}

#[derive(Default)]
struct Tally {
    passed: u64,
    ignored: u64,
    failed: Vec<String>,
}

impl Tally {
    fn print(&self, elapsed: Duration) {
        let verdict = if self.failed.is_empty() { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {verdict}. {} passed; {} failed; {} ignored; finished in {:.2}s\n",
            self.passed,
            self.failed.len(),
            self.ignored,
            elapsed.as_secs_f64()
        );
    }

    fn failed(&mut self, name: String, why: &anyhow::Error, output: &Path) {
        println!("FAIL {name}: {why:#}\n{}", std::fs::read_to_string(output).unwrap_or_default());
        self.failed.push(name);
    }
}

impl TestBinary {
    fn command(&self, watch: &Watch, output: &Path) -> Result<Command> {
        let file = File::create(output).with_context(|| format!("cannot create {}", output.display()))?;
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.package_dir).env("CARGO_MANIFEST_DIR", &self.package_dir);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        watch.prepare(&mut command);
        Ok(command)
    }

    fn output(&self) -> PathBuf {
        self.executable.with_extension("output")
    }

    fn run_together(&self, names: &[String], watch: &Watch, tally: &mut Tally) -> Result<()> {
        let started = Instant::now();
        let output = self.output();
        let outcome = run_within(self.command(watch, &output)?.args(names), BINARY_LIMIT);
        let text = std::fs::read_to_string(&output).unwrap_or_default();
        let counts = summary(&text);
        if let Some(counts) = counts {
            tally.passed += counts.passed;
            tally.ignored += counts.ignored;
        }
        match (outcome, counts) {
            (Err(error), _) => tally.failed(self.name.clone(), &error, &output),
            (Ok(()), None) => {
                tally.failed(self.name.clone(), &anyhow::anyhow!("ended without a summary"), &output);
            }
            (Ok(()), Some(Counts { passed: 0, .. })) => {}
            (Ok(()), Some(counts)) => {
                println!("PASS {} ({} tests, {})", self.name, counts.passed, seconds(started.elapsed()));
            }
        }
        Ok(())
    }

    fn run_each(&self, names: &[String], tell: bool, watch: &Watch, tally: &mut Tally) -> Result<()> {
        let list = |ignored: &[&str]| -> Result<Vec<String>> {
            let mut command = Command::new(&self.executable);
            command
                .current_dir(&self.package_dir)
                .args(["--list", "--format", "terse"])
                .args(ignored)
                .args(names);
            Ok(test_names(&capture(&mut command)?))
        };
        let ignored = list(&["--ignored"])?;
        tally.ignored += ignored.len() as u64;
        for test in list(&[])?.into_iter().filter(|test| !ignored.contains(test)) {
            let started = Instant::now();
            let output = self.output();
            let name = format!("{} {test}", self.name);
            // A process with one test: what it does to its namespaces, it does to no other test.
            let mut command = self.command(watch, &output)?;
            match run_within(command.args([&test, "--exact", "--nocapture"]), TEST_LIMIT) {
                Ok(()) => {
                    tally.passed += 1;
                    println!("PASS {name} ({})", seconds(started.elapsed()));
                    if tell {
                        println!("{}", std::fs::read_to_string(&output).unwrap_or_default());
                    }
                }
                Err(error) => tally.failed(name, &error, &output),
            }
        }
        Ok(())
    }
}

fn test_binaries(workspace: &Workspace, suite: Suite) -> Result<Vec<TestBinary>> {
    let mut cargo = workspace.cargo();
    // The selection is the one of the build before, so this only lists.
    cargo.arg("build").args(suite.selection());
    cargo.args(["--bins", "--tests", "--message-format", "json-render-diagnostics"]);
    let messages = capture(&mut cargo)?;
    let binaries: Vec<TestBinary> = messages.lines().filter_map(test_binary).collect();
    if binaries.is_empty() {
        bail!("Cargo built no test binaries");
    }
    Ok(binaries)
}

/// Reads one message of Cargo; `None` when it is about something else than a test binary.
fn test_binary(message: &str) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
        return None;
    }
    let target = &message["target"];
    let (name, kind) = (target["name"].as_str()?, target["kind"][0].as_str()?);
    let package_dir = Path::new(message["manifest_path"].as_str()?).parent()?;
    let id = message["package_id"].as_str()?;
    // `path+file:///…/keys#mesh-keys@0.1.0`, or `…/xtask#0.1.0` when the directory has the package's name.
    let package = match id.rsplit_once('#')?.1.split_once('@') {
        Some((package, _version)) => package,
        None => package_dir.file_name()?.to_str()?,
    };
    Some(TestBinary {
        suite: Suite::of(package, kind, name),
        name: format!("{package}::{name}"),
        executable: message["executable"].as_str()?.into(),
        package_dir: package_dir.into(),
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Counts {
    passed: u64,
    ignored: u64,
}

/// The numbers in the last `test result:` line of a test binary.
fn summary(output: &str) -> Option<Counts> {
    let line = output.lines().rev().find(|line| line.starts_with("test result:"))?;
    let number = |what: &str| {
        let before = line.split(&format!(" {what}")).next()?;
        before.rsplit(' ').next()?.parse().ok()
    };
    Some(Counts { passed: number("passed")?, ignored: number("ignored")? })
}

/// The tests in the output of `--list --format terse`.
fn test_names(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo_are_read() {
        let message = r#"{"reason":"compiler-artifact","package_id":"path+file:///src/cni#mesh-cni@0.1.0",
            "manifest_path":"/src/cni/Cargo.toml","target":{"kind":["test"],"name":"verbs"},
            "profile":{"test":true},"executable":"/src/target/debug/deps/verbs-0"}"#;
        let expected = TestBinary {
            suite: Suite::Cni,
            name: "mesh-cni::verbs".into(),
            executable: "/src/target/debug/deps/verbs-0".into(),
            package_dir: "/src/cni".into(),
        };
        assert_eq!(test_binary(message), Some(expected));
        let plain = message.replace("#mesh-cni@0.1.0", "#0.1.0");
        assert_eq!(test_binary(&plain).map(|binary| binary.name), Some("cni::verbs".into()));
        assert_eq!(test_binary(&message.replace(r#""test":true"#, r#""test":false"#)), None);
        assert_eq!(test_binary("   Compiling mesh-keys"), None);
    }

    #[test]
    fn the_last_summary_counts() {
        let output = "test a ... ok\n\ntest result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 1 filtered out; finished in 0.01s\n";
        assert_eq!(summary(output), Some(Counts { passed: 12, ignored: 3 }));
        assert_eq!(summary("signal: 11"), None);
    }

    #[test]
    fn tests_are_listed_and_benchmarks_are_not() {
        assert_eq!(test_names("a::b: test\nc: benchmark\n"), ["a::b"]);
    }
}
