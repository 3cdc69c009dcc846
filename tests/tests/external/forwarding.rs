//! Ways to a backend of another node that keep the client's address: by the backend's node itself, or
//! there and back through the overlay.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use penstock_common::{Forwarding, Handover, V4};
use penstock_testbed::{
    Host, PROTOCOLS, Process, Service, Slice, eventually, list, require_kernel, text,
};
use serde_json::Value;

use crate::stage::{Answer, BALANCER, Pods, Stage, ask, nothing_is_tracked, refusal, same_family};

const ANNOTATION: &str = "penstock.io/forwarding";
/// Ways that keep the client's address.
const WAYS: [Forwarding; 2] = [Forwarding::Tunnel, Forwarding::Dsr];
/// What a stream carries each way.
const BYTES: u64 = 16 << 20;
/// What the overlay carries in one packet: 1,500 less Ethernet, VXLAN, UDP and IPv6.
const MTU: u32 = 1_430;

/// "web" on the second node alone, with a way to it.
pub fn reached_by(stage: &Stage, way: Forwarding) -> Result<()> {
    let there = &stage.servers[1];
    stage.web(&[there], |web| web.annotation(ANNOTATION, way.label()))?;
    eventually("every port has the way", || {
        let ports = stage.agents[0].show("services")?;
        let all = ports.as_array().context("a list")?;
        let of_web = all.iter().filter(|port| port["service"] == "default/web");
        let ways: Vec<&Value> = of_web.map(|port| &port["forwarding"]).collect();
        ensure!(
            !ways.is_empty() && ways.iter().all(|it| **it == way.label()),
            "{ports}"
        );
        Ok(())
    })
}

/// What a node's programs counted of flows that are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    /// By the first node: handed over, and replies that it sent on.
    over: u64,
    replies: u64,
    /// By the second node: sent back.
    back: u64,
}

impl Counts {
    fn of(stage: &Stage) -> Result<Self> {
        let [entry, far] = stage.agents.as_slice() else {
            anyhow::bail!("two agents");
        };
        Ok(Self {
            over: entry.count("handed_over")?,
            replies: entry.count("external_reply")?,
            back: far.count("handed_back")?,
        })
    }

    /// What packets there were since then, and whether they took the way.
    fn show(self, stage: &Stage, way: Forwarding) -> Result<()> {
        let now = Self::of(stage)?;
        ensure!(now.over > self.over, "{self:?}, then {now:?}");
        match way {
            Forwarding::Tunnel => {
                ensure!(now.replies > self.replies, "{self:?}, then {now:?}");
                ensure!(
                    now.back - self.back == now.replies - self.replies,
                    "{self:?}, then {now:?}"
                );
            }
            Forwarding::Dsr => ensure!(
                (now.replies, now.back) == (self.replies, self.back),
                "{self:?}, then {now:?}"
            ),
            Forwarding::Snat => anyhow::bail!("nothing is handed over"),
        }
        Ok(())
    }
}

/// No programs dropped anything, and no host met a wrong checksum.
fn all_went_well(stage: &Stage) -> Result<()> {
    for agent in &stage.agents {
        let counts = agent.show("drops")?;
        let counts = counts.as_array().into_iter().flatten();
        let drops: Vec<&Value> = counts
            .filter(|count| count["dropped"] == true && count["count"] != 0)
            .collect();
        ensure!(drops.is_empty(), "{drops:?}");
    }
    for host in [&stage.client, &stage.servers[1].host] {
        ensure!(host.checksum_errors()? == 0, "{}", host.name);
    }
    Ok(())
}

#[test]
fn a_backend_elsewhere_sees_the_client() -> Result<()> {
    sees_the_client(&[])
}

#[test]
fn a_backend_elsewhere_sees_the_client_past_xdp() -> Result<()> {
    sees_the_client(&["--xdp", "generic"])
}

#[test]
fn a_backend_whose_replies_the_kernel_sends_sees_the_client() -> Result<()> {
    sees_the_client(&["--no-masquerade"])
}

