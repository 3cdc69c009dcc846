//! Who is compared: a client, a server, and a way between them that can be told from others.

use std::{net::SocketAddr, rc::Rc};

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Host, Process};
use serde::{Deserialize, Serialize};

use crate::{
    load::{IPERF_PORT, Summary, Workload},
    turns::{Effort, Processors, Trial},
};

/// The processor of clients that don't share the servers'.
const CLIENT: &str = "0";
/// The processor of all servers.
const SERVER: &str = "1";
/// Where servers serve.
pub const PORT: u16 = 8080;
/// The longest packet that leaves a socket, in octets: what segmentation offload makes at most.
const LARGEST: f64 = 65_536.0;

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// Each connection, or each datagram of a socket that is not connected.
    Connections,
    /// Each connection, or each UDP socket as a rule: what a connection tracker takes for new.
    Flows,
    /// Each packet from client to server.
    Packets,
    /// Nine of ten packets from client to server, or more.
    MostPackets,
    /// Each answer of the server's, or one for a connection that only takes.
    Answers,
    /// What hardly happens on this way.
    Nothing,
}

/// A counter that tells whether traffic took the way that it is said to take.
pub struct Witness {
    what: String,
    counts: Counts,
    read: Box<dyn Fn() -> Result<u64>>,
}

impl Witness {
    /// A counter.
    pub fn new(what: &str, counts: Counts, read: impl Fn() -> Result<u64> + 'static) -> Self {
        Self {
            what: what.to_owned(),
            counts,
            read: Box::new(read),
        }
    }

    /// A counter of Penstock's on a node, whose agent stays for as long.
    pub fn agent(agent: &Rc<Agent>, counter: &'static str, counts: Counts) -> Self {
        let agent = agent.clone();
        Self::new(counter, counts, move || agent.count(counter))
    }

    /// The same, said to be somebody's.
    #[must_use]
    pub fn of(mut self, whose: &str) -> Self {
        self.what = format!("{}, {whose}", self.what);
        self
    }

    /// The packets that an interface of a host sent.
    pub fn interface(host: &Host, interface: &str) -> Self {
        Self::interface_counts(host, interface, Counts::Packets)
    }

    /// That an interface of a host sends nothing.
    pub fn unused(host: &Host, interface: &str) -> Self {
        Self::interface_counts(host, interface, Counts::Nothing)
    }

    fn interface_counts(host: &Host, interface: &str, counts: Counts) -> Self {
        let what = format!("packets sent by {interface}");
        let (host, interface) = (host.clone(), interface.to_owned());
        Self::new(&what, counts, move || {
            let text = host.run("cat", &["/proc/thread-self/net/dev"])?;
            sent(&text, &interface).with_context(|| format!("{interface} is not in {text}"))
        })
    }
}

/// The packets that an interface sent, in /proc/net/dev.
fn sent(table: &str, interface: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        (name.trim() == interface).then_some(rest)
    })?;
    // Eight columns of what was received, then octets and packets that were sent.
    line.split_whitespace().nth(9)?.parse().ok()
}

/// What a counter said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// What was counted.
    pub what: String,
    /// By how much it grew.
    pub grew: u64,
    /// By how much it had to grow at least.
    pub at_least: u64,
}

/// One of those that are compared.
pub struct Contender {
    /// Its name in tables.
    pub name: String,
    client: Host,
    target: SocketAddr,
    witnesses: Vec<Witness>,
    _server: Rc<Process>,
}

/// Starts a server.
pub fn serve(host: &Host) -> Result<Rc<Process>> {
    let port = PORT.to_string();
    let server = start(host, &["load", "--cpu", SERVER, "serve", &port])?;
    Ok(Rc::new(server))
}

/// Starts this program again as something that lasts, and says "ready" once it is.
pub fn start(host: &Host, arguments: &[&str]) -> Result<Process> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut process = host.start(program, arguments)?;
    let first = process
        .line()
        .with_context(|| format!("starting {arguments:?}"))?;
    anyhow::ensure!(first == "ready", "{arguments:?} said {first:?}");
    Ok(process)
}

/// Starts this program again as something that measures, on the processor of servers.
pub fn measured(host: &Host, arguments: &[&str]) -> Result<Summary> {
    run(host, SERVER, arguments)
}

/// Starts this program again on a processor; the summary that it prints.
fn run(host: &Host, cpu: &str, arguments: &[&str]) -> Result<Summary> {
    let program = std::env::current_exe().context("finding this program")?;
    let arguments = [&["load", "--cpu", cpu], arguments].concat();
    let mut process = host.start(program, &arguments)?;
    let line = process.line()?;
    serde_json::from_str(&line).with_context(|| format!("{line:?} is no summary"))
}

/// What counters say now.
pub fn read(witnesses: &[Witness]) -> Result<Vec<u64>> {
    let read = |witness: &Witness| (witness.read)().with_context(|| witness.what.clone());
    witnesses.iter().map(read).collect()
}

/// Whether counters say what they should since `before`.
pub fn testimony(
    witnesses: &[Witness],
    before: &[u64],
    expected: &Expected,
) -> Result<Vec<Evidence>> {
    let after = read(witnesses)?;
    let mut all = Vec::new();
    for ((witness, before), after) in witnesses.iter().zip(before).zip(&after) {
        let grew = after
            .checked_sub(*before)
            .with_context(|| format!("{} went back from {before} to {after}", witness.what))?;
        let range = match witness.counts {
            Counts::Connections => expected.connections..=u64::MAX,
            Counts::Flows => expected.flows..=u64::MAX,
            Counts::Packets => expected.packets..=u64::MAX,
            Counts::MostPackets => expected.packets / 10 * 9..=u64::MAX,
            Counts::Answers => expected.answers..=u64::MAX,
            // A neighbour or a multicast group may be asked for now and then.
            Counts::Nothing => 0..=1 + expected.packets / 100,
        };
        let (what, least, most) = (&witness.what, *range.start(), *range.end());
        anyhow::ensure!(
            range.contains(&grew),
            "{what} grew by {grew}, not by {least} to {most}: the traffic took another way"
        );
        all.push(Evidence {
            what: what.clone(),
            grew,
            at_least: least,
        });
    }
    Ok(all)
}

