//! The nodes, the client and the server that one contender has to itself.

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
    path::PathBuf,
    rc::Rc,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_common::Forwarding;
use penstock_testbed::{Agent, Host, Node, Pod, Process, Source, Testbed, eventually};
use serde_json::Value;

use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
    pods,
    services::{
        kube_proxy::{self, KubeProxy},
        nftables,
        objects::{self, Kind},
    },
};

/// The nodes' link to each other and to the outside; clients' and pods' are called the same.
pub const UPLINK: &str = "eth0";

/// How a contender serves node ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// Not at all: the node routes to the pod.
    Direct,
    /// Penstock, at the TC hooks of the interface to the outside.
    Tc,
    /// Penstock, at XDP in the driver of that interface.
    Xdp,
    /// Penstock at TC, with its overlay between nodes.
    Overlay,
    /// The same, for services that keep the client's address there and back through the overlay.
    Tunnel,
    /// The same, for services whose backends' nodes answer the client directly.
    Dsr,
    /// Penstock at XDP, which leaves to TC what goes through the overlay, there and back.
    XdpTunnel,
    /// The same for services whose backends' nodes answer the client directly.
    XdpDsr,
    /// kube-proxy in iptables mode.
    Iptables,
    /// The rules of kube-proxy's nftables mode.
    Nftables,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Direct,
        Self::Tc,
        Self::Xdp,
        Self::Overlay,
        Self::Tunnel,
        Self::Dsr,
        Self::XdpTunnel,
        Self::XdpDsr,
        Self::Iptables,
        Self::Nftables,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "no service, routed to the pod",
            Self::Tc => "Penstock, TC",
            Self::Xdp => "Penstock, XDP",
            Self::Overlay => "Penstock, TC, overlay",
            Self::Tunnel => "Penstock, TC, tunnel",
            Self::Dsr => "Penstock, TC, dsr",
            Self::XdpTunnel => "Penstock, XDP, tunnel",
            Self::XdpDsr => "Penstock, XDP, dsr",
            Self::Iptables => "kube-proxy, iptables",
            Self::Nftables => "kube-proxy's rules, nftables",
        }
    }

    /// Whether clients are met at XDP.
    const fn is_at_xdp(self) -> bool {
        matches!(self, Self::Xdp | Self::XdpTunnel | Self::XdpDsr)
    }

    /// How services say that backends of other nodes are reached, where nodes have an overlay. A backend of
    /// the node itself is reached in one way only.
    pub const fn through_overlay(self) -> Option<Forwarding> {
        match self {
            Self::Overlay => Some(Forwarding::Snat),
            Self::Tunnel | Self::XdpTunnel => Some(Forwarding::Tunnel),
            Self::Dsr | Self::XdpDsr => Some(Forwarding::Dsr),
            Self::Direct | Self::Tc | Self::Xdp | Self::Iptables | Self::Nftables => None,
        }
    }

    /// What Penstock's agents are told.
    fn options(self) -> [&'static str; 4] {
        let mode = if self.is_at_xdp() { "native" } else { "off" };
        ["--log-level", "info", "--xdp", mode]
    }
}

