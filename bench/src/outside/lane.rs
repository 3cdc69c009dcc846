//! The nodes, the client and the server that one contender has to itself.

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
    rc::Rc,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_common::Forwarding;
use penstock_testbed::{Agent, Host, Node, Pod, Process, ProxyMode, Source, Testbed, eventually};
use serde_json::Value;

use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
    family::Family,
    pods,
    services::{
        self, ipvs,
        kube_proxy::{self, KubeProxy},
        nftables,
        objects::{self, Kind, Services},
        program::Program,
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
    /// Penstock at XDP, with its overlay between nodes, whose headers XDP writes and takes off.
    XdpOverlay,
    /// The same for services that keep the client's address: XDP leaves to TC what is handed over through the
    /// overlay, there and back.
    XdpTunnel,
    /// The same for services whose backends' nodes answer the client directly.
    XdpDsr,
    /// kube-proxy in iptables mode.
    Iptables,
    /// kube-proxy in ipvs mode, where the kernel has IPVS.
    Ipvs,
    /// kube-proxy in nftables mode, where it has that; else the rules that it would write.
    Nftables,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Direct,
        Self::Tc,
        Self::Xdp,
        Self::Overlay,
        Self::Tunnel,
        Self::Dsr,
        Self::XdpOverlay,
        Self::XdpTunnel,
        Self::XdpDsr,
        Self::Iptables,
        Self::Ipvs,
        Self::Nftables,
    ];

    /// Its name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "no service, routed to the pod",
            Self::Tc => "Penstock, TC",
            Self::Xdp => "Penstock, XDP",
            Self::Overlay => "Penstock, TC, overlay",
            Self::Tunnel => "Penstock, TC, tunnel",
            Self::Dsr => "Penstock, TC, dsr",
            Self::XdpOverlay => "Penstock, XDP, overlay",
            Self::XdpTunnel => "Penstock, XDP, tunnel",
            Self::XdpDsr => "Penstock, XDP, dsr",
            Self::Iptables => "kube-proxy, iptables",
            Self::Ipvs => "kube-proxy, ipvs",
            Self::Nftables => "kube-proxy's rules, nftables",
        }
    }

    /// Whether clients are met at XDP.
    const fn is_at_xdp(self) -> bool {
        matches!(
            self,
            Self::Xdp | Self::XdpOverlay | Self::XdpTunnel | Self::XdpDsr
        )
    }

    /// How services say that backends of other nodes are reached, where nodes have an overlay. A backend of
    /// the node itself is reached in one way only.
    pub const fn through_overlay(self) -> Option<Forwarding> {
        match self {
            Self::Overlay | Self::XdpOverlay => Some(Forwarding::Snat),
            Self::Tunnel | Self::XdpTunnel => Some(Forwarding::Tunnel),
            Self::Dsr | Self::XdpDsr => Some(Forwarding::Dsr),
            Self::Direct | Self::Tc | Self::Xdp => None,
            Self::Iptables | Self::Ipvs | Self::Nftables => None,
        }
    }

    /// Whether services say that packets are handed over to the backend's node as they are.
    pub fn is_handing_over(self) -> bool {
        let forwarding = self.through_overlay();
        forwarding.is_some_and(|forwarding| forwarding != Forwarding::Snat)
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
    family: Family,
    backend: Backend,
    /// The node that is asked.
    pub node: Node,
    client: Host,
    /// The backend.
    pub server: Pod,
    serving: Rc<Process>,
    /// The agents: that of the node that is asked, and with an overlay that of the backend's.
    agents: Vec<Rc<Agent>>,
    kube_proxy: Option<KubeProxy>,
}

