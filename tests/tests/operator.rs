//! The agent as an operator meets it: what it says, what it survives, what it does when asked.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Result;
use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;
use penstock_agent::dataplane::pins::Pins;
use penstock_common::Config;
use penstock_testbed::{
    Agent, Lease, Scene, Source, all_answer, binary, eventually, frontends, require_kernel,
};
use serde_json::{Value, json};

#[test]
fn a_service_waits_for_its_address_while_that_is_the_nodes_own() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0].host;
    let [v4, v6] = frontends(10, 80);
    let own = |verb: &str, service: SocketAddr| {
        let ip = service.ip();
        let address = format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
        node.run("ip", &["address", verb, &address, "dev", "lo"])
    };
    own("add", v4)?;
    let agent = scene.agent(&[])?;
    // The first was there before the agent; the others come and go under it.
    for (number, service) in [v4, v6, v4].into_iter().enumerate() {
        let refusal = format!("{} is this node's own address", service.ip());
        let refusals = || agent.log().matches(&refusal).count();
        let before = refusals();
        if number > 0 {
            own("add", service)?;
        }
        eventually("the service is refused", || {
            let status = agent.status()?;
            let problems = status["problems"].to_string();
            anyhow::ensure!(problems.contains(&refusal), "{status}");
            Ok(())
        })?;
        own("del", service)?;
        let client = &scene.client.host;
        eventually("the service is served", || {
            client.who_answers("tcp", &service.to_string())
        })?;
        all_answer(client, "tcp", service, &scene.names())?;
        assert_eq!(agent.status()?["problems"], json!([]));
        let log = agent.log();
        let expected = if number > 0 { before + 1 } else { 1 };
        assert_eq!(refusals(), expected, "{refusal} is said once a time: {log}");
        let returns = log.matches("default/web gets every frontend that it wants again");
        assert_eq!(returns.count(), number + 1, "{log}");
    }
    Ok(())
}

/// Waits until the agent began anew in its process, and serves.
fn began_anew(agent: &Agent, times: usize) -> Result<()> {
    eventually("the agent began anew", || {
        let log = agent.log();
        anyhow::ensure!(log.matches("; beginning anew").count() == times, "{log}");
        let status = agent.status()?;
        anyhow::ensure!(status["pid"] == json!(agent.pid()), "{status}");
        anyhow::ensure!(status["settled"] == json!(true), "{status}");
        Ok(())
    })
}

#[test]
fn what_is_removed_from_under_the_agent_comes_back() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let [service, _] = frontends(10, 80);
    let node = &scene.nodes[0];
    let hosts = [
        &scene.client.host,
        &scene.client.host.without_socket_hooks(),
    ];
    // Somebody removes one hook, then every pin.
    std::fs::remove_file(link(&node.bpffs, "connect4")?)?;
    began_anew(&agent, 1)?;
    let removed = node.penstock("cleanup", &["--force"])?;
    assert_eq!(removed.code, 0, "{removed:?}");
    began_anew(&agent, 2)?;
    agent.wait_for_pods(2)?;
    for host in hosts {
        all_answer(host, "tcp", service, &scene.names())?;
    }
    Ok(())
}

/// The pin of a link, whatever the version of the maps.
fn link(bpffs: &Path, name: &str) -> Result<PathBuf> {
    let versions = std::fs::read_dir(bpffs)?;
    let mut links = versions.map(|version| Ok(version?.path().join("links").join(name)));
    let found: Option<Result<PathBuf>> =
        links.find(|path: &Result<PathBuf>| path.as_ref().is_ok_and(|path| path.exists()));
    found.unwrap_or_else(|| anyhow::bail!("{name} is not pinned under {}", bpffs.display()))
}

#[test]
fn a_cgroup_that_was_made_anew_gets_its_hooks() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut scene = Scene::new()?;
    scene.manifests()?;
    // A node without pods: nobody keeps its cgroup.
    let node = scene.testbed.node()?;
    let manifest = "all.json";
    std::fs::copy(
        scene.nodes[0].manifests.join(manifest),
        node.manifests.join(manifest),
    )?;
    let agent = Agent::start(&node, &Source::Manifests, &[])?;
    let service = frontends(11, 80)[0].to_string();
    assert_eq!(
        node.host.who_answers("tcp", &service)?,
        scene.client.host.name
    );
    std::fs::remove_dir(&node.cgroup)?;
    eventually("the loss is told", || {
        let status = agent.status()?;
        anyhow::ensure!(
            status["problems"].to_string().contains("was removed"),
            "{status}"
        );
        Ok(())
    })?;
    std::fs::create_dir(&node.cgroup)?;
    began_anew(&agent, 1)?;
    assert_eq!(
        node.host.who_answers("tcp", &service)?,
        scene.client.host.name
    );
    assert_eq!(agent.status()?["problems"], json!([]));
    Ok(())
}

