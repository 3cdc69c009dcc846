//! A node as Kubernetes knows it: containerd and the kubelet, with namespaces and cgroups of their
//! own, on a node of the testbed.
//!
//! All of it lives in one pid namespace whose first process dies with the test; with it go the
//! containers and the mounts.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    agent::{Agent, Source},
    apiserver::ApiServer,
    cgroup,
    containerd::{Cni, Containerd},
    host::Host,
    image,
    process::{self, Place, Process},
    testbed::{Node, Pod},
    wait::patiently,
};

/// What a node's mounts are made with.
const SCRIPT: &str = include_str!("node.sh");

/// A node with containerd and the kubelet.
pub struct KubernetesNode {
    /// The testbed's node that it is on. Programs that it runs are in a cgroup of the node's.
    pub node: Node,
    // Dropped from top to bottom.
    _kubelet: Process,
    containerd: Containerd,
    _first: Process,
    first_id: u32,
    _cgroups: Cgroups,
    folder: PathBuf,
}

/// The node's cgroups in hierarchies that the testbed knows nothing of, removed when dropped.
struct Cgroups(Vec<PathBuf>);

impl Drop for Cgroups {
    fn drop(&mut self) {
        for cgroup in &self.0 {
            if let Err(error) = cgroup::remove(cgroup) {
                eprintln!("{error:#}");
            }
        }
    }
}

impl KubernetesNode {
    /// Makes a node one of the cluster's, with the ranges that pods of the testbed would have.
    ///
    /// `assets` is where the kubelet is.
    pub fn start(assets: &Path, node: &Node, api: &ApiServer, cni: &Cni) -> Result<Self> {
        let folder = node.manifests.with_file_name("kubernetes");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let cgroups = cgroups(node)?;
        let mut node = node.clone();
        let place = Place {
            cgroups: [&[node.cgroup.clone()], cgroups.0.as_slice()].concat(),
            ..node.place()
        };
        let (first, first_id) = first(&node, place, &folder)?;
        let leaf = node.cgroup.join("host");
        node.host.place.cgroups = [&[leaf], cgroups.0.as_slice()].concat();
        let place = Place {
            inside: Some(first_id),
            ..node.host.place.clone()
        };
        let containerd = Containerd::start(&node, &place, &folder, cni)?;
        let kubelet = kubelet(assets, &node, &place, api, &containerd, &folder)?;
        let started = Self {
            node,
            _kubelet: kubelet,
            containerd,
            _first: first,
            first_id,
            _cgroups: cgroups,
            folder,
        };
        started.register(api).with_context(|| started.log())?;
        Ok(started)
    }

    /// Waits until the kubelet has made its object, and does to it what a controller would.
    fn register(&self, api: &ApiServer) -> Result<()> {
        let (v4, v6) = self.node.pod_ranges();
        let ranges = json!({ "spec": { "podCIDR": v4, "podCIDRs": [v4, v6] } });
        patiently("the kubelet registers its node", || {
            api.patch("node", &self.node.name(), &ranges)
        })
    }

