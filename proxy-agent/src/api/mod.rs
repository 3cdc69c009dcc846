//! What Penstock reads of API objects, and what it refuses.
//!
//! Only the fields that matter are decoded, so that a quarter of a million endpoints cost little.
//! Every object is judged by itself: one that can't be used is a [`Rejection`] that says which,
//! where and why, and the others are none the worse for it.

mod endpoint_slice;
mod intern;
mod numbers;
mod piecemeal;
mod raw;
mod service;
mod unique;
mod weights;

use std::net::IpAddr;

pub use intern::Interner;
use ipnetwork::IpNetwork;
use numbers::{ip_of, range_of};
use raw::{Metadata, Raw};

use crate::model::object::{Event, ExcludedPod, Kind, Node, Object, ObjectName, Rejection};

/// The label by which a pod asks that its sockets are left alone.
pub const SOCKET_HOOKS_LABEL: &str = "penstock.io/socket-hooks";
/// Its value.
pub const SOCKET_HOOKS_DISABLED: &str = "disabled";

/// The annotation by which a service says how new connections are spread over its backends.
pub const ALGORITHM: &str = "penstock.io/algorithm";
/// The annotation by which a service says how clients outside reach its backends on other nodes.
pub const FORWARDING: &str = "penstock.io/forwarding";
/// The annotation by which an endpoint slice says how much its endpoints get.
pub const WEIGHTS: &str = "penstock.io/weights";
/// The annotation by which the controller of endpoint slices says what moment a change is from.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// What all of Penstock's labels and annotations begin with.
const OWN_PREFIX: &str = "penstock.io/";

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The taint of a node that the cluster's autoscaler is about to delete.
const ABOUT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
const ZONE: &str = "topology.kubernetes.io/zone";

/// What comes of an address that can't be used.
const LEFT_OUT: &str = "left out, all else is served";

/// The longest name that Kubernetes has (RFC 1123 subdomain).
const LONGEST_NAME: usize = 253;

/// What a document holds.
#[derive(Debug)]
pub enum Decoded {
    /// An object.
    Object(Object),
    /// One that Penstock leaves to others, or that has nothing to program.
    Ignored(Kind, ObjectName),
    /// An object of a kind that Penstock has no use for.
    OtherKind(String),
    /// A list.
    List(Vec<Result<Decoded, Rejection>>),
}

impl Decoded {
    /// As an event, for what is an object.
    pub fn into_event(self) -> Option<Event> {
        match self {
            Self::Object(object) => Some(Event::Applied(object)),
            Self::Ignored(kind, name) => Some(Event::Deleted(kind, name)),
            Self::OtherKind(_) | Self::List(_) => None,
        }
    }
}

/// Decodes objects, sharing the strings that repeat.
#[derive(Debug, Default)]
pub struct Decoder {
    names: Interner,
}

impl Decoder {
    /// An object of a known kind, from JSON as the API server sends it.
    pub fn json(&mut self, kind: Kind, json: &str, origin: &str) -> Result<Decoded, Rejection> {
        let raw: Raw = serde_json::from_str(json).map_err(|error| Rejection {
            kind: kind.to_string(),
            object: name_in(json),
            origin: origin.to_owned(),
            reason: format!("can't be decoded: {}", plain(&error.to_string())),
        })?;
        self.typed(kind, raw, origin)
    }

    /// Everything in a manifest, each document by itself.
    ///
    /// Where a document of JSON has no end that can be told, nothing behind it can be either, so that the error
    /// is the last.
    pub fn manifest(
        &mut self,
        text: &str,
        is_json: bool,
        file: &str,
    ) -> Vec<Result<Decoded, Rejection>> {
        let refused = |origin: String, error: &dyn std::fmt::Display| Rejection {
            kind: "document".to_owned(),
            object: String::new(),
            origin,
            reason: format!("is no Kubernetes object: {}", plain(&error.to_string())),
        };
        let mut found = Vec::new();
        if is_json {
            let mut rest = text;
            loop {
                let origin = origin_of(file, found.len());
                let mut documents = serde_json::Deserializer::from_str(rest).into_iter::<Raw>();
                match documents.next() {
                    None => return found,
                    Some(Ok(raw)) => {
                        found.push(self.raw(raw, &origin));
                        rest = rest.get(documents.byte_offset()..).unwrap_or_default();
                    }
                    Some(Err(error)) => {
                        let Some((document, behind)) = piecemeal::first_document(rest) else {
                            found.push(Err(refused(origin, &error)));
                            return found;
                        };
                        found.push(match piecemeal::json(document) {
                            Some(list) => Ok(self.items(list, &origin)),
                            None => Err(Rejection {
                                object: name_in(document),
                                ..refused(origin, &error)
                            }),
                        });
                        rest = behind;
                    }
                }
            }
        }
        for (number, (line, document)) in documents(text).into_iter().enumerate() {
            let origin = format!("{} (from line {line})", origin_of(file, number));
            found.push(match yaml(document) {
                Ok(raw) => self.raw(raw, &origin),
                Err(error) => match piecemeal::yaml(document) {
                    Some(list) => Ok(self.items(list, &origin)),
                    None => Err(refused(origin, &error)),
                },
            });
        }
        found
    }

