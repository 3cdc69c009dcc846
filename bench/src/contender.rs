//! Who is compared: a client, a server, and a way between them that can be told from others.

use std::{net::SocketAddr, ops::RangeInclusive, rc::Rc};

use anyhow::{Context, Result};
use penstock_testbed::{Agent, Host, Process};
use serde::{Deserialize, Serialize};

use crate::{
    load::{IPERF_PORT, Sent, Summary, Workload},
    turns::{Effort, Processors, Trial},
};

/// The processor of clients that don't share the servers'.
const CLIENT: &str = "0";
/// The processor of all servers.
const SERVER: &str = "1";
/// Where servers serve.
pub const PORT: u16 = 8080;
/// The longest packet that leaves a socket, in octets: what segmentation offload makes at most.
const LARGEST: u64 = 65_536;
/// The longest where nothing is offloaded: what [`crate::pods`]' MTU leaves beside the headers of IPv4 and TCP.
const FRAME: u64 = 1_390;
/// A receiver acknowledges no less often than this, in octets: every other segment, and those of segmentation
/// offload are 64 KiB; with room for what is read at once.
const UNACKNOWLEDGED: u64 = 1 << 20;
/// Packets of a TCP connection that carries one request, each way, at least: SYN, ACK, request and FIN; SYN, answer,
/// FIN and the FIN's ACK. Acknowledgements of their own may come with the others.
const OF_CONNECTION: u64 = 4;
/// And at most: with those of their own.
const OF_CONNECTION_AT_MOST: u64 = 6;
/// Of a hundred that have to come by, so many have to be counted at least; one in as many as are left may be lost, or
/// be the kernel's to see.
const OF_HUNDRED: u64 = 95;
/// Packets that are nobody's traffic: a neighbour or a multicast group is asked for now and then.
const STRAYS: u64 = 64;

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// Each connection, or each datagram of a socket that is not connected.
    Connections,
    /// Each socket as a rule: what a connection tracker takes for new.
    Flows,
    /// Each packet from client to server.
    Requests,
    /// Each packet from server to client.
    Replies,
    /// Both.
    BothWays,
    /// Each packet from client to server, and none of those that come back.
    OneWay,
    /// What hardly happens on this way: strays.
    Strays,
    /// What never happens on this way.
    Never,
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

    /// What it counts.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// The packets that an interface of a host sends.
    pub fn interface(host: &Host, interface: &str, counts: Counts) -> Self {
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
    /// By how much it had to grow at most, where it had to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<u64>,
}

/// One of those that are compared.
pub struct Contender {
    /// Its name in tables.
    pub name: String,
    client: Host,
    target: SocketAddr,
    witnesses: Vec<Witness>,
    /// The longest packet on its way.
    largest: u64,
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
        let what = &witness.what;
        let range = expected.range(witness.counts);
        let (least, most) = (*range.start(), *range.end());
        let at_most = (most < u64::MAX).then_some(most);
        let bounds = at_most.map_or_else(
            || format!("{least} at least"),
            |most| format!("{least} to {most}"),
        );
        anyhow::ensure!(
            range.contains(&grew),
            "{what} grew by {grew}, not by {bounds}: the traffic took another way"
        );
        all.push(Evidence {
            what: what.clone(),
            grew,
            at_least: least,
            at_most,
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
            largest: LARGEST,
            _server: server.clone(),
        }
    }

    /// The same, whose packets are no longer than frames: no segmentation is offloaded on its way.
    #[must_use]
    pub const fn in_frames(mut self) -> Self {
        self.largest = FRAME;
        self
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
        let expected = Expected::of(workload, turns, self.largest);
        testimony(&self.witnesses, before, &expected).with_context(|| self.name.clone())
    }

