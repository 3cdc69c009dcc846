//! `runtimeConfig`: what a runtime wants for one container, as its capabilities.

use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::{
    error::Failure,
    state::{Bandwidth, HostPort},
};

/// The most that may come at once, in bits: the kernel counts it in 32 bits of bytes.
const MAX_BURST: u64 = u32::MAX as u64 * 8;

/// What `runtimeConfig` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `portMappings`.
    pub host_ports: Vec<HostPort>,
    /// `bandwidth`, where it limits anything.
    pub bandwidth: Option<Bandwidth>,
    /// `ips`.
    pub ips: Vec<IpAddr>,
}

/// An address, with or without a prefix length, which is the network's business.
pub fn address(text: &str) -> Result<IpAddr, String> {
    let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
    let parsed: Result<IpAddr, _> = ip.parse();
    match parsed {
        Ok(ip) if prefix.is_empty() && !text.ends_with('/') => Ok(ip),
        Ok(ip)
            if prefix
                .parse()
                .is_ok_and(|bits: u8| bits <= if ip.is_ipv4() { 32 } else { 128 }) =>
        {
            Ok(ip)
        }
        _ => Err(format!(
            "{text:?} is no address; write for example 10.244.1.5 or fd00:244:1::5"
        )),
    }
}

impl Capabilities {
    /// Parses the configuration's `runtimeConfig`.
    pub fn parse(config: &Value) -> Result<Self, Failure> {
        let Some(runtime) = object(config, "runtimeConfig", "runtimeConfig")? else {
            return Ok(Self::default());
        };
        Ok(Self {
            host_ports: host_ports(runtime)?,
            bandwidth: bandwidth(runtime)?,
            ips: ips(runtime)?,
        })
    }
}

/// A member that is an object, if it is there and not null.
fn object<'a>(
    parent: &'a Value,
    key: &str,
    path: &str,
) -> Result<Option<&'a Map<String, Value>>, Failure> {
    match parent.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(found)) => Ok(Some(found)),
        Some(_) => Err(Failure::config(path, "is not an object; write {…}")),
    }
}

/// A member by its name, however its letters are written: containerd's are Go's own names, and
/// plugins in Go do not tell them apart.
fn member<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    let mut members = object.as_object()?.iter();
    object.get(name).or_else(|| {
        members
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    })
}

/// The elements of a list, each with its path, if there is a list.
fn elements<'a>(
    runtime: &'a Map<String, Value>,
    key: &str,
) -> Result<Vec<(String, &'a Value)>, Failure> {
    let path = format!("runtimeConfig.{key}");
    match runtime.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(found)) => Ok(found
            .iter()
            .enumerate()
            .map(|(index, value)| (format!("{path}[{index}]"), value))
            .collect()),
        Some(_) => Err(Failure::config(path, "is not a list; write […]")),
    }
}

fn ips(runtime: &Map<String, Value>) -> Result<Vec<IpAddr>, Failure> {
    let parse = |(path, value): (String, &Value)| {
        let text = value.as_str().unwrap_or_default();
        address(text).map_err(|reason| Failure::config(path, reason))
    };
    elements(runtime, "ips")?.into_iter().map(parse).collect()
}

