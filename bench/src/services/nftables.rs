//! The rules of kube-proxy's nftables mode, written after its documentation and the comments of its
//! source (pkg/proxy/nftables of Kubernetes 1.31), since that program is not to be had here.
//!
//! One addition: a counter beside each translation, which tells that traffic came this way. It
//! counts connections, as nat chains see nothing else.

use std::{fmt::Write, net::SocketAddr};

use anyhow::{Context, Result};
use penstock_testbed::{Host, Node};
use serde_json::Value;

use super::{
    objects::{self, Kind, SERVICE_PORT, Services},
    program::Program,
};
use crate::{
    contender::{Counts, PORT, Witness},
    family::Family,
    load::IPERF_PORT,
};

/// Whether these are a kube-proxy's own rules, which has such a mode, and not those that are written here.
pub fn is_own(kube_proxy: Option<&Program>) -> bool {
    kube_proxy.is_some_and(|program| program.proxy.has_nftables())
}

/// The name of whoever serves by such rules, in tables and everywhere.
pub fn name(kube_proxy: Option<&Program>) -> &'static str {
    if is_own(kube_proxy) {
        "kube-proxy, nftables"
    } else {
        "kube-proxy's rules, nftables"
    }
}

/// What loads rules.
const NFT: &str = "/usr/sbin/nft";

/// Why such rules can't be compared here, if they can't.
pub fn missing() -> Option<String> {
    let is_there = std::path::Path::new(NFT).exists();
    (!is_there).then(|| format!("{NFT} is not there (package nftables)"))
}

