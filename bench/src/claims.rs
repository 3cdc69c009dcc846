//! What Penstock promises in numbers, beside what was measured of it.

use std::fmt::Write;

use serde_json::Value;

use crate::{
    family::Family,
    figures::Median,
    flat, packets, plot,
    results::Results,
    services::{AT_SOCKET, OWN_NETWORK},
    turns::{Metric, Outcome, Turns},
};

/// A ratio that is to be no less than this, or no more.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

impl Bound {
    fn shown(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("at least {bound}"),
            Self::AtMost(bound) => format!("at most {bound}"),
            Self::Below(bound) => format!("below {bound}"),
        }
    }

    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
            Self::Below(bound) => value < bound,
        }
    }

    /// Whether all of an interval keeps it, none of it, or nobody can tell.
    fn verdict(self, median: Median) -> &'static str {
        match (self.holds(median.low), self.holds(median.high)) {
            (true, true) => "met",
            (false, false) => "not met",
            _ if self.holds(median.value) => "met by the median, not by all of its interval",
            _ => "not met by the median, but by some of its interval",
        }
    }
}

/// Adds the table of promises: of each that what was measured says something of, and of those that it should have said
/// something of.
pub fn table(text: &mut String, results: &Results) {
    let mut rows = String::new();
    let version = results.machine.version("penstock").unwrap_or("unknown");
    let by = |command: &str| format!("`cargo xtask bench -- {command}`, {version}");
    let mut row = |claim: &str, bound: Bound, unit: &str, median: Median, command: &str| {
        let digits = if unit.is_empty() { 3 } else { 0 };
        // Writing to a string can't fail.
        let _ = writeln!(
            rows,
            "| {claim} | {}{unit} | {} | {} | {} |",
            bound.shown(),
            median
                .within(digits)
                .replacen(" (", &format!("{unit} ("), 1),
            bound.verdict(median),
            by(command),
        );
    };
    let mut unmeasured = Vec::new();
    for promise in beside_kube_proxy() {
        let measured = promise.measured(results);
        if measured.is_empty() {
            unmeasured.push(promise);
            continue;
        }
        for (claim, ratio, command) in measured {
            row(&claim, promise.bound, "", ratio, command);
        }
    }
    for outcome in &results.outcomes {
        for (claim, bound, median) in promised(outcome) {
            row(&claim, bound, "", median, &outcome.command);
        }
    }
    for calls in results
        .plugins
        .iter()
        .filter(|calls| calls.what.starts_with("ADD"))
    {
        let command = results
            .outcomes
            .iter()
            .find(|outcome| outcome.what == calls.what);
        let command = command.map_or("cni", |outcome| &outcome.command);
        let claim = format!(
            "{}: p99 to p50 of all {} calls, {}",
            calls.what,
            calls.nanos.len(),
            calls.contender
        );
        if calls.contender.starts_with("Penstock") {
            row(&claim, Bound::Below(2.0), "", calls.tail(), command);
        }
    }
    for (claim, median, command) in per_packet(results) {
        row(&claim, Bound::Below(120.0), " ns", median, &command);
    }
    for promise in unmeasured {
        let _ = writeln!(
            rows,
            "| {} | {} | | not measured | {} |",
            promise.claim(),
            promise.bound.shown(),
            by(&promise.command),
        );
    }
    text.push_str("\n## What is promised\n\n| promise | bound | measured | | measured by |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    text.push_str(&rows);
}

/// How much more Penstock does than kube-proxy.
struct Promise {
    /// What the comparison's title begins with.
    title: String,
    /// What begins the name of what was measured.
    what: &'static str,
    ours: &'static str,
    metric: Metric,
    bound: Bound,
    /// What measures it.
    command: String,
}

/// kube-proxy in the mode that it has had for longest, the real one.
const IPTABLES: &str = "kube-proxy, iptables";

/// All of these.
fn beside_kube_proxy() -> Vec<Promise> {
    let places = [
        (1, "1 service", 1.05),
        (5_000, "5000 services, the first", 1.3),
        (5_000, "5000 services, the last", 1.3),
    ];
    let connecting = places.into_iter().flat_map(|(count, title, bound)| {
        [AT_SOCKET, OWN_NETWORK].map(|ours| Promise {
            title: title.to_owned(),
            what: plot::GROWING,
            ours,
            metric: Metric::Rate,
            bound: Bound::AtLeast(bound),
            command: format!("services --services {count} --only '={}'", plot::GROWING),
        })
    });
    let forwarding = Family::ALL.into_iter().flat_map(|family| {
        ["UDP packets", "TCP packets"].map(|what| Promise {
            title: packets::title(1, family),
            what,
            ours: "Penstock, XDP",
            metric: Metric::Packets,
            bound: Bound::AtLeast(3.0),
            command: format!("packets --family {family} --only '{what}'"),
        })
    });
    connecting.chain(forwarding).collect()
}

impl Promise {
    fn claim(&self) -> String {
        let (title, what, metric, ours) = (&self.title, self.what, self.metric.name(), self.ours);
        format!("{title}: {what}, {metric}: {ours}, to {IPTABLES}")
    }

    /// What was measured of it, and by what.
    fn measured<'a>(&self, results: &'a Results) -> Vec<(String, Median, &'a str)> {
        let outcomes = results.outcomes.iter();
        let measured = outcomes
            .filter(|outcome| outcome.title == self.title && outcome.what.starts_with(self.what));
        measured
            .filter_map(|outcome| {
                let of = |name| outcome.turns.iter().find(|turns| turns.contender == name);
                let ratio = of(self.ours)?.ratio(of(IPTABLES)?, self.metric);
                Some((self.claim(), ratio, outcome.command.as_str()))
            })
            .collect()
    }
}