    /// The end of what kubelet and containerd logged.
    pub fn log(&self) -> String {
        let kubelet = fs::read_to_string(self.folder.join("kubelet.log")).unwrap_or_default();
        let end = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            let skipped = lines.len().saturating_sub(40);
            lines
                .into_iter()
                .skip(skipped)
                .collect::<Vec<_>>()
                .join("\n")
        };
        format!("{}\n{}", end(&self.containerd.log()), end(&kubelet))
    }

    /// The node's agent, among the node's mounts and processes as a pod of the host's would be.
    pub fn agent(&self, source: &Source, extra: &[&str]) -> Result<Agent> {
        Agent::start_at(&self.inside()?, source, extra, self.place())
    }

    /// The same with a network for its pods.
    pub fn network_agent(&self, source: &Source, extra: &[&str]) -> Result<Agent> {
        Agent::start_network_at(&self.inside()?, source, extra, self.place())
    }

    /// Runs a program among the node's mounts and processes to its end; what it printed.
    pub fn run(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<String> {
        let mut command = process::command(program, &self.place())?;
        command.args(arguments);
        process::run(command)
    }

    /// Gives the runtime the image of the agent that `deploy/` names.
    pub fn import_release(&self) -> Result<()> {
        let archive = image::write_release(&self.folder).context("making the agent's image")?;
        let archive = archive.to_str().context("a folder's name is no text")?;
        let import = ["images", "import", "--snapshotter", "native", archive];
        self.containerd.ctr(&import).map(drop)
    }

    /// The node as programs among its mounts see it.
    fn inside(&self) -> Result<Node> {
        let mut node = self.node.clone();
        let folder = if cgroup::hierarchies()?.is_empty() {
            "/sys/fs/cgroup"
        } else {
            "/sys/fs/cgroup/unified"
        };
        node.cgroup = folder.into();
        Ok(node)
    }

    /// Where the node's own programs run.
    fn place(&self) -> Place {
        Place {
            inside: Some(self.first_id),
            ..self.node.host.place.clone()
        }
    }

    /// Where a file of the node's is found from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new("/proc")
            .join(self.first_id.to_string())
            .join("root")
            .join(inside.trim_start_matches('/'))
    }

    /// The names of its interfaces.
    pub fn interfaces(&self) -> Result<BTreeSet<String>> {
        let names = links(&self.node.host)?;
        let names = names.iter().filter_map(|link| link.get("ifname")?.as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// The network namespaces that containerd made and has not removed.
    pub fn namespaces(&self) -> Result<BTreeSet<String>> {
        names(&self.path("/run/netns"))
    }

    /// The ids of containers, pods' sandboxes among them, that have a process.
    pub fn running_containers(&self) -> Result<BTreeSet<String>> {
        let text = self.containerd.ctr(&["tasks", "list", "--quiet"])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// The id of a running container's first process, as the node knows it.
    fn process_of(&self, container: &str) -> Result<u32> {
        let text = self.containerd.ctr(&["tasks", "list"])?;
        let mut lines = text.lines().map(str::split_whitespace);
        let id = lines.find_map(|mut words| (words.next()? == container).then(|| words.next())?);
        let id = id.with_context(|| format!("container {container} does not run: {text}"))?;
        id.parse().with_context(|| format!("{id} is no process"))
    }

    /// A running pod of this node; `status` is the object's.
    pub(crate) fn pod(&self, name: &str, status: &Value) -> Result<Pod> {
        let container = status
            .pointer("/containerStatuses/0/containerID")
            .and_then(Value::as_str)
            .and_then(|id| id.strip_prefix("containerd://"))
            .with_context(|| format!("pod {name} has no container: {status}"))?;
        let process = self.path(&format!("/proc/{}", self.process_of(container)?));
        let cgroups = fs::read_to_string(process.join("cgroup"))
            .with_context(|| format!("reading the cgroup of pod {name}"))?;
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
        let host = Host {
            name: name.to_owned(),
            ip4: address(status, IpAddr::is_ipv4)?,
            ip6: address(status, IpAddr::is_ipv6)?,
            place: Place {
                namespace: process.join("ns/net"),
                cgroups: vec![cgroup::unified()?.join(cgroup.context("no cgroup2")?)],
                inside: None,
            },
        };
        Ok(Pod {
            interface: self.peer(&host)?,
            host,
            node: self.node.name(),
        })
    }

    /// The node's end of a pod's link.
    fn peer(&self, pod: &Host) -> Result<String> {
        let field = |link: &Value, name: &str| link.get(name).cloned();
        let own = links(pod)?;
        let own = own
            .iter()
            .find(|link| field(link, "ifname") == Some("eth0".into()))
            .with_context(|| format!("pod {} has no eth0", pod.name))?;
        let index = field(own, "link_index");
        let ours = links(&self.node.host)?;
        let peer = ours.iter().find(|link| field(link, "ifindex") == index);
        let peer = peer.and_then(|link| link.get("ifname")?.as_str());
        peer.map(str::to_owned)
            .with_context(|| format!("pod {}'s link does not end here: {own}", pod.name))
    }
}

/// The interfaces of a host.
fn links(host: &Host) -> Result<Vec<Value>> {
    let text = host.run("ip", &["-json", "link", "show"])?;
    serde_json::from_str(&text).with_context(|| format!("{text:?} is no list"))
}

/// What a folder holds.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names
        .collect::<std::io::Result<_>>()
        .with_context(|| format!("reading {}", folder.display()))
}

/// One of a pod's addresses.
fn address(status: &Value, is_wanted: impl Fn(&IpAddr) -> bool) -> Result<IpAddr> {
    let all = status.get("podIPs").and_then(Value::as_array);
    let texts = all
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.get("ip")?.as_str());
    let mut addresses = texts.filter_map(|text| text.parse().ok());
    addresses
        .find(is_wanted)
        .with_context(|| format!("an address is missing: {status}"))
}

