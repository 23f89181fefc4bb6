//! Links and addresses of hosts change while a lab is up. Needs root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "measured figures are for people to read")]

mod common;

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{binaries, hosts, processes_of, processes_with};
use mesh_lab::{
    Behaviour, Family, Host, Impairment, Lab, Nat, Options, Place, Rate, Router, Share, Span, Topology,
    poll_until,
};
use nix::sys::signal::Signal;

/// Whether one of `tries` datagrams gets from one host to an address of another at which that one listens.
fn one_of(tries: usize, from: &Host, to: &Host, family: Family) -> bool {
    let address = SocketAddr::new(to.underlay(family), 7200);
    let receiver = to.net().run(|| UdpSocket::bind(address)).unwrap().unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let any = SocketAddr::new(from.underlay(family), 0);
    let sender = from.net().run(|| UdpSocket::bind(any)).unwrap().unwrap();
    (0..tries).any(|_| {
        let _ = sender.send_to(b"x", address);
        receiver.recv(&mut [0; 8]).is_ok()
    })
}

/// Whether anything gets through, also when the hosts have just given up looking for each other's hardware addresses.
fn gets_through(from: &Host, to: &Host, family: Family) -> bool {
    one_of(20, from, to, family)
}

/// Whether nothing does.
fn is_blocked(from: &Host, to: &Host, family: Family) -> bool {
    !one_of(2, from, to, family)
}

#[test]
fn a_cut_can_be_of_one_direction_only() {
    let lab = hosts("labw-oneway", 3);
    let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
    for family in Family::BOTH {
        assert!(gets_through(&a, &b, family) && gets_through(&b, &a, family));
        lab.cut_one_way(&a, &b).unwrap();
        assert!(is_blocked(&a, &b, family) && gets_through(&b, &a, family));
        assert!(gets_through(&a, &c, family) && gets_through(&c, &b, family));
        assert_eq!(lab.impairment(&a, &b), Impairment::CUT);
        assert_eq!(lab.impairment(&b, &a), Impairment::NONE);
        // Another process sees it, and can end it.
        let other = Lab::open("labw-oneway").unwrap();
        let links = other.links();
        assert_eq!(
            links.iter().map(|link| format!("{} {}", link.from, link.to)).collect::<Vec<_>>(),
            ["h1 h2"]
        );
        other.heal(&other.host(1), &other.host(0)).unwrap();
        assert!(gets_through(&a, &b, family) && lab.links().is_empty());
    }
}

fn nat() -> Router {
    Router::nat(Nat::new(Behaviour::EndpointIndependent, Behaviour::EndpointIndependent))
}

#[test]
fn cuts_work_through_routers_and_meet_nobody_else() {
    let topology = Topology::default()
        .router("office", nat())
        .router("shop", nat())
        .router("wall", Router::firewall())
        .host("h2", Place::behind("office"))
        .host("h3", Place::behind("office"))
        .host("h4", Place::behind("wall"))
        .host("h5", Place::behind("shop"))
        .host("h6", Place::behind("shop"));
    Lab::down("labw-far").unwrap();
    let options = Options { nodes: 6, topology, daemons: false, ..Options::new("labw-far", binaries()) };
    let lab = Lab::up(options).unwrap();
    let [public, one, two, walled, far] = [0, 1, 2, 3, 4].map(|host| lab.host(host));
    let v4 = Family::V4;
    // The office's hosts share an address; only one of them is cut off, in both directions.
    lab.cut(&public, &one).unwrap();
    assert!(is_blocked(&one, &public, v4) && gets_through(&two, &public, v4));
    lab.heal(&public, &one).unwrap();
    lab.cut_one_way(&public, &one).unwrap();
    for (host, answered) in [(&one, false), (&two, true)] {
        let pinged = host.exec(&["ping", "-c", "1", "-W", "0.3", "198.18.0.1"]).unwrap();
        assert_eq!(pinged.status.success(), answered, "{}", host.name());
    }
    assert!(gets_through(&one, &public, v4), "that direction is whole");
    lab.cut(&one, &two).unwrap();
    assert!(is_blocked(&one, &two, v4));
    lab.heal_all().unwrap();
    assert!(gets_through(&one, &two, v4) && lab.links().is_empty());

    for family in Family::BOTH {
        lab.cut(&walled, &public).unwrap();
        assert!(is_blocked(&walled, &public, family));
        lab.heal_all().unwrap();
        assert!(gets_through(&walled, &public, family));
    }
    // What cannot be told apart is refused, and changes nothing.
    let error = lab.cut(&one, &far).unwrap_err().to_string();
    assert!(error.contains("h2 and h5"), "{error}");
    assert!(lab.links().is_empty());
}

