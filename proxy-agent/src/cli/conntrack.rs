//! `penstock conntrack`: the flows that are translated packet by packet, from the pinned maps.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use anyhow::{Context, Result};
use aya::maps::{Array, Map};
use clap::{Args, ValueEnum};
use ipnetwork::IpNetwork;
use penstock_common::{Addr, Config, Flow, FlowFlags, FlowState, Plain, Proto, V4, V6};
use serde::Serialize;

use super::{
    Look, Output, duration,
    show::{agent, cell, json, pins, size, table},
};
use crate::{
    dataplane::pins::Pins,
    flows::{Lifetimes, Table, is_half_closed, now_secs},
    ipc,
    report::Port,
};

/// Which flows.
#[derive(Debug, Args)]
pub(super) struct ConntrackArgs {
    #[command(flatten)]
    look: Look,
    /// Only of a protocol.
    #[arg(short, long, value_enum)]
    proto: Option<ProtoName>,
    /// Only in a state.
    #[arg(short, long, value_enum)]
    state: Option<State>,
    /// Only IPv4.
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Only IPv6.
    #[arg(short = '6')]
    v6: bool,
    /// Only of clients at an address, an address and port, or in a range.
    #[arg(long, value_name = "ADDRESS")]
    client: Option<Ends>,
    /// Only to a frontend; also address, address and port, or range.
    #[arg(long, value_name = "ADDRESS")]
    frontend: Option<Ends>,
    /// Only to a backend; also address, address and port, or range.
    #[arg(long, value_name = "ADDRESS")]
    backend: Option<Ends>,
    /// Only of a service, whose name the agent has to know.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<String>,
    /// How many there are, by family, protocol and state.
    #[arg(long)]
    count: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProtoName {
    Tcp,
    Udp,
    Sctp,
    Icmp,
}

impl ProtoName {
    fn is(self, proto: Proto) -> bool {
        match self {
            Self::Tcp => proto == Proto::TCP,
            Self::Udp => proto == Proto::UDP,
            Self::Sctp => proto == Proto::SCTP,
            Self::Icmp => matches!(proto, Proto::ICMP | Proto::ICMPV6),
        }
    }
}

/// What became of a flow so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Seen in one direction only.
    Embryonic,
    /// Seen in both directions.
    Established,
    /// One end has sent a FIN.
    HalfClosed,
    /// Both have, or one a RST.
    Closing,
}

impl State {
    fn of<A>(flow: &Flow<A>) -> Self {
        match flow.state {
            FlowState::CLOSING => Self::Closing,
            FlowState::ESTABLISHED if is_half_closed(flow) => Self::HalfClosed,
            FlowState::ESTABLISHED => Self::Established,
            _ => Self::Embryonic,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Embryonic => "embryonic",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
        }
    }
}

/// One end of a flow, or some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// Any port of addresses.
    In(IpNetwork),
    /// One port.
    At(SocketAddr),
}

impl FromStr for Ends {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(at) = text.parse() {
            return Ok(Self::At(at));
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let range = bare.unwrap_or(text).parse().map_err(|_| {
            "write 10.0.0.1, 10.0.0.1:80, fd00::1, [fd00::1]:80 or 10.0.0.0/24".to_owned()
        });
        range.map(Self::In)
    }
}

impl Ends {
    fn has(&self, end: SocketAddr) -> bool {
        match self {
            Self::In(range) => range.contains(end.ip()),
            Self::At(at) => *at == end,
        }
    }
}

/// What went one way.
#[derive(Clone, Copy, Debug, Serialize)]
struct Way {
    packets: u64,
    bytes: u64,
}

/// A flow as it is shown.
#[derive(Clone, Debug, Serialize)]
struct Row {
    family: &'static str,
    protocol: String,
    state: State,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    /// What the backend sees.
    source: SocketAddr,
    flags: Vec<&'static str>,
    /// Seconds since a packet was last seen.
    idle_secs: u32,
    /// Seconds until it is forgotten if none comes.
    left_secs: u32,
    request: Way,
    reply: Way,
    service: Option<String>,
}