impl Display for Way {
    fn fmt(&self, formatter: &mut Formatter) -> std::fmt::Result {
        let value = self.to_possible_value();
        formatter.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// Where the backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// On the node that is asked.
    Local,
    /// On another node.
    Remote,
}

/// The node that is asked, the backend, and agents that run already.
type Served = (Node, Pod, Vec<Rc<Agent>>);

/// A contender's nodes, client and server.
pub struct Lane {
    /// How it serves node ports.
    pub way: Way,
    backend: Backend,
    /// The node that is asked.
    pub node: Node,
    client: Host,
    /// The backend.
    pub server: Pod,
    serving: Rc<Process>,
    /// The agents: that of the node that is asked, and with an overlay that of the backend's.
    agents: Vec<Rc<Agent>>,
    _kube_proxy: Option<KubeProxy>,
}

impl Lane {
    /// Nodes without any service.
    pub fn new(testbed: &mut Testbed, way: Way, backend: Backend) -> Result<Self> {
        let (node, server, agents) = match way.through_overlay() {
            Some(_) => connected(testbed, way)?,
            None => routed(testbed, backend)?,
        };
        let client = testbed.client()?;
        let (pod, via) = (server.host.ip4.to_string(), node.host.ip4.to_string());
        client.run("ip", &["route", "add", &pod, "via", &via])?;
        // A router with one link looks at each packet whether its sender should know of a shorter way, and
        // clients that are told leave this one.
        for interface in ["all", UPLINK] {
            let setting = format!("net.ipv4.conf.{interface}.send_redirects=0");
            node.host.run("sysctl", &["-qw", &setting])?;
        }
        Ok(Self {
            way,
            backend,
            serving: serve(&server.host)?,
            node,
            client,
            server,
            agents,
            _kube_proxy: None,
        })
    }

    /// Programs so many services.
    pub fn program(
        &mut self,
        testbed: &mut Testbed,
        assets: Option<&PathBuf>,
        count: usize,
    ) -> Result<()> {
        let server = &self.server.host;
        let kind = Kind::NodePort(self.way.through_overlay().unwrap_or_default());
        match self.way {
            Way::Direct => {}
            Way::Tc | Way::Xdp => {
                objects::write(&self.node.manifests, count, kind, server)?;
                let options = self.way.options();
                let agent = Agent::start(&self.node, &Source::Manifests, &options)?;
                self.agents.push(Rc::new(agent));
            }
            Way::Overlay | Way::Tunnel | Way::Dsr | Way::XdpTunnel | Way::XdpDsr => {
                for agent in &self.agents {
                    objects::write(&agent.node().manifests, count, kind, server)?;
                }
            }
            Way::Iptables => {
                let assets = assets.context("KUBEBUILDER_ASSETS is not set")?;
                let proxy = KubeProxy::start(testbed, assets, &self.node, count, kind, server)?;
                self._kube_proxy = Some(proxy);
            }
            Way::Nftables => {
                nftables::load(count, kind, server, &self.node, testbed.folder())?;
            }
        }
        if self.way.is_at_xdp() {
            // What a sender leaves to its interface to complete, as on veth, is TC's. On a wire
            // frames are complete.
            self.client.without_checksum_offload(UPLINK)?;
            self.server.host.without_checksum_offload(UPLINK)?;
        }
        for agent in &self.agents {
            eventually("hooks are on the node's link", || {
                is_served(agent, self.way.is_at_xdp())
            })?;
        }
        Ok(())
    }

    /// The bridge's ends of the links of nodes that meet clients at XDP: without a program there, veth loses
    /// what these send from theirs.
    pub fn opposites(&self) -> Vec<String> {
        let agents = self.agents.iter().filter(|_| self.way.is_at_xdp());
        agents.map(|agent| agent.node().port()).collect()
    }