#[test]
fn a_renumbered_host_has_other_addresses_and_keeps_its_links() {
    let topology = Topology::default().router("office", nat()).host("h3", Place::behind("office"));
    Lab::down("labw-renumber").unwrap();
    let options = Options { nodes: 3, topology, daemons: false, ..Options::new("labw-renumber", binaries()) };
    let lab = Lab::up(options).unwrap();
    let (a, b, inside) = (lab.host(0), lab.host(1), lab.host(2));
    lab.cut_one_way(&inside, &b).unwrap();
    let mut had = vec![b.underlay(Family::V4)];
    for _ in 0..3 {
        lab.renumber(&b).unwrap();
        let old = *had.last().unwrap();
        assert!(!a.exec(&["ping", "-c", "1", "-W", "0.3", &old.to_string()]).unwrap().status.success());
        had.push(b.underlay(Family::V4));
        for family in Family::BOTH {
            assert!(gets_through(&a, &b, family) && gets_through(&b, &a, family));
            let flag = if family == Family::V4 { "-4" } else { "-6" };
            let addresses =
                b.exec_ok(&["ip", flag, "-o", "addr", "show", "dev", "eth0", "scope", "global"]).unwrap();
            assert!(
                addresses.lines().count() == 1 && addresses.contains(&b.underlay(family).to_string()),
                "{addresses}"
            );
            let route = b.exec_ok(&["ip", flag, "route", "show", "default"]).unwrap();
            assert_eq!(route.lines().count(), 1, "{route}");
        }
        assert!(is_blocked(&inside, &b, Family::V4), "the cut holds for the new address");
        assert!(gets_through(&inside, &a, Family::V4));
    }
    assert_ne!(had[1], had[2]);
    // A new host does not get an address that somebody has.
    let private = inside.underlay(Family::V4);
    lab.renumber(&inside).unwrap();
    assert_ne!(inside.underlay(Family::V4), private);
    assert!(gets_through(&inside, &a, Family::V4));
    let fourth = lab.add_host().unwrap();
    assert!(gets_through(&fourth, &a, Family::V4) && gets_through(&fourth, &b, Family::V6));
}

#[test]
fn nothing_of_routers_and_links_is_left_whatever_was_killed() {
    for kill in [false, true] {
        let topology = Topology::default().router("office", nat()).host("h2", Place::behind("office"));
        Lab::down("labw-left").unwrap();
        let options = Options { nodes: 3, topology, daemons: false, ..Options::new("labw-left", binaries()) };
        let lab = Lab::up(options).unwrap();
        let slow = Impairment { delay: Span(Duration::from_secs(600)), ..NONE };
        lab.impair_one_way(&lab.host(0), &lab.host(1), slow).unwrap();
        // It keeps what it has for ten minutes, whatever the link is like meanwhile.
        assert!(is_blocked(&lab.host(0), &lab.host(1), Family::V4));
        lab.impair_one_way(&lab.host(0), &lab.host(1), NONE).unwrap();
        let (dir, link) = ("/run/mesh-lab/labw-left/", "labw-left: h1 > h2");
        assert_eq!(processes_of(link).len(), 1);
        let processes = processes_with(dir);
        assert_eq!(processes.len(), 5, "switch, router, hosts: {processes:?}");
        if kill {
            for what in [format!("{dir}router-office"), format!("{dir}switch"), link.to_owned()] {
                // Killing the switch has killed what runs in it.
                for process in processes_of(&what) {
                    process.signal(Signal::SIGKILL).unwrap();
                    process.wait_gone(Duration::from_secs(5)).unwrap();
                }
            }
            assert!(Lab::open("labw-left").unwrap_err().to_string().contains("broken"));
        }
        drop(lab);
        assert_eq!(processes_with(dir), Vec::<String>::new());
        assert_eq!(processes_of(link), []);
        assert!(!std::path::Path::new(dir).exists());
    }
}

