//! Clients outside of the cluster.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{PROTOCOLS, Service, eventually, require_kernel, text};
use serde_json::json;

use crate::stage::{
    Answer, BALANCER, Pods, Stage, all_answers, ask, failure, nothing_is_tracked, ports_of_web,
    refusal, same_family, stand_in,
};

#[test]
fn clients_outside_reach_pods_that_the_kernel_routes_to() -> Result<()> {
    clients_outside_reach(Pods::Routed, &[])
}

#[test]
fn clients_outside_reach_pods_that_penstock_connects() -> Result<()> {
    clients_outside_reach(Pods::Wired, &[])
}

#[test]
fn clients_outside_reach_pods_whose_addresses_the_network_carries() -> Result<()> {
    clients_outside_reach(Pods::Wired, &["--routing", "native"])
}

#[test]
fn clients_outside_reach_pods_behind_the_overlay_by_xdp() -> Result<()> {
    clients_outside_reach(Pods::Wired, &["--xdp", "generic"])
}

fn clients_outside_reach(pods: Pods, options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(pods, options)?;
    let has_overlay = pods == Pods::Wired && !options.contains(&"native");
    let [here, there] = &stage.servers;
    // So that XDP, where it is, sees checksums that it could change.
    stage.client.without_checksum_offload("eth0")?;
    there.host.without_checksum_offload("eth0")?;
    stage.web(&[here, there], |web| web)?;
    let node = &stage.nodes[0].host;
    node.track_everything()?;
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            // A backend of the same node sees who asks, one elsewhere sees the node.
            let expected = [
                Answer {
                    server: here.host.name.clone(),
                    source: same_family(&stage.client, to.ip()),
                },
                Answer {
                    server: there.host.name.clone(),
                    source: stand_in(&stage, has_overlay, to),
                },
            ];
            all_answers(&stage.client, protocol, to, &expected.into())?;
        }
    }
    for counter in ["external_request", "external_reply"] {
        assert!(stage.agents[0].count(counter)? > 0, "{counter}");
    }

    if options.contains(&"--xdp") {
        by_xdp(&stage)?;
        stage.web(&[here, there], |web| web)?;
    }

    // Into pods that somebody else connects what is for this node goes through the host's stack.
    let by_kernel = (pods == Pods::Routed).then_some(&here.host);
    nothing_is_tracked(node, &stage.client, by_kernel)?;

    // Larger than the links: fragments follow their first.
    for to in stage.addresses("udp") {
        let mut seen = BTreeSet::new();
        eventually("both backends get long datagrams", || {
            let options = ["--size", "4000", "--timeout-ms", "500"];
            let answer = stage.client.ask("udp", &to.to_string(), &options)?;
            // What is lost teaches an IPv6 client what fits.
            ensure!(text(&answer, "reached") == "4000", "{to}: {answer}");
            seen.insert(text(&answer, "server").to_owned());
            ensure!(seen.len() == 2, "{to}: {seen:?}");
            Ok(())
        })?;
    }

    // A process of the node itself.
    let web = stage.nodes[0].host.clone();
    let host = penstock_testbed::Pod {
        host: web.clone(),
        interface: String::new(),
        node: stage.nodes[0].name(),
    };
    stage.web(&[&host], |web| web)?;
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            let answer = ask(&stage.client, protocol, to)?;
            assert_eq!(answer.server, web.name, "{to}");
            assert_eq!(answer.source, same_family(&stage.client, to.ip()), "{to}");
        }
    }
    Ok(())
}

/// XDP sends requests to another node and replies back, whoever connects that node's pods: of a flow's first
/// packets it leaves one in sixteen to TC.
fn by_xdp(stage: &Stage) -> Result<()> {
    const FLOWS: u64 = 32;
    stage.web(&[&stage.servers[1]], |web| web)?;
    for to in stage.addresses("udp") {
        let before = stage.agents[0].count("external_xdp")?;
        for _ in 0..FLOWS {
            ask(&stage.client, "udp", to)?;
        }
        let sent = stage.agents[0].count("external_xdp")? - before;
        ensure!(sent > FLOWS, "{to}: {sent} packets of {FLOWS} flows");
    }
    Ok(())
}

