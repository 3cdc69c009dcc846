//! This node's part of the pod network: overlay, routes, maps, and what the CNI plugin needs.
//!
//! A task of its own: it is told of nodes, compares what is there with what there should be, and
//! looks again once in a while, so that what somebody removed by mistake comes back.

mod handover;
pub mod install;
mod kernel;
mod maps;
pub mod plan;
pub mod pods;

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnetwork::IpNetwork;
use penstock_cni::{network, pool::Pool};
use rtnetlink::Handle;
use tokio::sync::watch;

pub use handover::Obstacles;
pub use kernel::{DEVICE, KernelError};
pub use maps::{Endpoints, Held, MapsError, Uplinks, XdpUplinks};
use maps::{Routes, Vteps};
use plan::{Plan, Routing};

use crate::{
    dataplane::pins::Pins,
    model::object::{Node, Rejection},
};
use install::Places;

/// How often everything is compared without an occasion.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How soon it is tried again after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// For how long it is tried again before pods are said to be better off elsewhere: what fails once, as
/// when the kernel's tables change while they are read, is over in a moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// What VXLAN adds to a packet: Ethernet, VXLAN, UDP and IP (RFC 7348, 5).
const OVERHEAD_V4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_V6: u32 = OVERHEAD_V4 + 20;
/// What a network must carry to be one (RFC 8200, 5).
const LEAST_MTU: u32 = 1_280;

/// What the operator wants.
#[derive(Clone, Debug)]
pub struct Options {
    /// How packets reach other nodes.
    pub routing: Routing,
    /// What pods' interfaces carry at most; what the node's network leaves if not said.
    pub mtu: Option<u32>,
    /// The UDP port of tunnels.
    pub vxlan_port: u16,
    /// The tunnels' network identifier.
    pub vni: u32,
    /// Whether what pods send to the outside gets this node's address.
    pub masquerade: bool,
    /// Ranges outside that are sent pods' own addresses.
    pub non_masquerade: Vec<IpNetwork>,
    /// What is installed where.
    pub places: Places,
}

/// What the agent tells the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Every node of the cluster; none before the first list.
    pub nodes: Vec<Node>,
    /// Pods that came now would be served: everything has been listed, and the kernel's programs
    /// know of the network.
    pub is_serving: bool,
}

/// How the network is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The kernel has what connects pods.
    pub is_ready: bool,
    /// Why not, or what is wrong although they can.
    pub problem: Option<String>,
    /// The same, if pods that came now would not be connected as they should be, and have not been for
    /// [`PATIENCE`].
    pub obstacle: Option<String>,
    /// The overlay device's index, 0 while there is none.
    pub overlay_ifindex: u32,
    /// This node's addresses in the overlay.
    pub addresses: Vec<IpAddr>,
    /// Whether what pods send to the outside gets this node's address.
    pub masquerades: bool,
    /// Ranges outside that are sent pods' own addresses.
    pub non_masquerade: Vec<IpNetwork>,
    /// How packets reach other nodes.
    pub routing: Routing,
    /// What pods' interfaces carry at most.
    pub pod_mtu: u32,
    /// What the overlay carries at most.
    pub overlay_mtu: u32,
    /// The network identifier of tunnels.
    pub vni: u32,
    /// Their UDP port.
    pub port: u16,
    /// This node's ranges.
    pub own: Vec<IpNetwork>,
    /// Other nodes' ranges and how they are reached.
    pub remote: Vec<plan::Remote>,
    /// What of the nodes can't be used.
    pub rejections: Vec<Rejection>,
}

/// What [`remove`] took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Our routes.
    pub routes: usize,
    /// Whether the overlay device was there.
    pub device: bool,
}

/// Takes the network's routes and its device out of the kernel. Pods' links stay: they are the plugin's.
pub async fn remove() -> Result<Removed, KernelError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(KernelError::connecting)?;
    let connection = tokio::spawn(connection);
    let removed = kernel::remove(&handle).await;
    connection.abort();
    let (routes, device) = removed?;
    Ok(Removed { routes, device })
}

