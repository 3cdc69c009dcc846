//! A node and its containers as network namespaces, an agent that is only a socket, and the real
//! plugin run between them.
#![allow(dead_code, reason = "each test file uses a part of it")]

mod agent;
mod spec;

use std::{
    collections::BTreeMap,
    fs,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, setns};
use penstock_cni::{
    network::Network,
    state::{AttachmentKey, State},
};
use serde_json::{Value, json};

#[allow(unused_imports, reason = "each test file uses a part of it")]
pub use agent::{Agent, Mood};
#[allow(unused_imports, reason = "each test file uses a part of it")]
pub use spec::{VERSIONS, check_error, check_result};

static BEDS: AtomicU32 = AtomicU32::new(0);

/// A node.
pub struct Bed {
    prefix: String,
    folder: tempfile::TempDir,
    namespaces: Vec<String>,
    pub agent: Option<Agent>,
}

/// What the plugin said.
#[derive(Debug)]
pub struct Said {
    pub is_success: bool,
    pub output: Value,
    pub errors: String,
}

impl Said {
    /// The output of a success.
    #[track_caller]
    pub fn success(self) -> Value {
        assert!(self.is_success, "{} {}", self.output, self.errors);
        self.output
    }

    /// The code and details of a failure.
    #[track_caller]
    pub fn failure(self) -> (u64, String) {
        assert!(!self.is_success, "a success: {}", self.output);
        check_error(&self.output);
        let details = self.output["details"].as_str().unwrap().to_owned();
        (self.output["code"].as_u64().unwrap(), details)
    }

    /// Asserts a failure's code and that its details have these words.
    #[track_caller]
    pub fn fails(self, code: u64, words: &str) {
        let (got, details) = self.failure();
        assert_eq!(got, code, "{details}");
        assert!(details.contains(words), "{details:?} lacks {words:?}");
    }

    /// What it said.
    pub fn of(output: Output) -> Self {
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let value = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text:?} {errors}"))
        };
        Self {
            is_success: output.status.success(),
            output: value,
            errors,
        }
    }
}