fn sees_the_client(options: &[&str]) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, options)?;
    stage.client.without_checksum_offload("eth0")?;
    for node in &stage.nodes {
        node.host.track_everything()?;
    }
    let there = &stage.servers[1];
    for way in WAYS {
        reached_by(&stage, way)?;
        for protocol in PROTOCOLS {
            for to in stage.addresses(protocol) {
                let before = Counts::of(&stage)?;
                let expected = Answer {
                    server: there.host.name.clone(),
                    source: same_family(&stage.client, to.ip()),
                };
                for _ in 0..3 {
                    // That it comes from whom the client has dialled is looked at there.
                    let answer = ask(&stage.client, protocol, to)?;
                    assert_eq!(answer, expected, "{way:?} {protocol} {to}");
                }
                let what = || format!("{way:?} {protocol} {to}");
                before.show(&stage, way).with_context(what)?;
            }
        }
    }
    for node in &stage.nodes {
        nothing_is_tracked(&node.host, &stage.client, None)?;
    }
    // Who is a node may be the backend's own: it is answered as ever.
    let far = &stage.nodes[1].host;
    for to in &stage.addresses("tcp")[..2] {
        let before = stage.agents[0].count("handed_over")?;
        let answer = ask(far, "tcp", *to)?;
        assert_ne!(answer.source, same_family(far, to.ip()), "{to}");
        assert_eq!(stage.agents[0].count("handed_over")?, before);
    }
    all_went_well(&stage)?;
    let said = stage.nodes[0].penstock("services", &[])?;
    ensure!(
        said.output.contains("FORWARDING") && said.output.contains("dsr"),
        "{}",
        said.output
    );
    Ok(())
}

/// Such a pod's answers take the host's stack, where somebody else's queueing discipline has to see them.
#[test]
fn a_backend_whose_packets_are_held_sees_the_client() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, &["--cni-chained"])?;
    let (far, there) = (&stage.nodes[1].host, &stage.servers[1]);
    let queue = ["qdisc", "add", "dev", &there.interface, "ingress"];
    far.run("tc", &queue)?;
    let setting = format!("/proc/sys/net/ipv4/conf/{}/accept_local", there.interface);
    eventually("the kernel takes what the pod sends", || {
        let value = far.run("cat", &[&setting])?;
        ensure!(value.trim() == "1", "{value}");
        Ok(())
    })?;
    far.track_everything()?;
    for way in WAYS {
        reached_by(&stage, way)?;
        for protocol in PROTOCOLS {
            for to in stage.addresses(protocol) {
                let before = Counts::of(&stage)?;
                let expected = Answer {
                    server: there.host.name.clone(),
                    source: same_family(&stage.client, to.ip()),
                };
                for _ in 0..3 {
                    let what = || format!("{way:?} {protocol} {to}");
                    let answer = ask(&stage.client, protocol, to).with_context(what)?;
                    assert_eq!(answer, expected, "{}", what());
                }
                let what = || format!("{way:?} {protocol} {to}");
                before.show(&stage, way).with_context(what)?;
            }
        }
    }
    // The stack has seen them.
    let entries = far.tracked()?;
    let pod = format!("src={} ", there.host.ip4);
    ensure!(
        entries.iter().any(|entry| entry.contains(&pod)),
        "{entries:#?}"
    );
    all_went_well(&stage)
}

#[test]
fn what_does_not_fit_the_overlay_arrives_all_the_same() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for way in WAYS {
        let stage = Stage::new(Pods::Wired)?;
        let there = &stage.servers[1].host;
        let _drain = there.drain_and_give(9_000, BYTES)?;
        reached_by(&stage, way)?;
        let sink = Service::new("sink", 11)
            .port("tcp", 80, "TCP")
            .balanced(30_090, &[])
            .annotation(ANNOTATION, way.label());
        let mut items = vec![sink.json()];
        items.extend(Slice::both("sink", 9_000, &[&stage.servers[1]]));
        stage.nodes[0].manifest("sink.json", &list(&items))?;
        for ip in [stage.nodes[0].host.ip4, stage.nodes[0].host.ip6] {
            let to = SocketAddr::new(ip, 30_090).to_string();
            let before = Counts::of(&stage)?;
            let counts = eventually("a stream each way", || stage.client.exchange(&to, BYTES))?;
            assert_eq!(counts, (BYTES, BYTES), "{way:?} {to}");
            before.show(&stage, way)?;
        }
        // Datagrams in parts as large as the client's link, which the overlay does not carry.
        for to in stage.addresses("udp") {
            let before = Counts::of(&stage)?;
            eventually("long datagrams come and go", || {
                let options = ["--size", "4000", "--timeout-ms", "500"];
                let answer = stage.client.ask("udp", &to.to_string(), &options)?;
                // What is lost teaches an IPv6 client what fits.
                ensure!(text(&answer, "reached") == "4000", "{to}: {answer}");
                let source: SocketAddr = text(&answer, "source").parse()?;
                ensure!(source.ip() == same_family(&stage.client, to.ip()));
                Ok(())
            })
            .with_context(|| format!("{way:?} {to}"))?;
            before.show(&stage, way)?;
        }
        for host in [&stage.client, there] {
            ensure!(host.checksum_errors()? == 0, "{}", host.name);
        }
    }
    Ok(())
}

