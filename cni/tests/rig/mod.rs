//! What the black-box tests run the plugin against: a namespace that stands for a host, and in it a small
//! daemon that answers the control API and does the host's side for real (bridge ports, routes, neighbours).
//! It has no anti-spoofing entries: those are the daemon's own tests.

#![allow(dead_code, reason = "each test binary uses its part of the rig")]
#![allow(unused_imports, reason = "likewise")]
#![allow(unreachable_pub, reason = "a module of test binaries has no other public")]

mod daemon;
mod plugin;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh_core::api::AttachmentId;
use mesh_sys::netns::NetNs;
use mesh_sys::rtnl::Blocking;
use mesh_sys::sysctl::Sysctl;
use serde_json::{Value, json};

pub use daemon::{Daemon, Fault, Step};
pub use plugin::{Call, Outcome};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Fails the test with one sentence when it cannot work.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes network namespaces: run it as root, or leave out the tests named blackbox_*"
    );
}

/// A named namespace that goes away with this value.
pub struct Namespace {
    pub name: String,
    pub netns: NetNs,
}

impl Namespace {
    pub fn new(what: &str) -> Self {
        require_root();
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("cniw-{}-{n}-{what}", std::process::id());
        let netns = NetNs::create_named(&name).unwrap();
        Self { name, netns }
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    pub fn rtnl(&self) -> Blocking {
        Blocking::open_in(&self.netns).unwrap()
    }

    /// Names of all devices.
    pub fn links(&self) -> Vec<String> {
        self.rtnl().links().unwrap().into_iter().map(|link| link.name).collect()
    }

    pub fn sysctl(&self, key: &[&str]) -> String {
        self.netns.run(|| Sysctl::new().get(key).unwrap()).unwrap()
    }

    pub fn set_sysctl(&self, key: &[&str], value: &str) {
        self.netns.run(|| Sysctl::new().set(key, value).unwrap()).unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = NetNs::delete_named(&self.name) {
            eprintln!("{error}");
        }
    }
}

/// A host with a daemon.
pub struct Rig {
    pub host: Namespace,
    pub dir: tempfile::TempDir,
    pub daemon: Daemon,
}

impl Rig {
    pub fn new() -> Self {
        let host = Namespace::new("host");
        let dir = tempfile::Builder::new().prefix("cniw-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        for key in [["net", "ipv4", "ip_forward"].as_slice(), &["net", "ipv6", "conf", "all", "forwarding"]] {
            host.set_sysctl(key, "1");
        }
        let daemon = Daemon::start(&host, dir.path().join("run/meshd.sock"));
        Self { host, dir, daemon }
    }

    pub fn pod(&self) -> Pod {
        let namespace = Namespace::new("pod");
        let container = format!("ctr-{}", namespace.name);
        Pod { namespace, container }
    }

    /// The configuration; `fields` are set on top.
    pub fn conf(&self, fields: Value) -> Value {
        let mut conf = json!({
            "cniVersion": "1.1.0",
            "name": "mesh",
            "type": "mesh-cni",
            "socket": self.dir.path().join("run/meshd.sock"),
            "stateDir": self.dir.path().join("state"),
            "logLevel": "debug",
        });
        for (name, value) in fields.as_object().unwrap() {
            conf[name] = value.clone();
        }
        conf
    }

    /// A call for a pod, to be run or changed.
    pub fn call(&self, verb: &str, pod: &Pod, fields: Value) -> Call<'_> {
        Call::new(self, verb)
            .conf(self.conf(fields))
            .env("CNI_CONTAINERID", &pod.container)
            .env("CNI_NETNS", &pod.namespace.path())
            .env("CNI_IFNAME", "eth0")
    }

    pub fn add(&self, pod: &Pod) -> Value {
        self.call("ADD", pod, json!({})).run().result()
    }

    pub fn del(&self, pod: &Pod) {
        self.call("DEL", pod, json!({})).run().silent();
    }

    /// Names of the tombstone files.
    pub fn tombstones(&self) -> Vec<String> {
        match std::fs::read_dir(self.dir.path().join("state/tombstones")) {
            Ok(entries) => entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect(),
            Err(_) => Vec::new(),
        }
    }

    pub fn heartbeat(&self) -> PathBuf {
        self.dir.path().join("run/heartbeat")
    }

    /// Fails unless no device, lease or tombstone is left.
    pub fn assert_clean(&self) {
        assert_eq!(self.host.links(), ["lo", "mesh0"]);
        assert_eq!(self.daemon.leases(), [], "leases are left");
        assert_eq!(self.tombstones(), [""; 0]);
    }
}

/// A namespace that stands for a container.
pub struct Pod {
    pub namespace: Namespace,
    pub container: String,
}

impl Pod {
    pub fn id(&self) -> AttachmentId {
        AttachmentId::new(&self.container, "eth0").unwrap()
    }

    pub fn host_ifname(&self) -> String {
        self.id().host_ifname()
    }
}

/// The address at a place of a result, without its prefix length.
pub fn address(result: &Value, i: usize) -> IpAddr {
    let text = result["ips"][i]["address"].as_str().unwrap();
    text.split('/').next().unwrap().parse().unwrap()
}

/// Sends 300 kB over TCP from one namespace to an address of another and compares them: enough packets for a
/// redirect to do its harm.
pub fn talk(from: &NetNs, to: &NetNs, address: IpAddr) {
    let payload: Vec<u8> = (0u32..300_000).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let limit = Some(Duration::from_secs(5));
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let expected = payload.clone();
    std::thread::scope(|scope| {
        let client = scope.spawn(move || {
            let mut stream = from
                .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(5)))
                .unwrap()
                .unwrap_or_else(|error| panic!("no connection to {target}: {error}"));
            stream.set_write_timeout(limit).unwrap();
            stream.write_all(&payload).unwrap();
        });
        listener.set_nonblocking(true).unwrap();
        let begin = std::time::Instant::now();
        let mut stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(begin.elapsed() < Duration::from_secs(6), "nobody connected to {target}");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(limit).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert!(received == expected, "the payload arrived changed");
        client.join().unwrap();
    });
}