#[test]
fn only_one_agent_writes_the_same_maps() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let before = agent.show("services")?;
    let mut other = scene.nodes[0].clone();
    other.run_dir = scene.testbed.folder().join("other");
    let refused = Agent::start(&other, &Source::Manifests, &[]);
    let reason = format!("{:#}", refused.err().expect("a second agent"));
    assert!(reason.contains("another agent uses"), "{reason}");
    // Neither does cleanup, which finds no agent to ask at the other's place.
    let cleanup = other.penstock("cleanup", &[])?;
    assert_eq!(cleanup.code, 1, "{cleanup:?}");
    assert!(cleanup.errors.contains("an agent uses"), "{cleanup:?}");
    assert_eq!(agent.show("services")?, before);
    Ok(())
}

#[test]
fn a_file_that_takes_long_delays_neither_answers_nor_the_end() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let mut agent = scene.agent(&[])?;
    // Held before the agent can know it, and then put among its manifests.
    let aside = scene.testbed.folder().join("slow.yaml");
    std::fs::write(&aside, "# nothing\n")?;
    let lease = Lease::take(&aside)?;
    std::fs::rename(&aside, scene.nodes[0].manifests.join("slow.yaml"))?;
    eventually("the agent waits for the file", || {
        let status = agent.status()?;
        anyhow::ensure!(lease.is_wanted(), "{status}");
        anyhow::ensure!(
            status["sources"].to_string().contains("still reading"),
            "{status}"
        );
        Ok(())
    })?;
    agent.signal(Signal::SIGTERM)?;
    let asked = Instant::now();
    eventually("the agent ended", || {
        anyhow::ensure!(!agent.is_running(), "{}", agent.log());
        Ok(())
    })?;
    assert!(asked.elapsed() < Duration::from_secs(5));
    drop(lease);
    let socket = scene.nodes[0].run_dir.join("agent.sock");
    assert!(!socket.exists(), "the socket is gone with the agent");
    agent.restart()
}

#[test]
fn an_agent_that_hangs_is_said_to() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let agent = scene.agent(&[])?;
    let node = &scene.nodes[0];
    agent.signal(Signal::SIGSTOP)?;
    std::thread::scope(|scope| {
        let commands = ["status", "services", "backends", "pods", "nodes", "cleanup"];
        let asking = commands.map(|command| {
            let ask = || (Instant::now(), node.penstock(command, &[]), Instant::now());
            (command, scope.spawn(ask))
        });
        for (command, asking) in asking {
            let (began, said, ended) = asking.join().expect("no panic");
            let said = said.expect("it runs");
            let text = format!("{command}: {said:?}");
            assert_eq!(said.code, 1, "{text}");
            assert!(said.errors.contains("does not answer within 5 s"), "{text}");
            assert!(ended - began < Duration::from_secs(10), "{text}");
        }
    });
    assert_eq!(node.penstock("drops", &[])?.code, 0);
    agent.signal(Signal::SIGCONT)?;
    assert_eq!(node.penstock("status", &[])?.code, 0);
    Ok(())
}

