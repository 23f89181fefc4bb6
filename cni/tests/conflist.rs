//! The configuration that is shipped.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use mesh_cni::{CniVersion, Command, Invocation};
use serde_json::{Value, json};

fn shipped() -> Value {
    serde_json::from_str(include_str!("../../deploy/cni/10-mesh.conflist")).unwrap()
}

#[test]
fn s107_s108_old_and_new_runtimes_find_a_version_that_every_plugin_speaks() {
    let list = shipped();
    assert_eq!(list["cniVersion"], "1.0.0");
    let versions: Vec<&str> =
        list["cniVersions"].as_array().unwrap().iter().map(|version| version.as_str().unwrap()).collect();
    assert!(versions.contains(&"1.0.0") && versions.contains(&"1.1.0"));
    for version in versions {
        CniVersion::parse(version).unwrap();
    }
    // Another plugin in the list would have to speak 1.1.0, too.
    assert_eq!(list["plugins"].as_array().unwrap().len(), 1);
}

#[test]
fn s116_nothing_is_loaded_from_a_directory_of_the_networks_name() {
    assert_eq!(shipped()["loadOnlyInlinedPlugins"], true);
}

#[test]
fn what_a_runtime_makes_of_the_list_is_accepted() {
    let list = shipped();
    for version in list["cniVersions"].as_array().unwrap() {
        let mut conf = list["plugins"][0].clone();
        conf["name"] = list["name"].clone();
        conf["cniVersion"] = version.clone();
        conf["runtimeConfig"] = json!({});
        let env = |name: &str| match name {
            "CNI_COMMAND" => Some("ADD".to_owned()),
            "CNI_CONTAINERID" => Some("c1".to_owned()),
            "CNI_NETNS" => Some("/var/run/netns/cni-1".to_owned()),
            "CNI_IFNAME" => Some("eth0".to_owned()),
            _ => None,
        };
        let command = Invocation::parse(&env, conf.to_string().as_bytes()).unwrap();
        assert!(matches!(command, Command::Add(command) if command.conf.name == "mesh"));
    }
}
