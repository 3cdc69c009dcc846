//! The real kube-proxy, in its iptables or its ipvs mode, on a node of the testbed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{apiserver::ApiServer, host::Host, process::Process, testbed::Node};

/// All ranges of pods in a testbed.
const CLUSTER_RANGES: &str = "10.244.0.0/16,fd00:244::/32";

/// What a kubelet of kube-proxy's time writes beside it: the drop of what kube-proxy marks for it.
const MARKED: &str = "\
*nat
:KUBE-MARK-DROP - [0:0]
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
COMMIT
";

/// What kube-proxy makes of services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    /// Rules of iptables.
    Iptables,
    /// Virtual servers of IPVS, for a kernel with `ip_vs`, its schedulers rr, wrr and sh, and `dummy`.
    Ipvs,
}

impl ProxyMode {
    /// Its name in kube-proxy's configuration.
    const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        }
    }
}

/// A node's kube-proxy.
pub struct KubeProxy {
    process: Process,
    node: Host,
    log: PathBuf,
}

impl KubeProxy {
    /// Starts it with the program in `assets`, and does not wait.
    pub fn start(assets: &Path, node: &Node, api: &ApiServer, mode: ProxyMode) -> Result<Self> {
        let folder = node.manifests.with_file_name("kube-proxy");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let marked = folder.join("marked");
        fs::write(&marked, MARKED).with_context(|| format!("writing {}", marked.display()))?;
        for program in ["iptables-restore", "ip6tables-restore"] {
            let file = marked.to_str().context("a folder's name is no text")?;
            node.host.run(program, &["--noflush", file])?;
        }
        let config = folder.join("config.json");
        let text = configuration(node, &api.kubeconfig(), mode).to_string();
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let config = config.to_str().context("a folder's name is no text")?;
        let log = folder.join("log");
        let program = assets.join("kube-proxy");
        let process = node
            .host
            .start_logging(program, &["--config", config], &log)?;
        Ok(Self {
            process,
            node: node.host.clone(),
            log,
        })
    }

    /// Its rules in the nat table, for IPv4 or IPv6.
    pub fn rules(&mut self, is_v4: bool) -> Result<String> {
        self.is_alive()?;
        let program = if is_v4 {
            "iptables-save"
        } else {
            "ip6tables-save"
        };
        self.node.run(program, &["-t", "nat"])
    }

    /// The kernel's virtual servers on its node (`/proc/net/ip_vs`), both families.
    pub fn virtual_servers(&mut self) -> Result<String> {
        self.is_alive()?;
        self.node.run("cat", &["/proc/thread-self/net/ip_vs"])
    }

    fn is_alive(&mut self) -> Result<()> {
        ensure!(
            self.process.is_running(),
            "kube-proxy ended: {}",
            self.log()
        );
        Ok(())
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn configuration(node: &Node, kubeconfig: &Path, mode: ProxyMode) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "featureGates": { "IPv6DualStack": true },
        "mode": mode.name(),
        "hostnameOverride": node.name(),
        // Said, so that it does not look for the node's object.
        "bindAddress": node.host.ip4.to_string(),
        "clusterCIDR": CLUSTER_RANGES,
        "clientConnection": { "kubeconfig": kubeconfig },
        // The machine's limits are not a namespace's to change.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpCloseWaitTimeout": "0s",
            "tcpEstablishedTimeout": "0s",
        },
    })
}
