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
        ipvs,
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
    /// Not at all: the node routes to the pod, and what the pod answers comes back by the node.
    Direct,
    /// The same, but what the pod answers does not come by the node: its own node sends it to the client.
    #[value(name = "one-way")]
    ThereOnly,
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
    pub const ALL: [Self; 13] = [
        Self::Direct,
        Self::ThereOnly,
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

    /// Its name, in tables and everywhere, with this kube-proxy.
    pub fn name(self, kube_proxy: Option<&Program>) -> &'static str {
        match self {
            Self::Direct => "no service, routed to the pod and back",
            Self::ThereOnly => "no service, routed to the pod one way",
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
            Self::Nftables => nftables::name(kube_proxy),
        }
    }

    /// Which of kube-proxy's modes this is, if it is one.
    pub const fn mode(self) -> Option<ProxyMode> {
        match self {
            Self::Iptables => Some(ProxyMode::Iptables),
            Self::Ipvs => Some(ProxyMode::Ipvs),
            Self::Nftables => Some(ProxyMode::Nftables),
            _ => None,
        }
    }

    /// Whether there is only something to it where the backend is on another node.
    pub fn is_to_another_node(self) -> bool {
        self == Self::ThereOnly || self.through_overlay().is_some()
    }

    /// Whether the pod itself is asked.
    pub const fn is_without_service(self) -> bool {
        matches!(self, Self::Direct | Self::ThereOnly)
    }

    /// Whether the node that is asked sees nothing of answers of a backend on another one.
    pub const fn is_answered_directly(self) -> bool {
        matches!(self, Self::ThereOnly | Self::Dsr | Self::XdpDsr)
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
            Self::Direct | Self::ThereOnly | Self::Tc | Self::Xdp => None,
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

/// The node that is asked, the backend's, the backend, and agents that run already.
type Served = (Node, Node, Pod, Vec<Rc<Agent>>);

/// A contender's nodes, client and server.
pub struct Lane {
    /// How it serves node ports.
    pub way: Way,
    family: Family,
    backend: Backend,
    name: &'static str,
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
        let (node, other, server, agents) = match way.through_overlay() {
            Some(_) => connected(testbed, way)?,
            None => routed(testbed, backend)?,
        };
        let client = testbed.client()?;
        route(&client, &server.host, &node.host)?;
        if way == Way::Direct && backend == Backend::Remote {
            route(&other.host, &client, &node.host)?;
        }
        // As in `services`: two services of one server.
        client.run("sysctl", &["-qw", "net.ipv4.tcp_timestamps=2"])?;
        without_redirects(&node.host)?;
        Ok(Self {
            way,
            family,
            backend,
            name: way.name(None),
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
        self.name = self.way.name(kube_proxy);
        let server = self.server.host.clone();
        let services = Services {
            count,
            kind: Kind::NodePort(self.way.through_overlay().unwrap_or_default()),
            family: self.family,
            server: &server,
        };
        match self.way {
            Way::Direct | Way::ThereOnly => {}
            Way::Tc | Way::Xdp => {
                services.write(&self.node.manifests)?;
                let options = self.way.options();
                let agent = Agent::start(&self.node, &Source::Manifests, &options)?;
                self.agents.push(Rc::new(agent));
            }
            Way::Overlay | Way::Tunnel | Way::Dsr => self.program_agents(&services)?,
            Way::XdpOverlay | Way::XdpTunnel | Way::XdpDsr => self.program_agents(&services)?,
            Way::Nftables if !nftables::is_own(kube_proxy) => {
                nftables::load(&services, &self.node, testbed.folder())?;
            }
            Way::Iptables | Way::Ipvs | Way::Nftables => {
                let mode = self.way.mode().context("this is no mode of kube-proxy's")?;
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
        let sends = |interface, counts| Witness::interface(&node, interface, counts);
        let mut all = match self.backend {
            Backend::Local => vec![
                sends(&self.server.interface, Counts::Requests),
                sends(UPLINK, Counts::Replies),
            ],
            // One link leads to the backend's node and back to the client.
            Backend::Remote if self.way.is_answered_directly() => {
                vec![sends(UPLINK, Counts::OneWay)]
            }
            Backend::Remote => vec![sends(UPLINK, Counts::BothWays)],
        };
        match (self.way, self.backend) {
            (Way::Direct | Way::ThereOnly, _) => {}
            (Way::Iptables, _) => all.push(kube_proxy::witness(&node, self.family)),
            (Way::Ipvs, _) => all.extend(ipvs::witnesses(&node)),
            (Way::Nftables, _) if self.kube_proxy.is_some() => {
                all.push(nftables::watched(&node, self.family));
            }
            (Way::Nftables, _) => all.push(nftables::witness(&node, self.family)),
            // Backends of the node itself are TC's, whoever meets clients.
            (Way::Tc, _) | (Way::Xdp, Backend::Local) => all.extend(self.counters(&[
                (0, "external_request", Counts::Requests),
                (0, "external_reply", Counts::Replies),
                (0, "external_xdp", Counts::Never),
            ])),
            (Way::Xdp, Backend::Remote) => all.extend(self.counters(&[
                (0, "external_request", Counts::Requests),
                (0, "external_reply", Counts::Replies),
                (0, "external_xdp", Counts::BothWays),
            ])),
            (Way::Overlay, _) => all.extend(self.counters(&[
                (0, "external_request", Counts::Requests),
                (0, "external_reply", Counts::Replies),
                (0, "external_xdp", Counts::Never),
                (0, "overlay_sent", Counts::Requests),
                (0, "handed_over", Counts::Never),
            ])),
            (Way::XdpOverlay, _) => all.extend(self.counters(&[
                (0, "external_request", Counts::Requests),
                (0, "external_reply", Counts::Replies),
                (0, "external_xdp", Counts::BothWays),
                (0, "overlay_sent", Counts::Requests),
                (0, "handed_over", Counts::Never),
            ])),
            // XDP leaves to TC what is handed over.
            (Way::Tunnel | Way::XdpTunnel, _) => all.extend(self.counters(&[
                (0, "handed_over", Counts::Requests),
                (1, "handed_back", Counts::Replies),
                (0, "external_reply", Counts::Replies),
                (0, "external_xdp", Counts::Never),
            ])),
            // The backend's node answers by itself.
            (Way::Dsr | Way::XdpDsr, _) => all.extend(self.counters(&[
                (0, "handed_over", Counts::Requests),
                (1, "external_reply", Counts::Replies),
                (1, "handed_back", Counts::Never),
                (0, "external_reply", Counts::Never),
                (0, "external_xdp", Counts::Never),
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
            way if way.is_without_service() => (self.family.of(&self.server.host), PORT),
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

    /// Its name, in tables and everywhere.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The client that asks service `number`.
    pub fn contender(&self, number: usize) -> Result<Contender> {
        let contender = Contender::new(
            self.name(),
            &self.client,
            self.target(number)?.into(),
            &self.serving,
            self.witnesses(),
        );
        Ok(if self.way.is_at_xdp() {
            contender.in_frames()
        } else {
            contender
        })
    }
}

/// A router with one link looks at each packet whether its sender should know of a shorter way, and those that are
/// told, clients as well as other nodes, leave this one.
fn without_redirects(node: &Host) -> Result<()> {
    for interface in ["all", UPLINK] {
        let setting = format!("net.ipv4.conf.{interface}.send_redirects=0");
        node.run("sysctl", &["-qw", &setting])?;
    }
    Ok(())
}

/// Has a host send what is for another one by way of a third, in both families.
fn route(from: &Host, to: &Host, via: &Host) -> Result<()> {
    for family in Family::ALL {
        let (to, via) = (family.of(to).to_string(), family.of(via).to_string());
        from.run("ip", &["route", "add", &to, "via", &via])?;
    }
    Ok(())
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
    Ok((node, other, server, Vec::new()))
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
    Ok((node.clone(), other.clone(), server, agents))
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

#[cfg(test)]
mod tests {
    use anyhow::ensure;
    use penstock_testbed::require_kernel;

    use super::*;
    use crate::contender;

    /// How many packets a node sends by its link while a client outside asks a pod of another node over UDP: a
    /// request, and an answer if that comes by, too.
    fn sent(testbed: &mut Testbed, is_both_ways: bool, family: Family) -> Result<u64> {
        let (node, other, server, _) = routed(testbed, Backend::Remote)?;
        let client = testbed.client()?;
        without_redirects(&node.host)?;
        route(&client, &server.host, &node.host)?;
        if is_both_ways {
            route(&other.host, &client, &node.host)?;
        }
        let _serving = server.host.serve(PORT)?;
        let to = std::net::SocketAddr::new(family.of(&server.host), PORT).to_string();
        let ask = || -> Result<()> {
            let who = client.who_answers("udp", &to)?;
            ensure!(who == server.host.name, "{who} answers");
            Ok(())
        };
        // Neighbours are known before anything counts.
        ask()?;
        let witness = [Witness::interface(&node.host, UPLINK, Counts::BothWays)];
        let before = contender::read(&witness)?;
        for _ in 0..40 {
            ask()?;
        }
        let after = contender::read(&witness)?;
        Ok(after.iter().sum::<u64>() - before.iter().sum::<u64>())
    }

    #[test]
    fn answers_come_back_by_the_node_only_where_they_are_routed_so() -> Result<()> {
        if require_kernel().is_none() {
            return Ok(());
        }
        let mut testbed = Testbed::new()?;
        for family in Family::ALL {
            // With some room for neighbours that are asked for.
            let both = sent(&mut testbed, true, family)?;
            assert!((80..100).contains(&both), "{both} packets both ways");
            let one = sent(&mut testbed, false, family)?;
            assert!((40..60).contains(&one), "{one} packets one way");
        }
        Ok(())
    }

    #[test]
    fn ways_that_answer_directly_are_told_from_those_that_do_not() {
        let direct: Vec<&str> = Way::ALL
            .iter()
            .filter(|way| way.is_answered_directly())
            .map(|way| way.name(None))
            .collect();
        let expected = [
            "no service, routed to the pod one way",
            "Penstock, TC, dsr",
            "Penstock, XDP, dsr",
        ];
        assert_eq!(direct, expected);
    }
}