impl Contender {
    /// A client's way to a target, behind which `server` is.
    pub fn new(
        name: &str,
        client: &Host,
        target: SocketAddr,
        server: &Rc<Process>,
        witnesses: Vec<Witness>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            client: client.clone(),
            target,
            witnesses,
            _server: server.clone(),
        }
    }

    /// Its counters, now.
    pub fn witnesses(&self) -> Result<Vec<u64>> {
        read(&self.witnesses).with_context(|| self.name.clone())
    }

    /// Whether its counters say what they should, after so much traffic.
    pub fn evidence(
        &self,
        before: &[u64],
        workload: Workload,
        turns: &[Summary],
    ) -> Result<Vec<Evidence>> {
        let expected = Expected::of(workload, turns);
        testimony(&self.witnesses, before, &expected).with_context(|| self.name.clone())
    }

    /// Whether there is an answer at all.
    pub fn answers(&self) -> Result<()> {
        let effort = Effort {
            rounds: 1,
            turn_ms: 1,
            warm_up_ms: 0,
            only: None,
            contenders: Vec::new(),
            is_brief: false,
            command: String::new(),
        };
        self.turn(&Trial::closed(Workload::Connect), &effort)
            .map(drop)
    }

    /// Where a workload goes: iperf3 has a server, and services a port, of its own.
    fn target(&self, workload: Workload) -> SocketAddr {
        match workload {
            Workload::Iperf => (self.target.ip(), IPERF_PORT).into(),
            _ => self.target,
        }
    }

    /// One turn.
    pub fn turn(&self, trial: &Trial, effort: &Effort) -> Result<Summary> {
        let target = self.target(trial.workload).to_string();
        let (measured, warm_up) = (effort.turn_ms.to_string(), effort.warm_up_ms.to_string());
        let connections = trial.connections.to_string();
        let cpu = match trial.processors {
            Processors::One => SERVER,
            Processors::Two => CLIENT,
        };
        let mut arguments = vec!["run", trial.workload.argument(), &target];
        arguments.extend(["--for-ms", &measured, "--warm-up-ms", &warm_up]);
        arguments.extend(["--connections", &connections]);
        let rate = trial.rate.map(|rate| rate.to_string());
        if let Some(rate) = &rate {
            arguments.extend(["--rate", rate]);
        }
        run(&self.client, cpu, &arguments)
            .with_context(|| format!("{}: {}", self.name, trial.name()))
    }
}

/// The least that so much traffic makes.
pub struct Expected {
    /// Connections, and datagrams of sockets that are not connected.
    pub connections: u64,
    /// Connections, and half of all UDP sockets: one may get the port of another that a tracker still knows, and
    /// is no new flow then.
    pub flows: u64,
    /// Packets from client to server.
    pub packets: u64,
    /// Packets from server to client.
    pub answers: u64,
}

impl Expected {
    fn of(workload: Workload, turns: &[Summary]) -> Self {
        let count: u64 = turns.iter().map(|turn| turn.count).sum();
        let sockets = (turns.len() as u64).div_ceil(2);
        let octets: f64 = turns
            .iter()
            .map(|turn| turn.bits_per_second * turn.seconds / 8.0)
            .sum();
        match workload {
            Workload::Connect | Workload::Wrk => Self {
                connections: count,
                flows: count,
                packets: count,
                answers: count,
            },
            Workload::UdpSendto => Self {
                connections: count,
                flows: sockets,
                packets: count,
                answers: count,
            },
            Workload::TcpRr => Self {
                connections: turns.len() as u64,
                flows: turns.len() as u64,
                packets: count,
                answers: count,
            },
            Workload::UdpRr => Self {
                connections: turns.len() as u64,
                flows: sockets,
                packets: count,
                answers: count,
            },
            // One of many asks for an answer.
            Workload::UdpPackets => Self {
                connections: turns.len() as u64,
                flows: sockets,
                packets: count,
                answers: turns.len() as u64,
            },
            Workload::Stream | Workload::Iperf => Self {
                connections: count,
                flows: count,
                packets: (octets / LARGEST) as u64,
                answers: count,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_udp_socket_with_an_earlier_ones_port_is_no_new_flow() {
        let turns = vec![
            Summary {
                count: 100,
                ..Summary::default()
            };
            7
        ];
        let flows = |workload| Expected::of(workload, &turns).flows;
        assert_eq!(flows(Workload::TcpRr), 7);
        assert_eq!(flows(Workload::Connect), 700);
        for workload in [Workload::UdpRr, Workload::UdpSendto, Workload::UdpPackets] {
            assert_eq!(flows(workload), 4);
            assert_eq!(Expected::of(workload, &turns).packets, 700);
        }
        // No flow at all is another way, whatever is sent.
        assert_eq!(Expected::of(Workload::UdpRr, &turns[..1]).flows, 1);
    }

    #[test]
    fn sent_packets_are_in_the_tenth_column() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n    \
                     lo:  1 2 3 4 5 6 7 8 9 10 11\nveth12: 1 2 0 0 0 0 0 0 900 77 0 0\n";
        assert_eq!(sent(table, "veth12"), Some(77));
        assert_eq!(sent(table, "veth1"), None);
    }
}
