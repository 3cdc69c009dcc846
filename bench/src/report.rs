//! Results in words: lines while it is measured, a file of Markdown in the end.

use std::fmt::Write;

use serde_json::Value;

use crate::{
    claims,
    cni::Calls,
    figures::{self, Median},
    plot,
    results::Results,
    slower,
    turns::{Metric, Outcome, Turns},
};

/// The title of the picture that shows how connecting grows with the number of services.
pub const GROWTH: &str = "Connect, request, close by the number of services";

/// Says what came out of a trial.
pub fn print(outcome: &Outcome) {
    println!("{}: {}", outcome.title, outcome.what);
    for metric in &outcome.metrics {
        let (unit, scale) = unit(outcome, *metric);
        for turns in &outcome.turns {
            println!(
                "  {:10} {:40} {:>24} {unit:8}{}",
                metric.name(),
                turns.contender,
                spread(turns.median(*metric), scale),
                against(outcome, turns, *metric)
                    .map_or_else(String::new, |ratio| format!(" ratio {ratio}")),
            );
        }
    }
}

/// The unit for a metric of all contenders, and how many of the metric's own it is.
pub fn unit(outcome: &Outcome, metric: Metric) -> (&'static str, f64) {
    metric.unit(outcome.turns.iter().map(|turns| turns.median(metric).value))
}

/// A median and its interval.
fn spread(median: Median, scale: f64) -> String {
    let Median { value, low, high } = median;
    let (value, low, high) = (value / scale, low / scale, high / scale);
    let digits = if value < 100.0 { 2 } else { 0 };
    format!("{value:.digits$} ({low:.digits$} to {high:.digits$})")
}

/// How a contender compares with the first, which does not compare with itself.
fn against(outcome: &Outcome, turns: &Turns, metric: Metric) -> Option<String> {
    let first = outcome.turns.first()?;
    (turns.contender != first.contender).then(|| turns.ratio(first, metric).shown())
}

/// The whole report. `plots` are titles and files.
pub fn markdown(results: &Results, plots: &[(String, String)]) -> String {
    let mut text = String::from("# Measurements\n\n");
    // Writing to a string can't fail.
    let _ = writeln!(
        text,
        "{}. Made by `cargo xtask bench`:\n",
        results.machine.line()
    );
    for command in &results.commands {
        text.push_str(&typed(results, command));
    }
    text.push('\n');
    for reason in results.reservations() {
        let _ = writeln!(text, "**Mind: {reason}.**\n");
    }
    if let Some(left_out) = &results.left_out {
        let _ = writeln!(
            text,
            "A brief run. Left out: {left_out}. `--full` measures everything.\n"
        );
    }
    for (program, version) in &results.machine.programs {
        let _ = writeln!(text, "* {program}: {version}");
    }
    for absent in &results.absent {
        let _ = writeln!(text, "* left out: {}: {}", absent.what, absent.reason);
    }
    text.push_str(
        "\nMedians of all rounds with their 95 % interval. A ratio compares with the first line of \
         its table, round by round; one whose interval includes 1 is called no difference, and one whose \
         interval is wider than its distance from 1 is not named.\n",
    );
    slower::table(&mut text, results);
    claims::table(&mut text, results);
    beside_kube_proxy(&mut text, results);
    for (title, file) in plots.iter().filter(|(title, _)| title == GROWTH) {
        let _ = writeln!(text, "\n## {title}\n\n![{title}]({file})\n");
        growth(&mut text, results);
    }
    let mut title = "";
    for outcome in &results.outcomes {
        if outcome.title != title {
            title = &outcome.title;
            let _ = writeln!(text, "\n## {title}\n");
        }
        let rounds = outcome
            .turns
            .first()
            .map_or(0, |turns| turns.summaries.len());
        let _ = writeln!(text, "### {}, {rounds} rounds\n", outcome.what);
        if !outcome.command.is_empty() {
            let _ = writeln!(text, "{}", typed(results, &outcome.command));
        }
        if let Some(quiet) = outcome.quiet.filter(|quiet| !quiet.is_idle()) {
            let _ = writeln!(text, "**Provisional: {} meanwhile.**\n", quiet.shown());
        }
        let name = outcome.name();
        for (_, file) in plots.iter().filter(|(plotted, _)| *plotted == name) {
            let _ = writeln!(text, "![{name}]({file})\n");
        }
        table(&mut text, outcome);
    }
    plugins(&mut text, &results.plugins);
    text.push_str(&programming(results));
    if let Some(programs) = &results.programs {
        text.push_str(&per_packet(results, programs));
    }
    text
}