/// Why the network can't be what it should be.
#[derive(Debug, thiserror::Error)]
enum NetworkError {
    #[error(
        "node {0} has no pod range yet (spec.podCIDRs); the cluster's controller manager gives it \
         one (--allocate-node-cidrs)"
    )]
    NoRange(String),
    #[error("the range {0} is too small to hold a pod")]
    SmallRange(IpNetwork),
    #[error("no interface has one of this node's addresses ({0}); is the node's InternalIP right?")]
    NoUplink(String),
    #[error("an MTU of {0} leaves pods less than {LEAST_MTU} bytes; see --mtu")]
    SmallMtu(u32),
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    #[error(transparent)]
    Maps(#[from] MapsError),
    #[error(transparent)]
    Install(#[from] install::InstallError),
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
}

impl NetworkError {
    /// Whether pods that come now are none the worse for it: what they need is there.
    fn is_harmless(&self) -> bool {
        matches!(self, Self::Install(_) | Self::Io { .. })
    }
}

/// The maps that the network writes.
struct Maps {
    routes: Routes,
    vteps: Vteps,
}

impl Maps {
    fn open(pins: &Pins) -> Result<Self, MapsError> {
        Ok(Self {
            routes: Routes::open(pins)?,
            vteps: Vteps::open(pins)?,
        })
    }
}

/// Looks after the network until the task is cancelled.
pub struct Network {
    options: Options,
    node_name: String,
    pins: Pins,
    known: watch::Receiver<Arc<Known>>,
    state: watch::Sender<State>,
}

impl Network {
    /// A network that nothing has been done for yet, and where its state can be seen.
    pub fn new(
        options: Options,
        node_name: String,
        pins: Pins,
        known: watch::Receiver<Arc<Known>>,
    ) -> (Self, watch::Receiver<State>) {
        let (state, seen) = watch::channel(State::default());
        let network = Self {
            options,
            node_name,
            pins,
            known,
            state,
        };
        (network, seen)
    }

    /// Looks after it.
    pub async fn run(mut self) {
        // Since when what pods need can't be had.
        let mut failing = None;
        loop {
            let (connection, handle, _) = match rtnetlink::new_connection() {
                Ok(connected) => connected,
                Err(error) => {
                    tracing::warn!("opening rtnetlink: {error}; trying again");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            let connection = tokio::spawn(connection);
            let failure = self.serve(&handle, &mut failing).await;
            connection.abort();
            match failure {
                Some(error) => tracing::warn!("{error}; trying again"),
                None => return,
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Looks after it until the agent ends (`None`) or the maps can't be opened.
    async fn serve(&mut self, handle: &Handle, failing: &mut Option<Instant>) -> Option<MapsError> {
        let mut maps = match Maps::open(&self.pins) {
            Ok(maps) => maps,
            Err(error) => return Some(error),
        };
        loop {
            let known = self.known.borrow_and_update().clone();
            // Before the first list nothing is known, and so nothing is changed.
            let mut wait = LOOK_AGAIN;
            if !known.nodes.is_empty() {
                let mut state = self.state.borrow().clone();
                if let Err(error) = self.look(handle, &mut maps, &known, &mut state).await {
                    let text = error.to_string();
                    if state.problem.as_ref() != Some(&text) {
                        tracing::warn!("network: {text}; trying again");
                    }
                    if error.is_harmless() {
                        *failing = None;
                    } else if failing.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                        state.obstacle = Some(text.clone());
                    }
                    state.problem = Some(text);
                    wait = RETRY;
                } else {
                    *failing = None;
                }
                self.state.send_if_modified(|old| {
                    let is_new = *old != state;
                    *old = state;
                    is_new
                });
            }
            tokio::select! {
                changed = self.known.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                }
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Compares everything, and changes what is not as it should be.
    async fn look(
        &self,
        handle: &Handle,
        maps: &mut Maps,
        known: &Known,
        state: &mut State,
    ) -> Result<(), NetworkError> {
        let nodes = &known.nodes;
        let links = kernel::links(handle).await?;
        let own = nodes.iter().find(|node| *node.name == *self.node_name);
        let own = own
            .filter(|node| !node.pod_cidrs.is_empty())
            .ok_or_else(|| NetworkError::NoRange(self.node_name.clone()))?;
        let uplinks: Vec<&kernel::Link> = links
            .iter()
            .filter(|link| {
                let mut ips = link.networks.iter().map(|network| network.ip());
                ips.any(|ip| own.internal_ips.contains(&ip))
            })
            .collect();
        let networks: Vec<IpNetwork> = uplinks
            .iter()
            .flat_map(|link| link.networks.iter().copied())
            .collect();
        let plan = plan::plan(&self.node_name, nodes, self.options.routing, &networks);
        let underlay = uplinks.iter().map(|link| link.mtu).min().ok_or_else(|| {
            let ips: Vec<String> = own.internal_ips.iter().map(ToString::to_string).collect();
            NetworkError::NoUplink(ips.join(", "))
        })?;
        let is_v6 = own.internal_ips.iter().any(IpAddr::is_ipv6);
        let overhead = if is_v6 { OVERHEAD_V6 } else { OVERHEAD_V4 };
        let overlay_mtu = underlay.saturating_sub(overhead);
        let pod_mtu = self.options.mtu.unwrap_or(match self.options.routing {
            Routing::Vxlan => overlay_mtu,
            Routing::Native => underlay,
        });
        if overlay_mtu.min(pod_mtu) < LEAST_MTU {
            return Err(NetworkError::SmallMtu(overlay_mtu.min(pod_mtu)));
        }
        let addresses: Vec<(IpNetwork, IpAddr)> = plan
            .own
            .iter()
            .map(|range| {
                let pool = Pool::new(*range).ok_or(NetworkError::SmallRange(*range))?;
                Ok((*range, pool.node_address()))
            })
            .collect::<Result<_, NetworkError>>()?;

        let overlay = kernel::Overlay {
            mtu: overlay_mtu,
            port: self.options.vxlan_port,
        };
        let index = kernel::overlay(handle, overlay).await?;
        let ips: Vec<IpAddr> = addresses.iter().map(|(_, ip)| *ip).collect();
        kernel::addresses(handle, index, &ips).await?;
        let changed =
            kernel::routes(handle, index, &kernel::wanted(&addresses, &plan.remote)).await?;
        if changed > 0 {
            tracing::info!(
                "network: {changed} routes changed; {} ranges of other nodes",
                plan.remote.len()
            );
        }
        kernel::allow_forwarding(plan.own.iter().map(|range| range.is_ipv4())).map_err(
            |source| NetworkError::Io {
                what: "allowing the kernel to forward packets (net.ipv4.ip_forward)".to_owned(),
                source,
            },
        )?;
        let others = nodes.iter().filter(|node| *node.name != *self.node_name);
        maps.vteps
            .set(others.flat_map(|node| node.internal_ips.iter().copied()))?;
        maps.routes
            .set(&maps::wanted(&plan, &self.options.non_masquerade))?;
        if known.is_serving {
            self.publish(&plan, pod_mtu)?;
        }
        if !state.is_ready {
            tracing::info!("network: pods get addresses from {}", list(&plan.own));
        }
        *state = State {
            is_ready: true,
            problem: None,
            obstacle: None,
            overlay_ifindex: index,
            addresses: ips,
            masquerades: self.options.masquerade,
            non_masquerade: self.options.non_masquerade.clone(),
            routing: self.options.routing,
            pod_mtu,
            overlay_mtu,
            vni: self.options.vni,
            port: self.options.vxlan_port,
            own: plan.own,
            remote: plan.remote.into_values().collect(),
            rejections: plan.rejections,
        };
        Ok(())
    }

    /// Tells the plugin, then the runtime.
    fn publish(&self, plan: &Plan, mtu: u32) -> Result<(), NetworkError> {
        let places = &self.options.places;
        let described = network::Network {
            version: network::Network::VERSION,
            pod_cidrs: plan.own.clone(),
            mtu,
        };
        let is_there = network::Network::read(&places.run_dir)
            .is_ok_and(|old| old.as_ref() == Some(&described));
        if !is_there {
            described
                .write(&places.run_dir)
                .map_err(|source| NetworkError::Io {
                    what: format!("writing {} in {}", network::FILE, places.run_dir.display()),
                    source,
                })?;
        }
        if places.install()? {
            tracing::info!(
                "network: the CNI configuration is in {}",
                places.conf_dir.display()
            );
        }
        Ok(())
    }
}

fn list(ranges: &[IpNetwork]) -> String {
    let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    ranges.join(" and ")
}
