//! Clients outside, met at XDP: what they see is what they see without, and it is XDP that serves them.

use std::{
    fs::File,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Xdp, xdp::XdpMode},
};
use nix::sched::{CloneFlags, setns};
use penstock_testbed::{
    Agent, Host, Node, PROTOCOLS, Process, Source, eventually, require_kernel, text,
};
use serde_json::{Value, json};

use crate::stage::{Answer, BALANCER, EXTERNAL, Pods, Stage, ask, nothing_is_tracked, same_family};

/// A program at XDP that is not Penstock's: this one, but attached by nobody's agent, passes everything.
struct Foreign {
    _programs: Ebpf,
}

impl Foreign {
    fn attach(namespace: &str, interface: &str, mode: XdpMode) -> Result<Self> {
        let namespace = File::open(Path::new("/run/netns").join(namespace))?;
        let attach = move || -> Result<Self> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let folder = format!(
                "/sys/fs/bpf/pn{}-foreign{:?}",
                std::process::id(),
                thread::current().id()
            );
            std::fs::create_dir_all(&folder)?;
            let loaded = EbpfLoader::new()
                .default_map_pin_directory(&folder)
                .override_global("AYA_LOG_LEVEL", &0_u8, false)
                .load(penstock_agent::dataplane::OBJECT);
            std::fs::remove_dir_all(&folder)?;
            let mut programs = loaded?;
            let program: &mut Xdp = programs
                .program_mut("xdp_uplink")
                .context("the program")?
                .try_into()?;
            program.load()?;
            program.attach(interface, mode)?;
            Ok(Self {
                _programs: programs,
            })
        };
        thread::scope(|scope| scope.spawn(attach).join())
            .map_err(|_| anyhow::anyhow!("attaching panicked"))?
    }

    /// At the other end of a node's link, without which veth loses what comes from native XDP.
    fn opposite(node: &Node) -> Result<Self> {
        let fabric = format!("{}-fab", node.prefix());
        Self::attach(&fabric, &node.port(), XdpMode::Driver)
    }
}

/// The mode and the program's id of an interface's XDP, as the kernel says.
fn attached(host: &Host, interface: &str) -> Result<Option<(u64, u64)>> {
    let links = host.run("ip", &["-j", "-d", "link", "show", interface])?;
    let links: Value = serde_json::from_str(&links)?;
    let xdp = &links[0]["xdp"];
    let program = xdp["prog"]["id"].as_u64();
    Ok(xdp["mode"].as_u64().zip(program))
}

/// What the agent says of XDP on an interface: the mode, or what is in the way.
fn told(agent: &Agent, interface: &str) -> Result<(Option<String>, Option<String>)> {
    let status = agent.status()?;
    let interfaces = status["interfaces"].as_array().context("interfaces")?;
    let found = interfaces.iter().find(|one| one["name"] == interface);
    let found = found.with_context(|| format!("{interface} is none of {interfaces:?}"))?;
    let text = |key: &str| found[key].as_str().map(str::to_owned);
    Ok((text("xdp"), text("xdp_error")))
}

pub fn wait_for(agent: &Agent, interface: &str, mode: &str) -> Result<()> {
    eventually("XDP is on the interface", || {
        let told = told(agent, interface)?;
        ensure!(told == (Some(mode.to_owned()), None), "{told:?}");
        Ok(())
    })
}

/// How the kernel calls the modes.
fn number(mode: &str) -> u64 {
    if mode == "native" { 1 } else { 2 }
}

/// Everybody's checksums are computed by who sends, as on a wire.
fn without_offload(stage: &Stage) -> Result<()> {
    stage.client.without_checksum_offload("eth0")?;
    for (node, server) in stage.nodes.iter().zip(&stage.servers) {
        node.without_checksum_offload(server)?;
        node.host.without_checksum_offload("eth0")?;
    }
    Ok(())
}

/// Asks every address and says how many packets XDP sent for each.
fn ask_all(stage: &Stage, source: &Host) -> Result<Vec<(String, u64)>> {
    let there = &stage.servers[1];
    let mut sent = Vec::new();
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            let expected = Answer {
                server: there.host.name.clone(),
                source: same_family(source, to.ip()),
            };
            let before = stage.agents[0].count("external_xdp")?;
            for _ in 0..8 {
                let answer = ask(&stage.client, protocol, to)?;
                ensure!(answer == expected, "{protocol} {to}: {answer:?}");
            }
            let after = stage.agents[0].count("external_xdp")?;
            sent.push((format!("{protocol} {to}"), after - before));
        }
    }
    Ok(sent)
}