#[test]
fn who_sends_what_does_not_fit_is_told() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for way in WAYS {
        let stage = Stage::new(Pods::Wired)?;
        reached_by(&stage, way)?;
        let to = &stage.addresses("udp")[..2];
        for (to, headers) in to.iter().zip([28, 48]) {
            let size = (1_500 - headers).to_string();
            let to_text = to.to_string();
            let ask = |timeout: &str| {
                let options = ["--size", &size, "--timeout-ms", timeout];
                stage.client.ask("udp", &to_text, &options)
            };
            let lost = ask("300")?;
            assert_eq!(text(&lost, "error"), "operation would block", "{lost}");
            let route = stage
                .client
                .run("ip", &["-o", "route", "get", &to.ip().to_string()])?;
            assert!(route.contains(&format!(" mtu {MTU}")), "{way:?}: {route}");
            let answer = ask("2000")?;
            assert_eq!(text(&answer, "reached"), size, "{way:?} {to}: {answer}");
        }
    }
    Ok(())
}

#[test]
fn a_port_that_nobody_listens_on_refuses() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Wired)?;
    for way in WAYS {
        reached_by(&stage, way)?;
        let closed = Service::new("closed", 11)
            .port("tcp", 81, "TCP")
            .port("udp", 81, "UDP")
            .balanced(30_090, &[])
            .annotation(ANNOTATION, way.label());
        let mut items = vec![closed.json()];
        items.extend(Slice::both("closed", 9, &[&stage.servers[1]]));
        stage.nodes[0].manifest("closed.json", &list(&items))?;
        let node = &stage.nodes[0].host;
        for ip in [node.ip4, node.ip6] {
            for (protocol, port) in [("tcp", 30_090), ("udp-connected", 30_091)] {
                let to = SocketAddr::new(ip, port);
                eventually("it is refused by the pod", || {
                    let before = Counts::of(&stage)?;
                    let failure = refusal(&stage.client, protocol, to)?;
                    ensure!(failure == "connection refused", "{failure}");
                    ensure!(Counts::of(&stage)?.over > before.over);
                    Ok(())
                })
                .with_context(|| format!("{way:?} {protocol} {to}"))?;
            }
        }
    }
    all_went_well(&stage)
}

/// Connections of a client to one place, held.
fn crowd(host: &Host, protocol: &str, to: &[SocketAddr]) -> Result<Process> {
    let to: Vec<String> = to.iter().map(ToString::to_string).collect();
    let mut arguments = vec!["crowd", protocol, "--count", "100"];
    arguments.extend(["--timeout-ms", "10000"]);
    arguments.extend(to.iter().map(String::as_str));
    host.traffic(&arguments)
}

/// All connections were answered by who answered them first, who saw the same client.
fn was_answered(crowd: &mut Process) -> Result<()> {
    let line = crowd.line()?;
    let said: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
    ensure!(said["answered"] == 100, "{line}");
    Ok(())
}

/// Asks over all connections, one crowd after the other: no server is to be asked by all at once, who
/// would lose datagrams.
fn ask_again(crowds: &mut [(Forwarding, Process)], when: &str) -> Result<()> {
    for (began, crowd) in crowds {
        crowd.signal(Signal::SIGUSR1)?;
        was_answered(crowd).with_context(|| format!("of {began:?}, {when}"))?;
    }
    Ok(())
}

#[test]
fn a_change_of_the_way_loses_no_connection() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::new(Pods::Wired)?;
    let mut crowds = Vec::new();
    for way in [
        Forwarding::Dsr,
        Forwarding::Tunnel,
        Forwarding::Snat,
        Forwarding::Dsr,
    ] {
        reached_by(&stage, way)?;
        for protocol in PROTOCOLS {
            let to = &stage.addresses(protocol)[..2];
            let mut crowd = crowd(&stage.client, protocol, to)?;
            // They ask once by themselves.
            was_answered(&mut crowd)?;
            crowds.push((way, crowd));
        }
        ask_again(&mut crowds, way.label())?;
    }
    // Nor does the death of agents, on either node.
    for agent in &mut stage.agents {
        agent.kill();
    }
    ask_again(&mut crowds, "without agents")
}