    /// What tells that traffic took this way.
    pub fn witnesses(&self) -> Vec<Witness> {
        let node = self.node.host.clone();
        let towards_it = match self.backend {
            Backend::Local => self.server.interface.as_str(),
            Backend::Remote => UPLINK,
        };
        let mut all = vec![Witness::interface(&node, towards_it)];
        match (self.way, self.backend) {
            (Way::Direct, _) => {}
            (Way::Iptables, _) => all.push(kube_proxy::witness(&node)),
            (Way::Nftables, _) => all.push(nftables::witness(&node)),
            // What leads out of the node again, but for now and then one that the kernel is to see.
            (Way::Xdp, Backend::Remote) => {
                all.extend(self.counters(&[(0, "external_xdp", Counts::MostPackets)]));
            }
            (Way::Tc, _) | (Way::Xdp, Backend::Local) => {
                all.extend(self.counters(&[(0, "external_request", Counts::Packets)]));
            }
            (Way::Overlay, _) => all.extend(self.counters(&[
                (0, "external_request", Counts::Packets),
                (0, "overlay_sent", Counts::Packets),
                (0, "handed_over", Counts::Nothing),
            ])),
            (Way::Tunnel | Way::XdpTunnel, _) => all.extend(self.counters(&[
                (0, "handed_over", Counts::Packets),
                (1, "handed_back", Counts::Answers),
                (0, "external_reply", Counts::Answers),
            ])),
            // The backend's node answers by itself.
            (Way::Dsr | Way::XdpDsr, _) => all.extend(self.counters(&[
                (0, "handed_over", Counts::Packets),
                (1, "external_reply", Counts::Answers),
                (1, "handed_back", Counts::Nothing),
                (0, "external_reply", Counts::Nothing),
            ])),
        }
        all
    }

    /// Counters of its agents', by their numbers.
    fn counters(&self, wanted: &[(usize, &'static str, Counts)]) -> Vec<Witness> {
        let witness = |(number, counter, counts): &(usize, &'static str, Counts)| {
            let agent = self.agents.get(*number)?;
            let witness = Witness::agent(agent, counter, *counts);
            Some(match number {
                0 => witness,
                _ => witness.of("the backend's node"),
            })
        };
        wanted.iter().filter_map(witness).collect()
    }

    /// Where clients send what is for service `number`.
    pub fn target(&self, number: usize) -> Result<(IpAddr, u16)> {
        Ok(match self.way {
            Way::Direct => (self.server.host.ip4, PORT),
            _ => (self.node.host.ip4, objects::node_port(number)?),
        })
    }

    /// The client that asks service `number`.
    pub fn contender(&self, number: usize) -> Result<Contender> {
        Ok(Contender::new(
            self.way.name(),
            &self.client,
            self.target(number)?.into(),
            &self.serving,
            self.witnesses(),
        ))
    }
}

/// A node and the backend, connected by the kernel's routes.
fn routed(testbed: &mut Testbed, backend: Backend) -> Result<Served> {
    let node = testbed.node()?;
    let other = match backend {
        Backend::Local => node.clone(),
        Backend::Remote => testbed.node()?,
    };
    let server = testbed.pod(&other)?;
    pods::set_mtu(&other.host, &server.interface)?;
    pods::set_mtu(&server.host, pods::INTERFACE)?;
    Ok((node, server, Vec::new()))
}

/// A node and a backend of another one, connected by Penstock's overlay.
fn connected(testbed: &mut Testbed, way: Way) -> Result<Served> {
    let nodes = [testbed.network_node()?, testbed.network_node()?];
    let [node, other] = &nodes;
    let mut agents = Vec::new();
    for one in &nodes {
        one.knows(&[node, other])?;
        let agent = Agent::start_network(one, &Source::Manifests, &way.options())?;
        agents.push(Rc::new(agent));
    }
    let server = testbed.network_pod(other)?;
    Ok((node.clone(), server, agents))
}

/// Whether an agent serves clients outside at the node's link, and at XDP if it should.
fn is_served(agent: &Agent, at_xdp: bool) -> Result<()> {
    let status = agent.status()?;
    let interfaces = status.get("interfaces").and_then(Value::as_array);
    let mut interfaces = interfaces.into_iter().flatten();
    let uplink = interfaces.find(|one| one.get("name").and_then(Value::as_str) == Some(UPLINK));
    let uplink = uplink.with_context(|| format!("{UPLINK} is not in {status}"))?;
    let is_attached = uplink.get("attached").and_then(Value::as_bool) == Some(true);
    let is_at_xdp = uplink.get("xdp").and_then(Value::as_str) == Some("native");
    anyhow::ensure!(is_attached && is_at_xdp == at_xdp, "{status}");
    Ok(())
}