/// A command as one types it, with the version that it was made with.
fn typed(results: &Results, command: &str) -> String {
    let version = results.machine.version("penstock").unwrap_or("unknown");
    let command = format!("cargo xtask bench -- {command}");
    format!("    {}    # Penstock {version}\n", command.trim_end())
}

/// What calls of plugins take, all rounds together: a turn has too few for its 99th percentile to say much.
fn plugins(text: &mut String, plugins: &[Calls]) {
    if plugins.is_empty() {
        return;
    }
    text.push_str(
        "\n## CNI plugins, all calls\n\n| | plugin | calls | p50 in ms | p99 in ms | p99 / p50 |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for calls in plugins {
        let (p50, p99) = calls.p50_and_p99();
        let (p50, p99) = (p50 as f64 / 1e6, p99 as f64 / 1e6);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {p50:.2} | {p99:.2} | {} |",
            calls.what,
            calls.contender,
            calls.nanos.len(),
            calls.tail().within(2)
        );
    }
}

/// What packets cost in the programs.
fn per_packet(results: &Results, programs: &Value) -> String {
    let mut text = String::from(
        "\n## Programs\n\nNanoseconds a packet, of one run each (BPF_PROG_TEST_RUN), each packet of another flow; \
         less those of an empty program of the same kind with the same frames, which are what measuring takes.\n\n",
    );
    if let Some(command) = programs.get("command").and_then(Value::as_str) {
        let _ = writeln!(text, "{}", typed(results, command));
    }
    if let Some(step) = programs.get("clock_step_nanos").and_then(Value::as_f64) {
        let _ = writeln!(
            text,
            "* Times of single packets differ by {step:.0} ns from the next longer ones, most often: the clock's step, \
             if it is more than 3 ns. A median of all rounds may lie between two.",
        );
    }
    for many in programs
        .get("many")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let word = |field: &str| many.get(field).and_then(Value::as_str).unwrap_or_default();
        let flows = many
            .get("flows")
            .and_then(Value::as_u64)
            .unwrap_or_default();
        let (program, family) = (word("program"), word("family"));
        let _ = writeln!(
            text,
            "* `{program}`, {family}: many flows are {flows} at once"
        );
    }
    text.push_str("\n| program | packet | in all | less measuring |\n| --- | --- | --- | --- |\n");
    for line in programs
        .get("programs")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let word = |field: &str| line.get(field).and_then(Value::as_str).unwrap_or_default();
        let spread = |field: &str| {
            let median = line.get(field).cloned().unwrap_or_default();
            let median = serde_json::from_value::<Median>(median);
            median.map_or_else(
                |_| String::new(),
                |Median { value, low, high }| format!("{value:.0} ({low:.0} to {high:.0})"),
            )
        };
        let _ = writeln!(
            text,
            "| `{}` | {}, {} | {} | {} |",
            word("program"),
            word("family"),
            word("packet"),
            spread("nanos"),
            spread("less")
        );
    }
    text
}

/// What programming takes, for each shape of a cluster.
fn programming(results: &Results) -> String {
    let shapes = match &results.control {
        Some(Value::Array(shapes)) => shapes.as_slice(),
        // Earlier results have one shape only.
        Some(one) => std::slice::from_ref(one),
        None => return String::new(),
    };
    let agents = shapes.iter().filter_map(|shape| shape.get("agent"));
    let lines: String = agents.map(|agent| programmed(results, agent)).collect();
    format!("\n## Programming\n\n{lines}")
}