    /// What a list holds of which one item at least can't be decoded.
    fn items(&mut self, list: piecemeal::List, origin: &str) -> Decoded {
        let items = list.items.into_iter().enumerate().map(|(number, item)| {
            let origin = format!("{origin}, item {number}");
            match item {
                Ok(raw) => self.item(raw, (&list.kind, &list.version), &origin),
                Err(broken) => Err(Rejection {
                    kind: broken.kind,
                    object: broken.object,
                    origin,
                    reason: format!("can't be decoded: {}", plain(&broken.error)),
                }),
            }
        });
        Decoded::List(items.collect())
    }

    /// An item of a list of this kind and version, which need not repeat them (a ServiceList's, for
    /// instance).
    fn item(
        &mut self,
        mut item: Raw,
        (kind, version): (&str, &str),
        origin: &str,
    ) -> Result<Decoded, Rejection> {
        if let Some(kind) = kind.strip_suffix("List").filter(|kind| !kind.is_empty()) {
            item.kind.get_or_insert_with(|| kind.to_owned());
            item.api_version.get_or_insert_with(|| version.to_owned());
        }
        self.raw(item, origin)
    }

    fn raw(&mut self, mut raw: Raw, origin: &str) -> Result<Decoded, Rejection> {
        let kind = raw.kind.take().unwrap_or_default();
        let version = raw.api_version.take().unwrap_or_default();
        if let Some(items) = raw.items.take() {
            let items = items.into_iter().enumerate().map(|(number, item)| {
                self.item(item, (&kind, &version), &format!("{origin}, item {number}"))
            });
            return Ok(Decoded::List(items.collect()));
        }
        let (known, wanted) = match kind.as_str() {
            "Service" => (Kind::Service, "v1"),
            "EndpointSlice" => (Kind::EndpointSlice, "discovery.k8s.io/v1"),
            "Node" => (Kind::Node, "v1"),
            "Pod" => (Kind::Pod, "v1"),
            _ if kind.is_empty() || version.is_empty() => {
                return Err(Rejection {
                    kind: "document".to_owned(),
                    object: shown(&raw.metadata),
                    origin: origin.to_owned(),
                    reason: "has no apiVersion and kind: not a Kubernetes manifest".to_owned(),
                });
            }
            _ => return Ok(Decoded::OtherKind(cut(&kind))),
        };
        if version != wanted {
            if kind == "Service" && version.contains('/') {
                // Somebody else's kind of the same name.
                return Ok(Decoded::OtherKind(format!(
                    "{} {}",
                    cut(&version),
                    cut(&kind)
                )));
            }
            return Err(Rejection {
                kind,
                object: shown(&raw.metadata),
                origin: origin.to_owned(),
                reason: format!("apiVersion is {:?}; Penstock reads {wanted}", cut(&version)),
            });
        }
        self.typed(known, raw, origin)
    }

    fn typed(&mut self, kind: Kind, raw: Raw, origin: &str) -> Result<Decoded, Rejection> {
        let object = shown(&raw.metadata);
        let result = match kind {
            Kind::Service => service::decode(raw, &mut self.names),
            Kind::EndpointSlice => endpoint_slice::decode(raw, &mut self.names),
            Kind::Node => node(&raw, &mut self.names),
            Kind::Pod => pod(&raw, &mut self.names),
        };
        result.map_err(|reason| Rejection {
            kind: kind.to_string(),
            object,
            origin: origin.to_owned(),
            reason,
        })
    }
}

/// An object in YAML. A file's size bounds what is in it, so nothing is counted but what aliases
/// and depth could make of little text.
fn yaml<T: serde::de::DeserializeOwned>(document: &str) -> Result<T, serde_saphyr::Error> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(document, options)
}

