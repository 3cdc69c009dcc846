//! A node's CNI plugin, called as a container runtime calls it: found by the configuration that the
//! agent wrote, with the container in the environment and the network on standard input.

use std::{
    fs,
    io::{self, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::{
    process::{self, Place},
    testbed::Node,
};

/// The folder that Debian keeps the reference plugins in.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";

/// The plugin of a node's network.
#[derive(Clone, Debug)]
pub struct Plugin {
    place: Place,
    folder: PathBuf,
    program: PathBuf,
    network: Map<String, Value>,
}

/// The plugin said no.
#[derive(Debug, thiserror::Error)]
#[error("{message} (code {code})")]
pub struct PluginError {
    /// The specification's number for it, or the plugin's own.
    pub code: u64,
    /// Why.
    pub message: String,
}

/// What a container is called by.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// The file of its network namespace.
    pub netns: PathBuf,
    /// What its runtime wants for it: the configuration's `runtimeConfig`.
    pub runtime: Value,
}

impl Node {
    /// Where its runtime looks for configurations.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.run_dir.with_file_name("net.d")
    }

    /// Where its runtime looks for plugins.
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.run_dir.with_file_name("plugins")
    }

    /// Where its plugin keeps what it gave to whom.
    pub fn cni_state_dir(&self) -> PathBuf {
        self.run_dir.with_file_name("state")
    }

    /// The configuration that its runtime takes: the first by name, if there is any.
    pub(crate) fn configuration(&self) -> Result<Option<PathBuf>> {
        let folder = self.cni_conf_dir();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| folder.display().to_string()),
        };
        let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
        let is_list = |path: &PathBuf| path.extension().is_some_and(|end| end == "conflist");
        Ok(paths?.into_iter().filter(is_list).min())
    }

    /// The list of plugins that the agent has installed, and its file.
    pub(crate) fn plugins(&self) -> Result<(PathBuf, Value)> {
        let path = self
            .configuration()?
            .with_context(|| format!("no configuration in {}", self.cni_conf_dir().display()))?;
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let list = serde_json::from_str(&text)
            .with_context(|| format!("{} is no JSON", path.display()))?;
        Ok((path, list))
    }

    /// Its plugin, as the agent has configured and installed it.
    pub fn plugin(&self) -> Result<Plugin> {
        let (path, list) = self.plugins()?;
        let mut network = list
            .pointer("/plugins/0")
            .and_then(Value::as_object)
            .cloned()
            .with_context(|| format!("{} names no plugin", path.display()))?;
        let kind = network.get("type").and_then(Value::as_str);
        let folder = self.cni_bin_dir();
        let program = folder.join(kind.context("a plugin has no type")?);
        // The latest version, as today's runtimes choose, whatever plugins after it know.
        network.insert("cniVersion".to_owned(), json!("1.1.0"));
        let name = list.get("name");
        let name = name.with_context(|| format!("{} has no name", path.display()))?;
        network.insert("name".to_owned(), name.clone());
        Ok(Plugin {
            place: self.place(),
            folder,
            program,
            network,
        })
    }
}

impl Plugin {
    /// A reference plugin as Debian installs it, on a node, with a network configuration.
    pub fn reference(node: &Node, network: Map<String, Value>) -> Result<Self> {
        let folder = PathBuf::from(REFERENCE);
        let kind = network.get("type").and_then(Value::as_str);
        let program = folder.join(kind.context("a plugin has no type")?);
        Ok(Self {
            place: node.place(),
            folder,
            program,
            network,
        })
    }

    /// The plugin of that name in a folder, on a node, with a network configuration.
    pub(crate) fn at(
        node: &Node,
        folder: PathBuf,
        kind: &str,
        network: Map<String, Value>,
    ) -> Self {
        Self {
            place: node.place(),
            program: folder.join(kind),
            folder,
            network,
        }
    }

    /// The same after others, whose result that is.
    pub(crate) fn after(&self, result: &Value) -> Self {
        let mut plugin = self.clone();
        if !result.is_null() {
            let key = "prevResult".to_owned();
            plugin.network.insert(key, result.clone());
        }
        plugin
    }

    /// A container with what its runtime wants of this plugin: what its configuration says it can.
    pub(crate) fn asked(&self, container: &Container) -> Container {
        let can = |name: &String| {
            let capabilities = self.network.get("capabilities");
            capabilities.and_then(|all| all.get(name)) == Some(&Value::Bool(true))
        };
        let wanted = container.runtime.as_object().cloned().unwrap_or_default();
        let wanted: Map<String, Value> = wanted.into_iter().filter(|(name, _)| can(name)).collect();
        Container {
            runtime: wanted.into(),
            ..container.clone()
        }
    }

    /// Whether it is the plugin of that name.
    pub(crate) fn is(&self, kind: &str) -> bool {
        self.network.get("type").and_then(Value::as_str) == Some(kind)
    }

