//! What this machine lets us do: rights, devices, namespaces.

use std::fs::OpenOptions;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{find_program, succeeds};

/// Whether we run as root (effective user 0).
pub(crate) fn is_root() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().nth(1));
    Ok(effective.context("/proc/self/status has no Uid line")? == "0")
}

/// Fails in one sentence that names the missing right; `what` says who asks.
pub(crate) fn require_root(what: &str) -> Result<()> {
    if is_root()? {
        return Ok(());
    }
    bail!("{what} needs root, because it creates network namespaces and devices: run it as root or with sudo")
}

/// Fails in one sentence that names what hosts in namespaces cannot do without: TUN and network namespaces.
///
/// Call it after the packages are installed; it runs `ip`.
pub(crate) fn require_networking() -> Result<()> {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        bail!(
            "cannot open /dev/net/tun ({error}), which the userspace WireGuard engine needs: load the module \
             (`modprobe tun`), or give the device to this container (`--device /dev/net/tun`)"
        );
    }
    let ip = find_program("ip").context("cannot find the program `ip` (Debian package iproute2)")?;
    let name = format!("hbk-check-{}", std::process::id());
    let works = succeeds(Command::new(&ip).args(["netns", "add", &name]))
        && succeeds(
            Command::new(&ip)
                .args(["-n", &name, "link", "add", "check0", "type", "veth", "peer", "name", "check1"]),
        )
        && succeeds(Command::new(&ip).args(["-n", &name, "link", "add", "check2", "type", "bridge"]));
    // Also where adding failed half-way; an error here only repeats the one below.
    succeeds(Command::new(&ip).args(["netns", "del", &name]));
    if !works {
        bail!(
            "cannot create a network namespace with a veth pair and a bridge in it: this needs root with \
             CAP_NET_ADMIN and CAP_SYS_ADMIN (in a container: `--privileged`) and a kernel with both devices"
        );
    }
    Ok(())
}

/// Whether `apt-get` and Debian's package names are to be expected here.
pub(crate) fn is_debian() -> bool {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let mut words = release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split(' '));
    words.any(|word| word == "debian") && find_program("apt-get").is_some()
}
