//! The operator's command line.

mod cleanup;
mod config;
mod conntrack;
mod duration;
mod pinned;
mod pod_network;
mod show;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{
    ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
    parser::ValueSource,
};
use glob::Pattern;
use ipnetwork::IpNetwork;
use penstock_common::limits;

use crate::{
    agent::{self, Ending, Options, Source},
    attach::{follow::Names, xdp::Choice},
    dataplane::sizes,
    flows::Lifetimes,
    model::node_ports::{NodePorts, Which},
    monitor,
    network::{self, install::Chained, plan::Routing},
    watch::kube::Servers,
};

/// Kubernetes Services in the kernel.
#[derive(Debug, Parser)]
#[command(name = "penstock", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve this node's pods and processes until stopped; traffic goes on afterwards.
    #[command(override_usage = "penstock agent --node-name <NAME> \
                          [--kubeconfig <FILE> | --manifests <DIR>] [OPTIONS]")]
    Agent(Box<AgentArgs>),
    /// How the agent is doing: 0 if it serves, 1 if not or if there is none.
    ///
    /// It serves once every first list has arrived; what it could not do yet is among the problems.
    Status(Look),
    /// The services that the kernel serves.
    Services(Counting),
    /// The backends of all services.
    Backends(Counting),
    /// The flows that are translated packet by packet.
    Conntrack(conntrack::ConntrackArgs),
    /// This node's pods that Penstock gave a network.
    Pods(Look),
    /// Other nodes' pod ranges, and how they are reached.
    Nodes(Look),
    /// What was dropped or refused, and why.
    Drops(Look),
    /// Take everything out of the kernel (programs, maps, flows, overlay, routes), and the network from
    /// the container runtime.
    Cleanup(CleanupArgs),
}

impl Cli {
    /// The command line of this process; ends it where that is none.
    pub fn read() -> Self {
        Self::from_matches(&Self::command().get_matches()).unwrap_or_else(|error| error.exit())
    }

    fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut cli = Self::from_arg_matches(matches)?;
        if let (Command::Agent(args), Some((_, matches))) = (&mut cli.command, matches.subcommand())
        {
            let ids = matches.ids().map(clap::Id::as_str);
            let is_said = |id: &&str| matches.value_source(id) != Some(ValueSource::DefaultValue);
            args.said = ids.filter(is_said).map(str::to_owned).collect();
        }
        Ok(cli)
    }
}

#[derive(Debug, Args)]
struct AgentArgs {
    /// kube-proxy's configuration file, for what no flag says.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The flags that somebody gave, by their fields' names.
    #[arg(skip)]
    said: BTreeSet<String>,
    /// Kubernetes credentials; inside a pod the service account is used.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
    /// A directory of Kubernetes YAML or JSON instead of an API server; files are best renamed into
    /// it, since one that is being written is read as it is.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// API servers to use in turn instead of the kubeconfig's (repeat, or separate by commas).
    #[arg(
        long = "api-server",
        value_name = "URL",
        value_delimiter = ',',
        conflicts_with = "manifests"
    )]
    api_servers: Vec<http::Uri>,
    /// This node's name in the cluster.
    #[arg(long, env = "NODE_NAME", value_name = "NAME", value_parser = node_name, required_unless_present = "config")]
    node_name: Option<String>,
    /// The cgroup whose sockets are translated [default: the cgroup2 root].
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Interfaces that pods are behind, by name; `*` and `?` match.
    #[arg(
        long,
        value_name = "PATTERNS",
        value_delimiter = ',',
        default_value = "pn*,veth*,cali*,lxc*,cni0"
    )]
    pod_interfaces: Vec<Pattern>,
    /// Interfaces to the outside, by name: those of them that have an address and no pod behind.
    #[arg(
        long,
        value_name = "PATTERNS",
        value_delimiter = ',',
        default_value = "*"
    )]
    uplinks: Vec<Pattern>,
    /// Where packets from the outside are met first.
    #[arg(long, value_enum, default_value_t = Choice::Off)]
    xdp: Choice,
    /// At which of this node's addresses its ports are services' (repeat, or separate by commas): ranges,
    /// the first of each family ("primary"), 127.0.0.1 and ::1 ("localhost"), "all"; all of a family that
    /// nothing is said of [default: primary].
    #[arg(long, value_name = "LIST")]
    nodeport_addresses: Vec<Which>,
    /// Serve no node ports at 127.0.0.1 and ::1, whatever --nodeport-addresses says.
    #[arg(long)]
    no_localhost_nodeports: bool,
    /// Cgroups below --cgroup whose sockets are left alone, by path; `*` matches (repeatable).
    #[arg(long = "exclude-cgroup", value_name = "PATTERN", value_delimiter = ',')]
    exclude_cgroups: Vec<Pattern>,
    /// Where Prometheus asks (/metrics); empty for nowhere.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249", value_parser = bind_address)]
    metrics_bind_address: Bind,
    /// Where load balancers and kubelet ask for this node's health (/healthz, /livez); empty for
    /// nowhere.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256", value_parser = bind_address)]
    healthz_bind_address: Bind,
    #[command(flatten)]
    conntrack: ConntrackArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    place: Place,
    /// How much to say.
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
}

