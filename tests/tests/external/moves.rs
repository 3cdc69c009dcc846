//! What a change of endpoints, policies or hints does to clients of UDP, who have no connections that would
//! end: they leave a backend that is gone, and no other.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use penstock_common::Forwarding;
use penstock_testbed::{Host, Service, eventually, frontends, list, require_kernel};
use serde_json::{Value, json};

use crate::{
    crowd::{self, Crowd},
    stage::{Pods, Stage, ask, ask_by, same_family, stand_in},
};

/// The first of the ports that clients ask from all the time.
const PORT: u16 = 45_000;
/// The ways of asking that have no connection.
const PROTOCOLS: [&str; 2] = ["udp", "udp-connected"];

#[test]
fn clients_outside_leave_a_backend_that_is_gone() -> Result<()> {
    leave("off")
}

#[test]
fn clients_outside_leave_a_backend_that_is_gone_past_xdp() -> Result<()> {
    leave("generic")
}

fn leave(xdp: &str) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::with(Pods::Wired, &["--xdp", xdp])?;
    stage.client.without_checksum_offload("eth0")?;
    let [here, far] = stage.servers.clone();
    let other = stage.server(1)?;
    for way in [Forwarding::Snat, Forwarding::Tunnel, Forwarding::Dsr] {
        // From one node to the other and back, and from the last to the next way's first on one node.
        for pod in [&other, &here, &far] {
            stage.web(&[pod], |web| {
                web.annotation("penstock.io/forwarding", way.label())
            })?;
            stage.agents[0].wait_until_settled()?;
            let before = stage.agents[0].count("external_xdp")?;
            for (to, port) in stage.addresses("udp").into_iter().zip(PORT..) {
                // By the next datagram already, and on.
                for _ in 0..2 {
                    let what = || format!("{way:?} to {to}, served by {}", pod.host.name);
                    let answer = ask_by(&stage.client, port, "udp", to).with_context(what)?;
                    ensure!(answer.server == pod.host.name, "{}: {answer:?}", what());
                    let is_spoken_for = way == Forwarding::Snat && pod.node != here.node;
                    let source = if is_spoken_for {
                        stand_in(&stage, true, to)
                    } else {
                        same_family(&stage.client, to.ip())
                    };
                    ensure!(answer.source == source, "{}: {answer:?}", what());
                }
            }
            let is_by_xdp = stage.agents[0].count("external_xdp")? > before;
            let is_for_xdp = way == Forwarding::Snat && pod.node != here.node;
            ensure!(is_by_xdp == (is_for_xdp && xdp != "off"), "{way:?}");
        }
    }
    Ok(())
}

#[test]
fn clients_stay_with_a_backend_that_new_ones_do_not_get() -> Result<()> {
    stay("off")
}

#[test]
fn clients_stay_with_a_backend_that_new_ones_do_not_get_past_xdp() -> Result<()> {
    stay("generic")
}

/// What becomes of a service, and of its endpoints by their places.
type Change = (&'static str, fn(Service) -> Service, fn(usize, &mut Value));

/// What leaves new clients the first backend alone.
const CHANGES: [Change; 4] = [
    (
        "it terminates, and still serves",
        |web| web,
        |place, endpoint| {
            if place == 1 {
                endpoint["conditions"] =
                    json!({ "ready": false, "serving": true, "terminating": true });
            }
        },
    ),
    (
        "policies want another one",
        |web| {
            web.set("externalTrafficPolicy", "Local")
                .set("internalTrafficPolicy", "Local")
        },
        |_, _| (),
    ),
    (
        "hints for nodes do",
        |web| web,
        |place, endpoint| {
            let node = ["node1", "node2"][place];
            endpoint["hints"] = json!({ "forNodes": [{ "name": node }] });
        },
    ),
    (
        "hints for zones do",
        |web| web,
        |place, endpoint| {
            let zone = ["z1", "z2"][place];
            endpoint["hints"] = json!({ "forZones": [{ "name": zone }] });
        },
    ),
];

fn stay(xdp: &str) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, &["--xdp", xdp])?;
    stage.client.without_checksum_offload("eth0")?;
    let nodes = stage.nodes.iter().map(|node| {
        let mut object = node.object();
        let zone = format!("z{}", node.number);
        object["metadata"]["labels"] = json!({ "topology.kubernetes.io/zone": zone });
        object
    });
    stage.nodes[0].manifest("nodes.json", &list(&nodes.collect::<Vec<Value>>()))?;
    let [here, there] = &stage.servers;
    stage.agents[0].wait_for_hooks(&[&stage.guests[0], &stage.guests[1]])?;
    // Who asks twice gets both, if there are two.
    let turns = |web: Service| web.annotation("penstock.io/algorithm", "round-robin");
    stage.web(&[there], turns)?;
    // Those of a pod each: nobody sees what a pod sends to other pods past its services.
    let by_socket = &stage.guests[0].host;
    let by_packet = &stage.guests[1].host.without_socket_hooks();
    let cluster = frontends(10, 80);
    let outside = stage.addresses("udp");
    let clients: [(&str, &Host, &[SocketAddr]); 3] = [
        ("sockets", by_socket, &cluster),
        ("packets", by_packet, &cluster),
        ("outside", &stage.client, &outside),
    ];
    let mut crowds = Vec::new();
    for protocol in PROTOCOLS {
        for (name, host, to) in clients {
            crowds.push(Crowd::new(name, host, protocol, to, 4 * to.len())?);
        }
    }
    let new_ones_get = |wanted: &[&str]| {
        eventually("new clients get no other backend", || {
            for (_, host, to) in clients {
                for to in to {
                    for number in 0..2 * wanted.len() {
                        let answer = ask(host, PROTOCOLS[number % 2], *to)?;
                        let wanted = wanted.contains(&answer.server.as_str());
                        ensure!(wanted, "{to} from {}: {answer:?}", host.name);
                    }
                }
            }
            Ok(())
        })
    };
    let sent = stage.agents[0].count("external_xdp")?;
    for (what, change, endpoint) in CHANGES {
        stage.web_of(&[here, there], |web| change(turns(web)), endpoint)?;
        new_ones_get(&[&here.host.name])?;
        crowd::ask(&mut crowds, what)?;
    }
    ensure!((stage.agents[0].count("external_xdp")? > sent) == (xdp != "off"));
    Ok(())
}