/// What of a trial is promised: the ratio, and its bound.
fn promised(outcome: &Outcome) -> Vec<(String, Bound, Median)> {
    let Some((first, others)) = outcome.turns.split_first() else {
        return Vec::new();
    };
    let mut all = Vec::new();
    if outcome.title.starts_with(flat::TITLE) {
        for turns in others {
            let claim = format!(
                "{}: {} to {}",
                outcome.what, turns.contender, first.contender
            );
            let ratio = turns.ratio(first, Metric::P50);
            all.push((claim, Bound::AtMost(1.02), ratio));
        }
    } else if outcome.what == plot::GROWING {
        let sockets = || outcome.turns.iter().filter(|turns| is_at_socket(turns));
        let pods = outcome.turns.iter().filter(|turns| is_the_pods(turns));
        for (socket, pod) in pods.flat_map(|pod| sockets().map(move |socket| (socket, pod))) {
            let ours = socket.contender.trim_start_matches("Penstock, ");
            if socket.contender != AT_SOCKET && pod.is_ours() {
                // That node has another network.
                continue;
            }
            let claim = |of| {
                let pod = &pod.contender;
                format!(
                    "{}: requests a second {ours} to {pod}, by {of}",
                    outcome.name()
                )
            };
            let bound = Bound::AtLeast(0.97);
            all.push((
                claim("their number"),
                bound,
                socket.ratio(pod, Metric::Rate),
            ));
            // Half as long is twice as many. It leaves out what interrupted some of them.
            all.push((
                claim("their median time"),
                bound,
                pod.ratio(socket, Metric::P50),
            ));
        }
    } else if outcome.title == "CNI plugins" && outcome.what.starts_with("ADD") {
        for turns in others.iter().filter(|turns| turns.is_ours()) {
            let claim = format!("{}: p50 to that of {}", outcome.what, first.contender);
            all.push((claim, Bound::AtMost(1.0), turns.ratio(first, Metric::P50)));
        }
    }
    all
}

/// Whether this is Penstock at the socket, whoever has made the pods' network.
fn is_at_socket(turns: &Turns) -> bool {
    turns.contender.starts_with(AT_SOCKET)
}

/// Whether this asks the pod itself, on a bare node or on Penstock's.
fn is_the_pods(turns: &Turns) -> bool {
    turns.contender.ends_with("the pod's address")
}

