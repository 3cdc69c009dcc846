//! kube-proxy's configuration file (KubeProxyConfiguration, kubeproxy.config.k8s.io/v1alpha1) as defaults
//! of flags: what a cluster that had kube-proxy says, Penstock heeds as far as it has it.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Result;
use serde_json::Value;

use super::{AgentArgs, Bind, duration, node_name};
use crate::model::node_ports::Which;

/// What the file has to be.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
/// Where kube-proxy listens where a file names no port.
const METRICS_PORT: u16 = 10_249;
const HEALTHZ_PORT: u16 = 10_256;

/// Fields of kube-proxy's that say nothing to Penstock, by their beginnings.
const WITHOUT_EFFECT: [&str; 26] = [
    "bindAddress",
    "bindAddressHardFail",
    "clientConnection.acceptContentTypes",
    "clientConnection.burst",
    "clientConnection.contentType",
    "clientConnection.qps",
    "clusterCIDR",
    "configSyncPeriod",
    "conntrack.tcpBeLiberal",
    "detectLocal",
    "detectLocalMode",
    "enableProfiling",
    "featureGates",
    "iptables.masqueradeAll",
    "iptables.masqueradeBit",
    "iptables.minSyncPeriod",
    "iptables.snatNodeInternalIP",
    "iptables.syncPeriod",
    "ipvs",
    "logging",
    "nftables",
    "oomScoreAdj",
    "portRange",
    "showHiddenMetricsForVersion",
    "windowsRunAsService",
    "winkernel",
];

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    /// It can't be read.
    #[error("reading {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// It is no YAML.
    #[error("{} is no YAML", file.display())]
    Yaml {
        file: PathBuf,
        #[source]
        source: Box<serde_saphyr::Error>,
    },
    /// A field is not what it has to be.
    #[error("{}: {field}: {problem}", file.display())]
    Field {
        file: PathBuf,
        field: String,
        problem: String,
    },
}

/// What a file says; nothing where kube-proxy's default is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Config {
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) node_name: Option<String>,
    pub(super) metrics: Option<Bind>,
    pub(super) healthz: Option<Bind>,
    pub(super) node_ports: Option<Which>,
    /// Whether node ports may be at the loopback addresses.
    pub(super) has_localhost: Option<bool>,
    pub(super) max_per_core: Option<u32>,
    pub(super) min: Option<u32>,
    pub(super) tcp_established: Option<u32>,
    pub(super) tcp_close_wait: Option<u32>,
    pub(super) udp: Option<u32>,
    pub(super) udp_stream: Option<u32>,
    /// What is said and has no effect, by field.
    pub(super) idle: Vec<String>,
    /// Fields that kube-proxy does not have either.
    pub(super) unknown: Vec<String>,
}

impl Config {
    /// Reads a file.
    pub(super) fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(file).map_err(|source| ConfigError::Read {
            file: file.to_path_buf(),
            source,
        })?;
        Self::parse(file, &text)
    }

    fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! { with_snippet: false };
        let root: Value = serde_saphyr::from_str_with_options(text, options).map_err(|source| {
            ConfigError::Yaml {
                file: file.to_path_buf(),
                source: Box::new(source),
            }
        })?;
        let failed = |(field, problem): Problem| ConfigError::Field {
            file: file.to_path_buf(),
            field,
            problem,
        };
        let mut config = Self::default();
        for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
            let found = root.get(field).and_then(Value::as_str);
            if found != Some(expected) {
                let problem = format!("{} is not {expected}", found.unwrap_or("nothing"));
                return Err(failed((field.to_owned(), problem)));
            }
        }
        for (field, value) in root.as_object().into_iter().flatten() {
            config.take(field, value).map_err(failed)?;
        }
        // Where it is IPv6, metrics are at IPv6's loopback address by default.
        let own = root.get("bindAddress").and_then(Value::as_str);
        let is_v6 = own.is_some_and(|own| own.parse::<Ipv6Addr>().is_ok());
        if is_v6 && config.metrics.is_none() {
            let metrics = SocketAddr::from((Ipv6Addr::LOCALHOST, METRICS_PORT));
            config.metrics = Some(Bind(Some(metrics)));
        }
        Ok(config)
    }

    /// Takes a field in, with those below it.
    fn take(&mut self, field: &str, value: &Value) -> Result<(), Problem> {
        match field {
            "apiVersion" | "kind" => {}
            "clientConnection" | "iptables" | "conntrack" => {
                for (name, value) in fields(field, value)? {
                    self.take(&format!("{field}.{name}"), value)?;
                }
            }
            "clientConnection.kubeconfig" => {
                self.kubeconfig = said(field, value)?.map(PathBuf::from)
            }
            "hostnameOverride" => {
                let name = said(field, value)?.map(|name| name.trim().to_lowercase());
                let name = name.map(|name| node_name(&name)).transpose();
                self.node_name = name.map_err(|problem| (field.to_owned(), problem))?;
            }
            "metricsBindAddress" => self.metrics = bind(field, value, METRICS_PORT)?,
            "healthzBindAddress" => self.healthz = bind(field, value, HEALTHZ_PORT)?,
            "nodePortAddresses" => self.node_ports = which(field, value)?,
            "iptables.localhostNodePorts" => self.has_localhost = truth(field, value)?,
            "conntrack.maxPerCore" => self.max_per_core = number(field, value)?,
            "conntrack.min" => self.min = number(field, value)?,
            "conntrack.tcpEstablishedTimeout" => self.tcp_established = seconds(field, value)?,
            "conntrack.tcpCloseWaitTimeout" => self.tcp_close_wait = seconds(field, value)?,
            "conntrack.udpTimeout" => self.udp = seconds(field, value)?,
            "conntrack.udpStreamTimeout" => self.udp_stream = seconds(field, value)?,
            "mode" => {
                if let Some(mode) = said(field, value)? {
                    self.idle
                        .push(format!("mode {mode} (Penstock has one of its own)"));
                }
            }
            _ if is_nothing(value) => {}
            _ if WITHOUT_EFFECT.contains(&field) => self.idle.push(field.to_owned()),
            _ => self.unknown.push(field.to_owned()),
        }
        Ok(())
    }
}

