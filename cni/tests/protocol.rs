//! What the program says to those who call it wrongly, or only ask. Needs no rights.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test fails by panicking, and its names are sentences"
)]

mod bed;

use std::{
    io::Write,
    process::{Command, Stdio},
};

use bed::{PLUGIN, VERSIONS, check_error};
use serde_json::{Value, json};

/// Runs the plugin with these variables and input; its exit code and output.
fn run(variables: &[(&str, &str)], input: &[u8]) -> (i32, Value) {
    let mut child = Command::new(PLUGIN)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let value = match output.stdout.as_slice() {
        [] => Value::Null,
        text => serde_json::from_slice(text).unwrap(),
    };
    (output.status.code().unwrap(), value)
}

fn fails(variables: &[(&str, &str)], input: &[u8], code: u64, words: &str) {
    let (exit, error) = run(variables, input);
    assert_eq!(exit, 1, "{error}");
    check_error(&error);
    assert_eq!(error["code"], code, "{error}");
    assert!(
        error["details"].as_str().unwrap().contains(words),
        "{error}"
    );
}

#[test]
fn version_is_answered_whoever_asks() {
    for version in VERSIONS.into_iter().chain(["0.1.0", "9.9.9"]) {
        let input = json!({"cniVersion": version}).to_string();
        let (exit, answer) = run(&[("CNI_COMMAND", "VERSION")], input.as_bytes());
        assert_eq!(exit, 0);
        assert_eq!(answer["cniVersion"], version);
        assert_eq!(answer["supportedVersions"], json!(VERSIONS));
    }
    let (exit, answer) = run(&[("CNI_COMMAND", "VERSION")], b"");
    assert_eq!((exit, &answer["cniVersion"]), (0, &json!("1.1.0")));
}

#[test]
fn what_is_wrong_is_said() {
    let config = br#"{"cniVersion": "1.0.0", "name": "pods"}"#;
    fails(&[], config, 4, "CNI_COMMAND is not set");
    fails(&[("CNI_COMMAND", "PING")], config, 4, "\"PING\"");
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
        for input in [
            &b"{"[..],
            b"[]",
            b"null",
            b"\xff\xfe",
            b"{} {}",
            b"nonsense",
        ] {
            fails(&[("CNI_COMMAND", command)], input, 6, "standard input");
        }
    }
    // Deeper than any stack.
    fails(
        &[("CNI_COMMAND", "ADD")],
        "[".repeat(100_000).as_bytes(),
        6,
        "standard input",
    );
    fails(&[("CNI_COMMAND", "ADD")], b"", 6, "standard input");
    fails(&[("CNI_COMMAND", "ADD")], b"{}", 1, "0.1.0");
    fails(
        &[("CNI_COMMAND", "ADD")],
        br#"{"cniVersion":"7.0.0"}"#,
        1,
        "7.0.0",
    );
    fails(&[("CNI_COMMAND", "GC")], config, 1, "1.1.0");
}

#[test]
fn missing_variables_are_named() {
    let config = br#"{"cniVersion": "1.0.0", "name": "pods"}"#;
    let whole = [
        ("CNI_CONTAINERID", "abc"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/nobody-made-this"),
    ];
    for missing in whole.map(|(name, _)| name) {
        let mut variables: Vec<(&str, &str)> = whole
            .into_iter()
            .filter(|(name, _)| *name != missing)
            .collect();
        variables.push(("CNI_COMMAND", "ADD"));
        fails(&variables, config, 4, &format!("{missing} is not set"));
    }
}

#[test]
fn an_error_is_in_the_version_of_the_configuration() {
    for version in VERSIONS {
        let input = json!({"cniVersion": version}).to_string();
        let (_, error) = run(&[("CNI_COMMAND", "DEL")], input.as_bytes());
        assert_eq!(error["cniVersion"], version);
        assert_eq!(error["code"], 7);
    }
}