/// A flow's flags in words.
fn words(flags: u16) -> Vec<&'static str> {
    [
        (FlowFlags::HAIRPIN, "hairpin"),
        (FlowFlags::MASQUERADE, "masquerade"),
        (FlowFlags::EXTERNAL, "external"),
        (FlowFlags::TUNNEL, "tunnel"),
        (FlowFlags::DSR, "dsr"),
        (FlowFlags::GOES_BACK, "goes-back"),
        (FlowFlags::SUCCESSOR, "successor"),
    ]
    .into_iter()
    .filter_map(|(flag, word)| (flags & flag != 0).then_some(word))
    .collect()
}

impl ConntrackArgs {
    /// Whether a flow is one of those that are asked for.
    fn wants(&self, row: &Row, proto: Proto) -> bool {
        let is_in = |ends: &Option<Ends>, end| ends.is_none_or(|ends| ends.has(end));
        self.proto.is_none_or(|name| name.is(proto))
            && self.state.is_none_or(|state| state == row.state)
            && is_in(&self.client, row.client)
            && is_in(&self.frontend, row.frontend)
            && is_in(&self.backend, row.backend)
            && (self.service.is_none() || self.service == row.service)
    }
}

/// What is the same for all flows of a listing.
struct Listing {
    lifetimes: Lifetimes,
    now: u32,
    names: HashMap<u32, String>,
}

impl Listing {
    fn row<A: Addr>(
        &self,
        family: &'static str,
        flow: &Flow<A>,
        [request, reply]: [Way; 2],
        ip: impl Fn(A) -> IpAddr,
    ) -> Row {
        let idle_secs = self.now.saturating_sub(flow.seen_secs);
        let end = |addr, port: penstock_common::Be16| SocketAddr::new(ip(addr), port.to_host());
        let is_service = flow.backend_generation != 0;
        let name = self.names.get(&flow.service.0).filter(|_| is_service);
        Row {
            family,
            protocol: flow.proto.to_string(),
            state: State::of(flow),
            client: end(flow.client, flow.client_port),
            frontend: end(flow.frontend, flow.frontend_port),
            backend: end(flow.backend, flow.backend_port),
            source: end(flow.source, flow.source_port),
            flags: words(flow.flags),
            idle_secs,
            left_secs: self.lifetimes.of(flow).saturating_sub(idle_secs),
            request,
            reply,
            service: name.cloned(),
        }
    }

    fn family<A: Addr>(
        &self,
        args: &ConntrackArgs,
        name: &'static str,
        table: &Table<A>,
        ip: impl Fn(A) -> IpAddr + Copy,
    ) -> Vec<Row>
    where
        Flow<A>: Plain,
    {
        let found = (0..table.records()).filter_map(|id| {
            let flow = table.flow(id)?;
            let counts = table.counts(id);
            let ways = [counts.request, counts.reply].map(|way| Way {
                packets: way.packets,
                bytes: way.bytes,
            });
            let row = self.row(name, &flow, ways, ip);
            args.wants(&row, flow.proto).then_some(row)
        });
        found.collect()
    }
}

/// For how long flows live where no agent is there to say it.
fn lifetimes(pins: &Pins) -> Result<Lifetimes> {
    let map = Map::Array(pins.map("CONFIG")?);
    let map: Array<_, Config> = Array::try_from(map).context("map CONFIG")?;
    let config = map.get(&0, 0).context("reading map CONFIG")?;
    Ok(Lifetimes::without_agent(&config.timeouts))
}

fn names(ports: Vec<Port>) -> HashMap<u32, String> {
    let named = ports.into_iter();
    named
        .filter_map(|port| Some((port.id, port.service?)))
        .collect()
}

