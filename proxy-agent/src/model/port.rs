//! What this node should serve for one port of a service, in one address family.

use std::{fmt, net::IpAddr, num::NonZeroU16, sync::Arc};

use ipnetwork::IpNetwork;
use penstock_common::{Algorithm, Forwarding};

use super::object::{Family, ObjectName, Protocol, TrafficPolicy};

/// A port of a service in one family: the unit that has an id, backends and clients' affinity.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// The service.
    pub service: ObjectName,
    /// The port's name, empty for an unnamed one.
    pub port: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        let family = if self.family == Family::V4 {
            "IPv4"
        } else {
            "IPv6"
        };
        write!(
            f,
            " {} {family}",
            format!("{:?}", self.protocol).to_uppercase()
        )
    }
}

impl fmt::Debug for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Which of a port's endpoints a client may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Any, as far as hints allow.
    Cluster,
    /// Those on this node.
    Local,
}

impl From<TrafficPolicy> for Scope {
    fn from(policy: TrafficPolicy) -> Self {
        match policy {
            TrafficPolicy::Cluster => Self::Cluster,
            TrafficPolicy::Local => Self::Local,
        }
    }
}

/// What an address and port that clients dial are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// The service's own address.
    Cluster,
    /// An external address.
    ExternalIp,
    /// A load balancer's address.
    Balancer,
    /// A port of this node.
    NodePort,
    /// A port of this node that a pod asked for.
    HostPort,
}

impl FrontendKind {
    /// Its name.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cluster => "cluster address",
            Self::ExternalIp => "external address",
            Self::Balancer => "load balancer",
            Self::NodePort => "node port",
            Self::HostPort => "host port",
        }
    }
}

/// What clients dial, and whom they get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortFrontend {
    /// The address.
    pub address: IpAddr,
    /// The port, host order.
    pub port: u16,
    /// What it is.
    pub kind: FrontendKind,
    /// For clients in the cluster.
    pub internal: Scope,
    /// For clients outside of it.
    pub external: Scope,
    /// It is a load balancer's address, whatever else it is: only clients of [`Port::source_ranges`] may
    /// come, if there are any.
    pub is_balancers: bool,
}

/// Somebody who serves a port. In no scope, only UDP flows that are there may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortBackend {
    /// Its address.
    pub address: IpAddr,
    /// Its port, host order.
    pub port: u16,
    /// New connections of scope [`Scope::Cluster`] may go there.
    pub in_cluster: bool,
    /// New connections of scope [`Scope::Local`] may go there.
    pub in_local: bool,
    /// How much of them, relative to the others; not 0, and 1 unless the algorithm heeds it.
    pub weight: u16,
}

impl PortBackend {
    /// Whether new connections of a scope may go there.
    pub fn is_in(&self, scope: Scope) -> bool {
        match scope {
            Scope::Cluster => self.in_cluster,
            Scope::Local => self.in_local,
        }
    }
}

/// What this node should serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Which port of which service.
    pub key: PortKey,
    /// What clients dial, sorted, each address and port once.
    pub frontends: Vec<PortFrontend>,
    /// Clients of load balancers' addresses who may come, sorted; empty where everybody may.
    pub source_ranges: Vec<IpNetwork>,
    /// Seconds of session affinity, 0 without.
    pub affinity_secs: u32,
    /// Who gets a new connection that no affinity binds.
    pub algorithm: Algorithm,
    /// How clients outside reach backends on other nodes.
    pub forwarding: Forwarding,
    /// Whether there are endpoints, wherever they are: without, clients are refused; with, those of
    /// an empty [`Scope::Local`] meet silence.
    pub has_endpoints: bool,
    /// Live backends, sorted by address and port, each once.
    pub backends: Vec<PortBackend>,
}

/// A port of this node that a pod of it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// At which address; all of them without.
    pub ip: Option<IpAddr>,
    /// The node's port.
    pub port: NonZeroU16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The pod's addresses.
    pub pod_ips: Vec<IpAddr>,
    /// The pod's port.
    pub pod_port: NonZeroU16,
}

impl HostPort {
    /// What tells it from the pod's other ports.
    pub fn label(&self) -> Arc<str> {
        match self.ip {
            Some(ip) => std::net::SocketAddr::new(ip, self.port.get())
                .to_string()
                .into(),
            None => self.port.to_string().into(),
        }
    }
}

/// The ports of this node that one interface of a pod's is to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPorts {
    /// The pod.
    pub pod: ObjectName,
    /// What tells its interface from others, also of the same pod: its next sandbox may come before the
    /// last one is gone.
    pub sandbox: Arc<str>,
    /// The ports.
    pub ports: Vec<HostPort>,
}

/// Why a pod does not get a port of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Another pod has it, for as long as that is there.
    Held(String),
    /// It can't be had as things are.
    Denied(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Held(reason) | Self::Denied(reason)) = self;
        f.write_str(reason)
    }
}