/// How many flows there may be that are translated packet by packet, and for how long they may be idle;
/// a time of 0 is the default. Go's durations: 24h0m0s, 90s.
#[derive(Debug, Args)]
#[command(next_help_heading = "Flows")]
struct ConntrackArgs {
    /// How many flows of each family there may be for each processor of the node; 0 to leave the table
    /// as large as it is and ignore --conntrack-min.
    #[arg(long, value_name = "NUMBER", default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(..=MOST))]
    conntrack_max_per_core: u32,
    /// How many flows of each family there may be at least, however few processors the node has.
    #[arg(long, value_name = "NUMBER", default_value_t = limits::FLOWS, value_parser = clap::value_parser!(u32).range(..=MOST))]
    conntrack_min: u32,
    /// TCP, established.
    #[arg(long, value_name = "DURATION", default_value = "24h0m0s", value_parser = duration::idle_secs)]
    conntrack_tcp_timeout_established: u32,
    /// TCP, after one end has sent a FIN.
    #[arg(long, value_name = "DURATION", default_value = "1h0m0s", value_parser = duration::idle_secs)]
    conntrack_tcp_timeout_close_wait: u32,
    /// TCP, seen in one direction only.
    #[arg(long, value_name = "DURATION", default_value = "1m0s", value_parser = duration::idle_secs)]
    conntrack_tcp_timeout_syn: u32,
    /// TCP, after both ends have sent a FIN, or one a RST.
    #[arg(long, value_name = "DURATION", default_value = "2m0s", value_parser = duration::idle_secs)]
    conntrack_tcp_timeout_closing: u32,
    /// UDP and ICMP, seen in one direction only.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration::idle_secs)]
    conntrack_udp_timeout: u32,
    /// UDP and ICMP, seen in both directions; also for how long an unconnected socket stays with a
    /// backend.
    #[arg(long, value_name = "DURATION", default_value = "2m0s", value_parser = duration::idle_secs)]
    conntrack_udp_timeout_stream: u32,
}

/// The most flows that there may be.
const MOST: i64 = limits::MOST_FLOWS as i64;

impl ConntrackArgs {
    /// For how many flows of each family the table is to be made.
    fn flows(&self) -> Option<u32> {
        let cores = aya::util::online_cpus().map_or_else(
            |_| std::thread::available_parallelism().map_or(1, usize::from),
            |cores| cores.len(),
        );
        let cores = u32::try_from(cores).unwrap_or(u32::MAX);
        sizes::wanted(self.conntrack_max_per_core, self.conntrack_min, cores)
    }

    fn lifetimes(&self) -> Lifetimes {
        let default = Lifetimes::default();
        let or = |chosen, default| if chosen == 0 { default } else { chosen };
        Lifetimes {
            tcp_syn_secs: or(self.conntrack_tcp_timeout_syn, default.tcp_syn_secs),
            tcp_established_secs: or(
                self.conntrack_tcp_timeout_established,
                default.tcp_established_secs,
            ),
            tcp_close_wait_secs: or(
                self.conntrack_tcp_timeout_close_wait,
                default.tcp_close_wait_secs,
            ),
            tcp_closing_secs: or(self.conntrack_tcp_timeout_closing, default.tcp_closing_secs),
            udp_secs: or(self.conntrack_udp_timeout, default.udp_secs),
            udp_stream_secs: or(self.conntrack_udp_timeout_stream, default.udp_stream_secs),
        }
    }
}