impl AgentArgs {
    /// Takes in what kube-proxy's file says and no flag does. What is named and has no effect is told.
    pub(super) fn configure(&mut self) -> Result<()> {
        let Some(file) = self.config.clone() else {
            return Ok(());
        };
        let config = Config::read(&file)?;
        let (file, said) = (file.display(), &self.said);
        for (what, fields) in [
            ("has no effect here", &config.idle),
            ("is unknown", &config.unknown),
        ] {
            if !fields.is_empty() {
                tracing::info!("{file}: what {what}: {}", fields.join(", "));
            }
        }
        if self.manifests.is_none() {
            let kubeconfig = config.kubeconfig.map(Some);
            take(said, "kubeconfig", &mut self.kubeconfig, kubeconfig);
        }
        let name = config.node_name.map(Some);
        take(said, "node_name", &mut self.node_name, name);
        let metrics = &mut self.metrics_bind_address;
        take(said, "metrics_bind_address", metrics, config.metrics);
        let healthz = &mut self.healthz_bind_address;
        take(said, "healthz_bind_address", healthz, config.healthz);
        let node_ports = config.node_ports.map(|which| vec![which]);
        let flag = &mut self.nodeport_addresses;
        take(said, "nodeport_addresses", flag, node_ports);
        let without = config.has_localhost.map(|has_localhost| !has_localhost);
        let flag = &mut self.no_localhost_nodeports;
        take(said, "no_localhost_nodeports", flag, without);
        let flows = &mut self.conntrack;
        for (id, flag, value) in [
            (
                "conntrack_max_per_core",
                &mut flows.conntrack_max_per_core,
                config.max_per_core,
            ),
            ("conntrack_min", &mut flows.conntrack_min, config.min),
            (
                "conntrack_tcp_timeout_established",
                &mut flows.conntrack_tcp_timeout_established,
                config.tcp_established,
            ),
            (
                "conntrack_tcp_timeout_close_wait",
                &mut flows.conntrack_tcp_timeout_close_wait,
                config.tcp_close_wait,
            ),
            (
                "conntrack_udp_timeout",
                &mut flows.conntrack_udp_timeout,
                config.udp,
            ),
            (
                "conntrack_udp_timeout_stream",
                &mut flows.conntrack_udp_timeout_stream,
                config.udp_stream,
            ),
        ] {
            take(said, id, flag, value);
        }
        Ok(())
    }
}

/// Makes what a file says a flag's value, unless somebody gave the flag.
fn take<T>(said: &BTreeSet<String>, id: &str, flag: &mut T, value: Option<T>) {
    if let (Some(value), false) = (value, said.contains(id)) {
        *flag = value;
    }
}

/// A field, and what is wrong with it.
type Problem = (String, String);

fn wrong(field: &str, value: &Value, wanted: &str) -> Problem {
    (field.to_owned(), format!("{value} is no {wanted}"))
}

/// Whether kube-proxy would take it for its default, as most of a file that a program wrote is.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s" | "0.0.0.0" | "::"),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.values().all(is_nothing),
    }
}

fn fields<'a>(
    field: &str,
    value: &'a Value,
) -> Result<impl Iterator<Item = (&'a String, &'a Value)>, Problem> {
    let fields = value.as_object();
    if fields.is_none() && !value.is_null() {
        return Err(wrong(field, value, "object"));
    }
    Ok(fields.into_iter().flatten())
}

