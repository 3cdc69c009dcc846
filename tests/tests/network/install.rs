//! What the runtime is told, and when.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Agent, Node, PluginError, Source, Testbed, eventually, list, patiently, require_kernel,
};
use serde_json::{Value, json};

use crate::net::{Net, asked, reaches};

#[test]
fn the_runtime_is_told_of_the_network_once_it_can_be_had() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let node = testbed.network_node()?;
    without_ranges(&node)?;
    let mut agent = Agent::begin_network(&node, &Source::Manifests, &[])?;
    explains_itself(&agent)?;
    assert_eq!(files(&node.cni_conf_dir())?, BTreeSet::new());
    assert_eq!(files(&node.cni_bin_dir())?, BTreeSet::new());

    node.knows(&[&node])?;
    // As soon as there is a configuration, it is whole, its plugin is there, and pods are served.
    let plugin = patiently("the runtime is told", || {
        match files(&node.cni_conf_dir())? {
            files if files.is_empty() => anyhow::bail!("{}", agent.log()),
            _ => Ok(node.plugin()),
        }
    })??;
    plugin.status()?;
    let mode = fs::metadata(node.cni_bin_dir().join("penstock-cni"))?.permissions();
    assert_eq!(mode.mode() & 0o777, 0o755);
    let only = |name: &str| BTreeSet::from([name.to_owned()]);
    assert_eq!(files(&node.cni_conf_dir())?, only("10-penstock.conflist"));
    assert_eq!(files(&node.cni_bin_dir())?, only("penstock-cni"));
    let pod = testbed.network_pod(&node)?;

    // An agent that can't serve says so, although the configuration of the one before is there.
    agent.kill();
    assert_eq!(code(plugin.status())?, 50);
    without_ranges(&node)?;
    let agent = Agent::begin_network(&node, &Source::Manifests, &[])?;
    explains_itself(&agent)?;
    assert_eq!(code(plugin.status())?, 50);
    let error = testbed.network_pod(&node).expect_err("there is no range");
    assert_eq!(code(Err(error))?, 11, "try again later");
    // What is there stays, and goes when it is told to.
    let server = pod.host.serve(8080)?;
    asked(&node.host, &pod.host)?;
    drop(server);
    testbed.end_network_pod(&node, &pod)?;

    node.knows(&[&node])?;
    eventually("pods are served again", || plugin.status())?;
    let network = &agent.status()?["network"];
    assert_eq!(network["routing"], "vxlan", "{network}");
    assert_eq!(network["vxlan_port"], 4789, "{network}");
    assert_eq!(network["masquerade"], true, "{network}");
    // Nor does one that could and can no longer, for more than a moment.
    without_ranges(&node)?;
    eventually("the runtime is told that it no longer can", || {
        ensure!(plugin.status().is_err(), "{}", agent.log());
        Ok(())
    })?;
    assert_eq!(code(plugin.status())?, 50);
    let error = testbed.network_pod(&node).expect_err("there is no range");
    assert_eq!(code(Err(error))?, 11, "try again later");
    node.knows(&[&node])?;
    eventually("pods are served once more", || plugin.status())
}

/// The agent knows its node, which has no range for pods.
fn without_ranges(node: &Node) -> Result<()> {
    let mut object = node.object();
    object["spec"] = json!({});
    node.manifest("nodes.json", &list(&[object]))
}

fn explains_itself(agent: &Agent) -> Result<()> {
    eventually("the agent says what is missing", || {
        let problem = agent.status()?["network"]["problem"].to_string();
        ensure!(problem.contains("no pod range yet"), "{problem}");
        Ok(())
    })
}

/// What a folder holds; nothing if it is not there.
fn files(folder: &std::path::Path) -> Result<BTreeSet<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error).with_context(|| folder.display().to_string()),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    // What is being written is called so that no runtime takes it.
    let names: std::io::Result<BTreeSet<String>> = names.collect();
    Ok(names?
        .into_iter()
        .filter(|name| !name.starts_with('.'))
        .collect())
}

/// The number of what a plugin answered.
fn code(result: Result<()>) -> Result<u64> {
    let error = result.expect_err("the plugin refuses");
    Ok(error.downcast::<PluginError>()?.code)
}

#[test]
fn what_somebody_removed_comes_back() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let net = Net::new(&[])?;
    let [client, far] = [0, 2].map(|index: usize| &net.pods[index].host);
    let node = &net.nodes[0];
    reaches(client, far)?;
    let before = routes(node)?;
    assert!(!before.is_empty());
    fs::remove_dir_all(node.cni_conf_dir())?;
    fs::remove_dir_all(node.cni_bin_dir())?;
    node.host.run("ip", &["link", "del", "penstock0"])?;
    let started = std::time::Instant::now();
    patiently("all is as it was", || {
        let after = routes(node)?;
        ensure!(after == before, "{after:?} is not {before:?}");
        node.plugin()?.status()
    })?;
    eprintln!("{:.1} s", started.elapsed().as_secs_f32());
    patiently("the other node's pods are reached", || {
        client.who_answers("tcp", &std::net::SocketAddr::new(far.ip4, 8080).to_string())
    })?;
    reaches(client, far)?;
    reaches(far, client)
}

