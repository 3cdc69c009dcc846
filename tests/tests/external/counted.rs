//! What is counted of clients outside, by service and by backend: on the node that they come to, and nowhere
//! else.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use penstock_agent::stats::Stats;
use penstock_common::Forwarding;
use penstock_testbed::{Agent, eventually, require_kernel, text};

use crate::{
    forwarding::reached_by,
    stage::{Pods, Stage, ask_by, ports_of_web, same_family},
    xdp::wait_for,
};

/// The first of the ports that clients ask from: one for each question, so that each is a connection.
const PORT: u16 = 45_000;
/// How often each address is asked.
const QUESTIONS: usize = 8;

/// What went to backends, by their addresses.
type ByBackend = BTreeMap<SocketAddr, Stats>;

fn add(to: &mut Stats, one: &Stats) {
    to.connections += one.connections;
    to.flows += one.flows;
    to.request_packets += one.request_packets;
    to.request_bytes += one.request_bytes;
    to.reply_packets += one.reply_packets;
    to.reply_bytes += one.reply_bytes;
}

fn sum(all: &ByBackend) -> Stats {
    let mut sum = Stats::default();
    all.values().for_each(|one| add(&mut sum, one));
    sum
}

/// What an agent says of "web" in one family: in all, and by backend.
fn counted(agent: &Agent, protocol: &str, is_v4: bool) -> Result<(Stats, ByBackend)> {
    let family = if is_v4 { "IPv4" } else { "IPv6" };
    let ports = ports_of_web(agent)?;
    let mut ports = ports.into_iter();
    let port = ports.find(|port| port.protocol == protocol && port.family == family);
    let port = port.with_context(|| format!("{protocol} of {family} is not served"))?;
    let mut backends = ByBackend::new();
    for backend in port.backends {
        let stats = backend.stats.context("a backend's stats")?;
        backends.insert(backend.address.parse()?, stats);
    }
    Ok((port.stats.context("a port's stats")?, backends))
}

/// Asks by UDP from a port of the client's: which backend has answered, and what that is to be counted as.
fn ask(stage: &Stage, port: u16, to: SocketAddr) -> Result<(SocketAddr, Stats)> {
    let options = ["--port", &port.to_string()];
    let answer = stage.client.ask("udp", &to.to_string(), &options)?;
    let words = ["server", "source", "reached"].map(|word| text(&answer, word));
    let mut servers = stage.servers.iter();
    let server = servers.find(|server| server.host.name == words[0]);
    let server = &server.with_context(|| format!("{to}: {answer}"))?.host;
    let headers = if to.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let stats = Stats {
        connections: 1,
        flows: 1,
        request_packets: 1,
        request_bytes: headers + "?".len() as u64,
        reply_packets: 1,
        reply_bytes: headers + words.join(" ").len() as u64,
        ..Stats::default()
    };
    Ok((SocketAddr::new(same_family(server, to.ip()), 8080), stats))
}

/// "web"'s addresses of one family.
fn addresses(stage: &Stage, protocol: &str, is_v4: bool) -> Vec<SocketAddr> {
    let mut all = stage.addresses(protocol);
    all.retain(|to| to.is_ipv4() == is_v4);
    all
}

#[test]
fn clients_of_pods_that_the_kernel_routes_to_are_counted() -> Result<()> {
    are_counted(Pods::Routed, "off")
}

#[test]
fn clients_of_pods_that_penstock_connects_are_counted() -> Result<()> {
    are_counted(Pods::Wired, "off")
}

#[test]
fn clients_that_xdp_serves_are_counted() -> Result<()> {
    are_counted(Pods::Routed, "generic")
}

#[test]
fn clients_that_xdp_serves_by_the_overlay_are_counted() -> Result<()> {
    are_counted(Pods::Wired, "generic")
}

