//! What most end-to-end tests play in: a client and two servers on two nodes, and some services.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    agent::{Agent, Source},
    host::Host,
    manifest::{Service, Slice},
    process::Process,
    testbed::{Node, Pod, Testbed},
};

/// The ways of asking that [`Host::ask`] knows.
pub const PROTOCOLS: [&str; 3] = ["tcp", "udp", "udp-connected"];

/// Two nodes: a client and a server on the first, a server on the second, all serving 8080.
pub struct Scene {
    /// What it is made of.
    pub testbed: Testbed,
    /// The nodes.
    pub nodes: [Node; 2],
    /// A pod of the first node.
    pub client: Pod,
    /// A pod of each node.
    pub servers: [Pod; 2],
    _processes: Vec<Process>,
}

impl Scene {
    /// Sets it.
    pub fn new() -> Result<Self> {
        let mut testbed = Testbed::new()?;
        let nodes = [testbed.node()?, testbed.node()?];
        let client = testbed.pod(&nodes[0])?;
        let servers = [testbed.pod(&nodes[0])?, testbed.pod(&nodes[1])?];
        let mut processes = vec![client.host.serve(8080)?];
        for server in &servers {
            processes.push(server.host.serve(8080)?);
        }
        Ok(Self {
            testbed,
            nodes,
            client,
            servers,
            _processes: processes,
        })
    }

    /// Writes the services that most tests use, to the first node.
    pub fn manifests(&self) -> Result<()> {
        let [a, b] = &self.servers;
        let web = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let own = Service::new("own", 11)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let empty = Service::new("empty", 12)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let local = Service::new("local", 13)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .set("internalTrafficPolicy", "Local");
        let sticky = Service::new("sticky", 14)
            .port("tcp", 80, "TCP")
            .set("sessionAffinity", "ClientIP")
            .set(
                "sessionAffinityConfig",
                json!({ "clientIP": { "timeoutSeconds": 4 } }),
            );
        let mut items = vec![
            web.json(),
            own.json(),
            empty.json(),
            local.json(),
            sticky.json(),
        ];
        items.extend(Slice::both("web", 8080, &[a, b]));
        items.extend(Slice::both("own", 8080, &[&self.client]));
        items.extend(Slice::both("local", 8080, &[b]));
        items.extend(Slice::both("sticky", 8080, &[a, b]));
        self.nodes[0].manifest("all.json", &list(&items))
    }

    /// The first node's agent, once it knows the pods.
    pub fn agent(&self, extra: &[&str]) -> Result<Agent> {
        let agent = Agent::start(&self.nodes[0], &Source::Manifests, extra)?;
        agent.wait_for_pods(2)?;
        Ok(agent)
    }

    /// The servers' names.
    pub fn names(&self) -> BTreeSet<String> {
        self.servers
            .iter()
            .map(|pod| pod.host.name.clone())
            .collect()
    }
}

/// A List of objects.
pub fn list(items: &[Value]) -> String {
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

/// A service's two addresses.
pub fn frontends(number: u8, port: u16) -> [SocketAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(number));
    [
        (Ipv4Addr::new(10, 96, 0, number), port).into(),
        (v6, port).into(),
    ]
}

/// A field of an answer, empty where there is none.
pub fn text<'a>(answer: &'a Value, field: &str) -> &'a str {
    answer
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Asks a service until every one of `expected` has answered, checking each answer.
pub fn all_answer(
    from: &Host,
    protocol: &str,
    service: SocketAddr,
    expected: &BTreeSet<String>,
) -> Result<()> {
    let mut seen = BTreeSet::new();
    let own = if service.is_ipv4() {
        from.ip4
    } else {
        from.ip6
    };
    for _ in 0..60 {
        let answer = from.ask(protocol, &service.to_string(), &[])?;
        let server = text(&answer, "server").to_owned();
        ensure!(
            expected.contains(&server),
            "{protocol} {service} from {}: {answer}",
            from.name
        );
        // The application sees the service, the backend sees the client.
        ensure!(text(&answer, "peer") == service.to_string(), "{answer}");
        let source: SocketAddr = text(&answer, "source").parse().context("a source")?;
        ensure!(source.ip() == own, "{answer}");
        seen.insert(server);
        if &seen == expected {
            return Ok(());
        }
    }
    anyhow::bail!("only {seen:?} of {expected:?} answered {protocol} {service}");
}
