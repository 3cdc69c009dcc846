//! Namespaces, links, routes and cgroups, made and removed.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail};

use crate::{
    cgroup,
    host::Host,
    plugin::Container,
    process::{self, Place},
};

/// Several nodes around one bridge.
pub struct Testbed {
    prefix: String,
    nodes: u8,
    clients: u8,
    folder: tempfile::TempDir,
    routes: Vec<(String, u8)>,
    namespaces: Vec<String>,
    cgroups: Vec<PathBuf>,
}

/// A node: a namespace, a cgroup, folders of its own.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its namespace and address.
    pub host: Host,
    /// Its number, from 1 on.
    pub number: u8,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its bpffs folder.
    pub bpffs: PathBuf,
    /// Its folder of manifests.
    pub manifests: PathBuf,
    /// Where its agent is found.
    pub run_dir: PathBuf,
    /// The pattern of its pods' interfaces.
    pub pod_interfaces: String,
    prefix: String,
    pods: std::sync::Arc<AtomicU32>,
    pod_ranges: (String, String),
}

/// A pod: a namespace behind a veth pair.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its namespace and addresses.
    pub host: Host,
    /// The name of the host end of its link.
    pub interface: String,
    /// The node that it runs on.
    pub node: String,
}

/// Runs `ip` once for many lines.
fn ip(namespace: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip (package iproute2)")?;
    child
        .stdin
        .take()
        .context("no pipe")?
        .write_all(lines.as_bytes())
        .context("writing to ip")?;
    let output = child.wait_with_output().context("waiting for ip")?;
    if !output.status.success() {
        bail!(
            "ip {namespace:?}: {}\n{lines}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

static RUNS: AtomicU32 = AtomicU32::new(0);

impl Testbed {
    /// A bridge without nodes.
    pub fn new() -> Result<Self> {
        Self::new_in(&std::env::temp_dir())
    }

    /// The same, with its folder in another one.
    pub fn new_in(parent: &Path) -> Result<Self> {
        reap();
        if !fs::read_to_string("/proc/mounts").is_ok_and(|mounts| mounts.contains(" /sys/fs/bpf "))
        {
            let status = Command::new("mount")
                .args(["-t", "bpf", "bpf", "/sys/fs/bpf"])
                .status();
            anyhow::ensure!(
                status.is_ok_and(|status| status.success()),
                "mounting /sys/fs/bpf"
            );
        }
        let run = RUNS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("pn{}x{run}", std::process::id());
        let mut testbed = Self {
            prefix: prefix.clone(),
            nodes: 0,
            clients: 0,
            folder: tempfile::tempdir_in(parent).context("making a folder")?,
            routes: Vec::new(),
            namespaces: Vec::new(),
            cgroups: Vec::new(),
        };
        let fabric = testbed.namespace("fab")?;
        ip(
            Some(&fabric),
            "link add br0 type bridge forward_delay 0 mcast_snooping 0\nlink set br0 up\nlink set lo up\n",
        )?;
        Ok(testbed)
    }

    /// A folder that goes with the testbed.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The prefix of everything that it makes.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The namespace of the bridge, which has no address of its own.
    pub fn network(&self) -> Result<Host> {
        self.host(&self.fabric(), ("0.0.0.0", "::"), None)
    }

    fn fabric(&self) -> String {
        format!("{}-fab", self.prefix)
    }

    fn namespace(&mut self, name: &str) -> Result<String> {
        let name = format!("{}-{name}", self.prefix);
        ip(None, &format!("netns add {name}\n"))?;
        self.namespaces.push(name.clone());
        // No waiting for duplicate addresses, of which there are none; root may ask for echoes.
        let place = Place {
            namespace: Path::new("/run/netns").join(&name),
            ..Place::default()
        };
        let mut sysctl = process::command("sysctl", &place)?;
        sysctl.args([
            "-qw",
            "net.ipv6.conf.all.accept_dad=0",
            "net.ipv6.conf.default.accept_dad=0",
            "net.ipv4.ping_group_range=0 0",
        ]);
        process::run(sysctl)?;
        ip(Some(&name), "link set lo up\n")?;
        Ok(name)
    }

    /// Connects a namespace to the bridge with host number `number` of network `network`: 0, or
    /// another one that a router leads to.
    fn connect(&self, namespace: &str, network: u8, number: u8) -> Result<()> {
        let fabric = self.fabric();
        ip(
            None,
            &format!(
                "link add f{number} netns {fabric} type veth peer name eth0 netns {namespace}\n"
            ),
        )?;
        ip(
            Some(&fabric),
            &format!("link set f{number} master br0 up\n"),
        )?;
        ip(
            Some(namespace),
            &format!(
                "addr add 172.31.{network}.{number}/24 dev eth0\n\
                 addr add fd00:31:0:{network}::{number}/64 dev eth0 nodad\n\
                 link set eth0 up\n"
            ),
        )
    }

    /// Lets the bridge route between its networks, and a namespace use it.
    pub(crate) fn route_between_networks(&self, namespace: &str, network: u8) -> Result<()> {
        let place = Place {
            namespace: Path::new("/run/netns").join(self.fabric()),
            ..Place::default()
        };
        let mut sysctl = process::command("sysctl", &place)?;
        sysctl.args([
            "-qw",
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.send_redirects=0",
            "net.ipv4.conf.br0.send_redirects=0",
        ]);
        process::run(sysctl)?;
        ip(
            Some(&self.fabric()),
            &format!(
                "addr replace 172.31.{network}.1/24 dev br0\n\
                 addr replace fd00:31:0:{network}::1/64 dev br0 nodad\n"
            ),
        )?;
        ip(
            Some(namespace),
            &format!(
                "route replace default via 172.31.{network}.1\n\
                 route replace default via fd00:31:0:{network}::1\n"
            ),
        )
    }

    pub(crate) fn host(
        &self,
        namespace: &str,
        ips: (&str, &str),
        cgroup: Option<PathBuf>,
    ) -> Result<Host> {
        Ok(Host {
            name: namespace.to_owned(),
            ip4: ips.0.parse().context("an address")?,
            ip6: ips.1.parse().context("an address")?,
            place: Place {
                namespace: Path::new("/run/netns").join(namespace),
                cgroups: cgroup.into_iter().collect(),
                inside: None,
            },
        })
    }

    /// One more node, with routes to the others' pods.
    pub fn node(&mut self) -> Result<Node> {
        let node = self.bare_node(0)?;
        let namespace = &node.host.name;
        for (other, other_number) in &self.routes {
            let routes = |number: u8| {
                let via = 10 + number;
                format!(
                    "route add 10.244.{number}.0/24 via 172.31.0.{via}\n\
                     route add fd00:244:{number}::/64 via fd00:31::{via}\n"
                )
            };
            ip(Some(other), &routes(node.number))?;
            ip(Some(namespace), &routes(*other_number))?;
        }
        self.routes.push((namespace.clone(), node.number));
        Ok(node)
    }

    /// One more node on a network, without any routes.
    pub(crate) fn bare_node(&mut self, network: u8) -> Result<Node> {
        self.nodes += 1;
        let number = self.nodes;
        let name = format!("n{number}");
        let namespace = self.namespace(&name)?;
        let address = 10 + number;
        self.connect(&namespace, network, address)?;
        let cgroup = cgroup::unified()?.join(format!("{}-{name}", self.prefix));
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        self.cgroups.push(cgroup.clone());
        let folder = self.folder.path().join(&name);
        let manifests = folder.join("manifests");
        fs::create_dir_all(&manifests).context("making folders")?;
        let ips = (
            format!("172.31.{network}.{address}"),
            format!("fd00:31:0:{network}::{address}"),
        );
        let host = self.host(&namespace, (&ips.0, &ips.1), Some(cgroup.clone()))?;
        host.run(
            "sh",
            &[
                "-c",
                "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
                 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0",
            ],
        )?;
        Ok(Node {
            host,
            number,
            cgroup,
            bpffs: Path::new("/sys/fs/bpf").join(format!("{}-{name}", self.prefix)),
            manifests,
            run_dir: folder.join("run"),
            pod_interfaces: "pk*".to_owned(),
            prefix: self.prefix.clone(),
            pods: std::sync::Arc::default(),
            pod_ranges: (
                format!("10.244.{number}.0/24"),
                format!("fd00:244:{number}::/64"),
            ),
        })
    }

    /// A namespace and a cgroup for a pod of a node's, which has no link yet.
    pub(crate) fn container(&mut self, node: &Node) -> Result<(Container, PathBuf)> {
        let number = 1 + node.pods.fetch_add(1, Ordering::Relaxed);
        let namespace = self.namespace(&format!("n{}p{number}", node.number))?;
        let cgroup = node.cgroup.join(format!("pod{number}"));
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        Ok((Container::named(&namespace), cgroup))
    }

    /// Removes a namespace before the testbed goes.
    pub(crate) fn remove_namespace(&mut self, name: &str) -> Result<()> {
        ip(None, &format!("netns del {name}\n"))?;
        self.namespaces.retain(|other| other != name);
        Ok(())
    }

    /// One more pod on a node.
    pub fn pod(&mut self, node: &Node) -> Result<Pod> {
        let (container, cgroup) = self.container(node)?;
        let namespace = container.id;
        let number = node.pods.load(Ordering::Relaxed);
        anyhow::ensure!(number < 250, "a node has room for 249 pods");
        let interface = format!("pk{number}");
        let (ip4, ip6) = (
            format!("10.244.{}.{number}", node.number),
            format!("fd00:244:{}::{number}", node.number),
        );
        ip(
            None,
            &format!(
                "link add {interface} netns {} type veth peer name eth0 netns {namespace}\n",
                node.host.name
            ),
        )?;
        // Static neighbours and a link-local gateway, so that nothing is ever broadcast.
        let (host_mac, pod_mac) = (
            format!("02:00:00:00:01:{number:02x}"),
            format!("02:00:00:00:02:{number:02x}"),
        );
        ip(
            Some(&node.host.name),
            &format!(
                "link set {interface} address {host_mac}\n\
                 link set {interface} up\n\
                 route add {ip4}/32 dev {interface}\n\
                 route add {ip6}/128 dev {interface}\n\
                 neigh add {ip4} lladdr {pod_mac} dev {interface} nud permanent\n\
                 neigh add {ip6} lladdr {pod_mac} dev {interface} nud permanent\n"
            ),
        )?;
        ip(
            Some(&namespace),
            &format!(
                "link set eth0 address {pod_mac}\n\
                 addr add {ip4}/32 dev eth0\n\
                 addr add {ip6}/128 dev eth0 nodad\n\
                 link set eth0 up\n\
                 neigh add 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent\n\
                 neigh add fe80::1 lladdr {host_mac} dev eth0 nud permanent\n\
                 route add 169.254.1.1 dev eth0 scope link\n\
                 route add default via 169.254.1.1 dev eth0\n\
                 route add default via fe80::1 dev eth0\n"
            ),
        )?;
        Ok(Pod {
            host: self.host(&namespace, (&ip4, &ip6), Some(cgroup))?,
            interface,
            node: node.name(),
        })
    }

    /// A host on the nodes' network that is no node.
    pub fn client(&mut self) -> Result<Host> {
        self.clients += 1;
        let namespace = self.namespace(&format!("c{}", self.clients))?;
        let address = 200 + self.clients;
        self.connect(&namespace, 0, address)?;
        let ips = (format!("172.31.0.{address}"), format!("fd00:31::{address}"));
        self.host(&namespace, (&ips.0, &ips.1), None)
    }
}

impl Node {
    /// Its name in the cluster.
    pub fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// The bridge's end of its link.
    pub fn port(&self) -> String {
        format!("f{}", 10 + self.number)
    }

    /// The ranges of its pods' addresses.
    pub fn pod_ranges(&self) -> (String, String) {
        self.pod_ranges.clone()
    }

    /// The same node with other ranges.
    #[must_use]
    pub fn with_pod_ranges(mut self, v4: &str, v6: &str) -> Self {
        self.pod_ranges = (v4.to_owned(), v6.to_owned());
        self
    }

    /// Runs a program in its namespace, outside its cgroup.
    pub(crate) fn place(&self) -> Place {
        Place {
            namespace: self.host.place.namespace.clone(),
            ..Place::default()
        }
    }

    /// The prefix of what belongs to its testbed.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// A manifest as it was written last.
    pub fn read_manifest(&self, file: &str) -> Result<String> {
        let path = self.manifests.join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// Replaces or makes a manifest, at once.
    pub fn manifest(&self, file: &str, text: &str) -> Result<()> {
        let path = self.manifests.join(file);
        let new = self.manifests.join(format!(".{file}.new"));
        fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Switches checksum offload of an interface off, so that every checksum is really computed.
    pub fn without_checksum_offload(&self, pod: &Pod) -> Result<()> {
        self.host.without_checksum_offload(&pod.interface)?;
        pod.host.without_checksum_offload("eth0")
    }
}

impl Pod {
    /// Segments and datagrams that it dropped for a wrong checksum.
    pub fn checksum_errors(&self) -> Result<u64> {
        self.host.checksum_errors()
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        remove(&self.prefix, &self.namespaces, &self.cgroups);
    }
}

/// Removes what a testbed made; what is gone already is as good.
fn remove(prefix: &str, namespaces: &[String], cgroups: &[PathBuf]) {
    for cgroup in cgroups {
        cgroup::end_processes(cgroup);
    }
    for folder in fs::read_dir("/sys/fs/bpf").into_iter().flatten().flatten() {
        if folder
            .file_name()
            .to_string_lossy()
            .starts_with(&format!("{prefix}-"))
        {
            let _ = fs::remove_dir_all(folder.path());
        }
    }
    let lines: String = namespaces
        .iter()
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if let Err(error) = ip(None, &lines) {
        eprintln!("removing namespaces: {error:#}");
    }
    for cgroup in cgroups {
        if let Err(error) = cgroup::remove(cgroup) {
            eprintln!("{error:#}");
        }
    }
}

/// Removes what killed runs left, once a process.
fn reap() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(remove_leftovers);
}

/// Removes what killed runs left.
pub fn remove_leftovers() {
    let is_dead = |name: &str| -> Option<String> {
        let prefix = name.split('-').next()?;
        let pid: u32 = prefix.strip_prefix("pn")?.split('x').next()?.parse().ok()?;
        (!Path::new(&format!("/proc/{pid}")).exists()).then(|| prefix.to_owned())
    };
    let names = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    let namespaces: Vec<String> = names(Path::new("/run/netns"))
        .into_iter()
        .filter(|name| is_dead(name).is_some())
        .collect();
    let roots = cgroup::hierarchies().unwrap_or_default();
    let roots = roots.into_iter().map(|hierarchy| hierarchy.root);
    let cgroups: Vec<PathBuf> = roots
        .chain(cgroup::unified())
        .flat_map(|root| {
            names(&root)
                .into_iter()
                .map(move |name| (root.clone(), name))
        })
        .filter(|(_, name)| is_dead(name).is_some())
        .map(|(root, name)| root.join(name))
        .collect();
    let mut prefixes: Vec<String> = names(Path::new("/sys/fs/bpf"))
        .iter()
        .filter_map(|name| is_dead(name))
        .collect();
    prefixes.sort();
    prefixes.dedup();
    for prefix in &prefixes {
        remove(prefix, &[], &[]);
    }
    if !namespaces.is_empty() || !cgroups.is_empty() {
        remove("\0", &namespaces, &cgroups);
    }
}