/// The pod network.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pod network")]
struct NetworkArgs {
    /// Connect this node's pods: be their CNI plugin's agent.
    #[arg(long)]
    network: bool,
    /// How packets reach other nodes' pods.
    #[arg(long, value_enum, default_value_t = Routing::Vxlan, requires = "network")]
    routing: Routing,
    /// What pods' interfaces carry at most, in bytes [default: what the node's network leaves].
    #[arg(long, value_name = "BYTES", requires = "network", value_parser = clap::value_parser!(u32).range(1_280..=65_535))]
    mtu: Option<u32>,
    /// The UDP port of tunnels.
    #[arg(long, value_name = "PORT", default_value_t = 4_789, requires = "network", value_parser = clap::value_parser!(u16).range(1..))]
    vxlan_port: u16,
    /// The network identifier of tunnels.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, requires = "network", value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    vxlan_vni: u32,
    /// Send what pods send to the outside with their own addresses: the network routes them.
    #[arg(long, requires = "network")]
    no_masquerade: bool,
    /// Ranges outside of the pods' own that see pods' addresses (repeat, or separate by commas).
    #[arg(
        long,
        value_name = "RANGE",
        value_delimiter = ',',
        requires = "network"
    )]
    non_masquerade: Vec<IpNetwork>,
    /// Where the runtime looks for CNI configurations.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/etc/cni/net.d",
        requires = "network"
    )]
    cni_conf_dir: PathBuf,
    /// The configuration's file there: runtimes take the first by name.
    #[arg(
        long,
        value_name = "NAME",
        default_value = network::install::CONFIGURATION,
        requires = "network",
        value_parser = conf_name
    )]
    cni_conf_name: String,
    /// Where the runtime looks for CNI plugins.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/opt/cni/bin",
        requires = "network"
    )]
    cni_bin_dir: PathBuf,
    /// The plugin to install there [default: penstock-cni beside this program, if it is there].
    #[arg(long, value_name = "FILE", requires = "network")]
    cni_plugin: Option<PathBuf>,
    /// Where the plugin keeps what it gave to whom.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/lib/penstock/cni",
        requires = "network"
    )]
    cni_state_dir: PathBuf,
    /// A plugin's configuration that comes after penstock-cni in the runtime's (repeat, in their order).
    #[arg(long, value_name = "FILE", requires = "network")]
    cni_chain: Vec<PathBuf>,
    /// Other plugins come after penstock-cni in a configuration that somebody else writes.
    #[arg(long, requires = "network")]
    cni_chained: bool,
    /// The network's name in the CNI configuration.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "penstock",
        requires = "network"
    )]
    network_name: String,
}

impl NetworkArgs {
    fn options(self, run_dir: &Path) -> Result<Option<network::Options>> {
        if !self.network {
            return Ok(None);
        }
        if let Some(plugin) = &self.cni_plugin {
            anyhow::ensure!(
                plugin.is_file(),
                "{} is no file; --cni-plugin wants the program penstock-cni",
                plugin.display()
            );
        }
        let chain = self.cni_chain.iter().map(|path| Chained::read(path));
        let chain = chain.collect::<Result<_, _>>()?;
        let beside = std::env::current_exe()
            .ok()
            .map(|own| own.with_file_name(network::install::PLUGIN))
            .filter(|path| path.is_file());
        Ok(Some(network::Options {
            routing: self.routing,
            mtu: self.mtu,
            vxlan_port: self.vxlan_port,
            vni: self.vxlan_vni,
            masquerade: !self.no_masquerade,
            non_masquerade: self.non_masquerade,
            places: network::install::Places {
                conf_dir: self.cni_conf_dir,
                conf_name: self.cni_conf_name,
                bin_dir: self.cni_bin_dir,
                plugin: self.cni_plugin.or(beside),
                state_dir: self.cni_state_dir,
                run_dir: run_dir.to_path_buf(),
                network: self.network_name,
                chain,
                is_chained: self.cni_chained,
            },
        }))
    }
}

