//! The demo: two nodes, pods, services and real traffic on this machine, and nothing left behind.

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use penstock_testbed::{Agent, Host, Pod, Process, Service, Slice, Source, Testbed};
use serde_json::{Value, json};

/// Two nodes, pods, services and real traffic on this machine.
#[derive(Parser)]
struct Cli {
    /// Keep everything up until Enter is pressed, and say how to look around.
    #[arg(long)]
    stay: bool,
}

fn heading(text: &str) {
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

/// The demo's cast.
struct Stage {
    client: Pod,
    servers: [Pod; 2],
    outside: BTreeMap<String, String>,
    _processes: Vec<Process>,
}

impl Stage {
    /// A host's name for people.
    fn shown(&self, name: &str) -> String {
        self.outside
            .get(name)
            .cloned()
            .unwrap_or_else(|| name.to_owned())
    }
}

/// Set in the process that plays; the other one cleans up behind it.
const PLAYER: &str = "PENSTOCK_DEMO_PLAYER";

fn main() -> ExitCode {
    match perform() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform() -> Result<()> {
    let cli = Cli::parse();
    let interrupts: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    if std::env::var_os(PLAYER).is_some() {
        interrupts.thread_unblock().context("taking interrupts")?;
        return play(&cli);
    }
    // An interrupt ends the player wherever it is; this process stays to take everything down.
    interrupts
        .thread_block()
        .context("leaving interrupts to the player")?;
    let status =
        std::process::Command::new(std::env::current_exe().context("finding this program")?)
            .args(std::env::args_os().skip(1))
            .env(PLAYER, "1")
            .status()
            .context("starting the player")?;
    penstock_testbed::remove_leftovers();
    anyhow::ensure!(
        status.success(),
        "the demo ended early ({status}); nothing is left behind"
    );
    Ok(())
}

fn play(cli: &Cli) -> Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "the demo makes network namespaces and loads programs: run it as root"
    );
    for needed in ["penstock", "penstock-traffic"] {
        penstock_testbed::binary(needed)?;
    }
    let started = Instant::now();
    let mut testbed = Testbed::new()?;
    let nodes = [testbed.network_node()?, testbed.network_node()?];
    let [first, second] = &nodes;
    let mut agents = Vec::new();
    for node in &nodes {
        node.knows(&[first, second])?;
        agents.push(Agent::start_network(node, &Source::Manifests, &[])?);
    }
    let client = testbed.network_pod(first)?;
    let servers = [testbed.network_pod(first)?, testbed.network_pod(second)?];
    let internet = testbed.client()?;
    let mut processes = vec![client.host.serve(8080)?, internet.serve(8080)?];
    for server in &servers {
        processes.push(server.host.serve(8080)?);
    }
    let [web_a, web_b] = &servers;
    let outside = BTreeMap::from([
        (client.host.name.clone(), "client (node1)".to_owned()),
        (web_a.host.name.clone(), "web-a (node1)".to_owned()),
        (web_b.host.name.clone(), "web-b (node2)".to_owned()),
        (internet.name.clone(), "the outside".to_owned()),
    ]);
    let stage = Stage {
        client,
        servers,
        outside,
        _processes: processes,
    };
    let [agent, other] = agents.as_mut_slice() else {
        anyhow::bail!("two agents were started")
    };

    heading("1. Two nodes, and three pods that the CNI plugin connects");
    for node in &nodes {
        println!(
            "  {:15} {:12} {}",
            node.name(),
            node.host.ip4,
            node.host.ip6
        );
    }
    for pod in stage.servers.iter().chain([&stage.client]) {
        println!(
            "  {:15} {:12} {}",
            stage.shown(&pod.host.name),
            pod.host.ip4,
            pod.host.ip6
        );
    }
    println!("  as node1 sees it (penstock pods, penstock nodes):");
    for pod in agent.show("pods")?.as_array().into_iter().flatten() {
        let interface = word(pod, "interface");
        println!("    {:42} {interface}", join(pod.get("addresses")));
    }
    for range in agent.show("nodes")?.as_array().into_iter().flatten() {
        let (node, by) = (word(range, "node"), word(range, "by"));
        println!("    {:42} {node}, {by}", word(range, "range"));
    }
    let pod = &stage.client.host;
    let [web_a, web_b] = &stage.servers;
    for (how, to) in [
        ("a pod to one of its node", web_a.host.ip4),
        ("to one of another node", web_b.host.ip4),
        ("the same over IPv6", web_b.host.ip6),
        ("to the outside, as its node", internet.ip4),
    ] {
        let to = std::net::SocketAddr::new(to, 8080).to_string();
        ask(&stage, how, pod, "tcp", &to)?;
    }

    heading("2. Services, as ordinary Kubernetes manifests that the agents read");
    let manifest = services(&stage);
    for node in &nodes {
        node.manifest("services.json", &manifest)?;
    }
    agent.wait_until_settled()?;
    other.wait_until_settled()?;
    agent.wait_for_pods(2)?;
    other.wait_for_pods(1)?;
    for port in agent.show("services")?.as_array().into_iter().flatten() {
        let frontends = join(port.get("frontends"));
        let backends = port
            .get("backends")
            .and_then(Value::as_array)
            .map_or(0, Vec::len);
        println!(
            "  {:14} {:4} {frontends:22} {backends} backends",
            word(port, "service"),
            word(port, "protocol")
        );
    }

    heading("3. Who reaches whom: the pod dials the service, a backend answers");
    let packets = stage.client.host.without_socket_hooks();
    ask(
        &stage,
        "a pod, at its socket",
        &stage.client.host,
        "tcp",
        "10.96.0.10:80",
    )?;
    ask(
        &stage,
        "the same over IPv6",
        &stage.client.host,
        "tcp",
        "[fd00:96::a]:80",
    )?;
    ask(
        &stage,
        "UDP, unconnected",
        &stage.client.host,
        "udp",
        "10.96.0.10:80",
    )?;
    ask(
        &stage,
        "a process on the node",
        &first.host,
        "tcp",
        "10.96.0.10:80",
    )?;
    ask(
        &stage,
        "packet by packet, no socket hook",
        &packets,
        "tcp",
        "10.96.0.10:80",
    )?;
    ask(
        &stage,
        "a pod to itself, by packets",
        &packets,
        "tcp",
        "10.96.0.11:80",
    )?;
    ask(
        &stage,
        "a service without endpoints",
        &stage.client.host,
        "tcp",
        "10.96.0.12:80",
    )?;
    ask(
        &stage,
        "a port that it does not have",
        &stage.client.host,
        "tcp",
        "10.96.0.10:81",
    )?;
    println!("  the application sees the service's address, the backend sees the pod's");

    heading("4. kill -9 of the agent under load");
    let mut load = stage.client.host.traffic(&[
        "load",
        "10.96.0.10:80",
        "[fd00:96::a]:80",
        "--for-ms",
        "3000",
    ])?;
    let mut kills = 0;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2_500) {
        agent.kill();
        agent.restart()?;
        kills += 1;
    }
    let report: Value = serde_json::from_str(&load.line()?).context("the load's report")?;
    let failed = report
        .get("failed")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    println!(
        "  {kills} kills and restarts; {} connections, {failed} failed",
        report.get("done").cloned().unwrap_or_default()
    );

    heading("5. A backend goes: a connected UDP socket follows, and keeps its port");
    follow(&stage, first)?;

    heading("6. What the kernel counted");
    counters(&agent.show("drops")?);
    if cli.stay {
        heading("Look around, in another terminal; Enter here takes everything down");
        let node = first;
        let flags = format!(
            "--bpffs {} --run-dir {}",
            node.bpffs.display(),
            node.run_dir.display()
        );
        for command in ["status", "services", "backends", "pods", "nodes", "drops"] {
            println!("  penstock {command} {flags}");
        }
        println!(
            "  nsenter --net=/run/netns/{} ip addr",
            stage.client.host.name
        );
        println!("  $EDITOR {}/services.json", node.manifests.display());
        let mut line = String::new();
        std::io::stdin()
            .read_line(&mut line)
            .context("reading from the terminal")?;
    }
    drop(agents);
    drop(stage);
    drop(testbed);
    heading(&format!(
        "Everything is gone again, after {:.1} s.",
        started.elapsed().as_secs_f32()
    ));
    println!(
        "  `cargo xtask demo -- --stay` keeps it up to look around; README.md goes on from here."
    );
    Ok(())
}

