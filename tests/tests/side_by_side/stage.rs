//! Three nodes, one with Penstock, one with kube-proxy, one with neither, that see the same objects.

use std::{fs, net::IpAddr, path::Path};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Agent, ApiServer, Host, KubeProxy, Node, Pod, Process, ProxyMode, ProxyProgram, Source,
    Testbed, list, patiently,
};
use serde_json::Value;

use crate::{
    objects::Object,
    service::{Kind, Role, Service},
    side::Side,
};

/// The service that is added last, once others have changed.
const MARKER: usize = 120;

/// Where pods and nodes serve.
const PORTS: [u16; 2] = [8080, 9090];

pub struct Stage {
    // Dropped from top to bottom.
    agent: Agent,
    kube_proxy: KubeProxy,
    _processes: Vec<Process>,
    api: ApiServer,
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
        let kube_proxy = ProxyProgram::at(assets.join("kube-proxy"))?;
        let kube_proxy = kube_proxy.start(&sides[1].node, &api, ProxyMode::Iptables)?;
        let source = Source::Kubeconfig(api.kubeconfig());
        let agent = Agent::start(&sides[0].node, &source, &["--log-level", "info"])?;
        let mut stage = Self {
            agent,
            kube_proxy,
            _processes: processes,
            api,
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

    /// Makes these services of those while both sides serve: what can become another does, what can't
    /// is deleted and made anew, and some come or go. Waits until both sides know.
    pub fn change(&mut self, before: &[Service], after: &[Service]) -> Result<()> {
        let (mut gone, mut replaced, mut new) = (Vec::new(), Vec::new(), Vec::new());
        let mut routed = String::new();
        for side in &self.sides {
            for number in 0..before.len().max(after.len()) {
                match (before.get(number), after.get(number)) {
                    (Some(old), Some(service)) => {
                        let object = Object { service, side };
                        replaced.extend(object.slices());
                        if old.can_become(service) {
                            replaced.push(object.service());
                        } else {
                            gone.push(format!("service/{}", object.name()));
                            new.push(object.service());
                        }
                    }
                    (Some(service), None) => {
                        let object = Object { service, side };
                        gone.push(format!("service/{}", object.name()));
                        gone.extend(object.slice_names());
                    }
                    (None, Some(service)) => {
                        let object = Object { service, side };
                        new.push(object.service());
                        new.extend(object.slices());
                        routed += &routes(&object);
                    }
                    (None, None) => {}
                }
            }
        }
        ip(&self.sides[0].outside, self.testbed.folder(), &routed)?;
        let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
        self.api
            .kubectl(&[&["delete", "--wait=false"], &gone[..]].concat())?;
        self.api
            .kubectl_with(&["replace", "--validate=false"], &list(&replaced))?;
        if !new.is_empty() {
            self.api.create(&serde_json::from_str(&list(&new))?)?;
        }
        let objects = after.iter().flat_map(|service| {
            let sides = self.sides.iter();
            sides.map(move |side| Object { service, side })
        });
        let statuses: Vec<_> = objects.filter_map(|object| object.status()).collect();
        self.api.set_services_status(&statuses)?;
        self.add(&Service {
            number: MARKER,
            ..Service::ready(Kind::ClusterIp, &[Role::Here(0)])
        })
    }

    /// Adds a service with both families while both sides serve, and waits until they know: of
    /// everything that was changed before, too.
    pub fn add(&mut self, service: &Service) -> Result<()> {
        let objects: Vec<Object> = self
            .sides
            .iter()
            .map(|side| Object { service, side })
            .collect();
        let items: Vec<Value> = objects
            .iter()
            .flat_map(|object| [vec![object.service()], object.slices()].concat())
            .collect();
        self.api.create(&serde_json::from_str(&list(&items))?)?;
        let routes: String = objects.iter().map(routes).collect();
        ip(&self.sides[0].outside, self.testbed.folder(), &routes)?;
        let name = format!("default/{}", objects[0].name());
        let served = service.ports.len() * 2;
        let ips = [true, false].map(|is_v4| (is_v4, objects[1].cluster_ip(is_v4)));
        let (agent, kube_proxy) = (&self.agent, &mut self.kube_proxy);
        patiently("both serve what was added last", || {
            let ports = agent.show("services")?;
            let ports = ports.as_array().context("a list")?.iter();
            let is_served = |port: &&Value| {
                let backends = port["backends"].as_array();
                port["service"] == *name && backends.is_some_and(|backends| !backends.is_empty())
            };
            ensure!(
                ports.filter(is_served).count() >= served,
                "Penstock does not serve {name}"
            );
            for (is_v4, ip) in ips {
                let rules = kube_proxy.rules(is_v4)?;
                ensure!(
                    rules.contains(&format!(" -d {ip}/")),
                    "kube-proxy has no rule for {ip}"
                );
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
