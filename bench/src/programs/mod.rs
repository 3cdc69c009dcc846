//! What the programs that meet packets cost by themselves: one run a packet (BPF_PROG_TEST_RUN), each
//! packet of another flow, over the maps that a real agent has filled. Once with a thousand flows, which caches
//! hold, and once with more than they hold, all of them known.
//!
//! Every run is also a call of the kernel's, whose clock is read before and after the program. What an empty
//! program takes for the same frames is what measuring takes, and is subtracted.

mod crowd;
mod frames;
mod loaded;

use std::{
    collections::BTreeMap,
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use aya::maps::HashMap;
use nix::sched::{CloneFlags, setns};
use penstock_common::{XdpUplink, limits};
use penstock_testbed::{Agent, Node, Pod, Service, Slice, Source, Testbed, eventually, list};
use serde_json::{Value, json};

use crowd::Crowd;
use frames::{answer, frame};
use loaded::{Programs, Run};

use crate::{
    figures::{self, Median},
    load,
    turns::Effort,
};

/// Packets of each kind that a program gets in a round.
const PACKETS: usize = 1_000;
/// Verdicts of TC (uapi/linux/pkt_cls.h) and of XDP (uapi/linux/bpf.h).
const NEXT: i32 = -1;
const REDIRECT: i32 = 7;
const XDP_REDIRECT: i32 = 4;
/// TCP's flags (RFC 9293, 3.1).
const SYN: u8 = 2;
const ACK: u8 = 0x10;
/// The processor that runs them.
const PROCESSOR: usize = 1;
/// By which frames of test runs come in, and its Ethernet address.
const LOOPBACK: (u32, [u8; 6]) = (1, [0; 6]);

/// A program, and who asks it for what.
#[derive(Clone, Copy)]
struct Subject {
    request: &'static str,
    /// The program that meets the replies.
    reply: &'static str,
    /// What it answers where it did its work.
    verdict: i32,
    clients: (Ipv4Addr, Ipv6Addr),
    service: (Ipv4Addr, Ipv6Addr),
    /// In a port's place.
    port: u16,
    /// Where many clients are, if it meets them: the second octet of 198.18.0.0/15, in which those of IPv4 are, and
    /// the third group of 2001:2::/47 (RFC 2544, appendix C.2.2; RFC 5180, 8).
    crowd: Option<u8>,
}

impl Subject {
    /// A pod of another node that pods dial by its own address, where the programs are those of pods' interfaces.
    fn peer(&self, is_v4: bool) -> Option<IpAddr> {
        let peer = || {
            if is_v4 {
                Ipv4Addr::new(10, 244, 200, 9).into()
            } else {
                Ipv6Addr::new(0xfd00, 0x10, 0x244, 200, 0, 0, 0, 9).into()
            }
        };
        (self.request == "from_pod").then(peer)
    }
}

/// What a program got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Empty,
    Nothing,
    Passed,
    First,
    Known,
    Reply,
    ManyEmpty,
    ManyLooked,
    ManyKnown,
    ManyReply,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "an empty program instead",
            Self::Nothing => "not IP",
            Self::Passed => "a packet of pods that dial each other",
            Self::First => "a flow's first packet",
            Self::Known => "a known flow's packet",
            Self::Reply => "a reply",
            Self::ManyEmpty => "an empty program instead, of many flows",
            Self::ManyLooked => "an array's element looked at instead, of many",
            Self::ManyKnown => "a known flow's packet, of many flows",
            Self::ManyReply => "a reply, of many flows",
        }
    }

    /// What an empty program got alike.
    const fn empty(self) -> Self {
        match self {
            Self::ManyEmpty | Self::ManyLooked | Self::ManyKnown | Self::ManyReply => {
                Self::ManyEmpty
            }
            _ => Self::Empty,
        }
    }
}

/// One program's medians over all rounds.
struct Line {
    program: &'static str,
    kind: Kind,
    is_v4: bool,
    nanos: Vec<f64>,
}

/// All that came out.
struct Measured {
    lines: Vec<Line>,
    /// How many flows many are.
    crowds: Vec<Value>,
    /// By how much times differ most often from the next longer ones, in nanoseconds.
    step: Option<u64>,
}