/// A node's cgroups: the testbed's with a leaf for processes, and one in each other hierarchy.
fn cgroups(node: &Node) -> Result<Cgroups> {
    let root = cgroup::unified()?;
    cgroup::delegate(&root)?;
    let leaf = node.cgroup.join("host");
    fs::create_dir_all(&leaf).with_context(|| format!("making {}", leaf.display()))?;
    let name = node.cgroup.file_name().context("a cgroup has no name")?;
    let name = name.to_string_lossy();
    let mut cgroups = Cgroups(Vec::new());
    for hierarchy in cgroup::hierarchies()? {
        cgroups.0.push(hierarchy.make(&name)?);
    }
    Ok(cgroups)
}

/// Starts a node's first process and waits until everything is mounted; the process that holds it,
/// and its id.
fn first(node: &Node, place: Place, folder: &Path) -> Result<(Process, u32)> {
    let hierarchies = cgroup::hierarchies()?;
    let options: Vec<String> = hierarchies.into_iter().map(|one| one.options).collect();
    let mut command = process::command("unshare", &place)?;
    command
        .args(["--mount", "--uts", "--ipc", "--cgroup"])
        .args(["bash", "-c", SCRIPT])
        .env("NAME", node.name())
        .env("FOLDER", folder)
        .env("HIERARCHIES", options.join(" "));
    let mut first = Process::start(command)?;
    let line = first.line().context("starting a Kubernetes node")?;
    let id = line
        .parse()
        .with_context(|| format!("{line:?} is no process"))?;
    Ok((first, id))
}

fn kubelet(
    assets: &Path,
    node: &Node,
    place: &Place,
    api: &ApiServer,
    containerd: &Containerd,
    folder: &Path,
) -> Result<Process> {
    let config = folder.join("kubelet.json");
    let resolver = folder.join("resolv.conf");
    fs::write(&resolver, "").context("writing resolv.conf")?;
    fs::write(&config, configuration(&resolver).to_string())
        .context("writing the kubelet's configuration")?;
    let mut command = process::command(assets.join("kubelet"), place)?;
    command
        .arg("--config")
        .arg(config)
        .arg("--kubeconfig")
        .arg(api.kubeconfig())
        .arg("--root-dir")
        .arg(folder.join("kubelet"))
        .arg("--cert-dir")
        .arg(folder.join("kubelet/pki"))
        .args(["--hostname-override", &node.name()])
        .arg(format!("--node-ip={},{}", node.host.ip4, node.host.ip6))
        .args(["--container-runtime", "remote"])
        .args(["--container-runtime-endpoint", &containerd.endpoint()]);
    Process::start_logging(command, &folder.join("kubelet.log"))
}

fn configuration(resolver: &Path) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": "cgroupfs",
        // The machine's memory and disks are not the test's business.
        "evictionHard": {
            "memory.available": "0%",
            "nodefs.available": "0%",
            "imagefs.available": "0%",
        },
        "failSwapOn": false,
        "featureGates": { "IPv6DualStack": true },
        "imageGCHighThresholdPercent": 100,
        "makeIPTablesUtilChains": false,
        "nodeStatusUpdateFrequency": "1s",
        "resolvConf": resolver,
    })
}
