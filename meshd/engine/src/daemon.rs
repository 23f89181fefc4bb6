//! Going to the background: the parent waits until the device is up, or says why it is not.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe, setsid};

/// Which process this is after [`split`].
#[derive(Debug)]
pub enum Side {
    /// The first process. It should exit with this result.
    Parent(Result<(), String>),
    /// The background process. It reports through this.
    Child(Report),
}

/// How the background process tells its parent how it went. Dropped without a word it means failure.
#[derive(Debug)]
pub struct Report(std::fs::File);

const UP: &[u8] = b"up\n";

/// Forks. Must be called while the process has one thread.
///
/// # Errors
/// What the system says; then there is still one process.
pub fn split() -> io::Result<Side> {
    let (read, write) = pipe()?;
    // SAFETY: the caller has one thread, so the child may do whatever its parent may.
    #[expect(unsafe_code, reason = "fork has no safe form")]
    let forked = unsafe { fork() }?;
    match forked {
        ForkResult::Parent { .. } => {
            drop(write);
            Ok(Side::Parent(await_report(read)))
        }
        ForkResult::Child => {
            drop(read);
            setsid()?;
            Ok(Side::Child(Report(write.into())))
        }
    }
}

/// Reads to the end: the child closes its side when it is up or gone.
fn await_report(read: OwnedFd) -> Result<(), String> {
    let mut said = Vec::new();
    // The child's message is short; more than this is none.
    let mut read = std::fs::File::from(read).take(4096);
    match read.read_to_end(&mut said) {
        Ok(_) if said == UP => Ok(()),
        Ok(0) => Err("the background process died without a word".to_owned()),
        Ok(_) => Err(String::from_utf8_lossy(&said).trim_end().to_owned()),
        Err(error) => Err(format!("waiting for the background process failed: {error}")),
    }
}

impl Report {
    /// Lets the parent succeed and leaves its terminal: standard input always, output and errors unless `keep_output`.
    ///
    /// # Errors
    /// What the system says. The parent may have gone by then, which is no error.
    pub fn up(mut self, keep_output: bool) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        if !keep_output {
            dup2_stdout(&null)?;
            dup2_stderr(&null)?;
        }
        match self.0.write_all(UP) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Lets the parent fail with `reason`.
    pub fn failed(mut self, reason: &str) {
        // Nobody is left to tell when this fails.
        let _told = self.0.write_all(reason.as_bytes());
    }
}
