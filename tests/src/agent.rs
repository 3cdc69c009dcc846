//! The agent as a process on a node.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    eventually,
    process::{self, Place, Process},
    testbed::{Node, Pod},
    wait::slack,
};

/// Where an agent gets its objects.
#[derive(Clone, Debug)]
pub enum Source {
    /// The node's folder of manifests.
    Manifests,
    /// An API server.
    Kubeconfig(PathBuf),
}

/// A program of this workspace, as cargo built it, or one beside this program.
///
/// One that was built with optimisation gets such programs, since it may measure them; another gets
/// the newest.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let profile = own
        .ancestors()
        .find(|path| path.ends_with("debug") || path.ends_with("release"));
    let profiles: &[&str] = match profile {
        Some(profile) if profile.ends_with("release") => &["release"],
        _ => &["release", "debug"],
    };
    let target = profile.and_then(Path::parent);
    let built = profiles.iter().map(|profile| Some(target?.join(profile)));
    let beside = own.parent().map(Path::to_path_buf);
    built
        .chain([beside])
        .flatten()
        .map(|folder| folder.join(name))
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .with_context(|| {
            format!(
                "this needs the program {name} beside {}; `cargo build --bins` builds all of them \
                 into one folder",
                own.display()
            )
        })
}

/// A node's agent.
pub struct Agent {
    node: Node,
    source: Source,
    extra: Vec<String>,
    process: Process,
    log: PathBuf,
    place: Place,
}

impl Agent {
    /// Starts the agent of a node and waits until it serves.
    pub fn start(node: &Node, source: &Source, extra: &[&str]) -> Result<Self> {
        Self::start_at(node, source, extra, node.place())
    }

    /// Starts it and does not wait.
    pub(crate) fn begin(node: &Node, source: &Source, extra: &[&str]) -> Result<Self> {
        Self::begin_at(node, source, extra, node.place())
    }

    /// Starts it at a place of the node's and waits until it serves.
    pub(crate) fn start_at(
        node: &Node,
        source: &Source,
        extra: &[&str],
        place: Place,
    ) -> Result<Self> {
        let mut agent = Self::begin_at(node, source, extra, place)?;
        agent.wait_until_serving()?;
        Ok(agent)
    }

    fn begin_at(node: &Node, source: &Source, extra: &[&str], place: Place) -> Result<Self> {
        let extra: Vec<String> = extra.iter().map(|text| (*text).to_owned()).collect();
        let log = node.run_dir.with_extension("log");
        Ok(Self {
            process: spawn(node, source, &extra, &log, &place)?,
            node: node.clone(),
            source: source.clone(),
            extra,
            log,
            place,
        })
    }

    /// Waits until it has begun its work: pods can be given a network where that is its task, and
    /// else the kernel holds all that is wanted.
    pub fn wait_until_serving(&mut self) -> Result<()> {
        if self.extra.iter().any(|text| text == "--network") {
            return self.wait_for_network();
        }
        self.wait_until_settled()
    }

    /// Waits until pods can be given a network.
    fn wait_for_network(&mut self) -> Result<()> {
        eventually("the node has a network for pods", || {
            anyhow::ensure!(self.process.is_running(), "the agent ended: {}", self.log());
            let answer = || self.node.plugin()?.status();
            answer().with_context(|| self.log())
        })
    }

    /// Waits until the kernel holds all that is wanted.
    pub fn wait_until_settled(&mut self) -> Result<()> {
        let is_running = eventually("the agent serves", || {
            if !self.process.is_running() {
                return Ok(false);
            }
            let status = self.status()?;
            let is_settled = status.get("settled").and_then(Value::as_bool) == Some(true);
            anyhow::ensure!(is_settled, "{status}\n{}", self.log());
            Ok(true)
        })?;
        anyhow::ensure!(is_running, "the agent ended: {}", self.log());
        Ok(())
    }

    /// Waits until all pods' interfaces have their hooks and their namespaces are known.
    pub fn wait_for_pods(&self, count: usize) -> Result<()> {
        eventually("every pod is known", || {
            let status = self.status()?;
            let interfaces = status.get("interfaces").and_then(Value::as_array);
            let known = interfaces.into_iter().flatten().filter(|interface| {
                let addresses = interface.get("addresses").and_then(Value::as_array);
                addresses.is_some_and(|addresses| addresses.len() == 2)
                    && interface.get("attached").and_then(Value::as_bool) == Some(true)
            });
            anyhow::ensure!(known.count() == count, "{status}");
            Ok(())
        })
    }

