//! Large segments stay whole on their way, and who sends what does not fit is told.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use penstock_testbed::{Host, frontends, require_kernel, text};
use serde_json::Value;

use crate::net::Net;

/// What one stream carries.
const BYTES: u64 = 64 << 20;

#[test]
fn large_segments_cross_the_overlay_whole() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let [client, far] = [0, 2].map(|index: usize| net.pods[index].clone());
    let drain = far.host.drain(9000)?;
    net.keep(drain);
    for ip in [far.host.ip4, far.host.ip6] {
        let at = SocketAddr::new(ip, 9000);
        let sent = poured(&client.host, at, &net.nodes[0].host, "penstock0")?;
        assert!(sent.mean > 8_000, "{at}: frames of {} bytes", sent.mean);
        eprintln!(
            "{at}: {:.1} Gbit/s, frames of {} bytes",
            sent.gigabits, sent.mean
        );
    }
    // A network interface that can neither compute checksums nor segment: each frame is made, and
    // its checksums are verified, one by one.
    let off = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"];
    for node in &net.nodes {
        node.host
            .run("ethtool", &[&["-K", "eth0"], &off[..]].concat())?;
    }
    for ip in [far.host.ip4, far.host.ip6] {
        let at = SocketAddr::new(ip, 9000);
        let sent = poured(&client.host, at, &net.nodes[0].host, "eth0")?;
        assert!(sent.mean <= 1_514, "{at}: frames of {} bytes", sent.mean);
        eprintln!("{at}: {:.1} Gbit/s one by one", sent.gigabits);
    }
    for pod in &net.pods {
        assert_eq!(pod.checksum_errors()?, 0, "{}", pod.host.name);
    }
    net.nothing_was_dropped()
}

#[test]
fn joined_datagrams_cross_the_overlay() -> Result<()> {
    const COUNT: usize = 16;
    const SIZE: usize = 1_200;
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let net = Net::new(&[])?;
    let [client, far] = [0, 2].map(|index: usize| net.pods[index].clone());
    net.service("web", 10, &[&far])?;
    // By its own address, and by a service's that is translated packet by packet.
    let by_packet = client.host.without_socket_hooks();
    let ways: Vec<(&Host, SocketAddr)> = [far.host.ip4, far.host.ip6]
        .map(|ip| (&client.host, SocketAddr::new(ip, 8080)))
        .into_iter()
        .chain(frontends(10, 80).map(|service| (&by_packet, service)))
        .collect();
    let node = &net.nodes[0].host;
    let all_arrive = |interface: &str| -> Result<Vec<u64>> {
        let frames = ways.iter().map(|(from, to)| {
            // Neighbours are found first.
            from.who_answers("udp", &to.to_string())?;
            let before = transmitted(node, interface)?.1;
            let reached = from.burst(&to.to_string(), COUNT, SIZE)?;
            assert_eq!(reached, [SIZE; COUNT], "{to}");
            Ok(transmitted(node, interface)?.1 - before)
        });
        frames.collect()
    };
    for frames in all_arrive("penstock0")? {
        assert!(frames < COUNT as u64 / 2, "they stay joined: {frames}");
    }
    let requests = net.agents[0].count("packet_request")?;
    assert!(requests >= 2, "the service was met packet by packet");
    // A network interface that joins and cuts nothing: each datagram is a frame, whose checksum is verified.
    let off = ["tx", "off", "tso", "off", "gso", "off", "gro", "off"];
    for node in &net.nodes {
        node.host
            .run("ethtool", &[&["-K", "eth0"], &off[..]].concat())?;
    }
    for frames in all_arrive("eth0")? {
        assert!(frames >= COUNT as u64, "{frames} frames");
    }
    for pod in &net.pods {
        assert_eq!(pod.checksum_errors()?, 0, "{}", pod.host.name);
    }
    net.nothing_was_dropped()
}

/// What was seen of a stream.
struct Sent {
    /// Bytes of a frame.
    mean: u64,
    gigabits: f64,
}

