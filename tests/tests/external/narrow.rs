//! Backends and services outside behind a link that carries less than the one that clients are on.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use penstock_testbed::{
    Agent, Host, Node, Service, Slice, Source, Testbed, eventually, list, require_kernel, text,
};
use serde_json::json;

use crate::stage::ask;

/// What the narrow link carries.
const MTU: u32 = 1_320;
/// Both ends of it, the node's first.
const ENDS: [[&str; 2]; 2] = [["172.29.0.1", "172.29.0.2"], ["fd00:29::1", "fd00:29::2"]];

/// Connects a host with a node by a link of its own.
fn narrow_link(node: &Host, host: &Host) -> Result<()> {
    let mtu = MTU.to_string();
    let link = ["link", "add", "narrow", "mtu", &mtu, "type", "veth"];
    let peer = ["peer", "name", "narrow", "mtu", &mtu, "netns", &host.name];
    node.run("ip", &[&link[..], &peer[..]].concat())?;
    for (number, end) in [node, host].into_iter().enumerate() {
        for (ips, bits) in ENDS.iter().zip(["24", "64"]) {
            let address = format!("{}/{bits}", ips[number]);
            end.run(
                "ip",
                &["address", "add", &address, "dev", "narrow", "nodad"],
            )?;
        }
        end.run("ip", &["link", "set", "narrow", "up"])?;
    }
    Ok(())
}

/// The same ports as elsewhere, served by that host.
fn serve(node: &Node, agent: &Agent) -> Result<()> {
    let service = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .port("udp", 80, "UDP")
        .balanced(30_080, &[]);
    let mut items = vec![service.json()];
    for ips in ENDS {
        let ip: IpAddr = ips[1].parse()?;
        let mut slice = Slice::new("web", ip.is_ipv4())
            .port("tcp", 8080, "TCP")
            .port("udp", 8080, "UDP")
            .json();
        slice["endpoints"] = json!([{ "addresses": [ip.to_string()] }]);
        items.push(slice);
    }
    node.manifest("web.json", &list(&items))?;
    eventually("the service is served", || {
        let ports = agent.show("services")?.to_string();
        ensure!(ENDS.iter().all(|ips| ports.contains(ips[1])), "{ports}");
        Ok(())
    })
}

#[test]
fn who_sends_what_does_not_fit_the_way_to_a_backend_is_told() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for xdp in ["off", "generic"] {
        let mut testbed = Testbed::new()?;
        let (client, backend) = (testbed.client()?, testbed.client()?);
        let node = testbed.node()?;
        narrow_link(&node.host, &backend)?;
        node.knows(&[&node])?;
        let agent = Agent::start(&node, &Source::Manifests, &["--xdp", xdp])?;
        serve(&node, &agent)?;
        let server = backend.serve(8080)?;
        for (ip, headers, ends) in [(node.host.ip4, 28, ENDS[0]), (node.host.ip6, 48, ENDS[1])] {
            let to = SocketAddr::new(ip, 30_080);
            let answer = ask(&client, "tcp", to)?;
            assert_eq!(answer.source.to_string(), ends[0], "{to}, XDP {xdp}");
            // Its first datagram is too long, and so is the next one, until it has heard of that.
            let to = SocketAddr::new(ip, 30_081).to_string();
            let size = (1_500 - headers).to_string();
            let try_it =
                |time: &str| client.ask("udp", &to, &["--size", &size, "--timeout-ms", time]);
            let lost = try_it("300")?;
            assert_eq!(
                text(&lost, "error"),
                "operation would block",
                "{to}: {lost}"
            );
            let route = client.run("ip", &["-o", "route", "get", &ip.to_string()])?;
            assert!(
                route.contains(&format!("mtu {MTU}")),
                "{to}, XDP {xdp}: {route}"
            );
            let answer = try_it("2000")?;
            assert_eq!(text(&answer, "reached"), size, "{to}: {answer}");
        }
        drop(server);
    }
    Ok(())
}
