//! CNI plugins, called as a runtime calls them.

use std::{
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use penstock_testbed::{Host, Node, binary};
use serde_json::{Value, json};

/// Where Debian keeps the reference plugins.
pub const REFERENCE: &str = "/usr/lib/cni";
/// A pod's interface.
pub const INTERFACE: &str = "eth0";

/// A plugin with its configuration, on a node.
pub struct Plugin {
    /// Its name in tables.
    pub name: String,
    program: PathBuf,
    config: Value,
    node: Host,
}

/// What ADD made.
pub struct Added {
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// The name of the host's end of the link.
    pub interface: String,
    /// How long it took.
    pub time: Duration,
}

/// What a call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Add,
    Del,
}

impl Plugin {
    /// Ours, with the configuration that the node's agent installed in `conf_dir`.
    pub fn penstock(node: &Node, conf_dir: &Path) -> Result<Self> {
        let path = conf_dir.join("10-penstock.conflist");
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let list: Value = serde_json::from_slice(&text).context("a list of plugins")?;
        let mut config = list
            .pointer("/plugins/0")
            .cloned()
            .context("the list has no plugin")?;
        // What a runtime does with a list.
        for field in ["cniVersion", "name"] {
            set(
                &mut config,
                field,
                list.get(field).cloned().unwrap_or_default(),
            );
        }
        Ok(Self {
            name: "penstock-cni".to_owned(),
            program: binary("penstock-cni")?,
            config,
            node: node.host.clone(),
        })
    }

    /// The reference bridge plugin with host-local addresses from these ranges, configured as
    /// flannel configures it.
    pub fn bridge(name: &str, node: &Node, ranges: &[&str], mtu: u32, state_dir: &Path) -> Self {
        let ranges: Vec<Value> = ranges
            .iter()
            .map(|range| json!([{ "subnet": range }]))
            .collect();
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "bridged",
            "type": "bridge",
            "bridge": "cni0",
            "isDefaultGateway": true,
            "hairpinMode": true,
            "ipMasq": false,
            "mtu": mtu,
            "ipam": { "type": "host-local", "ranges": ranges, "dataDir": state_dir },
        });
        Self {
            name: name.to_owned(),
            program: Path::new(REFERENCE).join("bridge"),
            config,
            node: node.host.clone(),
        }
    }

    fn call(&self, command: Command, pod: &Host) -> Result<(Value, Duration)> {
        let mut process = self.node.command(&self.program)?;
        let word = match command {
            Command::Add => "ADD",
            Command::Del => "DEL",
        };
        process
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", word)
            .env("CNI_CONTAINERID", &pod.name)
            .env("CNI_NETNS", Path::new("/run/netns").join(&pod.name))
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", REFERENCE)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={}",
                    pod.name
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let input = self.config.to_string();
        let started = Instant::now();
        let mut child = process
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut stdin = child.stdin.take().context("no pipe")?;
        stdin.write_all(input.as_bytes()).context("writing")?;
        drop(stdin);
        let output = child.wait_with_output().context("waiting")?;
        let time = started.elapsed();
        anyhow::ensure!(
            output.status.success(),
            "{word} by {}: {}{}",
            self.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let answer = if output.stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&output.stdout).context("the plugin's answer")?
        };
        Ok((answer, time))
    }

    /// Gives a pod its network.
    pub fn add(&self, pod: &Host) -> Result<Added> {
        let (answer, time) = self.call(Command::Add, pod)?;
        let list = |field: &str| {
            answer
                .get(field)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
        };
        let ips = list("ips")
            .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
            .collect();
        // The bridge itself comes first, and what is in the pod has a sandbox.
        let outside = list("interfaces")
            .filter(|interface| {
                interface
                    .get("sandbox")
                    .and_then(Value::as_str)
                    .unwrap_or("")
                    == ""
            })
            .filter_map(|interface| interface.get("name")?.as_str());
        let interface = outside.last().context("the plugin made no link")?;
        Ok(Added {
            ips,
            interface: interface.to_owned(),
            time,
        })
    }

    /// Takes it away; how long that took.
    pub fn del(&self, pod: &Host) -> Result<Duration> {
        Ok(self.call(Command::Del, pod)?.1)
    }
}

fn set(config: &mut Value, field: &str, value: Value) {
    if let Some(config) = config.as_object_mut() {
        config.insert(field.to_owned(), value);
    }
}
