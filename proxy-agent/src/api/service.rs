//! Services.

use std::{collections::HashSet, net::IpAddr, num::NonZeroU16};

use super::{
    Decoded, HEADLESS, Interner, SERVICE_PROXY_NAME, check_name, cut, object_name, plain,
    raw::{Raw, ServicePort as RawPort, ServiceSpec},
    usable_ip,
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
    let mut ports: Vec<ServicePort> = Vec::with_capacity(spec.ports.len());
    let (mut port_names, mut numbers) = (HashSet::new(), HashSet::new());
    for raw in &spec.ports {
        let port = port(raw, names)?;
        if !port_names.insert(port.name.clone()) {
            return Err(format!("two ports are called {:?}", cut(&port.name)));
        }
        if !numbers.insert((port.port, port.protocol)) {
            return Err(format!("two ports are {} {}", port.protocol, port.port));
        }
        ports.push(port);
    }
    Ok(Decoded::Object(Object::Service(Service {
        name,
        created_secs: created(raw.metadata.creation_timestamp.as_deref())?,
        cluster_ips,
        ports,
        affinity_secs: affinity(&spec)?,
        internal_policy: match spec.internal_traffic_policy.as_deref() {
            None | Some("Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                return Err(format!(
                    "internalTrafficPolicy {:?} is neither Cluster nor Local",
                    cut(other)
                ));
            }
        },
    })))
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

fn port(raw: &RawPort, names: &mut Interner) -> Result<ServicePort, String> {
    let name = raw.name.as_deref().unwrap_or_default();
    if !name.is_empty() {
        check_name("port name", name)?;
    }
    Ok(ServicePort {
        name: names.get(name),
        protocol: protocol(raw.protocol.as_deref())?,
        port: port_number(raw.port)?,
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
