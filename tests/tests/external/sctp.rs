//! SCTP at node ports and load balancers' addresses, by packets of raw sockets.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Checksum, SctpEnd, Service, Slice, chunk, eventually, list, require_kernel,
};

use crate::stage::{BALANCER, Pods, Stage, same_family};

const SERVICE_PORT: u16 = 3868;
const POD_PORT: u16 = 2905;

#[test]
fn clients_outside_reach_sctp_services() -> Result<()> {
    reach(Pods::Routed, &[])
}

#[test]
fn clients_outside_reach_sctp_services_behind_the_overlay() -> Result<()> {
    reach(Pods::Wired, &[])
}

#[test]
fn clients_outside_reach_sctp_services_by_xdp() -> Result<()> {
    reach(Pods::Routed, &["--xdp", "generic"])
}

fn reach(pods: Pods, options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(pods, options)?;
    let is_xdp = options.contains(&"--xdp");
    let node = &stage.nodes[0].host;
    let mut items = Vec::new();
    for (number, server) in stage.servers.iter().enumerate() {
        let name = ["here", "there"][number];
        let service = Service::new(name, 20 + number as u8);
        let service = service.port("calls", SERVICE_PORT + number as u16, "SCTP");
        items.push(service.balanced(30_090 + number as u16, &BALANCER).json());
        for is_v4 in [true, false] {
            let slice = Slice::new(name, is_v4).port("calls", POD_PORT, "SCTP");
            items.push(slice.pod(server).json());
        }
    }
    stage.nodes[0].manifest("calls.json", &list(&items))?;
    for (number, server) in stage.servers.iter().enumerate() {
        let mut addresses = Vec::new();
        for ip in [node.ip4, node.ip6] {
            addresses.push(SocketAddr::new(ip, 30_090 + number as u16));
        }
        for ip in BALANCER {
            addresses.push(SocketAddr::new(ip.parse()?, SERVICE_PORT + number as u16));
        }
        for (to, port) in addresses.into_iter().zip(40_000..) {
            let is_v4 = to.is_ipv4();
            let client = SctpEnd::new(&stage.client, is_v4, port)?;
            let server = SctpEnd::new(&server.host, is_v4, POD_PORT)?;
            eventually("the service is there", || {
                client.send(to, chunk::INIT, &[7; 16], false)?;
                server.receive()?.context("nothing came").map(drop)
            })?;
            let right = Checksum::Right;
            let seen = client.reaches(to, &server, chunk::INIT, &[7; 16], right)?;
            // One of the same node sees who asks, one elsewhere this node.
            let client_ip = same_family(&stage.client, to.ip());
            assert_eq!(seen.ip() == client_ip, number == 0, "{to}: {seen}");
            let answers = |kind, payload: &[u8], checksum| -> Result<()> {
                let source = server.reaches(seen, &client, kind, payload, checksum)?;
                ensure!(source == to, "{source} for {to}");
                Ok(())
            };
            answers(chunk::INIT_ACK, &[8; 40], right)?;
            for length in [1, 2, 3, 100, 1_200] {
                let payload = vec![length as u8; length];
                let source = client.reaches(to, &server, chunk::DATA, &payload, right)?;
                assert_eq!(source, seen, "{to}");
                answers(chunk::SACK, &payload, right)?;
            }
            let open = Checksum::LeftOpen;
            let source = client.reaches(to, &server, chunk::DATA, b"later", open)?;
            assert_eq!(source, seen, "{to}");
            answers(chunk::SACK, b"later", open)?;
        }
    }
    let agent = &stage.agents[0];
    assert!(agent.count("external_request")? > 0 && agent.count("external_reply")? > 0);
    assert_eq!(agent.count("external_xdp")? > 0, is_xdp);
    assert_eq!(agent.count("rewrite_failed")?, 0);
    Ok(())
}
