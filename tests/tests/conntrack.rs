//! Flows and counts as an operator sees and sets them.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, Map, MapData};
use penstock_agent::{
    dataplane::pins::Pins,
    flows::{Lifetimes, Sweeper, now_secs},
};
use penstock_common::{
    BackendCounts, BackendLife, Be16, Config, Flow, FlowState, MASQUERADE_PORTS, Proto, V4, V6,
};
use penstock_testbed::{
    Agent, Node, PROTOCOLS, Scene, Service, Slice, all_answer, eventually, frontends, list,
    require_kernel, text,
};
use serde_json::{Value, json};

/// What a command shows.
fn shown(node: &Node, command: &str, options: &[&str]) -> Result<Value> {
    let said = node.penstock(command, &[options, &["-o", "json"]].concat())?;
    anyhow::ensure!(said.code == 0, "{said:?}");
    Ok(serde_json::from_str(&said.output)?)
}

fn flows(node: &Node, options: &[&str]) -> Result<Vec<Value>> {
    let flows = shown(node, "conntrack", options)?;
    Ok(flows.as_array().expect("a list").clone())
}

/// What was counted of a frontend's port.
fn stats(node: &Node, frontend: SocketAddr, protocol: &str) -> Result<Value> {
    let ports = shown(node, "services", &[])?;
    let mut ports = ports.as_array().expect("a list").iter();
    let is_it = |port: &&Value| {
        port["frontends"] == json!([frontend.to_string()]) && port["protocol"] == protocol
    };
    let port = ports.find(is_it).context("the port is served")?;
    let sum: u64 = port["backends"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|backend| backend["stats"]["connections"].as_u64().expect("a number"))
        .sum();
    let all = port["stats"]["connections"].as_u64().expect("a number");
    assert!(all >= sum, "a service's are at least its backends': {port}");
    Ok(port["stats"].clone())
}

fn number(value: &Value, field: &str) -> u64 {
    value[field]
        .as_u64()
        .unwrap_or_else(|| panic!("{field} of {value}"))
}