/// A namespaced object's name.
fn object_name(
    metadata: &Metadata,
    kind: Kind,
    names: &mut Interner,
) -> Result<ObjectName, String> {
    let name = metadata.name.as_deref().unwrap_or_default();
    check_name("metadata.name", name)?;
    let namespace = match kind {
        Kind::Node => "",
        _ => metadata.namespace.as_deref().unwrap_or("default"),
    };
    if kind != Kind::Node {
        check_name("metadata.namespace", namespace)?;
    }
    Ok(ObjectName {
        namespace: names.get(namespace),
        name: name.into(),
    })
}

/// RFC 1123 as Kubernetes has it: lower case letters, digits, '-' and '.', 253 at most.
pub fn check_name(field: &str, name: &str) -> Result<(), String> {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let is_edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_good = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && name.chars().all(is_inner)
        && name.starts_with(is_edge)
        && name.ends_with(is_edge);
    if is_good {
        return Ok(());
    }
    Err(format!(
        "{field} {:?} ({} bytes) is no name: lower case letters, digits, '-' and '.', at most \
         {LONGEST_NAME}",
        cut(name),
        name.len()
    ))
}

/// An address that a service or endpoint may have (as ValidateNonSpecialIP in Kubernetes).
fn usable_ip(field: &str, text: &str) -> Result<IpAddr, String> {
    let ip = ip_of(text).ok_or_else(|| format!("{field} {:?} is no IP address", cut(text)))?;
    let what = match ip {
        _ if ip.is_unspecified() => "unspecified",
        _ if ip.is_loopback() => "a loopback address",
        _ if ip.is_multicast() => "a multicast address",
        IpAddr::V4(ip) if ip.is_link_local() => "link-local",
        IpAddr::V4(ip) if ip.is_broadcast() => "the broadcast address",
        IpAddr::V6(ip) if ip.is_unicast_link_local() => "link-local",
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => "an IPv4 address in IPv6's clothes",
        _ => return Ok(ip),
    };
    Err(format!("{field} {ip} is {what}"))
}

/// What can be used of several. Of the rest `left_out` says what is wrong with the first, what comes of
/// it, and how many more there are like it.
fn usable<T>(
    all: impl Iterator<Item = Result<T, String>>,
    consequence: &str,
    left_out: &mut Vec<String>,
) -> Vec<T> {
    let (mut found, mut first, mut more) = (Vec::new(), None, 0);
    for one in all {
        match (one, &first) {
            (Ok(one), _) => found.push(one),
            (Err(reason), None) => first = Some(reason),
            (Err(_), Some(_)) => more += 1,
        }
    }
    left_out.extend(first.map(|reason| match more {
        0 => format!("{reason}: {consequence}"),
        _ => format!("{reason}: {consequence} (and {more} more likewise)"),
    }));
    found
}

fn node(raw: &Raw, names: &mut Interner) -> Result<Decoded, String> {
    let name = object_name(&raw.metadata, Kind::Node, names)?;
    let mut left_out = Vec::new();
    let addresses = list(raw.status.as_ref(), "addresses");
    let internal = addresses.filter(|address| text(address, "type") == Some("InternalIP"));
    let internal = internal.filter_map(|address| text(address, "address"));
    let internal_ips = usable(
        internal.map(|ip| usable_ip("status.addresses", ip)),
        LEFT_OUT,
        &mut left_out,
    );
    let mut pod_cidrs: Vec<IpNetwork> = Vec::new();
    for entry in list(raw.spec.as_ref(), "podCIDRs") {
        pod_cidrs.push(pod_cidr(entry.as_str().unwrap_or_default())?);
    }
    if let (true, Some(spec)) = (pod_cidrs.is_empty(), &raw.spec)
        && let Some(only) = text(spec, "podCIDR")
    {
        pod_cidrs.push(pod_cidr(only)?);
    }
    let mut taints = list(raw.spec.as_ref(), "taints");
    let is_leaving = raw.metadata.deletion_timestamp.is_some()
        || taints.any(|taint| text(taint, "key") == Some(ABOUT_TO_BE_DELETED));
    let zone = raw.metadata.label(ZONE).map(|zone| names.get(zone));
    Ok(Decoded::Object(Object::Node(Node {
        name: name.name,
        zone,
        internal_ips,
        pod_cidrs,
        is_leaving,
        left_out,
    })))
}

