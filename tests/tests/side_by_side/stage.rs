//! Three nodes, one with Penstock, one with kube-proxy, one with neither, that see the same objects.

use std::{fs, net::IpAddr, path::Path};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Agent, ApiServer, Host, KubeProxy, Node, Pod, Process, Source, Testbed, list, patiently,
};
use serde_json::Value;

use crate::{objects::Object, service::Service, side::Side};

/// Where pods and nodes serve.
const PORTS: [u16; 2] = [8080, 9090];
/// The gateway of both nodes, which takes whatever comes and never answers.
const NOWHERE: [&str; 2] = ["172.31.0.254", "fd00:31::fe"];

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
        let kube_proxy = KubeProxy::start(assets, &sides[1].node, &api)?;
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
    outside.run(
        "sysctl",
        &[
            "-qw",
            "net.ipv4.conf.all.accept_redirects=0",
            "net.ipv4.conf.eth0.accept_redirects=0",
            "net.ipv6.conf.eth0.accept_redirects=0",
        ],
    )?;
    let nodes = [testbed.node()?, testbed.node()?, testbed.node()?];
    let mut pods = |node: &Node| -> Result<[Pod; 2]> {
        Ok([testbed.pod(node)?, testbed.pod(node)?])
    };
    let servers = [pods(&nodes[0])?, pods(&nodes[1])?];
    let guests = [pods(&nodes[0])?, pods(&nodes[1])?];
    let [elsewhere, _] = pods(&nodes[2])?;
    let side = |number: usize| -> Result<Side> {
        let (node, other) = (nodes[number].clone(), nodes[1 - number].clone());
        let second = second_addresses(&node, testbed.folder())?;
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

/// Gives a node one more address of each family, and a gateway to nowhere.
fn second_addresses(node: &Node, folder: &Path) -> Result<[IpAddr; 2]> {
    let number = 100 + node.number;
    let texts = [format!("172.31.0.{number}"), format!("fd00:31::{number}")];
    let [v4, v6] = NOWHERE;
    let lines = format!(
        "addr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad preferred_lft 0\n\
         neigh add {v4} lladdr 02:00:00:00:00:fe dev eth0 nud permanent\n\
         neigh add {v6} lladdr 02:00:00:00:00:fe dev eth0 nud permanent\n\
         route add default via {v4} dev eth0\n\
         route add default via {v6} dev eth0\n",
        texts[0], texts[1]
    );
    ip(&node.host, folder, &lines)?;
    let [v4, v6] = texts.map(|text| text.parse().context("an address"));
    Ok([v4?, v6?])
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
