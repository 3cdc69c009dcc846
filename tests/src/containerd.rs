//! A Kubernetes node's containerd, with configuration and data of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    image,
    process::{self, Place, Process},
    testbed::Node,
    wait::patiently,
};

/// The folder that Debian keeps containerd's loopback plugin in, which it needs with any network.
const PLUGINS: &str = "/usr/lib/cni";

/// How a node's pods get their network.
#[derive(Clone, Debug, Default)]
pub struct Cni {
    /// The list of plugins ("conflist") that containerd reads; none if somebody else writes it,
    /// and the plugin, later.
    pub config: Option<serde_json::Value>,
    /// The plugins that it names; the folder of a program is of no account.
    pub plugins: Vec<PathBuf>,
}

impl Cni {
    /// What comes with Debian: the node routes between a bridge of pods and its own network.
    pub fn reference(node: &Node) -> Self {
        let (v4, v6) = node.pod_ranges();
        Self {
            config: Some(json!({
                "cniVersion": "1.0.0",
                "name": "reference",
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": "cni0",
                        "isGateway": true,
                        "hairpinMode": true,
                        "ipam": {
                            "type": "host-local",
                            "ranges": [[{ "subnet": v4 }], [{ "subnet": v6 }]],
                            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                        },
                    },
                    { "type": "portmap", "capabilities": { "portMappings": true } },
                ],
            })),
            plugins: ["bridge", "host-local", "portmap"]
                .map(|name| Path::new(PLUGINS).join(name))
                .into(),
        }
    }

    /// Writes it to `config` and makes the plugins known in `plugins`.
    fn write(&self, config: &Path, plugins: &Path) -> Result<()> {
        for folder in [config, plugins] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let loopback = Path::new(PLUGINS).join("loopback");
        for program in self.plugins.iter().chain([&loopback]) {
            let name = program.file_name().context("a plugin has no name")?;
            std::os::unix::fs::symlink(program, plugins.join(name))
                .with_context(|| format!("linking {}", program.display()))?;
        }
        let Some(list) = &self.config else {
            return Ok(());
        };
        let path = config.join("10-test.conflist");
        fs::write(&path, list.to_string()).with_context(|| format!("writing {}", path.display()))
    }
}

/// A running containerd.
pub(crate) struct Containerd {
    process: Process,
    place: Place,
    socket: PathBuf,
    log: PathBuf,
}

impl Containerd {
    /// Starts it at a place of a node's, with everything in `folder`, and gives it the images that
    /// pods need.
    pub(crate) fn start(node: &Node, place: &Place, folder: &Path, cni: &Cni) -> Result<Self> {
        let (conflists, plugins) = (node.cni_conf_dir(), node.cni_bin_dir());
        cni.write(&conflists, &plugins)?;
        let config = folder.join("containerd.toml");
        fs::write(&config, configuration(folder, &conflists, &plugins))
            .context("writing containerd's configuration")?;
        let log = folder.join("containerd.log");
        let mut command = process::command("containerd", place)?;
        let path = std::env::var("PATH").unwrap_or_default();
        // runc is an administrator's program.
        command
            .arg("--config")
            .arg(config)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"));
        let mut containerd = Self {
            process: Process::start_logging(command, &log)?,
            place: place.clone(),
            socket: folder.join("containerd.sock"),
            log,
        };
        patiently("containerd serves", || {
            anyhow::ensure!(
                containerd.process.is_running(),
                "containerd ended: {}",
                containerd.log()
            );
            containerd.ctr(&["version"])
        })?;
        let images = image::write(folder).context("making container images")?;
        let images = images.to_str().context("a folder's name is no text")?;
        containerd.ctr(&["images", "import", "--snapshotter", "native", images])?;
        Ok(containerd)
    }

    /// Where it listens.
    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it for something of Kubernetes'.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = process::command("ctr", &self.place)?;
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", "k8s.io"])
            .args(arguments);
        process::run(command)
    }
}

/// The native snapshotter copies files where overlayfs, which isn't to be had on every file system,
/// would mount them; the images are small.
fn configuration(folder: &Path, conflists: &Path, plugins: &Path) -> String {
    let (folder, conflists, plugins) = (folder.display(), conflists.display(), plugins.display());
    let pause = image::PAUSE;
    format!(
        r#"version = 2
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
disable_apparmor = true
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{conflists}"
bin_dir = "{plugins}"
"#
    )
}