fn programmed(results: &Results, agent: &Value) -> String {
    let number = |field: &str| agent.get(field).and_then(Value::as_f64);
    let or_zero = |field: &str| number(field).unwrap_or_default();
    let times = agent.get("change_nanos").and_then(Value::as_array);
    let times: Vec<u64> = times
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect();
    let micros = |percent| figures::percentile(&times, percent) as f64 / 1e3;
    let processor = number("processor_seconds").map_or_else(String::new, |seconds| {
        format!(" {seconds:.2} s of a processor,")
    });
    let each = number("change_processor_seconds").map_or_else(String::new, |seconds| {
        let each = seconds * 1e6 / times.len().max(1) as f64;
        format!(", {each:.0} µs of a processor each")
    });
    let each_has = or_zero("endpoints") / or_zero("services").max(1.0);
    let command = format!(
        "control --shapes {}x{each_has} --changes {}",
        or_zero("services"),
        times.len()
    );
    format!(
        "{}\n\
         * {} services with {} endpoints from JSON manifests: {:.2} s from the agent's start to the last \
         map entry,{processor} {} MiB of resident memory then and {} MiB at most.\n\
         * One endpoint's change among them, from its file's replacement to the kernel: p50 {:.0} µs, \
         p99 {:.0} µs of {} changes{each}.\n\n",
        typed(results, &command),
        or_zero("services"),
        or_zero("endpoints"),
        or_zero("all_seconds"),
        or_zero("resident_mib"),
        or_zero("peak_mib"),
        micros(50),
        micros(99),
        times.len(),
    )
}

/// How a way of Penstock's compares with each of kube-proxy's modes, by mode.
pub fn ratios_to_kube_proxy<'a>(
    outcome: &'a Outcome,
    ours: &Turns,
    metric: Metric,
) -> Vec<(&'a str, Median)> {
    // Who asks the pod itself has no service to compare.
    let is_served = !ours.contender.ends_with("the pod's address");
    let modes = outcome.turns.iter().filter(|_| is_served);
    modes
        .filter_map(|turns| Some((turns.mode()?, ours.ratio(turns, metric))))
        .collect()
}

/// How much longer connecting takes than to the first contender, by the number of services: whatever is different
/// from one number to the next for all of them is not in it.
fn growth(text: &mut String, results: &Results) {
    let outcomes = results.outcomes.iter();
    let mut growing: Vec<(f64, &Outcome)> = outcomes
        .filter(|outcome| outcome.what == plot::GROWING)
        .filter_map(|outcome| Some((plot::asked_last(&outcome.title)?, outcome)))
        .collect();
    growing.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut names: Vec<&str> = Vec::new();
    for (_, outcome) in &growing {
        for turns in outcome.turns.iter().skip(1) {
            if !names.contains(&turns.contender.as_str()) {
                names.push(&turns.contender);
            }
        }
    }
    let heads: Vec<String> = growing.iter().map(|(count, _)| count.to_string()).collect();
    let _ = writeln!(
        text,
        "p50, and its ratio to that of the first contender with as many services.\n\n\
         | services | {} |\n| --- |{}",
        heads.join(" | "),
        " --- |".repeat(heads.len())
    );
    for name in names {
        let cells: Vec<String> = growing
            .iter()
            .map(|(_, outcome)| {
                let first = outcome.turns.first();
                let own = outcome.turns.iter().find(|turns| turns.contender == name);
                let Some((own, first)) = own.zip(first) else {
                    return String::new();
                };
                let micros = spread(own.median(Metric::P50), 1e3);
                format!("{micros} µs, {}", own.ratio(first, Metric::P50).shown())
            })
            .collect();
        let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
    }
}