/// What becomes of datagrams: the numbers that arrive, in their order, with how long each was on its way.
fn datagrams(from: &Host, to: &Host, family: Family, count: u32, pause: Duration) -> Vec<(u32, Duration)> {
    let address = SocketAddr::new(to.underlay(family), 7300);
    let receiver = to.net().run(|| UdpSocket::bind(address)).unwrap().unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(250))).unwrap();
    let any = SocketAddr::new(from.underlay(family), 0);
    let sender = from.net().run(|| UdpSocket::bind(any)).unwrap().unwrap();
    // So that none waits for a hardware address.
    assert!(gets_through(from, to, family) || gets_through(to, from, family));
    let (start, done) = (Instant::now(), AtomicBool::new(false));
    thread::scope(|scope| {
        let arrivals = scope.spawn(|| {
            let (mut buffer, mut arrived) = ([0; 16], Vec::new());
            loop {
                // Asked first: what is sent before the end is awaited.
                let last = done.load(Ordering::Acquire);
                let length = match receiver.recv(&mut buffer) {
                    Ok(length) => length,
                    Err(_) if last => break,
                    Err(_) => continue,
                };
                let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
                let sent = Duration::from_nanos(u64::from_be_bytes(buffer[4..length].try_into().unwrap()));
                arrived.push((number, start.elapsed() - sent));
            }
            arrived
        });
        for number in 0..count {
            let sent = u64::try_from(start.elapsed().as_nanos()).unwrap();
            sender.send_to(&[&number.to_be_bytes()[..], &sent.to_be_bytes()].concat(), address).unwrap();
            thread::sleep(pause);
        }
        done.store(true, Ordering::Release);
        arrivals.join().unwrap()
    })
}

fn median(arrived: &[(u32, Duration)]) -> Duration {
    let mut delays: Vec<_> = arrived.iter().map(|(_, delay)| *delay).collect();
    delays.sort();
    delays[delays.len() / 2]
}

const MS: Duration = Duration::from_millis(1);
const NONE: Impairment = Impairment::NONE;

#[test]
fn packets_are_delayed_lost_doubled_and_overtaken_as_the_link_says() {
    let lab = hosts("labw-bad", 3);
    let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
    let forwarders = |from, to| processes_of(&format!("labw-bad: h{from} > h{to}"));
    for family in Family::BOTH {
        let delay = Span(30 * MS);
        lab.impair_one_way(&a, &b, Impairment { delay, ..NONE }).unwrap();
        let there = datagrams(&a, &b, family, 200, MS);
        assert!(there.len() == 200 && there.iter().all(|(_, took)| *took >= 30 * MS), "{there:?}");
        let (back, aside) = (datagrams(&b, &a, family, 50, MS), datagrams(&a, &c, family, 50, MS));
        eprintln!(
            "{family}: 30 ms there {:?}, back {:?}, to another {:?}",
            median(&there),
            median(&back),
            median(&aside)
        );
        assert!(median(&there) < 35 * MS && median(&back) < 5 * MS && median(&aside) < 5 * MS);

        // The old delay line delivers what is on it when the link changes.
        let jitter = Span(20 * MS);
        let (before, after) = thread::scope(|scope| {
            let running = scope.spawn(|| datagrams(&a, &b, family, 400, MS));
            thread::sleep(100 * MS);
            lab.impair(&a, &b, Impairment { delay, jitter, ..NONE }).unwrap();
            thread::sleep(50 * MS);
            (running.join().unwrap(), datagrams(&a, &b, family, 400, MS))
        });
        assert_eq!((before.len(), after.len()), (400, 400));
        let (least, most) =
            (after.iter().map(|x| x.1).min().unwrap(), after.iter().map(|x| x.1).max().unwrap());
        assert!((10 * MS..30 * MS).contains(&least) && most > 40 * MS, "{least:?} {most:?}");
        assert!(after.is_sorted_by_key(|(number, _)| *number), "jitter keeps the order");

        lab.impair(&a, &b, Impairment { loss: Share::percent(20), ..NONE }).unwrap();
        let lossy = datagrams(&a, &b, family, 1000, MS / 4).len();
        assert!((720..880).contains(&lossy), "{lossy}");
        lab.impair(&a, &b, Impairment { duplicate: Share::percent(20), ..NONE }).unwrap();
        let doubled = datagrams(&a, &b, family, 1000, MS / 4).len();
        assert!((1120..1280).contains(&doubled), "{doubled}");
        lab.impair(&a, &b, Impairment { delay, reorder: Share::percent(20), ..NONE }).unwrap();
        let mixed = datagrams(&a, &b, family, 1000, MS / 4);
        // Those that come before one that was sent earlier.
        let (mut early, mut lowest_later) = (0, u32::MAX);
        for (number, _) in mixed.iter().rev() {
            early += usize::from(lowest_later < *number);
            lowest_later = lowest_later.min(*number);
        }
        assert!(mixed.len() == 1000 && (120..280).contains(&early), "{} {early}", mixed.len());
        eprintln!(
            "{family}: 20% each: {} lost, {} doubled, {early} overtake of 1000",
            1000 - lossy,
            doubled - 1000
        );

        // A cut holds with the rest, and the rest is there again when it is healed.
        lab.impair(&a, &b, Impairment { delay, ..NONE }).unwrap();
        lab.cut(&a, &b).unwrap();
        assert!(is_blocked(&a, &b, family));
        lab.heal(&a, &b).unwrap();
        assert!(median(&datagrams(&a, &b, family, 20, MS)) >= 30 * MS);
        // Killing a forwarder is noticed; setting the link again mends it.
        let broken = || lab.links().iter().map(|link| (link.from.clone(), link.broken)).collect::<Vec<_>>();
        assert_eq!(broken(), [("h1".to_owned(), false), ("h2".to_owned(), false)]);
        let forwarder = forwarders(1, 2)[0];
        forwarder.signal(Signal::SIGKILL).unwrap();
        forwarder.wait_gone(Duration::from_secs(5)).unwrap();
        assert!(is_blocked(&a, &b, family));
        assert_eq!(broken(), [("h1".to_owned(), true), ("h2".to_owned(), false)]);
        lab.impair(&a, &b, Impairment { delay, ..NONE }).unwrap();
        assert!(median(&datagrams(&a, &b, family, 20, MS)) >= 30 * MS);
        assert_eq!((forwarders(1, 2).len(), forwarders(2, 1).len()), (1, 1));

        lab.impair(&a, &b, NONE).unwrap();
        assert!(lab.links().is_empty());
        let gone = || forwarders(1, 2).is_empty() && forwarders(2, 1).is_empty();
        poll_until("the forwarders' ends", Duration::from_secs(5), gone).unwrap();
        assert!(median(&datagrams(&a, &b, family, 50, MS)) < 5 * MS);
    }
}

