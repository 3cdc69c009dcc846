//! What a runtime asks: environment and standard input, validated into types that need no further
//! checking. Pure; what a command does not need is not looked at.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    arguments::Arguments, capability::Capabilities, error::Failure, previous::Previous,
    state::AttachmentKey, version::Version,
};

/// Where the agent's files are, unless the configuration says otherwise.
const RUN_DIR: &str = "/run/penstock";
/// Where the plugin's own files are, unless the configuration says otherwise.
const STATE_DIR: &str = "/var/lib/penstock/cni";
/// What IPv6 asks of every link (RFC 8200, section 5), and the most that a veth carries.
const MTUS: std::ops::RangeInclusive<u64> = 1_280..=65_535;

/// Looks up an environment variable.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// A network, as its configuration describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The version that it is in.
    pub version: Version,
    /// Its name.
    pub name: String,
    /// Where the agent's files are.
    pub run_dir: PathBuf,
    /// Where the plugin's own files are.
    pub state_dir: PathBuf,
}

/// A container's interface, and where the container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The interface's name in the state.
    pub key: AttachmentKey,
    /// CNI_NETNS.
    pub netns: PathBuf,
}

/// What ADD needs beside its target.
#[derive(Clone, Debug, PartialEq)]
pub struct Wishes {
    /// Whose the container is, and addresses asked for.
    pub arguments: Arguments,
    /// What the runtime wants for it.
    pub capabilities: Capabilities,
    /// What its interface carries at most, where the network's own value is not right.
    pub mtu: Option<u32>,
    /// The configuration's `dns`, which the result repeats.
    pub dns: Option<Value>,
    /// What the plugins before this one made.
    pub previous: Option<Previous>,
}

/// A command with all that it needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// ADD: give a container an interface.
    Add(Config, Target, Box<Wishes>),
    /// DEL: take it away. The namespace may be unknown, or gone.
    Del(Config, AttachmentKey, Option<PathBuf>),
    /// CHECK: is it still as ADD made it?
    Check(Config, Target, Previous),
    /// GC: take away all but these.
    Gc(Config, Vec<AttachmentKey>),
    /// STATUS: would ADD succeed?
    Status(Config),
    /// VERSION: which are spoken? With the version in which to answer.
    Version(String),
}

impl Request {
    /// Reads a request.
    pub fn parse(variables: Variables, input: &[u8]) -> Result<Self, Failure> {
        let command = text(variables, "CNI_COMMAND")?.ok_or_else(|| {
            Failure::environment(
                "CNI_COMMAND",
                "is not set; a container runtime sets it to ADD, DEL, CHECK, GC, STATUS or VERSION",
            )
        })?;
        if command == "VERSION" {
            return version(input);
        }
        let since = match command.as_str() {
            "ADD" | "DEL" => Version::V0_3_1,
            "CHECK" => Version::V0_4_0,
            "GC" | "STATUS" => Version::V1_1_0,
            other => {
                return Err(Failure::environment(
                    "CNI_COMMAND",
                    format!("is {other:?}; it has to be ADD, DEL, CHECK, GC, STATUS or VERSION"),
                ));
            }
        };
        let value = decode(input)?;
        let config = Config::parse(&value)?;
        if config.version < since {
            return Err(Failure::CommandVersion {
                command,
                since,
                version: config.version,
            });
        }
        match command.as_str() {
            "ADD" => {
                let wishes = Box::new(Wishes::parse(variables, &value)?);
                Ok(Self::Add(config, target(variables)?, wishes))
            }
            "DEL" => Ok(Self::Del(config, key(variables)?, netns(variables)?)),
            "CHECK" => {
                let previous = Previous::parse(&value)?.ok_or_else(|| {
                    Failure::config("prevResult", "is missing; CHECK needs the result of ADD")
                })?;
                Ok(Self::Check(config, target(variables)?, previous))
            }
            "GC" => Ok(Self::Gc(config, valid_attachments(&value)?)),
            _ => Ok(Self::Status(config)),
        }
    }
}

/// Standard input as an object.
fn decode(input: &[u8]) -> Result<Value, Failure> {
    let failure = |reason: String| Failure::Decode {
        what: "the network configuration on standard input".to_owned(),
        reason,
    };
    let value: Value = serde_json::from_slice(input).map_err(|error| failure(error.to_string()))?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(failure("is not a JSON object".to_owned()))
    }
}

/// VERSION is answered in whatever version it is asked in, even without a configuration.
fn version(input: &[u8]) -> Result<Request, Failure> {
    if input.trim_ascii().is_empty() {
        return Ok(Request::Version(Version::LATEST.to_string()));
    }
    let value = decode(input)?;
    let asked = value.get("cniVersion").and_then(Value::as_str);
    Ok(Request::Version(
        asked.unwrap_or(Version::LATEST.as_str()).to_owned(),
    ))
}

/// A variable's text; one that is empty counts as missing.
fn text(variables: Variables, variable: &'static str) -> Result<Option<String>, Failure> {
    match variables(variable).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
        Some(Err(_)) => Err(Failure::environment(variable, "is not UTF-8")),
    }
}

/// A variable's text that has to be there.
fn required(variables: Variables, variable: &'static str, what: &str) -> Result<String, Failure> {
    text(variables, variable)?
        .ok_or_else(|| Failure::environment(variable, format!("is not set; it has to be {what}")))
}

