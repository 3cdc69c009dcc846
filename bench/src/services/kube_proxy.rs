//! The real kube-proxy in each of its modes, on a node of the testbed, with a real API server.

use std::{thread, time::Duration};

use anyhow::{Context, Result};
use penstock_testbed::{ApiServer, Host, Node, ProxyMode, Testbed, patiently};

use super::{
    Places, ipvs, nftables,
    objects::{self, Kind, SERVICE_PORT, Services},
    program::Program,
};
use crate::{
    contender::{Counts, Witness},
    family::Family,
};

/// A node's kube-proxy, and who tells it of services.
pub struct KubeProxy {
    // Dropped from top to bottom.
    process: penstock_testbed::KubeProxy,
    _api: ApiServer,
    kind: Kind,
    family: Family,
}

/// For how long its rules have to be the same to be taken for all: it writes them anew, and in another
/// order, with every change that it hears of.
const STEADY: Duration = Duration::from_secs(5);

impl KubeProxy {
    /// Starts it in a mode, and waits until it serves all ports of these services.
    pub fn start(
        testbed: &mut Testbed,
        program: &Program,
        node: &Node,
        services: &Services,
        mode: ProxyMode,
    ) -> Result<Self> {
        let host = testbed.client()?;
        // Each has an API server of its own, as each lane's services have endpoints of their own.
        let folder = testbed.folder().join(node.name());
        let api = ApiServer::start(&program.assets, &host, &folder)?;
        for list in services.lists() {
            api.create(&list?)?;
        }
        let mut proxy = Self {
            process: program.proxy.start(node, &api, mode)?,
            _api: api,
            kind: services.kind,
            family: services.family,
        };
        proxy
            .wait(node, services, mode)
            .with_context(|| proxy.process.log())?;
        Ok(proxy)
    }

    fn wait(&mut self, node: &Node, services: &Services, mode: ProxyMode) -> Result<()> {
        let (expected, family) = (services.ports(), self.family);
        let mut before = Vec::new();
        patiently("kube-proxy serves all ports", || {
            let served = match mode {
                ProxyMode::Iptables => {
                    let rules = self.rules()?;
                    let ports = ports(&rules, self.kind);
                    let found = ports.len();
                    let owned = |(protocol, place): &Port| format!("{protocol} {place}");
                    let order: Vec<String> = ports.iter().map(owned).collect();
                    if found >= expected && order != before {
                        before = order;
                        thread::sleep(STEADY);
                        anyhow::bail!("its rules change");
                    }
                    found
                }
                ProxyMode::Ipvs => {
                    let list = ["/proc/thread-self/net/ip_vs"];
                    ipvs::served(&self.process.ask("cat", &list)?)
                }
                ProxyMode::Nftables => nftables::served(&node.host, family)?,
            };
            anyhow::ensure!(
                served >= expected,
                "{served} of {expected} ports are served"
            );
            Ok(())
        })?;
        if mode == ProxyMode::Nftables {
            nftables::watch(&node.host, family)?;
        }
        Ok(())
    }

    /// Its rules in the nat table.
    fn rules(&mut self) -> Result<String> {
        self.process.ask(save(self.family), &["-t", "nat"])
    }

    /// Its rules in all tables.
    pub fn all_rules(&mut self) -> Result<String> {
        self.process.ask(save(self.family), &[])
    }

    /// Which services come first and last in its rules, as they are.
    pub fn first_and_last(&mut self) -> Result<[Places; 2]> {
        places(&self.rules()?)
    }

    /// The numbers of the services whose node ports come first and last in its rules, as they are: of TCP and
    /// of UDP.
    pub fn first_and_last_node_ports(&mut self) -> Result<[(usize, usize); 2]> {
        let rules = self.rules()?;
        let kind = Kind::NodePort(penstock_common::Forwarding::default());
        let ports = ports(&rules, kind);
        first_and_last(&ports, |port| objects::with_node_port(port.parse().ok()?))
            .context("no node port has rules")
    }
}

/// Which services come first and last in such rules.
pub fn places(rules: &str) -> Result<[Places; 2]> {
    let ports = ports(rules, Kind::ClusterIp);
    first_and_last(&ports, |ip| ip.parse().ok())
        .map(|ends| ends.map(|(tcp, udp)| Places { tcp, udp }))
        .context("no service has rules")
}

