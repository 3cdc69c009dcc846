//! A small cluster: an API server, nodes with kubelets, and pods that are objects.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    apiserver::ApiServer,
    containerd::Cni,
    eventually,
    kubernetes::KubernetesNode,
    manifest::PodObject,
    testbed::{Node, Pod, Testbed},
};

/// Nodes without scheduler and controllers: pods name their node, and tests make the objects that
/// they need.
pub struct Cluster {
    // Dropped from top to bottom.
    /// The nodes.
    pub nodes: Vec<KubernetesNode>,
    /// The API server.
    pub api: ApiServer,
    /// What they are made of.
    pub testbed: Testbed,
    _turn: MutexGuard<'static, ()>,
}

/// Clusters of one process take turns: a machine for tests has processors for one.
static TURN: Mutex<()> = Mutex::new(());

impl Cluster {
    /// Starts it with programs from `assets` and `count` nodes, each with a network for its pods.
    pub fn start(assets: &Path, count: usize, network: impl Fn(&Node) -> Cni) -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut testbed = Testbed::new()?;
        let host = testbed.client()?;
        let api = ApiServer::start(assets, &host, testbed.folder())?;
        let mut cluster = Self {
            nodes: Vec::new(),
            api,
            testbed,
            _turn: turn,
        };
        for _ in 0..count {
            let node = cluster.testbed.node()?;
            let node = KubernetesNode::start(assets, &node, &cluster.api, &network(&node))?;
            cluster.nodes.push(node);
        }
        cluster.allow_pods()?;
        Ok(cluster)
    }

    /// Waits until pods can be run: the runtimes know the network.
    pub fn wait_until_ready(&self) -> Result<()> {
        let names: Vec<String> = self.nodes.iter().map(|node| node.node.name()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.explained(self.api.wait_for("Ready", "node", &names))
    }

    /// Makes what a controller would: the account that pods are admitted with.
    fn allow_pods(&self) -> Result<()> {
        let account = json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": "default", "namespace": "default" },
            "automountServiceAccountToken": false,
        });
        eventually("the namespace is there", || self.api.apply(&account))
    }

    /// Runs pods and waits until they serve.
    pub fn run(&self, pods: &[PodObject]) -> Result<Vec<Pod>> {
        for pod in pods {
            self.api.apply(&pod.json())?;
        }
        let names: Vec<&str> = pods.iter().map(PodObject::name).collect();
        self.explained(self.api.wait_for("Ready", "pod", &names))?;
        let running = names.iter().map(|name| {
            let object = self.api.get("pod", name)?;
            let node = object.pointer("/spec/nodeName").and_then(Value::as_str);
            let status = object.get("status").context("a pod has no status")?;
            self.node(node.unwrap_or_default())?.pod(name, status)
        });
        running.collect()
    }

    /// Deletes pods as anybody would. The nodes do it a little later; that they have is seen there
    /// first, for a kubelet may keep the objects until it next looks for garbage, once a minute.
    pub fn delete(&self, names: &[&str]) -> Result<()> {
        names
            .iter()
            .try_for_each(|name| self.api.delete("pod", name))
    }

    fn node(&self, name: &str) -> Result<&KubernetesNode> {
        let mut nodes = self.nodes.iter();
        nodes
            .find(|node| node.node.name() == name)
            .with_context(|| format!("there is no node {name:?}"))
    }

    /// An error with what the nodes logged.
    fn explained<T>(&self, result: Result<T>) -> Result<T> {
        result.with_context(|| {
            let logs = self.nodes.iter().map(|node| {
                let name = node.node.name();
                format!("{name}:\n{}", node.log())
            });
            logs.collect::<Vec<_>>().join("\n")
        })
    }
}