/// What a known flow's packet to a node port takes at XDP: with the flow's record, its counts, and the translation of
/// both addresses.
fn per_packet(results: &Results) -> Vec<(String, Median, String)> {
    let Some(programs) = &results.programs else {
        return Vec::new();
    };
    let command = programs.get("command").and_then(Value::as_str);
    let lines = programs.get("programs").and_then(Value::as_array);
    let rows = lines.into_iter().flatten().filter_map(|line| {
        let word = |field: &str| line.get(field).and_then(Value::as_str);
        let (program, family, packet) = (word("program")?, word("family")?, word("packet")?);
        let is_known = packet.starts_with("a known flow's packet");
        let less = line.get("less").cloned()?;
        let less = serde_json::from_value::<Median>(less).ok()?;
        let claim = format!("`{program}`, {family}, {packet}: less an empty program");
        (program == "xdp_uplink" && is_known)
            .then(|| (claim, less, command.unwrap_or("programs").to_owned()))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{cni::Calls, machine::Machine};

    fn outcome(title: &str, what: &str, turns: &[(&str, u64)]) -> Outcome {
        Outcome::of(title, what, Metric::P50, turns)
    }

    fn told(results: Results) -> String {
        let mut text = String::new();
        table(&mut text, &results);
        text
    }

    fn results() -> Results {
        Results::new(Machine::look())
    }

    #[test]
    fn the_socket_is_compared_with_both_pods() {
        let turns = [
            ("no service, the pod's address", 1_000),
            ("Penstock, the pod's address", 900),
            ("Penstock, at the socket", 950),
            ("Penstock, at the socket, its own network", 990),
            ("Penstock, packet by packet", 1),
        ];
        let text = told(Results {
            outcomes: vec![outcome("1 service", plot::GROWING, &turns)],
            ..results()
        });
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("at least 0.97"))
            .collect();
        let [bare, bare_time, network, _, ours, _] = lines.as_slice() else {
            panic!("{text}")
        };
        // The same numbers as times, of which less is better.
        assert!(
            bare_time.contains("1.053 (") && bare_time.contains("| met |"),
            "{bare_time}"
        );
        assert!(
            bare.contains("to no service")
                && bare.contains("0.950 (")
                && bare.contains("| not met |")
        );
        assert!(
            ours.contains("to Penstock") && ours.contains("1.056 (") && ours.contains("| met |")
        );
        assert!(
            network.contains("its own network to no service") && network.contains("0.990 ("),
            "{network}"
        );
        assert!(bare.contains("`cargo xtask bench -- this`"), "{bare}");
    }

    #[test]
    fn flatness_and_plugins_and_programs_have_their_bounds() {
        let flat = format!("{}: Penstock, at the socket", flat::TITLE);
        let counts = [
            ("Penstock, 1 services", 100),
            ("Penstock, 44000 services", 103),
        ];
        let plugins = [("bridge with host-local", 50), ("Penstock", 40)];
        let line = |program: &str, packet: &str, less: f64| {
            let less = Median {
                value: less,
                low: less,
                high: less,
            };
            json!({ "program": program, "family": "IPv4", "packet": packet, "less": less })
        };
        let lines = [
            line("xdp_uplink", "a known flow's packet", 119.0),
            line("xdp_uplink", "a known flow's packet, of many flows", 121.0),
            line("xdp_uplink", "a reply", 500.0),
            line("from_pod", "a known flow's packet", 500.0),
        ];
        let mut nanos = vec![10; 980];
        nanos.extend([30; 20]);
        let text = told(Results {
            outcomes: vec![
                outcome(&flat, "connect", &counts),
                outcome("CNI plugins", "ADD beside 50 pods", &plugins),
            ],
            plugins: vec![Calls {
                what: "ADD beside 50 pods".to_owned(),
                contender: "Penstock".to_owned(),
                nanos,
            }],
            programs: Some(json!({ "command": "programs", "programs": lines })),
            ..results()
        });
        let rows: Vec<&str> = text
            .lines()
            .skip(5)
            .filter(|row| !row.contains("| not measured |"))
            .collect();
        let expected = [
            ("1.030", "| not met |"),
            ("0.800", "| met |"),
            ("3.000", "| not met |"),
            ("119 ns", "| met |"),
            ("121 ns", "| not met |"),
        ];
        assert_eq!(rows.len(), expected.len(), "{text}");
        for (row, (value, verdict)) in rows.iter().zip(expected) {
            assert!(row.contains(value) && row.contains(verdict), "{row}");
        }
    }

    #[test]
    fn connecting_and_forwarding_are_compared_with_kube_proxy() {
        let connecting = |ours, theirs| {
            [
                ("no service, the pod's address", 1),
                ("Penstock, at the socket", ours),
                ("Penstock, at the socket, its own network", ours + 10),
                ("kube-proxy, iptables", theirs),
            ]
        };
        let forwarding = [("Penstock, XDP", 290), ("kube-proxy, iptables", 100)];
        let results = Results {
            outcomes: vec![
                outcome("1 service", plot::GROWING, &connecting(106, 100)),
                outcome(
                    "5000 services, the first",
                    plot::GROWING,
                    &connecting(129, 100),
                ),
                // Of others nothing is promised.
                outcome(
                    "1000 services, the last",
                    plot::GROWING,
                    &connecting(99, 100),
                ),
                outcome(
                    &packets::title(1, Family::V6),
                    "UDP packets of 64 flows, one processor for all",
                    &forwarding,
                ),
            ],
            ..results()
        };
        let text = told(results);
        let rows: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("to kube-proxy, iptables"))
            .collect();
        let verdicts = [
            (
                "1 service: ",
                "| at least 1.05 | 1.060 (1.060 to 1.060) | met |",
            ),
            ("its own network, to", "1.160 (1.160 to 1.160) | met |"),
            (
                "the first: ",
                "| at least 1.3 | 1.290 (1.290 to 1.290) | not met |",
            ),
            ("its own network, to", "1.390 (1.390 to 1.390) | met |"),
            (
                "over IPv6, the backend on another node: UDP",
                "| 2.900 (2.900 to 2.900) | not met |",
            ),
            (
                "the last: ",
                "| at least 1.3 | | not measured | `cargo xtask bench -- services --services 5000",
            ),
            ("its own network, to", "| at least 1.3 | | not measured |"),
            (
                "of 1, the backend on another node: UDP",
                "| at least 3 | | not measured |",
            ),
            ("of 1, the backend on another node: TCP", "| not measured |"),
            (
                "over IPv6, the backend on another node: TCP",
                "| not measured |",
            ),
        ];
        assert_eq!(rows.len(), verdicts.len(), "{text}");
        for (row, (claim, verdict)) in rows.iter().zip(verdicts) {
            assert!(row.contains(claim) && row.contains(verdict), "{row}");
        }
    }

    #[test]
    fn an_interval_over_the_bound_decides_nothing() {
        let verdict = |low, value, high| Bound::AtLeast(0.97).verdict(Median { value, low, high });
        assert!(verdict(0.96, 0.98, 0.99).starts_with("met by the median"));
        assert!(verdict(0.95, 0.96, 0.98).starts_with("not met by the median"));
    }
}