impl Lane {
    /// Nodes without any service; clients use one family.
    pub fn new(testbed: &mut Testbed, way: Way, backend: Backend, family: Family) -> Result<Self> {
        let (node, server, agents) = match way.through_overlay() {
            Some(_) => connected(testbed, way)?,
            None => routed(testbed, backend)?,
        };
        let client = testbed.client()?;
        for family in Family::ALL {
            let (pod, via) = (family.of(&server.host), family.of(&node.host));
            let (pod, via) = (pod.to_string(), via.to_string());
            client.run("ip", &["route", "add", &pod, "via", &via])?;
        }
        // As in `services`: two services of one server.
        client.run("sysctl", &["-qw", "net.ipv4.tcp_timestamps=2"])?;
        // A router with one link looks at each packet whether its sender should know of a shorter way, and
        // clients that are told leave this one.
        for interface in ["all", UPLINK] {
            let setting = format!("net.ipv4.conf.{interface}.send_redirects=0");
            node.host.run("sysctl", &["-qw", &setting])?;
        }
        Ok(Self {
            way,
            family,
            backend,
            serving: serve(&server.host)?,
            node,
            client,
            server,
            agents,
            kube_proxy: None,
        })
    }

    /// Programs so many services.
    pub fn program(
        &mut self,
        testbed: &mut Testbed,
        kube_proxy: Option<&Program>,
        count: usize,
    ) -> Result<()> {
        let server = self.server.host.clone();
        let services = Services {
            count,
            kind: Kind::NodePort(self.way.through_overlay().unwrap_or_default()),
            family: self.family,
            server: &server,
        };
        match self.way {
            Way::Direct => {}
            Way::Tc | Way::Xdp => {
                services.write(&self.node.manifests)?;
                let options = self.way.options();
                let agent = Agent::start(&self.node, &Source::Manifests, &options)?;
                self.agents.push(Rc::new(agent));
            }
            Way::Overlay | Way::Tunnel | Way::Dsr => self.program_agents(&services)?,
            Way::XdpOverlay | Way::XdpTunnel | Way::XdpDsr => self.program_agents(&services)?,
            Way::Nftables if !kube_proxy.is_some_and(|program| program.proxy.has_nftables()) => {
                nftables::load(&services, &self.node, testbed.folder())?;
            }
            Way::Iptables | Way::Ipvs | Way::Nftables => {
                let mode = match self.way {
                    Way::Ipvs => ProxyMode::Ipvs,
                    Way::Nftables => ProxyMode::Nftables,
                    _ => ProxyMode::Iptables,
                };
                let program = kube_proxy.context("there is no kube-proxy")?;
                let proxy = KubeProxy::start(testbed, program, &self.node, &services, mode)?;
                self.kube_proxy = Some(proxy);
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

    /// Tells agents that run already of services.
    fn program_agents(&self, services: &Services) -> Result<()> {
        let mut agents = self.agents.iter();
        agents.try_for_each(|agent| services.write(&agent.node().manifests))
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
            (Way::Iptables, _) => all.push(kube_proxy::witness(&node, self.family)),
            (Way::Ipvs, _) => all.extend(ipvs::witnesses(&node)),
            (Way::Nftables, _) if self.kube_proxy.is_some() => {
                all.push(nftables::watched(&node, self.family));
            }
            (Way::Nftables, _) => all.push(nftables::witness(&node, self.family)),
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
            (Way::XdpOverlay, _) => all.extend(self.counters(&[
                (0, "external_xdp", Counts::MostPackets),
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
            Way::Direct => (self.family.of(&self.server.host), PORT),
            _ => (self.family.of(&self.node.host), objects::node_port(number)?),
        })
    }

    /// The numbers of the services whose node ports come first and last in kube-proxy's rules: of TCP and of
    /// UDP. Nothing where there are no rules in an order.
    pub fn order(&mut self) -> Option<Result<[(usize, usize); 2]>> {
        let is_ordered = self.way == Way::Iptables;
        let proxy = self.kube_proxy.as_mut().filter(|_| is_ordered)?;
        Some(proxy.first_and_last_node_ports())
    }

    /// Its name in tables.
    pub fn name(&self) -> &'static str {
        match self.way {
            Way::Nftables if self.kube_proxy.is_some() => services::NFTABLES,
            way => way.name(),
        }
    }

    /// The client that asks service `number`.
    pub fn contender(&self, number: usize) -> Result<Contender> {
        Ok(Contender::new(
            self.name(),
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
