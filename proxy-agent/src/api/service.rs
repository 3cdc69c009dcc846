//! Services.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU16,
};

use ipnetwork::IpNetwork;
use penstock_common::{Algorithm, Forwarding};

use super::{
    ALGORITHM, Decoded, FORWARDING, HEADLESS, Interner, LEFT_OUT, SERVICE_PROXY_NAME, check_name,
    cut, object_name, plain, range_of,
    raw::{Ingress, Raw, ServicePort as RawPort, ServiceSpec, ServiceStatus},
    usable, usable_ip,
};
use crate::model::object::{Family, Kind, Object, Protocol, Service, ServicePort, TrafficPolicy};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` where it is not given.
const DEFAULT_AFFINITY_SECS: i64 = 10_800;
/// Its largest value.
const LONGEST_AFFINITY_SECS: i64 = 86_400;

/// Decodes a Service, or says why it can't be used.
pub(super) fn decode(raw: Raw, names: &mut Interner) -> Result<Decoded, String> {
    let name = object_name(&raw.metadata, Kind::Service, names)?;
    let spec: ServiceSpec = match raw.spec {
        Some(spec) => serde_json::from_value(spec)
            .map_err(|error| format!("spec can't be decoded: {}", plain(&error.to_string())))?,
        None => return Err("has no spec".to_owned()),
    };
    let labels = &raw.metadata.labels;
    let is_others = labels.contains_key(SERVICE_PROXY_NAME) || labels.contains_key(HEADLESS);
    let cluster_ips = match cluster_ips(&spec)? {
        Some(ips) if !is_others => ips,
        _ => return Ok(Decoded::Ignored(Kind::Service, name)),
    };
    let status: ServiceStatus = match raw.status {
        Some(status) => serde_json::from_value(status)
            .map_err(|error| format!("status can't be decoded: {error}"))?,
        None => ServiceStatus::default(),
    };
    // A field that the type has no use for is not looked at, as in kube-proxy.
    let is_balanced = spec.kind.as_deref() == Some("LoadBalancer");
    let has_node_ports = is_balanced || spec.kind.as_deref() == Some("NodePort");
    let mut ports: Vec<ServicePort> = Vec::with_capacity(spec.ports.len());
    let (mut port_names, mut numbers) = (HashSet::new(), HashSet::new());
    for raw in &spec.ports {
        let port = port(raw, has_node_ports, names)?;
        if !port_names.insert(port.name.clone()) {
            return Err(format!("two ports are called {:?}", cut(&port.name)));
        }
        if !numbers.insert((port.port, port.protocol)) {
            return Err(format!("two ports are {} {}", port.protocol, port.port));
        }
        ports.push(port);
    }
    let mut left_out = Vec::new();
    Ok(Decoded::Object(Object::Service(Service {
        name,
        created_secs: created(raw.metadata.creation_timestamp.as_deref())?,
        cluster_ips,
        ports,
        affinity_secs: affinity(&spec)?,
        algorithm: algorithm(raw.metadata.annotation(ALGORITHM))?,
        forwarding: forwarding(raw.metadata.annotation(FORWARDING))?,
        internal_policy: policy(
            "internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
        )?,
        external_policy: policy(
            "externalTrafficPolicy",
            spec.external_traffic_policy.as_deref(),
        )?,
        external_ips: external_ips(&spec, &mut left_out),
        balancer_ips: if is_balanced {
            balancer_ips(&status, &mut left_out)
        } else {
            Vec::new()
        },
        source_ranges: if is_balanced {
            source_ranges(&spec.load_balancer_source_ranges, &mut left_out)
        } else {
            Vec::new()
        },
        health_check_port: match spec.health_check_node_port {
            Some(number) if is_balanced && number != 0 => Some(port_number(number)?),
            _ => None,
        },
        left_out,
    })))
}

fn algorithm(name: Option<&str>) -> Result<Algorithm, String> {
    let Some(name) = name else {
        return Ok(Algorithm::default());
    };
    Algorithm::named(name).ok_or_else(|| {
        let known = Algorithm::ALL.map(Algorithm::label).join(", ");
        format!("annotation {ALGORITHM} {:?} is none of {known}", cut(name))
    })
}

fn forwarding(name: Option<&str>) -> Result<Forwarding, String> {
    let Some(name) = name else {
        return Ok(Forwarding::default());
    };
    Forwarding::named(name).ok_or_else(|| {
        let known = Forwarding::ALL.map(Forwarding::label).join(", ");
        format!("annotation {FORWARDING} {:?} is none of {known}", cut(name))
    })
}

fn policy(field: &str, text: Option<&str>) -> Result<TrafficPolicy, String> {
    match text {
        // The API server writes an empty one where there is none.
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(format!(
            "{field} {:?} is neither Cluster nor Local",
            cut(other)
        )),
    }
}

/// Each once, sorted.
fn sorted<T: Ord>(all: Vec<T>) -> Vec<T> {
    all.into_iter()
        .collect::<BTreeSet<T>>()
        .into_iter()
        .collect()
}

fn external_ips(spec: &ServiceSpec, left_out: &mut Vec<String>) -> Vec<IpAddr> {
    let ips = spec.external_ips.iter();
    let ips = ips.map(|text| usable_ip("externalIPs", text));
    sorted(usable(ips, LEFT_OUT, left_out))
}

/// Addresses that this node is to answer for; those of proxies, and names, are the provider's.
fn balancer_ips(status: &ServiceStatus, left_out: &mut Vec<String>) -> Vec<IpAddr> {
    let ip_of = |ingress: &Ingress| {
        let text = ingress.ip.as_deref().filter(|ip| !ip.is_empty());
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {
                text.map(|text| usable_ip("status.loadBalancer.ingress.ip", text))
            }
            Some("Proxy") => None,
            Some(other) => Some(Err(format!(
                "a load balancer's ipMode {:?} is neither VIP nor Proxy",
                cut(other)
            ))),
        }
    };
    let ips = status.load_balancer.ingress.iter().filter_map(ip_of);
    sorted(usable(ips, LEFT_OUT, left_out))
}

/// Ranges by their networks, each once; the API allows spaces around them.
///
/// One that can't be read must not let in whom it would have kept out: in its place stand the addresses that
/// no client has, since without any range everybody may come.
fn source_ranges(texts: &[String], left_out: &mut Vec<String>) -> Vec<IpNetwork> {
    let range = |text: &String| {
        range_of(text.trim())
            .and_then(|range| IpNetwork::new(range.network(), range.prefix()).ok())
            .ok_or_else(|| format!("loadBalancerSourceRanges has {:?}, no CIDR", cut(text)))
    };
    let mut ranges = usable(texts.iter().map(range), "it lets nobody in", left_out);
    if ranges.len() < texts.len() {
        let nobody: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        ranges.extend(nobody.map(IpNetwork::from));
    }
    sorted(ranges)
}

/// The cluster addresses; `None` where there is nothing to program.
fn cluster_ips(spec: &ServiceSpec) -> Result<Option<Vec<IpAddr>>, String> {
    match spec.kind.as_deref() {
        None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some("ExternalName") => return Ok(None),
        Some(other) => return Err(format!("type {:?} is unknown", cut(other))),
    }
    // As the API server demands (ValidateServiceClusterIPsRelatedFields).
    if let (Some(single), Some(first)) = (&spec.cluster_ip, spec.cluster_ips.first())
        && !single.is_empty()
        && single != first
    {
        let (single, first) = (cut(single), cut(first));
        return Err(format!(
            "clusterIP {single:?} is not the first of clusterIPs, {first:?}"
        ));
    }
    let single = spec.cluster_ip.iter().cloned().collect();
    let texts = if spec.cluster_ips.is_empty() {
        &single
    } else {
        &spec.cluster_ips
    };
    if texts.iter().all(|text| text.is_empty() || text == "None") {
        return Ok(None);
    }
    let mut ips: Vec<IpAddr> = Vec::with_capacity(2);
    for text in texts {
        let ip = usable_ip("clusterIP", text)?;
        if ips.iter().any(|known| Family::of(*known) == Family::of(ip)) {
            return Err(format!("two cluster addresses of one family: {ip}"));
        }
        ips.push(ip);
    }
    Ok(Some(ips))
}

fn port(raw: &RawPort, has_node_port: bool, names: &mut Interner) -> Result<ServicePort, String> {
    let name = raw.name.as_deref().unwrap_or_default();
    if !name.is_empty() {
        check_name("port name", name)?;
    }
    Ok(ServicePort {
        name: names.get(name),
        protocol: protocol(raw.protocol.as_deref())?,
        port: port_number(raw.port)?,
        node_port: match raw.node_port {
            // Zero is how the API writes that there is none.
            Some(number) if has_node_port && number != 0 => Some(port_number(number)?),
            _ => None,
        },
    })
}

/// A port's number.
pub(super) fn port_number(number: i64) -> Result<NonZeroU16, String> {
    u16::try_from(number)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("port {number} is not between 1 and 65535"))
}

/// A protocol's name; TCP where there is none.
pub(super) fn protocol(name: Option<&str>) -> Result<Protocol, String> {
    match name {
        None | Some("TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!(
            "protocol {:?} is none of TCP, UDP, SCTP",
            cut(other)
        )),
    }
}

fn affinity(spec: &ServiceSpec) -> Result<Option<u32>, String> {
    match spec.session_affinity.as_deref() {
        None | Some("None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return Err(format!(
                "sessionAffinity {:?} is neither None nor ClientIP",
                cut(other)
            ));
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let seconds = config
        .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
        .unwrap_or(DEFAULT_AFFINITY_SECS);
    u32::try_from(seconds)
        .ok()
        .filter(|_| (1..=LONGEST_AFFINITY_SECS).contains(&seconds))
        .map(Some)
        .ok_or_else(|| {
            format!("timeoutSeconds {seconds} is not between 1 and {LONGEST_AFFINITY_SECS}")
        })
}

/// Seconds since 1970 of an RFC 3339 time.
fn created(text: Option<&str>) -> Result<i64, String> {
    let Some(text) = text else {
        return Ok(i64::MAX);
    };
    text.parse::<jiff::Timestamp>()
        .map(jiff::Timestamp::as_second)
        .map_err(|_| format!("creationTimestamp {:?} is no RFC 3339 time", cut(text)))
}