#[test]
fn a_local_policy_keeps_to_the_node_and_to_the_clients_address() -> Result<()> {
    a_local_policy_keeps(&[])
}

#[test]
fn a_local_policy_keeps_to_the_node_past_xdp() -> Result<()> {
    a_local_policy_keeps(&["--xdp", "generic"])
}

/// Who sees pods' own addresses is no pod.
#[test]
fn a_local_policy_is_heeded_where_pods_are_not_masqueraded() -> Result<()> {
    a_local_policy_keeps(&["--non-masquerade", "172.31.0.192/26,fd00:31::c0/122"])
}

fn a_local_policy_keeps(options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, options)?;
    stage.client.without_checksum_offload("eth0")?;
    let [here, there] = &stage.servers;
    let local = |web: Service| web.set("externalTrafficPolicy", "Local");
    stage.web(&[here, there], local)?;
    let rejected = "rejected: no endpoint";
    let dropped = "dropped: no endpoint on this node";
    policies_are(&stage, ["Cluster", "Local"], rejected)?;
    let shown = services(&stage)?;
    assert!(shown.contains("POLICY"), "{shown}");
    assert!(shown.contains("Cluster, outside Local"), "{shown}");
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            for _ in 0..6 {
                let answer = ask(&stage.client, protocol, to)?;
                assert_eq!(answer.server, here.host.name, "{to}");
                assert_eq!(answer.source, same_family(&stage.client, to.ip()), "{to}");
            }
            // Clients in the cluster get them all.
            let all: BTreeSet<String> = [here.host.name.clone(), there.host.name.clone()].into();
            let mut seen = BTreeSet::new();
            eventually("a pod reaches every backend", || {
                seen.insert(ask(&here.host, protocol, to)?.server);
                ensure!(seen == all, "{seen:?}");
                Ok(())
            })?;
        }
    }
    // Nobody here, somebody there: silence.
    stage.web(&[there], local)?;
    policies_are(&stage, ["Cluster", "Local"], dropped)?;
    for to in stage.addresses("tcp") {
        assert_eq!(failure(&stage.client, "tcp", to)?, "timed out", "{to}");
        assert_eq!(ask(&here.host, "tcp", to)?.server, there.host.name);
    }
    assert!(stage.agents[0].count("no_local_endpoints")? > 0);
    // Nobody anywhere: a refusal.
    stage.web(&[], local)?;
    policies_are(&stage, ["Cluster", "Local"], rejected)?;
    let shown = services(&stage)?;
    assert_eq!(shown.matches(rejected).count(), 4, "{shown}");
    for protocol in ["tcp", "udp-connected"] {
        for to in stage.addresses(protocol) {
            let failure = refusal(&stage.client, protocol, to)?;
            assert_eq!(failure, "connection refused", "{protocol} {to}");
        }
    }
    // Nobody here, and nobody outside to be told apart.
    stage.web(&[there], |web| {
        web.set("type", "ClusterIP")
            .set("externalIPs", json!([]))
            .set("internalTrafficPolicy", "Local")
    })?;
    policies_are(&stage, ["Local", ""], dropped)?;
    let shown = services(&stage)?;
    let row = format!("{dropped}, 1 resting");
    assert_eq!(shown.matches(&row).count(), 4, "{shown}");
    Ok(())
}

/// What `penstock services` prints.
fn services(stage: &Stage) -> Result<String> {
    let said = stage.nodes[0].penstock("services", &[])?;
    ensure!(said.code == 0, "{said:?}");
    Ok(said.output)
}

