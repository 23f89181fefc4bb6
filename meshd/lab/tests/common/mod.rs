//! Labs for tests: without daemons, with this crate's own helper.
#![allow(dead_code, unreachable_pub, reason = "a module of several test programs, each of which uses a part")]

use std::path::Path;

use mesh_lab::{Binaries, Family, Host, Lab, Options, Pod, ProcessRef};

pub fn binaries() -> Binaries {
    let helper = env!("CARGO_BIN_EXE_mesh-lab");
    Binaries { helper: vec![helper.to_owned()], ..Binaries::in_dir(Path::new(helper).parent().unwrap()) }
}

/// Hosts without daemons. A lab of that name that an earlier, killed run left is removed first.
pub fn hosts(name: &str, nodes: usize) -> Lab {
    Lab::down(name).unwrap();
    Lab::up(Options { nodes, daemons: false, ..Options::new(name, binaries()) }).unwrap()
}

/// A pod made by hand: a veth pair, routed by the host, in the clear. Its addresses are 10.99.N.2 and
/// fd99:N::2, those of the other hosts' pods are routed over the underlay.
pub fn clear_pod(host: &Host, others: &[&Host]) -> Pod {
    let n = host.number();
    let mut script = format!(
        "set -e
        echo 1 > /proc/sys/net/ipv4/ip_forward
        echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
        ip netns add p1
        ip link add v1 type veth peer name eth0 netns p1
        ip addr add 10.99.{n}.1/24 dev v1
        ip addr add fd99:{n}::1/64 dev v1 nodad
        ip link set v1 addrgenmode none up
        ip addr add fe80::1/64 dev v1 nodad
        ip -n p1 link set lo up
        ip -n p1 link set eth0 addrgenmode none up
        ip -n p1 addr add fe80::2/64 dev eth0 nodad
        ip -n p1 addr add 10.99.{n}.2/24 dev eth0
        ip -n p1 addr add fd99:{n}::2/64 dev eth0 nodad
        ip -n p1 route add default via 10.99.{n}.1
        ip -n p1 -6 route add default via fd99:{n}::1\n"
    );
    for other in others {
        let (o, v4, v6) = (other.number(), other.underlay(Family::V4), other.underlay(Family::V6));
        script += &format!("ip route add 10.99.{o}.0/24 via {v4}\nip -6 route add fd99:{o}::/64 via {v6}\n");
    }
    host.exec_ok(&["sh", "-c", &script]).unwrap();
    let (v4, v6) = (format!("10.99.{n}.2").parse().unwrap(), format!("fd99:{n}::2").parse().unwrap());
    host.foreign_pod("p1", "/run/netns/p1", v4, v6).unwrap()
}

/// What a lab could leave behind on the machine, as text. Other tests run at the same time: of mounts and
/// interfaces, only what could be a lab's counts.
pub fn machine() -> String {
    let list = |path: &str| {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .map(|entries| {
                entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
            })
            .unwrap_or_default();
        names.sort();
        names
    };
    let ours = |names: Vec<String>, prefixes: &[&str]| {
        names
            .into_iter()
            .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
            .collect::<Vec<_>>()
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let places = ["/run/mesh-lab", " /etc", " /opt", " /var/lib ", " /run "];
    let mounts: Vec<_> =
        mounts.lines().filter(|line| places.iter().any(|place| line.contains(place))).collect();
    let interfaces = ours(list("/sys/class/net"), &["port", "underlay", "eth", "mesh"]);
    let namespaces = ours(list("/run/netns"), &["labw", "p1", "p2"]);
    let dirs =
        ["/etc/meshd", "/var/lib/meshd", "/etc/cni/net.d", "/opt", "/opt/cni", "/etc", "/var/lib"].map(list);
    format!("{mounts:#?}\n{interfaces:?}\n{namespaces:?}\n{dirs:?}")
}

/// Processes of this machine whose arguments contain `text`.
pub fn processes_with(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path().join("cmdline");
        let line = std::fs::read_to_string(path).unwrap_or_default().replace('\0', " ");
        if line.contains(text) {
            found.push(line);
        }
    }
    found
}

/// The processes of this machine one of whose arguments is `text`.
pub fn processes_of(text: &str) -> Vec<ProcessRef> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok());
    let named = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == text.as_bytes())
    };
    pids.filter(named).filter_map(|pid| ProcessRef::of(pid).ok()).collect()
}