#[test]
fn a_rate_holds_for_tcp_and_frames_stay_valid_at_full_speed() {
    let lab = hosts("labw-rate", 2);
    let (a, b) = (lab.host(0), lab.host(1));
    let transfer = |bytes: usize, family: Family| {
        let address = SocketAddr::new(b.underlay(family), 7400);
        let listener = b.net().run(|| TcpListener::bind(address)).unwrap().unwrap();
        thread::scope(|scope| {
            let received =
                scope.spawn(|| io::copy(&mut listener.accept().unwrap().0, &mut io::sink()).unwrap());
            let start = Instant::now();
            let mut stream = a.net().run(|| TcpStream::connect(address)).unwrap().unwrap();
            stream.write_all(&vec![0x5a; bytes]).unwrap();
            drop(stream);
            assert_eq!(received.join().unwrap(), bytes as u64);
            bytes as f64 * 8e-6 / start.elapsed().as_secs_f64()
        })
    };
    for family in Family::BOTH {
        lab.impair(&a, &b, Impairment { rate: Some(Rate::bits_per_second(20_000_000)), ..NONE }).unwrap();
        let limited = transfer(4 << 20, family);
        // A delay that is next to none: every frame passes through the forwarder, as fast as it can.
        lab.impair(&a, &b, Impairment { delay: Span(MS / 10), ..NONE }).unwrap();
        let free = transfer(64 << 20, family);
        eprintln!("{family}: {limited:.1} Mbit/s of 20, {free:.0} Mbit/s through a forwarder without a rate");
        assert!((12.0..20.0).contains(&limited), "{limited}");
        assert!(free > 100.0, "{free}");
    }
}

/// Whether an echo request of so many bytes, as an IP packet, is answered, and what `ping` says.
fn echoes(from: &Host, to: &Host, family: Family, length: usize, fragment: bool) -> (bool, String) {
    let (flag, headers) = if family == Family::V4 { ("-4", 28) } else { ("-6", 48) };
    let size = (length - headers).to_string();
    let how = if fragment { "dont" } else { "do" };
    let target = to.underlay(family).to_string();
    let command = ["ping", flag, "-c", "2", "-i", "0.2", "-W", "0.3", "-M", how, "-s", &size, &target];
    let output = from.exec(&command).unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
    )
}

