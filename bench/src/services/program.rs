//! The kube-proxy program that is compared: where it is, of which version, and what it is told.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use penstock_testbed::{self as testbed, ApiServer, Host, Node, Process};
use serde_json::{Value, json};

use crate::machine;

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
pub enum Mode {
    /// Rules of iptables.
    Iptables,
    /// Virtual servers of IPVS.
    Ipvs,
    /// Rules of nftables.
    Nftables,
}

impl Mode {
    /// Its name in kube-proxy's configuration.
    const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
        }
    }
}

/// A kube-proxy, and an API server to tell it of services.
#[derive(Clone, Debug)]
pub struct Program {
    /// The folder with etcd, kube-apiserver and kubectl.
    pub assets: PathBuf,
    /// kube-proxy.
    pub path: PathBuf,
    /// What it says of itself.
    version: String,
    /// The second number of its version.
    minor: u32,
}

/// Where kube-proxy is: in KUBEBUILDER_ASSETS, else in $PATH.
pub fn find() -> Option<PathBuf> {
    let assets = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = assets.into_iter().chain(std::env::split_paths(&path));
    folders
        .map(|folder| folder.join("kube-proxy"))
        .find(|path| path.exists())
}

/// The program, or a word about its being left out.
pub fn required() -> Option<Program> {
    let found = testbed::require_api_server()
        .zip(find())
        .and_then(|(assets, path)| {
            let version = machine::said(&path, &["--version"])?;
            let minor = minor(&version)?;
            Some(Program {
                assets,
                path,
                version,
                minor,
            })
        });
    if let Some(program) = &found {
        let nftables = if program.has_nftables() {
            "its own nftables mode"
        } else {
            "no nftables mode, whose rules are written for it"
        };
        let (version, path) = (&program.version, program.path.display());
        println!("kube-proxy: {version}, {path}, {nftables}");
    } else {
        println!(
            "WARNING: kube-proxy is left out: it is to be in KUBEBUILDER_ASSETS or $PATH, and etcd, \
             kube-apiserver and kubectl in KUBEBUILDER_ASSETS"
        );
    }
    found
}

/// The second number of a version, such as 20 of "Kubernetes v1.20.2".
fn minor(version: &str) -> Option<u32> {
    let (_, numbers) = version.rsplit_once('v')?;
    let (major, rest) = numbers.split_once('.')?;
    let end = rest.find(|character: char| !character.is_ascii_digit());
    let minor = rest.get(..end.unwrap_or(rest.len()))?;
    (major == "1").then(|| minor.parse().ok())?
}

impl Program {
    /// Whether it has a mode for nftables of its own.
    pub const fn has_nftables(&self) -> bool {
        self.minor >= WITH_NFTABLES
    }

    /// Starts it on a node, and does not wait.
    pub fn start(&self, node: &Node, api: &ApiServer, mode: Mode) -> Result<Running> {
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
        Ok(Running {
            process,
            node: node.host.clone(),
            log,
        })
    }

    fn configuration(&self, node: &Node, kubeconfig: &Path, mode: Mode) -> Value {
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
    fn gates(&self, mode: Mode) -> Value {
        if self.minor < DUAL_STACK_BY_DEFAULT {
            json!({ "IPv6DualStack": true })
        } else if mode == Mode::Nftables && self.minor < NFTABLES_BY_DEFAULT {
            json!({ "NFTablesProxyMode": true })
        } else {
            json!({})
        }
    }
}

/// A node's kube-proxy.
pub struct Running {
    process: Process,
    node: Host,
    log: PathBuf,
}

impl Running {
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

    fn program(version: &str) -> Program {
        Program {
            assets: PathBuf::new(),
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
            gates("Kubernetes v1.20.2", Mode::Iptables),
            r#"{"IPv6DualStack":true}"#
        );
        assert_eq!(
            gates("Kubernetes v1.29.1", Mode::Nftables),
            r#"{"NFTablesProxyMode":true}"#
        );
        for (version, mode) in [
            ("Kubernetes v1.29.1", Mode::Iptables),
            ("Kubernetes v1.31.0", Mode::Nftables),
            ("Kubernetes v1.35.0", Mode::Ipvs),
        ] {
            assert_eq!(gates(version, mode), "{}");
        }
        assert!(program("Kubernetes v1.29.0").has_nftables());
        assert!(!program("Kubernetes v1.28.9").has_nftables());
    }
}
