//! Starting, refusing to start, and ending.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::process::Output;
use std::time::Duration;

use mesh_sys::uapi::{BlockingClient, socket_path};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Kind, Namespace, Process, eventually, mesh_wg, require_root, try_run, unique_name};

const LIMIT: Duration = Duration::from_secs(10);

fn interface_exists(namespace: &Namespace, interface: &str) -> bool {
    try_run("ip", &["-n", &namespace.name, "link", "show", interface]).status.success()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs `mesh-wg` with these arguments in `namespace` to its end.
fn mesh_wg_in(namespace: &Namespace, arguments: &[&str]) -> Output {
    namespace.try_exec(&[&[mesh_wg().to_str().unwrap()], arguments].concat())
}

/// The processes whose last argument is `interface`.
fn processes(interface: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let entry = entry.unwrap();
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let program = words.next().unwrap_or_default();
        if program.ends_with(b"mesh-wg") && words.next_back() == Some(interface.as_bytes()) {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

#[test]
fn in_the_background_the_parent_returns_when_the_device_is_up() {
    require_root();
    let namespace = Namespace::new();
    let interface = unique_name("d");
    let output = mesh_wg_in(&namespace, &[&interface]);
    assert!(output.status.success(), "{}", stderr(&output));
    // At once: no waiting here.
    assert!(interface_exists(&namespace, &interface));
    let meta = fs::symlink_metadata(socket_path(&interface)).unwrap();
    assert!(meta.file_type().is_socket() && meta.permissions().mode() & 0o777 == 0o600);
    assert_eq!(BlockingClient::new(&interface).get().unwrap().listen_port, 0);
    let link = namespace.ip(&format!("link show {interface}"));
    assert!(link.contains("mtu 1420"), "{link}");

    let found = processes(&interface);
    let [pid] = found.as_slice() else { panic!("one process, not {found:?}") };
    let session = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session: i32 =
        session.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap();
    assert_eq!(session, pid.as_raw(), "it leads a session of its own");
    for descriptor in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(), Some("/"));

    kill(*pid, Signal::SIGTERM).unwrap();
    eventually("the process ends", LIMIT, || processes(&interface).is_empty());
    assert!(!interface_exists(&namespace, &interface));
    assert!(!socket_path(&interface).exists());
}

#[test]
fn signals_end_it_cleanly() {
    require_root();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let namespace = Namespace::new();
        let mut device = Process::start(Kind::Mesh, &namespace);
        device.signal(signal);
        assert!(device.wait(), "{signal}: {}", device.log());
        assert!(!interface_exists(&namespace, &device.interface));
        assert!(!socket_path(&device.interface).exists());
    }
}

#[test]
fn deleting_the_interface_ends_it() {
    require_root();
    for up in [false, true] {
        let namespace = Namespace::new();
        let mut device = Process::start(Kind::Mesh, &namespace);
        if up {
            namespace.ip(&format!("link set {} up", device.interface));
        }
        namespace.ip(&format!("link del {}", device.interface));
        assert!(device.wait(), "{}", device.log());
        assert!(!socket_path(&device.interface).exists());
    }
}

#[test]
fn removing_the_socket_ends_it() {
    require_root();
    let namespace = Namespace::new();
    let mut device = Process::start(Kind::Mesh, &namespace);
    fs::remove_file(socket_path(&device.interface)).unwrap();
    assert!(device.wait(), "{}", device.log());
    assert!(!interface_exists(&namespace, &device.interface));
}

#[test]
fn deleting_the_namespace_ends_it() {
    require_root();
    let namespace = Namespace::new();
    let mut device = Process::start(Kind::Mesh, &namespace);
    // A namespace lives as long as a process is in it; leaving it to the one that holds the device changes nothing.
    device.signal(Signal::SIGTERM);
    assert!(device.wait());
    drop(namespace);
    assert!(!socket_path(&device.interface).exists());
}

#[test]
fn a_second_instance_is_refused_and_the_first_goes_on() {
    require_root();
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    for arguments in [["-f", device.interface.as_str()].as_slice(), &[device.interface.as_str()]] {
        let output = mesh_wg_in(&namespace, arguments);
        assert!(!output.status.success());
        let error = stderr(&output);
        assert!(error.contains("already running") && error.lines().count() <= 1, "{error}");
    }
    device.state();
    assert!(interface_exists(&namespace, &device.interface));
}

#[test]
fn an_interface_in_use_is_not_taken_away() {
    require_root();
    // Another process holds the TUN device, its socket is out of sight.
    let namespace = Namespace::new();
    let device = Process::start(Kind::Mesh, &namespace);
    let script =
        format!("mount -t tmpfs none /var/run/ && exec {} -f {}", mesh_wg().display(), device.interface);
    let output = namespace.try_exec(&["unshare", "-m", "sh", "-c", &script]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("is in use by another process"), "{}", stderr(&output));
    device.state();
}

#[test]
fn after_kill_9_a_new_instance_takes_over() {
    require_root();
    let namespace = Namespace::new();
    let mut first = Process::start(Kind::Mesh, &namespace);
    first.signal(Signal::SIGKILL);
    assert!(!first.wait());
    assert!(socket_path(&first.interface).exists(), "the stale socket is there");
    eventually("the interface is gone", LIMIT, || !interface_exists(&namespace, &first.interface));
    let second = Process::start_named(Kind::Mesh, &namespace, &first.interface);
    assert!(second.log().contains("removed the socket of a process that is gone"), "{}", second.log());
}

#[test]
fn a_name_that_is_taken_is_refused() {
    require_root();
    let namespace = Namespace::new();
    let interface = unique_name("x");
    namespace.ip(&format!("link add {interface} type veth peer name y0"));
    let output = mesh_wg_in(&namespace, &[&interface]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("exists and is not a TUN device"), "{}", stderr(&output));
    assert!(!socket_path(&interface).exists());
    assert!(processes(&interface).is_empty());
}

#[test]
fn without_the_device_file_or_the_right_it_says_so() {
    require_root();
    let namespace = Namespace::new();
    let interface = unique_name("n");
    let program = mesh_wg();
    let program = program.to_str().unwrap();
    for (setup, expected) in [
        ("mount -t tmpfs none /dev/net && exec", "/dev/net/tun does not exist"),
        (
            "chmod 666 /dev/net/tun && exec setpriv --bounding-set -net_admin --inh-caps -net_admin",
            "CAP_NET_ADMIN",
        ),
    ] {
        // In a mount namespace with a /dev of its own: nothing of this is seen outside.
        let script = format!(
            "mkdir -p /run/{interface} && mount -t tmpfs none /run/{interface} && cd /run/{interface} && \
             mkdir net && mknod net/tun c 10 200 && mount --bind net /dev/net && {setup} {program} {interface}"
        );
        let output = namespace.try_exec(&["unshare", "-m", "sh", "-c", &script]);
        let error = stderr(&output);
        assert!(!output.status.success(), "{setup}");
        assert!(error.contains(expected) && error.lines().count() == 1, "{setup}: {error}");
        assert!(!socket_path(&interface).exists());
    }
    fs::remove_dir(format!("/run/{interface}")).unwrap();
}

#[test]
fn bad_arguments_are_refused() {
    require_root();
    let namespace = Namespace::new();
    for (arguments, expected) in [
        (["much-too-long-a-name"].as_slice(), "cannot name an interface"),
        (&["a/b"], "cannot name an interface"),
        (&[], "Usage"),
        (&["--nonsense", "wg0"], "--nonsense"),
    ] {
        let output = mesh_wg_in(&namespace, arguments);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(expected), "{arguments:?}: {}", stderr(&output));
    }
    let version = mesh_wg_in(&namespace, &["--version"]);
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("mesh-wg "));
    let help = mesh_wg_in(&namespace, &["--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("LOG_LEVEL"));
    let output = namespace.try_exec(&["env", "LOG_LEVEL=loud", mesh_wg().to_str().unwrap(), "wg0"]);
    assert!(stderr(&output).contains("LOG_LEVEL=\"loud\" is not known"), "{}", stderr(&output));
}
