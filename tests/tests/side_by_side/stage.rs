//! Three nodes, one with Penstock, one with kube-proxy, one with neither, that see the same objects.

use std::{fs, net::IpAddr, path::Path};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Agent, ApiServer, Host, KubeProxy, Node, Pod, Process, ProxyMode, Source, Testbed, list,
    patiently,
};
use serde_json::Value;

use crate::{objects::Object, service::Service, side::Side};

/// Where pods and nodes serve.
const PORTS: [u16; 2] = [8080, 9090];

pub struct Stage {
    // Dropped from top to bottom.
    agent: Agent,
    kube_proxy: KubeProxy,
    _processes: Vec<Process>,
    _api: ApiServer,
    /// Penstock's, then kube-proxy's.
    pub sides: [Side; 2],
    testbed: Testbed,
}

impl Stage {
    pub fn new(assets: &Path, services: &[Service]) -> Result<Self> {
        let mut testbed = Testbed::new()?;
        let host = testbed.client()?;
        let sides = sides(&mut testbed)?;
        let mut processes = Vec::new();
        for side in &sides {
            for server in [&side.node.host, &side.here[0].host, &side.here[1].host] {
                for port in PORTS {
                    processes.push(server.serve(port)?);
                }
            }
        }
        let api = ApiServer::start(assets, &host, testbed.folder())?;
        let objects = || {
            let all = services.iter().flat_map(|service| {
                let sides = sides.iter();
                sides.map(move |side| Object { service, side })
            });
            all.collect::<Vec<_>>()
        };
        create(&api, &sides, &objects())?;
        let routes: String = objects().iter().map(routes).collect();
        ip(&sides[0].outside, testbed.folder(), &routes)?;
        let kube_proxy = KubeProxy::start(assets, &sides[1].node, &api, ProxyMode::Iptables)?;
        let source = Source::Kubeconfig(api.kubeconfig());
        let agent = Agent::start(&sides[0].node, &source, &["--log-level", "info"])?;
        let mut stage = Self {
            agent,
            kube_proxy,
            _processes: processes,
            _api: api,
            sides,
            testbed,
        };
        stage.wait()?;
        Ok(stage)
    }

    /// Waits until both serve all objects, which were there before them.
    fn wait(&mut self) -> Result<()> {
        let [ours, _] = &self.sides;
        let pods: Vec<&Pod> = ours.here.iter().chain(&ours.guests).collect();
        self.agent.wait_for_hooks(&pods)?;
        let kube_proxy = &mut self.kube_proxy;
        // Both families' rules are written by themselves, each at once.
        patiently("kube-proxy has written its rules", || {
            for is_v4 in [true, false] {
                let rules = kube_proxy.rules(is_v4)?;
                ensure!(rules.contains(" -j KUBE-SEP-"), "{}", kube_proxy.log());
            }
            Ok(())
        })
    }

    /// A folder that goes with the stage.
    pub fn folder(&self) -> &Path {
        self.testbed.folder()
    }
}

fn sides(testbed: &mut Testbed) -> Result<[Side; 2]> {
    let outside = testbed.client()?;
    // The gateway of both nodes, which takes whatever comes and never answers.
    let nowhere = testbed.client()?;
    nowhere.run("ip", &["-6", "route", "add", "blackhole", "default"])?;
    for host in [&outside, &nowhere] {
        // What a node does not serve it sends on to its gateway, which is the client's neighbour.
        set(host, "net.ipv4.conf.all.accept_redirects=0")?;
        set(host, "net.ipv4.conf.eth0.accept_redirects=0")?;
        set(host, "net.ipv6.conf.eth0.accept_redirects=0")?;
    }
    let nodes = [testbed.node()?, testbed.node()?, testbed.node()?];
    let mut pods =
        |node: &Node| -> Result<[Pod; 2]> { Ok([testbed.pod(node)?, testbed.pod(node)?]) };
    let servers = [pods(&nodes[0])?, pods(&nodes[1])?];
    let guests = [pods(&nodes[0])?, pods(&nodes[1])?];
    let [elsewhere, _] = pods(&nodes[2])?;
    let side = |number: usize| -> Result<Side> {
        let (node, other) = (nodes[number].clone(), nodes[1 - number].clone());
        let second = second_addresses(&node, &nowhere, testbed.folder())?;
        Ok(Side {
            name: ["p", "k"][number],
            is_penstock: number == 0,
            second,
            here: servers[number].clone(),
            there: servers[1 - number].clone(),
            node,
            other,
            guests: guests[number].clone(),
            elsewhere: elsewhere.clone(),
            outside: outside.clone(),
        })
    };
    Ok([side(0)?, side(1)?])
}

/// Gives a node one more address of each family, a gateway to nowhere, and no limit for refusals.
fn second_addresses(node: &Node, nowhere: &Host, folder: &Path) -> Result<[IpAddr; 2]> {
    let number = 100 + node.number;
    let texts = [format!("172.31.0.{number}"), format!("fd00:31::{number}")];
    let lines = format!(
        "addr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad preferred_lft 0\n\
         route add default via {} dev eth0\n\
         route add default via {} dev eth0\n",
        texts[0], texts[1], nowhere.ip4, nowhere.ip6
    );
    ip(&node.host, folder, &lines)?;
    set(&node.host, "net.ipv4.icmp_ratelimit=0")?;
    set(&node.host, "net.ipv6.icmp.ratelimit=0")?;
    let [v4, v6] = texts.map(|text| text.parse().context("an address"));
    Ok([v4?, v6?])
}

fn set(host: &Host, sysctl: &str) -> Result<()> {
    host.run("sysctl", &["-qw", sysctl]).map(drop)
}

/// Runs `ip` once for many lines.
fn ip(host: &Host, folder: &Path, lines: &str) -> Result<()> {
    let file = folder.join(format!("{}.ip", host.name));
    fs::write(&file, lines).with_context(|| format!("writing {}", file.display()))?;
    let file = file.to_str().context("a file's name is no text")?;
    host.run("ip", &["-batch", file]).map(drop)
}

/// How the client outside reaches a service's addresses: by the node whose it is.
fn routes(object: &Object) -> String {
    let mut lines = String::new();
    for is_v4 in [true, false] {
        let node = &object.side.node.host;
        let via = if is_v4 { node.ip4 } else { node.ip6 };
        for to in [
            object.cluster_ip(is_v4),
            object.balancer_ip(is_v4),
            object.external_ip(is_v4),
        ] {
            lines += &format!("route add {to} via {via}\n");
        }
    }
    lines
}

fn create(api: &ApiServer, sides: &[Side; 2], objects: &[Object]) -> Result<()> {
    for side in sides {
        api.create(&side.node.object())?;
    }
    let items: Vec<Value> = objects
        .iter()
        .flat_map(|object| [vec![object.service()], object.slices()].concat())
        .collect();
    api.create(&serde_json::from_str(&list(&items))?)?;
    let statuses: Vec<_> = objects.iter().filter_map(Object::status).collect();
    api.set_services_status(&statuses)
}