/// Whether the specification allows it as a container's id or a network's name.
fn is_identifier(name: &str) -> bool {
    let mut octets = name.bytes();
    octets
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric())
        && octets.all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'_' | b'.' | b'-'))
}

/// Whether the kernel allows it as an interface's name.
fn is_ifname(name: &str) -> bool {
    !matches!(name, "." | "..")
        && (1..=15).contains(&name.len())
        && !name.chars().any(|letter| {
            matches!(letter, '/' | ':') || letter.is_whitespace() || letter.is_control()
        })
}

fn key(variables: Variables) -> Result<AttachmentKey, Failure> {
    const CONTAINER: &str = "CNI_CONTAINERID";
    const IFNAME: &str = "CNI_IFNAME";
    let container = required(variables, CONTAINER, "the container's id")?;
    if !is_identifier(&container) {
        return Err(Failure::environment(
            CONTAINER,
            format!(
                "is {container:?}; it has to be letters, digits, underscores, dots and dashes, the \
                 first a letter or digit"
            ),
        ));
    }
    let ifname = required(variables, IFNAME, "an interface's name, like eth0")?;
    if !is_ifname(&ifname) {
        return Err(Failure::environment(
            IFNAME,
            format!(
                "is {ifname:?}; it has to be an interface's name: 1 to 15 characters without \
                 spaces, slashes and colons"
            ),
        ));
    }
    Ok(AttachmentKey { container, ifname })
}

fn netns(variables: Variables) -> Result<Option<PathBuf>, Failure> {
    let Some(path) = text(variables, "CNI_NETNS")?.map(PathBuf::from) else {
        return Ok(None);
    };
    if path.is_absolute() {
        return Ok(Some(path));
    }
    Err(Failure::environment(
        "CNI_NETNS",
        format!("is {}; it has to be an absolute path", path.display()),
    ))
}

fn target(variables: Variables) -> Result<Target, Failure> {
    let key = key(variables)?;
    let netns = netns(variables)?.ok_or_else(|| {
        Failure::environment(
            "CNI_NETNS",
            "is not set; it has to be the path of a network namespace, like /run/netns/NAME",
        )
    })?;
    Ok(Target { key, netns })
}

impl Config {
    fn parse(value: &Value) -> Result<Self, Failure> {
        let version = Version::of_config(value)?;
        let name = match value.get("name").and_then(Value::as_str) {
            Some(name) if is_identifier(name) && name.len() <= 200 => name.to_owned(),
            _ => {
                return Err(Failure::config(
                    "name",
                    "has to be the network's name: letters, digits, underscores, dots and dashes, \
                     the first a letter or digit",
                ));
            }
        };
        let folder = |key: &str, default: &str| match value.get(key) {
            None | Some(Value::Null) => Ok(PathBuf::from(default)),
            Some(path) => match path.as_str().map(Path::new) {
                Some(path) if path.is_absolute() => Ok(path.to_owned()),
                _ => Err(Failure::config(
                    key,
                    format!("has to be an absolute path, like {default}"),
                )),
            },
        };
        Ok(Self {
            version,
            name,
            run_dir: folder("runDir", RUN_DIR)?,
            state_dir: folder("stateDir", STATE_DIR)?,
        })
    }
}

impl Wishes {
    fn parse(variables: Variables, value: &Value) -> Result<Self, Failure> {
        let arguments = match text(variables, "CNI_ARGS")? {
            Some(text) => Arguments::parse(&text)?,
            None => Arguments::default(),
        };
        let mtu = match value.get("mtu") {
            None | Some(Value::Null) => None,
            Some(mtu) => match mtu.as_u64().filter(|mtu| *mtu == 0 || MTUS.contains(mtu)) {
                // 0 is the usual word for the default.
                Some(mtu) => u32::try_from(mtu).ok().filter(|mtu| *mtu != 0),
                None => {
                    return Err(Failure::config(
                        "mtu",
                        format!(
                            "has to be a number from {} to {}, or left out",
                            MTUS.start(),
                            MTUS.end()
                        ),
                    ));
                }
            },
        };
        let dns = match value.get("dns") {
            None | Some(Value::Null) => None,
            Some(dns) if dns.is_object() => Some(dns.clone()),
            Some(_) => return Err(Failure::config("dns", "is not an object; write {…}")),
        };
        Ok(Self {
            arguments,
            capabilities: Capabilities::parse(value)?,
            mtu,
            dns,
            previous: Previous::parse(value)?,
        })
    }
}

fn valid_attachments(value: &Value) -> Result<Vec<AttachmentKey>, Failure> {
    const KEY: &str = "cni.dev/valid-attachments";
    // To take a missing list for an empty one would take every pod's network away.
    let Some(list) = value.get(KEY).and_then(Value::as_array) else {
        return Err(Failure::config(
            KEY,
            "has to be a list of {\"containerID\": …, \"ifname\": …}",
        ));
    };
    let parse = |(index, entry): (usize, &Value)| {
        let text = |key: &str| {
            let text = entry.get(key).and_then(Value::as_str);
            text.map(str::to_owned).ok_or_else(|| {
                Failure::config(format!("{KEY}[{index}].{key}"), "has to be a string")
            })
        };
        Ok(AttachmentKey {
            container: text("containerID")?,
            ifname: text("ifname")?,
        })
    };
    list.iter().enumerate().map(parse).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
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
}