    /// Waits until these pods' interfaces have their hooks.
    pub fn wait_for_hooks(&self, pods: &[&Pod]) -> Result<()> {
        eventually("the hooks are on every pod's interface", || {
            let status = self.status()?;
            let interfaces = status.get("interfaces").and_then(Value::as_array);
            let is_attached = |pod: &&Pod| {
                let mut interfaces = interfaces.into_iter().flatten();
                interfaces.any(|interface| {
                    interface.get("name").and_then(Value::as_str) == Some(&pod.interface)
                        && interface.get("attached").and_then(Value::as_bool) == Some(true)
                })
            };
            anyhow::ensure!(pods.iter().all(is_attached), "{status}");
            Ok(())
        })
    }

    /// `penstock COMMAND -o json` of this node.
    pub fn show(&self, command: &str) -> Result<Value> {
        show(&self.node, command)
    }

    /// `penstock status -o json`.
    pub fn status(&self) -> Result<Value> {
        self.show("status")
    }

    /// A counter of `penstock drops`.
    pub fn count(&self, name: &str) -> Result<u64> {
        let counts = self.show("drops")?;
        let count = counts.as_array().into_iter().flatten().find_map(|entry| {
            (entry.get("name")?.as_str()? == name).then(|| entry.get("count")?.as_u64())?
        });
        count.with_context(|| format!("there is no counter {name}"))
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The node that it is for.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Starts it again after [`Self::kill`].
    pub fn restart(&mut self) -> Result<()> {
        self.begin_again()?;
        self.wait_until_serving()
    }

    /// Starts it again, and does not wait.
    pub fn begin_again(&mut self) -> Result<()> {
        self.process = spawn(
            &self.node,
            &self.source,
            &self.extra,
            &self.log,
            &self.place,
        )?;
        Ok(())
    }
}

fn spawn(
    node: &Node,
    source: &Source,
    extra: &[String],
    log: &Path,
    place: &Place,
) -> Result<Process> {
    let mut command = process::command(binary("penstock")?, place)?;
    command.arg("agent");
    match source {
        Source::Manifests => command.arg("--manifests").arg(&node.manifests),
        Source::Kubeconfig(file) => command.arg("--kubeconfig").arg(file),
    };
    command
        .args([
            "--node-name",
            &node.name(),
            "--pod-interfaces",
            &node.pod_interfaces,
        ])
        .arg("--cgroup")
        .arg(&node.cgroup)
        .arg("--bpffs")
        .arg(&node.bpffs)
        .arg("--run-dir")
        .arg(&node.run_dir)
        .args(extra);
    if !extra.iter().any(|text| text == "--log-level") {
        command.args(["--log-level", "debug"]);
    }
    Process::start_logging(command, log)
}

/// What a command said, and how it ended.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub output: String,
    /// What it complained about.
    pub errors: String,
}

impl Node {
    /// `penstock COMMAND OPTIONS` on this node, whether its agent runs or not.
    pub fn penstock(&self, command: &str, options: &[&str]) -> Result<Said> {
        let mut process = process::command(binary("penstock")?, &self.place())?;
        process.arg(command).args(options);
        if command == "cleanup" {
            process.arg("--cni-conf-dir").arg(self.cni_conf_dir());
        }
        process.arg("--bpffs").arg(&self.bpffs);
        process.arg("--run-dir").arg(&self.run_dir);
        let output = process.output().with_context(|| format!("{process:?}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Said {
            code: output.status.code().unwrap_or(-1),
            output: text(&output.stdout),
            errors: text(&output.stderr),
        })
    }
}

/// `penstock COMMAND -o json` on a node, whether its agent runs or not.
pub(crate) fn show(node: &Node, command: &str) -> Result<Value> {
    let asked = Instant::now();
    let said = loop {
        let said = node.penstock(command, &["-o", "json"])?;
        // Which it says after five seconds, on any machine.
        if !said.errors.contains("does not answer within") || asked.elapsed() > slack() {
            break said;
        }
    };
    // `status` says with its code what it says in its JSON.
    anyhow::ensure!(said.code == 0 || command == "status", "{said:?}");
    serde_json::from_str(&said.output).with_context(|| format!("{said:?} has no JSON"))
}
