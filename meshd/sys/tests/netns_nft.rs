//! nftables against the running kernel: by what happens to packets, and by what `nft list` reads.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use common::{BRIDGE_MAC, GATEWAY4, GATEWAY6, Node, Ns};
use mesh_sys::nft::{
    Base, BaseChain, Blocking, Chain, ChainKind, Cmp, CtState, Element, Event, Expr, Field, FieldType, Hook,
    Monitor, Nft, NftError, Part, Policy, Reject, Rule, Set, SetData, Table, TableFamily, TableOptions,
    Transaction, Value, Verdict,
};
use mesh_sys::rtnl::{Family, Mac};
use nix::errno::Errno;

fn inet() -> Table {
    Table::new(TableFamily::Inet, "meshd")
}

fn rule() -> Rule {
    Rule::new(TableFamily::Inet)
}

fn nft(ns: &Ns) -> Blocking {
    Blocking::open_in(&ns.netns).unwrap()
}

/// A table with one chain of this name, not attached, holding the rules.
fn load(ns: &Ns, rules: &[Rule]) -> String {
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default()).add_chain(&inet(), &Chain::regular("c"));
    for rule in rules {
        tx.add_rule(&inet(), "c", rule);
    }
    nft(ns).commit(&tx).unwrap();
    ns.sh("nft list chain inet meshd c")
}

