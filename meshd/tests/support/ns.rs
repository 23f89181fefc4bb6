//! Network namespaces of a test, and what joins them.

use std::net::IpAddr;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use mesh_sys::netns::NetNs;
use mesh_sys::rtnl::{Blocking, LinkChange, Mac, VethPeer, VethSpec};

/// A namespace of this test; deleted when dropped, also by a panic.
pub(crate) struct Ns {
    pub(crate) name: String,
    pub(crate) netns: NetNs,
}

impl Ns {
    pub(crate) fn new(label: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces");
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("dpw-{}-{label}-{n}", std::process::id());
        let netns = NetNs::create_named(&name).unwrap();
        let ns = Self { name, netns };
        ns.up(1);
        ns
    }

    pub(crate) fn rtnl(&self) -> Blocking {
        Blocking::open_in(&self.netns).unwrap()
    }

    pub(crate) fn up(&self, index: u32) {
        self.rtnl().set_link(index, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
    }

    pub(crate) fn index(&self, device: &str) -> u32 {
        self.rtnl().link(device).unwrap().unwrap().index
    }

    /// Runs a command inside; its output, which must be a success.
    pub(crate) fn sh(&self, command: &str) -> String {
        let output = self.try_sh(command);
        assert!(
            output.status.success(),
            "`{command}` in {}: {}{}",
            self.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn try_sh(&self, command: &str) -> Output {
        self.netns.run(|| Command::new("sh").args(["-c", command]).output().unwrap()).unwrap()
    }

    /// Whether every one of three pings is answered: a redirect would spoil the second.
    pub(crate) fn pings(&self, to: impl Into<IpAddr>) -> bool {
        self.try_sh(&format!("ping -c3 -i0.05 -w2 -n {}", to.into())).status.success()
    }
}

impl Drop for Ns {
    fn drop(&mut self) {
        if let Err(error) = NetNs::delete_named(&self.name) {
            eprintln!("cleaning up: {error}");
        }
    }
}

/// A veth pair.
pub(crate) fn veth(near: &Ns, name: &str, far: &Ns, far_name: &str, far_mac: Option<Mac>) {
    let peer = VethPeer {
        name: far_name.to_owned(),
        mac: far_mac,
        mtu: None,
        netns: Some(far.netns.try_clone().unwrap()),
    };
    let spec = VethSpec { name: name.to_owned(), mac: None, mtu: None, master: None, peer };
    near.rtnl().create_veth(spec).unwrap();
}