/// What was counted: first what clients were refused or lost, then what was done for them.
fn counters(counts: &Value) {
    for (title, is_drop) in [("refused or dropped", true), ("done", false)] {
        println!("  {title:24} {:>8}  meaning", "count");
        let counts = counts.as_array().into_iter().flatten();
        for count in counts.filter(|count| count.get("dropped") == Some(&is_drop.into())) {
            let (name, meaning) = (word(count, "name"), word(count, "meaning"));
            let count = count.get("count").and_then(Value::as_u64).unwrap_or(0);
            if count > 0 {
                println!("    {name:22} {count:>8}  {meaning}");
            }
        }
    }
}

/// Three services: two backends, the client itself, nobody.
fn services(stage: &Stage) -> String {
    let [a, b] = &stage.servers;
    let with_ports = |name, number| {
        Service::new(name, number)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP")
            .json()
    };
    let mut items = vec![
        with_ports("web", 10),
        with_ports("own", 11),
        with_ports("empty", 12),
    ];
    items.extend(Slice::both("web", 8080, &[a, b]));
    items.extend(Slice::both("own", 8080, &[&stage.client]));
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

fn word<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn join(value: Option<&Value>) -> String {
    let texts = value
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    texts.collect::<Vec<_>>().join(" ")
}

fn ask(stage: &Stage, how: &str, from: &Host, protocol: &str, to: &str) -> Result<()> {
    let answer = from.ask(protocol, to, &[])?;
    let result = match answer.get("error") {
        Some(error) => error.as_str().unwrap_or_default().to_owned(),
        None => format!(
            "{}, which sees {}",
            stage.shown(word(&answer, "server")),
            word(&answer, "source")
        ),
    };
    println!("  {how:34} {protocol} {to:23} -> {result}");
    Ok(())
}

/// Takes the backend of a connected UDP socket away.
fn follow(stage: &Stage, node: &penstock_testbed::Node) -> Result<()> {
    let [a, b] = &stage.servers;
    let mut asking = stage.client.host.traffic(&[
        "keep",
        "udp-connected",
        "10.96.0.10:80",
        "--interval-ms",
        "2",
    ])?;
    let first: Value = serde_json::from_str(&asking.line()?)?;
    let (gone, left) = if word(&first, "server") == a.host.name {
        (a, b)
    } else {
        (b, a)
    };
    let service = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .port("udp", 80, "UDP")
        .json();
    let mut items = vec![service];
    items.extend(Slice::both("web", 8080, &[left]));
    let text = json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string();
    node.manifest("services.json", &text)?;
    let changed = Instant::now();
    loop {
        let answer: Value = serde_json::from_str(&asking.line()?)?;
        if word(&answer, "server") == left.host.name {
            println!(
                "  {} is gone, {} answers after {:.0} ms; source port before {}, after {}",
                stage.shown(&gone.host.name),
                stage.shown(&left.host.name),
                changed.elapsed().as_secs_f32() * 1_000.0,
                word(&first, "source")
                    .rsplit(':')
                    .next()
                    .unwrap_or_default(),
                word(&answer, "source")
                    .rsplit(':')
                    .next()
                    .unwrap_or_default()
            );
            return Ok(());
        }
        anyhow::ensure!(
            changed.elapsed() < Duration::from_secs(3),
            "the socket sticks: {answer}"
        );
    }
}