/// The name of a file that runtimes take for a list of plugins.
fn conf_name(name: &str) -> Result<String, String> {
    let stem = name.strip_suffix(".conflist").unwrap_or_default();
    if stem.is_empty() || stem.starts_with('.') || stem.contains('/') {
        return Err(format!(
            "write a file's name that ends with .conflist: {}",
            network::install::CONFIGURATION
        ));
    }
    Ok(name.to_owned())
}

/// Where to listen, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bind(Option<SocketAddr>);

fn bind_address(text: &str) -> Result<Bind, String> {
    if text.is_empty() {
        return Ok(Bind(None));
    }
    let address = text
        .parse()
        .map_err(|_| "write an address and port: 127.0.0.1:10249, [::]:10256".to_owned());
    address.map(|address| Bind(Some(address)))
}

/// A node's name is that of an object.
fn node_name(name: &str) -> Result<String, String> {
    crate::api::check_name("the name", name).map(|()| name.to_owned())
}

/// Where an agent keeps its things.
#[derive(Debug, Args)]
struct Place {
    /// Where maps and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/penstock")]
    bpffs: PathBuf,
    /// Where the agent's socket is.
    #[arg(long, value_name = "DIR", default_value = "/run/penstock")]
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Look {
    #[command(flatten)]
    place: Place,
    /// For a person or for a program.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Args)]
struct Counting {
    #[command(flatten)]
    look: Look,
    /// Also connections, flows, packets and bytes, which JSON always has.
    #[arg(long)]
    stats: bool,
}

#[derive(Debug, Args)]
struct CleanupArgs {
    #[command(flatten)]
    place: Place,
    /// Where the runtime looks for CNI configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// The configuration's file there.
    #[arg(
        long,
        value_name = "NAME",
        default_value = network::install::CONFIGURATION,
        value_parser = conf_name
    )]
    cni_conf_name: String,
    /// Even while an agent is running, or pods are on its network.
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    /// Also what the kernel programs trace.
    Trace,
}

impl LogLevel {
    fn filter(self) -> &'static str {
        match self {
            Self::Error => "error,kube_client=off",
            Self::Warn => "warn,kube_client=off",
            Self::Info => "info,kube_client=off",
            Self::Debug => "info,kube_client=off,penstock=debug,penstock_agent=debug",
            Self::Trace => "info,kube_client=off,penstock=trace,penstock_agent=trace",
        }
    }
}

/// Does what the command line says.
pub async fn run(cli: Cli) -> Result<ExitCode> {
    if !matches!(cli.command, Command::Agent(_)) {
        // As other tools: `penstock services | head` ends with its reader.
        crate::attach::end_with_readers();
    }
    match cli.command {
        Command::Status(look) => return show::status(&look).await,
        Command::Agent(args) => run_agent(*args).await,
        Command::Services(args) => show::services(&args).await,
        Command::Backends(args) => show::backends(&args).await,
        Command::Conntrack(args) => conntrack::run(&args).await,
        Command::Pods(look) => pod_network::pods(&look).await,
        Command::Nodes(look) => pod_network::nodes(&look).await,
        Command::Drops(look) => show::drops(&look),
        Command::Cleanup(args) => cleanup::run(&args).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

async fn run_agent(mut args: AgentArgs) -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(args.log_level.filter()))
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    args.configure()?;
    let node_name = args.node_name.context(
        "--config has no hostnameOverride; pass --node-name or set NODE_NAME to this node's name",
    )?;
    let source = match args.manifests {
        Some(directory) => {
            anyhow::ensure!(
                directory.is_dir(),
                "{} is no directory; --manifests wants one with Kubernetes YAML or JSON",
                directory.display()
            );
            Source::Manifests(directory)
        }
        None => Source::Kube(servers(args.kubeconfig, &args.api_servers).await?),
    };
    let cgroup = match args.cgroup {
        Some(cgroup) => cgroup,
        None => cgroup_root()?,
    };
    let network = args.network.options(&args.place.run_dir)?;
    let ending = agent::run(Options {
        network,
        source,
        node_name,
        cgroup,
        bpffs: args.place.bpffs,
        run_dir: args.place.run_dir,
        interfaces: Names {
            pods: args.pod_interfaces,
            uplinks: args.uplinks,
        },
        xdp: args.xdp,
        node_ports: NodePorts {
            which: Which::joined(args.nodeport_addresses),
            loopback: !args.no_localhost_nodeports,
        },
        exclude_cgroups: args.exclude_cgroups,
        lifetimes: args.conntrack.lifetimes(),
        flows: args.conntrack.flows(),
        monitor: monitor::Addresses {
            metrics: args.metrics_bind_address.0,
            healthz: args.healthz_bind_address.0,
        },
        is_tracing: args.log_level == LogLevel::Trace,
    })
    .await?;
    if let Ending::Lost(path) = ending {
        tracing::error!("{} was removed; beginning anew", path.display());
        return begin_anew();
    }
    Ok(())
}

