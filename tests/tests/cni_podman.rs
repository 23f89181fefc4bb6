//! A real runtime: podman with its CNI backend runs a container that talks to a pod on another host.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::time::Duration;

use mesh_lab::{Family, Options};
use mesh_tests::{options, up};

#[test]
fn a_podman_container_talks_to_a_pod_on_another_host() {
    let lab = up(Options { nodes: 2, pods: 1, ..options("t-podman") });
    let (host, peer) = (lab.host(0), lab.host(1).pod(0).unwrap());
    let setup = "set -e
        mkdir -p /run/rootfs/bin /run/storage /run/graph
        cp /bin/busybox /run/rootfs/bin/busybox
        for tool in sh ping ping6 ip sleep cat; do ln -sf busybox /run/rootfs/bin/$tool; done
        mkdir -p /run/rootfs/proc /run/rootfs/sys /run/rootfs/dev /run/rootfs/etc /run/rootfs/tmp
        cat > /run/containers.conf <<EOF
[network]
network_backend = \"cni\"
network_config_dir = \"/etc/cni/net.d\"
cni_plugin_dirs = [\"/opt/cni/bin\", \"/usr/lib/cni\"]
default_network = \"mesh\"
[engine]
cgroup_manager = \"cgroupfs\"
events_logger = \"file\"
EOF";
    host.exec_ok(&["sh", "-c", setup]).unwrap();
    let (v4, v6) = (peer.address(Family::V4), peer.address(Family::V6));
    let run = format!(
        "CONTAINERS_CONF=/run/containers.conf podman --root /run/graph --runroot /run/storage --storage-driver vfs \
         --runtime runc run --rm --security-opt seccomp=unconfined --network mesh --rootfs /run/rootfs \
         sh -c 'ip addr show eth0 && ping -c 3 -W 2 {v4} && ping -c 3 -W 2 {v6}'"
    );
    let out = host.exec(&["sh", "-c", &run]).unwrap();
    // Podman leaves the parent of its control groups.
    let tidy =
        "find /sys/fs/cgroup -depth -type d -path '*/libpod_parent*' -exec rmdir {} + 2>/dev/null; true";
    host.exec_ok(&["sh", "-c", tidy]).unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "stdout:\n{stdout}\nstderr:\n{stderr}");
    assert_eq!(stdout.matches("3 packets received").count(), 2, "{stdout}");
    // It is gone with its addresses.
    mesh_lab::poll_until("the lease is released", Duration::from_secs(5), || {
        host.status().is_ok_and(|status| status["attachments"] == 1)
    })
    .unwrap();
}
