//! What one node costs that has thousands of members and hears from all of them: the whole of a process with nothing
//! else in it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use mesh_core::api::Backend;
use mesh_core::gossip::wire::{Part, Writer, read};
use mesh_core::node::{Config, HostFacts, Input, JoinSecret, LaneConfig, Node, Output};
use mesh_core::state::{
    StateFile, Stored, StoredGroup, StoredNode, encode_cluster, encode_group, encode_node,
};
use mesh_core::time::Time;
use mesh_core::view::View;
use mesh_keys::frame::{GroupKey, Opener, Sealer};
use mesh_keys::join::JoinKey;
use mesh_keys::{NodeId, PairSecret, Secret32, WgSecret};
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;

use crate::cluster::{cluster, identity};
use crate::{ALLOCATED, resident};

/// Where the process of the one node finds its disk, and how many members there are.
const DISK: &str = "HAUBERK_TEST_DISK";
const MEMBERS: &str = "HAUBERK_TEST_MEMBERS";

/// The one node.
const ME: usize = 1;

/// What one core may take with 5,000 members, in bytes.
const LIMIT: usize = 64 << 20;

/// What it may keep for itself of each member that it has met, in bytes.
const PRIVATE: usize = 200;

/// How many members in a second say their first word, before that: a node answers no more than 64 of them.
const FIRST_WORDS: u32 = 40;

/// How long it is idle.
const IDLE: Duration = Duration::from_secs(120);

/// Pings that come in, each second: all members probe twice a second, at random.
const PINGS: u32 = 2;

fn group_key() -> GroupKey {
    GroupKey::generate(&mut ChaCha20Rng::seed_from_u64(7))
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(192, 0, (n >> 8) as u8, n as u8), 6783))
}

/// Makes the disk, and lets another process be the node.
fn one_of(members: usize) -> usize {
    let disk = std::env::temp_dir().join(format!("hauberk-one-of-{members}-{}", std::process::id()));
    std::fs::create_dir_all(&disk).unwrap();
    let (genesis, delta) = cluster(members);
    let mut view = View::new(genesis);
    assert_eq!(view.merge(&delta).refused, Vec::<String>::new());
    let node =
        StoredNode { generation: 1, mesh_ipv4: Some(Ipv4Addr::new(10, 0, ME as u8, 1)), leaving: false };
    let files = [
        (StateFile::Cluster, encode_cluster(&view)),
        (StateFile::Node, encode_node(&node)),
        (StateFile::Group, encode_group(StoredGroup { keys: vec![(0, group_key())] })),
    ];
    for (file, bytes) in files {
        std::fs::write(disk.join(file.name()), bytes).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "core::the_one_node", "--ignored", "--nocapture"])
        .env(DISK, &disk)
        .env(MEMBERS, members.to_string())
        .output()
        .unwrap();
    std::fs::remove_dir_all(&disk).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = text.lines().find_map(|line| line.strip_prefix("one node: ")).expect("its figures");
    println!("{members} members: {line}");
    text.lines().filter(|line| line.starts_with("private: ")).for_each(|line| println!("{line}"));
    line.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn one_core_among_five_thousand_takes_no_more_than_64_mib() {
    let bytes = one_of(5_000);
    assert!(bytes <= LIMIT, "{bytes} bytes");
}

/// The other members, as far as they are needed. What they take is counted, too.
struct Others {
    by_address: BTreeMap<SocketAddr, usize>,
    group: GroupKey,
    me: NodeId,
    sealers: BTreeMap<usize, Sealer>,
    /// Those that have answered a ping of the node: it keeps of them what it keeps of any member.
    met: BTreeSet<usize>,
}

impl Others {
    fn pair(&self, n: usize) -> PairSecret {
        identity(n).agree(&identity(ME).public()).unwrap()
    }

    /// A datagram of a member.
    fn seal(&mut self, n: usize, parts: &[Part]) -> Vec<u8> {
        let mut writer = Writer::default();
        assert!(parts.iter().all(|part| writer.push(part)));
        let (payload, pair) = (writer.take(), self.pair(n));
        let sealer = self.sealers.entry(n).or_insert_with(|| {
            Sealer::new(&self.group, identity(n).node_id(), &mut ChaCha20Rng::seed_from_u64(n as u64))
        });
        sealer.seal(&self.me, &pair, &payload).unwrap()
    }

    /// The answer of the member that a datagram goes to.
    fn answer(&mut self, to: SocketAddr, bytes: &[u8]) -> Option<(SocketAddr, Vec<u8>)> {
        let n = *self.by_address.get(&to)?;
        let node = identity(n).node_id();
        let mut opener = Opener::new(node, std::slice::from_ref(&self.group), 1).unwrap();
        let opened = opener.open(bytes, |_| Some(self.me), |_| Some(self.pair(n))).unwrap();
        let acks: Vec<Part> = read(&opened.payload)
            .filter_map(|part| {
                if let Part::Ping { number } = part.unwrap() { Some(Part::Ack { number }) } else { None }
            })
            .collect();
        if !acks.is_empty() {
            self.met.insert(n);
        }
        (!acks.is_empty()).then(|| (to, self.seal(n, &acks)))
    }
}

