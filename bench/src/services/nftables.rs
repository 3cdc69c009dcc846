//! The rules of kube-proxy's nftables mode, written after its documentation and the comments of its
//! source (pkg/proxy/nftables of Kubernetes 1.31), since that program is not to be had here.
//!
//! One addition: a counter beside each translation, which tells that traffic came this way. It
//! counts connections, as nat chains see nothing else.

use std::fmt::Write;

use anyhow::{Context, Result};
use penstock_testbed::{Host, Node};
use serde_json::Value;

use super::objects::{self, Kind, SERVICE_PORT};
use crate::{
    cluster::service_ip,
    contender::{Counts, PORT, Witness},
    load::IPERF_PORT,
};

/// Everything but services.
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

/// The rules for so many services.
fn rules(count: usize, kind: Kind, server: &Host, node: &Node) -> Result<String> {
    let mut text = BASE.to_owned();
    let (server, node) = (server.ip4, node.host.ip4);
    // Writing to a string can't fail.
    let _ = writeln!(text, "add element ip kube-proxy nodeport-ips {{ {node} }}");
    for number in 0..count {
        let ip = service_ip(number);
        let _ = writeln!(text, "add element ip kube-proxy cluster-ips {{ {ip} }}");
        let protocols = objects::protocols(number).iter();
        let mut ports: Vec<_> = protocols
            .map(|protocol| (protocol.to_lowercase(), SERVICE_PORT, PORT))
            .collect();
        if objects::has_iperf(number, kind) {
            ports.push(("tcp".to_owned(), IPERF_PORT, IPERF_PORT));
        }
        for (protocol, port, target) in ports {
            let name = format!("{number:08}-default/s{number}/{protocol}/{port}");
            let service = format!("service-{name}");
            let endpoint = format!("endpoint-{name}__{server}/{target}");
            let _ = write!(
                text,
                "add chain ip kube-proxy {endpoint}\n\
                 add rule ip kube-proxy {endpoint} ip saddr {server} jump mark-for-masquerade\n\
                 add rule ip kube-proxy {endpoint} meta l4proto {protocol} counter name translated dnat to {server}:{target}\n\
                 add chain ip kube-proxy {service}\n\
                 add rule ip kube-proxy {service} ip daddr {ip} {protocol} dport {port} ip saddr != 10.244.0.0/16 jump mark-for-masquerade\n\
                 add rule ip kube-proxy {service} numgen random mod 1 vmap {{ 0 : goto {endpoint} }}\n\
                 add element ip kube-proxy service-ips {{ {ip} . {protocol} . {port} : goto {service} }}\n",
            );
            if matches!(kind, Kind::NodePort(_)) {
                let (external, port) = (format!("external-{name}"), objects::node_port(number)?);
                let _ = write!(
                    text,
                    "add chain ip kube-proxy {external}\n\
                     add rule ip kube-proxy {external} jump mark-for-masquerade\n\
                     add rule ip kube-proxy {external} goto {service}\n\
                     add element ip kube-proxy service-nodeports {{ {protocol} . {port} : goto {external} }}\n",
                );
            }
        }
    }
    Ok(text)
}

/// Loads the rules for so many services on a node; `folder` is for the file.
pub fn load(
    count: usize,
    kind: Kind,
    server: &Host,
    node: &Node,
    folder: &std::path::Path,
) -> Result<()> {
    let path = folder.join("kube-proxy.nft");
    std::fs::write(&path, rules(count, kind, server, node)?)
        .with_context(|| format!("writing {}", path.display()))?;
    let path = path.to_str().context("a folder's name is no text")?;
    node.host.run("nft", &["-f", path]).map(drop)
}

/// What tells that connections are translated by these rules on a node.
pub fn witness(node: &Host) -> Witness {
    let node = node.clone();
    Witness::new("dnat rules", Counts::Flows, move || translated(&node))
}

/// Connections that were translated on a node.
fn translated(node: &Host) -> Result<u64> {
    let arguments = ["-j", "list", "counter", "ip", "kube-proxy", "translated"];
    let text = node.run("nft", &arguments)?;
    let value: Value = serde_json::from_str(&text).context("nft's JSON")?;
    let packets = value.pointer("/nftables/1/counter/packets");
    packets
        .and_then(Value::as_u64)
        .with_context(|| format!("{text} has no counter"))
}