fn said<'a>(field: &str, value: &'a Value) -> Result<Option<&'a str>, Problem> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if text.is_empty() => Ok(None),
        Value::String(text) => Ok(Some(text)),
        _ => Err(wrong(field, value, "text")),
    }
}

fn truth(field: &str, value: &Value) -> Result<Option<bool>, Problem> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(truth) => Ok(Some(*truth)),
        _ => Err(wrong(field, value, "truth: true or false")),
    }
}

fn number(field: &str, value: &Value) -> Result<Option<u32>, Problem> {
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    let fits = number.filter(|number| i64::from(*number) <= super::MOST);
    let wanted = format!("number of flows from 0 to {}", super::MOST);
    fits.map(Some).ok_or_else(|| wrong(field, value, &wanted))
}

fn seconds(field: &str, value: &Value) -> Result<Option<u32>, Problem> {
    let text = said(field, value)?;
    let seconds = text.map(duration::idle_secs).transpose();
    seconds.map_err(|error| (field.to_owned(), error.to_string()))
}

fn which(field: &str, value: &Value) -> Result<Option<Which>, Problem> {
    if value.is_null() {
        return Ok(None);
    }
    let entries = value.as_array();
    let entries = entries.ok_or_else(|| wrong(field, value, "list"))?;
    let mut lists = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        let field = format!("{field}[{number}]");
        let text = entry.as_str();
        let text = text.ok_or_else(|| wrong(&field, entry, "text"))?;
        let list: Which = text.parse().map_err(|problem| (field, problem))?;
        lists.push(list);
    }
    Ok((!lists.is_empty()).then(|| Which::joined(lists)))
}

