//! Virtual servers of IPVS, which the real kube-proxy makes in its ipvs mode: where the kernel has it,
//! what it serves, and the counters that tell that packets came this way.

use std::path::Path;

use anyhow::{Context, Result};
use penstock_testbed::Host;

use super::objects::SERVICE_PORT;
use crate::contender::{Counts, Witness};

/// Its list of virtual servers, there as soon as the module is.
const LIST: &str = "/proc/net/ip_vs";
/// What kube-proxy keeps sets of addresses with.
const IPSET: &str = "/usr/sbin/ipset";

/// Why it can't be compared here, if it can't.
pub fn missing() -> Option<String> {
    if !Path::new(LIST).exists() {
        return Some(
            "this kernel has no IPVS loaded (modprobe -a ip_vs ip_vs_rr ip_vs_wrr ip_vs_sh dummy); \
             cargo xtask bench-vm compares it in an emulated machine"
                .to_owned(),
        );
    }
    let has_ipset = Path::new(IPSET).exists();
    (!has_ipset).then(|| format!("{IPSET} is not there (package ipset)"))
}

/// How many of the services' ports have a virtual server with a backend, in `/proc/net/ip_vs`.
pub fn served(list: &str) -> usize {
    let port = format!(":{SERVICE_PORT:04X}");
    let mut lines = list.lines().peekable();
    let mut served = 0;
    while let Some(line) = lines.next() {
        let mut words = line.split_whitespace();
        let is_server = matches!(words.next(), Some("TCP" | "UDP"))
            && words.next().is_some_and(|address| address.ends_with(&port));
        let has_backend = lines
            .peek()
            .is_some_and(|next| next.trim_start().starts_with("->"));
        served += usize::from(is_server && has_backend);
    }
    served
}

/// What tells that traffic goes through a node's virtual servers.
pub fn witnesses(node: &Host) -> [Witness; 2] {
    let reader = |field: fn(Totals) -> u64| {
        let node = node.clone();
        move || totals(&node).map(field)
    };
    [
        Witness::new(
            "IPVS connections",
            Counts::Flows,
            reader(|all| all.connections),
        ),
        Witness::new("IPVS packets", Counts::Requests, reader(|all| all.packets)),
    ]
}

/// What went through all virtual servers so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    connections: u64,
    /// From clients.
    packets: u64,
}

fn totals(node: &Host) -> Result<Totals> {
    let text = node.run("cat", &["/proc/thread-self/net/ip_vs_stats_percpu"])?;
    parse(&text).with_context(|| format!("{text} has no counters"))
}

/// Sums the processors' lines up: those are read when they are asked for, while the total below them, and
/// `ip_vs_stats`, are only brought up to date every two seconds (net/netfilter/ipvs/ip_vs_est.c).
fn parse(table: &str) -> Option<Totals> {
    let mut all = Totals::default();
    let mut processors = 0;
    // Two lines of heads, a line for each processor, the total; all numbers are hexadecimal.
    for line in table.lines().skip(2) {
        let mut words = line.split_whitespace();
        if words.next()? == "~" {
            break;
        }
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        all.connections += number()?;
        all.packets += number()?;
        processors += 1;
    }
    (processors > 0).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_count_once_they_have_a_backend() {
        let list = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> AC1F00C9:192B      Masq    1      0          0
TCP  0A600100:0050 rr
  -> 0AF40102:1F90      Masq    1      3          12
UDP  0A600100:0050 rr
TCP  0A600101:0050 rr
  -> 0AF40102:1F90      Masq    1      0          0
";
        assert_eq!(served(list), 2);
        assert_eq!(served(""), 0);
    }

    #[test]
    fn counters_are_summed_over_processors() {
        let table = "       Total Incoming Outgoing         Incoming         Outgoing\n\
                     CPU    Conns  Packets  Packets            Bytes            Bytes\n  \
                     0       1A       30       20              1F0              18D\n  \
                     1        1       0F        0                0                0\n  \
                     ~        7        7        7                7                7\n\n     \
                     Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s\n        \
                     0        0        0                0                0\n";
        let expected = Totals {
            connections: 27,
            packets: 63,
        };
        assert_eq!(parse(table), Some(expected));
        assert_eq!(parse("CPU\n"), None);
    }
}