#[test]
fn commands_say_whether_an_agent_serves() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    let views = ["services", "backends"];
    for command in ["services", "backends", "drops"] {
        let said = node.penstock(command, &[])?;
        assert_eq!(said.code, 1, "{said:?}");
        assert!(
            said.errors.starts_with("penstock: nothing is installed"),
            "{said:?}"
        );
    }
    assert_eq!(node.penstock("status", &[])?.code, 1);
    let mut agent = scene.agent(&[])?;
    assert_eq!(node.penstock("status", &[])?.code, 0);
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        agent.signal(signal)?;
        eventually("the signal is told", || {
            let log = agent.log();
            anyhow::ensure!(log.contains(&format!("ignoring {signal}")), "{log}");
            Ok(())
        })?;
    }
    let before = views.map(|view| agent.show(view));
    agent.kill();
    let status = node.penstock("status", &["-o", "json"])?;
    assert_eq!(status.code, 1);
    let status: Value = serde_json::from_str(&status.output)?;
    assert_eq!(
        status,
        json!({ "running": false, "synced": false, "pinned": true })
    );
    // Who knows no names says so, and all else as the agent did.
    for (view, before) in views.into_iter().zip(before) {
        let mut before = before?;
        let rows = before.as_array_mut().expect("a list");
        for row in rows.iter_mut() {
            row["service"] = Value::Null;
            row["port"] = Value::Null;
        }
        let mut after = agent.show(view)?;
        for value in [&mut before, &mut after] {
            value
                .as_array_mut()
                .expect("a list")
                .sort_by_key(Value::to_string);
        }
        assert_eq!(after, before, "{view}");
    }
    agent.restart()
}

#[test]
fn a_command_ends_with_its_reader() -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let folder = tempfile::tempdir()?;
    let output = Command::new(binary("penstock")?)
        .arg("status")
        .arg("--run-dir")
        .arg(folder.path())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()?
        .wait_with_output()?;
    assert_eq!(output.status.signal(), Some(Signal::SIGPIPE as i32));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    Ok(())
}

#[test]
fn an_agent_that_knows_its_node_no_more_keeps_the_address_that_it_had() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let scene = Scene::new()?;
    scene.manifests()?;
    let node = &scene.nodes[0];
    // Its object names an address that is not the first that it has.
    let second = "172.31.0.77";
    node.host
        .run("ip", &["address", "add", "172.31.0.77/24", "dev", "eth0"])?;
    let object = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() },
        "status": { "addresses": [{ "type": "InternalIP", "address": second }] },
    });
    node.manifest("node.json", &object.to_string())?;
    let mut agent = scene.agent(&[])?;
    let config: Array<MapData, Config> =
        Map::Array(Pins::at(&node.bpffs).map("CONFIG")?).try_into()?;
    let speaks_as = || -> Result<Ipv4Addr> { Ok(Ipv4Addr::from(config.get(&0, 0)?.node4)) };
    eventually("it speaks as its object says", || {
        anyhow::ensure!(speaks_as()?.to_string() == second);
        Ok(())
    })?;
    agent.kill();
    std::fs::write(node.manifests.join("node.json"), "{")?;
    agent.begin_again()?;
    // All the time until it serves, and for a moment longer.
    let stays = |time: Duration| -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < time {
            assert_eq!(speaks_as()?.to_string(), second);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    eventually("it serves again", || {
        stays(Duration::from_millis(100))?;
        anyhow::ensure!(agent.status()?["synced"] == true);
        Ok(())
    })?;
    stays(Duration::from_secs(1))
}

#[test]
fn cleanup_removes_nothing_that_is_no_pin() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("v4").join("precious");
    std::fs::create_dir(folder.path().join("v4"))?;
    std::fs::write(&file, "")?;
    let said = std::process::Command::new(penstock_testbed::binary("penstock")?)
        .args(["cleanup", "--bpffs"])
        .arg(folder.path())
        .arg("--run-dir")
        .arg(folder.path())
        .output()?;
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(words.contains("no bpffs"), "{words}");
    assert!(file.exists());

    // Somebody else's pins beside ours.
    let scene = Scene::new()?;
    let bpffs = std::path::PathBuf::from(format!("/sys/fs/bpf/pn{}-mixed", std::process::id()));
    let foreign = bpffs.join("theirs");
    std::fs::create_dir_all(&foreign)?;
    std::fs::create_dir_all(bpffs.join("v4"))?;
    let run_dir = folder.path().display().to_string();
    let place = bpffs.display().to_string();
    let penstock = penstock_testbed::binary("penstock")?;
    let said = scene.nodes[0].host.run(
        penstock.to_str().expect("a text"),
        &[
            "cleanup",
            "--bpffs",
            &place,
            "--run-dir",
            &run_dir,
            "--cni-conf-dir",
            &run_dir,
        ],
    );
    let is_left = foreign.exists();
    let is_gone = !bpffs.join("v4").exists();
    std::fs::remove_dir_all(&bpffs)?;
    said?;
    assert!(is_left && is_gone);
    Ok(())
}
