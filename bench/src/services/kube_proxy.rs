//! The real kube-proxy in its iptables and its ipvs mode, on a node of the testbed, with a real API
//! server.

use std::{
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use penstock_testbed::{self as testbed, ApiServer, Host, Node, ProxyMode, Testbed, patiently};

use super::{
    Places, ipvs,
    objects::{self, Kind, SERVICE_PORT},
};
use crate::contender::{Counts, Witness};

/// The folder with a kube-proxy and what it needs, or a word about its being left out.
pub fn assets() -> Option<PathBuf> {
    let assets = testbed::require_api_server();
    let assets = assets.filter(|assets| assets.join("kube-proxy").exists());
    if assets.is_none() {
        println!(
            "WARNING: KUBEBUILDER_ASSETS has no kube-proxy: its iptables and ipvs modes are left out"
        );
    }
    assets
}

/// A node's kube-proxy, and who tells it of services.
pub struct KubeProxy {
    // Dropped from top to bottom.
    process: testbed::KubeProxy,
    _api: ApiServer,
}

/// For how long its rules have to be the same to be taken for all: it writes them anew, and in another
/// order, with every change that it hears of.
const STEADY: Duration = Duration::from_secs(5);

impl KubeProxy {
    /// Starts it with programs from `assets`, and waits until it has rules for so many services.
    pub fn start(
        testbed: &mut Testbed,
        assets: &Path,
        node: &Node,
        count: usize,
        kind: Kind,
        server: &Host,
    ) -> Result<Self> {
        let mode = ProxyMode::Iptables;
        let (api, mut process) = begin(testbed, assets, node, count, kind, server, mode)?;
        let expected = ports_of(count);
        let mut before = Vec::new();
        patiently("kube-proxy has written its rules", || {
            let rules = process.rules(true)?;
            let ports = ports(&rules);
            let found = ports.len();
            anyhow::ensure!(found >= expected, "{found} of {expected} ports have rules");
            let owned = |(protocol, ip): &Port| format!("{protocol} {ip}");
            let order: Vec<String> = ports.iter().map(owned).collect();
            if order != before {
                before = order;
                thread::sleep(STEADY);
                anyhow::bail!("they change");
            }
            Ok(())
        })?;
        Ok(Self { process, _api: api })
    }

    /// Which services come first and last in its rules, as they are.
    pub fn first_and_last(&mut self) -> Result<[Places; 2]> {
        let rules = self.process.rules(true)?;
        first_and_last(&ports(&rules)).context("no service has rules")
    }

    /// The same in its ipvs mode, until so many services have virtual servers, which have no order.
    pub fn start_ipvs(
        testbed: &mut Testbed,
        assets: &Path,
        node: &Node,
        count: usize,
        kind: Kind,
        server: &Host,
    ) -> Result<Self> {
        let mode = ProxyMode::Ipvs;
        let (api, mut process) = begin(testbed, assets, node, count, kind, server, mode)?;
        let expected = ports_of(count);
        patiently("kube-proxy has made its virtual servers", || {
            let served = ipvs::served(&process.virtual_servers()?);
            anyhow::ensure!(
                served >= expected,
                "{served} of {expected} ports have virtual servers: {}",
                process.log()
            );
            Ok(())
        })?;
        Ok(Self { process, _api: api })
    }
}

/// Starts it, told of so many services, and does not wait.
fn begin(
    testbed: &mut Testbed,
    assets: &Path,
    node: &Node,
    count: usize,
    kind: Kind,
    server: &Host,
    mode: ProxyMode,
) -> Result<(ApiServer, testbed::KubeProxy)> {
    let host = testbed.client()?;
    // Each has an API server of its own, as each lane's services have endpoints of their own.
    let folder = testbed.folder().join(node.name());
    let api = ApiServer::start(assets, &host, &folder)?;
    for list in objects::lists(count, kind, server) {
        api.create(&list)?;
    }
    let process = testbed::KubeProxy::start(assets, node, &api, mode)?;
    Ok((api, process))
}

/// The ports of so many services. The API server has one of its own besides.
fn ports_of(count: usize) -> usize {
    (0..count)
        .map(|number| objects::protocols(number).len())
        .sum()
}

/// A port that has a rule: its protocol and the service's address.
type Port<'a> = (&'a str, &'a str);

/// The ports that have rules, in the order in which the kernel looks at them.
fn ports(rules: &str) -> Vec<Port<'_>> {
    let port = format!("--dport {SERVICE_PORT} ");
    let rules = rules.lines().filter(|rule| {
        rule.starts_with("-A KUBE-SERVICES ")
            && rule.contains(" -j KUBE-SVC-")
            && rule.contains(&port)
    });
    let after =
        |rule: &'_ str, word: &str| -> Option<usize> { Some(rule.find(word)? + word.len()) };
    rules
        .filter_map(|rule| {
            let ip = rule.get(after(rule, " -d ")?..)?.split('/').next()?;
            let protocol = rule.get(after(rule, " -p ")?..)?.split(' ').next()?;
            Some((protocol, ip))
        })
        .collect()
}