/// All ways of Penstock's beside kube-proxy's, in short.
fn beside_kube_proxy(text: &mut String, results: &Results) {
    let mut rows = String::new();
    for outcome in &results.outcomes {
        for metric in &outcome.metrics {
            for ours in outcome.turns.iter().filter(|turns| turns.is_ours()) {
                let ratios = ratios_to_kube_proxy(outcome, ours, *metric);
                let ratios: Vec<String> = ratios
                    .into_iter()
                    .map(|(mode, ratio)| format!("{mode}: {}", ratio.shown()))
                    .collect();
                if ratios.is_empty() {
                    continue;
                }
                let _ = writeln!(
                    rows,
                    "| {}, {} ({}) | {} | {} |",
                    outcome.name(),
                    metric.name(),
                    metric.better(),
                    ours.contender,
                    ratios.join("<br>")
                );
            }
        }
    }
    if !rows.is_empty() {
        text.push_str("\n## Penstock to kube-proxy\n\n");
        text.push_str(
            "| measured | Penstock | times as much as kube-proxy, by mode |\n| --- | --- | --- |\n",
        );
        text.push_str(&rows);
    }
}

fn table(text: &mut String, outcome: &Outcome) {
    let heads: Vec<String> = outcome
        .metrics
        .iter()
        .map(|metric| format!("{} in {} | ratio", metric.name(), unit(outcome, *metric).0))
        .collect();
    let _ = writeln!(text, "| | {} |", heads.join(" | "));
    let _ = writeln!(text, "| --- |{}", " --- | --- |".repeat(heads.len()));
    for turns in &outcome.turns {
        let _ = write!(text, "| {} |", turns.contender);
        for metric in &outcome.metrics {
            let (_, scale) = unit(outcome, *metric);
            let ratio = against(outcome, turns, *metric).unwrap_or_default();
            let _ = write!(
                text,
                " {} | {ratio} |",
                spread(turns.median(*metric), scale)
            );
        }
        text.push('\n');
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    #[test]
    fn how_connecting_grows_is_a_table_too() {
        let at = |title: &str, nanos| {
            let medians = [("pod", 20_000), ("Penstock, socket", nanos)];
            Outcome::of(title, plot::GROWING, Metric::P50, &medians)
        };
        let results = Results {
            outcomes: vec![
                at("44000 services, the last", 22_000),
                at("44000 services, the first", 1),
                at("1 service", 21_000),
            ],
            ..Results::new(Machine::look())
        };
        let text = markdown(&results, &[(GROWTH.to_owned(), "growth.svg".to_owned())]);
        assert!(text.contains("| services | 1 | 44000 |"), "{text}");
        let row = "| Penstock, socket | 21.00 (21.00 to 21.00) µs, 1.050 (95 % interval 1.050 to 1.050) | 22.00 \
                   (22.00 to 22.00) µs, 1.100 (95 % interval 1.100 to 1.100) |";
        assert!(text.contains(row), "{text}");
    }

    #[test]
    fn programming_can_be_repeated() {
        let agent = serde_json::json!({
            "services": 5_000, "endpoints": 250_000, "all_seconds": 2.5, "processor_seconds": 2.0,
            "resident_mib": 148, "peak_mib": 159, "change_nanos": [1_000, 2_000, 3_000],
        });
        let text = programmed(&Results::new(Machine::look()), &agent);
        for wanted in [
            "cargo xtask bench -- control --shapes 5000x50 --changes 3    # Penstock 0.",
            "2.50 s from the agent's start",
            "148 MiB of resident memory then and 159 MiB at most",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in {text}");
        }
    }

    #[test]
    fn ratios_to_every_mode_of_kube_proxy_are_named() {
        let medians = [
            ("kube-proxy, iptables", 400),
            ("kube-proxy's rules, nftables", 500),
            ("Penstock, XDP", 1_500),
            ("no service", 900),
        ];
        let results = Results {
            outcomes: vec![Outcome::of(
                "Packets",
                "UDP request",
                Metric::Packets,
                &medians,
            )],
            ..Results::new(Machine::look())
        };
        let text = markdown(&results, &[]);
        let row = "| Packets: UDP request, packets (more is better) | Penstock, XDP | iptables: 3.750 (95 % \
                   interval 3.750 to 3.750)<br>nftables: 3.000 (95 % interval 3.000 to 3.000) |";
        assert!(text.contains(row), "{text}");
    }
}