/// Runs a command to its end; what it printed.
#[track_caller]
pub fn sh(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A list that `ip -j` or `tc -j` prints in a namespace.
#[track_caller]
pub fn list(program: &str, namespace: &str, arguments: &[&str]) -> Vec<Value> {
    let whole = [&["-n", namespace, "-j", "-d"], arguments].concat();
    let text = sh(program, &whole);
    let list: Vec<Value> = if text.trim().is_empty() {
        Vec::new()
    } else {
        serde_json::from_str(&text).unwrap()
    };
    list.into_iter()
        .filter(|entry| entry != &json!({}))
        .collect()
}

/// Does something in a namespace: on a thread that enters it and does nothing else.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(Path::new("/run/netns").join(namespace)).unwrap();
    let enter = || {
        setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
}

pub fn key(container: &str) -> AttachmentKey {
    AttachmentKey {
        container: container.to_owned(),
        ifname: "eth0".to_owned(),
    }
}

/// How the plugin is called.
#[derive(Clone)]
pub struct Call {
    pub variables: BTreeMap<&'static str, String>,
    pub config: Value,
}

impl Call {
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    pub fn variable(mut self, name: &'static str, value: &str) -> Self {
        self.variables.insert(name, value.to_owned());
        self
    }
}

impl Bed {
    /// A node with 253 addresses and an agent that agrees to everything; `None` where the machine
    /// does not allow it, which is said.
    pub fn new() -> Option<Self> {
        Self::with(&["10.244.7.0/24", "fd00:244:7::/64"])
    }

    /// A node with these addresses.
    pub fn with(ranges: &[&str]) -> Option<Self> {
        penstock_testbed::require_kernel()?;
        // So begin the names of what the testbed removes where a run was killed.
        let number = BEDS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("pn{}xc{number}", std::process::id());
        penstock_testbed::remove_leftovers();
        let mut bed = Self {
            prefix,
            folder: tempfile::tempdir().unwrap(),
            namespaces: Vec::new(),
            agent: None,
        };
        bed.namespace("node");
        fs::create_dir_all(bed.run_dir()).unwrap();
        bed.describe(ranges);
        bed.agent = Some(Agent::start(&bed.run_dir(), &bed.state_dir()));
        Some(bed)
    }

    /// Writes what the agent says about the network.
    pub fn describe(&self, ranges: &[&str]) {
        let network = Network {
            version: Network::VERSION,
            pod_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            mtu: 1_450,
        };
        network.write(&self.run_dir()).unwrap();
    }

    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().unwrap()
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn state_path(&self) -> PathBuf {
        State::path(&self.state_dir(), "pods")
    }

    pub fn state(&self) -> State {
        State::read(&self.state_path())
            .unwrap()
            .unwrap_or_else(|| State::new("pods"))
    }

    pub fn node(&self) -> String {
        format!("{}-node", self.prefix)
    }

    fn namespace(&mut self, name: &str) -> String {
        let name = format!("{}-{name}", self.prefix);
        sh("ip", &["netns", "add", &name]);
        self.namespaces.push(name.clone());
        sh("ip", &["-n", &name, "link", "set", "lo", "up"]);
        name
    }

    /// A container's namespace.
    pub fn container(&mut self, id: &str) -> String {
        self.namespace(id)
    }

    /// A container's namespace, which goes.
    pub fn end(&mut self, namespace: &str) {
        sh("ip", &["netns", "del", namespace]);
        self.namespaces.retain(|name| name != namespace);
    }

    /// A call of the plugin for a container.
    pub fn call(&self, command: &str, container: &str) -> Call {
        let netns = format!("/run/netns/{}-{container}", self.prefix);
        Call {
            variables: BTreeMap::from([
                ("CNI_COMMAND", command.to_owned()),
                ("CNI_CONTAINERID", container.to_owned()),
                ("CNI_IFNAME", "eth0".to_owned()),
                ("CNI_NETNS", netns),
                ("CNI_PATH", "/usr/lib/cni".to_owned()),
                (
                    "CNI_ARGS",
                    format!(
                        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-{container}"
                    ),
                ),
            ]),
            config: json!({
                "cniVersion": "1.1.0",
                "name": "pods",
                "type": "penstock-cni",
                "runDir": self.run_dir(),
                "stateDir": self.state_dir(),
                "somethingUnknown": {"of": "another plugin"},
            }),
        }
    }

    /// Starts the plugin, or another.
    pub fn start(&self, program: &str, call: &Call) -> Child {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(&call.variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = inside(&self.node(), move || command.spawn().unwrap());
        let mut stdin = child.stdin.take().unwrap();
        // One that was killed does not listen.
        let _ = stdin.write_all(call.config.to_string().as_bytes());
        child
    }

    pub fn run_program(&self, program: &str, call: &Call) -> Said {
        Said::of(self.start(program, call).wait_with_output().unwrap())
    }

    /// Runs the plugin.
    pub fn run(&self, call: &Call) -> Said {
        self.run_program(PLUGIN, call)
    }

    pub fn add(&self, container: &str) -> Said {
        self.run(&self.call("ADD", container))
    }

    pub fn del(&self, container: &str) -> Said {
        self.run(&self.call("DEL", container))
    }

    pub fn check(&self, container: &str, result: &Value) -> Said {
        let call = self.call("CHECK", container);
        self.run(&call.with("prevResult", result.clone()))
    }

    /// The node's links that a plugin could have made.
    pub fn links(&self) -> Vec<String> {
        let links = list("ip", &self.node(), &["link"]);
        let names = links
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned());
        names.filter(|name| name != "lo").collect()
    }

    /// Asserts that nothing of any attachment is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.links(), Vec::<String>::new());
        assert_eq!(self.state().attachments, Vec::new());
        for family in ["-4", "-6"] {
            let routes = list("ip", &self.node(), &[family, "route"]);
            assert_eq!(routes, Vec::<Value>::new());
        }
        let files = fs::read_dir(self.state_dir())
            .into_iter()
            .flatten()
            .flatten();
        for file in files {
            let name = file.file_name().into_string().unwrap();
            assert!(
                matches!(
                    name.as_str(),
                    "pods.json" | "pods.lock" | "pods.new" | "pods.reserve"
                ),
                "{name}"
            );
        }
    }
}

/// The plugin.
pub const PLUGIN: &str = env!("CARGO_BIN_EXE_penstock-cni");

impl Drop for Bed {
    fn drop(&mut self) {
        self.agent = None;
        for namespace in &self.namespaces {
            let _ = Command::new("ip")
                .args(["netns", "del", namespace])
                .status();
        }
    }
}
