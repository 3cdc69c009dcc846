//! Nodes that come and go, and agents that are killed.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use penstock_testbed::{
    Agent, ApiServer, Container, Host, Node, PluginError, Pod, Service, Slice, Source, Testbed,
    eventually, frontends, require_api_server, require_kernel,
};

use crate::{
    net::{Net, reaches},
    undisturbed::undisturbed,
};

#[test]
fn nodes_come_and_go() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let [client, near, far] = [0, 1, 2].map(|index: usize| net.pods[index].clone());
    reaches(&client.host, &far.host)?;
    let [first, second] = [0, 1].map(|index: usize| net.nodes[index].clone());
    undisturbed(&[(&client.host, &near.host)], || {
        first.knows(&[&first])?;
        is_out_of_reach(&client.host, &far.host)?;
        first.knows(&[&first, &second])?;
        is_reached(&client.host, &far.host)
    })?;

    // A third one joins while the others talk.
    let third = net.testbed.network_node()?;
    net.nodes.push(third.clone());
    undisturbed(
        &[(&client.host, &near.host), (&client.host, &far.host)],
        || {
            net.all_know_all()?;
            net.agents
                .push(Agent::start_network(&third, &Source::Manifests, &[])?);
            let pod = net.pod(2)?;
            for old in [&client, &near, &far] {
                is_reached(&old.host, &pod.host)?;
                is_reached(&pod.host, &old.host)?;
            }
            Ok(())
        },
    )?;
    Ok(())
}

/// Waits until a host gets no answer.
fn is_out_of_reach(from: &Host, to: &Host) -> Result<()> {
    for ip in [to.ip4, to.ip6] {
        let at = SocketAddr::new(ip, 8080).to_string();
        eventually("it is out of reach", || {
            let answer = from.ask("tcp", &at, &["--timeout-ms", "200"])?;
            ensure!(answer.get("error").is_some(), "{at}: {answer}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Waits until a host is answered, whatever it speaks.
fn is_reached(from: &Host, to: &Host) -> Result<()> {
    for ip in [to.ip4, to.ip6] {
        let at = SocketAddr::new(ip, 8080).to_string();
        eventually("it is reached", || from.who_answers("tcp", &at))?;
    }
    reaches(from, to)
}

#[test]
fn an_api_server_tells_who_the_nodes_are() -> Result<()> {
    let Some(assets) = require_api_server() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let host = testbed.client()?;
    let mut api = ApiServer::start(&assets, &host, testbed.folder())?;
    let source = Source::Kubeconfig(api.kubeconfig());
    let nodes = [testbed.network_node()?, testbed.network_node()?];
    let mut agents = Vec::new();
    let mut pods: Vec<Pod> = Vec::new();
    let mut servers = Vec::new();
    for node in &nodes {
        api.create(&node.object())?;
        agents.push(Agent::start_network(node, &source, &[])?);
        let pod = testbed.network_pod(node)?;
        servers.push(pod.host.serve(8080)?);
        pods.push(pod);
    }
    let [here, there] = pods.as_slice() else {
        panic!("there are two pods");
    };
    is_reached(&here.host, &there.host)?;
    is_reached(&there.host, &here.host)?;

    let web = Service::new("web", 10).port("tcp", 80, "TCP");
    api.apply(&web.port("udp", 80, "UDP").json())?;
    for slice in Slice::both("web", 8080, &[there]) {
        api.apply(&slice)?;
    }
    for host in [here.host.clone(), here.host.without_socket_hooks()] {
        for service in frontends(10, 80).map(|service| service.to_string()) {
            let server = eventually("the service is there", || host.who_answers("tcp", &service))?;
            assert_eq!(server, there.host.name);
        }
    }

    // Its restart is no end of the nodes.
    undisturbed(&[(&here.host, &there.host)], || api.restart())?;
    api.delete("node", &nodes[1].name())?;
    is_out_of_reach(&here.host, &there.host)?;
    api.create(&nodes[1].object())?;
    is_reached(&here.host, &there.host)
}

#[test]
fn killing_agents_disturbs_no_pod() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let [client, near, far] = [0, 1, 2].map(|index: usize| net.pods[index].clone());
    let node = net.nodes[0].clone();
    let waiting = net.testbed.container_on(&node)?;
    let outside = net.testbed.client()?;
    let server = outside.serve(8080)?;
    net.keep(server);
    let others = [&near.host, &far.host, &outside];
    undisturbed(&others.map(|other| (&client.host, other)), || {
        for _ in 0..5 {
            net.agents.iter_mut().for_each(Agent::kill);
            is_refused_for_now(&node, &waiting)?;
            reaches(&client.host, &far.host)?;
            net.agents.iter_mut().try_for_each(Agent::restart)?;
        }
        Ok(())
    })?;
    node.plugin()?.add(&waiting)?;
    node.plugin()?.del(&waiting)?;
    net.nothing_was_dropped()
}

/// Without an agent no pod comes, and the runtime is told that this will pass; one can go.
fn is_refused_for_now(node: &Node, container: &Container) -> Result<()> {
    let plugin = node.plugin()?;
    let code = |result: Result<()>| {
        let error = result.expect_err("there is no agent");
        error.downcast::<PluginError>().map(|error| error.code)
    };
    assert_eq!(code(plugin.status())?, 50, "plugin not available");
    assert_eq!(
        code(plugin.add(container).map(drop))?,
        11,
        "try again later"
    );
    plugin.del(container)
}