fn no_checksum_errors(stage: &Stage) -> Result<()> {
    for host in [&stage.client, &stage.servers[1].host] {
        ensure!(host.checksum_errors()? == 0, "{}", host.name);
    }
    Ok(())
}

/// Who asks on while the agent is away; each line is an answer or what failed.
fn keep_asking(stage: &Stage) -> Result<Vec<Process>> {
    let mut asking = Vec::new();
    for to in stage.addresses("tcp") {
        asking.push(stage.client.traffic(&["hold", &to.to_string()])?);
    }
    for to in stage.addresses("udp") {
        // An answer may be late where a kernel is emulated; a datagram that is lost gets none.
        let arguments = [
            "keep",
            "udp-connected",
            &to.to_string(),
            "--timeout-ms",
            "5000",
        ];
        asking.push(stage.client.traffic(&arguments)?);
    }
    Ok(asking)
}

fn all_answer(asking: &mut [Process], lines: usize) -> Result<()> {
    for asking in asking {
        for _ in 0..lines {
            let line = asking.line()?;
            let answer: Value = serde_json::from_str(&line)?;
            ensure!(!text(&answer, "server").is_empty(), "{answer}");
        }
    }
    Ok(())
}

fn serves_clients_outside(mode: &str) -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::with(Pods::Routed, &["--xdp", mode])?;
    let node = stage.nodes[0].clone();
    let _opposite = (mode == "native")
        .then(|| Foreign::opposite(&node))
        .transpose()?;
    wait_for(&stage.agents[0], "eth0", mode)?;
    let before = attached(&node.host, "eth0")?.context("XDP is on eth0")?;
    assert_eq!(before.0, number(mode));
    let [here, there] = &stage.servers;
    stage.web(&[there], |web| web)?;
    node.host.track_everything()?;

    // Checksums that senders leave to their interfaces: TC's work, and right.
    ask_all(&stage, &node.host)?;
    without_offload(&stage)?;
    for (what, sent) in ask_all(&stage, &node.host)? {
        // More than requests alone, or replies alone.
        assert!(sent > 8, "{sent} packets for {what}");
    }
    no_checksum_errors(&stage)?;
    nothing_is_tracked(&node.host, &stage.client, None)?;

    // A backend of this node is TC's, which shows it the client.
    stage.web(&[here], |web| web)?;
    for protocol in PROTOCOLS {
        for to in stage.addresses(protocol) {
            let answer = ask(&stage.client, protocol, to)?;
            assert_eq!(answer.server, here.host.name, "{to}");
            assert_eq!(answer.source, same_family(&stage.client, to.ip()), "{to}");
        }
    }
    stage.web(&[there], |web| web)?;

    // The agent goes and comes back, and nobody notices.
    let mut asking = keep_asking(&stage)?;
    all_answer(&mut asking, 10)?;
    stage.agents[0].kill();
    let sent = stage.agents[0].count("external_xdp")?;
    all_answer(&mut asking, 20)?;
    assert!(stage.agents[0].count("external_xdp")? > sent);
    assert_eq!(attached(&node.host, "eth0")?, Some(before));
    stage.agents[0].restart()?;
    wait_for(&stage.agents[0], "eth0", mode)?;
    all_answer(&mut asking, 20)?;
    let (mode_after, program) = attached(&node.host, "eth0")?.context("XDP is on eth0")?;
    assert_eq!(mode_after, before.0);
    assert_ne!(program, before.1, "the new agent's program is in place");
    let sent = stage.agents[0].count("external_xdp")?;
    // Lines may be waiting from before.
    eventually("XDP serves again", || {
        all_answer(&mut asking, 5)?;
        ensure!(stage.agents[0].count("external_xdp")? > sent);
        Ok(())
    })?;
    drop(asking);
    no_checksum_errors(&stage)?;

    stage.agents[0].kill();
    let said = node.penstock("cleanup", &[])?;
    assert_eq!(said.code, 0, "{said:?}");
    eventually("the interface has no XDP any more", || {
        ensure!(attached(&node.host, "eth0")?.is_none());
        Ok(())
    })
}

#[test]
fn generic_xdp_serves_clients_outside() -> Result<()> {
    serves_clients_outside("generic")
}

#[test]
fn native_xdp_serves_clients_outside() -> Result<()> {
    serves_clients_outside("native")
}

