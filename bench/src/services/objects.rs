//! Services whose one endpoint is the measured server, so that any of them can be asked.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use penstock_common::Forwarding;
use penstock_testbed::Host;
use serde_json::{Value, json};

use super::Places;
use crate::{cluster::service_ip, contender::PORT, load::IPERF_PORT};

/// The port of services.
pub const SERVICE_PORT: u16 = 80;
/// The name of iperf3's port.
const IPERF: &str = "iperf";
/// One service of so many has a UDP port beside its TCP port.
const WITH_UDP: usize = 50;
/// What says how clients outside reach backends of other nodes.
const FORWARDING: &str = "penstock.io/forwarding";
/// Objects in a file.
const PER_FILE: usize = 500;
/// The first node port.
const FIRST_NODE_PORT: usize = 30_000;

/// How clients reach services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By the service's own address.
    ClusterIp,
    /// By a port of the node, too; backends of other nodes in a way that only Penstock knows of.
    NodePort(Forwarding),
}

/// A service's node port, both of TCP and of UDP.
pub fn node_port(number: usize) -> Result<u16> {
    let port = u16::try_from(FIRST_NODE_PORT + number).ok();
    port.filter(|port| *port < 32_768)
        .context("there are only 2,768 node ports")
}

/// The protocols of a service's ports.
pub fn protocols(number: usize) -> &'static [&'static str] {
    if number.is_multiple_of(WITH_UDP) {
        &["TCP", "UDP"]
    } else {
        &["TCP"]
    }
}

/// The first service, and the last that has a UDP port too.
pub fn ends(count: usize) -> Result<[Places; 2]> {
    let last = (count - 1) / WITH_UDP * WITH_UDP;
    let place = |number| -> Result<Places> {
        let ip = service_ip(number).parse().context("an address")?;
        Ok(Places { tcp: ip, udp: ip })
    };
    Ok([place(0)?, place(last)?])
}

/// Whether a service's address leads to iperf3's server, too, by the same port: one that has a UDP port,
/// so that there are hardly more ports than services.
pub fn has_iperf(number: usize, kind: Kind) -> bool {
    kind == Kind::ClusterIp && number.is_multiple_of(WITH_UDP)
}

/// A service's ports, or its slice's: of each protocol, and iperf3's.
fn ports(number: usize, kind: Kind, port: impl Fn(&str) -> Value, iperf: Value) -> Value {
    let ports = protocols(number).iter().map(|protocol| port(protocol));
    ports
        .chain(has_iperf(number, kind).then_some(iperf))
        .collect()
}

/// Service `number`.
fn service(number: usize, kind: Kind) -> Value {
    let ip = service_ip(number);
    let (spec, node_port, forwarding) = match kind {
        Kind::ClusterIp => ("ClusterIP", None, Forwarding::default()),
        Kind::NodePort(forwarding) => ("NodePort", Some(FIRST_NODE_PORT + number), forwarding),
    };
    let annotations = match forwarding {
        Forwarding::Snat => json!({}),
        other => json!({ FORWARDING: other.label() }),
    };
    let port = |protocol: &str| {
        let name = protocol.to_lowercase();
        json!({
            "name": name, "port": SERVICE_PORT, "protocol": protocol, "targetPort": PORT,
            "nodePort": node_port,
        })
    };
    let iperf =
        json!({ "name": IPERF, "port": IPERF_PORT, "protocol": "TCP", "targetPort": IPERF_PORT });
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("s{number}"), "namespace": "default", "annotations": annotations,
        },
        "spec": { "type": spec, "clusterIP": ip, "ports": ports(number, kind, port, iperf) },
    })
}

/// Its slice.
fn slice(number: usize, kind: Kind, server: &Host) -> Value {
    let port = |protocol: &str| json!({ "name": protocol.to_lowercase(), "port": PORT, "protocol": protocol });
    let iperf = json!({ "name": IPERF, "port": IPERF_PORT, "protocol": "TCP" });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{number}-x"), "namespace": "default",
            "labels": { "kubernetes.io/service-name": format!("s{number}") },
        },
        "addressType": "IPv4",
        "ports": ports(number, kind, port, iperf),
        "endpoints": [{
            "addresses": [server.ip4.to_string()],
            "conditions": { "ready": true },
        }],
    })
}

/// So many services, in lists of a size that programs take.
pub fn lists(count: usize, kind: Kind, server: &Host) -> impl Iterator<Item = Value> {
    let starts = (0..count).step_by(PER_FILE);
    starts.map(move |start| {
        let numbers = start..(start + PER_FILE).min(count);
        let items: Vec<Value> = numbers
            .flat_map(|number| [service(number, kind), slice(number, kind, server)])
            .collect();
        json!({ "apiVersion": "v1", "kind": "List", "items": items })
    })
}

/// Writes them as manifests, each of which is there at once: an agent may be looking.
pub fn write(folder: &Path, count: usize, kind: Kind, server: &Host) -> Result<()> {
    for (number, list) in lists(count, kind, server).enumerate() {
        let name = format!("services-{number:04}.json");
        let (path, new) = (folder.join(&name), folder.join(format!(".{name}.new")));
        let written = fs::write(&new, list.to_string()).and_then(|()| fs::rename(&new, &path));
        written.with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}
