//! What there is to know about a running agent, for the command line.

mod pods;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use penstock_common::{Algorithm, BackendFlags, BackendId, Forwarding, FrontendFlags, ServiceId};
use serde::{Deserialize, Serialize};

pub use pods::{HostPort, Limits, Pod, lost};

use crate::{
    attach::follow,
    dataplane::Dataplane,
    flows::Lifetimes,
    model::object::{Family, Rejection},
    network,
    plan::planner::PortView,
    reconcile::Reconciler,
    stats::{Statistics, Stats},
    usage::Fill,
    watch,
    words::harmless,
};

/// How a running agent is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// The agent's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// For how long it has been running, in seconds.
    pub uptime_secs: u64,
    /// This node's name.
    pub node: String,
    /// Every first list has arrived.
    pub synced: bool,
    /// The kernel holds all that is wanted and nothing else.
    pub settled: bool,
    /// What the source does about each kind.
    pub sources: BTreeMap<String, String>,
    /// Kinds whose first list has not arrived.
    pub awaited: Vec<String>,
    /// How many there are.
    pub services: usize,
    /// How many there are.
    pub endpoint_slices: usize,
    /// How many there are.
    pub endpoints: usize,
    /// Backend ids in use.
    pub backends_used: usize,
    /// Slots in use.
    pub slots_used: u32,
    /// What the pod network does, where there is one.
    #[serde(default)]
    pub network: Option<Network>,
    /// This node's pods.
    #[serde(default)]
    pub pods: Vec<Pod>,
    /// For how long flows may be idle.
    #[serde(default)]
    pub lifetimes: Lifetimes,
    /// How full the kernel's tables are.
    #[serde(default)]
    pub tables: Vec<Fill>,
    /// Interfaces with packet hooks.
    pub interfaces: Vec<Interface>,
    /// What is other than it was said to be, and hurts nobody.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Objects that can't be used, and frontends that a service does not get.
    pub problems: Vec<String>,
}

/// The pod network on this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    /// Pods can be given a network.
    pub ready: bool,
    /// What is wrong.
    pub problem: Option<String>,
    /// Ranges that this node's pods get addresses from.
    pub pod_cidrs: Vec<String>,
    /// How packets reach other nodes: vxlan or native.
    #[serde(default)]
    pub routing: String,
    /// What pods' interfaces carry, in bytes.
    #[serde(default)]
    pub pod_mtu: u32,
    /// What a packet between nodes may measure.
    pub overlay_mtu: u32,
    /// The UDP port of tunnels.
    #[serde(default)]
    pub vxlan_port: u16,
    /// Their network identifier.
    #[serde(default)]
    pub vxlan_vni: u32,
    /// Whether what pods send to the outside gets this node's address.
    #[serde(default)]
    pub masquerade: bool,
    /// Ranges outside that see pods' own addresses all the same.
    #[serde(default)]
    pub non_masquerade: Vec<String>,
    /// Other nodes' ranges.
    pub nodes: Vec<RemoteRange>,
}

/// Another node's range.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RemoteRange {
    /// The node.
    pub node: String,
    /// The range.
    pub range: String,
    /// How it is reached.
    pub by: String,
}

/// A followed interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether both hooks are on it.
    pub attached: bool,
    /// Why not.
    pub error: Option<String>,
    /// How XDP meets what comes from the outside, if it does: native or generic.
    #[serde(default)]
    pub xdp: Option<String>,
    /// Why it does not, where it should.
    #[serde(default)]
    pub xdp_error: Option<String>,
    /// The pod's addresses, as far as known.
    pub addresses: Vec<String>,
}