    /// Gives a container a network; the result.
    pub fn add(&self, container: &Container) -> Result<Value> {
        self.call("ADD", Some(container))
    }

    /// Takes it away.
    pub fn del(&self, container: &Container) -> Result<()> {
        self.call("DEL", Some(container)).map(drop)
    }

    /// Asks whether a container's network is as this result of ADD says.
    pub fn check(&self, container: &Container, result: &Value) -> Result<()> {
        let mut plugin = self.clone();
        plugin
            .network
            .insert("prevResult".to_owned(), result.clone());
        plugin.call("CHECK", Some(container)).map(drop)
    }

    /// Asks whether pods can be given a network.
    pub fn status(&self) -> Result<()> {
        self.call("STATUS", None).map(drop)
    }

    /// Takes away what no container has that is none of these.
    pub fn gc(&self, valid: &[&Container]) -> Result<()> {
        let mut plugin = self.clone();
        let valid: Value = valid
            .iter()
            .map(|container| json!({ "containerID": container.id, "ifname": "eth0" }))
            .collect();
        let key = "cni.dev/valid-attachments".to_owned();
        plugin.network.insert(key, valid);
        plugin.call("GC", None).map(drop)
    }

    /// Carries a command out; what the plugin answered, which is nothing for most, or a
    /// [`PluginError`].
    pub fn call(&self, command: &str, container: Option<&Container>) -> Result<Value> {
        let output = self.begin(command, container)?.wait_with_output();
        let output = output.context("waiting for the plugin")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said: Value = if text.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).with_context(|| format!("{text:?} is no JSON"))?
        };
        if output.status.success() {
            return Ok(said);
        }
        let code = said.get("code").and_then(Value::as_u64);
        let code = code.with_context(|| {
            let errors = String::from_utf8_lossy(&output.stderr);
            format!("{command} ended with {}: {text}{errors}", output.status)
        })?;
        let message = format!("{command}: {said}");
        Err(PluginError { code, message }.into())
    }

    /// Begins to carry a command out, and kills the plugin after a while; whether it had ended.
    pub fn interrupt(&self, command: &str, container: &Container, after: Duration) -> Result<bool> {
        let mut child = self.begin(command, Some(container))?;
        thread::sleep(after);
        child.kill().context("killing the plugin")?;
        let output = child.wait_with_output().context("waiting for the plugin")?;
        let is_killed = output.status.signal().is_some();
        ensure!(
            is_killed || output.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(!is_killed)
    }

    /// Starts it with all that it needs to know.
    fn begin(&self, command: &str, container: Option<&Container>) -> Result<Child> {
        let mut process = process::command(&self.program, &self.place)?;
        process
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", &self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut network = self.network.clone();
        if let Some(container) = container {
            process
                .env("CNI_CONTAINERID", &container.id)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_NETNS", &container.netns)
                .env(
                    "CNI_ARGS",
                    format!(
                        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}",
                        container.id
                    ),
                );
            network.insert("runtimeConfig".to_owned(), container.runtime.clone());
        }
        let mut child = process
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut stdin = child.stdin.take().context("no pipe")?;
        stdin
            .write_all(Value::Object(network).to_string().as_bytes())
            .context("writing to the plugin")?;
        Ok(child)
    }
}

impl Container {
    /// A container in a namespace of iproute2's, called like it.
    pub fn named(namespace: &str) -> Self {
        Self {
            id: namespace.to_owned(),
            netns: Path::new("/run/netns").join(namespace),
            runtime: json!({}),
        }
    }
}

/// What a result says of the container's network: its two addresses and the host end's name.
pub(crate) fn made(result: &Value) -> Result<(String, String, String)> {
    let list = |field: &str| result.get(field).and_then(Value::as_array).cloned();
    let ips = list("ips").unwrap_or_default();
    let mut addresses = ips.iter().filter_map(|ip| {
        let address = ip.get("address")?.as_str()?;
        Some(address.split('/').next()?.to_owned())
    });
    let (first, second) = (addresses.next(), addresses.next());
    let (Some(first), Some(second)) = (first, second) else {
        anyhow::bail!("no two addresses: {result}");
    };
    let (v4, v6) = if first.contains(':') {
        (second, first)
    } else {
        (first, second)
    };
    ensure!(!v4.contains(':') && v6.contains(':'), "{result}");
    let interfaces = list("interfaces").unwrap_or_default();
    // Some name a bridge before it.
    let host_end = interfaces.iter().rfind(|interface| {
        let sandbox = interface.get("sandbox").and_then(Value::as_str);
        sandbox.unwrap_or_default().is_empty()
    });
    let name = host_end.and_then(|interface| interface.get("name")?.as_str());
    let name = name.with_context(|| format!("no interface of the host's: {result}"))?;
    Ok((v4, v6, name.to_owned()))
}
