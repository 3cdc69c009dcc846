//! What a runtime asks: environment and [`config`](crate::config), validated into types that need no further
//! checking. Pure; what a command does not need is not looked at.

use std::{ffi::OsString, path::PathBuf};

use serde_json::Value;

use crate::{
    arguments::Arguments,
    config::{Config, Wishes, is_identifier, valid_attachments},
    error::Failure,
    previous::Previous,
    state::AttachmentKey,
    version::Version,
};

/// Looks up an environment variable.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// A container's interface, and where the container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The interface's name in the state.
    pub key: AttachmentKey,
    /// CNI_NETNS.
    pub netns: PathBuf,
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
                let arguments = match text(variables, "CNI_ARGS")? {
                    Some(text) => Arguments::parse(&text)?,
                    None => Arguments::default(),
                };
                let wishes = Box::new(Wishes::parse(arguments, &value)?);
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

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
