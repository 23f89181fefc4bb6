//! Running other programs: with a heading, a time and a deadline, and never through a shell.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::marker::Marker;

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long a child that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Prints a heading; the answer tells the time it took when it is given to [`Step::done`].
pub(crate) fn step(name: impl Into<String>) -> Step {
    let name = name.into();
    println!("==> {name}");
    Step { name, started: Instant::now() }
}

/// A piece of work with a heading.
#[must_use]
pub(crate) struct Step {
    name: String,
    started: Instant,
}

impl Step {
    /// Prints how long the step took.
    pub(crate) fn done(self) {
        println!("    {}: done in {}", self.name, seconds(self.started.elapsed()));
    }

    /// Runs a program under this heading and fails with it.
    pub(crate) fn run(self, command: &mut Command) -> Result<()> {
        run(command)?;
        self.done();
        Ok(())
    }
}

/// A duration as people read it.
pub(crate) fn seconds(duration: Duration) -> String {
    let total = duration.as_secs_f64();
    if total < 60.0 {
        format!("{total:.1} s")
    } else {
        format!("{} min {:02} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

/// Runs a program with our terminal and fails when it does.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run `{}`", shown(command)))?;
    check(command, status)
}

/// As [`run`], but ends the program and everything it started, daemons too, after `limit`.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    let marker = Marker::new("HAUBERK_XTASK_STEP");
    marker.put_on(command);
    let mut child = command.spawn().with_context(|| format!("cannot run `{}`", shown(command)))?;
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return check(command, status);
        }
        if Instant::now() >= deadline {
            marker.signal("TERM");
            std::thread::sleep(GRACE);
            marker.signal("KILL");
            child.wait()?;
            bail!("`{}` had not ended after {} and was killed", shown(command), seconds(limit));
        }
        std::thread::sleep(POLL);
    }
}

/// What a program writes to its standard output.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", shown(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("the output of `{}`", shown(command)))
}

/// Whether a program ends well; its output is not wanted.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Finds a program as a shell would, and where Debian keeps those for the administrator.
pub(crate) fn find_program(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut dirs = std::env::split_paths(&path).chain(extra);
    dirs.find_map(|dir| {
        let file = dir.join(name.as_ref());
        file.is_file().then_some(file)
    })
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    bail!("`{}` failed ({status})", shown(command))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