/// A range of pods' addresses; a node may have one a family.
fn pod_cidr(range: &str) -> Result<IpNetwork, String> {
    let wrong = |reason: &str| format!("spec.podCIDRs {range:?} {reason}");
    let parsed =
        range_of(range).ok_or_else(|| wrong("is no range; write one like 10.244.1.0/24"))?;
    usable_ip("spec.podCIDRs", &parsed.network().to_string())?;
    if parsed.ip() != parsed.network() {
        return Err(wrong(&format!(
            "has host bits; {} has none",
            parsed.network()
        )));
    }
    Ok(parsed)
}

fn pod(raw: &Raw, names: &mut Interner) -> Result<Decoded, String> {
    let name = object_name(&raw.metadata, Kind::Pod, names)?;
    if raw.metadata.label(SOCKET_HOOKS_LABEL) != Some(SOCKET_HOOKS_DISABLED) {
        return Ok(Decoded::Ignored(Kind::Pod, name));
    }
    let mut ips = Vec::new();
    for entry in list(raw.status.as_ref(), "podIPs") {
        if let Some(ip) = text(entry, "ip") {
            ips.push(usable_ip("status.podIPs", ip)?);
        }
    }
    let uid = raw.metadata.uid.as_deref().unwrap_or_default().into();
    Ok(Decoded::Object(Object::Pod(ExcludedPod { name, uid, ips })))
}

fn origin_of(file: &str, number: usize) -> String {
    if number == 0 {
        file.to_owned()
    } else {
        format!("{file}, document {}", number + 1)
    }
}

/// The documents of a YAML stream that hold anything, with the line that each begins at. A line
/// that begins with `---` is a marker wherever it stands (YAML 1.2.2, 9.1.2).
fn documents(text: &str) -> Vec<(usize, &str)> {
    let is_marker = |line: &str| {
        line.strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut found = Vec::new();
    let (mut start, mut first, mut at) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line) {
            found.push((first, text.get(start..at).unwrap_or_default()));
            start = at + 3;
            first = number + 1;
        }
        at += line.len();
    }
    found.push((first, text.get(start..).unwrap_or_default()));
    found.retain(|(_, document)| {
        document
            .lines()
            .any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
    });
    found
}

/// A decoder's message in an operator's words, on one line, short enough to read.
fn plain(message: &str) -> String {
    const WORDS: [(&str, &str); 10] = [
        (", set DuplicateKeyPolicy in Options if acceptable", ""),
        ("duplicate mapping key", "duplicate key"),
        ("expected mapping start", "expected an object"),
        ("expected sequence start", "expected a list"),
        ("expected i64", "expected a whole number"),
        ("a sequence", "a list"),
        ("type: sequence", "type: list"),
        ("type: map", "type: object"),
        ("a map", "an object"),
        ("unit value", "nothing"),
    ];
    let mut line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    for (theirs, ours) in WORDS {
        line = line.replace(theirs, ours);
    }
    if line.chars().nth(240).is_none() {
        return line;
    }
    format!("{}…", line.chars().take(240).collect::<String>())
}

/// The elements of a list in a value, if there is one.
fn list<'a>(
    value: Option<&'a serde_json::Value>,
    field: &str,
) -> impl Iterator<Item = &'a serde_json::Value> {
    value
        .and_then(|value| value.get(field)?.as_array())
        .into_iter()
        .flatten()
}

/// A string in a value, if there is one.
fn text<'a>(value: &'a serde_json::Value, field: &str) -> Option<&'a str> {
    value.get(field)?.as_str()
}

/// An object's name for messages.
fn shown(metadata: &Metadata) -> String {
    let name = metadata.name.as_deref().map(cut).unwrap_or_default();
    match metadata.namespace.as_deref() {
        Some(namespace) => format!("{}/{name}", cut(namespace)),
        None => name,
    }
}

/// What may be an object's name in JSON that can't be decoded.
fn name_in(json: &str) -> String {
    let value: Option<serde_json::Value> = serde_json::from_str(json).ok();
    let name = value
        .as_ref()
        .and_then(|value| text(value.get("metadata")?, "name"));
    name.map(cut).unwrap_or_default()
}

/// A text short enough for a message.
pub fn cut(text: &str) -> String {
    const LONGEST: usize = 80;
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    if text.chars().nth(LONGEST).is_none() {
        return text.chars().map(clean).collect();
    }
    let mut short: String = text.chars().take(LONGEST).map(clean).collect();
    short.push('…');
    short
}
