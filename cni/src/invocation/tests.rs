//! The statements about parameters and configuration that need no kernel.

use serde_json::json;

use super::*;

const CONF: &str = r#"{"cniVersion":"1.1.0","name":"mesh","type":"mesh-cni"}"#;

fn parse(env: &[(&str, &str)], stdin: &str) -> Result<Command, CniError> {
    let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Invocation::parse(&env, stdin.as_bytes())
}

fn full<'a>(verb: &'a str, change: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut env = vec![
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];
    for (name, value) in change {
        env.retain(|(key, _)| key != name);
        env.push((name, value));
    }
    env
}

fn with(fields: Value) -> String {
    let mut conf: Value = serde_json::from_str(CONF).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        conf[name] = value.clone();
    }
    conf.to_string()
}

fn add(fields: Value) -> Result<Box<AddCommand>, CniError> {
    let command = parse(&full("ADD", &[]), &with(fields))?;
    let Command::Add(command) = command else { panic!("expected ADD, found {command:?}") };
    Ok(command)
}

fn refused(result: Result<impl std::fmt::Debug, CniError>, code: Code, part: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), code, "{error}");
    assert!(error.msg().contains(part), "{part:?} is not named: {error}");
}

#[test]
fn s001_all_six_operations_are_accepted() {
    let check = with(json!({"prevResult": {}}));
    assert!(matches!(parse(&full("ADD", &[]), CONF), Ok(Command::Add(_))));
    assert!(matches!(parse(&full("DEL", &[]), CONF), Ok(Command::Del(_))));
    assert!(matches!(parse(&full("CHECK", &[]), &check), Ok(Command::Check(_))));
    assert!(matches!(parse(&full("STATUS", &[]), CONF), Ok(Command::Status(_))));
    assert!(matches!(parse(&full("GC", &[]), CONF), Ok(Command::Gc(_))));
    assert!(matches!(parse(&full("VERSION", &[]), CONF), Ok(Command::Version(_))));
}

#[test]
fn s002_an_unknown_operation_is_refused() {
    for verb in ["UPDATE", "add", "ADD ", "\u{fffd}"] {
        refused(parse(&full(verb, &[]), CONF), Code::Environment, "CNI_COMMAND");
    }
}

#[test]
fn s003_without_a_command_nothing_is_read() {
    assert_eq!(parse(&[], "not json"), Ok(Command::About));
    assert!(!Invocation::reads_stdin(&|_| None));
}

#[test]
fn s004_s005_add_and_check_need_three_variables() {
    for verb in ["ADD", "CHECK"] {
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            refused(parse(&full(verb, &[(name, "")]), CONF), Code::Environment, name);
        }
        refused(
            parse(&[("CNI_COMMAND", verb)], CONF),
            Code::Environment,
            "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME",
        );
    }
}

#[test]
fn s006_s065_s068_del_needs_neither_namespace_nor_previous_result() {
    for name in ["CNI_CONTAINERID", "CNI_IFNAME"] {
        refused(parse(&full("DEL", &[(name, "")]), CONF), Code::Environment, name);
    }
    let Ok(Command::Del(command)) = parse(&full("DEL", &[("CNI_NETNS", "")]), CONF) else { panic!() };
    assert_eq!(command.netns, None);
}

#[test]
fn s007_gc_status_version_need_no_container() {
    for verb in ["GC", "STATUS", "VERSION"] {
        parse(&[("CNI_COMMAND", verb)], CONF).unwrap();
        let empty = [("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", "")];
        parse(&full(verb, &empty), CONF).unwrap();
    }
}

