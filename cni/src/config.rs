//! The network configuration that comes on standard input: which fields mean what, and which values
//! they may have. Fields of others are left alone.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    arguments::Arguments, capability::Capabilities, error::Failure, previous::Previous,
    state::AttachmentKey, version::Version,
};

/// Where the agent's files are, unless the configuration says otherwise.
const RUN_DIR: &str = "/run/penstock";
/// Where the plugin's own files are, unless the configuration says otherwise. Attachments end with the
/// boot; whose turn it is does not.
pub const STATE_DIR: &str = "/var/lib/penstock/cni";
/// What IPv6 asks of every link (RFC 8200, section 5), and the most that a veth carries.
const MTUS: std::ops::RangeInclusive<u64> = 1_280..=65_535;

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

/// Whether the specification allows it as a container's id or a network's name.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut octets = name.bytes();
    octets
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric())
        && octets.all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'_' | b'.' | b'-'))
}

impl Config {
    /// Parses what every command needs.
    pub fn parse(value: &Value) -> Result<Self, Failure> {
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
    /// Parses what only ADD needs.
    pub fn parse(arguments: Arguments, value: &Value) -> Result<Self, Failure> {
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

/// GC's `cni.dev/valid-attachments`.
pub fn valid_attachments(value: &Value) -> Result<Vec<AttachmentKey>, Failure> {
    const KEY: &str = "cni.dev/valid-attachments";
    let list: &[Value] = match value.get(KEY) {
        Some(Value::Array(list)) => list,
        // libcni's way to write an empty list (a nil slice of Go).
        Some(Value::Null) => &[],
        // To take a missing list for an empty one would take every pod's network away.
        _ => {
            return Err(Failure::config(
                KEY,
                "has to be a list of {\"containerID\": …, \"ifname\": …}",
            ));
        }
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