#[test]
fn what_is_too_long_vanishes_or_is_answered() {
    let topology = Topology::default().router("office", nat()).host("h3", Place::behind("office"));
    Lab::down("labw-mtu").unwrap();
    let options = Options { nodes: 3, topology, daemons: false, ..Options::new("labw-mtu", binaries()) };
    let lab = Lab::up(options).unwrap();
    let (a, b, inside) = (lab.host(0), lab.host(1), lab.host(2));
    for (host, family) in [(&a, Family::V4), (&a, Family::V6), (&inside, Family::V4)] {
        let hole = Impairment { mtu: Some(1300), ..NONE };
        lab.impair_one_way(host, &b, hole).unwrap();
        assert!(echoes(host, &b, family, 1300, false).0);
        let (answered, words) = echoes(host, &b, family, 1301, false);
        assert!(!answered && !words.contains("mtu"), "{words}");
        assert!(echoes(&b, &a, family, 1300, false).0, "the answer is of the same length");

        lab.impair_one_way(host, &b, Impairment { too_big: true, ..hole }).unwrap();
        let (answered, words) = echoes(host, &b, family, 1301, false);
        assert!(!answered && words.contains("mtu"), "{words}");
        let route = host.exec_ok(&["ip", "route", "get", &b.underlay(family).to_string()]).unwrap();
        assert!(route.contains("mtu 1300"), "{route}");
        if family == Family::V4 {
            host.exec_ok(&["ip", "route", "flush", "cache"]).unwrap();
            assert!(echoes(host, &b, family, 1400, true).0, "what may be cut is");
        }
        lab.impair(host, &b, NONE).unwrap();
    }
}

#[test]
fn the_command_line_changes_links_of_a_lab_that_is_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("town.toml");
    let nat = "{ mapping = \"endpoint-independent\", filtering = \"endpoint-independent\" }";
    let text = format!(
        "seed = 7\n[router.office]\nnat = {nat}\n[host.h2]\nbehind = \"office\"\n\
         [[link]]\nbetween = [\"h1\", \"h3\"]\none_way = true\nwith = {{ delay = \"20ms\" }}\n"
    );
    std::fs::write(&file, text).unwrap();
    Lab::down("labw-cli-link").unwrap();
    let topology = Topology::read(&file).unwrap();
    let nodes = topology.hosts_named();
    let options = Options { nodes, topology, daemons: false, ..Options::new("labw-cli-link", binaries()) };
    let lab = Lab::up(options).unwrap();
    let (a, inside, c) = (lab.host(0), lab.host(1), lab.host(2));
    let run = |words: &str| {
        let mut words = words.split_whitespace();
        let helper = &binaries().helper[0];
        let mut command = Command::new(helper);
        command.arg(words.next().unwrap()).args(["--name", "labw-cli-link"]).args(words);
        let output = command.output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    };
    let ok = |words: &str| {
        let (success, text) = run(words);
        assert!(success, "{words}: {text}");
        text
    };
    assert_eq!(ok("link h1 h3"), "h1 > h3: delay 20ms\nh3 > h1: -\n");
    assert!(median(&datagrams(&a, &c, Family::V4, 20, MS)) >= 20 * MS);
    assert_eq!(
        ok("link h1 h3 --delay 40ms --loss 0.5%"),
        "h1 > h3: delay 40ms, loss 0.5%\nh3 > h1: delay 40ms, loss 0.5%\n"
    );
    assert!(median(&datagrams(&c, &a, Family::V6, 20, MS)) >= 40 * MS);
    ok("link h2 h1 --cut --one-way");
    assert!(is_blocked(&inside, &a, Family::V4));
    let links = ok("links");
    let rows: Vec<Vec<&str>> = links.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            vec!["h1", "h3", "delay", "40ms,", "loss", "0.5%"],
            vec!["h2", "h1", "cut"],
            vec!["h3", "h1", "delay", "40ms,", "loss", "0.5%"]
        ]
    );
    for (words, said) in [
        ("link h1 h1 --cut", "between two hosts"),
        ("link h1 h9", "no host \"h9\""),
        ("link h1 h3 --jitter 50ms", "more than `delay`"),
        ("link h1 h3 --loss 5", "1%"),
        ("rebind home", "office"),
    ] {
        let (success, text) = run(words);
        assert!(!success && text.contains(said), "{words}: {text}");
    }
    assert_eq!(ok("links"), links, "what was refused has changed nothing");

    let before = inside.address(Family::V4);
    let said = ok("renumber h2");
    assert!(
        inside.address(Family::V4) != before && said.contains(&inside.underlay(Family::V4).to_string()),
        "{said}"
    );
    assert!(is_blocked(&inside, &a, Family::V4));
    ok("rebind office");
    for (one, other) in [("h1", "h2"), ("h1", "h3")] {
        ok(&format!("link {one} {other} --clear"));
    }
    assert_eq!(ok("links"), "nothing happens to any packet\n");
    assert!(gets_through(&inside, &a, Family::V4));
    assert!(median(&datagrams(&a, &c, Family::V4, 20, MS)) < 5 * MS);
}
