//! What Penstock believes of a cluster's objects: validated, compact, free of API types.
//!
//! `api` makes these from what a source delivers and refuses what it can't make; everything behind
//! them may rely on what the types say. Names are shared strings, since a cluster repeats a few
//! node, zone and port names a hundred thousand times.

use std::{fmt, net::IpAddr, num::NonZeroU16, sync::Arc, time::Duration};

use ipnetwork::IpNetwork;
use penstock_common::{Algorithm, Forwarding};

/// A namespaced object's name. Cluster-wide objects have an empty namespace.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name inside it.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A transport protocol that services know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// What Kubernetes calls it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Which endpoints a service's traffic may use (KEP-2086).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// Any endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints on the node that the traffic comes from.
    Local,
}

/// A Service that has something to program: not headless, not ExternalName, and ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// When it was created, in seconds since 1970; decides who owns an address that two services
    /// claim. `i64::MAX` where a manifest does not say.
    pub created_secs: i64,
    /// Its cluster addresses, at most one a family.
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The timeout of ClientIP session affinity in seconds, 1 to 86,400; `None` without affinity.
    pub affinity_secs: Option<u32>,
    /// Who gets a new connection that no affinity binds.
    pub algorithm: Algorithm,
    /// How clients outside reach backends on other nodes.
    pub forwarding: Forwarding,
    /// `internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// Addresses of load balancers that leave the last step to nodes (`ipMode: VIP`, KEP-1860).
    pub balancer_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`; empty where everybody may come.
    pub source_ranges: Vec<IpNetwork>,
    /// `healthCheckNodePort`.
    pub health_check_port: Option<NonZeroU16>,
    /// What of it can't be used, and why; all else is.
    pub left_out: Vec<String>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Its name, empty for the only port of a service.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port that clients dial.
    pub port: NonZeroU16,
    /// The port of every node that leads here too.
    pub node_port: Option<NonZeroU16>,
}

/// An EndpointSlice of an address family (those of type FQDN are not kept).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its name.
    pub name: ObjectName,
    /// The service that it belongs to, from the label `kubernetes.io/service-name`.
    pub service: ObjectName,
    /// Its address type; every endpoint's address is of this family.
    pub family: Family,
    /// Its ports, matched with the service's by name.
    pub ports: Vec<EndpointPort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// When what it tells of happened, in time since 1970, if it says so: a pod became ready, say.
    pub triggered: Option<Duration>,
}

/// A port that all endpoints of a slice listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    /// Its name, empty for an unnamed one.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: NonZeroU16,
}

/// An endpoint: its first address, since all addresses of one are the same pod's (KEP-752).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// It should get new connections; also true for `publishNotReadyAddresses`.
    pub ready: bool,
    /// It can still answer; what `ready` is while not terminating, unless said otherwise.
    pub serving: bool,
    /// It is being deleted.
    pub terminating: bool,
    /// How much of new connections it gets under an algorithm that heeds it, relative to others; 0 for
    /// none.
    pub weight: u16,
    /// The node that it runs on.
    pub node: Option<Arc<str>>,
    /// The zones whose traffic it should get; empty without a hint (KEP-2433).
    pub for_zones: Box<[Arc<str>]>,
    /// The nodes whose traffic it should get; empty without a hint (KEP-3015).
    pub for_nodes: Box<[Arc<str>]>,
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Its addresses of type InternalIP, as listed.
    pub internal_ips: Vec<IpAddr>,
    /// The ranges that its pods' addresses are from, at most one a family.
    pub pod_cidrs: Vec<IpNetwork>,
    /// It is being deleted, or about to be by the cluster's autoscaler.
    pub is_leaving: bool,
    /// What of it can't be used, and why; all else is.
    pub left_out: Vec<String>,
}

/// A Pod on this node that asks not to be translated at its sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExcludedPod {
    /// Its name.
    pub name: ObjectName,
    /// Its uid, which its cgroup's name contains.
    pub uid: Arc<str>,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// The kinds of objects that a source delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// [`Service`].
    Service,
    /// [`EndpointSlice`].
    EndpointSlice,
    /// [`Node`].
    Node,
    /// [`ExcludedPod`].
    Pod,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::Pod];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// A Node.
    Node(Node),
    /// A Pod.
    Pod(ExcludedPod),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
        }
    }

    /// Its name.
    pub fn name(&self) -> ObjectName {
        match self {
            Self::Service(service) => service.name.clone(),
            Self::EndpointSlice(slice) => slice.name.clone(),
            Self::Node(node) => ObjectName::new("", node.name.clone()),
            Self::Pod(pod) => pod.name.clone(),
        }
    }
}

/// What a source says.
#[derive(Clone, Debug)]
pub enum Event {
    /// These are all objects of the kind: forget others, but for the named ones, which are there
    /// and can't be used as they are. Sent once a first list has arrived in full, and again
    /// whenever a source had to list anew.
    Listed(Kind, Vec<Object>, Vec<ObjectName>),
    /// An object appeared or changed.
    Applied(Object),
    /// An object is gone, or is one that Penstock ignores (headless, somebody else's proxy, …).
    Deleted(Kind, ObjectName),
    /// Whether the source could not read something that may hold objects, so that what it lists
    /// need not be all there is. Then nothing is removed that an earlier agent left.
    Doubt(bool),
    /// An object can't be used; what was known of it before stays as it was.
    Rejected(Rejection),
}

/// An object that can't be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Its kind as it calls itself.
    pub kind: String,
    /// Its name, as far as it has one (cut to a readable length).
    pub object: String,
    /// Where it came from: a file and document, or the API server.
    pub origin: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            object,
            origin,
            reason,
        } = self;
        if !origin.is_empty() {
            write!(f, "{origin}: ")?;
        }
        if object.is_empty() {
            write!(f, "{kind}: {reason}")
        } else {
            write!(f, "{kind} {object}: {reason}")
        }
    }
}
