//! What encrypts packets: either implementation, chosen by option or by what the host has.

use std::fs;
use std::process::Stdio;

use crate::support::{Kind, Link, Namespace, Process, Underlay, mesh_wg, require_root, unique_name};

fn start(namespace: &Namespace, choice: &str) -> Process {
    let option = |command: &mut std::process::Command| {
        command.args(["--aead", choice]);
    };
    Process::start_prepared(Kind::Mesh, namespace, &unique_name("w"), option, |_| {})
}

/// What the device says about its choice.
fn said(device: &Process) -> String {
    let log = device.log();
    let line = log.lines().find_map(|line| line.split_once("packets are encrypted by "));
    line.unwrap_or_else(|| panic!("nothing is said about the choice:\n{log}")).1.to_owned()
}

/// Whether the processor has what Intel's library is worth using with.
fn processor_is_fit() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags: Vec<_> =
        cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or("").split(' ').collect();
    ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512ifma", "vaes", "gfni", "vpclmulqdq"]
        .iter()
        .all(|needed| flags.contains(needed))
}

#[test]
fn the_fastest_that_the_machine_has_is_taken() {
    require_root();
    let namespace = Namespace::new();
    let said = said(&start(&namespace, "auto"));
    // `cargo xtask test` installs the library where Debian has it.
    if processor_is_fit() {
        assert!(said.starts_with("ipsec-mb "), "{said}");
    } else {
        assert!(said.starts_with("ring (not ipsec-mb: the processor lacks AVX-512"), "{said}");
    }
}

#[test]
fn both_implementations_understand_each_other() {
    require_root();
    for choices in [["ring", "auto"], ["auto", "ring"], ["ring", "ring"]] {
        let mut choice = choices.into_iter();
        let link = Link::of(Underlay::V4, None, |namespace| start(namespace, choice.next().unwrap()));
        link.check_ping();
        link.check_tcp(16 << 20);
        for (end, choice) in link.ends.iter().zip(choices) {
            assert!(choice != "ring" || said(&end.device) == "ring", "{}", said(&end.device));
        }
    }
}

#[test]
fn a_library_that_cannot_be_loaded_is_done_without_unless_it_was_asked_for() {
    require_root();
    let directory = tempfile::tempdir().unwrap();
    for name in ["libIPSec_MB.so.1", "libIPSec_MB.so.2"] {
        fs::write(directory.path().join(name), "no library").unwrap();
    }
    let broken = |command: &mut std::process::Command| {
        command.env("LD_LIBRARY_PATH", directory.path());
    };
    let namespace = Namespace::new();
    let device = Process::start_prepared(Kind::Mesh, &namespace, &unique_name("w"), broken, |_| {});
    assert!(said(&device).starts_with("ring (not ipsec-mb: "), "{}", said(&device));

    let mut command = namespace.command(mesh_wg().to_str().unwrap());
    broken(&mut command);
    let asked =
        command.args(["--aead", "ipsec-mb", "-f", &unique_name("w")]).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&asked.stderr);
    assert!(!asked.status.success() && error.contains("mesh-wg: --aead: the "), "{error}");
}
