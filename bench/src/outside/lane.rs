//! The nodes, the client and the server that one contender has to itself.

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
    path::PathBuf,
    rc::Rc,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_testbed::{Agent, Host, Node, Pod, Process, Source, Testbed, eventually};
use serde_json::Value;

use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
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
    /// kube-proxy in iptables mode.
    Iptables,
    /// The rules of kube-proxy's nftables mode.
    Nftables,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Tc,
        Self::Xdp,
        Self::Iptables,
        Self::Nftables,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "no service, routed to the pod",
            Self::Tc => "Penstock, TC",
            Self::Xdp => "Penstock, XDP",
            Self::Iptables => "kube-proxy, iptables",
            Self::Nftables => "kube-proxy's rules, nftables",
        }
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
    agent: Option<Rc<Agent>>,
    _kube_proxy: Option<KubeProxy>,
}

impl Lane {
    /// Nodes without any service.
    pub fn new(testbed: &mut Testbed, way: Way, backend: Backend) -> Result<Self> {
        let node = testbed.node()?;
        let server = match backend {
            Backend::Local => testbed.pod(&node)?,
            Backend::Remote => {
                let other = testbed.node()?;
                testbed.pod(&other)?
            }
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
            agent: None,
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
        let (server, kind) = (&self.server.host, Kind::NodePort);
        match self.way {
            Way::Direct => {}
            Way::Tc | Way::Xdp => {
                objects::write(&self.node.manifests, count, kind, server)?;
                let mode = if self.way == Way::Xdp {
                    "native"
                } else {
                    "off"
                };
                let options = ["--log-level", "info", "--xdp", mode];
                let agent = Agent::start(&self.node, &Source::Manifests, &options)?;
                if self.way == Way::Xdp {
                    // What a sender leaves to its interface to complete, as on veth, is TC's. On a wire
                    // frames are complete.
                    self.client.without_checksum_offload(UPLINK)?;
                    self.server.host.without_checksum_offload(UPLINK)?;
                }
                eventually("hooks are on the node's link", || {
                    is_served(&agent, self.way == Way::Xdp)
                })?;
                self.agent = Some(Rc::new(agent));
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
        Ok(())
    }

    /// What tells that traffic took this way.
    pub fn witnesses(&self) -> Vec<Witness> {
        let node = self.node.host.clone();
        let towards_it = match self.backend {
            Backend::Local => self.server.interface.as_str(),
            Backend::Remote => UPLINK,
        };
        let mut all = vec![Witness::interface(&node, towards_it)];
        let ours = |counter, counts| {
            let agent = self.agent.iter();
            agent.map(move |agent| Witness::agent(agent, counter, counts))
        };
        match (self.way, self.backend) {
            (Way::Direct, _) => {}
            (Way::Tc, _) => all.extend(ours("external_request", Counts::Packets)),
            // What leads out of the node again, but for now and then one that the kernel is to see.
            (Way::Xdp, Backend::Remote) => all.extend(ours("external_xdp", Counts::MostPackets)),
            (Way::Xdp, Backend::Local) => all.extend(ours("external_request", Counts::Packets)),
            (Way::Iptables, _) => all.push(kube_proxy::witness(&node)),
            (Way::Nftables, _) => all.push(nftables::witness(&node)),
        }
        all
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