/// Everything but services, for IPv4.
const BASE: &str = "
add table ip kube-proxy
delete table ip kube-proxy
add table ip kube-proxy { comment \"rules for kube-proxy\"; }
add counter ip kube-proxy translated
add set ip kube-proxy cluster-ips { type ipv4_addr; }
add set ip kube-proxy nodeport-ips { type ipv4_addr; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110; }
add chain ip kube-proxy filter-input { type filter hook input priority 0; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0; }
add chain ip kube-proxy filter-output { type filter hook output priority 0; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100; }
add chain ip kube-proxy nat-output { type nat hook output priority -100; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100; }
add chain ip kube-proxy services
add chain ip kube-proxy masquerading
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy firewall-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
add rule ip kube-proxy cluster-ips-check ip daddr 10.96.0.0/12 drop comment \"Drop traffic to unallocated ClusterIPs\"
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
";

/// The same for a family. The two differ in how they call addresses, and in which services have.
fn base(family: Family) -> String {
    match family {
        Family::V4 => BASE.to_owned(),
        Family::V6 => BASE
            .replace(" ip ", " ip6 ")
            .replace("ipv4_addr", "ipv6_addr")
            .replace("10.96.0.0/12", "fd00:96::/112"),
    }
}

/// What a family's table and addresses are called.
const fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The rules for some services.
fn rules(services: &Services, node: &Host) -> Result<String> {
    let family = services.family;
    let mut text = base(family);
    let (server, node) = (family.of(services.server), family.of(node));
    let (ip, pods) = match family {
        Family::V4 => ("ip", "10.244.0.0/16"),
        Family::V6 => ("ip6", "fd00:244::/32"),
    };
    // Writing to a string can't fail.
    let _ = writeln!(
        text,
        "add element {ip} kube-proxy nodeport-ips {{ {node} }}"
    );
    for number in 0..services.count {
        let address = objects::address(number, family)?;
        let _ = writeln!(
            text,
            "add element {ip} kube-proxy cluster-ips {{ {address} }}"
        );
        let protocols = objects::protocols(number).iter();
        let mut ports: Vec<_> = protocols
            .map(|protocol| (protocol.to_lowercase(), SERVICE_PORT, PORT))
            .collect();
        if services.has_iperf(number) {
            ports.push(("tcp".to_owned(), IPERF_PORT, IPERF_PORT));
        }
        for (protocol, port, target) in ports {
            let name = format!("{number:08}-default/s{number}/{protocol}/{port}");
            let service = format!("service-{name}");
            // Names have no colons.
            let endpoint = format!(
                "endpoint-{name}__{}/{target}",
                server.to_string().replace(':', ".")
            );
            let destination = SocketAddr::new(server, target);
            let _ = write!(
                text,
                "add chain {ip} kube-proxy {endpoint}\n\
                 add rule {ip} kube-proxy {endpoint} {ip} saddr {server} jump mark-for-masquerade\n\
                 add rule {ip} kube-proxy {endpoint} meta l4proto {protocol} counter name translated dnat to {destination}\n\
                 add chain {ip} kube-proxy {service}\n\
                 add rule {ip} kube-proxy {service} {ip} daddr {address} {protocol} dport {port} {ip} saddr != {pods} jump mark-for-masquerade\n\
                 add rule {ip} kube-proxy {service} numgen random mod 1 vmap {{ 0 : goto {endpoint} }}\n\
                 add element {ip} kube-proxy service-ips {{ {address} . {protocol} . {port} : goto {service} }}\n",
            );
            if matches!(services.kind, Kind::NodePort(_)) {
                let (external, port) = (format!("external-{name}"), objects::node_port(number)?);
                let _ = write!(
                    text,
                    "add chain {ip} kube-proxy {external}\n\
                     add rule {ip} kube-proxy {external} jump mark-for-masquerade\n\
                     add rule {ip} kube-proxy {external} goto {service}\n\
                     add element {ip} kube-proxy service-nodeports {{ {protocol} . {port} : goto {external} }}\n",
                );
            }
        }
    }
    Ok(text)
}

/// Loads the rules for some services on a node; `folder` is for the file.
pub fn load(services: &Services, node: &Node, folder: &std::path::Path) -> Result<()> {
    let path = folder.join("kube-proxy.nft");
    std::fs::write(&path, rules(services, &node.host)?)
        .with_context(|| format!("writing {}", path.display()))?;
    let path = path.to_str().context("a folder's name is no text")?;
    node.host.run("nft", &["-f", path]).map(drop)
}

/// What tells that connections are translated by these rules on a node.
pub fn witness(node: &Host, family: Family) -> Witness {
    let node = node.clone();
    Witness::new("dnat rules", Counts::Flows, move || {
        counted(&node, family, "kube-proxy")
    })
}

/// The table of [`watch`].
const WATCHING: &str = "penstock-bench";

/// Has a node count connections whose destination is translated: the real kube-proxy's rules of this mode count
/// nothing. It is done before the source is translated, since no chain of this type sees what comes after.
pub fn watch(node: &Host, family: Family) -> Result<()> {
    let table = table(family);
    let script = format!(
        "add table {table} {WATCHING}\n\
         add counter {table} {WATCHING} translated\n\
         add chain {table} {WATCHING} before {{ type nat hook postrouting priority 90; }}\n\
         add rule {table} {WATCHING} before ct status dnat counter name translated\n"
    );
    node.run("nft", &[&script]).map(drop)
}

/// What tells that connections are translated on a node that is watched.
pub fn watched(node: &Host, family: Family) -> Witness {
    let node = node.clone();
    Witness::new("translated connections", Counts::Flows, move || {
        counted(&node, family, WATCHING)
    })
}

/// What a table's counter has counted.
fn counted(node: &Host, family: Family, name: &str) -> Result<u64> {
    let arguments = ["-j", "list", "counter", table(family), name, "translated"];
    let text = node.run("nft", &arguments)?;
    let value: Value = serde_json::from_str(&text).context("nft's JSON")?;
    let packets = value.pointer("/nftables/1/counter/packets");
    packets
        .and_then(Value::as_u64)
        .with_context(|| format!("{text} has no counter"))
}

/// How many of services' ports kube-proxy's rules on a node know.
pub fn served(node: &Host, family: Family) -> Result<usize> {
    let arguments = ["list", "map", table(family), "kube-proxy", "service-ips"];
    Ok(known(&node.run("nft", &arguments)?))
}

/// How many elements of a map are of services' port.
fn known(map: &str) -> usize {
    map.matches(&format!(" . {SERVICE_PORT} : goto service-"))
        .count()
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;
    use penstock_common::Forwarding;
    use penstock_testbed::{Testbed, require_kernel};

    use super::*;

    #[test]
    fn rules_of_both_families_serve_and_are_counted() -> Result<()> {
        if require_kernel().is_none() || missing().is_some() {
            eprintln!("SKIPPED: this test needs root and /usr/sbin/nft (package nftables)");
            return Ok(());
        }
        let mut testbed = Testbed::new()?;
        let node = testbed.node()?;
        let (client, server) = (testbed.pod(&node)?, testbed.pod(&node)?);
        let outside = testbed.client()?;
        let _serving = server.host.serve(PORT)?;
        for family in Family::ALL {
            let services = Services {
                count: 60,
                kind: Kind::NodePort(Forwarding::default()),
                family,
                server: &server.host,
            };
            load(&services, &node, testbed.folder())?;
            watch(&node.host, family)?;
            assert_eq!(served(&node.host, family)?, services.ports());
            let counters = || -> Result<[u64; 2]> {
                Ok([
                    counted(&node.host, family, "kube-proxy")?,
                    counted(&node.host, family, WATCHING)?,
                ])
            };
            assert_eq!(counters()?, [0, 0]);
            let service = SocketAddr::new(objects::address(50, family)?, SERVICE_PORT);
            let node_port = SocketAddr::new(family.of(&node.host), objects::node_port(59)?);
            for (from, protocol, to) in [
                (&client.host, "tcp", service),
                (&client.host, "udp", service),
                (&outside, "tcp", node_port),
            ] {
                let who = from.who_answers(protocol, &to.to_string())?;
                ensure!(who == server.host.name, "{who} answers {protocol} {to}");
            }
            assert_eq!(counters()?, [3, 3]);
        }
        Ok(())
    }

    #[test]
    fn a_familys_rules_name_nothing_of_the_other() {
        let text = base(Family::V6);
        for wrong in [" ip ", "ipv4", "10.96"] {
            assert!(!text.contains(wrong), "{wrong} is in {text}");
        }
        assert_eq!(text.matches(" ip6 ").count(), BASE.matches(" ip ").count());
    }

    #[test]
    fn ports_of_a_map_are_counted() {
        let map = "table ip kube-proxy {\n\tmap service-ips {\n\t\ttype ipv4_addr . inet_proto . inet_service : verdict\n\
                   \t\telements = { 10.96.0.1 . tcp . 443 : goto service-X-default/kubernetes/tcp/https,\n\
                   \t\t\t     10.96.1.0 . tcp . 80 : goto service-A-default/s0/tcp/tcp,\n\
                   \t\t\t     10.96.1.0 . udp . 80 : goto service-B-default/s0/udp/udp }\n\t}\n}\n";
        assert_eq!(known(map), 2);
    }
}