/// Handles what comes in; the datagrams that go out, and when the node wants to be woken.
fn handle(
    node: &mut Node,
    input: Input,
    now: Time,
    busy: &mut Duration,
) -> (Vec<(SocketAddr, Vec<u8>)>, Time) {
    let mut sent = Vec::new();
    let mut inputs = vec![input];
    loop {
        let begun = Instant::now();
        if let Some(input) = inputs.pop() {
            node.handle(input, now);
        }
        let output = node.poll_output();
        *busy += begun.elapsed();
        match output {
            Output::Timeout(next) if inputs.is_empty() => return (sent, next),
            Output::Datagram { to, bytes } => sent.push((to, bytes)),
            Output::Persist { ticket, .. } => inputs.push(Input::Persisted(ticket)),
            Output::Dial { target } => {
                inputs.push(Input::DialFailed { target, reason: "no sessions here".to_owned() });
            }
            Output::Refuse { reason } => panic!("{reason}"),
            Output::Timeout(_)
            | Output::Send { .. }
            | Output::Trust { .. }
            | Output::Close { .. }
            | Output::Desired { .. }
            | Output::Carried { .. }
            | Output::LaneDatagram { .. }
            | Output::Measure { .. }
            | Output::Narrow { .. }
            | Output::Register { .. }
            | Output::Reply(..) => {}
        }
    }
}

#[test]
#[ignore = "the other process of the test above"]
fn the_one_node() {
    let disk = std::path::PathBuf::from(std::env::var_os(DISK).expect("a disk"));
    let members: usize = std::env::var(MEMBERS).expect("how many members").parse().unwrap();
    let before = ALLOCATED.allocated();
    let files = [StateFile::Cluster, StateFile::Node, StateFile::Group];
    let files = files.map(|file| (file, std::fs::read(disk.join(file.name())).unwrap()));
    let stored = Stored::decode(&BTreeMap::from(files)).unwrap();
    if let Some(view) = &stored.view {
        view.catalogue();
        view.contested_prefixes();
    }
    // What the cluster has agreed on, and what follows from that.
    let common = ALLOCATED.allocated() - before;
    let config = Config {
        name: "one".into(),
        cluster_name: "memory".into(),
        ipv4_range: "10.0.0.0/8".parse().unwrap(),
        block_prefix: 24,
        secret: JoinSecret::Key(JoinKey::from_secret(Secret32::from_bytes([1; 32]))),
        seeds: Vec::new(),
        advertise: Vec::new(),
        control_port: 6783,
        // No tunnels: this is about membership.
        max_calls: 0,
        lanes: vec![LaneConfig::new(0, "meshwg0", 6784, WgSecret::from_bytes(&[9; 32]))],
        mtu: None,
        mtu_raise: mesh_core::path::mtu::RAISED,
        software: "test".into(),
        boot: "boot".into(),
        previous_start: None,
        admin_keys: Vec::new(),
        backend: (Backend::Userspace, "none".into()),
    };
    let mut others = Others {
        by_address: (0..members).filter(|n| *n != ME).map(|n| (address(n), n)).collect(),
        group: group_key(),
        me: identity(ME).node_id(),
        sealers: BTreeMap::new(),
        met: BTreeSet::new(),
    };
    let mut busy = Duration::ZERO;
    let mut now = Time::ZERO;
    let begun = Instant::now();
    let mut node = Node::new(config, identity(ME), stored, [5; 32], now);
    let facts =
        HostFacts { addresses: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 0, ME as u8))], ..HostFacts::default() };
    let (mut sent, mut next) = handle(&mut node, Input::Host(facts), now, &mut busy);
    let started = begun.elapsed();
    let mut arrivals: Vec<(SocketAddr, Vec<u8>)> = Vec::new();
    let mut first_words = (0..members).filter(|n| *n != ME);
    let (mut pings, mut datagrams, mut next_ping) = (0, 0, now);
    let mut idle_since: Option<Time> = None;
    while idle_since.is_none_or(|since| now.since(since) < IDLE) {
        for (to, bytes) in std::mem::take(&mut sent) {
            datagrams += 1;
            arrivals.extend(others.answer(to, &bytes));
        }
        if let Some((from, bytes)) = arrivals.pop() {
            (sent, next) = handle(&mut node, Input::Datagram { from, to: None, bytes }, now, &mut busy);
            continue;
        }
        now = next.max(now).min(next_ping);
        if now >= next_ping {
            let (n, per_second) = match first_words.next() {
                Some(n) => (n, FIRST_WORDS),
                None => {
                    if idle_since.is_none() {
                        (idle_since, busy, datagrams) = (Some(now), Duration::ZERO, 0);
                    }
                    pings += 1;
                    (2 + pings * 7919 % (members - 2), PINGS)
                }
            };
            next_ping = now + Duration::from_secs(1) / per_second;
            arrivals.push((address(n), others.seal(n, &[Part::Ping { number: 1 }])));
        }
        (sent, next) = handle(&mut node, Input::Tick, now, &mut busy);
    }
    assert_eq!(others.met.len(), members - 1, "the node does not know all of them");
    assert_eq!(node.unreachable(), [], "all have answered");
    let resident = resident();
    let all = ALLOCATED.allocated();
    drop(node);
    let private = (all - ALLOCATED.allocated() - common) / members;
    println!("private: {private} bytes for each member; {} for what all members have", common / members);
    assert!(private <= PRIVATE, "{private} bytes for each member");
    println!(
        "one node: {} bytes, {:.3} % of a processor when idle ({datagrams} datagrams sent and {pings} pings answered in \
         {IDLE:?}); started in {started:?}",
        resident,
        100.0 * busy.as_secs_f64() / IDLE.as_secs_f64(),
    );
}
