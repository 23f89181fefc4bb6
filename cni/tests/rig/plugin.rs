//! Running the plugin's binary as a runtime does.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Rig;

/// One invocation.
pub struct Call<'a> {
    rig: &'a Rig,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
}

impl<'a> Call<'a> {
    pub fn new(rig: &'a Rig, verb: &str) -> Self {
        let call = Self { rig, env: Vec::new(), stdin: rig.conf(serde_json::json!({})).to_string().into() };
        call.env("CNI_COMMAND", verb).env("CNI_PATH", "/opt/cni/bin")
    }

    pub fn conf(mut self, conf: Value) -> Self {
        self.stdin = conf.to_string().into();
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(key, _)| key != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.env.retain(|(key, _)| key != name);
        self
    }

    /// Starts the plugin in the host's namespace, with nothing else in its environment.
    pub fn start(self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-cni"));
        command
            .env_clear()
            .envs(self.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.rig.host.netns.run(|| command.spawn()).unwrap().unwrap();
        child.stdin.take().unwrap().write_all(&self.stdin).unwrap();
        child
    }

    pub fn run(self) -> Outcome {
        let begin = Instant::now();
        let mut child = self.start();
        Outcome::of(&mut child, begin)
    }
}

/// What an invocation printed and returned.
#[derive(Debug)]
pub struct Outcome {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

impl Outcome {
    /// Waits for the end of a started invocation.
    pub fn of(child: &mut Child, begin: Instant) -> Self {
        let mut stdout = String::new();
        let mut stderr = String::new();
        // The plugin's log of one call fits into the pipe, so that reading one after the other is fine.
        child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let success = child.wait().unwrap().success();
        Self { success, stdout, stderr, elapsed: begin.elapsed() }
    }

    /// The result of a successful ADD or VERSION.
    #[track_caller]
    pub fn result(self) -> Value {
        assert!(self.success, "{self:#?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// Success with nothing on stdout.
    #[track_caller]
    pub fn silent(self) {
        assert!(self.success && self.stdout.is_empty(), "{self:#?}");
    }

    /// The error document of a failure, which has this code.
    #[track_caller]
    pub fn error(self, code: u32) -> Value {
        assert!(!self.success, "{self:#?}");
        let error: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"));
        assert_eq!(error["code"], code, "{self:#?}");
        assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{self:#?}");
        assert!(error["cniVersion"].is_string(), "{self:#?}");
        error
    }
}