#[test]
fn every_expression_reads_in_nft_as_it_was_meant() {
    let ns = Ns::new("expr");
    let cases: Vec<(Rule, &str)> = vec![
        (rule().iifname("mesh0").accept(), r#"iifname "mesh0" accept"#),
        (rule().iifname("mv*").drop(), r#"iifname "mv*" drop"#),
        (rule().oifname_not("lo").drop(), r#"oifname != "lo" drop"#),
        (rule().saddr("10.32.0.0/12".parse().unwrap()).drop(), "ip saddr 10.32.0.0/12 drop"),
        (rule().daddr_not("10.32.1.1/32".parse().unwrap()).drop(), "ip daddr != 10.32.1.1 drop"),
        (rule().saddr("fd32::/48".parse().unwrap()).accept(), "ip6 saddr fd32::/48 accept"),
        (rule().daddr("fd32::1/128".parse().unwrap()).accept(), "ip6 daddr fd32::1 accept"),
        (rule().ip_version(Family::V6).drop(), "meta nfproto ipv6 drop"),
        (rule().l4proto(17).dport(6784).accept(), "udp dport 6784 accept"),
        (rule().l4proto(6).sport(80).counter().accept(), "tcp sport 80 counter packets 0 bytes 0 accept"),
        (
            rule()
                .l4proto(6)
                .range(Field::Dport, 8000u16.to_be_bytes(), 8080u16.to_be_bytes(), false)
                .accept(),
            "tcp dport 8000-8080 accept",
        ),
        (
            rule().l4proto(6).range(Field::Dport, 8000u16.to_be_bytes(), 8080u16.to_be_bytes(), true).drop(),
            "tcp dport != 8000-8080 drop",
        ),
        (
            rule().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept(),
            "ct state established,related accept",
        ),
        (rule().ct_state(CtState::INVALID).drop(), "ct state invalid drop"),
        (rule().eq(Field::Icmp6Type, [128]).accept(), "icmpv6 type echo-request accept"),
        (rule().eq(Field::IcmpType, [5]).drop(), "icmp type redirect drop"),
        (rule().mark(0x10, 0xf0).accept(), "meta mark & 0x000000f0 == 0x00000010 accept"),
        (rule().set_mark(0x10, 0xf0), "meta mark set meta mark & 0xffffff1f | 0x00000010"),
        (rule().eq(Field::Pkttype, [1]).drop(), "meta pkttype broadcast drop"),
        (rule().reject(Reject::Prohibited), "reject with icmpx admin-prohibited"),
        (rule().l4proto(6).reject(Reject::TcpReset), "meta l4proto tcp reject with tcp reset"),
        (rule().log(5, "drop: ").drop(), r#"log prefix "drop: " group 5 snaplen 128 drop"#),
        (rule().clamp_mss(), "tcp flags syn / syn,rst tcp option maxseg size set rt mtu"),
        (rule().verdict(Verdict::Return), "return"),
        (rule().ether_saddr(BRIDGE_MAC).accept(), "ether saddr 02:4d:00:00:00:01 accept"),
        (
            rule().masked(Field::EtherDaddr, [1, 0, 0, 0, 0, 0], Cmp::Ne, [0; 6]).drop(),
            "ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 drop",
        ),
        (
            rule().eq(Field::Payload { base: Base::Transport, offset: 4, len: 2 }, [0, 7]).drop(),
            "@th,32,16 0x7 drop",
        ),
        (rule().accept().comment("why this is here"), r#"accept comment "why this is here""#),
    ];
    let rules: Vec<Rule> = cases.iter().map(|(r, _)| r.clone()).collect();
    let text = load(&ns, &rules);
    let lines: Vec<&str> = text.lines().map(str::trim).skip(2).collect();
    let mut wrong = Vec::new();
    for (i, (_, wanted)) in cases.iter().enumerate() {
        let found = lines.get(i).copied().unwrap_or("(missing)");
        if found != *wanted {
            wrong.push(format!("wanted: {wanted}\n found: {found}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn translations_read_in_nft_as_they_were_meant() {
    let ns = Ns::new("nat");
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default());
    tx.add_chain(&inet(), &Chain::nat("post", Hook::Postrouting, 90));
    tx.add_chain(&inet(), &Chain::nat("pre", Hook::Prerouting, -100));
    tx.add_rule(&inet(), "post", &rule().oifname("eth0").masquerade());
    tx.add_rule(&inet(), "post", &rule().snat("10.32.1.1".parse().unwrap()));
    tx.add_rule(&inet(), "post", &rule().snat("fd32::1".parse().unwrap()));
    tx.add_rule(&inet(), "pre", &rule().l4proto(6).dport(80).dnat("10.32.1.7".parse().unwrap(), Some(8080)));
    tx.add_rule(&inet(), "pre", &rule().l4proto(6).dport(80).dnat("fd32::7".parse().unwrap(), Some(8080)));
    nft(&ns).commit(&tx).unwrap();
    let text = ns.sh("nft list table inet meshd");
    for wanted in [
        "type nat hook postrouting priority srcnat - 10; policy accept;",
        r#"oifname "eth0" masquerade fully-random"#,
        "snat ip to 10.32.1.1",
        "snat ip6 to fd32::1",
        "dnat ip to 10.32.1.7:8080",
        "dnat ip6 to [fd32::7]:8080",
    ] {
        assert!(text.contains(wanted), "{wanted} not in\n{text}");
    }
}

#[test]
fn sets_and_maps_of_every_shape_read_in_nft_as_they_were_meant() {
    let ns = Ns::new("sets");
    let mut tx = Transaction::new();
    let t = inet();
    tx.add_table(&t, &TableOptions { comment: Some("static rules 4711".into()), ..TableOptions::default() });
    tx.add_chain(&t, &Chain::regular("pod1"));
    tx.add_set(&t, &Set::new("local4", [FieldType::V4]).comment("local pods"));
    tx.add_set(&t, &Set::intervals("ranges4", [FieldType::V4]));
    tx.add_set(&t, &Set::intervals("ranges6", [FieldType::V6]));
    tx.add_set(&t, &Set::new("ports", [FieldType::Port]));
    tx.add_set(&t, &Set::new("spoof", [FieldType::Ifname, FieldType::Mac, FieldType::V4]));
    tx.add_set(&t, &Set::intervals("allow", [FieldType::V4, FieldType::Proto, FieldType::Port]));
    tx.add_set(&t, &Set::verdict_map("dispatch", [FieldType::V4]));
    tx.add_set(&t, &Set { data: SetData::Value(FieldType::V4), ..Set::new("nat", [FieldType::Port]) });
    let ip = |s: &str| Part::ip(s.parse().unwrap());
    tx.add_elements(&t, "local4", &[Element::new(&[ip("10.32.1.2")]), Element::new(&[ip("10.32.1.3")])]);
    tx.add_elements(
        &t,
        "ranges4",
        &Element::prefixes(&["10.32.0.0/12".parse().unwrap(), "10.0.0.0/24".parse().unwrap()]),
    );
    tx.add_elements(
        &t,
        "ranges6",
        &Element::prefixes(&["fd32::/48".parse().unwrap(), "ff00::/8".parse().unwrap()]),
    );
    tx.add_elements(&t, "ports", &[Element::new(&[Part::Port(6783)])]);
    let key = [Part::Ifname("mv0".into()), Part::Mac(Mac([2, 0, 0, 0, 0, 7])), ip("10.32.1.2")];
    tx.add_elements(&t, "spoof", &[Element::new(&key)]);
    let from = [ip("10.32.1.0"), Part::Proto(6), Part::Port(8000)];
    let to = [ip("10.32.1.255"), Part::Proto(6), Part::Port(8080)];
    tx.add_elements(&t, "allow", &[Element::range(&from, &to)]);
    tx.add_elements(
        &t,
        "dispatch",
        &[
            Element::verdict(&[ip("10.32.1.2")], Verdict::Goto("pod1".into())),
            Element::verdict(&[ip("10.32.1.3")], Verdict::Drop),
        ],
    );
    tx.add_elements(&t, "nat", &[Element::value(&[Part::Port(80)], &ip("10.32.1.2"))]);
    tx.add_chain(&t, &Chain::filter("forward", Hook::Forward, -5, Policy::Drop));
    tx.add_rule(
        &t,
        "forward",
        &rule().in_set(&[Field::Ip4Daddr], "ranges4").not_in_set(&[Field::Ip4Daddr], "local4").drop(),
    );
    tx.add_rule(
        &t,
        "forward",
        &rule().in_set(&[Field::Ip4Saddr, Field::L4proto, Field::Dport], "allow").accept(),
    );
    tx.add_rule(&t, "forward", &rule().vmap(&[Field::Ip4Daddr], "dispatch"));
    let mut nft = nft(&ns);
    nft.commit(&tx).unwrap();
    let text = ns.sh("nft list table inet meshd");
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in [
        r#"comment "static rules 4711""#,
        r#"set local4 { type ipv4_addr comment "local pods" elements = { 10.32.1.2, 10.32.1.3 } }"#,
        "set ranges4 { type ipv4_addr flags interval elements = { 10.0.0.0/24, 10.32.0.0/12 } }",
        "set ranges6 { type ipv6_addr flags interval elements = { fd32::/48, ff00::/8 } }",
        "set ports { type inet_service elements = { 6783 } }",
        r#"set spoof { type ifname . ether_addr . ipv4_addr elements = { "mv0" . 02:00:00:00:00:07 . 10.32.1.2 } }"#,
        "set allow { type ipv4_addr . inet_proto . inet_service flags interval elements = { 10.32.1.0/24 . tcp . 8000-8080 } }",
        "map dispatch { type ipv4_addr : verdict elements = { 10.32.1.2 : goto pod1, 10.32.1.3 : drop } }",
        "map nat { type inet_service : ipv4_addr elements = { 80 : 10.32.1.2 } }",
        "type filter hook forward priority filter - 5; policy drop;",
        "ip daddr @ranges4 ip daddr != @local4 drop",
        "ip saddr . meta l4proto . th dport @allow accept",
        "ip daddr vmap @dispatch",
    ] {
        assert!(flat.contains(wanted), "{wanted} not in\n{text}");
    }
    // And the same through our own listing.
    let found = nft.elements(&t, "dispatch").unwrap();
    assert!(found.contains(&Element::verdict(&[ip("10.32.1.2")], Verdict::Goto("pod1".into()))), "{found:?}");
    assert_eq!(nft.elements(&t, "spoof").unwrap(), [Element::new(&key)]);
    let nat = nft.elements(&t, "nat").unwrap();
    assert_eq!(nat[0].value, Some(Value::Bytes(vec![10, 32, 1, 2])));
    assert_eq!(nft.elements(&t, "allow").unwrap(), [Element::range(&from, &to)]);
    assert_eq!(nft.sets(&t).unwrap().len(), 8);
    assert_eq!(
        nft.sets(&t).unwrap().iter().find(|s| s.name == "local4").unwrap().comment.as_deref(),
        Some("local pods")
    );
    let info = nft.table(&t).unwrap().unwrap();
    assert_eq!((info.comment.as_deref(), info.owner), (Some("static rules 4711"), None));
    let chains = nft.chains(&t).unwrap();
    let forward = chains.iter().find(|c| c.name == "forward").unwrap();
    assert_eq!(forward.base, Some(("filter".into(), 2, -5, Policy::Drop)));
    assert!(nft.elements(&t, "absent").unwrap_err().is_missing());
}

#[test]
fn a_transaction_is_done_as_a_whole_or_not_at_all_and_says_where_it_failed() {
    let ns = Ns::new("atomic");
    let mut nft = nft(&ns);
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default());
    tx.add_chain(&inet(), &Chain::regular("c"));
    tx.add_rule(&inet(), "c", &rule().jump("absent").comment("to nowhere"));
    tx.add_rule(&inet(), "c", &rule().accept());
    tx.add_rule(&inet(), "c", &rule().in_set(&[Field::Ip4Daddr], "no_set").drop());
    let error = nft.commit(&tx).unwrap_err();
    let NftError::Rejected { operation, step, of, errno, further, .. } = &error else { panic!("{error}") };
    assert_eq!((*step, *of, *errno, *further), (3, 5, Errno::ENOENT, 1), "{error}");
    assert_eq!(operation, "add rule inet meshd c (\"to nowhere\")");
    assert!(error.is_missing());
    assert!(nft.table(&inet()).unwrap().is_none(), "a part was done");

    // A last operation that fails alone, and the handle goes on working.
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default()).delete_chain(&inet(), "absent");
    assert!(matches!(nft.commit(&tx), Err(NftError::Rejected { step: 2, of: 2, .. })));
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default());
    nft.commit(&tx).unwrap();
    assert!(nft.table(&inet()).unwrap().is_some());
    nft.commit(&Transaction::new()).unwrap();

    // What contradicts itself is found before anything is sent.
    let mut tx = Transaction::new();
    tx.add_chain(&inet(), &Chain::regular("c"));
    tx.add_rule(
        &inet(),
        "c",
        &rule().saddr("10.0.0.0/8".parse().unwrap()).daddr("fd00::/8".parse().unwrap()),
    );
    assert!(matches!(nft.commit(&tx), Err(NftError::Invalid { .. })));
    assert!(nft.chains(&inet()).unwrap().is_empty());
}

#[test]
fn very_many_refusals_do_not_hang_or_confuse() {
    let ns = Ns::new("refused");
    let mut nft = nft(&ns);
    let mut tx = Transaction::new();
    for _ in 0..20_000 {
        tx.delete_chain(&inet(), "absent");
    }
    let start = Instant::now();
    let error = nft.commit(&tx).unwrap_err();
    assert!(matches!(error, NftError::Rejected { step: 1, of: 20_000, .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default());
    nft.commit(&tx).unwrap();
}

#[test]
fn deleting_is_idempotent_and_replacing_is_one_step() {
    let ns = Ns::new("replace");
    let mut nft = nft(&ns);
    let mut delete = Transaction::new();
    delete.delete_table(&inet());
    nft.commit(&delete).unwrap();
    nft.commit(&delete).unwrap();
    let mut handles = Vec::new();
    for name in ["one", "two"] {
        let mut tx = Transaction::new();
        tx.delete_table(&inet());
        tx.add_table(&inet(), &TableOptions { comment: Some(name.into()), ..TableOptions::default() });
        tx.add_chain(&inet(), &Chain::regular(name));
        nft.commit(&tx).unwrap();
        let info = nft.table(&inet()).unwrap().unwrap();
        assert_eq!(info.comment.as_deref(), Some(name));
        handles.push(info.handle);
    }
    assert_ne!(handles[0], handles[1], "a table made anew has a new handle");
    let chains = nft.chains(&inet()).unwrap();
    assert_eq!(chains.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["two"]);
    nft.commit(&delete).unwrap();
    assert!(nft.tables().unwrap().is_empty());
}

#[test]
fn a_generation_that_moved_on_stops_the_transaction() {
    let ns = Ns::new("gen");
    let mut nft = nft(&ns);
    let generation = nft.generation().unwrap();
    ns.sh("nft add table inet other");
    let mut tx = Transaction::new();
    tx.expect_generation(generation).add_table(&inet(), &TableOptions::default());
    let error = nft.commit(&tx).unwrap_err();
    assert!(error.is_stale(), "{error}");
    let now = nft.generation().unwrap();
    assert_ne!(now, generation);
    tx.expect_generation(now);
    nft.commit(&tx).unwrap();
}

#[test]
fn single_rules_are_deleted_by_handle_and_counted() {
    let ns = Ns::new("handle");
    let mut nft = nft(&ns);
    let t = inet();
    let mut tx = Transaction::new();
    tx.add_table(&t, &TableOptions::default())
        .add_chain(&t, &Chain::filter("output", Hook::Output, 0, Policy::Accept));
    tx.add_rule(&t, "output", &rule().oifname("lo").counter().comment("loop"));
    tx.add_rule(&t, "output", &rule().counter().comment("all"));
    tx.insert_rule(&t, "output", &rule().comment("first"));
    nft.commit(&tx).unwrap();
    assert!(ns.pings("127.0.0.1"));
    let rules = nft.rules(&t).unwrap();
    let comments: Vec<_> = rules.iter().map(|r| r.comment.as_deref().unwrap()).collect();
    assert_eq!(comments, ["first", "loop", "all"]);
    assert_eq!(rules[1].expressions, ["meta", "cmp", "counter"]);
    let (packets, bytes) = rules[1].counter.unwrap();
    assert!(packets >= 2 && bytes >= 84 * packets, "{packets} {bytes}");
    let mut tx = Transaction::new();
    tx.delete_rule(&t, "output", rules[1].handle);
    nft.commit(&tx).unwrap();
    assert_eq!(nft.rules(&t).unwrap().len(), 2);
    let mut tx = Transaction::new();
    tx.flush_chain(&t, "output").delete_chain(&t, "output");
    nft.commit(&tx).unwrap();
    assert!(nft.chains(&t).unwrap().is_empty());
}

#[test]
fn a_hundred_thousand_elements_go_in_at_once_and_one_more_is_quick() {
    let ns = Ns::new("bulk");
    let mut nft = nft(&ns);
    let t = inet();
    let all: Vec<Element> =
        (0..100_000u32).map(|n| Element::new(&[Part::V4((0x0a00_0000 + n).into())])).collect();
    let mut tx = Transaction::new();
    tx.add_table(&t, &TableOptions::default())
        .add_set(&t, &Set::new("pods", [FieldType::V4]))
        .add_elements(&t, "pods", &all);
    let start = Instant::now();
    nft.commit(&tx).unwrap();
    eprintln!("100,000 elements in one transaction: {:?}", start.elapsed());
    assert_eq!(nft.elements(&t, "pods").unwrap().len(), all.len());
    let one = [Element::new(&[Part::V4([192, 168, 0, 1].into())])];
    let start = Instant::now();
    for _ in 0..100 {
        let mut tx = Transaction::new();
        tx.add_elements(&t, "pods", &one);
        nft.commit(&tx).unwrap();
        let mut tx = Transaction::new();
        tx.delete_elements(&t, "pods", &one);
        nft.commit(&tx).unwrap();
    }
    let each = start.elapsed() / 200;
    eprintln!("one element: {each:?}");
    assert!(each < Duration::from_millis(20), "{each:?}");
    let mut tx = Transaction::new();
    tx.create_elements(&t, "pods", &all[..1]);
    assert_eq!(nft.commit(&tx).unwrap_err().errno(), Some(Errno::EEXIST));
    let mut tx = Transaction::new();
    tx.delete_elements(&t, "pods", &one);
    assert!(nft.commit(&tx).unwrap_err().is_missing());
    let mut tx = Transaction::new();
    tx.flush_set(&t, "pods").delete_set(&t, "pods");
    nft.commit(&tx).unwrap();
    assert!(nft.sets(&t).unwrap().is_empty());
}

#[test]
fn an_owned_table_outlives_a_flush_and_only_its_owner_changes_it() {
    let ns = Ns::new("owner");
    let mut owner = nft(&ns);
    let options = TableOptions { owner: true, ..TableOptions::default() };
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &options).add_chain(&inet(), &Chain::regular("c"));
    owner.commit(&tx).unwrap();
    assert_eq!(owner.table(&inet()).unwrap().unwrap().owner, Some(owner.port()));
    ns.sh("nft flush ruleset");
    assert!(owner.table(&inet()).unwrap().is_some(), "flush ruleset removed an owned table");
    let mut other = nft(&ns);
    let mut tx = Transaction::new();
    tx.add_rule(&inet(), "c", &rule().accept());
    assert!(other.commit(&tx).unwrap_err().is_permission());
    owner.commit(&tx).unwrap();
    let mut replace = Transaction::new();
    replace.delete_table(&inet()).add_table(&inet(), &options);
    owner.commit(&replace).unwrap();
    drop(owner);
    std::thread::sleep(Duration::from_millis(100));
    assert!(other.table(&inet()).unwrap().is_none(), "without persist it goes with its owner");

    let mut owner = nft(&ns);
    let options = TableOptions { owner: true, persist: true, comment: None };
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &options);
    owner.commit(&tx).unwrap();
    drop(owner);
    std::thread::sleep(Duration::from_millis(100));
    let info = other.table(&inet()).unwrap().expect("with persist it stays without its owner");
    assert_eq!(info.owner, None);
    let mut heir = nft(&ns);
    heir.commit(&tx).unwrap();
    assert_eq!(heir.table(&inet()).unwrap().unwrap().owner, Some(heir.port()), "the next one takes it over");
}

#[test]
fn forward_policy_by_effect_on_packets() {
    let node = Node::new(2, true);
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    let mut nft = nft(&node.host);
    let t = inet();
    assert!(a.ns.pings(&b.v4.to_string()) && a.ns.pings(&b.v6.to_string()));
    let mut tx = Transaction::new();
    tx.add_table(&t, &TableOptions::default());
    tx.add_set(&t, &Set::new("allow4", [FieldType::V4, FieldType::V4]));
    tx.add_set(&t, &Set::new("allow6", [FieldType::V6, FieldType::V6]));
    tx.add_chain(&t, &Chain::filter("forward", Hook::Forward, -5, Policy::Accept));
    tx.add_rule(&t, "forward", &rule().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept());
    tx.add_rule(&t, "forward", &rule().in_set(&[Field::Ip4Saddr, Field::Ip4Daddr], "allow4").accept());
    tx.add_rule(&t, "forward", &rule().in_set(&[Field::Ip6Saddr, Field::Ip6Daddr], "allow6").accept());
    tx.add_rule(&t, "forward", &rule().iifname("mesh0").counter().drop().comment("the rest"));
    nft.commit(&tx).unwrap();
    assert!(!a.ns.pings(&b.v4.to_string()) && !a.ns.pings(&b.v6.to_string()), "not stopped");
    assert!(a.ns.pings(GATEWAY4) && a.ns.pings(GATEWAY6), "the host itself is not forwarding");
    let mut tx = Transaction::new();
    tx.add_elements(&t, "allow4", &[Element::new(&[Part::V4(a.v4), Part::V4(b.v4)])]);
    tx.add_elements(&t, "allow6", &[Element::new(&[Part::V6(a.v6), Part::V6(b.v6)])]);
    nft.commit(&tx).unwrap();
    assert!(a.ns.pings(&b.v4.to_string()) && a.ns.pings(&b.v6.to_string()), "not let through");
    assert!(!b.ns.pings(&a.v4.to_string()), "the other direction was not allowed");
    let dropped =
        nft.rules(&t).unwrap().into_iter().find(|r| r.comment.as_deref() == Some("the rest")).unwrap();
    assert_eq!(dropped.counter.unwrap().0, 3);
}

#[test]
fn a_netdev_chain_sees_frames_of_one_device() {
    let node = Node::new(1, true);
    let t = Table::new(TableFamily::Netdev, "meshd");
    let base = BaseChain {
        kind: ChainKind::Filter,
        hook: Hook::Ingress,
        priority: 0,
        policy: Policy::Accept,
        devices: vec!["mv0".into()],
    };
    let mut tx = Transaction::new();
    tx.add_table(&t, &TableOptions::default());
    tx.add_chain(&t, &Chain { name: "in".into(), base: Some(base) });
    tx.add_rule(&t, "in", &Rule::new(TableFamily::Netdev).saddr("10.32.1.10/32".parse().unwrap()).drop());
    nft(&node.host).commit(&tx).unwrap();
    assert!(!node.pods[0].ns.pings(GATEWAY4));
    assert!(node.pods[0].ns.pings(GATEWAY6));
}

#[test]
fn an_mss_is_clamped_to_the_route() {
    let node = Node::new(2, true);
    let [a, b] = node.pods.as_slice() else { unreachable!() };
    node.host.sh(&format!("ip route change {}/32 dev mesh0 proto 118 mtu 1000; ip route change {}/32 dev mesh0 proto 118 mtu 1000", a.v4, b.v4));
    let mut tx = Transaction::new();
    tx.add_table(&inet(), &TableOptions::default());
    tx.add_chain(&inet(), &Chain::filter("forward", Hook::Forward, -150, Policy::Accept));
    tx.add_rule(&inet(), "forward", &rule().clamp_mss());
    nft(&node.host).commit(&tx).unwrap();
    let config = mesh_sys::packet::CaptureConfig { device: Some("eth0".into()), ..Default::default() };
    let mut capture = mesh_sys::packet::Capture::open_in(&b.ns.netns, &config).unwrap();
    a.ns.sh(&format!("timeout 1 socat -u /dev/null TCP:{}:9 || true", b.v4));
    let mut mss = None;
    capture
        .read_for(Duration::from_millis(300), |frame| {
            let d = frame.data;
            // IPv4, TCP, SYN: the first option of a Linux SYN is the MSS.
            if d.len() > 58 && d[12..14] == [8, 0] && d[23] == 6 && d[47] == 2 && d[54..56] == [2, 4] {
                mss = Some(u16::from_be_bytes([d[56], d[57]]));
            }
        })
        .unwrap();
    assert_eq!(mss, Some(960), "the pod's own MTU of 1400 would give 1360");
}

fn restore(comment: &str) -> Transaction {
    let mut tx = Transaction::new();
    tx.delete_table(&inet());
    tx.add_table(&inet(), &TableOptions { comment: Some(comment.into()), ..TableOptions::default() });
    tx.add_chain(&inet(), &Chain::filter("forward", Hook::Forward, 0, Policy::Drop));
    tx
}

#[tokio::test(flavor = "current_thread")]
async fn a_flush_by_others_is_noticed_and_restored_within_100_ms_and_our_own_changes_are_not_told() {
    let ns = Ns::new("flush");
    let nft = Nft::open_in(&ns.netns).unwrap();
    let mut monitor = Monitor::open_in(&ns.netns, vec![inet()], vec![nft.port()]).unwrap();
    nft.commit(restore("first")).await.unwrap();
    nft.commit(restore("second")).await.unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(200), monitor.next()).await;
    assert!(quiet.is_err(), "our own change was told: {quiet:?}");

    ns.sh("nft add table inet unrelated; nft delete table inet unrelated");
    let quiet = tokio::time::timeout(Duration::from_millis(200), monitor.next()).await;
    assert!(quiet.is_err(), "another's table was told: {quiet:?}");

    ns.sh("nft add chain inet meshd intruder");
    let event = tokio::time::timeout(Duration::from_secs(2), monitor.next()).await.unwrap().unwrap();
    assert_eq!(event, Event::Changed(inet()));

    for round in 0..10 {
        ns.sh("nft flush ruleset");
        let flushed = Instant::now();
        loop {
            let event = tokio::time::timeout(Duration::from_secs(2), monitor.next()).await.unwrap().unwrap();
            if event == Event::Deleted(inet()) {
                break;
            }
        }
        nft.commit(restore("again")).await.unwrap();
        let took = flushed.elapsed();
        assert!(took < Duration::from_millis(100), "round {round}: {took:?}");
        assert!(nft.table(&inet()).await.unwrap().is_some());
    }
}

#[test]
fn raw_expressions_are_there_for_what_rules_do_not_offer() {
    let ns = Ns::new("raw");
    let reg = mesh_sys::nft::Reg::FIRST;
    let exprs = [
        Expr::Meta { key: mesh_sys::nft::Meta::L4proto, reg },
        Expr::Cmp { reg, op: Cmp::Ne, value: vec![6] },
        Expr::Verdict(Verdict::Drop),
    ];
    let raw = exprs.into_iter().fold(rule(), Rule::expr);
    assert!(load(&ns, &[raw]).contains("meta l4proto != tcp drop"));
}