/// Measures, also with so many flows at once; prints nanoseconds a packet as they are and less what measuring
/// takes.
pub fn measure(effort: &Effort, flows: usize) -> Result<Value> {
    let mut testbed = Testbed::new()?;
    let nodes = [testbed.node()?, testbed.node()?];
    let [node, other] = &nodes;
    let (here, there) = (testbed.pod(node)?, testbed.pod(other)?);
    node.knows(&[node, other])?;
    let service = Service::new("web", 10)
        .port("tcp", 80, "TCP")
        .balanced(30_080, &[]);
    let mut items = vec![service.json()];
    items.extend(Slice::both("web", 8080, &[&there]));
    items.extend(crowd::service(&there));
    node.manifest("web.json", &list(&items))?;
    // Two programs know as many of each family, and each round brings others.
    let most = (2 * flows + limits::FLOWS as usize).to_string();
    let options = ["--log-level", "info", "--conntrack-min", &most];
    let mut agent = Agent::start(node, &Source::Manifests, &options)?;
    eventually("the agent has hooks on the node's interface", || {
        let log = agent.log();
        ensure!(log.contains("hooks are on interface eth0"), "{log}");
        Ok(())
    })?;
    eventually("the agent has said which records are free", || {
        // It counts flows once that is done. Without, programs take records of flows that nobody answered.
        let status = agent.status()?;
        let tables = status.get("tables").and_then(Value::as_array);
        let mut tables = tables.into_iter().flatten();
        let is_counted = tables.any(|table| table.get("table") == Some(&json!("IPv6 flows")));
        ensure!(is_counted, "{status}");
        Ok(())
    })?;
    // The kernel goes on without, and nobody else is at work.
    agent.kill();
    let measured = thread::scope(|scope| {
        let run = || -> Result<Measured> {
            load::stay_on(PROCESSOR)?;
            let namespace = File::open(format!("/run/netns/{}", node.host.name));
            setns(
                namespace.context("the node's namespace")?,
                CloneFlags::CLONE_NEWNET,
            )?;
            rounds(node, other, &here, (effort.rounds, flows))
        };
        scope.spawn(run).join()
    });
    let measured = measured.map_err(|_| anyhow!("measuring panicked"))??;
    let mut told = tell(&measured.lines);
    if let Some(told) = told.as_object_mut() {
        let command = effort
            .of(format!("programs --flows {flows}"))
            .to_repeat(None);
        told.insert("command".to_owned(), command.into());
        told.insert("many".to_owned(), measured.crowds.into());
        told.insert("clock_step_nanos".to_owned(), measured.step.into());
    }
    Ok(told)
}

fn rounds(
    node: &Node,
    other: &Node,
    here: &Pod,
    (rounds, flows): (usize, usize),
) -> Result<Measured> {
    let mut programs = Programs::load(node, flows)?;
    lay_out(&mut programs, node, other)?;
    let (v4, v6) = families(here.host.ip4, here.host.ip6)?;
    let (node4, node6) = families(node.host.ip4, node.host.ip6)?;
    let client = |last: u8| {
        (
            Ipv4Addr::new(172, 31, 0, last),
            Ipv6Addr::new(0xfd00, 0x31, 0, 0, 0, 0, 0, last.into()),
        )
    };
    let subjects = [
        Subject {
            request: "from_pod",
            reply: "to_pod",
            verdict: NEXT,
            clients: (v4, v6),
            service: (
                Ipv4Addr::new(10, 96, 0, 10),
                "fd00:96::a".parse().context("an address")?,
            ),
            port: 80,
            crowd: None,
        },
        Subject {
            request: "from_uplink",
            reply: "from_uplink",
            verdict: REDIRECT,
            clients: client(201),
            service: (node4, node6),
            port: 30_080,
            crowd: Some(0),
        },
        Subject {
            request: "xdp_uplink",
            reply: "xdp_uplink",
            verdict: XDP_REDIRECT,
            clients: client(202),
            service: (node4, node6),
            port: 30_080,
            crowd: Some(1),
        },
    ];
    let mut lines: Vec<Line> = Vec::new();
    let mut steps = BTreeMap::new();
    let mut note = |is_v4: bool, turn: Turn| {
        for (program, kind, times) in turn {
            count_steps(&times, &mut steps);
            let nanos = figures::percentile(&times, 50) as f64;
            let known = lines
                .iter_mut()
                .find(|line| line.program == program && line.kind == kind && line.is_v4 == is_v4);
            match known {
                Some(line) => line.nanos.push(nanos),
                None => lines.push(Line {
                    program,
                    kind,
                    is_v4,
                    nanos: vec![nanos],
                }),
            }
        }
    };
    for round in 0..rounds {
        let mut order: Vec<&Subject> = subjects.iter().collect();
        order.rotate_left(round % subjects.len());
        for subject in order {
            for is_v4 in [true, false] {
                note(is_v4, turn(&mut programs, subject, is_v4, round)?);
            }
        }
    }
    let mut crowds = Vec::new();
    for subject in subjects.iter().filter(|subject| subject.crowd.is_some()) {
        for is_v4 in [true, false] {
            crowds.push(Crowd::gather(&mut programs, subject, is_v4, flows)?);
        }
    }
    for round in 0..rounds {
        let mut order: Vec<&Crowd> = crowds.iter().collect();
        order.rotate_left(round % crowds.len());
        for crowd in order {
            note(crowd.is_v4, crowd.turn(&mut programs)?);
        }
    }
    lines.sort_by_key(|line| (!line.is_v4, line.program));
    let counts = crowds.iter().map(|crowd| {
        let family = family(crowd.is_v4);
        json!({ "program": crowd.program, "family": family, "flows": crowd.known.len() })
    });
    Ok(Measured {
        lines,
        crowds: counts.collect(),
        step: usual_step(&steps),
    })
}