fn first_and_last(ports: &[Port]) -> Option<[Places; 2]> {
    let of = |wanted: &str| {
        let mut ips = ports
            .iter()
            .filter(|(protocol, _)| *protocol == wanted)
            .filter_map(|(_, ip)| ip.parse().ok());
        let first = ips.next()?;
        Some([first, ips.next_back().unwrap_or(first)])
    };
    let ([tcp_first, tcp_last], [udp_first, udp_last]) = (of("tcp")?, of("udp")?);
    Some([
        Places {
            tcp: tcp_first,
            udp: udp_first,
        },
        Places {
            tcp: tcp_last,
            udp: udp_last,
        },
    ])
}

/// What tells that connections are translated by its rules on a node.
pub fn witness(node: &Host) -> Witness {
    let node = node.clone();
    Witness::new("DNAT rules", Counts::Flows, move || translated(&node))
}

/// Connections that were translated on a node.
fn translated(node: &Host) -> Result<u64> {
    Ok(translations(
        &node.run("iptables-save", &["-t", "nat", "-c"])?,
    ))
}

/// The sum of the counters of rules that translate.
fn translations(rules: &str) -> u64 {
    let translating = rules.lines().filter(|rule| rule.contains(" -j DNAT "));
    translating
        .filter_map(|rule| {
            rule.strip_prefix('[')?
                .split(':')
                .next()?
                .parse::<u64>()
                .ok()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "\
:KUBE-SERVICES - [0:0]
-A KUBE-SERVICES ! -s 10.244.0.0/16 -d 10.96.1.2/32 -p tcp -m comment --comment \"default/s2:tcp cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 10.96.1.2/32 -p tcp -m comment --comment \"default/s2:tcp cluster IP\" -m tcp --dport 80 -j KUBE-SVC-AAAA
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment \"default/kubernetes:https cluster IP\" -m tcp --dport 443 -j KUBE-SVC-NPX4
-A KUBE-SERVICES -d 10.96.1.0/32 -p udp -m comment --comment \"default/s0:udp cluster IP\" -m udp --dport 80 -j KUBE-SVC-BBBB
-A KUBE-SERVICES -d 10.96.1.0/32 -p tcp -m comment --comment \"default/s0:tcp cluster IP\" -m tcp --dport 80 -j KUBE-SVC-CCCC
";

    #[test]
    fn the_first_and_the_last_are_in_the_order_of_rules() {
        let ports = ports(RULES);
        assert_eq!(ports.len(), 3);
        let [first, last] = first_and_last(&ports).unwrap();
        assert_eq!(first.tcp.to_string(), "10.96.1.2");
        assert_eq!(last.tcp.to_string(), "10.96.1.0");
        assert_eq!(first.udp, last.udp);
    }

    #[test]
    fn counters_of_translations_are_added_up() {
        let rules = "[7:420] -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80\n\
                     [9:540] -A KUBE-SERVICES -d 10.96.1.2/32 -j KUBE-SVC-AAAA\n\
                     [5:300] -A KUBE-SEP-B -p udp -m udp -j DNAT --to-destination 10.0.0.1:80\n";
        assert_eq!(translations(rules), 12);
    }
}