#[test]
fn a_client_whose_way_changes_to_the_backends_node_stays_connected() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for way in WAYS {
        let stage = Stage::new(Pods::Wired)?;
        reached_by(&stage, way)?;
        // The other node has the service, too, and its load balancer's addresses.
        let manifest = stage.nodes[0].read_manifest("web.json")?;
        stage.nodes[1].manifest("web.json", &manifest)?;
        eventually("both nodes serve it", || {
            let ports = stage.agents[1].show("services")?.to_string();
            ensure!(BALANCER.iter().all(|ip| ports.contains(ip)), "{ports}");
            Ok(())
        })?;
        let mut crowds = Vec::new();
        for protocol in PROTOCOLS {
            let to = [2, 3].map(|index: usize| stage.addresses(protocol)[index]);
            let mut crowd = crowd(&stage.client, protocol, &to)?;
            was_answered(&mut crowd)?;
            crowds.push((way, crowd));
        }
        for entry in [1, 0] {
            for ip in BALANCER {
                let via = same_family(&stage.nodes[entry].host, ip.parse()?).to_string();
                let route = ["route", "replace", ip, "via", &via];
                stage.client.run("ip", &route)?;
            }
            let before = Counts::of(&stage)?;
            ask_again(&mut crowds, &format!("by node {entry}"))?;
            if entry == 1 {
                assert_eq!(Counts::of(&stage)?, before, "{way:?}");
            } else {
                before.show(&stage, way)?;
            }
        }
    }
    Ok(())
}

#[test]
fn where_there_is_no_tunnel_backends_see_the_node_and_it_is_said() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Wired, &["--routing", "native"])?;
    reached_by(&stage, Forwarding::Dsr)?;
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            let answer = ask(&stage.client, protocol, to)?;
            let node = same_family(&stage.nodes[0].host, to.ip());
            assert_eq!(answer.source, node, "{to}");
        }
    }
    assert_eq!(stage.agents[0].count("handed_over")?, 0);
    let said = stage.nodes[0].penstock("services", &[])?;
    ensure!(said.output.contains("snat for dsr"), "{}", said.output);
    let status = stage.agents[0].status()?;
    let problems = status["problems"].to_string();
    ensure!(
        problems.contains("service default/web: penstock.io/forwarding says dsr"),
        "{problems}"
    );
    Ok(())
}

/// A packet in a tunnel that claims to be handed over, for a pod, as bash's printf takes it.
fn forged(stage: &Stage) -> Result<String> {
    let pod = &stage.servers[1].host;
    let IpAddr::V4(pod) = pod.ip4 else {
        anyhow::bail!("{}", pod.ip4);
    };
    let [a, b, c, d] = pod.octets();
    let backend = V4::from_octets([a, b, c, d]);
    let (to, from) = Handover {
        kind: Handover::DSR,
        suffix: penstock_common::Addr::suffix(&backend),
        port: penstock_common::Be16::from_host(8_080),
    }
    .macs();
    // VXLAN (RFC 7348, 5) with network 1, Ethernet, IPv4 and UDP from 192.0.2.1 to 203.0.113.1.
    let mut bytes = vec![8, 0, 0, 0, 0, 0, 1, 0];
    bytes.extend(to.iter().chain(&from));
    bytes.extend([8, 0]);
    bytes.extend([0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend([192, 0, 2, 1, 203, 0, 113, 1]);
    bytes.extend([0x30, 0x39, 0, 80, 0, 9, 0, 0, b'?']);
    Ok(bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect())
}

#[test]
fn nobody_but_nodes_hands_packets_over() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::new(Pods::Wired)?;
    reached_by(&stage, Forwarding::Dsr)?;
    let forged = forged(&stage)?;
    let far = &stage.nodes[1].host;
    let send = |from: &Host, to: IpAddr| {
        // The shell's own output would be a datagram for each of its lines.
        let script = format!(
            "file=$(mktemp); printf '{forged}' > $file; cat $file > /dev/udp/{to}/4789; rm $file"
        );
        from.run("bash", &["-c", &script])
    };
    // From outside it reaches the device, but from no node.
    eventually("the other node refuses it", || {
        send(&stage.client, far.ip4)?;
        ensure!(stage.agents[1].count("handover_forged")? > 0);
        Ok(())
    })?;
    // From a pod it would get its node's address, and so it does not leave.
    let before = stage.agents[1].count("handover_forged")?;
    eventually("a pod's node refuses it", || {
        send(&stage.guests[0].host, far.ip4)?;
        ensure!(stage.agents[0].count("tunnel_forged")? > 0);
        Ok(())
    })?;
    assert_eq!(stage.agents[1].count("handover_forged")?, before);
    assert_eq!(stage.agents[1].count("handover_unknown")?, 0);
    assert_eq!(stage.agents[1].count("external_request")?, 0);
    // A node may; this shows that what was refused before is what would be taken.
    eventually("what a node sends is taken", || {
        send(&stage.nodes[0].host, far.ip4)?;
        ensure!(stage.agents[1].count("external_request")? > 0);
        Ok(())
    })
}
