//! Finding processes by a variable in their environment: children inherit it, also those that become daemons,
//! so that what we started is told from everything else on the machine, whatever it is called.

use std::process::Command;

use crate::command::succeeds;

/// A variable that the processes of one run carry.
#[derive(Clone)]
pub(crate) struct Marker {
    name: &'static str,
    value: String,
}

/// A process that carries a marker.
pub(crate) struct Marked {
    /// Process id.
    pub(crate) pid: u32,
    /// Its command line, words joined by spaces.
    pub(crate) command_line: String,
}

impl Marker {
    /// A marker that no earlier run of this machine carried.
    pub(crate) fn new(name: &'static str) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { name, value: format!("{}-{}", std::process::id(), now.as_nanos()) }
    }

    /// Marks a program that is about to start.
    pub(crate) fn put_on(&self, command: &mut Command) {
        command.env(self.name, &self.value);
    }

    /// Every living process that carries the marker. Processes of other users are seen by root only.
    pub(crate) fn carriers(&self) -> Vec<Marked> {
        let wanted = format!("{}={}", self.name, self.value);
        let carries =
            |environment: &[u8]| environment.split(|&byte| byte == 0).any(|line| line == wanted.as_bytes());
        processes()
            .into_iter()
            .filter(|pid| std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|found| carries(&found)))
            .map(|pid| Marked { pid, command_line: command_line(pid) })
            .collect()
    }

    /// Sends a signal to every carrier, by its id.
    pub(crate) fn signal(&self, signal: &str) {
        for process in self.carriers() {
            // It may have ended on its own in between, which is as well.
            succeeds(Command::new("kill").args([&format!("-{signal}"), &process.pid.to_string()]));
        }
    }
}

/// The ids of all processes.
pub(crate) fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The command line of a process, or nothing when it has ended or is part of the kernel.
pub(crate) fn command_line(pid: u32) -> String {
    let raw = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_and_what_they_leave_behind_are_found_and_ended() {
        let marker = Marker::new("XTASK_MARKER_TEST");
        assert!(marker.carriers().is_empty());
        let mut shell = Command::new("sh");
        marker.put_on(&mut shell);
        // The shell ends at once; the sleep is re-parented to init.
        assert!(succeeds(shell.args(["-c", "sleep 60 >/dev/null & exit 0"])));
        let found: Vec<String> = marker.carriers().into_iter().map(|process| process.command_line).collect();
        // The copy of the shell may not have become the sleep yet.
        assert!(found.len() == 1 && found[0].contains("sleep 60"), "{found:?}");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while !marker.carriers().is_empty() {
            // More than once: a process that is just becoming another program shows no environment for a moment.
            marker.signal("KILL");
            assert!(std::time::Instant::now() < deadline, "the sleep outlived SIGKILL");
        }
    }
}
