//! The same mixture of traffic through the tunnel and through a plain veth: what arrives is the same, whatever the
//! kernel and the devices can or cannot do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::support::ethtool::{self, Offload};
use crate::support::mixture::{Arrival, exchange};
use crate::support::refusal::{Refusal, RefusedRuns, refuse_to};
use crate::support::{
    End, Kind, Link, Namespace, Process, Underlay, joined_namespaces, require_root, unique_name,
};

const MESH: [Kind; 2] = [Kind::Mesh, Kind::Mesh];

/// Of the mixtures in this process; the same in every run.
fn seed() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x4861_7562_6572_6b00);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What arrives over a plain veth.
fn reference(seed: u64) -> Vec<Arrival> {
    let [a, b] = joined_namespaces();
    exchange(&a, &b, ["192.0.2.2", "2001:db8::2"].map(|address| address.parse().unwrap()), seed)
}

/// Each end sends the mixture to the other, which gets what it would get without a tunnel.
#[track_caller]
fn check(link: &Link, what: &str) {
    for (from, to) in [(0, 1), (1, 0)] {
        let seed = seed();
        let expected = reference(seed);
        let started = Instant::now();
        let arrivals = exchange(&link.ends[from].namespace, &link.ends[to].namespace, link.inside(to), seed);
        let differs = arrivals.iter().zip(&expected).position(|(actual, expected)| actual != expected);
        assert_eq!(differs, None, "{what}: the first difference\n{}", link.logs());
        assert_eq!(arrivals.len(), expected.len());
        println!("{what}: {} payloads alike, in {:.2} s", arrivals.len(), started.elapsed().as_secs_f64());
    }
}

/// A device that meets these refusals.
fn device(namespace: &Namespace, refusals: &[Refusal]) -> Process {
    let prepare = |command: &mut std::process::Command| refuse_to(command, refusals);
    Process::start_prepared(Kind::Mesh, namespace, &unique_name("w"), prepare, |_| {})
}

#[test]
fn with_all_offloads() {
    require_root();
    for underlay in [Underlay::V4, Underlay::V6] {
        check(&Link::new(MESH, underlay, None), &format!("all offloads, over {underlay:?}"));
    }
}

#[test]
fn without_superpackets_from_the_tunnel_device() {
    require_root();
    let link = Link::new(MESH, Underlay::V4, None);
    for end in &link.ends {
        for offload in [Offload::Coalescing, Offload::Tcp, Offload::Segmentation, Offload::Transmit] {
            ethtool::set(&end.namespace, &end.device.interface, offload, false);
        }
    }
    check(&link, "offloads of the tunnel device off");
    let link = Link::new(MESH, Underlay::V4, None);
    for end in &link.ends {
        end.namespace.ip(&format!("link set {} gso_max_size 1500 gso_max_segs 1", end.device.interface));
    }
    check(&link, "superpackets of one segment");
}

#[test]
fn over_an_underlay_that_joins_and_cuts_nothing() {
    require_root();
    // Nothing that comes in is a run, and checksums are made before it goes out. (A kernel before 6.11 would refuse
    // runs here.)
    let link = Link::new(MESH, Underlay::V4, None);
    for end in &link.ends {
        for offload in [Offload::Coalescing, Offload::Tcp, Offload::Segmentation, Offload::Transmit] {
            ethtool::set(&end.namespace, "u0", offload, false);
        }
    }
    check(&link, "offloads of the underlay off");
}

#[test]
fn over_an_underlay_narrower_than_the_tunnel() {
    require_root();
    // The kernel refuses runs of such datagrams (EMSGSIZE), and cuts single ones into fragments.
    for underlay in [Underlay::V4, Underlay::V6] {
        let link = Link::new(MESH, underlay, None);
        for end in &link.ends {
            end.namespace.ip("link set u0 mtu 1300");
        }
        check(&link, &format!("an underlay of 1300 bytes, {underlay:?}"));
    }
}

/// Ends with and without refusals.
fn check_refusals(refusals: [&[Refusal]; 2]) {
    let mut ends = refusals.into_iter();
    let link = Link::of(Underlay::V4, None, |namespace| device(namespace, ends.next().unwrap()));
    check(&link, &format!("without {refusals:?}"));
    for (end, refusals) in link.ends.iter().zip(refusals) {
        let log = end.device.log();
        let said = |what: &str| log.lines().any(|line| line.contains("device is up") && line.contains(what));
        assert_eq!(said("udp: false"), refusals.iter().any(|refusal| refusal.is_of_tun()), "{log}");
        assert_eq!(said("checksum: false"), refusals.contains(&Refusal::TunOffloads), "{log}");
        let mean = mean_frame(end);
        assert_eq!(mean <= FULL_FRAME, refusals.contains(&Refusal::Segmentation), "{mean} bytes per frame");
    }
}

/// Longest Ethernet frame that is not a run of several datagrams.
const FULL_FRAME: u64 = 1514;

/// Mean length of what an end has sent so far: several datagrams of a run count as one frame.
fn mean_frame(end: &End) -> u64 {
    let statistic = |name: &str| -> u64 {
        let text = end.namespace.exec(&["cat", &format!("/sys/class/net/u0/statistics/{name}")]);
        text.trim().parse().unwrap()
    };
    statistic("tx_bytes") / statistic("tx_packets")
}

#[test]
fn with_a_kernel_that_has_no_runs_of_datagrams() {
    require_root();
    check_refusals([&[Refusal::Segmentation], &[]]);
    check_refusals([&[Refusal::Coalescing], &[]]);
    check_refusals([&[Refusal::Segmentation, Refusal::Coalescing]; 2]);
}

#[test]
fn with_a_tun_device_that_has_no_offloads() {
    require_root();
    check_refusals([&[Refusal::TunUdp]; 2]);
    check_refusals([&[Refusal::TunOffloads]; 2]);
    check_refusals([&[Refusal::TunOffloads], &[]]);
}

#[test]
fn on_a_path_that_refuses_runs_of_datagrams() {
    require_root();
    let mut watches = Vec::new();
    let link = Link::of(Underlay::V4, None, |namespace| {
        let started = |child: &_| watches.push(RefusedRuns::watch(child));
        Process::start_prepared(Kind::Mesh, namespace, &unique_name("w"), RefusedRuns::prepare, started)
    });
    check(&link, "runs refused with EIO");
    for watch in &watches {
        let (sends, refused) = watch.counts();
        println!("{refused} of {sends} sends were refused");
        assert!(refused > 0, "a run was tried");
        assert!(refused <= 10, "{refused} runs of {sends} were tried in vain: it is not remembered");
    }
    // The filter is served until its process has ended.
    drop(link);
}
