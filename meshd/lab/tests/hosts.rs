//! Hosts are machines of their own, and nothing of them is left afterwards. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{binaries, hosts, machine, processes_with};
use mesh_lab::{Lab, Options, ProcessRef, poll_until};
use nix::sys::signal::Signal;

#[test]
fn a_host_is_a_machine_of_its_own() {
    let before = machine();
    let lab = hosts("labw-own", 2);
    let (a, b) = (lab.host(0), lab.host(1));

    assert_eq!(a.exec_ok(&["hostname"]).unwrap().trim(), "h1");
    assert_eq!(b.exec_ok(&["hostname"]).unwrap().trim(), "h2");
    // Pid 1 is the holder; ps sees the host's processes and no others.
    let processes = a.exec_ok(&["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]).unwrap();
    assert!(processes.trim().parse::<u32>().unwrap() <= 4, "{processes}");
    assert!(a.exec_ok(&["cat", "/proc/1/cmdline"]).unwrap().contains("host-init"));
    assert_eq!(
        a.exec_ok(&["sh", "-c", "ls /sys/class/net | grep -v bonding | xargs"]).unwrap().trim(),
        "eth0 lo"
    );
    assert!(a.exec_ok(&["ip", "-o", "link", "show", "lo"]).unwrap().contains("UP"));

    // Files written in one host are neither in the other nor on the machine.
    for file in
        ["/etc/meshd/x", "/var/lib/meshd/x", "/etc/cni/net.d/x", "/run/x", "/opt/x", "/etc/x", "/var/lib/x"]
    {
        a.exec_ok(&["sh", "-c", &format!("echo secret > {file}")]).unwrap();
        assert!(!b.exec(&["cat", file]).unwrap().status.success(), "{file}");
        assert!(!Path::new(file).exists(), "{file}");
    }
    assert_eq!(std::fs::read_to_string(a.dir().join("etc/x")).unwrap(), "secret\n");
    assert!(a.exec_ok(&["cat", "/etc/passwd"]).unwrap().contains("root"));
    assert!(a.exec_ok(&["cat", "/etc/cni/net.d/10-mesh.conflist"]).unwrap().contains("mesh-cni"));
    // Names of network namespaces as well.
    a.exec_ok(&["ip", "netns", "add", "labw-pod"]).unwrap();
    assert!(!b.exec_ok(&["ip", "netns", "list"]).unwrap().contains("labw-pod"));
    assert!(!Path::new("/run/netns/labw-pod").exists());

    // Exit status and output come through.
    let output = a.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]).unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert!(format!("{:#}", a.exec(&["no-such-program"]).unwrap_err()).contains("no-such-program"));

    drop(lab);
    assert_eq!(machine(), before);
    assert!(!Path::new("/run/mesh-lab/labw-own").exists());
    assert_eq!(processes_with("/run/mesh-lab/labw-own/"), Vec::<String>::new());
}

#[test]
fn the_command_line_exits_like_its_command_and_names_what_is_wrong() {
    let lab = hosts("labw-cli", 1);
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mesh-lab")).args(args).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, out, _) = run(&["exec", "--name", "labw-cli", "h1", "sh", "-c", "hostname; exit 42"]);
    assert_eq!((code, out.as_str()), (Some(42), "h1\n"));
    let (code, ..) = run(&["exec", "--name", "labw-cli", "h1", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(code, Some(128 + 9));
    let (code, _, err) = run(&["exec", "--name", "labw-cli", "h9", "true"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("no host \"h9\"") && err.contains("h1"), "{err}");
    let (_, _, err) = run(&["exec", "--name", "labw-cli", "h1/p1", "true"]);
    assert!(err.contains("no pod \"p1\""), "{err}");
    let (_, _, err) = run(&["up", "--name", "labw-x", "--topology", "nat"]);
    assert!(err.contains("\"full\" or a topology file") && err.contains("reading nat"), "{err}");
    let (_, _, err) = run(&["pods", "--name", "labw-none"]);
    assert!(err.contains("not up"), "{err}");
    let (_, _, err) = run(&["down", "--name", "../x"]);
    assert!(err.contains("not valid"), "{err}");
    let (code, out, _) = run(&["down", "--name", "labw-none"]);
    assert!(code == Some(0) && out.contains("was not up"), "{out}");

    let again = Lab::up(Options { daemons: false, ..Options::new("labw-cli", binaries()) }).unwrap_err();
    assert!(again.to_string().contains("is up already"), "{again}");
    assert_eq!(lab.host(0).exec_ok(&["hostname"]).unwrap().trim(), "h1");

    // Somebody without rights is told so.
    let output = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--clear-groups",
            env!("CARGO_BIN_EXE_mesh-lab"),
            "down",
            "--name",
            "labw-cli",
        ])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("needs root"), "{output:?}");
}