fn are_counted(pods: Pods, xdp: &str) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(pods, &["--xdp", xdp])?;
    let agent = &stage.agents[0];
    let [here, there] = &stage.servers;
    if xdp != "off" {
        wait_for(agent, "eth0", xdp)?;
        // XDP changes no checksums that are still to be computed.
        stage.client.without_checksum_offload("eth0")?;
        stage.nodes[1].without_checksum_offload(there)?;
        stage.nodes[1].host.without_checksum_offload("eth0")?;
    }
    stage.web(&[here, there], |web| web)?;
    let mut ports = PORT..;
    for (is_v4, far) in [(true, there.host.ip4), (false, there.host.ip6)] {
        let before = agent.count("external_xdp")?;
        let mut asked = ByBackend::new();
        for to in addresses(&stage, "udp", is_v4) {
            for port in ports.by_ref().take(QUESTIONS) {
                let (backend, one) = ask(&stage, port, to)?;
                add(asked.entry(backend).or_default(), &one);
            }
        }
        assert_eq!(asked.len(), 2, "both backends answer: {asked:?}");
        let (all, backends) = counted(agent, "UDP", is_v4)?;
        assert_eq!(backends, asked);
        assert_eq!(all, sum(&asked));
        // More than the requests to the other node alone, or the replies.
        let sent = agent.count("external_xdp")? - before;
        let questions = asked[&SocketAddr::new(far, 8080)].connections;
        assert_eq!(sent > questions, xdp != "off", "{sent} for {questions}");

        // How many packets a connection has is TCP's own affair.
        let mut asked = BTreeMap::<String, u64>::new();
        for to in addresses(&stage, "tcp", is_v4) {
            for port in ports.by_ref().take(QUESTIONS) {
                let answer = ask_by(&stage.client, port, "tcp", to)?;
                *asked.entry(answer.server).or_default() += 1;
            }
        }
        eventually("the connections are over", || {
            let (all, backends) = counted(agent, "TCP", is_v4)?;
            ensure!(all == sum(&backends), "{all:?}, {backends:?}");
            ensure!(all.flows == 0, "{all:?}");
            for host in [&here.host, &there.host] {
                let ip = if is_v4 { host.ip4 } else { host.ip6 };
                let stats = backends[&SocketAddr::new(ip, 8080)];
                let connections = asked.get(&host.name).copied().unwrap_or_default();
                ensure!(stats.connections == connections, "{asked:?}, {stats:?}");
                // A handshake, a question and an end, each way.
                ensure!(stats.request_packets >= 4 * connections, "{stats:?}");
                ensure!(stats.reply_packets >= 3 * connections, "{stats:?}");
                let headers = if is_v4 { 20 + 20 } else { 40 + 20 };
                for (packets, bytes) in [
                    (stats.request_packets, stats.request_bytes),
                    (stats.reply_packets, stats.reply_bytes),
                ] {
                    ensure!(bytes > packets * headers, "{stats:?}");
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Replies that the backend's node sends to the client itself are not seen where requests come in; and that
/// node, which has the service too, counts nothing of what was given to its pod here.
#[test]
fn what_goes_another_way_is_counted_where_it_comes_in() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Wired)?;
    let [entry, far] = stage.agents.as_slice() else {
        anyhow::bail!("two agents");
    };
    let mut ports = PORT..;
    let mut asked = [ByBackend::new(), ByBackend::new()];
    for way in [Forwarding::Snat, Forwarding::Tunnel, Forwarding::Dsr] {
        reached_by(&stage, way)?;
        let manifest = stage.nodes[0].read_manifest("web.json")?;
        stage.nodes[1].manifest("web.json", &manifest)?;
        eventually("both nodes serve it", || {
            let ports = ports_of_web(far)?;
            let has_way = ports.iter().all(|port| port.forwarding == way.label());
            let backends = ports.iter().map(|port| port.backends.len());
            ensure!(has_way && backends.sum::<usize>() == 4, "{ports:?}");
            Ok(())
        })?;
        for (asked, is_v4) in asked.iter_mut().zip([true, false]) {
            for to in addresses(&stage, "udp", is_v4) {
                for port in ports.by_ref().take(QUESTIONS) {
                    let (backend, mut one) = ask(&stage, port, to)?;
                    if way == Forwarding::Dsr {
                        (one.reply_packets, one.reply_bytes) = (0, 0);
                    }
                    add(asked.entry(backend).or_default(), &one);
                }
            }
            let (all, backends) = counted(entry, "UDP", is_v4)?;
            assert_eq!(backends, *asked, "{way:?}");
            assert_eq!(all, sum(asked), "{way:?}");
            let (all, _) = counted(far, "UDP", is_v4)?;
            assert_eq!(all, Stats::default(), "{way:?}");
        }
    }
    Ok(())
}
