//! SCTP services end to end, in namespaces, by packets of raw sockets: pods reach cluster addresses.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use penstock_testbed::{
    Checksum, Node, Pod, Scene, SctpEnd, Service, Slice, chunk, eventually, frontends, list,
    require_kernel, text,
};
use serde_json::Value;

const SERVICE_PORT: u16 = 3868;
const POD_PORT: u16 = 2905;

/// A service of each of these pods, with the tenth address and those after it.
fn serve(scene: &Scene, pods: &[(&str, Option<&Pod>)]) -> Result<()> {
    let mut items = Vec::new();
    for (number, (name, pod)) in pods.iter().enumerate() {
        let service = Service::new(name, 10 + number as u8);
        items.push(service.port("calls", SERVICE_PORT, "SCTP").json());
        for is_v4 in [true, false] {
            let mut slice = Slice::new(name, is_v4).port("calls", POD_PORT, "SCTP");
            if let Some(pod) = pod {
                slice = slice.pod(pod);
            }
            items.push(slice.json());
        }
    }
    scene.nodes[0].manifest("all.json", &list(&items))
}

/// The state of a client's flow, as an operator sees it.
fn state(node: &Node, client: SocketAddr) -> Result<String> {
    let options = ["--proto", "sctp", "-o", "json"];
    let said = node.penstock("conntrack", &options)?;
    let rows: Value = serde_json::from_str(&said.output)?;
    let rows = rows.as_array().context("a list")?;
    let mut own = rows
        .iter()
        .filter(|row| row["client"] == client.to_string());
    let row = own.next().with_context(|| format!("{client}: {rows:?}"))?;
    ensure!(own.next().is_none(), "{client} has two flows: {rows:?}");
    Ok(text(row, "state").to_owned())
}

#[test]
fn pods_reach_sctp_services_and_every_checksum_is_right() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    let [near, far] = &scene.servers;
    let pods = [
        ("near", Some(near)),
        ("far", Some(far)),
        ("own", Some(&scene.client)),
        ("nobody", None),
    ];
    serve(&scene, &pods)?;
    let agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    for (number, (name, pod)) in pods.iter().enumerate() {
        for (to, port) in frontends(10 + number as u8, SERVICE_PORT)
            .into_iter()
            .zip(40_000 + 10 * number as u16..)
        {
            let is_v4 = to.is_ipv4();
            let client = SctpEnd::new(&scene.client.host, is_v4, port)?;
            let Some(pod) = pod else {
                // As kube-proxy's rules do: an ICMP error, which quotes enough for a client to know it.
                client.connect(to.ip())?;
                eventually("the service is refused", || {
                    client.send(to, chunk::INIT, &[7; 16], false)?;
                    let error = client.receive().err().context("no error")?;
                    ensure!(
                        error.downcast_ref() == Some(&Errno::ECONNREFUSED),
                        "{error}"
                    );
                    Ok(())
                })?;
                continue;
            };
            let server = SctpEnd::new(&pod.host, is_v4, POD_PORT)?;
            let (right, open) = (Checksum::Right, Checksum::LeftOpen);
            eventually("the service is there", || {
                client.send(to, chunk::INIT, &[7; 16], false)?;
                server.receive()?.context("nothing came").map(drop)
            })?;
            assert_eq!(state(node, client.own)?, "embryonic", "{name}");
            let seen = client.reaches(to, &server, chunk::INIT, &[7; 16], right)?;
            if *name == "own" {
                // It is asked by its node, as with TCP.
                let node = if is_v4 { node.host.ip4 } else { node.host.ip6 };
                assert_eq!(seen.ip(), node);
            } else {
                assert_eq!(seen, client.own);
            }
            let asks = |kind, payload: &[u8], checksum| -> Result<()> {
                let source = client.reaches(to, &server, kind, payload, checksum)?;
                ensure!(source == seen, "{name}: {source}");
                Ok(())
            };
            let answers = |kind, payload: &[u8], checksum| -> Result<()> {
                let source = server.reaches(seen, &client, kind, payload, checksum)?;
                ensure!(source == to, "{name}: {source}");
                Ok(())
            };
            answers(chunk::INIT_ACK, &[8; 40], right)?;
            assert_eq!(state(node, client.own)?, "established", "{name}");
            asks(chunk::COOKIE_ECHO, &[9; 100], right)?;
            answers(chunk::COOKIE_ACK, &[], right)?;
            // Each residue of the length, and whole packets.
            for length in (1..20).chain([255, 256, 257, 1_024, 1_300]) {
                let payload: Vec<u8> = (0..length).map(|at| (at * 31 + length) as u8).collect();
                asks(chunk::DATA, &payload, right)?;
                answers(chunk::SACK, &payload, right)?;
            }
            // What an interface is to complete it completes after all changes.
            asks(chunk::DATA, b"later", open)?;
            answers(chunk::SACK, b"later", open)?;
            asks(chunk::SHUTDOWN, &[1; 4], right)?;
            assert_eq!(state(node, client.own)?, "half-closed", "{name}");
            answers(chunk::SHUTDOWN_ACK, &[], right)?;
            asks(chunk::SHUTDOWN_COMPLETE, &[], right)?;
            assert_eq!(state(node, client.own)?, "closing", "{name}");
            // The same port again, and this time it is broken off.
            asks(chunk::INIT, &[7; 16], right).or_else(|_| {
                // A pod that reaches itself may get another port.
                let again = client.reaches(to, &server, chunk::INIT, &[7; 16], right)?;
                ensure!(again.ip() == seen.ip(), "{again}");
                Ok::<_, anyhow::Error>(())
            })?;
            assert_eq!(state(node, client.own)?, "embryonic", "{name}");
            client.send(to, chunk::ABORT, &[], false)?;
            server.receive()?.context("the abort is lost")?;
            assert_eq!(state(node, client.own)?, "closing", "{name}");
        }
    }
    assert!(agent.count("packet_request")? > 0 && agent.count("packet_reply")? > 0);
    assert_eq!(agent.count("rewrite_failed")?, 0);
    assert!(agent.count("no_endpoints")? > 0);
    Ok(())
}