/// Sends a stream, and looks at what an interface of a node's has sent meanwhile.
fn poured(from: &Host, to: SocketAddr, node: &Host, interface: &str) -> Result<Sent> {
    let before = transmitted(node, interface)?;
    let (arrived, seconds) = from.pour(&to.to_string(), BYTES)?;
    assert_eq!(arrived, BYTES, "{to}");
    let after = transmitted(node, interface)?;
    let (bytes, frames) = (after.0 - before.0, after.1 - before.1);
    assert!(bytes > BYTES, "{to} was not reached by {interface}");
    Ok(Sent {
        mean: bytes / frames,
        gigabits: BYTES as f64 * 8.0 / seconds / 1e9,
    })
}

/// Bytes and frames that an interface has sent.
pub fn transmitted(host: &Host, interface: &str) -> Result<(u64, u64)> {
    let text = host.run("ip", &["-j", "-s", "link", "show", "dev", interface])?;
    let links: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let sent = |field: &str| links[0]["stats64"]["tx"][field].as_u64();
    let (bytes, frames) = (sent("bytes"), sent("packets"));
    bytes.zip(frames).with_context(|| text.clone())
}

#[test]
fn who_sends_what_does_not_fit_is_told() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&[])?;
    let [client, far] = [0, 2].map(|index: usize| net.pods[index].clone());
    // By themselves the pods know what fits.
    let mtu = mtu(&client.host, far.host.ip4)?;
    assert_eq!(mtu, 1_430, "the tunnels' headers fit into 1,500");
    // These don't: the links take more than the overlay.
    for pod in [&client, &far] {
        let node = net.nodes.iter().find(|node| node.name() == pod.node);
        let node = &node.expect("a pod has a node").host;
        node.run("ip", &["link", "set", &pod.interface, "mtu", "1500"])?;
        pod.host
            .run("ip", &["link", "set", "eth0", "mtu", "1500"])?;
    }
    learns(&client.host, &far.host, 1_430)?;
    let drain = far.host.drain(9000)?;
    net.keep(drain);
    for ip in [far.host.ip4, far.host.ip6] {
        let (arrived, _) = client
            .host
            .pour(&SocketAddr::new(ip, 9000).to_string(), 1 << 20)?;
        assert_eq!(arrived, 1 << 20);
    }
    Ok(())
}

/// A host whose first datagram of the size of its link is lost learns what fits, and so does one
/// that sends a stream.
pub fn learns(from: &Host, to: &Host, fits: u32) -> Result<()> {
    for (ip, headers) in [(to.ip4, 28), (to.ip6, 48)] {
        assert_eq!(mtu(from, ip)?, 1_500, "{ip}");
        let at = SocketAddr::new(ip, 8080).to_string();
        let size = (1_500 - headers).to_string();
        let ask = |timeout: &str| from.ask("udp", &at, &["--size", &size, "--timeout-ms", timeout]);
        let lost = ask("300")?;
        assert_eq!(
            text(&lost, "error"),
            "operation would block",
            "{at}: {lost}"
        );
        assert_eq!(mtu(from, ip)?, fits, "{ip}: the sender was told");
        // It is sent in pieces from then on.
        let answer = ask("2000")?;
        assert_eq!(text(&answer, "reached"), size, "{at}: {answer}");
    }
    Ok(())
}

/// What a host believes to fit on its way to an address.
pub fn mtu(host: &Host, to: IpAddr) -> Result<u32> {
    let text = host.run("ip", &["-o", "route", "get", &to.to_string()])?;
    let mut words = text.split_whitespace();
    if words.any(|word| word == "mtu") {
        let mtu = words.next().unwrap_or_default();
        return mtu.parse().with_context(|| text.clone());
    }
    let text = host.run("ip", &["-j", "link", "show", "dev", "eth0"])?;
    let links: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let mtu = links[0]["mtu"].as_u64().with_context(|| text.clone())?;
    Ok(u32::try_from(mtu)?)
}