#[test]
fn flows_are_listed_and_counted_with_and_without_an_agent() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let mut agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    let sockets = &scene.client.host;
    let packets = sockets.without_socket_hooks();
    let pins = Pins::at(&node.bpffs);
    assert_eq!(flows(node, &[])?, Vec::<Value>::new());
    for service in frontends(10, 80) {
        let to = service.to_string();
        for protocol in PROTOCOLS {
            for _ in 0..3 {
                sockets.who_answers(protocol, &to)?;
            }
        }
        for protocol in ["TCP", "UDP"] {
            let counted = stats(node, service, protocol)?;
            let asked = if protocol == "TCP" { 3 } else { 6 };
            assert_eq!(number(&counted, "connections"), asked, "{counted}");
            assert_eq!(number(&counted, "request_packets"), 0, "{counted}");
        }
        let server = packets.who_answers("tcp", &to)?;
        packets.who_answers("udp", &to)?;
        packets.who_answers("udp", &to)?;
        let found = flows(node, &["--frontend", &to, "--proto", "tcp"])?;
        assert_eq!(found.len(), 1, "{found:?}");
        let flow = &found[0];
        let server = scene.servers.iter().find(|pod| pod.host.name == server);
        let server = &server.expect("a server").host;
        let ip = if service.is_ipv4() {
            server.ip4
        } else {
            server.ip6
        };
        assert_eq!(text(flow, "backend"), SocketAddr::new(ip, 8080).to_string());
        assert_eq!(flow["client"], flow["source"]);
        assert_eq!(text(flow, "service"), "default/web");
        assert_eq!(flow["flags"], json!([]));
        eventually("the connection is over", || {
            let flow = flows(node, &["--frontend", &to, "--state", "closing"])?.pop();
            let flow = flow.context("it is not closing yet")?;
            anyhow::ensure!((1..=120).contains(&number(&flow, "left_secs")), "{flow}");
            Ok(())
        })?;
        let counted = stats(node, service, "TCP")?;
        assert_eq!(number(&counted, "connections"), 4, "{counted}");
        // A handshake, a question and an end, each way.
        assert!(number(&counted, "request_packets") >= 4, "{counted}");
        assert!(number(&counted, "reply_bytes") > 4 * 40, "{counted}");
        let counted = stats(node, service, "UDP")?;
        assert_eq!(number(&counted, "connections"), 8, "{counted}");
        assert_eq!(number(&counted, "flows"), 2, "{counted}");
        assert_eq!(number(&counted, "request_packets"), 2, "{counted}");
        let header = if service.is_ipv4() { 28 } else { 48 };
        assert_eq!(number(&counted, "request_bytes"), 2 * (header + 1));
    }
    let own = packets.who_answers("tcp", &frontends(11, 80)[0].to_string())?;
    assert_eq!(own, scene.client.host.name);
    let hairpin = flows(node, &["--service", "default/own"])?;
    assert_eq!(hairpin.len(), 1, "{hairpin:?}");
    assert_eq!(hairpin[0]["flags"], json!(["hairpin"]));
    assert_ne!(hairpin[0]["source"], hairpin[0]["client"]);
    assert_eq!(flows(node, &[])?.len(), 7);
    assert_eq!(flows(node, &["-6"])?.len(), 3);
    assert_eq!(flows(node, &["--client", "10.0.0.0/30"])?.len(), 0);
    let unknown = node.penstock("conntrack", &["--service", "default/nobody"])?;
    assert_eq!(unknown.code, 1, "{unknown:?}");
    let count = node.penstock("conntrack", &["--count"])?;
    assert!(count.output.ends_with("7 flows\n"), "{count:?}");
    let wide = node.penstock("services", &["--stats"])?;
    assert!(wide.output.contains("CONNECTIONS"), "{wide:?}");

    // All of it is the kernel's: it outlives the agent, and the next one goes on.
    let services = [frontends(10, 80)[0], frontends(10, 80)[1]];
    let all = || -> Result<Vec<Value>> {
        let each = services.iter();
        each.map(|service| stats(node, *service, "UDP")).collect()
    };
    let before = all()?;
    agent.kill();
    assert_eq!(all()?, before);
    assert_eq!(flows(node, &[])?.len(), 7);
    assert_eq!(flows(node, &["-4"])?[0]["service"], Value::Null);
    let unnamed = node.penstock("conntrack", &["--service", "default/web"])?;
    assert!(
        unnamed.errors.contains("nobody else knows names"),
        "{unnamed:?}"
    );
    agent.restart()?;
    assert_eq!(all()?, before);

    // An agent that counted nothing ran before: flows stay, and counts begin.
    agent.kill();
    for family in ["4", "6"] {
        for map in ["FLOW_COUNTS", "BACKEND_COUNTS", "CONNECTIONS"] {
            std::fs::remove_file(pins.root().join(format!("{map}{family}")))?;
        }
    }
    std::fs::remove_file(pins.root().join("SERVICE_COUNTS"))?;
    agent.restart()?;
    assert_eq!(flows(node, &[])?.len(), 7);
    packets.who_answers("udp", &services[0].to_string())?;
    let counted = stats(node, services[0], "UDP")?;
    assert_eq!(number(&counted, "connections"), 1, "{counted}");
    assert_eq!(number(&counted, "flows"), 3, "{counted}");
    Ok(())
}

