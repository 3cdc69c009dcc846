//! `deploy/` as its reader uses it: a real API server that checks who may do what, the controllers that
//! make pods of it, a kubelet that runs them from the image, traffic, and the way back.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeSet, fs, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{
    Cluster, Cni, KubernetesNode, Node, PROTOCOLS, Pod, PodObject, Process, Service, Slice,
    all_answer, binary, eventually, frontends, patiently, require_kubelet,
};
use serde_json::Value;

#[test]
fn the_service_proxy_is_installed_serves_and_is_taken_away() -> Result<()> {
    let Some(assets) = require_kubelet() else {
        return Ok(());
    };
    let stage = Stage::new(&assets, "service-proxy.yaml", Cni::reference)?;
    stage.install()?;
    stage.account_may_list_and_watch_only()?;
    let [client, server] = stage.serve()?;
    stage.agent_has_no_problems()?;
    stage.delete_agent()?;
    stage.reaches(&client, &server)?;
    stage.cleanup()?;
    for service in frontends(10, 80) {
        let answer = client.host.ask("tcp", &service.to_string(), &[])?;
        assert!(answer.get("error").is_some(), "{service}: {answer}");
    }
    Ok(())
}

#[test]
fn the_pod_network_is_installed_serves_and_is_taken_away() -> Result<()> {
    let Some(assets) = require_kubelet() else {
        return Ok(());
    };
    let stage = Stage::new(&assets, "pod-network.yaml", |_| Cni::default())?;
    let node = stage.node();
    stage.install()?;
    let [client, server] = stage.serve()?;
    stage.agent_has_no_problems()?;
    stage.delete_agent()?;
    stage.reaches(&client, &server)?;

    stage.cluster.delete(&["client", "server"])?;
    patiently("pods are gone", || {
        let links = node.interfaces()?;
        ensure!(
            !links.iter().any(|name| name.starts_with("pn")),
            "{links:?}"
        );
        Ok(())
    })?;
    let configuration = node.node.cni_conf_dir().join("10-penstock.conflist");
    assert!(node.interfaces()?.contains("penstock0"));
    assert!(configuration.exists());
    stage.cleanup()?;
    assert!(!node.interfaces()?.contains("penstock0"));
    assert!(!configuration.exists());
    Ok(())
}

#[test]
fn both_variants_differ_by_the_pod_network_alone() {
    let proxy = manifest("service-proxy.yaml");
    let network = manifest("pod-network.yaml");
    let is_content = |line: &&str| !line.trim_start().starts_with('#');
    let proxy: BTreeSet<&str> = proxy.lines().filter(is_content).collect();
    let network: BTreeSet<&str> = network.lines().filter(is_content).collect();
    let without: Vec<&str> = proxy.difference(&network).map(|line| line.trim()).collect();
    assert_eq!(without, ["args: [agent]"]);
    let more = network.difference(&proxy).map(|line| line.trim());
    let other: Vec<&str> = more.filter(|line| !line.contains("name: cni-")).collect();
    assert_eq!(other, ["args: [agent, --network]"]);
}

