//! Services whose one endpoint is the measured server, so that any of them can be asked.

use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
    path::Path,
};

use anyhow::{Context, Result};
use penstock_common::Forwarding;
use penstock_testbed::Host;
use serde_json::{Value, json};

use super::Places;
use crate::{cluster::service_ip, contender::PORT, family::Family, load::IPERF_PORT};

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

/// So many services of one kind, whose one endpoint is a server.
#[derive(Clone, Copy, Debug)]
pub struct Services<'a> {
    /// How many there are.
    pub count: usize,
    /// How they are reached.
    pub kind: Kind,
    /// The family of their addresses.
    pub family: Family,
    /// The endpoint.
    pub server: &'a Host,
}

/// A service's node port, both of TCP and of UDP.
pub fn node_port(number: usize) -> Result<u16> {
    let port = u16::try_from(FIRST_NODE_PORT + number).ok();
    port.filter(|port| *port < 32_768)
        .context("there are only 2,768 node ports")
}

/// The number of the service that has a node port.
pub fn with_node_port(port: u16) -> Option<usize> {
    usize::from(port).checked_sub(FIRST_NODE_PORT)
}

/// The protocols of a service's ports.
pub fn protocols(number: usize) -> &'static [&'static str] {
    if number.is_multiple_of(WITH_UDP) {
        &["TCP", "UDP"]
    } else {
        &["TCP"]
    }
}

/// The numbers of the first service, and of the last that has a UDP port too.
pub const fn numbers(count: usize) -> [usize; 2] {
    [0, (count - 1) / WITH_UDP * WITH_UDP]
}

/// The first service, and the last that has a UDP port too.
pub fn ends(count: usize) -> Result<[Places; 2]> {
    let place = |number| -> Result<Places> {
        let ip = address(number, Family::V4)?;
        Ok(Places { tcp: ip, udp: ip })
    };
    let [first, last] = numbers(count);
    Ok([place(first)?, place(last)?])
}

/// The address of service `number`; of IPv6 in fd00:96::/112.
pub fn address(number: usize, family: Family) -> Result<IpAddr> {
    match family {
        Family::V4 => service_ip(number).parse().context("an address"),
        Family::V6 => {
            let host = u16::try_from(number + 256).context("there are only 65,280 of IPv6")?;
            Ok(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, host).into())
        }
    }
}

impl Services<'_> {
    /// Whether a service's address leads to iperf3's server, too, by the same port: one that has a UDP port,
    /// so that there are hardly more ports than services.
    pub fn has_iperf(&self, number: usize) -> bool {
        self.kind == Kind::ClusterIp && number.is_multiple_of(WITH_UDP)
    }

    /// How many ports they have.
    pub fn ports(&self) -> usize {
        (0..self.count).map(|number| protocols(number).len()).sum()
    }

    /// A service's ports, or its slice's: of each protocol, and iperf3's.
    fn ports_of(&self, number: usize, port: impl Fn(&str) -> Value, iperf: Value) -> Value {
        let ports = protocols(number).iter().map(|protocol| port(protocol));
        ports
            .chain(self.has_iperf(number).then_some(iperf))
            .collect()
    }

    /// Service `number`.
    fn service(&self, number: usize) -> Result<Value> {
        let ip = address(number, self.family)?;
        let (spec, node_port, forwarding) = match self.kind {
            Kind::ClusterIp => ("ClusterIP", None, Forwarding::default()),
            Kind::NodePort(forwarding) => ("NodePort", Some(node_port(number)?), forwarding),
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
        let iperf = json!({ "name": IPERF, "port": IPERF_PORT, "protocol": "TCP", "targetPort": IPERF_PORT });
        Ok(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": format!("s{number}"), "namespace": "default", "annotations": annotations,
            },
            "spec": {
                "type": spec, "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": [self.family.name()],
                "ports": self.ports_of(number, port, iperf),
            },
        }))
    }

    /// Its slice.
    fn slice(&self, number: usize) -> Value {
        let port = |protocol: &str| json!({ "name": protocol.to_lowercase(), "port": PORT, "protocol": protocol });
        let iperf = json!({ "name": IPERF, "port": IPERF_PORT, "protocol": "TCP" });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("s{number}-x"), "namespace": "default",
                "labels": { "kubernetes.io/service-name": format!("s{number}") },
            },
            "addressType": self.family.name(),
            "ports": self.ports_of(number, port, iperf),
            "endpoints": [{
                "addresses": [self.family.of(self.server)],
                "conditions": { "ready": true },
            }],
        })
    }

    /// All of them, in lists of a size that programs take.
    pub fn lists(&self) -> impl Iterator<Item = Result<Value>> {
        let starts = (0..self.count).step_by(PER_FILE);
        starts.map(move |start| {
            let mut items = Vec::with_capacity(2 * PER_FILE);
            for number in start..(start + PER_FILE).min(self.count) {
                items.push(self.service(number)?);
                items.push(self.slice(number));
            }
            Ok(json!({ "apiVersion": "v1", "kind": "List", "items": items }))
        })
    }

    /// Writes them as manifests, each of which is there at once: an agent may be looking.
    pub fn write(&self, folder: &Path) -> Result<()> {
        for (number, list) in self.lists().enumerate() {
            let name = format!("services-{number:04}.json");
            let (path, new) = (folder.join(&name), folder.join(format!(".{name}.new")));
            let text = list?.to_string();
            let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &path));
            written.with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_services_addresses_are_in_the_api_servers_ranges() -> Result<()> {
        assert_eq!(address(0, Family::V4)?.to_string(), "10.96.1.0");
        assert_eq!(address(0, Family::V6)?.to_string(), "fd00:96::100");
        assert_eq!(address(999, Family::V6)?.to_string(), "fd00:96::4e7");
        assert!(address(65_280, Family::V6).is_err());
        Ok(())
    }

    #[test]
    fn node_ports_name_their_services() -> Result<()> {
        assert_eq!(with_node_port(node_port(999)?), Some(999));
        assert_eq!(with_node_port(80), None);
        assert_eq!(numbers(1), [0, 0]);
        assert_eq!(numbers(1_000), [0, 950]);
        Ok(())
    }
}