/// An address with a port, or without.
fn bind(field: &str, value: &Value, port: u16) -> Result<Option<Bind>, Problem> {
    let Some(text) = said(field, value)? else {
        return Ok(None);
    };
    let bare = text.parse::<IpAddr>().ok();
    let bare = bare.or_else(|| {
        let inside = text.strip_prefix('[')?.strip_suffix(']')?;
        inside.parse::<Ipv6Addr>().ok().map(IpAddr::from)
    });
    // Go takes a port alone for one of every address.
    let alone = text.strip_prefix(':').and_then(|port| port.parse().ok());
    let alone = alone.map(|port: u16| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    let whole = text.parse::<SocketAddr>().ok();
    let address = bare.map(|ip| SocketAddr::new(ip, port)).or(whole).or(alone);
    let address = address.filter(|address| address.port() > 0);
    let wanted = "address with a port, such as 0.0.0.0:10256";
    let address = address.ok_or_else(|| wrong(field, value, wanted))?;
    Ok(Some(Bind(Some(address))))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::{Cli, Command};

    /// As kubeadm writes it into its ConfigMap.
    const KUBEADM: &str = include_str!("kubeadm.yaml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let head = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n");
        Config::parse(Path::new("config.conf"), &(head + text))
    }

    #[test]
    fn kubeadms_file_says_little() {
        let config = Config::parse(Path::new("config.conf"), KUBEADM).unwrap();
        let expected = Config {
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            // The usual ones.
            udp: Some(0),
            udp_stream: Some(0),
            idle: vec!["clusterCIDR".to_owned()],
            ..Config::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn what_a_file_says_is_heeded() {
        let text = "
hostnameOverride: ' Node-1 '
healthzBindAddress: '[::]'
metricsBindAddress: 0.0.0.0:9100
nodePortAddresses: [primary, 10.0.0.0/8]
iptables: { localhostNodePorts: false }
conntrack:
  maxPerCore: 0
  min: 4096
  tcpEstablishedTimeout: 2h0m0s
  tcpCloseWaitTimeout: 0s
  udpTimeout: 20s
  udpStreamTimeout: 3m
";
        let bind = |text: &str| Some(Bind(Some(text.parse().unwrap())));
        let expected = Config {
            node_name: Some("node-1".to_owned()),
            healthz: bind("[::]:10256"),
            metrics: bind("0.0.0.0:9100"),
            node_ports: Some("primary,10.0.0.0/8".parse().unwrap()),
            has_localhost: Some(false),
            max_per_core: Some(0),
            min: Some(4_096),
            tcp_established: Some(7_200),
            tcp_close_wait: Some(0),
            udp: Some(20),
            udp_stream: Some(180),
            ..Config::default()
        };
        assert_eq!(parse(text).unwrap(), expected);
        let v6 = parse("bindAddress: '::'").unwrap();
        assert_eq!(v6.metrics, bind("[::1]:10249"));
        let any = parse("healthzBindAddress: ':10300'").unwrap();
        assert_eq!(any.healthz, bind("0.0.0.0:10300"));
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let text = "
mode: ipvs
ipvs: { scheduler: rr }
iptables: { masqueradeAll: true, newPeriod: 5s }
enableProfiling: true
tomorrow: 1
";
        let config = parse(text).unwrap();
        let mut idle = config.idle;
        idle.sort_unstable();
        let expected = [
            "enableProfiling",
            "iptables.masqueradeAll",
            "ipvs",
            "mode ipvs (Penstock has one of its own)",
        ];
        assert_eq!(idle, expected);
        let mut unknown = config.unknown;
        unknown.sort_unstable();
        assert_eq!(unknown, ["iptables.newPeriod", "tomorrow"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_field() {
        let chain = |error: ConfigError| crate::words::chain(&error);
        for (text, problem) in [
            (
                "nodePortAddresses: [10.0.0.0/8, ten]",
                "nodePortAddresses[1]: \"ten\" is neither",
            ),
            (
                "nodePortAddresses: 10.0.0.0/8",
                "nodePortAddresses: \"10.0.0.0/8\" is no list",
            ),
            (
                "healthzBindAddress: everywhere",
                "healthzBindAddress: \"everywhere\" is no address",
            ),
            (
                "metricsBindAddress: '127.0.0.1:0'",
                "metricsBindAddress: \"127.0.0.1:0\" is no",
            ),
            ("hostnameOverride: a_b", "hostnameOverride: the name"),
            (
                "conntrack: { min: -1 }",
                "conntrack.min: -1 is no number of flows",
            ),
            (
                "conntrack: { udpTimeout: soon }",
                "conntrack.udpTimeout: \"soon\" is no duration",
            ),
            ("conntrack: [1]", "conntrack: [1] is no object"),
            (
                "iptables: { localhostNodePorts: 'no' }",
                "localhostNodePorts: \"no\" is no truth",
            ),
        ] {
            let error = chain(parse(text).unwrap_err());
            assert!(error.starts_with("config.conf: "), "{error}");
            assert!(error.contains(problem), "{text}: {error}");
        }
        let file = Path::new("config.conf");
        let other = Config::parse(file, "apiVersion: v1\nkind: ConfigMap\n").unwrap_err();
        let expected = format!("config.conf: apiVersion: v1 is not {API_VERSION}");
        assert_eq!(chain(other), expected);
        for text in ["[", "", "text"] {
            let error = chain(Config::parse(file, text).unwrap_err());
            assert!(error.starts_with("config.conf"), "{text:?}: {error}");
        }
        let missing = Config::read(Path::new("/nowhere/config.conf")).unwrap_err();
        let error = chain(missing);
        assert!(
            error.starts_with("reading /nowhere/config.conf: "),
            "{error}"
        );
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "
clientConnection: { kubeconfig: /kubeconfig }
hostnameOverride: theirs
metricsBindAddress: 127.0.0.1:1
healthzBindAddress: 127.0.0.1:2
nodePortAddresses: [10.0.0.0/8]
iptables: { localhostNodePorts: false }
conntrack: { min: 1, udpTimeout: 2s }
";
        let head = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n");
        fs::write(file.path(), head + text).unwrap();
        let path = file.path().to_str().unwrap();
        let parse = |flags: &[&str]| {
            let all = [&["penstock", "agent", "--config", path], flags].concat();
            let matches = Cli::command().try_get_matches_from(all).unwrap();
            let Command::Agent(mut args) = Cli::from_matches(&matches).unwrap().command else {
                panic!("the command is agent");
            };
            args.configure().unwrap();
            let bind = |bind: Bind| bind.0.map(|address| address.port());
            (
                args.kubeconfig,
                args.node_name,
                [args.metrics_bind_address, args.healthz_bind_address].map(bind),
                Which::joined(args.nodeport_addresses),
                args.no_localhost_nodeports,
                [
                    args.conntrack.conntrack_min,
                    args.conntrack.conntrack_udp_timeout,
                ],
            )
        };
        let which = |text: &str| -> Which { text.parse().unwrap() };
        let of_file = (
            Some("/kubeconfig".into()),
            Some("theirs".to_owned()),
            [Some(1), Some(2)],
            which("10.0.0.0/8"),
            true,
            [1, 2],
        );
        assert_eq!(parse(&[]), of_file);
        let flags = [
            "--kubeconfig=/ours",
            "--node-name=ours",
            "--metrics-bind-address=",
            "--healthz-bind-address=0.0.0.0:10256",
            "--nodeport-addresses=primary",
            // The default, and said all the same.
            "--conntrack-min=131072",
        ];
        let of_flags = (
            Some("/ours".into()),
            Some("ours".to_owned()),
            [None, Some(10_256)],
            which("primary"),
            true,
            [131_072, 2],
        );
        assert_eq!(parse(&flags), of_flags);
        let without = parse(&["--manifests=/"]);
        assert_eq!(without.0, None, "objects come from somewhere else");
    }
}
