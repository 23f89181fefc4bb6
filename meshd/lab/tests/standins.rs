//! `up`, `pods`, `check`, `demo`, `down` with stand-ins for the daemon, the plugin and `meshctl` that build a
//! mesh without any encryption. It works as a network, so `check` is satisfied; the proof of `demo` must not
//! be. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{binaries, machine, processes_with};
use mesh_lab::{Binaries, Family, Lab, Options, Secret, poll_until};

const MESHD: &str = r#"#!/bin/sh
set -e
n=$(hostname | tr -d h)
test "$1" = "--password-file" && test -s "$2" && test "$3 $4" = "--join 198.18.0.1"
echo "node $n with $*"
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
ip link add mesh0 type bridge
ip link set mesh0 addrgenmode none up
ip addr add 10.99.$n.1/32 dev mesh0
ip addr add fd99:$n::1/128 dev mesh0 nodad
for o in 1 2 3 4; do
  test $o = $n || ip route add 10.99.$o.0/24 via 198.18.0.$o
  test $o = $n || ip route add fd99:$o::/64 via fd00:18::$o
done
touch /run/ready
exec sleep 1000
"#;

const MESH_CNI: &str = r#"#!/bin/sh
cat > /run/config.json
grep -q '"type":"mesh-cni"' /run/config.json || exit 9
n=$(hostname | tr -d h)
case $CNI_COMMAND in
STATUS) test -e /run/ready && exit 0; echo '{"code":50,"msg":"not ready"}'; exit 1 ;;
DEL) ip link delete v${CNI_CONTAINERID##*-}; exit 0 ;;
ADD) ;;
*) exit 4 ;;
esac
set -e
pod=${CNI_CONTAINERID##*-}
test "$CNI_NETNS" = /run/netns/$pod
if [ $pod = bad ]; then echo '{"code":11,"msg":"no address left","details":"the block is full"}'; exit 1; fi
i=$((1 + ${pod#p}))
ip link add v$pod type veth peer name eth0 netns $pod
ip link set v$pod addrgenmode none up
ip addr add fe80::1/64 dev v$pod nodad
ip addr add 169.254.1.1/32 dev v$pod
ip route add 10.99.$n.$i dev v$pod
ip route add fd99:$n::$i dev v$pod
ip -n $pod link set lo up
ip -n $pod link set eth0 addrgenmode none up
ip -n $pod addr add 10.99.$n.$i/32 dev eth0
ip -n $pod addr add fd99:$n::$i/128 dev eth0 nodad
ip -n $pod addr add fe80::2/64 dev eth0 nodad
ip -n $pod route add default via 169.254.1.1 dev eth0 onlink
ip -n $pod route add ::/0 via fe80::1 dev eth0
echo '{"cniVersion":"1.1.0","ips":[{"address":"10.99.'$n.$i'/32"},{"address":"fd99:'$n::$i'/128"}]}'
"#;

const MESHCTL: &str = r#"#!/bin/sh
n=$(hostname | tr -d h)
test "$1" = status && test -e /run/ready || exit 1
cat <<END
{"addresses":{"ipv4":"10.99.$n.1","ipv6":"fd99:$n::1"},"cluster":{"ipv4":"10.99.0.0/16","ipv6":"fd99::/16"},
"peers":[{"gossip":{"reachable":true},"tunnel":{"ready":true}},{"gossip":{"reachable":true},"tunnel":{"ready":true}},
{"gossip":{"reachable":false},"tunnel":{"ready":true}},{"gossip":{"reachable":true},"tunnel":{"ready":false}}]}
END
"#;

/// The three scripts in a directory, with the real helper.
fn standins(dir: &Path) -> Binaries {
    for (name, text) in
        [("meshd", MESHD), ("mesh-cni", MESH_CNI), ("meshctl", MESHCTL), ("mesh-wg", "#!/bin/sh\n")]
    {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    Binaries { helper: binaries().helper, ..Binaries::in_dir(dir) }
}

#[test]
fn a_mesh_comes_up_is_checked_and_goes() {
    let before = machine();
    let dir = tempfile::tempdir().unwrap();
    Lab::down("labw-stand").unwrap();
    let options = Options { nodes: 3, pods: 2, ..Options::new("labw-stand", standins(dir.path())) };
    let started = Instant::now();
    let lab = Lab::up(options).unwrap();
    lab.wait_connected(Duration::from_secs(5)).unwrap();
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());

    lab.wait_meshed(Duration::from_secs(5)).unwrap();
    let report = lab.check(Duration::from_secs(5)).unwrap();
    assert_eq!(report.silent, []);
    assert_eq!(report.failed().count(), 0, "{}", report.matrix());
    // 6 pods ask 5 pods by 2 means and 3 nodes by 1, in 2 families.
    assert_eq!(report.probes.len(), 6 * (5 * 2 + 3) * 2);

    lab.cut(&lab.host(0), &lab.host(2)).unwrap();
    let report = lab.check(Duration::from_millis(500)).unwrap();
    // 2 pods to 2 pods (4 probes) and 1 node (2 probes), both ways.
    assert_eq!(report.failed().count(), 2 * 2 * (2 * 4 + 2), "{}", report.matrix());
    assert!(report.matrix().contains("no ping4 tcp4 ping6 tcp6"), "{}", report.matrix());
    let error = lab.wait_connected(Duration::from_millis(300)).unwrap_err().to_string();
    assert!(error.contains("h1/p1 > 10.99.3.2"), "{error}");
    lab.heal_all().unwrap();

    // Every node has the same password, readable by its owner only.
    let password = |host: usize| fs::read_to_string(lab.host(host).dir().join("etc/password")).unwrap();
    assert_eq!(password(0).trim().len(), 32);
    assert_eq!(password(0), password(2));
    let mode = lab.host(0).exec_ok(&["stat", "-c", "%a", "/etc/meshd/password"]).unwrap();
    assert_eq!(mode.trim(), "600");

    let refused = format!("{:#}", lab.host(0).add_pod("bad").unwrap_err());
    assert!(refused.contains("code 11") && refused.contains("the block is full"), "{refused}");
    assert!(!lab.host(0).exec_ok(&["ip", "netns", "list"]).unwrap().contains("bad"));
    lab.host(0).remove_pod("p1").unwrap();
    let error = lab.host(0).pod_named("p1").unwrap_err().to_string();
    assert!(error.contains("no pod \"p1\"; it has: p2"), "{error}");

    let fourth = lab.add_host().unwrap();
    fourth.spawn_daemon(&["--name", "late"]).unwrap();
    fourth.wait_ready(Duration::from_secs(5)).unwrap();
    assert!(fourth.log().unwrap().contains("--join 198.18.0.1 --name late"));
    let late = fourth.add_pod("p1").unwrap();
    // The stand-ins know of two peers, never of three.
    let error = lab.wait_meshed(Duration::from_millis(200)).unwrap_err().to_string();
    assert!(error.contains("connected with 3 peers"), "{error}");
    // A daemon that says nothing takes nothing from its pods, and is told.
    fourth.exec_ok(&["rm", "/run/ready"]).unwrap();
    let report = lab.check(Duration::from_secs(5)).unwrap();
    assert_eq!((report.failed().count(), report.silent.len()), (0, 1), "{}", report.matrix());
    assert_eq!(report.silent[0].0, "h4");
    late.tcp_send_to(&lab.host(1).pod(0).unwrap(), Family::V6, 1 << 20).unwrap();

    drop((late, fourth, lab));
    assert_eq!(machine(), before);
}

#[test]
fn a_daemon_that_ends_at_once_is_quoted_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let programs = standins(dir.path());
    fs::write(&programs.meshd, "#!/bin/sh\necho the password is wrong; exit 3\n").unwrap();
    Lab::down("labw-end").unwrap();
    let start = Instant::now();
    let error = format!(
        "{:#}",
        Lab::up(Options { nodes: 1, ..Options::new("labw-end", programs.clone()) }).unwrap_err()
    );
    assert!(error.contains("the password is wrong"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10), "it ended at once: no reason to wait");
    assert!(!Path::new("/run/mesh-lab/labw-end").exists());

    let options = Options { secret: Secret::Key, ..Options::new("labw-end", programs) };
    let error = format!("{:#}", Lab::up(options).unwrap_err());
    assert!(error.contains("keygen failed"), "{error}");
}

#[test]
fn the_demo_does_not_accept_a_mesh_in_the_clear() {
    let dir = tempfile::tempdir().unwrap();
    standins(dir.path());
    // The command line finds programs beside itself.
    fs::copy(env!("CARGO_BIN_EXE_mesh-lab"), dir.path().join("mesh-lab")).unwrap();
    fs::write(
        dir.path().join("meshctl"),
        MESHCTL.replace(
            "test \"$1\"",
            "test \"$1\" = lab && shift && exec ${0%/*}/mesh-lab \"$@\"\ntest \"$1\"",
        ),
    )
    .unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(dir.path().join("meshctl")).arg("lab").args(args).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.success(), text)
    };
    Lab::down("labw-demo").unwrap();
    let (fine, text) = run(&["demo", "--name", "labw-demo", "--pods", "1"]);
    assert!(!fine, "{text}");
    assert!(text.contains("are not what a mesh may send"), "{text}");
    assert!(text.contains("× pod payload in the clear"), "{text}");
    assert!(text.contains("every byte compared"), "{text}");

    // It stays up for a look.
    let (fine, text) = run(&["pods", "--name", "labw-demo"]);
    assert!(
        fine && text.contains("h2") && text.contains("10.99.2.2") && text.contains("fd99:2::2"),
        "{text}"
    );
    let (fine, text) = run(&["exec", "--name", "labw-demo", "h1/p1", "ping", "-c", "1", "10.99.2.2"]);
    assert!(fine, "{text}");
    let (fine, text) = run(&["check", "--name", "labw-demo"]);
    assert!(fine && text.contains("probes succeeded"), "{text}");
    let (fine, text) = run(&["down", "--name", "labw-demo"]);
    assert!(fine && text.contains("nothing of it is left"), "{text}");
}

#[test]
fn an_up_that_is_killed_half_way_is_removed_by_down() {
    let dir = tempfile::tempdir().unwrap();
    standins(dir.path());
    let program = dir.path().join("mesh-lab");
    fs::copy(env!("CARGO_BIN_EXE_mesh-lab"), &program).unwrap();
    let script = MESHCTL
        .replace("test \"$1\"", "test \"$1\" = lab && shift && exec ${0%/*}/mesh-lab \"$@\"\ntest \"$1\"");
    fs::write(dir.path().join("meshctl"), script).unwrap();
    let lab = Path::new("/run/mesh-lab/labw-half");
    Lab::down("labw-half").unwrap();
    for stage in ["state.json", "switch", "hosts/h1", "hosts/h3", "logs/h1.log", "logs/h3.log"] {
        let before = machine();
        let mut up = Command::new(&program)
            .args(["up", "--name", "labw-half"])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        poll_until(stage, Duration::from_secs(10), || lab.join(stage).exists()).unwrap();
        up.kill().unwrap();
        up.wait().unwrap();
        assert!(Lab::down("labw-half").unwrap(), "{stage}");
        poll_until("end of all holders", Duration::from_secs(5), || {
            processes_with("/run/mesh-lab/labw-half/").is_empty()
        })
        .unwrap();
        assert!(!lab.exists());
        assert_eq!(machine(), before, "{stage}");
    }
}