pub(super) async fn run(args: &ConntrackArgs) -> Result<()> {
    let report = agent(&args.look).await?;
    let ports = ipc::ports(&args.look.place.run_dir).await?;
    let pins = pins(&args.look)?;
    let names = ports.map(names);
    if let Some(service) = &args.service {
        let names = names.as_ref().context(
            "no agent answers, and nobody else knows names; ask by --frontend instead of --service",
        )?;
        anyhow::ensure!(
            names.values().any(|name| name == service),
            "there is no service {service} here; `penstock services` shows all"
        );
    }
    let listing = Listing {
        lifetimes: match &report {
            Some(report) => report.lifetimes,
            None => lifetimes(&pins)?,
        },
        names: names.unwrap_or_default(),
        now: now_secs(),
    };
    let mut rows = Vec::new();
    if !args.v6 {
        let flows = Table::<V4>::open(&pins, ["FLOWS4", "FLOW_COUNTS4"])?;
        rows.extend(listing.family(args, "IPv4", &flows, |ip| IpAddr::V4(ip.into())));
    }
    if !args.v4 {
        let flows = Table::<V6>::open(&pins, ["FLOWS6", "FLOW_COUNTS6"])?;
        rows.extend(listing.family(args, "IPv6", &flows, |ip| IpAddr::V6(ip.into())));
    }
    rows.sort_by_key(|row| (row.family, row.client, row.frontend, row.backend));
    if args.count {
        return count(args.look.output, &rows);
    }
    if args.look.output == Output::Json {
        return json(&rows);
    }
    list(&rows);
    Ok(())
}

/// How many of what sort there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Count {
    family: &'static str,
    protocol: String,
    state: State,
    flows: usize,
}

fn counts(rows: &[Row]) -> Vec<Count> {
    let mut counts: BTreeMap<(&str, &str, State), usize> = BTreeMap::new();
    for row in rows {
        *counts
            .entry((row.family, &row.protocol, row.state))
            .or_default() += 1;
    }
    let counts = counts.into_iter();
    counts
        .map(|((family, protocol, state), flows)| Count {
            family: if family == "IPv4" { "IPv4" } else { "IPv6" },
            protocol: protocol.to_owned(),
            state,
            flows,
        })
        .collect()
}

fn count(output: Output, rows: &[Row]) -> Result<()> {
    let counts = counts(rows);
    if output == Output::Json {
        return json(&counts);
    }
    let lines: Vec<Vec<String>> = counts
        .iter()
        .map(|count| {
            vec![
                count.family.to_owned(),
                count.protocol.clone(),
                count.state.word().to_owned(),
                count.flows.to_string(),
            ]
        })
        .collect();
    if !lines.is_empty() {
        table(&["FAMILY", "PROTOCOL", "STATE", "FLOWS"], &lines);
    }
    println!("{}", total(rows.len()));
    Ok(())
}

fn total(flows: usize) -> String {
    match flows {
        0 => "no flows".to_owned(),
        1 => "1 flow".to_owned(),
        more => format!("{more} flows"),
    }
}

fn list(rows: &[Row]) {
    let has_names = rows.iter().any(|row| row.service.is_some());
    let line = |row: &Row| {
        let both = |way: &Way| format!("{}/{}", way.packets, size(way.bytes));
        let mut cells = vec![
            row.protocol.clone(),
            row.state.word().to_owned(),
            row.client.to_string(),
            row.frontend.to_string(),
            row.backend.to_string(),
            shown(&row.source, &row.client),
            duration::show(row.idle_secs),
            duration::show(row.left_secs),
            both(&row.request),
            both(&row.reply),
            cell(Some(&row.flags.join(" "))),
        ];
        if has_names {
            cells.push(cell(row.service.as_deref()));
        }
        cells
    };
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    let mut head = vec![
        "PROTOCOL", "STATE", "CLIENT", "FRONTEND", "BACKEND", "SEEN AS", "IDLE", "LEFT", "SENT",
        "ANSWERED", "FLAGS",
    ];
    if has_names {
        head.push("SERVICE");
    }
    if !lines.is_empty() {
        table(&head, &lines);
    }
    println!("{}", total(rows.len()));
}