/// Waits until all ports of "web" are said to have these policies for clients inside and outside, and to meet
/// whom nobody may serve with that.
fn policies_are(stage: &Stage, [inside, outside]: [&str; 2], on_empty: &str) -> Result<()> {
    eventually("the policies are shown", || {
        for port in ports_of_web(&stage.agents[0])? {
            let shown = &port.policies;
            ensure!(shown.internal_policy == inside, "{port:?}");
            ensure!(
                shown.external_policy.as_deref().unwrap_or_default() == outside,
                "{port:?}"
            );
            ensure!(shown.on_empty == on_empty, "{port:?}");
        }
        Ok(())
    })
}

/// A pod of another node is told by its address, where it keeps that on the way to this one.
#[test]
fn pods_of_other_nodes_are_inside_if_they_are_seen() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let ways: [(&[&str], bool); 3] = [
        (&["--routing", "native", "--xdp", "generic"], true),
        (&["--no-masquerade"], true),
        (&[], false),
    ];
    for (options, is_seen) in ways {
        let mut stage = Stage::with(Pods::Wired, options)?;
        let pod = stage.server(1)?.host;
        pod.without_checksum_offload("eth0")?;
        let there = &stage.servers[1];
        stage.web(&[there], |web| web.set("externalTrafficPolicy", "Local"))?;
        for protocol in PROTOCOLS {
            // The other node knows of no other address.
            for to in &stage.addresses(protocol)[..2] {
                let what = || format!("{options:?}, {protocol} {to}");
                if is_seen {
                    let answer = ask(&pod, protocol, *to).with_context(what)?;
                    assert_eq!(answer.server, there.host.name, "{}", what());
                } else if protocol == "tcp" {
                    let failure = failure(&pod, protocol, *to)?;
                    assert_eq!(failure, "timed out", "{}", what());
                }
                if protocol == "tcp" {
                    let failure = failure(&stage.client, protocol, *to)?;
                    assert_eq!(failure, "timed out", "{}", what());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn only_those_in_the_ranges_of_a_load_balancer_may_come() -> Result<()> {
    only_those_in_the_ranges(&[])
}

#[test]
fn only_those_in_the_ranges_of_a_load_balancer_may_come_past_xdp() -> Result<()> {
    only_those_in_the_ranges(&["--xdp", "generic"])
}

fn only_those_in_the_ranges(options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, options)?;
    stage.client.without_checksum_offload("eth0")?;
    let [here, there] = &stage.servers;
    let ranges = |ranges: &[String]| {
        let ranges = json!(ranges);
        move |web: Service| web.set("loadBalancerSourceRanges", ranges)
    };
    let balancers = || BALANCER.map(|ip| SocketAddr::new(ip.parse().expect("an address"), 80));
    stage.web(
        &[here, there],
        ranges(&["192.0.2.0/24".to_owned(), "2001:db8:1::/48".to_owned()]),
    )?;
    for to in balancers() {
        eventually("who is in no range is left without an answer", || {
            let failure = failure(&stage.client, "tcp", to)?;
            ensure!(failure == "timed out", "{to}: {failure}");
            Ok(())
        })?;
    }
    assert!(stage.agents[0].count("source_refused")? > 0);
    // Other addresses of the service are nobody's to close.
    for to in stage.addresses("tcp") {
        if !BALANCER.contains(&to.ip().to_string().as_str()) {
            ask(&stage.client, "tcp", to)?;
        }
    }
    let own = [
        format!("{}/24", stage.client.ip4),
        format!("{}/128", stage.client.ip6),
    ];
    stage.web(&[here, there], ranges(&own))?;
    for to in balancers() {
        eventually("who is in a range is answered", || {
            ask(&stage.client, "tcp", to)
        })?;
    }
    // Ranges of one family leave the other one open.
    for (other, closed) in [("192.0.2.0/24", 0), ("2001:db8:1::/48", 1)] {
        stage.web(&[here, there], ranges(&[other.to_owned()]))?;
        let balancers = balancers();
        eventually("who is in no range of its family is refused", || {
            let failure = failure(&stage.client, "tcp", balancers[closed])?;
            ensure!(failure == "timed out", "{other}: {failure}");
            Ok(())
        })?;
        ask(&stage.client, "tcp", balancers[1 - closed]).context(other)?;
    }
    Ok(())
}