fn host_ports(runtime: &Map<String, Value>) -> Result<Vec<HostPort>, Failure> {
    let mut found: Vec<HostPort> = Vec::new();
    for (path, value) in elements(runtime, "portMappings")? {
        let Some(entry) = host_port(&path, value)? else {
            continue;
        };
        let clash = |other: &&HostPort| {
            other.host_port == entry.host_port
                && other.protocol == entry.protocol
                && other.host_ip == entry.host_ip
                && other.container_port != entry.container_port
        };
        if let Some(other) = found.iter().find(clash) {
            return Err(Failure::config(
                format!("{path}.hostPort"),
                format!(
                    "is {}, which leads to port {} already; a port leads to one place",
                    entry.host_port, other.container_port
                ),
            ));
        }
        if !found.contains(&entry) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// One port; `None` where `hostPort` is 0, by which runtimes say that there is none.
fn host_port(path: &str, value: &Value) -> Result<Option<HostPort>, Failure> {
    let port = |key: &str| -> Result<u16, Failure> {
        let number = member(value, key).and_then(Value::as_u64);
        number
            .and_then(|number| u16::try_from(number).ok())
            .ok_or_else(|| {
                Failure::config(
                    format!("{path}.{key}"),
                    "has to be a number from 1 to 65535",
                )
            })
    };
    if !value.is_object() {
        return Err(Failure::config(
            path,
            "is not an object; write {\"hostPort\": 8080, …}",
        ));
    }
    let host_port = port("hostPort")?;
    if host_port == 0 {
        return Ok(None);
    }
    let container_port = port("containerPort")?;
    if container_port == 0 {
        return Err(Failure::config(
            format!("{path}.containerPort"),
            "has to be a number from 1 to 65535",
        ));
    }
    let protocol = match member(value, "protocol") {
        None | Some(Value::Null) => "tcp".to_owned(),
        Some(protocol) => protocol.as_str().unwrap_or_default().to_ascii_lowercase(),
    };
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return Err(Failure::config(
            format!("{path}.protocol"),
            "has to be \"tcp\", \"udp\" or \"sctp\"",
        ));
    }
    let host_ip = match member(value, "hostIP") {
        None | Some(Value::Null) => None,
        Some(ip) => match ip.as_str() {
            Some("") => None,
            text => Some(text.unwrap_or_default().parse().map_err(|_| {
                Failure::config(
                    format!("{path}.hostIP"),
                    "has to be an address of the node, or left out for all of them",
                )
            })?),
        },
    };
    Ok(Some(HostPort {
        // Everywhere is everywhere, however it is written; a family stays a family.
        host_ip,
        host_port,
        container_port,
        protocol,
    }))
}

fn bandwidth(runtime: &Map<String, Value>) -> Result<Option<Bandwidth>, Failure> {
    const PATH: &str = "runtimeConfig.bandwidth";
    let found = match runtime.get("bandwidth") {
        None | Some(Value::Null) => return Ok(None),
        Some(found @ Value::Object(_)) => found,
        Some(_) => return Err(Failure::config(PATH, "is not an object; write {…}")),
    };
    let number = |key: &str| match member(found, key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value.as_u64().ok_or_else(|| {
            Failure::config(
                format!("{PATH}.{key}"),
                "has to be a number of bits, 0 or more",
            )
        }),
    };
    let bandwidth = Bandwidth {
        ingress_rate: number("ingressRate")?,
        ingress_burst: number("ingressBurst")?,
        egress_rate: number("egressRate")?,
        egress_burst: number("egressBurst")?,
    };
    for (direction, rate, burst) in [
        ("ingress", bandwidth.ingress_rate, bandwidth.ingress_burst),
        ("egress", bandwidth.egress_rate, bandwidth.egress_burst),
    ] {
        let rate_key = format!("{PATH}.{direction}Rate");
        let burst_key = format!("{PATH}.{direction}Burst");
        if rate == 0 && burst != 0 {
            return Err(Failure::config(
                rate_key,
                format!("is missing; {direction}Burst needs a rate in bits per second"),
            ));
        }
        if rate != 0 && rate < 8 {
            return Err(Failure::config(
                rate_key,
                "has to be 8 bits per second or more",
            ));
        }
        if rate != 0 && burst == 0 {
            return Err(Failure::config(
                burst_key,
                format!("is missing; {direction}Rate needs a burst in bits"),
            ));
        }
        if burst > MAX_BURST {
            return Err(Failure::config(
                burst_key,
                format!("has to be at most {MAX_BURST} bits"),
            ));
        }
    }
    Ok((bandwidth != Bandwidth::default()).then_some(bandwidth))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(runtime: Value) -> Result<Capabilities, Failure> {
        Capabilities::parse(&json!({ "runtimeConfig": runtime }))
    }

    #[test]
    fn ports_and_rates_are_understood() {
        let found = parse(json!({
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
                {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1"},
                {"hostPort": 9, "containerPort": 9, "protocol": "sctp"},
                {"hostPort": 0, "containerPort": 81},
                // As containerd writes it.
                {"HostPort": 8081, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""},
            ],
            "bandwidth": {"IngressRate": 8_000, "ingressBurst": 80_000},
            "ips": ["10.0.0.5/24"],
            "somethingElse": true,
        }))
        .unwrap();
        assert_eq!(found.host_ports.len(), 4);
        assert_eq!(found.host_ports.first().unwrap().protocol, "tcp");
        assert_eq!(found.bandwidth.unwrap().ingress_rate, 8_000);
        assert_eq!(parse(Value::Null).unwrap(), Capabilities::default());
        assert_eq!(parse(json!({"bandwidth": {}})).unwrap().bandwidth, None);
    }

    #[test]
    fn errors_name_the_field() {
        for (runtime, field) in [
            (json!(1), "runtimeConfig: "),
            (json!({"portMappings": 1}), "runtimeConfig.portMappings: "),
            (
                json!({"portMappings": [1]}),
                "runtimeConfig.portMappings[0]: ",
            ),
            (
                json!({"portMappings": [{"hostPort": 70_000}]}),
                "runtimeConfig.portMappings[0].hostPort: ",
            ),
            (
                json!({"portMappings": [{"hostPort": 1}]}),
                "runtimeConfig.portMappings[0].containerPort: ",
            ),
            (
                json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "x"}]}),
                "runtimeConfig.portMappings[0].protocol: ",
            ),
            (
                json!({"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "x"}]}),
                "runtimeConfig.portMappings[0].hostIP: ",
            ),
            (
                json!({"portMappings": [{"hostPort": 1, "containerPort": 1}, {"hostPort": 1, "containerPort": 2}]}),
                "runtimeConfig.portMappings[1].hostPort: ",
            ),
            (
                json!({"bandwidth": {"ingressRate": 1_000}}),
                "runtimeConfig.bandwidth.ingressBurst: ",
            ),
            (
                json!({"bandwidth": {"egressBurst": 1_000}}),
                "runtimeConfig.bandwidth.egressRate: ",
            ),
            (
                json!({"bandwidth": {"egressRate": -1}}),
                "runtimeConfig.bandwidth.egressRate: ",
            ),
            (
                json!({"bandwidth": {"egressRate": 8, "egressBurst": u64::MAX}}),
                "runtimeConfig.bandwidth.egressBurst: ",
            ),
            (json!({"ips": ["10.0.0.5/33"]}), "runtimeConfig.ips[0]: "),
            (json!({"ips": ["10.0.0.5/"]}), "runtimeConfig.ips[0]: "),
        ] {
            let error = parse(runtime).unwrap_err();
            assert_eq!(error.code(), 7);
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }
}