#[test]
fn xdp_serves_where_the_network_carries_pods_addresses() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let options = ["--routing", "native", "--xdp", "generic"];
    let stage = Stage::with(Pods::Wired, &options)?;
    wait_for(&stage.agents[0], "eth0", "generic")?;
    without_offload(&stage)?;
    stage.web(&[&stage.servers[1]], |web| web)?;
    let node = &stage.nodes[0].host;
    node.track_everything()?;
    for (what, sent) in ask_all(&stage, node)? {
        assert!(sent > 8, "{sent} packets for {what}");
    }
    nothing_is_tracked(node, &stage.client, None)?;
    no_checksum_errors(&stage)
}

#[test]
fn xdp_goes_by_the_interfaces_ethernet_address_as_it_is() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Routed, &["--xdp", "generic"])?;
    wait_for(&stage.agents[0], "eth0", "generic")?;
    without_offload(&stage)?;
    stage.web(&[&stage.servers[1]], |web| web)?;
    let node = &stage.nodes[0].host;
    for to in stage.addresses("tcp") {
        ask(&stage.client, "tcp", to)?;
    }
    let address = "02:00:00:00:77:01";
    node.run("ip", &["link", "set", "eth0", "address", address])?;
    for host in [&stage.client, &stage.nodes[1].host] {
        for family in ["-4", "-6"] {
            host.run("ip", &[family, "neigh", "flush", "dev", "eth0"])?;
        }
    }
    for to in stage.addresses("tcp") {
        eventually("XDP serves again", || {
            let before = stage.agents[0].count("external_xdp")?;
            ask(&stage.client, "tcp", to)?;
            ensure!(stage.agents[0].count("external_xdp")? > before);
            Ok(())
        })?;
    }
    no_checksum_errors(&stage)
}

/// How many packets XDP sends within some time.
fn sent_within(stage: &Stage, time: Duration) -> Result<u64> {
    let before = stage.agents[0].count("external_xdp")?;
    thread::sleep(time);
    Ok(stage.agents[0].count("external_xdp")? - before)
}

#[test]
fn xdp_follows_routes_and_neighbours_of_connections_that_go_on() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Routed, &["--xdp", "generic"])?;
    wait_for(&stage.agents[0], "eth0", "generic")?;
    without_offload(&stage)?;
    let there = &stage.servers[1];
    stage.web(&[there], |web| web)?;
    let [node, other] = [&stage.nodes[0].host, &stage.nodes[1].host];
    let mut asking = Vec::new();
    for to in stage.addresses("tcp") {
        asking.push(stage.client.traffic(&["hold", &to.to_string()])?);
    }
    all_answer(&mut asking, 5)?;
    let moment = Duration::from_millis(300);
    assert!(sent_within(&stage, moment)? > 0);

    // A route that leads nowhere: as soon as the agent has heard of it, and not when what XDP remembers
    // of a connection ends by itself, which for all of them is two seconds later.
    let nowhere = |what: &str| -> Result<()> {
        for ip in [there.host.ip4, there.host.ip6] {
            let family = if ip.is_ipv4() { "-4" } else { "-6" };
            node.run("ip", &[family, "route", what, "blackhole", &ip.to_string()])?;
        }
        Ok(())
    };
    let is_soon = (0..10).try_fold(false, |is_soon, _| -> Result<bool> {
        if is_soon {
            return Ok(true);
        }
        all_answer(&mut asking, 5)?;
        let begun = Instant::now();
        nowhere("add")?;
        thread::sleep(moment);
        let sent = sent_within(&stage, moment)?;
        let is_in_time = begun.elapsed() < Duration::from_secs(1);
        nowhere("del")?;
        Ok(is_in_time && sent == 0)
    })?;
    assert!(is_soon);
    all_answer(&mut asking, 5)?;
    eventually("XDP sends again", || {
        ensure!(sent_within(&stage, moment)? > 0);
        Ok(())
    })?;

    // The backend's node gets another Ethernet address.
    let address = "02:00:00:00:77:02";
    other.run("ip", &["link", "set", "eth0", "address", address])?;
    for ip in [other.ip4, other.ip6] {
        let neighbour = ["neigh", "replace", &ip.to_string(), "lladdr", address];
        let command = [&neighbour[..], &["dev", "eth0", "nud", "reachable"]].concat();
        node.run("ip", &command)?;
    }
    all_answer(&mut asking, 5)?;
    eventually("XDP sends to the new address", || {
        all_answer(&mut asking, 1)?;
        ensure!(sent_within(&stage, moment)? > 0);
        Ok(())
    })?;
    no_checksum_errors(&stage)
}

