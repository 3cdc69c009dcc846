//! `penstock pods` and `penstock nodes`: the pod network of this node.

use anyhow::Result;

use super::{
    Look, Output,
    show::{cell, json, running, table},
};
use crate::report::{self, HostPort, Limits, Network, Pod, RemoteRange};

/// How packets reach other nodes and the outside.
pub(super) fn ways(network: &Network) -> String {
    let tunnels = network
        .nodes
        .iter()
        .filter(|node| node.by.starts_with("tunnel"));
    let tunnels = tunnels.count();
    let outside = if network.masquerade {
        let but = match network.non_masquerade.as_slice() {
            [] => String::new(),
            ranges => format!(", and pods' own in {}", ranges.join(" and ")),
        };
        format!("this node's address outside{but}")
    } else {
        "pods' own addresses outside".to_owned()
    };
    format!(
        "{} routing: {tunnels} by tunnel (VXLAN {}, UDP port {}), {} directly; MTU of pods {}, of \
         tunnels {}; {outside}",
        network.routing,
        network.vxlan_vni,
        network.vxlan_port,
        network.nodes.len() - tunnels,
        network.pod_mtu,
        network.overlay_mtu,
    )
}

pub(super) async fn pods(look: &Look) -> Result<()> {
    let report = running(look).await?;
    if look.output == Output::Json {
        return json(&report.pods);
    }
    if report.network.is_none() {
        println!("this agent does not connect pods (--network)");
        return Ok(());
    }
    let has_ports = report.pods.iter().any(|pod| !pod.host_ports.is_empty());
    let has_limits = report.pods.iter().any(|pod| pod.limits.is_some());
    let row = |pod: &Pod| {
        let mut cells = vec![
            pod.name.clone(),
            pod.addresses.join(" "),
            pod.interface.clone(),
            state(pod),
        ];
        if has_ports {
            let ports: Vec<String> = pod.host_ports.iter().map(host_port).collect();
            cells.push(cell(Some(&ports.join(" "))));
        }
        if has_limits {
            cells.push(cell(pod.limits.map(limits).as_deref()));
        }
        cells
    };
    let mut rows: Vec<Vec<String>> = report.pods.iter().map(row).collect();
    rows.sort();
    let mut head = vec!["POD", "ADDRESSES", "INTERFACE", "STATE"];
    head.extend(has_ports.then_some("HOST PORTS"));
    head.extend(has_limits.then_some("BITS PER SECOND"));
    table(&head, &rows);
    for pod in &report.pods {
        for problem in &pod.problems {
            println!("{}: {problem}", pod.name);
        }
    }
    Ok(())
}

fn state(pod: &Pod) -> String {
    match (pod.wired, pod.gone_secs) {
        (true, _) => "wired".to_owned(),
        (false, Some(seconds)) => format!("interface gone for {seconds} s"),
        (false, None) => "no hooks".to_owned(),
    }
}

/// Where it is dialled, and where that leads.
fn host_port(port: &HostPort) -> String {
    let HostPort {
        host_ip,
        host_port,
        pod_port,
        protocol,
    } = port;
    let from = host_ip.map_or_else(
        || host_port.to_string(),
        |ip| report::endpoint(ip, *host_port),
    );
    format!("{from}->{pod_port}/{protocol}")
}

fn limits(limits: Limits) -> String {
    let ways = [("to", limits.ingress_rate), ("from", limits.egress_rate)];
    let ways = ways.into_iter().filter(|(_, rate)| *rate > 0);
    let ways: Vec<String> = ways
        .map(|(way, bits)| format!("{way} {}", rate(bits)))
        .collect();
    ways.join(", ")
}

/// A rate as pods' annotations have it (`kubernetes.io/ingress-bandwidth`), without loss.
fn rate(bits: u64) -> String {
    let units = [(1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")];
    let whole = units
        .into_iter()
        .find(|(unit, _)| bits.is_multiple_of(*unit));
    whole.map_or_else(
        || bits.to_string(),
        |(unit, name)| format!("{}{name}", bits / unit),
    )
}

pub(super) async fn nodes(look: &Look) -> Result<()> {
    let report = running(look).await?;
    let Some(network) = &report.network else {
        if look.output == Output::Json {
            return json(&Vec::<RemoteRange>::new());
        }
        println!("this agent does not connect pods (--network)");
        return Ok(());
    };
    if look.output == Output::Json {
        return json(&network.nodes);
    }
    let own = network.pod_cidrs.iter();
    let own = own.map(|range| vec![report.node.clone(), range.clone(), "this node".to_owned()]);
    let others = network.nodes.iter();
    let others = others.map(|node| vec![node.node.clone(), node.range.clone(), node.by.clone()]);
    let rows: Vec<Vec<String>> = own.chain(others).collect();
    table(&["NODE", "POD RANGE", "REACHED BY"], &rows);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_limits_are_told_as_they_are_asked_for() {
        let port = |ip: Option<&str>| HostPort {
            host_ip: ip.map(|ip| ip.parse().unwrap()),
            host_port: 8080,
            pod_port: 80,
            protocol: "TCP".to_owned(),
        };
        assert_eq!(host_port(&port(None)), "8080->80/TCP");
        assert_eq!(host_port(&port(Some("::1"))), "[::1]:8080->80/TCP");
        for (bits, text) in [
            (1_000_000_000, "1G"),
            (1_500_000_000, "1500M"),
            (80_000_000, "80M"),
            (9_600, "9600"),
            (64_000, "64k"),
        ] {
            assert_eq!(rate(bits), text);
        }
        let one_way = Limits {
            ingress_rate: 10_000_000,
            ingress_burst: 0,
            egress_rate: 0,
            egress_burst: 0,
        };
        assert_eq!(limits(one_way), "to 10M");
        let both = Limits {
            egress_rate: 5_000,
            ..one_way
        };
        assert_eq!(limits(both), "to 10M, from 5k");
    }
}
