//! What is said to whoever asks wrongly, in every way.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;
use serde_json::json;

use super::*;

const WHOLE: [(&str, &str); 4] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "abc"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_NETNS", "/run/netns/abc"),
];

fn parse(changes: &[(&str, &str)], config: &Value) -> Result<Request, Failure> {
    let look_up = |variable: &str| {
        let pairs = changes.iter().chain(&WHOLE);
        let mut pairs = pairs.filter(|(name, _)| *name == variable);
        pairs.next().map(|(_, value)| OsString::from(value))
    };
    Request::parse(&look_up, config.to_string().as_bytes())
}

#[test]
fn errors_name_the_variable() {
    let config = json!({"cniVersion": "1.1.0", "name": "pods"});
    parse(&[], &config).unwrap();
    for (variable, value) in [
        ("CNI_COMMAND", ""),
        ("CNI_COMMAND", "add"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "-a"),
        ("CNI_CONTAINERID", "a/b"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", "sixteen-letters!"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative"),
        ("CNI_ARGS", "nonsense"),
    ] {
        let error = parse(&[(variable, value)], &config).unwrap_err();
        assert_eq!(error.code(), 4, "{variable}={value}: {error}");
        assert!(error.to_string().starts_with(variable), "{error}");
    }
}

#[test]
fn errors_name_the_field() {
    for (field, value) in [
        ("cniVersion", json!(1)),
        ("name", json!(null)),
        ("name", json!("../../etc/passwd")),
        ("name", json!("a".repeat(300))),
        ("runDir", json!("run")),
        ("stateDir", json!(1)),
        ("mtu", json!("1500")),
        ("mtu", json!(1_279)),
        ("dns", json!([])),
        ("prevResult", json!([])),
        ("prevResult.ips", json!({"ips": 1})),
        ("prevResult.ips[0].address", json!({"ips": [{}]})),
        (
            "prevResult.interfaces[1].name",
            json!({"interfaces": [{"name": "x"}, 1]}),
        ),
        ("prevResult.dns", json!({"dns": 1})),
        ("runtimeConfig", json!(1)),
    ] {
        let mut config = json!({"cniVersion": "1.1.0", "name": "pods", "unknown": {"x": 1}});
        let key = field.split('.').next().unwrap();
        config
            .as_object_mut()
            .unwrap()
            .insert(key.to_owned(), value);
        let error = parse(&[], &config).unwrap_err();
        assert_eq!(error.code(), 7, "{field}: {error}");
        assert!(
            error.to_string().starts_with(&format!("{field}: ")),
            "{error}"
        );
    }
}

#[test]
fn commands_exist_from_their_version_on() {
    for (command, version, code) in [
        ("CHECK", "0.3.1", 1),
        ("CHECK", "0.4.0", 7),
        ("GC", "1.0.0", 1),
        ("GC", "1.1.0", 7),
        ("STATUS", "1.0.0", 1),
        ("ADD", "0.2.0", 1),
        ("ADD", "2.0.0", 1),
    ] {
        let config = json!({"cniVersion": version, "name": "pods"});
        let error = parse(&[("CNI_COMMAND", command)], &config).unwrap_err();
        assert_eq!(error.code(), code, "{command} {version}: {error}");
    }
    let error = parse(&[], &json!({"name": "pods"})).unwrap_err();
    assert_eq!(error.code(), 1);
}

#[test]
fn a_command_is_not_bothered_with_what_it_does_not_need() {
    let config = json!({"cniVersion": "1.0.0", "name": "pods", "mtu": "x", "prevResult": 1});
    let del = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_NETNS", ""),
        ("CNI_ARGS", "nonsense"),
    ];
    assert!(matches!(parse(&del, &config), Ok(Request::Del(_, _, None))));
}

/// Any JSON, now and then with keys that mean something.
fn json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        Just("name".to_owned()),
        Just("cniVersion".to_owned()),
        Just("prevResult".to_owned()),
        Just("runtimeConfig".to_owned()),
        Just("portMappings".to_owned()),
        Just("bandwidth".to_owned()),
        Just("ips".to_owned()),
        Just("interfaces".to_owned()),
        Just("routes".to_owned()),
        Just("dns".to_owned()),
        Just("mtu".to_owned()),
        Just("hostPort".to_owned()),
        Just("containerPort".to_owned()),
        Just("address".to_owned()),
        Just("cni.dev/valid-attachments".to_owned()),
        Just("ingressRate".to_owned()),
        "\\PC{0,6}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("1.1.0")),
        Just(json!("pods")),
        Just(json!("10.0.0.1/24")),
    ];
    leaf.prop_recursive(5, 60, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..8)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn variable() -> impl Strategy<Value = Option<OsString>> {
    prop_oneof![
        1 => Just(None),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(|octets| Some(OsString::from_vec(octets))),
        4 => prop_oneof![
            Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS"), Just("VERSION"),
            Just("eth0"), Just("/run/netns/x"), Just("IgnoreUnknown=1;K8S_POD_NAME=x"), Just("IP=1.2.3.4"),
        ].prop_map(|text| Some(OsString::from(text))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_comes_is_answered(
        command in variable(), container in variable(), ifname in variable(),
        netns in variable(), arguments in variable(),
        input in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            json().prop_map(|value| value.to_string().into_bytes()),
            json().prop_map(|mut value| {
                if let Some(object) = value.as_object_mut() {
                    object.insert("cniVersion".to_owned(), "1.1.0".into());
                    object.insert("name".to_owned(), "pods".into());
                }
                value.to_string().into_bytes()
            }),
        ],
    ) {
        let look_up = |variable: &str| match variable {
            "CNI_COMMAND" => command.clone(),
            "CNI_CONTAINERID" => container.clone(),
            "CNI_IFNAME" => ifname.clone(),
            "CNI_NETNS" => netns.clone(),
            "CNI_ARGS" => arguments.clone(),
            _ => None,
        };
        if let Err(failure) = Request::parse(&look_up, &input) {
            let error = failure.to_json(Version::LATEST);
            prop_assert!(error.get("code").and_then(Value::as_u64).is_some_and(|code| code > 0));
            prop_assert!(error.get("details").and_then(Value::as_str).is_some_and(|text| !text.is_empty()));
        }
    }
}
