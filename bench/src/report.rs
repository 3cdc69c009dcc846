//! Results in words: lines while it is measured, a file of Markdown in the end.

use std::fmt::Write;

use serde_json::Value;

use crate::{
    figures::{self, Median},
    results::Results,
    turns::{Metric, Outcome, Turns},
};

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
        "{}. Made by `cargo xtask bench`.\n",
        results.machine.line()
    );
    for reason in results.machine.reservations() {
        let _ = writeln!(text, "**Mind: {reason}.**\n");
    }
    for (program, version) in &results.machine.programs {
        let _ = writeln!(text, "* {program}: {version}");
    }
    text.push_str(
        "\nMedians of all rounds with their 95 % interval. A ratio compares with the first line of \
         its table, round by round; one whose interval includes 1, or is wider than its distance from \
         1, is called no difference.\n",
    );
    let mut title = "";
    for outcome in &results.outcomes {
        if outcome.title != title {
            title = &outcome.title;
            let _ = writeln!(text, "\n## {title}\n");
            for (_, file) in plots.iter().filter(|(plotted, _)| plotted == title) {
                let _ = writeln!(text, "![{title}]({file})\n");
            }
        }
        let rounds = outcome
            .turns
            .first()
            .map_or(0, |turns| turns.summaries.len());
        let _ = writeln!(text, "### {}, {rounds} rounds\n", outcome.what);
        table(&mut text, outcome);
    }
    if let Some(agent) = results.control.as_ref().and_then(|all| all.get("agent")) {
        text.push_str(&programming(agent));
    }
    if let Some(programs) = &results.programs {
        text.push_str(&per_packet(programs));
    }
    text
}

/// What packets cost in the programs.
fn per_packet(programs: &Value) -> String {
    let mut text = String::from(
        "\n## Programs\n\nNanoseconds a packet, of one run each (BPF_PROG_TEST_RUN), each packet of another flow; \
         less those of a frame that is not IP, which are what measuring takes.\n\n\
         | program | packet | in all | less measuring |\n| --- | --- | --- | --- |\n",
    );
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

/// What programming takes.
fn programming(agent: &Value) -> String {
    let number = |field: &str| agent.get(field).and_then(Value::as_f64).unwrap_or_default();
    let times = agent.get("change_nanos").and_then(Value::as_array);
    let times: Vec<u64> = times
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect();
    let micros = |percent| figures::percentile(&times, percent) as f64 / 1e3;
    format!(
        "\n## Programming\n\n\
         * {} services with {} endpoints from JSON manifests: {:.2} s from the agent's start to the last \
         map entry, {} MiB of resident memory at most.\n\
         * One endpoint's change among them, from its file's replacement to the kernel: p50 {:.0} µs, \
         p99 {:.0} µs of {} changes.\n",
        number("services"),
        number("endpoints"),
        number("all_seconds"),
        number("peak_mib"),
        micros(50),
        micros(99),
        times.len(),
    )
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