#[test]
fn what_leaves_by_another_interface_is_sent_there() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for mode in ["generic", "native"] {
        let stage = Stage::with(Pods::Routed, &["--xdp", mode])?;
        let node = &stage.nodes[0];
        let client = &stage.client;
        // A second link, straight to the client.
        let link = format!("link add up1 type veth peer name up1 netns {}", client.name);
        let link: Vec<&str> = link.split(' ').collect();
        node.host.run("ip", &link)?;
        for (host, number) in [(&node.host, 1), (client, 2)] {
            for address in [
                format!("172.31.7.{number}/24"),
                format!("fd00:31:0:7::{number}/64"),
            ] {
                let add = ["addr", "add", &address, "dev", "up1", "nodad"];
                let add = &add[..if address.contains(':') { 6 } else { 5 }];
                host.run("ip", add)?;
            }
            host.run("ip", &["link", "set", "up1", "up"])?;
            host.without_checksum_offload("up1")?;
        }
        without_offload(&stage)?;
        for ip in BALANCER.iter().chain(&EXTERNAL) {
            let via = if ip.contains(':') {
                "fd00:31:0:7::1"
            } else {
                "172.31.7.1"
            };
            client.run("ip", &["route", "replace", ip, "via", via])?;
        }
        let _opposite = (mode == "native")
            .then(|| -> Result<_> {
                let other = Foreign::attach(&client.name, "up1", XdpMode::Driver)?;
                Ok([Foreign::opposite(node)?, other])
            })
            .transpose()?;
        for interface in ["eth0", "up1"] {
            wait_for(&stage.agents[0], interface, mode)?;
        }
        let [_, there] = &stage.servers;
        stage.web(&[there], |web| web)?;
        for protocol in PROTOCOLS {
            for ip in BALANCER.iter().chain(&EXTERNAL) {
                let to = SocketAddr::new(ip.parse()?, 80);
                eventually("the client's new address is asked from", || {
                    ask(client, protocol, to)
                })?;
                let before = stage.agents[0].count("external_xdp")?;
                for _ in 0..8 {
                    let answer = ask(client, protocol, to)?;
                    assert_eq!(answer.source, same_family(&node.host, to.ip()), "{to}");
                }
                let sent = stage.agents[0].count("external_xdp")? - before;
                assert!(sent > 8, "{mode}: {sent} packets for {protocol} {to}");
            }
        }
        no_checksum_errors(&stage)?;
    }
    Ok(())
}

#[test]
fn xdp_is_where_it_can_be_and_leaves_when_it_is_not_wanted() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut stage = Stage::with(Pods::Routed, &["--xdp", "native"])?;
    let node = stage.nodes[0].clone();
    wait_for(&stage.agents[0], "eth0", "native")?;
    stage.web(&[&stage.servers[1]], |web| web)?;
    let works = |stage: &Stage| -> Result<()> {
        for to in stage.addresses("tcp") {
            ask(&stage.client, "tcp", to)?;
        }
        Ok(())
    };
    // Bridges have none: that is said, and keeps nobody from being served.
    node.host
        .run("ip", &["link", "add", "br9", "type", "bridge"])?;
    node.host
        .run("ip", &["addr", "add", "172.31.9.1/24", "dev", "br9"])?;
    node.host.run("ip", &["link", "set", "br9", "up"])?;
    eventually("what can't have XDP is named", || {
        let (mode, error) = told(&stage.agents[0], "br9")?;
        let error = error.unwrap_or_default();
        let is_named = error.contains("br9") && error.contains("not supported");
        ensure!(mode.is_none() && is_named, "{error}");
        Ok(())
    })?;
    let shown = node.penstock("status", &[])?;
    assert!(shown.output.contains("XDP on eth0: native"), "{shown:?}");

    let restart = |stage: &mut Stage, choice: &str| -> Result<()> {
        stage.agents[0].kill();
        stage.agents[0] = Agent::start(&node, &Source::Manifests, &["--xdp", choice])?;
        Ok(())
    };
    // Another mode.
    restart(&mut stage, "generic")?;
    wait_for(&stage.agents[0], "eth0", "generic")?;
    wait_for(&stage.agents[0], "br9", "generic")?;
    assert_eq!(attached(&node.host, "eth0")?.map(|(mode, _)| mode), Some(2));
    works(&stage)?;
    // An interface that is none to the outside any more.
    node.host.run("ip", &["addr", "flush", "dev", "br9"])?;
    eventually("XDP leaves with the address", || {
        ensure!(attached(&node.host, "br9")?.is_none());
        Ok(())
    })?;
    // None: by choice, or since pairs lose what they should send.
    for choice in ["off", "auto"] {
        restart(&mut stage, choice)?;
        eventually("there is no XDP", || {
            ensure!(attached(&node.host, "eth0")?.is_none());
            let told = told(&stage.agents[0], "eth0")?;
            ensure!(told == (None, None), "{told:?}");
            Ok(())
        })?;
        works(&stage)?;
        restart(&mut stage, "native")?;
        wait_for(&stage.agents[0], "eth0", "native")?;
    }
    Ok(())
}