/// Whom the backend sees, where that is not the client itself.
fn shown(source: &impl Display, client: &impl Display) -> String {
    let source = source.to_string();
    if source == client.to_string() {
        "itself".to_owned()
    } else {
        source
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use penstock_common::{Be16, Fins, ServiceId};

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: ConntrackArgs,
    }

    fn args(options: &[&str]) -> ConntrackArgs {
        let all = ["conntrack"].iter().chain(options);
        Only::try_parse_from(all).unwrap().args
    }

    fn row(flow: &Flow<V4>) -> Row {
        let listing = Listing {
            lifetimes: Lifetimes::default(),
            now: 1_000,
            names: HashMap::from([(7, "default/web".to_owned())]),
        };
        let none = Way {
            packets: 0,
            bytes: 0,
        };
        listing.row("IPv4", flow, [none; 2], |ip| IpAddr::V4(ip.into()))
    }

    fn flow() -> Flow<V4> {
        let addr = |last| V4::from_octets([10, 0, 0, last]);
        Flow {
            state: FlowState::ESTABLISHED,
            seen_secs: 990,
            service: ServiceId(7),
            backend_generation: 1,
            client: addr(1),
            frontend: addr(2),
            backend: addr(3),
            source: addr(1),
            client_port: Be16::from_host(4_000),
            frontend_port: Be16::from_host(80),
            backend_port: Be16::from_host(8_080),
            source_port: Be16::from_host(4_000),
            proto: Proto::TCP,
            ..Flow::default()
        }
    }

    #[test]
    fn filters_take_what_they_say() {
        let row = row(&flow());
        let wants = |options: &[&str]| args(options).wants(&row, Proto::TCP);
        for options in [
            [].as_slice(),
            &["--proto", "tcp"],
            &["--state", "established"],
            &["--client", "10.0.0.1"],
            &["--client", "10.0.0.1:4000"],
            &["--client", "10.0.0.0/24"],
            &["--frontend", "10.0.0.2:80", "--backend", "10.0.0.3"],
            &["--service", "default/web"],
        ] {
            assert!(wants(options), "{options:?}");
        }
        for options in [
            ["--proto", "udp"],
            ["--state", "half-closed"],
            ["--client", "10.0.0.2"],
            ["--client", "10.0.0.1:4001"],
            ["--client", "10.0.1.0/24"],
            ["--frontend", "10.0.0.1"],
            ["--backend", "10.0.0.3:80"],
            ["--service", "default/other"],
        ] {
            assert!(!wants(&options), "{options:?}");
        }
        for text in ["10.0.0", "10.0.0.1:", "[fd00::1", "web", ""] {
            assert!(text.parse::<Ends>().is_err(), "{text}");
        }
        for text in ["fd00::1", "[fd00::1]", "fd00::1/128"] {
            let end = "[fd00::1]:80".parse().unwrap();
            assert!(text.parse::<Ends>().unwrap().has(end), "{text}");
        }
    }

    #[test]
    fn a_flow_is_shown_with_what_it_has_left() {
        let shown = row(&flow());
        assert_eq!((shown.idle_secs, shown.left_secs), (10, 86_390));
        assert_eq!(shown.service.as_deref(), Some("default/web"));
        let half = row(&Flow {
            fins: Fins::BACKEND,
            ..flow()
        });
        assert_eq!((half.state, half.left_secs), (State::HalfClosed, 3_590));
        let outside = row(&Flow {
            state: FlowState::CLOSING,
            flags: FlowFlags::MASQUERADE | FlowFlags::EXTERNAL,
            backend_generation: 0,
            ..flow()
        });
        assert_eq!((outside.state, outside.left_secs), (State::Closing, 110));
        assert_eq!(outside.flags, ["masquerade", "external"]);
        assert_eq!(outside.service, None);
        let expired = row(&Flow {
            seen_secs: 0,
            state: FlowState::EMBRYONIC,
            ..flow()
        });
        assert_eq!((expired.idle_secs, expired.left_secs), (1_000, 0));
        let counted = counts(&[shown.clone(), shown, half]);
        let flows: Vec<usize> = counted.iter().map(|count| count.flows).collect();
        assert_eq!(flows, [2, 1]);
    }
}
