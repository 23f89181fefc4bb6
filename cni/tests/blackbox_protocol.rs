//! The plugin's binary as a runtime meets it before anything is attached. Needs no privileges.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn run(env: &[(&str, &str)], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A plugin that refuses early does not read its input to the end.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

fn error(env: &[(&str, &str)], stdin: &[u8]) -> Value {
    let output = run(env, stdin);
    assert!(!output.status.success(), "{output:?}");
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(error["code"].is_u64() && error["msg"].is_string() && error["cniVersion"].is_string(), "{error}");
    error
}

const CONF: &[u8] =
    br#"{"cniVersion":"1.1.0","name":"mesh","type":"mesh-cni","socket":"/nonexistent/meshd.sock"}"#;

#[test]
fn s003_started_by_hand_it_says_what_it_is() {
    let output = run(&[], b"");
    assert!(output.status.success() && output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(text.contains("mesh-cni") && text.contains("0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{text}");
}

#[test]
fn s008_s025_s038_s039_s040_version_answers_without_daemon_and_input() {
    let output = run(&[("CNI_COMMAND", "VERSION")], b"");
    assert!(output.status.success());
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        answer,
        json!({"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]})
    );
    let output = run(&[("CNI_COMMAND", "VERSION")], br#"{"cniVersion":"0.3.1"}"#);
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["cniVersion"], "0.3.1");
}

#[test]
fn s002_s024_s027_s029_errors_are_one_object_on_stdout_and_logs_are_not() {
    let output = run(&[("CNI_COMMAND", "UPDATE")], CONF);
    assert!(!output.status.success());
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 4);
}

#[test]
fn s004_s010_s012_s013_s021_s022_s032_s034_errors_have_their_codes() {
    let attach = |verb: &'static str| {
        [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/nonexistent/ns"),
            ("CNI_IFNAME", "eth0"),
        ]
    };
    assert_eq!(error(&[("CNI_COMMAND", "ADD")], CONF)["code"], 4);
    assert_eq!(error(&attach("ADD"), b"{")["code"], 6);
    assert_eq!(error(&attach("ADD"), br#"{"name":"mesh","type":"mesh-cni"}"#)["code"], 1);
    assert_eq!(error(&attach("ADD"), br#"{"cniVersion":"9.0.0"}"#)["code"], 1);
    assert_eq!(error(&attach("ADD"), br#"{"cniVersion":"1.0.0","type":"mesh-cni"}"#)["code"], 7);
    let wrong_mtu =
        error(&attach("ADD"), br#"{"cniVersion":"1.0.0","name":"mesh","type":"mesh-cni","mtu":"x"}"#);
    assert_eq!(wrong_mtu["code"], 7);
    assert!(wrong_mtu["msg"].as_str().unwrap().contains("\"mtu\""));
    assert_eq!(wrong_mtu["cniVersion"], "1.0.0");
    assert_eq!(error(&attach("ADD"), CONF)["code"], 8, "a namespace that is not there");
}

#[test]
fn s020_input_that_cannot_be_read_is_code_5() {
    let output = Command::new(env!("CARGO_BIN_EXE_mesh-cni"))
        .env_clear()
        .env("CNI_COMMAND", "STATUS")
        .stdin(std::fs::File::open("/").unwrap())
        .output()
        .unwrap();
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["code"], 5);
    assert!(error["msg"].as_str().unwrap().contains("standard input"), "{error}");
}

#[test]
fn s020_input_without_end_is_refused() {
    let endless = vec![b' '; 9 * 1024 * 1024];
    assert_eq!(error(&[("CNI_COMMAND", "STATUS")], &endless)["code"], 5);
}

#[test]
fn s037_s082_without_a_daemon_status_is_50_and_names_the_socket() {
    let error = error(&[("CNI_COMMAND", "STATUS")], CONF);
    assert_eq!(error["code"], 50);
    assert!(error["msg"].as_str().unwrap().contains("/nonexistent/meshd.sock"), "{error}");
}

#[test]
fn s092_s094_gc_without_a_list_does_nothing_even_without_daemon() {
    let output = run(&[("CNI_COMMAND", "GC")], CONF);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}
