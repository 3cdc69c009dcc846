//! A client outside of the cluster asks a node port, and the backend is a pod of that node or of
//! another one: Penstock, kube-proxy, and the pod itself by way of the same node.
//!
//! Every contender has nodes, a client and a server of its own.

use std::{
    fmt::{Display, Formatter},
    net::IpAddr,
    path::PathBuf,
    rc::Rc,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use penstock_testbed::{Agent, Host, Node, Pod, Process, Source, Testbed, patiently};

use crate::{
    contender::{Contender, Counts, PORT, Witness, serve},
    load::Workload,
    services::{
        kube_proxy::{self, KubeProxy},
        nftables,
        objects::{self, Kind},
    },
    turns::{self, Effort, Outcome, Trial},
};

/// What is measured. Connections only at a rate: every one leaves its source port taken for a while,
/// of which one node has some ten thousands towards one backend.
const TRIALS: [Trial; 7] = [
    Trial::open(Workload::Connect, 500),
    Trial::together(Workload::TcpRr),
    Trial::closed(Workload::TcpRr),
    Trial::together(Workload::UdpRr),
    Trial::closed(Workload::UdpRr),
    Trial::together(Workload::Stream),
    Trial::closed(Workload::Stream),
];

/// The nodes' link to each other and to the outside.
const UPLINK: &str = "eth0";

/// How a contender serves node ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// Not at all: the node routes to the pod.
    Direct,
    /// Penstock, at the TC hooks of the interface to the outside.
    Tc,
    /// kube-proxy in iptables mode.
    Iptables,
    /// The rules of kube-proxy's nftables mode.
    Nftables,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Direct, Self::Tc, Self::Iptables, Self::Nftables];

    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "no service, routed to the pod",
            Self::Tc => "Penstock, TC",
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
enum Backend {
    Local,
    Remote,
}

/// A contender's nodes, client and server.
struct Lane {
    way: Way,
    backend: Backend,
    /// The node that is asked.
    node: Node,
    client: Host,
    server: Pod,
    serving: Rc<Process>,
    agent: Option<Rc<Agent>>,
    _kube_proxy: Option<KubeProxy>,
}

impl Lane {
    fn new(testbed: &mut Testbed, way: Way, backend: Backend) -> Result<Self> {
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
    fn program(
        &mut self,
        testbed: &mut Testbed,
        assets: Option<&PathBuf>,
        count: usize,
    ) -> Result<()> {
        let (server, kind) = (&self.server.host, Kind::NodePort);
        match self.way {
            Way::Direct => {}
            Way::Tc => {
                objects::write(&self.node.manifests, count, kind, server)?;
                let options = ["--log-level", "info"];
                let agent = Agent::start(&self.node, &Source::Manifests, &options)?;
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
    fn witnesses(&self) -> Vec<Witness> {
        let node = self.node.host.clone();
        let towards_it = match self.backend {
            Backend::Local => self.server.interface.as_str(),
            Backend::Remote => UPLINK,
        };
        let mut all = vec![Witness::interface(&node, towards_it)];
        match self.way {
            Way::Direct => {}
            Way::Tc => {
                let agent = self.agent.iter();
                all.extend(
                    agent.map(|agent| Witness::agent(agent, "external_request", Counts::Packets)),
                );
            }
            Way::Iptables => all.push(kube_proxy::witness(&node)),
            Way::Nftables => all.push(nftables::witness(&node)),
        }
        all
    }

    fn contender(&self, number: usize) -> Result<Contender> {
        let target: (IpAddr, u16) = match self.way {
            Way::Direct => (self.server.host.ip4, PORT),
            _ => (self.node.host.ip4, objects::node_port(number)?),
        };
        Ok(Contender::new(
            self.way.name(),
            &self.client,
            target.into(),
            &self.serving,
            self.witnesses(),
        ))
    }
}

/// Measures some ways with so many services, of which the first is asked.
pub fn measure(count: usize, ways: &[Way], effort: &Effort) -> Result<Vec<Outcome>> {
    let mut ways = ways.to_vec();
    let assets = kube_proxy::assets();
    ways.retain(|way| *way != Way::Iptables || assets.is_some());
    let mut outcomes = Vec::new();
    for (backend, place) in [(Backend::Local, "the same"), (Backend::Remote, "another")] {
        let mut testbed = Testbed::new()?;
        let mut lanes = Vec::new();
        for way in &ways {
            let mut lane = Lane::new(&mut testbed, *way, backend)?;
            lane.program(&mut testbed, assets.as_ref(), count)?;
            lanes.push(lane);
        }
        let contenders: Vec<Contender> = lanes
            .iter()
            .map(|lane| lane.contender(0))
            .collect::<Result<_>>()?;
        for contender in &contenders {
            patiently("the node port answers", || contender.answers())?;
        }
        let title = format!("A node port of {count}, the backend on {place} node");
        outcomes.extend(turns::take(&title, &contenders, &TRIALS, effort)?);
    }
    Ok(outcomes)
}
