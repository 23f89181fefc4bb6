//! What a container runtime gives to the plugin.
//!
//! An input looks like a request of HTTP: lines with the environment, an empty line, standard input. So that the
//! corpus can be read, and so that the environment is fuzzed along with the JSON.

use mesh_cni::{CniVersion, Command, Invocation};

use crate::Target;

pub(crate) const TARGET: Target = Target {
    name: "cni_stdin",
    run,
    seeds,
    words: &[
        b"CNI_COMMAND=ADD\n",
        b"CNI_COMMAND=CHECK\n",
        b"CNI_COMMAND=GC\n",
        b"CNI_COMMAND=STATUS\n",
        b"CNI_COMMAND=VERSION\n",
        b"CNI_IFNAME=",
        b"CNI_ARGS=",
        b"K8S_POD_NAME=",
        b"\"cniVersion\":\"1.1.0\"",
        b"\"0.3.1\"",
        b"\"prevResult\":",
        b"\"interfaces\":",
        b"\"ips\":",
        b"\"routes\":",
        b"\"dns\":",
        b"\"mtu\":",
        b"\"cni.dev/valid-attachments\":",
        b"\"runtimeConfig\":",
        b"null",
        b"[]",
        b"{}",
        b"1e999",
        b"-1",
        b"\\ud800",
    ],
};

fn run(data: &[u8]) {
    let (environment, stdin) = split(data);
    let variable = |name: &str| {
        let mut lines = environment.lines().filter_map(|line| line.split_once('='));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    let parsed = Invocation::parse(&variable, stdin);
    match &parsed {
        Ok(command) => accepted(command, &variable),
        Err(error) => {
            assert!(!error.msg().is_empty());
            let document = error.to_json();
            let numbers = [1, 4, 6, 7];
            assert!(document["code"].as_u64().is_some_and(|code| numbers.contains(&code)), "{document}");
            assert!(
                document["cniVersion"].as_str().is_some_and(|version| CniVersion::parse(version).is_ok())
            );
            assert!(!document["msg"].as_str().unwrap_or_default().is_empty());
            // A runtime shows it to people: no matter what came in, it does not fill their screen.
            assert!(document.to_string().len() < 8192, "{} bytes of error", document.to_string().len());
        }
    }
    assert_eq!(Invocation::parse(&variable, stdin), parsed, "the same input was judged differently");
}

/// What a checked command promises to those who carry it out.
fn accepted(command: &Command, variable: &dyn Fn(&str) -> Option<String>) {
    match command {
        Command::Add(add) | Command::Check(add) => {
            assert_eq!(Some(&add.netns), variable("CNI_NETNS").as_ref());
            assert_eq!(Some(add.id.container()), variable("CNI_CONTAINERID").as_deref());
            assert!(add.id.host_ifname().len() <= 15 && !add.netns.is_empty());
            assert!(add.attach.mtu.is_none_or(|mtu| (mesh_cni::MIN_MTU..=mesh_cni::MAX_MTU).contains(&mtu)));
            assert!(add.attach.prev_result.is_some() || matches!(command, Command::Add(_)));
        }
        Command::Del(del) => assert_eq!(Some(del.id.ifname()), variable("CNI_IFNAME").as_deref()),
        Command::About => assert!(variable("CNI_COMMAND").unwrap_or_default().is_empty()),
        Command::Version(_) | Command::Status(_) | Command::Gc(_) => {}
    }
}

fn split(data: &[u8]) -> (String, &[u8]) {
    let end = data.windows(2).position(|pair| pair == b"\n\n");
    let (environment, stdin) = end.map_or((data, &[][..]), |end| (&data[..=end], &data[end + 2..]));
    (String::from_utf8_lossy(environment).into_owned(), stdin)
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let environment = |command: &str| {
        format!(
            "CNI_COMMAND={command}\nCNI_CONTAINERID=0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9\n\
             CNI_NETNS=/run/netns/cni-5f0b\nCNI_IFNAME=eth0\nCNI_PATH=/opt/cni/bin\n\
             CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=7c9e\n\n"
        )
    };
    let config = r#"{"cniVersion":"1.1.0","name":"mesh","type":"mesh-cni","mtu":1420,
 "dns":{"nameservers":["10.96.0.10"],"search":["svc.cluster.local"],"options":["ndots:5"]}}"#;
    let result = r#"{"cniVersion":"1.1.0",
  "interfaces":[{"name":"mvd4e5f6071829","mac":"0a:58:0a:20:00:01"},
   {"name":"eth0","mac":"0a:58:0a:20:00:02","mtu":1420,"sandbox":"/run/netns/cni-5f0b"}],
  "ips":[{"interface":1,"address":"10.32.0.2/32","gateway":"10.32.0.1"},
   {"interface":1,"address":"fd00:1:2:3::2/128","gateway":"fd00:1:2:3::1"}],
  "routes":[{"dst":"0.0.0.0/0","gw":"10.32.0.1"},{"dst":"::/0","gw":"fd00:1:2:3::1"}],"dns":{}}"#;
    let check = format!(r#"{{"cniVersion":"1.1.0","name":"mesh","type":"mesh-cni","prevResult":{result}}}"#);
    let old_result = r#"{"cniVersion":"0.3.1","interfaces":[{"name":"eth0","sandbox":"/run/netns/cni-5f0b"}],
  "ips":[{"version":"4","interface":0,"address":"10.32.0.2/32","gateway":"10.32.0.1"}]}"#;
    let chained =
        format!(r#"{{"cniVersion":"0.3.1","name":"mesh","type":"mesh-cni","prevResult":{old_result}}}"#);
    let gc = r#"{"cniVersion":"1.1.0","name":"mesh","type":"mesh-cni",
 "cni.dev/valid-attachments":[{"containerID":"0a1b2c3d","ifname":"eth0"},{"containerID":"../x","ifname":"eth0"}]}"#;
    let texts = [
        ("add", environment("ADD") + config),
        ("add-chained", environment("ADD") + &chained),
        ("check", environment("CHECK") + &check),
        ("del", environment("DEL") + &check),
        ("del-without-namespace", format!("CNI_COMMAND=DEL\nCNI_CONTAINERID=c\nCNI_IFNAME=eth0\n\n{config}")),
        ("gc", format!("CNI_COMMAND=GC\nCNI_PATH=/opt/cni/bin\n\n{gc}")),
        ("status", format!("CNI_COMMAND=STATUS\n\n{config}")),
        ("version", "CNI_COMMAND=VERSION\n\n{\"cniVersion\":\"1.1.0\"}".to_owned()),
        ("version-without-input", "CNI_COMMAND=VERSION\n\n".to_owned()),
        ("nothing", String::new()),
        ("not-json", environment("ADD") + "{\"cniVersion\":\"1.1.0\","),
    ];
    texts.into_iter().map(|(name, text)| (name, text.into_bytes())).collect()
}