#[test]
fn s008_s038_version_works_with_empty_stdin_and_echoes() {
    let echoed = |stdin: &str| match parse(&[("CNI_COMMAND", "VERSION")], stdin) {
        Ok(Command::Version(command)) => command.echoed,
        other => panic!("{other:?}"),
    };
    assert_eq!(echoed(""), "1.1.0");
    assert_eq!(echoed(" \n"), "1.1.0");
    assert_eq!(echoed("{}"), "1.1.0");
    assert_eq!(echoed(r#"{"cniVersion":"0.4.0"}"#), "0.4.0");
    assert_eq!(echoed(r#"{"cniVersion":"2.0.0"}"#), "2.0.0", "the answer tells which versions there are");
    refused(parse(&[("CNI_COMMAND", "VERSION")], "{"), Code::Decode, "JSON");
    refused(parse(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"x"}"#), Code::Decode, "cniVersion");
}

#[test]
fn s009_s017_no_other_variable_is_needed() {
    let mut env = full("ADD", &[]);
    env.retain(|(name, _)| *name != "CNI_PATH");
    assert!(matches!(parse(&env, CONF), Ok(Command::Add(_))));
}

#[test]
fn s010_s011_container_ids_are_checked() {
    for bad in ["-x", ".x", "a/b", "a b", "\u{e4}", "a\u{fffd}"] {
        for verb in ["ADD", "DEL", "CHECK"] {
            refused(
                parse(&full(verb, &[("CNI_CONTAINERID", bad)]), CONF),
                Code::Environment,
                "CNI_CONTAINERID",
            );
        }
    }
    refused(parse(&full("ADD", &[("CNI_CONTAINERID", "")]), CONF), Code::Environment, "CNI_CONTAINERID");
    parse(&full("ADD", &[("CNI_CONTAINERID", "0A_.-z")]), CONF).unwrap();
}

#[test]
fn s012_interface_names_are_checked() {
    for bad in [".", "..", "a/b", "a:b", "a b", "a\tb", "0123456789abcdef", "all", "default"] {
        for verb in ["ADD", "DEL", "CHECK"] {
            refused(parse(&full(verb, &[("CNI_IFNAME", bad)]), CONF), Code::Environment, "CNI_IFNAME");
        }
    }
    parse(&full("ADD", &[("CNI_IFNAME", "0123456789abcde")]), CONF).unwrap();
}

#[test]
fn s013_network_names_are_checked() {
    for bad in [json!(""), json!(null), json!("-x"), json!("a/b"), json!("a b"), json!(7)] {
        for verb in ["ADD", "DEL", "STATUS", "GC"] {
            refused(parse(&full(verb, &[]), &with(json!({"name": bad}))), Code::InvalidConfig, "\"name\"");
        }
    }
    add(json!({"name": "0A_.-z"})).unwrap();
}

#[test]
fn s014_unknown_cni_args_are_ignored() {
    for args in ["FOO=1", "IgnoreUnknown=1;FOO=1", "IgnoreUnknown=0;FOO=a=b;", ";"] {
        parse(&full("ADD", &[("CNI_ARGS", args)]), CONF).unwrap();
    }
    refused(parse(&full("ADD", &[("CNI_ARGS", "FOO")]), CONF), Code::Environment, "CNI_ARGS");
}

#[test]
fn s015_the_pod_comes_from_cni_args() {
    let args =
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u";
    let Ok(Command::Add(command)) = parse(&full("ADD", &[("CNI_ARGS", args)]), CONF) else { panic!() };
    let pod = PodIdentity { namespace: "ns".into(), name: "web-0".into(), uid: "u".into() };
    assert_eq!(command.pod, Some(pod));
    assert_eq!(add(json!({})).unwrap().pod, None);
}

#[test]
fn s016_s104_requested_addresses_are_not_ours_to_serve_and_ignored() {
    let fields =
        json!({"runtimeConfig": {"ips": ["10.0.0.1/8"], "x": 1}, "args": {"cni": {"ips": ["10.0.0.2"]}}});
    add(fields).unwrap();
    parse(&full("ADD", &[("CNI_ARGS", "IP=10.0.0.3")]), CONF).unwrap();
    refused(add(json!({"runtimeConfig": 1})), Code::InvalidConfig, "\"runtimeConfig\"");
}

#[test]
fn s021_input_that_is_not_an_object_is_refused() {
    for bad in ["", "{", "[]", "3", "null", "\"x\"", "{}{}"] {
        refused(parse(&full("ADD", &[]), bad), Code::Decode, "standard input");
    }
    let deep = "[".repeat(100_000);
    refused(parse(&full("ADD", &[]), &deep), Code::Decode, "JSON");
}

#[test]
fn s022_wrong_types_name_the_field() {
    for (name, value) in [
        ("type", json!(1)),
        ("socket", json!([])),
        ("socket", json!("relative.sock")),
        ("socket", json!(format!("/{}", "x".repeat(107)))),
        ("socket", json!("/x\0y")),
        ("stateDir", json!("x")),
        ("runDir", json!(false)),
        ("mtu", json!("1500")),
        ("mtu", json!(1279)),
        ("mtu", json!(65536)),
        ("mtu", json!(-1)),
        ("mtu", json!(1500.5)),
        ("mtu", json!(u64::MAX)),
        ("logLevel", json!("loud")),
        ("dns", json!("10.0.0.1")),
        ("dns.nameservers", json!(null)),
        ("args", json!(1)),
        ("capabilities", json!([])),
        ("ipam", json!("host-local")),
        ("prevResult", json!([])),
    ] {
        let fields = match name {
            "dns.nameservers" => json!({"dns": {"nameservers": "10.0.0.1"}}),
            _ => json!({name: value}),
        };
        refused(add(fields), Code::InvalidConfig, &format!("\"{name}\""));
    }
    refused(add(json!({"dns": {"nameservers": ["::1", "x"]}})), Code::InvalidConfig, "dns.nameservers[1]");
}

#[test]
fn s023_unknown_fields_are_ignored() {
    add(json!({"surprise": {"deep": [1, 2]}, "disableCheck": true, "capabilities": {"portMappings": true}}))
        .unwrap();
}

#[test]
fn s028_s034_an_error_repeats_the_version_of_the_request() {
    let error = add(json!({"cniVersion": "0.4.0", "mtu": 1})).unwrap_err();
    assert_eq!(error.to_json()["cniVersion"], "0.4.0");
    let error = add(json!({"cniVersion": null})).unwrap_err();
    assert_eq!(error.to_json()["code"], 1);
    assert!(error.details().unwrap().contains("0.1.0"));
    refused(add(json!({"cniVersion": 1.0})), Code::Decode, "cniVersion");
}

#[test]
fn s035_s036_operations_newer_than_the_version_are_refused() {
    let conf = |version: &str| with(json!({"cniVersion": version, "prevResult": {}}));
    for (verb, since) in
        [("CHECK", CniVersion::V0_4_0), ("STATUS", CniVersion::V1_1_0), ("GC", CniVersion::V1_1_0)]
    {
        for version in CniVersion::ALL {
            let result = parse(&full(verb, &[]), &conf(version.as_str()));
            if version >= since {
                result.unwrap();
            } else {
                refused(result, Code::IncompatibleVersion, "newer");
            }
        }
    }
}

#[test]
fn s076_check_needs_a_previous_result() {
    refused(parse(&full("CHECK", &[]), CONF), Code::InvalidConfig, "\"prevResult\"");
}

#[test]
fn s088_s092_gc_tells_a_missing_list_from_an_empty_one() {
    let gc = |stdin: &str| match parse(&full("GC", &[]), stdin) {
        Ok(Command::Gc(command)) => Ok(command.valid),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    };
    assert_eq!(gc(CONF), Ok(None));
    assert_eq!(gc(&with(json!({"cni.dev/valid-attachments": null}))), Ok(None));
    assert_eq!(gc(&with(json!({"cni.dev/attachments": []}))), Ok(None), "the misspelt key is not the list");
    assert_eq!(gc(&with(json!({"cni.dev/valid-attachments": []}))), Ok(Some(vec![])));
    let list = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "a b", "ifname": "eth0"}]);
    let valid = gc(&with(json!({"cni.dev/valid-attachments": list}))).unwrap();
    assert_eq!(valid, Some(vec![AttachmentId::new("c1", "eth0").unwrap()]));
    for bad in [json!({}), json!([1]), json!([{"containerID": "c1"}])] {
        let stdin = with(json!({"cni.dev/valid-attachments": bad}));
        refused(gc(&stdin), Code::InvalidConfig, "cni.dev/valid-attachments");
    }
}

#[test]
fn s101_another_ipam_is_refused() {
    refused(add(json!({"ipam": {"type": "host-local"}})), Code::InvalidConfig, "\"ipam.type\"");
    for fine in [json!({}), json!({"type": ""}), json!({"type": "mesh"}), json!(null)] {
        add(json!({"ipam": fine})).unwrap();
    }
}

#[test]
fn s123_del_and_gc_accept_any_configuration_of_ours_however_old() {
    let odd = with(json!({"mtu": "x", "prevResult": {"ips": 3}, "ipam": {"type": "host-local"}, "dns": 1}));
    parse(&full("DEL", &[]), &odd).unwrap();
    parse(&full("GC", &[]), &odd).unwrap();
}

#[test]
fn defaults_are_the_daemons() {
    let conf = add(json!({})).unwrap().conf;
    assert_eq!(conf.socket.to_str(), Some("/run/meshd/meshd.sock"));
    assert_eq!(conf.run_dir.to_str(), Some("/run/meshd"));
    assert_eq!(conf.state_dir.to_str(), Some("/var/lib/meshd"));
    let conf = add(json!({"socket": "/tmp/x/s", "mtu": 0})).unwrap();
    assert_eq!(conf.conf.run_dir.to_str(), Some("/tmp/x"), "beside the socket");
    assert_eq!(conf.attach.mtu, None);
    assert_eq!(add(json!({"mtu": 1280})).unwrap().attach.mtu, Some(1280));
}

proptest::proptest! {
    #[test]
    fn any_input_gives_a_command_or_an_error(
        verb in "ADD|DEL|CHECK|STATUS|GC|VERSION|[A-Z]{0,6}",
        id in ".{0,20}",
        ifname in ".{0,20}",
        args in ".{0,40}",
        stdin in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
    ) {
        let env = |name: &str| match name {
            "CNI_COMMAND" => Some(verb.clone()),
            "CNI_CONTAINERID" => Some(id.clone()),
            "CNI_IFNAME" => Some(ifname.clone()),
            "CNI_NETNS" => Some("/run/netns/x".to_owned()),
            "CNI_ARGS" => Some(args.clone()),
            _ => None,
        };
        for stdin in [stdin.as_slice(), CONF.as_bytes()] {
            if let Err(error) = Invocation::parse(&env, stdin) {
                proptest::prop_assert!(!error.msg().is_empty());
            }
        }
    }
}