#[test]
fn connections_that_live_are_told_from_those_that_did() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let _agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    let packets = scene.client.host.without_socket_hooks();
    for service in frontends(10, 80) {
        let to = service.to_string();
        let live = |what| -> Result<u64> { Ok(number(&stats(node, service, "TCP")?, what)) };
        let mut at_the_socket = scene.client.host.traffic(&["hold", &to])?;
        at_the_socket.line()?;
        let mut by_packets = packets.traffic(&["hold", &to])?;
        by_packets.line()?;
        assert_eq!(live("tcp_sockets")?, 1);
        assert_eq!(live("flows")?, 1);
        let flow = flows(node, &["--frontend", &to])?.pop().expect("a flow");
        assert_eq!(text(&flow, "state"), "established", "{flow}");
        let left = number(&flow, "left_secs");
        assert!((86_000..=86_400).contains(&left), "{flow}");
        drop((at_the_socket, by_packets));
        eventually("both are over", || {
            anyhow::ensure!(live("tcp_sockets")? + live("flows")? == 0);
            Ok(())
        })?;
        assert_eq!(live("connections")?, 2);
    }
    Ok(())
}

#[test]
fn counts_outlive_their_flows_and_a_services_its_backends() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let mut agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    let service = frontends(10, 80)[0];
    let packets = scene.client.host.without_socket_hooks();
    all_answer(&packets, "udp", service, &scene.names())?;
    let before = stats(node, service, "UDP")?;
    assert!(number(&before, "request_packets") >= 2, "{before}");
    assert!(number(&before, "flows") >= 2, "{before}");

    // Only the second server is left, and its flows are all over.
    let [_, b] = &scene.servers;
    let web = Service::new("web", 10).port("udp", 80, "UDP");
    let mut items = vec![web.json()];
    items.extend(Slice::both("web", 8080, &[b]));
    node.manifest("all.json", &list(&items))?;
    eventually("the backend is gone", || {
        let ports = shown(node, "backends", &[])?;
        anyhow::ensure!(ports.as_array().expect("a list").len() == 2, "{ports}");
        Ok(())
    })?;
    agent.kill();
    let none = Lifetimes {
        tcp_syn_secs: 0,
        tcp_established_secs: 0,
        tcp_close_wait_secs: 0,
        tcp_closing_secs: 0,
        udp_secs: 0,
        udp_stream_secs: 0,
    };
    let mut sweeper = Sweeper::open(&Pins::at(&node.bpffs), none)?;
    assert!(sweeper.sweep().swept >= 2);
    let ended = |value: &Value| {
        let mut value = value.clone();
        value["flows"] = json!(0);
        value
    };
    assert_eq!(stats(node, service, "UDP")?, ended(&before));
    // Long enough for the counts of backends that are gone to become their service's.
    for _ in 0..64 {
        sweeper.sweep();
    }
    let counts: HashMap<MapData, BackendLife, BackendCounts> =
        Map::HashMap(Pins::at(&node.bpffs).map("BACKEND_COUNTS4")?).try_into()?;
    let lives: Vec<BackendLife> = counts.keys().collect::<Result<_, _>>()?;
    assert_eq!(
        lives.len(),
        1,
        "one backend, as the agent saw it: {lives:?}"
    );
    assert_eq!(stats(node, service, "UDP")?, ended(&before));
    drop(sweeper);

    // A backend that gets a used id begins at zero.
    agent.restart()?;
    scene.manifests()?;
    let fresh = eventually("the backend is back", || {
        let ports = shown(node, "backends", &[])?;
        let address = SocketAddr::new(scene.servers[0].host.ip4, 8080).to_string();
        let mut rows = ports.as_array().expect("a list").iter();
        let row = rows.find(|row| {
            row["backend"]["address"] == address
                && row["service"] == "default/web"
                && row["protocol"] == "UDP"
        });
        Ok(row.context("not yet")?["backend"].clone())
    })?;
    assert!(number(&fresh, "generation") > 1, "{fresh}");
    assert_eq!(number(&fresh["stats"], "connections"), 0, "{fresh}");
    assert_eq!(stats(node, service, "UDP")?, ended(&before));
    let mut asked = number(&before, "connections");
    loop {
        asked += 1;
        if packets.who_answers("udp", &service.to_string())? == scene.servers[0].host.name {
            break;
        }
    }
    // Its first connection moved those of the id's last life to where that one's are.
    assert_eq!(number(&stats(node, service, "UDP")?, "connections"), asked);
    Ok(())
}

