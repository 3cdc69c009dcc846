//! The real kube-proxy, in whichever of its modes, on a node of the testbed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{apiserver::ApiServer, host::Host, process::Process, testbed::Node};

/// All ranges of pods in a testbed.
const PODS: &str = "10.244.0.0/16,fd00:244::/32";
/// The first minor version with an nftables mode (KEP-3866).
const WITH_NFTABLES: u32 = 29;
/// From this one on the nftables mode needs no gate.
const NFTABLES_BY_DEFAULT: u32 = 31;
/// From this one on both families need no gate; the gate is gone two versions later.
const DUAL_STACK_BY_DEFAULT: u32 = 23;
/// From this one on a kubelet drops nothing for kube-proxy (KEP-3178).
const WITHOUT_MARKED: u32 = 25;

/// What a kubelet of an older kube-proxy's time writes beside it: the drop of what kube-proxy marks for it.
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
    /// Rules of nftables.
    Nftables,
}

impl ProxyMode {
    /// Its name in kube-proxy's configuration.
    const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }
}

/// A program.
#[derive(Clone, Debug)]
pub struct ProxyProgram {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself.
    pub version: String,
    /// The second number of its version.
    minor: u32,
}

/// The second number of a version, such as 20 of "Kubernetes v1.20.2".
fn minor(version: &str) -> Option<u32> {
    let (_, numbers) = version.rsplit_once('v')?;
    let (major, rest) = numbers.split_once('.')?;
    let end = rest.find(|character: char| !character.is_ascii_digit());
    let minor = rest.get(..end.unwrap_or(rest.len()))?;
    (major == "1").then(|| minor.parse().ok())?
}

impl ProxyProgram {
    /// The one in this file, of a version that it says itself.
    pub fn at(path: PathBuf) -> Result<Self> {
        let output = Command::new(&path)
            .arg("--version")
            .output()
            .with_context(|| format!("starting {}", path.display()))?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let minor = minor(&version)
            .with_context(|| format!("{} says that it is {version:?}", path.display()))?;
        Ok(Self {
            path,
            version,
            minor,
        })
    }

    /// The second number of its version, such as 20 of 1.20.2.
    pub const fn minor(&self) -> u32 {
        self.minor
    }

    /// Whether it has a mode for nftables of its own.
    pub const fn has_nftables(&self) -> bool {
        self.minor >= WITH_NFTABLES
    }

    /// Starts it on a node, and does not wait.
    pub fn start(&self, node: &Node, api: &ApiServer, mode: ProxyMode) -> Result<KubeProxy> {
        let folder = node.manifests.with_file_name("kube-proxy");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        if self.minor < WITHOUT_MARKED {
            let marked = folder.join("marked");
            fs::write(&marked, MARKED).with_context(|| format!("writing {}", marked.display()))?;
            for program in ["iptables-restore", "ip6tables-restore"] {
                let file = marked.to_str().context("a folder's name is no text")?;
                node.host.run(program, &["--noflush", file])?;
            }
        }
        let config = folder.join("config.json");
        let text = self
            .configuration(node, &api.kubeconfig(), mode)
            .to_string();
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let config = config.to_str().context("a folder's name is no text")?;
        let log = folder.join("log");
        let process = node
            .host
            .start_logging(&self.path, &["--config", config], &log)?;
        Ok(KubeProxy {
            process,
            node: node.host.clone(),
            log,
        })
    }

    fn configuration(&self, node: &Node, kubeconfig: &Path, mode: ProxyMode) -> Value {
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "featureGates": self.gates(mode),
            "mode": mode.name(),
            "hostnameOverride": node.name(),
            // Said, so that it does not look for the node's object.
            "bindAddress": node.host.ip4.to_string(),
            "clusterCIDR": PODS,
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

    /// What has to be switched on in this version. A gate that it does not know is an error.
    fn gates(&self, mode: ProxyMode) -> Value {
        if self.minor < DUAL_STACK_BY_DEFAULT {
            json!({ "IPv6DualStack": true })
        } else if mode == ProxyMode::Nftables && self.minor < NFTABLES_BY_DEFAULT {
            json!({ "NFTablesProxyMode": true })
        } else {
            json!({})
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
    /// Its rules of iptables in the nat table, for IPv4 or IPv6.
    pub fn rules(&mut self, is_v4: bool) -> Result<String> {
        let program = if is_v4 {
            "iptables-save"
        } else {
            "ip6tables-save"
        };
        self.ask(program, &["-t", "nat"])
    }

    /// What a program prints on its node, as long as it runs.
    pub fn ask(&mut self, program: &str, arguments: &[&str]) -> Result<String> {
        ensure!(
            self.process.is_running(),
            "kube-proxy ended: {}",
            self.log()
        );
        self.node.run(program, arguments)
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(version: &str) -> ProxyProgram {
        ProxyProgram {
            path: PathBuf::new(),
            version: version.to_owned(),
            minor: minor(version).unwrap(),
        }
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(minor("Kubernetes v1.20.2"), Some(20));
        assert_eq!(minor("Kubernetes v1.33.0-alpha.1+dirty"), Some(33));
        assert_eq!(minor("kube-proxy v2.1.0"), None);
        assert_eq!(minor("kube-proxy"), None);
    }

    #[test]
    fn only_gates_that_a_version_knows_and_needs_are_said() {
        let gates = |version, mode| program(version).gates(mode).to_string();
        assert_eq!(
            gates("Kubernetes v1.20.2", ProxyMode::Iptables),
            r#"{"IPv6DualStack":true}"#
        );
        assert_eq!(
            gates("Kubernetes v1.29.1", ProxyMode::Nftables),
            r#"{"NFTablesProxyMode":true}"#
        );
        for (version, mode) in [
            ("Kubernetes v1.29.1", ProxyMode::Iptables),
            ("Kubernetes v1.31.0", ProxyMode::Nftables),
            ("Kubernetes v1.35.0", ProxyMode::Ipvs),
        ] {
            assert_eq!(gates(version, mode), "{}");
        }
        assert!(program("Kubernetes v1.29.0").has_nftables());
        assert!(!program("Kubernetes v1.28.9").has_nftables());
    }
}