#[test]
fn auto_takes_xdp_in_the_driver_and_elsewhere_says_nothing() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let stage = Stage::with(Pods::Routed, &["--xdp", "auto"])?;
    let (node, agent, client) = (&stage.nodes[0], &stage.agents[0], &stage.client);
    stage.web(&[&stage.servers[1]], |web| web)?;
    // A bridge has none in its driver; here it leads to the client.
    let link = format!("link add up9 type veth peer name up9 netns {}", client.name);
    let via_bridge = format!("route replace {} via 172.31.9.1", BALANCER[0]);
    for (host, line) in [
        (&node.host, "link add br9 type bridge"),
        (&node.host, "addr add 172.31.9.1/24 dev br9"),
        (&node.host, "link set br9 up"),
        (&node.host, link.as_str()),
        (&node.host, "link set up9 master br9 up"),
        (client, "addr add 172.31.9.2/24 dev up9"),
        (client, "link set up9 up"),
        (client, via_bridge.as_str()),
        // The last: what there was before it, the agent has looked at by then.
        (&node.host, "tuntap add tap9 mode tap"),
        (&node.host, "link set tap9 up"),
        (&node.host, "addr add 172.31.8.1/24 dev tap9"),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        host.run("ip", &words)?;
    }
    wait_for(agent, "tap9", "native")?;
    let mode = attached(&node.host, "tap9")?.map(|(mode, _)| mode);
    assert_eq!(mode, Some(number("native")));
    // Pairs have it, and lose what they should send.
    for interface in ["br9", "eth0"] {
        assert_eq!(told(agent, interface)?, (None, None), "{interface}");
        assert_eq!(attached(&node.host, interface)?, None, "{interface}");
    }
    let status = agent.status()?;
    assert_eq!(status["problems"], json!([]));
    let shown = node.penstock("status", &[])?.output;
    let lines: Vec<&str> = shown.lines().filter(|line| line.contains("XDP")).collect();
    assert_eq!(lines, ["  XDP on tap9: native"], "{shown}");

    for to in stage.addresses("tcp") {
        let before = agent.count("external_request")?;
        // The client's new address may have to be found first.
        eventually("TC serves there", || ask(client, "tcp", to))?;
        assert!(agent.count("external_request")? > before, "{to}");
    }
    assert_eq!(agent.count("external_xdp")?, 0);
    Ok(())
}

#[test]
fn somebody_elses_xdp_stays() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    for (foreign, choice) in [
        (XdpMode::Driver, "native"),
        (XdpMode::Skb, "native"),
        (XdpMode::Driver, "generic"),
    ] {
        let mut stage = Stage::new(Pods::Routed)?;
        let node = stage.nodes[0].clone();
        let _foreign = Foreign::attach(&node.host.name, "eth0", foreign)?;
        let before = attached(&node.host, "eth0")?;
        assert!(before.is_some());
        stage.web(&[&stage.servers[1]], |web| web)?;
        stage.agents[0].kill();
        stage.agents[0] = Agent::start(&node, &Source::Manifests, &["--xdp", choice])?;
        eventually("it is said whose it is", || {
            let (mode, error) = told(&stage.agents[0], "eth0")?;
            let error = error.unwrap_or_default();
            ensure!(
                mode.is_none() && error.contains("not Penstock's"),
                "{error}"
            );
            Ok(())
        })?;
        assert_eq!(attached(&node.host, "eth0")?, before);
        for to in stage.addresses("tcp") {
            ask(&stage.client, "tcp", to)?;
        }
        stage.agents[0].kill();
        let said = node.penstock("cleanup", &[])?;
        assert_eq!(said.code, 0, "{said:?}");
        assert_eq!(attached(&node.host, "eth0")?, before);
    }
    Ok(())
}