/// Counts by how much times differ from the next longer ones. What is within this many nanoseconds of another is the
/// same time: a clock's ticks are rounded to whole ones as it is read before and after.
const ROUNDING: u64 = 2;

fn count_steps(times: &[u64], steps: &mut BTreeMap<u64, usize>) {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let mut last: Option<u64> = None;
    for time in sorted {
        match last {
            Some(before) if time <= before + ROUNDING => {}
            before => {
                let step = before.map(|before| time - before);
                step.into_iter()
                    .for_each(|step| *steps.entry(step).or_default() += 1);
                last = Some(time);
            }
        }
    }
}

/// The difference that is there most often: the clock's step, if that is more than rounding.
fn usual_step(steps: &BTreeMap<u64, usize>) -> Option<u64> {
    let most = steps.values().max()?;
    steps
        .iter()
        .find(|(_, count)| *count == most)
        .map(|(step, _)| *step)
}

const fn family(is_v4: bool) -> &'static str {
    if is_v4 { "IPv4" } else { "IPv6" }
}

/// A program's times for one kind of packet, each.
type Turn = Vec<(&'static str, Kind, Times)>;

/// The times of those packets that went the way that is measured, which have to be most.
fn worked(
    program: &'static str,
    kind: Kind,
    verdict: i32,
    runs: &[Run],
) -> Result<(&'static str, Kind, Times)> {
    let packets = runs.len();
    let worked = runs
        .iter()
        .filter(|run| run.verdict == verdict && run.is_changed);
    let times: Times = worked.map(|run| run.nanos).collect();
    check(program, kind, (times.len(), packets))?;
    Ok((program, kind, times))
}

type Times = Vec<u64>;

/// A program's turn: times of each kind of packet.
fn turn(programs: &mut Programs, subject: &Subject, is_v4: bool, round: usize) -> Result<Turn> {
    let first_port = 1_024 + round * PACKETS;
    ensure!(
        first_port + PACKETS <= usize::from(u16::MAX),
        "too many rounds"
    );
    let (client, service) = if is_v4 {
        (subject.clients.0.into(), subject.service.0.into())
    } else {
        (subject.clients.1.into(), subject.service.1.into())
    };
    let request = |index: usize, flags| {
        let port = (first_port + index) as u16;
        frame((client, port), (service, subject.port), flags)
    };
    let nothing: Vec<_> = (0..PACKETS)
        .map(|index| {
            let mut frame = request(index, SYN);
            if let Some(ethertype) = frame.get_mut(12..14) {
                ethertype.copy_from_slice(&[0x88, 0xb5]);
            }
            frame
        })
        .collect();
    let mut done = Vec::new();
    let mut names = vec![subject.request];
    if subject.reply != subject.request {
        names.push(subject.reply);
    }
    for name in names {
        let times = |runs: Vec<Run>| runs.iter().map(|run| run.nanos).collect();
        let empty = programs.run_empty(name, &nothing)?;
        done.push((name, Kind::Empty, times(empty)));
        let runs = programs.run_all(name, &nothing)?;
        done.push((name, Kind::Nothing, times(runs)));
    }

    if let Some(peer) = subject.peer(is_v4) {
        let ends = |index: usize| ((client, (first_port + index) as u16), (peer, 8080));
        let there = (0..PACKETS)
            .map(ends)
            .map(|(pod, peer)| frame(pod, peer, ACK));
        let back = (0..PACKETS)
            .map(ends)
            .map(|(pod, peer)| frame(peer, pod, ACK));
        for (name, frames) in [
            (subject.request, there.collect::<Vec<_>>()),
            (subject.reply, back.collect()),
        ] {
            let runs = programs.run_all(name, &frames)?;
            let passed = runs
                .iter()
                .filter(|run| run.verdict == NEXT && !run.is_changed);
            let times: Times = passed.map(|run| run.nanos).collect();
            check(name, Kind::Passed, (times.len(), PACKETS))?;
            done.push((name, Kind::Passed, times));
        }
    }

    let first: Vec<_> = (0..PACKETS).map(|index| request(index, SYN)).collect();
    // XDP leaves some to TC, as it should; what follows is about the others.
    let mut times = Vec::new();
    let (mut known, mut replies) = (Vec::new(), Vec::new());
    let translated = programs.translate(subject, &first)?;
    for (index, run, frame) in translated {
        times.push(run.nanos);
        known.push(request(index, ACK));
        replies.push(answer(&frame, is_v4).context("a translated packet")?);
    }
    check(subject.request, Kind::First, (times.len(), PACKETS))?;
    done.push((subject.request, Kind::First, times));
    for (name, kind, frames) in [
        (subject.request, Kind::Known, &known),
        (subject.reply, Kind::Reply, &replies),
    ] {
        // What the first of a flow and direction finds out, the others need not ask.
        programs.run_all(name, frames)?;
        let runs = programs.run_all(name, frames)?;
        done.push(worked(name, kind, subject.verdict, &runs)?);
    }
    Ok(done)
}

/// Most packets have to have gone the way that is measured.
fn check(program: &str, kind: Kind, (worked, packets): (usize, usize)) -> Result<()> {
    ensure!(
        worked > packets * 8 / 10,
        "{program} did its work on {worked} of {packets} packets only ({})",
        kind.name()
    );
    Ok(())
}

/// Says what came out.
fn tell(lines: &[Line]) -> Value {
    let mut all = Vec::new();
    println!("programs, nanoseconds a packet; less what measuring takes:");
    for line in lines {
        let empty = lines.iter().find(|other| {
            (other.program, other.is_v4, other.kind)
                == (line.program, line.is_v4, line.kind.empty())
        });
        let empty = empty.map_or(&[][..], |line| &line.nanos);
        let less: Vec<f64> = line
            .nanos
            .iter()
            .zip(empty)
            .map(|(nanos, empty)| nanos - empty)
            .collect();
        let (whole, less) = (Median::of(&line.nanos), Median::of(&less));
        let family = family(line.is_v4);
        println!(
            "  {:12} {family} {:40} {:>6.0} ({:.0} to {:.0}); {:>6.0} ({:.0} to {:.0})",
            line.program,
            line.kind.name(),
            whole.value,
            whole.low,
            whole.high,
            less.value,
            less.low,
            less.high
        );
        all.push(json!({
            "program": line.program, "family": family, "packet": line.kind.name(),
            "nanos": whole, "less": less, "rounds": line.nanos,
        }));
    }
    json!({ "packets": PACKETS, "programs": all })
}

/// Neighbours that the kernel knows, and that test runs' interface is one with XDP.
fn lay_out(programs: &mut Programs, node: &Node, other: &Node) -> Result<()> {
    let mut neighbours = vec![other.host.ip4.to_string(), other.host.ip6.to_string()];
    for last in [201, 202] {
        neighbours.push(format!("172.31.0.{last}"));
        neighbours.push(format!("fd00:31::{last:x}"));
    }
    for ip in &neighbours {
        let to = ["neigh", "replace", ip, "lladdr", "02:00:00:00:00:65"];
        let at = ["dev", "eth0", "nud", "permanent"];
        node.host.run("ip", &[&to[..], &at].concat())?;
    }
    for (net, via) in [
        ("198.18.0.0/15", "172.31.0.201"),
        ("2001:2::/47", "fd00:31::c9"),
    ] {
        node.host.run("ip", &["route", "add", net, "via", via])?;
    }
    let links = node.host.run("ip", &["-j", "link", "show", "eth0"])?;
    let links: Value = serde_json::from_str(&links).context("ip's JSON")?;
    let index = links.get(0).and_then(|link| link.get("ifindex"));
    let index = index.and_then(Value::as_u64).context("eth0's index")?;
    let map = programs
        .ours
        .map_mut("XDP_UPLINKS")
        .context("XDP_UPLINKS")?;
    let mut uplinks: HashMap<_, u32, XdpUplink> = HashMap::try_from(map)?;
    let (loopback, mac) = LOOPBACK;
    for index in [loopback, index as u32] {
        uplinks.insert(index, XdpUplink { mac, pad: 0 }, 0)?;
    }
    Ok(())
}

fn families(v4: IpAddr, v6: IpAddr) -> Result<(Ipv4Addr, Ipv6Addr)> {
    match (v4, v6) {
        (IpAddr::V4(v4), IpAddr::V6(v6)) => Ok((v4, v6)),
        both => Err(anyhow!("{both:?} is not one of each family")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clocks_step_is_seen_through_its_rounding() {
        let step = |times: &[u64]| {
            let mut steps = BTreeMap::new();
            count_steps(times, &mut steps);
            usual_step(&steps)
        };
        // Ticks of ten nanoseconds, read with one more or less.
        assert_eq!(
            step(&[141, 120, 119, 130, 121, 129, 160, 140, 150]),
            Some(10)
        );
        let fine: Vec<u64> = (100..180).collect();
        assert_eq!(step(&fine), Some(ROUNDING + 1));
        assert_eq!(step(&[80, 80, 81]), None);
    }
}
