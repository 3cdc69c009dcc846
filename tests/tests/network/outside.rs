//! What the outside sees of pods.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use penstock_testbed::{Host, eventually, require_kernel, text};

use crate::net::{Net, asked, nobody_tracks, reaches, same_family};

#[test]
fn the_outside_sees_the_node_and_the_kernel_tracks_nothing() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = penstock_testbed::Testbed::new()?;
    let (outside, inside) = (testbed.client()?, testbed.client()?);
    let ranges = format!("{}/32,{}/128", inside.ip4, inside.ip6);
    let nodes = vec![testbed.network_node()?];
    let mut net = Net::on(testbed, nodes, &["--non-masquerade", &ranges], &[0])?;
    for host in [&outside, &inside] {
        let server = host.serve(8080)?;
        net.keep(server);
    }
    let (pod, node) = (net.pods[0].host.clone(), net.nodes[0].host.clone());
    // Who is to see pods' addresses has to know the way to them.
    let (v4, v6) = net.nodes[0].pod_ranges();
    inside.run("ip", &["route", "add", &v4, "via", &node.ip4.to_string()])?;
    inside.run("ip", &["route", "add", &v6, "via", &node.ip6.to_string()])?;

    is_masqueraded(&pod, &outside, &node)?;
    reaches(&pod, &inside)?;
    assert!(net.agents[0].count("masqueraded")? > 0);
    // Penstock wants nothing tracked, so nobody does.
    assert_eq!(node.tracked()?, Vec::<String>::new());

    // Even where somebody else has everything tracked, what passes between pods and the outside is
    // not seen by the kernel's tracking.
    node.track_everything()?;
    is_masqueraded(&pod, &outside, &node)?;
    let entries = node.tracked()?;
    let of_ours = |entry: &&String| entry.contains(" dport=8080 ") || entry.contains("icmp");
    let ours: Vec<&String> = entries.iter().filter(of_ours).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    // That the tracking works at all is seen by what the node itself asks.
    node.who_answers("tcp", &SocketAddr::new(outside.ip4, 8080).to_string())?;
    eventually("the node's own connection is tracked", || {
        let entries = node.tracked()?;
        ensure!(entries.iter().any(|entry| of_ours(&entry)), "{entries:#?}");
        Ok(())
    })?;
    // Nor is what pods send with their own addresses.
    reaches(&pod, &inside)?;
    reaches(&inside, &pod)?;
    nobody_tracks(&net)?;
    // Who knows the way to a pod and dials it is answered by it, on the way that it came: where what is
    // part of nothing that the kernel tracks is dropped, as kube-proxy does, that makes no difference.
    outside.run("ip", &["route", "add", &v4, "via", &node.ip4.to_string()])?;
    outside.run("ip", &["route", "add", &v6, "via", &node.ip6.to_string()])?;
    for iptables in ["iptables", "ip6tables"] {
        let rule = ["-I", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID"];
        node.run(iptables, &[&rule[..], &["-j", "DROP"]].concat())?;
    }
    reaches(&outside, &pod)?;
    for ip in [pod.ip4, pod.ip6] {
        let to = SocketAddr::new(ip, 8080).to_string();
        let answer = outside.ask("udp", &to, &["--size", "4000"])?;
        assert_eq!(text(&answer, "reached"), "4000", "{to}: {answer}");
        let echo = outside.ask("icmp", &to, &["--size", "4000"])?;
        assert_eq!(echo["reached"], 4000, "{to}: {echo}");
    }
    // What the pod asks there itself has the node's address all the same.
    is_masqueraded(&pod, &outside, &node)?;
    net.nothing_was_dropped()
}

#[test]
fn tunnels_of_other_networks_lead_nowhere() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = penstock_testbed::Testbed::new()?;
    let stranger = testbed.client()?;
    let nodes = vec![testbed.network_node()?];
    let net = Net::on(testbed, nodes, &[], &[0])?;
    let (pod, node) = (&net.pods[0].host, &net.nodes[0].host);
    let tunnel = |vni: &str| -> Result<()> {
        let to = node.ip4.to_string();
        let own = ["id", vni, "dstport", "4789", "remote", &to];
        stranger.run(
            "ip",
            &[&["link", "add", "t0", "type", "vxlan"][..], &own].concat(),
        )?;
        let mac = ["address", "02:50:53:00:00:02"];
        stranger.run("ip", &[&["link", "set", "t0", "up"][..], &mac].concat())?;
        stranger.run("ip", &["address", "add", "10.99.0.1/24", "dev", "t0"])?;
        let pod = pod.ip4.to_string();
        stranger.run("ip", &["route", "add", &pod, "dev", "t0"])?;
        let to = ["lladdr", "02:50:53:00:00:01", "nud", "permanent"];
        stranger.run(
            "ip",
            &[&["neigh", "add", &pod, "dev", "t0"][..], &to].concat(),
        )?;
        Ok(())
    };
    let to = SocketAddr::new(pod.ip4, 8080).to_string();
    tunnel("77")?;
    let answer = stranger.ask("tcp", &to, &[])?;
    assert!(!text(&answer, "error").is_empty(), "{answer}");
    assert!(net.agents[0].count("tunnel_forged")? > 0);
    Ok(())
}

/// A pod asks somebody outside, who sees its node, in packets of every kind and size.
fn is_masqueraded(pod: &Host, outside: &Host, node: &Host) -> Result<()> {
    for (ip, source) in asked(pod, outside)? {
        assert_eq!(source, same_family(node, ip));
    }
    for ip in [outside.ip4, outside.ip6] {
        let to = SocketAddr::new(ip, 8080).to_string();
        let answer = pod.ask("udp", &to, &["--size", "4000"])?;
        assert_eq!(text(&answer, "reached"), "4000", "{to}: {answer}");
        // Nobody listens there: the error finds its way back.
        let to = SocketAddr::new(ip, 9).to_string();
        for protocol in ["tcp", "udp-connected"] {
            let answer = pod.ask(protocol, &to, &[])?;
            assert_eq!(
                text(&answer, "error"),
                "connection refused",
                "{to} {answer}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_network_that_routes_pods_sees_them() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = penstock_testbed::Testbed::new()?;
    let outside = testbed.client()?;
    let nodes = vec![testbed.network_node()?];
    let mut net = Net::on(testbed, nodes, &["--no-masquerade"], &[0])?;
    let server = outside.serve(8080)?;
    net.keep(server);
    let node = &net.nodes[0];
    let (v4, v6) = node.pod_ranges();
    for (range, via) in [(v4, node.host.ip4), (v6, node.host.ip6)] {
        outside.run("ip", &["route", "add", &range, "via", &via.to_string()])?;
    }
    reaches(&net.pods[0].host, &outside)?;
    reaches(&outside, &net.pods[0].host)?;
    assert_eq!(net.agents[0].count("masqueraded")?, 0);
    net.nothing_was_dropped()
}