/// A file of `deploy/`.
fn manifest(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A cluster of one node, which has the image and runs nothing yet.
struct Stage {
    /// The file of the variant.
    variant: &'static str,
    _controllers: [Process; 2],
    cluster: Cluster,
    started: Instant,
}

impl Stage {
    fn new(assets: &Path, variant: &'static str, network: impl Fn(&Node) -> Cni) -> Result<Self> {
        let started = Instant::now();
        let cluster = Cluster::start(assets, 1, network)?;
        let stage = Self {
            variant,
            _controllers: cluster.api.controllers()?,
            cluster,
            started,
        };
        // The usual places are the node's own, as the other folders of `deploy/` are already.
        let node = stage.node();
        node.run("mount", &["-t", "bpf", "bpf", "/sys/fs/bpf"])?;
        stage.passed("the cluster is there");
        node.import_release()?;
        stage.passed("a node has the image");
        Ok(stage)
    }

    fn node(&self) -> &KubernetesNode {
        &self.cluster.nodes[0]
    }

    /// Says how long it took.
    fn passed(&self, what: &str) {
        eprintln!("{:.1} s: {what}", self.started.elapsed().as_secs_f32());
    }

    /// `kubectl apply -f` of a file, and what the README says comes before and after.
    fn install(&self) -> Result<()> {
        let api = &self.cluster.api;
        let address = api.address();
        let host = format!("--from-literal=KUBERNETES_SERVICE_HOST={}", address.ip());
        let port = format!("--from-literal=KUBERNETES_SERVICE_PORT={}", address.port());
        let create = [
            "create",
            "configmap",
            "penstock-api-server",
            "-n",
            "kube-system",
        ];
        api.kubectl(&[&create[..], &[&host, &port]].concat())?;
        self.apply("account.yaml")?;
        self.apply(self.variant)?;
        self.wait_for_rollout("penstock")?;
        self.cluster.wait_until_ready()?;
        self.passed("the agent's pod and the node are ready");
        Ok(())
    }

    /// Applies a file. The runtime's folders are the test's, and so is the image of pods that wait.
    fn apply(&self, name: &str) -> Result<()> {
        let node = &self.node().node;
        let own = [
            ("path: /etc/cni/net.d", node.cni_conf_dir()),
            ("path: /opt/cni/bin", node.cni_bin_dir()),
        ];
        let mut text = manifest(name);
        for (usual, folder) in own {
            text = text.replace(usual, &format!("path: {}", folder.display()));
        }
        let text = text.replace("registry.k8s.io/pause:3.9", "penstock.test/pause:1");
        self.cluster.api.kubectl_with(&["apply"], &text).map(drop)
    }

    fn wait_for_rollout(&self, name: &str) -> Result<()> {
        let set = format!("daemonset/{name}");
        let arguments = ["rollout", "status", &set, "-n", "kube-system"];
        let timeout = ["--timeout=60s"];
        let api = &self.cluster.api;
        let rolled_out = api.kubectl(&[&arguments[..], &timeout].concat());
        rolled_out.map(drop).with_context(|| {
            let pods = ["describe", "pods", "-n", "kube-system"];
            let pods = api.kubectl(&pods).unwrap_or_default();
            format!("{pods}\n{}\n{}", self.log_of_pods(), self.node().log())
        })
    }

    /// What containers of the node's said.
    fn log_of_pods(&self) -> String {
        let text = self.node().run("grep", &["-r", "", "/var/log/pods"]);
        text.unwrap_or_else(|error| format!("{error:#}"))
    }

    /// The account may do what the agent needs, and nothing else that not everybody may.
    fn account_may_list_and_watch_only(&self) -> Result<()> {
        let who = "--as=system:serviceaccount:kube-system:penstock";
        let api = &self.cluster.api;
        let all = api.kubectl(&["auth", "can-i", "--list", "--no-headers", who])?;
        // A resource or, in brackets, a path; names; verbs. Everybody may ask what they may.
        let resources = all
            .lines()
            .filter(|line| !line.starts_with([' ', '[']) && !line.starts_with("selfsubject"));
        let may: BTreeSet<String> = resources
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let needed = [
            "services",
            "nodes",
            "pods",
            "endpointslices.discovery.k8s.io",
        ];
        let needed = needed.map(|resource| format!("{resource} [] [] [list watch]"));
        assert_eq!(may, BTreeSet::from(needed), "{all}");
        self.passed("the account may list and watch");
        Ok(())
    }

    /// Pods, and a service that leads from one to the other.
    fn serve(&self) -> Result<[Pod; 2]> {
        let node = &self.node().node;
        let pods = ["client", "server"].map(|name| PodObject::new(name, node));
        let pods = self.cluster.run(&pods)?;
        let pods: [Pod; 2] = pods.try_into().map_err(|_| anyhow::anyhow!("two pods"))?;
        let web = Service::new("web", 10)
            .port("tcp", 80, "TCP")
            .port("udp", 80, "UDP");
        let api = &self.cluster.api;
        api.apply(&web.json())?;
        for slice in Slice::both("web", 8080, &[&pods[1]]) {
            api.apply(&slice)?;
        }
        let [client, server] = &pods;
        eventually("the service is there", || {
            let answers = frontends(10, 80).map(|service| {
                let from = &client.host;
                // Their packets need the hooks at their interfaces, which come after the pods.
                from.who_answers("tcp", &service.to_string())?;
                from.without_socket_hooks()
                    .who_answers("tcp", &service.to_string())
            });
            answers.into_iter().collect::<Result<Vec<_>>>()
        })?;
        self.reaches(client, server)?;
        Ok(pods)
    }

    /// A pod reaches another through the service, by its sockets and packet by packet.
    fn reaches(&self, client: &Pod, server: &Pod) -> Result<()> {
        let names = BTreeSet::from([server.host.name.clone()]);
        for service in frontends(10, 80) {
            for host in [client.host.clone(), client.host.without_socket_hooks()] {
                for protocol in PROTOCOLS {
                    all_answer(&host, protocol, service, &names)?;
                }
            }
        }
        self.passed("a pod reaches a service");
        Ok(())
    }

    /// `penstock status` on the node, where it finds the agent's socket as well.
    fn status(&self) -> Result<String> {
        self.node().run(binary("penstock")?, &["status"])
    }

    /// What the agent says in its container, where an operator asks it.
    fn agent_has_no_problems(&self) -> Result<()> {
        let exec = ["exec", "daemonset/penstock", "-n", "kube-system", "--"];
        let status = ["penstock", "status", "-o", "json"];
        eventually("the agent has no problems", || {
            let text = self.cluster.api.kubectl(&[&exec[..], &status].concat())?;
            let status: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
            let is_settled = status["settled"] == Value::Bool(true);
            let problems = status["problems"].as_array().context("no problems")?;
            ensure!(is_settled && problems.is_empty(), "{status}");
            Ok(())
        })?;
        let log = self.log_of_pods();
        assert!(
            log.contains("penstock") && !log.contains("forbidden"),
            "{log}"
        );
        Ok(())
    }

    /// Deletes the DaemonSet and waits until the agent is gone.
    fn delete_agent(&self) -> Result<()> {
        self.status()?;
        let api = &self.cluster.api;
        api.kubectl(&["delete", "daemonset", "penstock", "-n", "kube-system"])?;
        patiently("the agent is gone", || {
            ensure!(self.status().is_err(), "it answers");
            Ok(())
        })?;
        self.passed("the agent is gone");
        Ok(())
    }

    /// Takes everything away.
    fn cleanup(&self) -> Result<()> {
        let pins = self.node().path("/sys/fs/bpf/penstock");
        assert!(pins.exists(), "nothing to clean up");
        self.apply("cleanup.yaml")?;
        self.wait_for_rollout("penstock-cleanup")?;
        assert!(!pins.exists(), "{} is there", pins.display());
        self.passed("the node is clean");
        Ok(())
    }
}
