//! Routing without tunnels where the nodes' network allows it.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::Result;
use penstock_testbed::{Node, require_kernel};

use crate::{
    net::{Net, nobody_tracks, reaches},
    size::{learns, transmitted},
};

#[test]
fn neighbours_need_no_tunnel() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = penstock_testbed::Testbed::new()?;
    let near = [testbed.network_node()?, testbed.network_node()?];
    let far = testbed.far_network_node(&[&near[0], &near[1]])?;
    let outside = testbed.client()?;
    let [first, second] = near;
    let nodes = vec![first, second, far];
    let mut net = Net::on(testbed, nodes, &["--routing", "native"], &[0, 1, 2])?;
    let server = outside.serve(8080)?;
    net.keep(server);
    let [here, neighbour, far] = net.pods.clone().try_into().expect("three pods");

    for node in &net.nodes {
        node.host.track_everything()?;
    }
    let tunnelled = |node: &Node| Ok::<_, anyhow::Error>(transmitted(&node.host, "penstock0")?.1);
    reaches(&here.host, &neighbour.host)?;
    reaches(&neighbour.host, &here.host)?;
    assert_eq!(tunnelled(&net.nodes[0])?, 0, "no packet needed a tunnel");
    assert_eq!(tunnelled(&net.nodes[1])?, 0, "no packet needed a tunnel");
    let ways = ways(&net)?;
    assert_eq!(ways["node2"], ["via 172.31.0.12", "via fd00:31::12"]);
    assert_eq!(ways["node3"], ["tunnel to 172.31.1.13"; 2]);

    for (from, to) in [(&here, &far), (&far, &neighbour), (&far, &here)] {
        reaches(&from.host, &to.host)?;
    }
    assert!(tunnelled(&net.nodes[0])? > 0 && tunnelled(&net.nodes[2])? > 0);
    nobody_tracks(&net)?;
    // Pods' links carry what the nodes' network does, and the tunnels less.
    learns(&here.host, &far.host, 1_430)?;
    let drain = far.host.drain(9000)?;
    net.keep(drain);
    for ip in [far.host.ip4, far.host.ip6] {
        let to = SocketAddr::new(ip, 9000).to_string();
        assert_eq!(here.host.pour(&to, 1 << 20)?.0, 1 << 20, "{to}");
    }
    for (_, source) in crate::net::asked(&here.host, &outside)? {
        let node = &net.nodes[0].host;
        assert!([node.ip4, node.ip6].contains(&source), "{source}");
    }
    net.service("web", 10, &[&neighbour, &far])?;
    for host in [here.host.clone(), here.host.without_socket_hooks()] {
        for service in penstock_testbed::frontends(10, 80) {
            let names = [&neighbour, &far].map(|pod| pod.host.name.clone()).into();
            penstock_testbed::all_answer(&host, "tcp", service, &names)?;
        }
    }
    net.nothing_was_dropped()
}

/// How the first node reaches the others, by `penstock nodes`.
fn ways(net: &Net) -> Result<BTreeMap<String, Vec<String>>> {
    let mut ways: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let nodes = net.agents[0].show("nodes")?;
    for entry in nodes.as_array().into_iter().flatten() {
        let field = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        ways.entry(field("node")).or_default().push(field("by"));
    }
    Ok(ways)
}