/// A port of a service in one family.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Port {
    /// namespace/name; nothing where no agent is there to know it.
    pub service: Option<String>,
    /// The port's name; nothing likewise.
    pub port: Option<String>,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// IPv4 or IPv6.
    pub family: String,
    /// Its id in the kernel.
    pub id: u32,
    /// Addresses and ports that clients dial.
    pub frontends: Vec<String>,
    /// Seconds of session affinity, 0 without.
    pub affinity_secs: u32,
    /// How new connections are spread over backends.
    #[serde(default)]
    pub algorithm: String,
    /// How clients outside reach backends on other nodes.
    #[serde(default)]
    pub forwarding: String,
    /// Why that can't be so for all of them, who see this node's address instead; nothing likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarding_obstacle: Option<String>,
    /// Who may serve whom.
    #[serde(flatten)]
    pub policies: Policies,
    /// Who serves.
    pub backends: Vec<Backend>,
    /// What went to all backends that it has and had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Backend {
    /// Address and port.
    pub address: String,
    /// Its id in the kernel.
    pub id: u32,
    /// The life of the id.
    pub generation: u32,
    /// "active": gets new connections; "resting": keeps what it has.
    pub state: String,
    /// What went to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

impl Port {
    /// Says so where the way that clients outside are to take can't be taken.
    pub fn forwarded(mut self, obstacles: network::Obstacles) -> Self {
        if self.forwarding != Forwarding::default().label() {
            let obstacle = obstacles.to(self.family == "IPv4");
            self.forwarding_obstacle = obstacle.map(str::to_owned);
        }
        self
    }

    /// Takes in what was counted of it and of its backends.
    pub fn count(&mut self, all: &Statistics) {
        let is_v4 = self.family == "IPv4";
        let frontends = self.frontends.iter();
        // At TCP's sockets alone nobody remembers which backend's life it was: the address has to do.
        let frontends: Vec<SocketAddr> = if self.protocol == "TCP" {
            frontends.filter_map(|at| at.parse().ok()).collect()
        } else {
            Vec::new()
        };
        self.stats = Some(Stats {
            tcp_sockets: all.tcp_sockets(&frontends, None),
            ..all.service(ServiceId(self.id))
        });
        for backend in &mut self.backends {
            let life = (BackendId(backend.id), backend.generation);
            let address = backend.address.parse().ok();
            backend.stats = Some(Stats {
                tcp_sockets: address
                    .map(|address| all.tcp_sockets(&frontends, Some(address)))
                    .unwrap_or_default(),
                ..all.backend(is_v4, life)
            });
        }
    }
}

/// An address and port as one writes them.
pub fn endpoint(ip: std::net::IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

impl From<&PortView> for Port {
    fn from(view: &PortView) -> Self {
        let first = view
            .frontends
            .first()
            .map(|(.., frontend)| *frontend)
            .unwrap_or_default();
        let frontends = view.frontends.iter();
        let flags = frontends.fold(0, |flags, (.., frontend)| flags | frontend.flags);
        Self {
            service: Some(view.key.service.to_string()),
            port: Some(view.key.port.to_string()),
            protocol: view.key.protocol.to_string(),
            family: if view.key.family == Family::V4 {
                "IPv4"
            } else {
                "IPv6"
            }
            .to_owned(),
            id: view.id.0,
            frontends: view
                .frontends
                .iter()
                .map(|(ip, port, _)| endpoint(*ip, *port))
                .collect(),
            stats: None,
            affinity_secs: first.affinity_secs,
            algorithm: Algorithm::of(first.flags).label().to_owned(),
            forwarding: Forwarding::of(flags).label().to_owned(),
            forwarding_obstacle: None,
            policies: Policies::of(flags),
            backends: view
                .backends
                .iter()
                .map(|(ip, port, id, generation, flags)| Backend {
                    address: endpoint(*ip, *port),
                    id: id.0,
                    generation: *generation,
                    state: state(*flags).to_owned(),
                    stats: None,
                })
                .collect(),
        }
    }
}

/// Who may serve whom.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Policies {
    /// internalTrafficPolicy.
    pub internal_policy: String,
    /// externalTrafficPolicy, where there are addresses for clients outside.
    pub external_policy: Option<String>,
    /// What a client meets where there is no backend.
    pub on_empty: String,
}

