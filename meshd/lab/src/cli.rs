//! The subcommands of `meshctl lab`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use comfy_table::{Table, presets};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::binaries::Binaries;
use crate::cli_link::{self, LinkArgs};
use crate::demo;
use crate::family::Family;
use crate::forwarder::{self, ForwarderSpec};
use crate::holder::{self, HolderSpec};
use crate::lab::{Lab, Options, Secret};
use crate::state::LabState;
use crate::topology::Topology;

/// Meshes on this one machine: hosts are namespaces, everything else is real.
#[derive(Clone, Debug, Subcommand)]
#[non_exhaustive]
pub enum LabCommand {
    /// Bring up hosts with daemons, and attach pods
    Up(UpArgs),
    /// Run a command in a host or a pod; the exit status is the command's
    Exec {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
        /// HOST or HOST/POD, such as h1 or h1/p1
        target: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// List the pods and their addresses
    Pods {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Bring up a mesh, use it, and prove that nothing crosses the underlay in the clear
    Demo(UpArgs),
    /// From every pod to every pod and node: ping and TCP, IPv4 and IPv6
    Check {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Change what happens to packets between two hosts, or show it
    Link(LinkArgs),
    /// List the links on which something happens to packets
    Links {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Give a host other addresses on the underlay, as a moving laptop gets them
    Renumber {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
        /// The host, such as h1
        host: String,
    },
    /// Let a NAT router forget its mappings, as when it is started anew
    Rebind {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
        /// Name of the router in the topology
        router: String,
    },
    /// Take the lab down and remove everything of it
    Down {
        /// Name of the lab
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Pid 1 of a host; started by the lab itself
    #[command(hide = true)]
    HostInit(HostInitArgs),
    /// One direction of a bad link; started by the lab itself
    #[command(hide = true)]
    LinkForwarder(ForwarderArgs),
    /// Starts a daemon as a child of pid 1; used by the lab itself
    #[command(hide = true)]
    SpawnDetached {
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

/// What to bring up.
#[derive(Clone, Debug, clap::Args)]
pub struct UpArgs {
    /// Number of hosts; default: 3, or as many as the topology names
    #[arg(long)]
    nodes: Option<usize>,
    /// Pods on each host
    #[arg(long, default_value_t = 2)]
    pods: usize,
    /// How the hosts are connected: a topology file, or "full", everybody with everybody
    #[arg(long, default_value = "full", value_name = "FILE")]
    topology: PathBuf,
    /// Name of the lab
    #[arg(long, default_value = "default")]
    name: String,
    /// Join with a key file instead of a password
    #[arg(long)]
    key: bool,
    /// Leave what is there for a look when something fails
    #[arg(long)]
    keep: bool,
}

/// Arguments of pid 1 of a host.
#[derive(Clone, Debug, clap::Args)]
pub struct HostInitArgs {
    #[command(flatten)]
    spec: HolderSpec,
}

/// Arguments of one direction of a bad link.
#[derive(Clone, Debug, clap::Args)]
pub struct ForwarderArgs {
    #[command(flatten)]
    spec: ForwarderSpec,
}

impl UpArgs {
    fn options(&self, binaries: &Binaries) -> Result<Options> {
        let topology = match self.topology.to_str() {
            Some("full") => Topology::default(),
            _ => Topology::read(&self.topology).context("--topology takes \"full\" or a topology file")?,
        };
        let named = topology.hosts_named();
        Ok(Options {
            nodes: self.nodes.unwrap_or(if named == 0 { 3 } else { named }),
            topology,
            pods: self.pods,
            secret: if self.key { Secret::Key } else { Secret::Password },
            keep: self.keep,
            ..Options::new(&self.name, binaries.clone())
        })
    }
}

/// Runs a subcommand. To be called before any thread is started. `exec` ends the process with the exit
/// status of its command.
///
/// # Errors
/// One sentence for the user.
pub fn run(command: LabCommand, binaries: &Binaries) -> Result<()> {
    let mut out = io::stdout();
    match command {
        LabCommand::Up(args) => {
            let lab = demo::up(args.options(binaries)?, &mut out)?;
            lab.set_keep(true);
            writeln!(
                out,
                "lab {:?} is up; `meshctl lab pods`, `exec`, `check` and `down` go on from here",
                lab.name()
            )?;
            Ok(())
        }
        LabCommand::Exec { name, target, command } => exec(&name, &target, &command),
        LabCommand::Pods { name } => pods(&name, &mut out),
        LabCommand::Demo(args) => {
            let options = args.options(binaries)?;
            ensure!(
                options.nodes >= 2 && options.pods >= 1,
                "the demo needs at least 2 nodes and 1 pod on each"
            );
            demo::demo(options, &mut out)
        }
        LabCommand::Check { name } => demo::check(&Lab::open(&name)?, &mut out),
        LabCommand::Link(args) => cli_link::link(&args, &mut out),
        LabCommand::Links { name } => cli_link::links(&Lab::open(&name)?, &mut out),
        LabCommand::Renumber { name, host } => {
            let lab = Lab::open(&name)?;
            let host = lab.host_named(&host)?;
            lab.renumber(&host)?;
            let addresses = Family::BOTH.iter().filter_map(|family| host.address(*family));
            let addresses: Vec<_> = addresses.map(|address| address.to_string()).collect();
            writeln!(out, "{} is now {}", host.name(), addresses.join(" and "))?;
            Ok(())
        }
        LabCommand::Rebind { name, router } => {
            Lab::open(&name)?.rebind(&router)?;
            writeln!(out, "{router} has forgotten its mappings")?;
            Ok(())
        }
        LabCommand::Down { name } => {
            let existed = Lab::down(&name)?;
            let what = if existed { "is down, nothing of it is left" } else { "was not up" };
            writeln!(out, "lab {name:?} {what}")?;
            Ok(())
        }
        LabCommand::HostInit(args) => holder::host_init(&args.spec),
        LabCommand::LinkForwarder(args) => forwarder::forward(&args.spec),
        LabCommand::SpawnDetached { command } => holder::spawn_detached(&command),
    }
}

fn pods(name: &str, out: &mut impl Write) -> Result<()> {
    // Read from the state only: also a broken lab can be looked at.
    let state = LabState::load(name)?;
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["HOST", "POD", "IPV4", "IPV6"]);
    for host in &state.hosts {
        for pod in &host.pods {
            let (ipv4, ipv6) = crate::cni::addresses(&pod.result)?;
            table.add_row([host.name.clone(), pod.name.clone(), ipv4.to_string(), ipv6.to_string()]);
        }
    }
    writeln!(out, "{table}")?;
    Ok(())
}

fn exec(lab: &str, target: &str, command: &[String]) -> Result<()> {
    let lab = Lab::open(lab)?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let start = || match target.split_once('/') {
        Some((host, pod)) => {
            let host = lab.host_named(host)?;
            host.pod_named(pod)?.spawn(host.command_of(&words)?)
        }
        None => {
            let host = lab.host_named(target)?;
            host.spawn(host.command_of(&words)?)
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let status = runtime.block_on(run_forwarding(start))?;
    std::process::exit(holder::exit_code(status))
}

/// Waits for the child and hands signals on to it. What a terminal sends (^C or quit) reaches the child by
/// itself, as it is in the same foreground group.
///
/// By handlers, not by a mask: the child would inherit a mask, and handlers set before it starts leave no
/// moment in which a signal would end this process and leave the child alone.
async fn run_forwarding(start: impl FnOnce() -> Result<Child>) -> Result<ExitStatus> {
    let mut ended = signal(SignalKind::child())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut user_1 = signal(SignalKind::user_defined1())?;
    let mut user_2 = signal(SignalKind::user_defined2())?;
    let mut child = start()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
    let terminal = io::stdin().is_terminal();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let signal = tokio::select! {
            _ = ended.recv() => continue,
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hangup.recv() => Signal::SIGHUP,
            _ = interrupt.recv() => Signal::SIGINT,
            _ = quit.recv() => Signal::SIGQUIT,
            _ = user_1.recv() => Signal::SIGUSR1,
            _ = user_2.recv() => Signal::SIGUSR2,
        };
        if terminal && matches!(signal, Signal::SIGINT | Signal::SIGQUIT) {
            continue;
        }
        // Not reaped yet, so the id is still the child's; it may be a zombie.
        match kill(pid, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => bail!("handing {signal} on to the command: {errno}"),
        }
    }
}