#[test]
fn flows_go_when_the_operator_says() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let options = [
        "--conntrack-udp-timeout-stream=1s",
        "--conntrack-tcp-timeout-closing=3h",
        "--conntrack-tcp-timeout-established=0",
    ];
    let _agent = scene.agent(&options)?;
    let node = &scene.nodes[0];
    let config: Array<MapData, Config> =
        Map::Array(Pins::at(&node.bpffs).map("CONFIG")?).try_into()?;
    let timeouts = config.get(&0, 0)?.timeouts;
    assert_eq!(timeouts.udp_stream_secs, 1);
    assert_eq!(timeouts.tcp_closing_secs, 10_800);
    assert_eq!(timeouts.tcp_established_secs, 86_400);
    let packets = scene.client.host.without_socket_hooks();
    for service in frontends(10, 80) {
        for protocol in ["udp", "tcp"] {
            packets.who_answers(protocol, &service.to_string())?;
        }
    }
    eventually("the UDP flows are gone, and the TCP flows closing", || {
        let flows = flows(node, &[])?;
        let are_closing = flows
            .iter()
            .all(|flow| flow["protocol"] == "TCP" && flow["state"] == "closing");
        anyhow::ensure!(are_closing && flows.len() == 2, "{flows:?}");
        assert!(
            flows.iter().all(|flow| number(flow, "left_secs") > 10_000),
            "{flows:?}"
        );
        Ok(())
    })
}

#[test]
fn a_table_that_fills_up_is_told_before_it_is_full() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    let mut table: Array<MapData, Flow<V4>> =
        Map::Array(Pins::at(&node.bpffs).map("FLOWS4")?).try_into()?;
    let mut fill = |ids: std::ops::Range<u32>, state| -> Result<()> {
        for id in ids {
            let flow = Flow {
                state,
                seen_secs: now_secs(),
                client_port: Be16::from_host(id as u16),
                proto: Proto::TCP,
                ..Flow::default()
            };
            table.set(id, flow, 0)?;
        }
        Ok(())
    };
    let room = Pins::at(&node.bpffs).flows()?.expect("a table");
    let many = room / 100 * 81;
    fill(0..many, FlowState::ESTABLISHED)?;
    let problem = format!("IPv4 flows: more than 80 % of {room} are in use");
    eventually("the table is told to be nearly full", || {
        let status = agent.status()?;
        let problems = status["problems"].to_string();
        anyhow::ensure!(problems.contains(&problem), "{problems}");
        let mut tables = status["tables"].as_array().expect("a list").iter();
        let flows = tables.find(|table| table["table"] == "IPv4 flows");
        let used = number(flows.expect("a table"), "used");
        anyhow::ensure!(used == u64::from(many), "{used} of {many}");
        Ok(())
    })?;
    let words = node.penstock("status", &[])?.output;
    assert!(words.contains("IPv4 flows"), "{words}");
    assert!(words.contains("80 %"), "{words}");
    let count = node.penstock("conntrack", &["--count"])?.output;
    assert!(count.ends_with(&format!("{} flows\n", many)), "{count}");
    fill(0..many, FlowState::FREE)?;
    eventually("the problem is over", || {
        let problems = agent.status()?["problems"].clone();
        anyhow::ensure!(problems == json!([]), "{problems}");
        Ok(())
    })?;
    let log = agent.log();
    // Once each: when it appeared and when it was over.
    assert_eq!(log.matches(&problem).count(), 2, "{log}");
    Ok(())
}