/// Replaces this process by one that starts as it did: nothing of the old one is in the way, and
/// whoever supervises it sees the same process.
fn begin_anew() -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let error = std::os::unix::process::CommandExt::exec(
        std::process::Command::new(&program).args(std::env::args_os().skip(1)),
    );
    Err(error).with_context(|| format!("starting {} anew", program.display()))
}

async fn servers(kubeconfig: Option<PathBuf>, urls: &[http::Uri]) -> Result<Servers> {
    let config = match kubeconfig {
        Some(path) => {
            let what = || format!("reading the kubeconfig {}", path.display());
            let kubeconfig = kube::config::Kubeconfig::read_from(&path).with_context(what)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
                .await
                .with_context(what)?
        }
        None => kube::Config::incluster().context(
            "reading the pod's service account; outside a cluster pass --kubeconfig or --manifests",
        )?,
    };
    Ok(Servers::new(config, urls)?)
}

/// Where cgroup2 is mounted.
fn cgroup_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_, folder, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(folder))
        })
        .context("no cgroup2 is mounted (mount -t cgroup2 none DIR), or pass --cgroup")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_live_as_long_as_kube_proxys_flags_say() {
        let parse = |options: &[&str]| {
            let agent = ["penstock", "agent", "--manifests", "/", "--node-name", "a"];
            let all = agent.iter().chain(options);
            let Command::Agent(args) = Cli::try_parse_from(all)?.command else {
                panic!("the command is agent");
            };
            Ok::<_, clap::Error>(args.conntrack.lifetimes())
        };
        assert_eq!(parse(&[]).unwrap(), Lifetimes::default());
        let chosen = [
            "--conntrack-tcp-timeout-established=2h",
            "--conntrack-tcp-timeout-close-wait=0",
            "--conntrack-tcp-timeout-syn=3s",
            "--conntrack-tcp-timeout-closing=4s",
            "--conntrack-udp-timeout=5s",
            "--conntrack-udp-timeout-stream=1m0s",
        ];
        let expected = Lifetimes {
            tcp_syn_secs: 3,
            tcp_established_secs: 7_200,
            tcp_close_wait_secs: 3_600,
            tcp_closing_secs: 4,
            udp_secs: 5,
            udp_stream_secs: 60,
        };
        assert_eq!(parse(&chosen).unwrap(), expected);
        let error = parse(&["--conntrack-udp-timeout=soon"]).unwrap_err();
        assert!(error.to_string().contains("is no duration"), "{error}");
    }

    #[test]
    fn a_node_is_called_as_an_object_can_be() {
        let parse = |name: &str| {
            Cli::try_parse_from(["penstock", "agent", "--manifests", "/", "--node-name", name])
        };
        for good in ["a", "node-1.example.com"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        let long = "a".repeat(254);
        for bad in ["", "N_1!", "a-", "a b", &long] {
            let error = parse(bad).map(drop).unwrap_err().to_string();
            assert!(error.contains("is no name"), "{bad}: {error}");
        }
    }
}