/// The destinations of the network's routes.
fn routes(node: &Node) -> Result<BTreeSet<String>> {
    let mut routes = BTreeSet::new();
    for family in ["-4", "-6"] {
        let text = node
            .host
            .run("ip", &[family, "-j", "route", "show", "proto", "180"])?;
        let list: Vec<Value> = serde_json::from_str(&text).with_context(|| text.clone())?;
        routes.extend(list.iter().map(|route| route["dst"].to_string()));
    }
    Ok(routes)
}

#[test]
fn cleanup_leaves_nothing_of_a_network_without_pods() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut net = Net::new(&["--cni-conf-name", "05-mine.conflist"])?;
    let conf_dir = net.nodes[0].cni_conf_dir();
    let own = "05-mine.conflist";
    // Somebody else's, which is nobody's business.
    fs::write(conf_dir.join("99-other.conflist"), "{}")?;
    let cleanup = |net: &Net, options: &[&str]| {
        net.nodes[0].penstock("cleanup", &[&["--cni-conf-name", own], options].concat())
    };
    let said = cleanup(&net, &[])?;
    ensure!(
        said.code == 1 && said.errors.contains("stop it first"),
        "{said:?}"
    );
    net.agents[0].kill();
    // Who is on the network is not known without its configuration.
    let said = net.nodes[0].penstock("cleanup", &[])?;
    ensure!(
        said.code == 1 && said.errors.contains("--cni-conf-name"),
        "{said:?}"
    );
    // Pods would reach nobody any more, and the runtime could not end them.
    let said = cleanup(&net, &[])?;
    ensure!(
        said.code == 1 && said.errors.contains("drain the node"),
        "{said:?}"
    );
    for pod in &net.pods[..2] {
        ensure!(said.errors.contains(&pod.host.name), "{said:?}");
    }
    let there = |net: &Net| -> Result<[bool; 4]> {
        let node = &net.nodes[0];
        let links = node.host.run("ip", &["-o", "link"])?;
        Ok([
            links.contains("penstock0"),
            !routes(node)?.is_empty(),
            files(&conf_dir)?.contains(own),
            node.run_dir.join("network.json").exists(),
        ])
    };
    assert_eq!(there(&net)?, [true; 4], "what is refused changes nothing");
    for pod in net.pods.split_off(0) {
        if pod.node == net.nodes[0].name() {
            net.testbed.end_network_pod(&net.nodes[0], &pod)?;
        }
    }
    let said = cleanup(&net, &[])?;
    assert_eq!(said.code, 0, "{said:?}");
    for word in [own, "pins", "routes", "penstock0", "network.json"] {
        ensure!(said.output.contains(word), "{word}: {said:?}");
    }
    assert_eq!(there(&net)?, [false; 4]);
    assert_eq!(
        files(&conf_dir)?,
        BTreeSet::from(["99-other.conflist".to_owned()])
    );
    let said = cleanup(&net, &[])?;
    ensure!(
        said.code == 0 && said.output.contains("nothing to remove"),
        "{said:?}"
    );
    // And an agent that starts makes all of it anew.
    net.agents[0].restart()?;
    eventually("the network is there again", || {
        ensure!(there(&net)? == [true; 4]);
        Ok(())
    })
}

#[test]
fn plugins_after_ours_are_in_the_configuration() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let mut testbed = Testbed::new()?;
    let node = testbed.network_node()?;
    node.knows(&[&node])?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = testbed.folder().join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    // What is no plugin's is refused before anything is touched.
    let manifests = node.run_dir.with_file_name("manifests");
    let manifests = manifests.display().to_string();
    for (text, reason) in [
        ("{", "not JSON"),
        ("[]", "no object"),
        (r#"{"kind": "bandwidth"}"#, "names no plugin"),
        (r#"{"type": 1}"#, "names no plugin"),
    ] {
        let path = file("garbage.json", text)?;
        let arguments = [
            "--manifests",
            &manifests,
            "--node-name",
            &node.name(),
            "--network",
            "--cni-chain",
            &path,
        ];
        let said = node.penstock("agent", &arguments)?;
        ensure!(
            said.code != 0 && said.errors.contains(reason) && said.errors.contains(&path),
            "{text}: {said:?}"
        );
    }
    assert_eq!(files(&node.cni_conf_dir())?, BTreeSet::new());

    let portmap = r#"{"type": "portmap", "capabilities": {"portMappings": true}, "snat": false}"#;
    let chain = [
        file(
            "bandwidth.json",
            r#"{"type": "bandwidth", "ingressRate": 8}"#,
        )?,
        file("portmap.json", portmap)?,
    ];
    let options = ["--cni-chain", &chain[0], "--cni-chain", &chain[1]];
    let _agent = Agent::start_network(&node, &Source::Manifests, &options)?;
    let text = fs::read_to_string(node.cni_conf_dir().join("10-penstock.conflist"))?;
    let list: Value = serde_json::from_str(&text)?;
    let plugins = list["plugins"].as_array().context("a list")?;
    let kinds: Vec<&Value> = plugins.iter().map(|plugin| &plugin["type"]).collect();
    assert_eq!(kinds, ["penstock-cni", "bandwidth", "portmap"]);
    // The second has rates of its own, and leaves pods' to ours.
    let own = json!({ "bandwidth": true, "ips": true });
    assert_eq!(plugins[0]["capabilities"], own);
    assert_eq!(plugins[1]["ingressRate"], 8);
    assert_eq!(plugins[2]["snat"], false);
    assert_eq!(list["cniVersions"], json!(["0.3.1", "0.4.0", "1.0.0"]));
    Ok(())
}