/// What prints a family's rules.
const fn save(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-save",
        Family::V6 => "ip6tables-save",
    }
}

/// A port that has a rule: its protocol, and the service's address or the node port.
type Port<'a> = (&'a str, &'a str);

/// The ports that have rules, in the order in which the kernel looks at them.
fn ports(rules: &str, kind: Kind) -> Vec<Port<'_>> {
    let (chain, port) = match kind {
        Kind::ClusterIp => ("-A KUBE-SERVICES ", format!("--dport {SERVICE_PORT} ")),
        Kind::NodePort(_) => ("-A KUBE-NODEPORTS ", "--dport ".to_owned()),
    };
    let rules = rules.lines().filter(|rule| {
        // Later versions have a chain of its own for what comes from outside.
        let is_jump = [" -j KUBE-SVC-", " -j KUBE-EXT-"]
            .iter()
            .any(|jump| rule.contains(jump));
        rule.starts_with(chain) && is_jump && rule.contains(&port)
    });
    let after =
        |rule: &'_ str, word: &str| -> Option<usize> { Some(rule.find(word)? + word.len()) };
    rules
        .filter_map(|rule| {
            let word = |before: &str| rule.get(after(rule, before)?..)?.split(' ').next();
            let place = match kind {
                Kind::ClusterIp => word(" -d ")?.split('/').next()?,
                Kind::NodePort(_) => word(" --dport ")?,
            };
            Some((word(" -p ")?, place))
        })
        .collect()
}

/// The first and the last of each protocol.
fn first_and_last<T: Copy>(
    ports: &[Port],
    place: impl Fn(&str) -> Option<T>,
) -> Option<[(T, T); 2]> {
    let of = |wanted: &str| {
        let mut places = ports
            .iter()
            .filter(|(protocol, _)| *protocol == wanted)
            .filter_map(|(_, text)| place(text));
        let first = places.next()?;
        Some([first, places.next_back().unwrap_or(first)])
    };
    let ([tcp_first, tcp_last], [udp_first, udp_last]) = (of("tcp")?, of("udp")?);
    Some([(tcp_first, udp_first), (tcp_last, udp_last)])
}

/// What tells that connections are translated by its rules on a node.
pub fn witness(node: &Host, family: Family) -> Witness {
    let node = node.clone();
    Witness::new("DNAT rules", Counts::Flows, move || {
        let rules = node.run(save(family), &["-t", "nat", "-c"])?;
        Ok(translations(&rules))
    })
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
        let ports = ports(RULES, Kind::ClusterIp);
        assert_eq!(ports.len(), 3);
        let ends = first_and_last(&ports, |ip| Some(ip.len())).unwrap();
        assert_eq!(ports[0], ("tcp", "10.96.1.2"));
        assert_eq!(ports[2], ("tcp", "10.96.1.0"));
        assert_eq!(ends, [(9, 9), (9, 9)]);
    }

    #[test]
    fn node_ports_are_found_in_their_own_chain() {
        let rules = "\
-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/s1:tcp\" -m tcp --dport 30001 -j KUBE-MARK-MASQ
-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/s1:tcp\" -m tcp --dport 30001 -j KUBE-SVC-AAAA
-A KUBE-NODEPORTS -p udp -m comment --comment \"default/s0:udp\" -m udp --dport 30000 -j KUBE-EXT-BBBB
-A KUBE-NODEPORTS -p tcp -m comment --comment \"default/s0:tcp\" -m tcp --dport 30000 -j KUBE-EXT-CCCC
-A KUBE-SERVICES -d 10.96.1.0/32 -p tcp -m comment --comment \"default/s0:tcp\" -m tcp --dport 80 -j KUBE-SVC-CCCC
";
        let kind = Kind::NodePort(penstock_common::Forwarding::default());
        let ports = ports(rules, kind);
        let numbers = first_and_last(&ports, |port| objects::with_node_port(port.parse().ok()?));
        assert_eq!(numbers, Some([(1, 0), (0, 0)]));
    }

    #[test]
    fn counters_of_translations_are_added_up() {
        let rules = "[7:420] -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80\n\
                     [9:540] -A KUBE-SERVICES -d 10.96.1.2/32 -j KUBE-SVC-AAAA\n\
                     [5:300] -A KUBE-SEP-B -p udp -m udp -j DNAT --to-destination 10.0.0.1:80\n";
        assert_eq!(translations(rules), 12);
    }
}