#[test]
fn a_signal_to_exec_reaches_the_command() {
    let lab = hosts("labw-sig", 1);
    let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-lab"))
        .args([
            "exec",
            "--name",
            "labw-sig",
            "h1",
            "sh",
            "-c",
            "trap 'exit 33' TERM; echo > /run/ready; while :; do sleep 0.01; done",
        ])
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ready = || lab.host(0).exec(&["test", "-e", "/run/ready"]).unwrap().status.success();
    poll_until("the command", Duration::from_secs(5), ready).unwrap();
    let process = ProcessRef::of(i32::try_from(child.id()).unwrap()).unwrap();
    process.signal(Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(33));
}

#[test]
fn a_daemon_is_started_killed_and_restarted() {
    let lab = hosts("labw-daemon", 1);
    let host = lab.host(0);
    let script = "echo hello from $$; trap 'exit 5' TERM; (exec sleep 1000) & while :; do sleep 0.01; done";
    let start = || host.spawn_program("sh", vec!["-c".to_owned(), script.to_owned()]).unwrap();
    let daemon = start();
    assert!(daemon.process.is_alive());
    assert!(format!("{:#}", host.spawn_program("sh", vec![]).unwrap_err()).contains("runs already"));
    poll_until("its log", Duration::from_secs(5), || host.log().unwrap().contains("hello")).unwrap();
    assert!(host.log().unwrap().contains(&format!("hello from {}", daemon.inner_pid)));
    // Nobody but the host's pid 1 is its parent, so nothing outside has to reap it.
    let status = host.exec_ok(&["cat", &format!("/proc/{}/status", daemon.inner_pid)]).unwrap();
    assert!(status.contains("PPid:\t1\n"), "{status}");

    host.kill9_daemon().unwrap();
    assert_eq!(host.daemon_ending().unwrap().as_deref(), Some("killed SIGKILL"));
    // What it had started goes on: as an engine does.
    assert!(host.processes().unwrap().iter().any(|(_, arguments)| arguments == &["sleep", "1000"]));

    let second = start();
    assert_ne!(second.inner_pid, daemon.inner_pid);
    poll_until("its trap", Duration::from_secs(5), || host.log().unwrap().matches("hello").count() == 2)
        .unwrap();
    host.stop_daemon().unwrap();
    assert_eq!(host.daemon_ending().unwrap().as_deref(), Some("exited 5"));

    let error = format!("{:#}", host.spawn_program("/no/such/daemon", vec![]).unwrap_err());
    assert!(error.contains("/no/such/daemon"), "{error}");
}

#[test]
fn whatever_was_killed_down_removes_the_rest() {
    let before = machine();
    // A host, the switch, or both are gone; a process sits in a host; the state file is lost.
    for round in 0..4 {
        let lab = hosts("labw-crash", 2);
        let holder = |host: usize| {
            let pids = lab.host(host).processes().unwrap();
            pids.into_iter()
                .find(|(_, arguments)| arguments.iter().any(|word| word == "host-init"))
                .unwrap()
                .0
        };
        let mut sleeper = lab.host(1).command("sleep");
        sleeper.arg("1000");
        let mut sleeper = lab.host(1).spawn(sleeper).unwrap();
        match round {
            0 => holder(0).signal(Signal::SIGKILL).unwrap(),
            1 => lab.host(0).exec_ok(&["sh", "-c", "kill -TERM 1"]).map(drop).unwrap_or_default(),
            2 => std::fs::remove_file(lab.dir().join("state.json")).unwrap(),
            _ => std::fs::write(lab.dir().join("state.json"), "{").unwrap(),
        }
        // As another process would: what this one holds open must not matter.
        assert!(Lab::down("labw-crash").unwrap());
        assert!(!sleeper.wait().unwrap().success());
        assert!(!Lab::down("labw-crash").unwrap());
        drop(lab);
        assert_eq!(processes_with("/run/mesh-lab/labw-crash/"), Vec::<String>::new(), "round {round}");
    }
    assert_eq!(machine(), before);
}

#[test]
fn a_lab_survives_the_process_that_made_it_and_no_holder_is_unrecorded() {
    Lab::down("labw-parent").unwrap();
    let lab = hosts("labw-parent", 1);
    lab.set_keep(true);
    drop(lab);
    let lab = Lab::open("labw-parent").unwrap();
    assert_eq!(lab.host_named("h1").unwrap().exec_ok(&["hostname"]).unwrap().trim(), "h1");
    drop(lab);
    assert!(Lab::down("labw-parent").unwrap());
    assert!(Lab::open("labw-parent").unwrap_err().to_string().contains("not up"));

    // A holder whose starter dies before it is recorded goes away by itself.
    let output = Command::new("unshare")
        .args([
            "-mnpuf",
            env!("CARGO_BIN_EXE_mesh-lab"),
            "host-init",
            "--host",
            "h1",
            "--dir",
            "/run/mesh-lab/labw-x",
        ])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("went away"), "{output:?}");
    assert!(!Path::new("/run/mesh-lab/labw-x").exists());
}