/// Writes so many flows from a record on, each with the next source port of this node's.
fn take_ports<A: Copy>(
    table: &mut Array<MapData, Flow<A>>,
    first: u32,
    ports: Range<u32>,
    flow: Flow<A>,
) -> Result<()>
where
    Flow<A>: aya::Pod,
{
    for (id, port) in (first..).zip(ports) {
        let source_port = Be16::from_host(MASQUERADE_PORTS.0 + port as u16);
        let flow = Flow {
            seen_secs: now_secs(),
            client_port: Be16::from_host(port as u16),
            source_port,
            ..flow
        };
        table.set(id, flow, 0)?;
    }
    Ok(())
}

#[test]
fn ports_that_run_out_towards_one_destination_are_told_before_none_is_left() -> Result<()> {
    const PORTS: u32 = MASQUERADE_PORTS.1 as u32 - MASQUERADE_PORTS.0 as u32 + 1;
    const HALF: u32 = PORTS / 2;
    const SOME: u32 = PORTS / 100 * 79;
    const MANY: u32 = PORTS / 100 * 81;
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    let pins = Pins::at(&node.bpffs);
    let mut table4: Array<MapData, Flow<V4>> = Map::Array(pins.map("FLOWS4")?).try_into()?;
    let mut table6: Array<MapData, Flow<V6>> = Map::Array(pins.map("FLOWS6")?).try_into()?;
    let to4 = |backend| Flow {
        state: FlowState::ESTABLISHED,
        proto: Proto::TCP,
        source: V4::from(Ipv4Addr::new(172, 18, 0, 2)),
        backend: V4::from(Ipv4Addr::new(10, 244, 2, backend)),
        backend_port: Be16::from_host(8_080),
        ..Flow::default()
    };
    let to6 = Flow {
        state: FlowState::ESTABLISHED,
        proto: Proto::UDP,
        source: V6::from(Ipv6Addr::LOCALHOST),
        ..Flow::default()
    };
    let table = |family| format!("{family} source ports of the busiest destination");
    let problem = format!(
        "{}: more than 80 % of {PORTS} are in use; when all are, what is new to it is dropped; \
         penstock conntrack shows which one it is",
        table("IPv4")
    );
    // As the status has it once these are the busiest destinations' ports.
    let told = |used: [u32; 2], problems: Value| {
        eventually("the ports are counted", || {
            let status = agent.status()?;
            let tables = status["tables"].as_array().expect("a list");
            for (family, used) in ["IPv4", "IPv6"].into_iter().zip(used) {
                let name = table(family);
                let ports = tables.iter().find(|fill| fill["table"] == name.as_str());
                let ports = ports.context("they are not counted yet")?;
                anyhow::ensure!(number(ports, "used") == u64::from(used), "{ports}");
                anyhow::ensure!(number(ports, "limit") == u64::from(PORTS), "{ports}");
            }
            anyhow::ensure!(status["problems"] == problems, "{status}");
            Ok(())
        })
    };

    // Two destinations have ports of their own, and a family does.
    take_ports(&mut table4, 0, 0..SOME, to4(1))?;
    take_ports(&mut table4, SOME, 0..SOME, to4(2))?;
    take_ports(&mut table6, 0, 0..HALF, to6)?;
    told([SOME, HALF], json!([]))?;
    take_ports(&mut table4, 2 * SOME, SOME..MANY, to4(2))?;
    told([MANY, HALF], json!([problem]))?;
    let words = node.penstock("status", &[])?.output;
    assert!(words.contains(&problem), "{words}");
    take_ports(&mut table4, 0, 0..SOME + MANY, Flow::default())?;
    take_ports(&mut table6, 0, 0..HALF, Flow::default())?;
    told([0, 0], json!([]))?;
    let log = agent.log();
    // Once each: when it appeared and when it was over.
    assert_eq!(log.matches(&problem).count(), 2, "{log}");
    Ok(())
}

