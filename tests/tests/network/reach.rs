//! Who reaches whom, and who is seen to have asked.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Result;
use penstock_testbed::{PROTOCOLS, all_answer, frontends, require_kernel, text};

use crate::net::{Net, asked, nobody_tracks, reaches, same_family};

#[test]
fn pods_nodes_and_services_reach_each_other() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    for node in &net.nodes {
        node.host.track_everything()?;
    }
    for from in &net.pods {
        for to in &net.pods {
            reaches(&from.host, &to.host)?;
        }
    }
    nobody_tracks(&net)?;
    assert!(net.agents[0].count("delivered")? > 0);
    assert!(net.agents[0].count("overlay_sent")? > 0);

    nodes_and_pods(&mut net)?;
    services(&net)?;
    fragments(&net)?;
    net.nothing_was_dropped()
}

/// Pods see a node by one of its addresses. A node sees its own pods' addresses; another node sees
/// the pod's node, as anybody outside does.
fn nodes_and_pods(net: &mut Net) -> Result<()> {
    for node in net.nodes.clone() {
        let server = node.host.serve(8080)?;
        net.keep(server);
    }
    for (index, node) in net.nodes.iter().enumerate() {
        let own = node.host.run("ip", &["-o", "address"])?;
        for pod in &net.pods {
            for (_, source) in asked(&node.host, &pod.host)? {
                assert!(own.contains(&format!(" {source}/")), "{source}: {own}");
            }
            let its_node = net.nodes.iter().find(|node| node.name() == pod.node);
            let its_node = its_node.expect("a pod has a node");
            for (ip, source) in asked(&pod.host, &node.host)? {
                let expected = if its_node.name() == node.name() {
                    &pod.host
                } else {
                    &its_node.host
                };
                assert_eq!(source, same_family(expected, ip), "node {index} asked");
            }
        }
    }
    Ok(())
}

/// Services with a backend on each node, from pods on both paths and from nodes.
fn services(net: &Net) -> Result<()> {
    let [client, near, far] = net.pods.as_slice() else {
        panic!("there are three pods");
    };
    net.service("web", 10, &[near, far])?;
    net.service("far", 11, &[far])?;
    net.service("own", 12, &[client])?;
    let names = |pods: &[&penstock_testbed::Pod]| -> BTreeSet<String> {
        pods.iter().map(|pod| pod.host.name.clone()).collect()
    };
    for (number, expected) in [(10, names(&[near, far])), (11, names(&[far]))] {
        for service in frontends(number, 80) {
            for protocol in PROTOCOLS {
                all_answer(&client.host, protocol, service, &expected)?;
                let packets = client.host.without_socket_hooks();
                all_answer(&packets, protocol, service, &expected)?;
                for node in &net.nodes {
                    let server = node.host.who_answers(protocol, &service.to_string())?;
                    assert!(expected.contains(&server), "{server}");
                }
            }
        }
    }
    // From the other node, and a pod that is its own backend.
    for (from, number) in [(far, 12), (client, 12)] {
        for host in [from.host.clone(), from.host.without_socket_hooks()] {
            for service in frontends(number, 80) {
                for protocol in PROTOCOLS {
                    let server = host.who_answers(protocol, &service.to_string())?;
                    assert_eq!(server, client.host.name);
                }
            }
        }
    }
    for counter in ["socket_connect", "packet_request", "packet_reply"] {
        assert!(net.agents[0].count(counter)? > 0, "{counter}");
    }
    Ok(())
}

/// Datagrams larger than any link, to pods and through services.
fn fragments(net: &Net) -> Result<()> {
    let [client, near, far] = net.pods.as_slice() else {
        panic!("there are three pods");
    };
    let size = ["--size", "4000"];
    let mut targets: Vec<SocketAddr> = Vec::new();
    for pod in [near, far] {
        targets.extend([pod.host.ip4, pod.host.ip6].map(|ip| SocketAddr::new(ip, 8080)));
    }
    targets.extend(frontends(10, 80));
    targets.extend(frontends(11, 80));
    for to in targets {
        let host = client.host.without_socket_hooks();
        let answer = host.ask("udp", &to.to_string(), &size)?;
        assert_eq!(text(&answer, "reached"), "4000", "{to}: {answer}");
    }
    for ip in [far.host.ip4, far.host.ip6] {
        let to = SocketAddr::new(ip, 0).to_string();
        let echo = client.host.ask("icmp", &to, &size)?;
        assert_eq!(echo["reached"], 4000, "{to}: {echo}");
    }
    Ok(())
}