    /// Whether there is an answer at all.
    pub fn answers(&self) -> Result<()> {
        let effort = Effort {
            rounds: 1,
            turn_ms: 1,
            warm_up_ms: 0,
            only: Vec::new(),
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

/// What so much traffic makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Connections, and datagrams of sockets that are not connected.
    pub connections: u64,
    /// Connections, and where a turn has one socket half of these: one may get the port of another that a tracker
    /// still knows (IPVS connections that are over for two minutes), and is no new flow then.
    pub flows: u64,
    /// Packets from client to server, at least.
    pub requests: u64,
    /// The same, at most.
    pub most_requests: u64,
    /// Packets from server to client, at least.
    pub replies: u64,
}

impl Expected {
    /// What these turns have sent, what came before they were measured included. Of streams no packet on their way
    /// is longer than `largest`.
    fn of(workload: Workload, turns: &[Summary], largest: u64) -> Self {
        let sum = |number: fn(&Sent) -> u64| turns.iter().map(|turn| number(&turn.sent)).sum();
        let (connections, requests): (u64, u64) =
            (sum(|sent| sent.connections), sum(|sent| sent.requests));
        let (answers, octets): (u64, u64) = (sum(|sent| sent.answers), sum(|sent| sent.octets));
        let sockets = (turns.len() as u64).div_ceil(2);
        let messages = Self {
            connections,
            flows: connections,
            requests,
            most_requests: requests,
            replies: answers,
        };
        match workload {
            Workload::Connect | Workload::Wrk => Self {
                requests: OF_CONNECTION * connections,
                most_requests: OF_CONNECTION_AT_MOST * connections,
                replies: OF_CONNECTION * connections,
                ..messages
            },
            Workload::UdpSendto => Self {
                connections: requests,
                flows: sockets,
                ..messages
            },
            Workload::TcpRr | Workload::WrkKept => Self {
                flows: sockets,
                most_requests: requests + OF_CONNECTION_AT_MOST * connections,
                ..messages
            },
            Workload::UdpRr | Workload::UdpPackets => Self {
                flows: sockets,
                ..messages
            },
            Workload::Stream | Workload::Iperf => Self {
                flows: sockets,
                requests: octets / largest,
                most_requests: u64::MAX,
                replies: octets / UNACKNOWLEDGED,
                ..messages
            },
        }
    }

    /// By how much a counter of this kind has to grow.
    fn range(&self, counts: Counts) -> RangeInclusive<u64> {
        let most_of = |all: u64| all / 100 * OF_HUNDRED + all % 100 * OF_HUNDRED / 100;
        match counts {
            Counts::Connections => most_of(self.connections)..=u64::MAX,
            Counts::Flows => most_of(self.flows)..=u64::MAX,
            Counts::Requests => most_of(self.requests)..=u64::MAX,
            Counts::Replies => most_of(self.replies)..=u64::MAX,
            Counts::BothWays => most_of(self.requests + self.replies)..=u64::MAX,
            Counts::OneWay => {
                let most = self.most_requests.saturating_add(self.most_requests / 100);
                most_of(self.requests)..=most.saturating_add(STRAYS)
            }
            Counts::Strays => 0..=STRAYS,
            Counts::Never => 0..=0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What clients of seven turns say who have sent so much each.
    fn turns(sent: Sent) -> Vec<Summary> {
        vec![Summary::default().with(sent); 7]
    }

    fn expected(workload: Workload) -> Expected {
        let sent = match workload {
            Workload::Connect | Workload::Wrk => (100, 100, 100, 0),
            Workload::TcpRr | Workload::UdpRr | Workload::UdpSendto => (1, 1_000, 1_000, 0),
            Workload::WrkKept => (9, 1_000, 1_000, 0),
            Workload::UdpPackets => (1, 3_200, 100, 0),
            Workload::Stream | Workload::Iperf => (2, 0, 0, 600_000_000),
        };
        let (connections, requests, answers, octets) = sent;
        let turns = turns(Sent {
            connections,
            requests,
            answers,
            octets,
        });
        Expected::of(workload, &turns, LARGEST)
    }

    /// Whether a counter may have grown by so much.
    fn may(workload: Workload, counts: Counts, grew: u64) -> bool {
        expected(workload).range(counts).contains(&grew)
    }

    #[test]
    fn a_socket_with_an_earlier_ones_port_is_no_new_flow() {
        use Workload::{Connect, Iperf, Stream, TcpRr, UdpPackets, UdpRr, UdpSendto, WrkKept};
        let flows = |workload| expected(workload).flows;
        assert_eq!(flows(Connect), 700);
        for workload in [TcpRr, WrkKept, Stream, Iperf, UdpRr, UdpSendto, UdpPackets] {
            assert_eq!(flows(workload), 4);
        }
        // No flow at all is another way, whatever is sent.
        let one = Expected::of(Workload::UdpRr, &turns(Sent::default())[..1], LARGEST);
        assert_eq!(one.flows, 1);
    }

    #[test]
    fn a_connection_has_more_packets_than_one() {
        use Workload::{Connect, Wrk};
        for workload in [Connect, Wrk] {
            // 700 connections: one packet of each is not enough, nor is half of them on this way.
            assert!(!may(workload, Counts::Requests, 700));
            assert!(!may(workload, Counts::Requests, 5 * 350));
            assert!(may(workload, Counts::Requests, 5 * 700));
            assert!(!may(workload, Counts::Replies, 700));
            assert!(!may(workload, Counts::Connections, 650));
            assert!(!may(workload, Counts::Flows, 650));
            assert!(may(workload, Counts::Flows, 700));
        }
    }

    #[test]
    fn requests_alone_are_no_traffic_both_ways_nor_replies_alone() {
        use Workload::{Connect, TcpRr, UdpRr, UdpSendto, WrkKept};
        for (workload, each_way) in [
            (Connect, 3_500),
            (TcpRr, 7_000),
            (WrkKept, 7_000),
            (UdpRr, 7_000),
            (UdpSendto, 7_000),
        ] {
            assert!(!may(workload, Counts::BothWays, each_way), "{workload:?}");
            assert!(may(workload, Counts::BothWays, 2 * each_way));
            // And what goes one way only is seen not to come back.
            assert!(may(workload, Counts::OneWay, each_way), "{workload:?}");
            assert!(!may(workload, Counts::OneWay, 2 * each_way));
            assert!(!may(workload, Counts::OneWay, each_way / 2));
        }
    }

    #[test]
    fn nine_of_ten_are_not_all() {
        for workload in [Workload::TcpRr, Workload::UdpRr, Workload::UdpSendto] {
            for counts in [Counts::Requests, Counts::Replies] {
                assert!(!may(workload, counts, 6_300), "{workload:?}");
                assert!(may(workload, counts, 6_990), "{workload:?}");
            }
        }
        assert!(!may(Workload::UdpSendto, Counts::Connections, 6_300));
        assert!(!may(Workload::UdpPackets, Counts::Requests, 20_000));
        assert!(!may(Workload::UdpPackets, Counts::Replies, 600));
        assert!(may(Workload::UdpPackets, Counts::Replies, 700));
    }

    #[test]
    fn a_stream_without_offload_has_a_packet_for_each_frame() {
        for workload in [Workload::Stream, Workload::Iperf] {
            let sent = turns(Sent {
                connections: 2,
                octets: 600_000_000,
                ..Sent::default()
            });
            let [offloaded, whole] = [LARGEST, FRAME].map(|largest| {
                let expected = Expected::of(workload, &sent, largest);
                move |counts, grew| expected.range(counts).contains(&grew)
            });
            // 4.2 GB: as many packets as segmentation offload makes, and as many frames.
            assert!(offloaded(Counts::Requests, 65_000) && !offloaded(Counts::Requests, 32_000));
            assert!(!whole(Counts::Requests, 65_000) && whole(Counts::Requests, 3_100_000));
            assert!(!whole(Counts::BothWays, 65_000) && whole(Counts::BothWays, 3_100_000));
            assert!(!offloaded(Counts::Replies, 700) && offloaded(Counts::Replies, 24_000));
        }
    }

    #[test]
    fn what_must_stay_must_stay() {
        for workload in [Workload::Connect, Workload::TcpRr, Workload::Stream] {
            assert!(may(workload, Counts::Never, 0) && !may(workload, Counts::Never, 1));
            assert!(may(workload, Counts::Strays, 9) && !may(workload, Counts::Strays, 700));
        }
    }

    #[test]
    fn a_counter_that_says_too_little_fails_the_trial() {
        let witness = |counts, says| [Witness::new("packets", counts, move || Ok(says))];
        let expected = expected(Workload::TcpRr);
        let found = testimony(&witness(Counts::Requests, 17_000), &[10_000], &expected).unwrap();
        assert_eq!((found[0].grew, found[0].at_most), (7_000, None));
        let error = testimony(&witness(Counts::Requests, 13_000), &[10_000], &expected);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("grew by 3000, not by 6650 at least"),
            "{error}"
        );
        let error = testimony(&witness(Counts::Never, 10_001), &[10_000], &expected);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("grew by 1, not by 0 to 0"), "{error}");
    }

    #[test]
    fn sent_packets_are_in_the_tenth_column() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n    \
                     lo:  1 2 3 4 5 6 7 8 9 10 11\nveth12: 1 2 0 0 0 0 0 0 900 77 0 0\n";
        assert_eq!(sent(table, "veth12"), Some(77));
        assert_eq!(sent(table, "veth1"), None);
    }
}