/// What all maps of the flow table have room for.
fn sizes(pins: &Pins) -> Result<Vec<u32>> {
    let mut sizes = Vec::new();
    for map in [
        "FLOWS",
        "FLOW_COUNTS",
        "FLOW_VTEPS",
        "FREE_FLOWS",
        "FLOW_INDEX",
    ] {
        for family in ["4", "6"] {
            sizes.push(pins.map(&format!("{map}{family}"))?.info()?.max_entries());
        }
    }
    Ok(sizes)
}

/// The same for so many flows.
fn sizes_of(flows: u32) -> Vec<u32> {
    [vec![flows; 8], vec![2 * flows + 4_096; 2]].concat()
}

#[test]
fn the_flow_table_is_as_large_as_the_first_agent_was_told() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    let pins = Pins::at(&node.bpffs);
    let packets = scene.client.host.without_socket_hooks();
    let [first, second] = frontends(10, 80).map(|service| service.to_string());
    let holds = |agent: &Agent, room: u32, notes: Value| -> Result<()> {
        eventually("the table is counted", || {
            let status = agent.status()?;
            let mut tables = status["tables"].as_array().expect("a list").iter();
            let table = tables.find(|table| table["table"] == "IPv6 flows");
            let limit = number(table.context("no table")?, "limit");
            anyhow::ensure!(limit == u64::from(room), "{status}");
            anyhow::ensure!(status["notes"] == notes, "{status}");
            anyhow::ensure!(status["problems"] == json!([]), "{status}");
            Ok(())
        })?;
        assert_eq!(sizes(&pins)?, sizes_of(room));
        let flows = flows(node, &[])?;
        assert!(flows.len() <= 2 * room as usize, "{flows:?}");
        Ok(())
    };
    // What could not be made whole says nothing about the next one's size.
    let failed = Pins::create(&node.bpffs)?.load(true, false, 0).map(drop);
    assert!(failed.is_err());
    assert_eq!(pins.flows()?, None);
    let mut agent = scene.agent(&["--conntrack-max-per-core=1", "--conntrack-min=5001"])?;
    holds(&agent, 5_001, json!([]))?;
    let mut held = packets.traffic(&["hold", &first, "--interval-ms", "10"])?;
    let answer: Value = serde_json::from_str(&held.line()?)?;
    let server = text(&answer, "server").to_owned();
    agent.kill();

    // Another size would lose what is held: the table stays, and the agent says so.
    let mut agent = scene.agent(&["--conntrack-max-per-core=1", "--conntrack-min=9000"])?;
    let note = "the flow table is for 5001 flows a family, as an earlier agent made it, and not for \
                9000: another size takes a restart of the node, or `penstock cleanup`, which \
                interrupts translated connections";
    holds(&agent, 5_001, json!([note]))?;
    assert!(agent.log().contains(note), "{}", agent.log());
    let words = node.penstock("status", &[])?.output;
    assert!(words.contains(&format!("notes:\n  {note}\n")), "{words}");
    // Every answer so far, and some that are asked for only now.
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(1) {
        let answer: Value = serde_json::from_str(&held.line()?)?;
        assert_eq!(text(&answer, "server"), server, "{answer}");
    }
    packets.who_answers("tcp", &second)?;
    agent.kill();

    // Half of the table is lost: it gets the other half's size.
    for map in ["FLOWS4", "FREE_FLOWS6"] {
        std::fs::remove_file(pins.root().join(map))?;
    }
    let mut agent = scene.agent(&["--conntrack-max-per-core=0", "--conntrack-min=9000"])?;
    holds(&agent, 5_001, json!([]))?;
    packets.who_answers("tcp", &first)?;
    agent.kill();
    drop(held);

    let removed = node.penstock("cleanup", &[])?;
    assert_eq!(removed.code, 0, "{removed:?}");
    assert_eq!(pins.flows()?, None);
    let agent = scene.agent(&["--conntrack-max-per-core=1", "--conntrack-min=9000"])?;
    holds(&agent, 9_000, json!([]))?;
    packets.who_answers("tcp", &first)?;
    Ok(())
}
