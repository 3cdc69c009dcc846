//! Frames with a VLAN's tag: they are no traffic of the interface that they come in by, but of the VLAN's own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{Host, PROTOCOLS, eventually, require_kernel, require_vlans};

use crate::stage::{Answer, Pods, Stage, all_answers};

/// The VLAN.
const VLAN: u16 = 5;
/// The client's and the first node's addresses there.
const CLIENT: [&str; 2] = ["172.31.5.201", "fd00:31:5::201"];
const NODE: [&str; 2] = ["172.31.5.11", "fd00:31:5::11"];
/// "web"'s port for UDP.
const PORT: u16 = 30_081;

fn v4(ip: IpAddr) -> Result<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Ok(ip),
        IpAddr::V6(_) => anyhow::bail!("{ip} is of the other family"),
    }
}

/// The client's datagram to "web" at the first node, with a tag or without.
fn frame(stage: &Stage, tag: Option<u16>) -> Result<Vec<u8>> {
    let payload = b"?";
    let (client, node) = (&stage.client, &stage.nodes[0].host);
    let length = 20 + 8 + u16::try_from(payload.len())?;
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    // No fragment; 64 hops; UDP.
    header.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    header.extend(v4(client.ip4)?.octets());
    header.extend(v4(node.ip4)?.octets());
    let words = header.chunks(2);
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = node.ethernet("eth0")?;
    frame.extend(client.ethernet("eth0")?);
    if let Some(tag) = tag {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(PORT.to_be_bytes());
    frame.extend((length - 20).to_be_bytes());
    // IPv4 may do without the checksum.
    frame.extend([0, 0]);
    frame.extend(payload);
    Ok(frame)
}

#[test]
fn what_is_tagged_is_not_the_interfaces() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    // Not at XDP, which can't see a tag that was taken off, and is on no interface that has VLANs.
    let stage = Stage::new(Pods::Routed)?;
    for backend in &stage.servers {
        stage.web(&[backend], |web| web)?;
        let count = || stage.agents[0].count("external_request");
        let send = |tag| stage.client.send_frame("eth0", &frame(&stage, tag)?);
        // A neighbour may have to be found first.
        let before = count()?;
        eventually("what has no tag is served", || {
            send(None)?;
            ensure!(count()? > before, "{before}");
            Ok(())
        })?;
        let before = count()?;
        for _ in 0..3 {
            send(Some(VLAN))?;
        }
        // What comes after them is served, and they are not.
        send(None)?;
        eventually("the last one is served", || {
            ensure!(count()? > before, "{before}");
            Ok(())
        })?;
        assert_eq!(count()?, before + 1, "{}", backend.host.name);
    }
    Ok(())
}

/// A tag that names no VLAN but a priority only (IEEE 802.1Q, 9.6) leaves a frame the interface's: the kernel takes
/// it as if it had none, and a service has to, too.
#[test]
fn what_has_a_priority_alone_is_the_interfaces() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Routed)?;
    stage.web(&[&stage.servers[0]], |web| web)?;
    let count = || stage.agents[0].count("external_request");
    for tag in [None, Some(5 << 13)] {
        let before = count()?;
        eventually("it is served", || {
            stage.client.send_frame("eth0", &frame(&stage, tag)?)?;
            ensure!(count()? > before, "{tag:?}: {before}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Puts a host into the VLAN.
fn join(host: &Host, addresses: [&str; 2]) -> Result<()> {
    let link = format!("eth0.{VLAN}");
    let lines = [
        format!("link add link eth0 name {link} type vlan id {VLAN}"),
        format!("addr add {}/24 dev {link}", addresses[0]),
        format!("addr add {}/64 dev {link} nodad", addresses[1]),
        format!("link set {link} up"),
    ];
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        host.run("ip", &words)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a kernel with VLANs, as `cargo xtask kernels` has"]
fn clients_of_a_vlan_reach_node_ports() -> Result<()> {
    vlan(&[])
}

#[test]
#[ignore = "needs a kernel with VLANs, as `cargo xtask kernels` has"]
fn clients_of_a_vlan_reach_node_ports_past_xdp() -> Result<()> {
    vlan(&["--xdp", "generic"])
}

fn vlan(options: &[&str]) -> Result<()> {
    let Some(()) = require_vlans() else {
        return Ok(());
    };
    let ranges = ["--nodeport-addresses", "172.31.5.0/24,fd00:31:5::/64"];
    let stage = Stage::with(Pods::Routed, &[&ranges, options].concat())?;
    join(&stage.client, CLIENT)?;
    join(&stage.nodes[0].host, NODE)?;
    stage.client.without_checksum_offload("eth0")?;
    let [here, there] = &stage.servers;
    stage.web(&[here, there], |web| web)?;
    eventually("the VLAN's interface has its hooks", || {
        let status = stage.agents[0].status()?;
        let mut interfaces = status["interfaces"].as_array().into_iter().flatten();
        let vlan = interfaces.find(|one| one["name"] == format!("eth0.{VLAN}"));
        ensure!(vlan.context("the VLAN")?["attached"] == true, "{status}");
        Ok(())
    })?;
    let node = &stage.nodes[0].host;
    for protocol in PROTOCOLS {
        let port = if protocol == "tcp" { PORT - 1 } else { PORT };
        for (client, own) in CLIENT.into_iter().zip(NODE) {
            let (client, own): (IpAddr, IpAddr) = (client.parse()?, own.parse()?);
            // Whoever is of the other node sees the address by which this one reaches it.
            let outer = if own.is_ipv4() { node.ip4 } else { node.ip6 };
            let expected = [(here, client), (there, outer)].map(|(backend, source)| Answer {
                server: backend.host.name.clone(),
                source,
            });
            let to = SocketAddr::new(own, port);
            eventually("the node port answers", || {
                all_answers(&stage.client, protocol, to, &expected.clone().into())
            })?;
        }
    }
    for host in [&stage.client, &here.host, &there.host] {
        assert_eq!(host.checksum_errors()?, 0, "{}", host.name);
    }
    Ok(())
}