impl Policies {
    /// What all flags ([`FrontendFlags`]) of a port's frontends together say.
    pub fn of(flags: u32) -> Self {
        let policy = |flag| {
            if flags & flag == 0 {
                "Cluster"
            } else {
                "Local"
            }
        };
        let has_external = flags & FrontendFlags::EXTERNAL != 0;
        let external = has_external.then(|| policy(FrontendFlags::EXTERNAL_LOCAL).to_owned());
        let on_empty = if flags & FrontendFlags::DROP_WHEN_EMPTY == 0 {
            "rejected: no endpoint"
        } else {
            "dropped: no endpoint on this node"
        };
        Self {
            internal_policy: policy(FrontendFlags::LOCAL).to_owned(),
            external_policy: external,
            on_empty: on_empty.to_owned(),
        }
    }
}

/// A backend's flags in a word.
pub fn state(flags: u32) -> &'static str {
    if flags & BackendFlags::SELECTED != 0 {
        "active"
    } else if flags & BackendFlags::LIVE != 0 {
        "resting"
    } else {
        "gone"
    }
}

/// A rejection as a sentence.
pub fn in_words(rejection: &Rejection) -> String {
    harmless(&rejection.to_string())
}

impl Report {
    /// What there is to tell.
    pub fn of<D: Dataplane>(
        node: &str,
        reconciler: &Reconciler<D>,
        status: &watch::Status,
        interfaces: &follow::Status,
        network: Option<&network::State>,
        uptime: Duration,
    ) -> Self {
        let world = &reconciler.world;
        let (services, endpoint_slices, endpoints) = world.sizes();
        let (backends_used, slots_used) = reconciler.used();
        let (rejections, untold) = status.rejections();
        let mut problems: Vec<String> = rejections.iter().map(in_words).collect();
        if untold > 0 {
            problems.push(format!("{untold} more problems like these"));
        }
        problems.extend(world.conflicts().iter().map(in_words));
        problems.extend(
            reconciler
                .errors()
                .iter()
                .map(|(name, reason)| format!("Service {name} is not programmed: {reason}")),
        );
        if let Some(network) = network {
            problems.extend(
                network
                    .problem
                    .iter()
                    .map(|problem| format!("network: {problem}")),
            );
        }
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_secs: uptime.as_secs(),
            node: node.to_owned(),
            synced: world.is_synced(),
            settled: reconciler.is_settled(),
            sources: status
                .states()
                .into_iter()
                .map(|(kind, state)| (kind.to_string(), state))
                .collect(),
            awaited: world.awaited().iter().map(ToString::to_string).collect(),
            services,
            endpoint_slices,
            endpoints,
            backends_used,
            slots_used,
            lifetimes: Lifetimes::default(),
            tables: Vec::new(),
            notes: Vec::new(),
            network: network.map(Network::from),
            pods: pods::of(world, interfaces),
            interfaces: interfaces
                .interfaces
                .values()
                .map(Interface::from)
                .collect(),
            problems,
        }
    }
}

impl From<&network::State> for Network {
    fn from(state: &network::State) -> Self {
        Self {
            ready: state.is_ready,
            problem: state.problem.clone(),
            pod_cidrs: state.own.iter().map(ToString::to_string).collect(),
            routing: state.routing.to_string(),
            pod_mtu: state.pod_mtu,
            overlay_mtu: state.overlay_mtu,
            vxlan_port: state.port,
            vxlan_vni: state.vni,
            masquerade: state.masquerades,
            non_masquerade: state
                .non_masquerade
                .iter()
                .map(ToString::to_string)
                .collect(),
            nodes: state
                .remote
                .iter()
                .map(|remote| RemoteRange {
                    node: remote.node.to_string(),
                    range: remote.range.to_string(),
                    by: remote.hop.to_string(),
                })
                .collect(),
        }
    }
}

impl From<&follow::Followed> for Interface {
    fn from(followed: &follow::Followed) -> Self {
        let identity = followed.behind.identity.as_ref();
        let addr4 = identity
            .and_then(|identity| identity.addr4)
            .map(|ip| ip.to_string());
        let addr6 = identity
            .and_then(|identity| identity.addr6)
            .map(|ip| ip.to_string());
        Self {
            name: followed.name.clone(),
            attached: followed.is_attached,
            error: followed.error.clone(),
            xdp: followed.xdp.map(|mode| mode.label().to_owned()),
            xdp_error: followed.xdp_error.clone(),
            addresses: addr4.into_iter().chain(addr6).collect(),
        }
    }
}
