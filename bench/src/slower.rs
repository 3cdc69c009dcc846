//! Where Penstock is slower, as a table: by cause, which docs/slower.md knows, and then each comparison.

use std::fmt::Write;

use crate::{
    figures::Median,
    outside,
    results::Results,
    turns::{Metric, Outcome, Turns},
};

/// Why Penstock is slower where it is, by comparison, trial and way.
const CAUSES: &str = include_str!("../../docs/slower.md");

/// What no row of it is about.
const UNKNOWN: &str = "cause not known";

/// Where a way of Penstock's was slower than another way, by what was measured.
struct Slower<'a> {
    outcome: &'a Outcome,
    ours: &'a str,
    other: &'a str,
    ratios: Vec<(Metric, Median)>,
    cause: &'static str,
}

impl Slower<'_> {
    /// How much longer it took at worst, as far as that is known: a smaller rate as the time that it leaves for each.
    fn worst(&self) -> Option<f64> {
        let sized = self.ratios.iter().filter(|(_, ratio)| ratio.is_sized());
        let longer = sized.map(|(metric, ratio)| match metric.is_less_better() {
            true => ratio.value,
            false => 1.0 / ratio.value,
        });
        longer.max_by(f64::total_cmp)
    }

    fn row(&self) -> String {
        let ratios: Vec<String> = self
            .ratios
            .iter()
            .map(|(metric, ratio)| format!("{} {}", metric.name(), ratio.shown()))
            .collect();
        format!(
            "| {}: {} | {} | {} | {} |\n",
            self.outcome.title,
            self.outcome.what,
            self.ours,
            self.other,
            ratios.join("<br>"),
        )
    }
}

/// Adds every difference to Penstock's disadvantage, with its cause.
pub fn table(text: &mut String, results: &Results) {
    let mut all = Vec::new();
    let mut compared = 0;
    for outcome in &results.outcomes {
        let (ours, others): (Vec<_>, Vec<_>) =
            outcome.turns.iter().partition(|turns| turns.is_ours());
        for (ours, other) in ours
            .into_iter()
            .flat_map(|ours| others.iter().map(move |other| (ours, other)))
        {
            compared += outcome.metrics.len();
            all.extend(compare(outcome, ours, other));
        }
    }
    let differences: usize = all.iter().map(|slower| slower.ratios.len()).sum();
    text.push_str("\n## Where Penstock is slower\n\n");
    if all.is_empty() {
        text.push_str("Nowhere, as far as these rounds can tell.\n");
        return;
    }
    // Writing to a string can't fail.
    let _ = writeln!(
        text,
        "{differences} of {compared} comparisons. Of each forty that are between equals, one is here by chance: a 95 % \
         interval is above 1 so often. Each is below, under its cause.\n"
    );
    let mut causes: Vec<&str> = Vec::new();
    for slower in &all {
        if !causes.contains(&slower.cause) {
            causes.push(slower.cause);
        }
    }
    let of = |cause| {
        all.iter()
            .filter(move |slower: &&Slower<'_>| slower.cause == cause)
    };
    text.push_str("| because of | comparisons | takes so many times as long, at worst |\n");
    text.push_str("| --- | --- | --- |\n");
    for cause in &causes {
        let count: usize = of(*cause).map(|slower| slower.ratios.len()).sum();
        let worst = of(*cause).filter_map(|slower| Some((slower.worst()?, slower)));
        let worst = worst.max_by(|(a, _), (b, _)| a.total_cmp(b)).map_or_else(
            || "not known: wider intervals than differences".to_owned(),
            |(times, slower)| {
                let Outcome { title, what, .. } = slower.outcome;
                let (ours, other) = (slower.ours, slower.other);
                format!("{times:.2}: {title}, {what}: {ours}, beside {other}")
            },
        );
        let _ = writeln!(text, "| {cause} | {count} | {worst} |");
    }
    for cause in &causes {
        let _ = writeln!(
            text,
            "\n<details><summary>{cause}</summary>\n\n\
             | measured | Penstock | slower than | ratio |\n| --- | --- | --- | --- |"
        );
        for slower in of(*cause) {
            text.push_str(&slower.row());
        }
        text.push_str("\n</details>\n");
    }
}

/// By what one way is slower than another, if it is.
fn compare<'a>(outcome: &'a Outcome, ours: &'a Turns, other: &'a Turns) -> Option<Slower<'a>> {
    let slower = |(metric, ratio): &(Metric, Median)| {
        ratio.is_difference() && (ratio.value > 1.0) == metric.is_less_better()
    };
    let metrics = outcome.metrics.iter();
    let ratios: Vec<(Metric, Median)> = metrics
        .map(|metric| (*metric, ours.ratio(other, *metric)))
        .filter(slower)
        .collect();
    let who = beside(&ours.contender, &other.contender);
    let cause = cause(CAUSES, &outcome.title, &outcome.what, &who);
    (!ratios.is_empty()).then(|| Slower {
        outcome,
        ours: &ours.contender,
        other: &other.contender,
        ratios,
        cause: cause.unwrap_or(UNKNOWN),
    })
}

/// Whom causes are looked for of: a way of Penstock's, and whether it is compared with one that does half of it.
fn beside(ours: &str, other: &str) -> String {
    if other == outside::Way::ThereOnly.name(None) {
        format!("{ours} beside one way")
    } else {
        ours.to_owned()
    }
}

/// The first cause whose words are all in what was measured: a row of the table in docs/slower.md.
fn cause<'a>(causes: &'a str, title: &str, what: &str, contender: &str) -> Option<&'a str> {
    rows(causes).find_map(|[in_title, in_what, in_contender, cause]| {
        let places = [
            (title, in_title),
            (what, in_what),
            (contender, in_contender),
        ];
        let is_met = places.iter().all(|(text, cell)| holds_one_of(text, cell));
        is_met.then_some(cause)
    })
}

/// Whether a text holds one of those of a cell, between which "or" stands. An empty cell has none.
fn holds_one_of(text: &str, cell: &str) -> bool {
    let mut wanted = cell.split(" or ").filter(|wanted| !wanted.is_empty());
    wanted.any(|wanted| text.contains(wanted))
}

/// The rows of a table of four columns, without its head.
fn rows(text: &str) -> impl Iterator<Item = [&str; 4]> {
    let rows = text.lines().filter_map(|line| {
        let row = line.strip_prefix("| ")?.strip_suffix(" |")?;
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        cells.try_into().ok()
    });
    rows.skip_while(|[first, ..]: &[&str; 4]| *first != "---")
        .skip(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    fn outcome(title: &str, metric: Metric, medians: &[(&str, u64)]) -> Outcome {
        Outcome::of(title, "UDP request", metric, medians)
    }

    #[test]
    fn what_is_slower_is_named_and_what_is_faster_is_not() {
        let results = Results {
            outcomes: vec![
                outcome("a", Metric::P50, &[("other", 10), ("Penstock, slow", 12)]),
                outcome("b", Metric::P50, &[("other", 10), ("Penstock, fast", 8)]),
                outcome("c", Metric::Rate, &[("Penstock, few", 8), ("other", 10)]),
                outcome("d", Metric::Rate, &[("Penstock, many", 12), ("other", 10)]),
            ],
            ..Results::new(Machine::look())
        };
        let mut text = String::new();
        table(&mut text, &results);
        assert!(text.contains("2 of 4 comparisons"), "{text}");
        let cause = "| cause not known | 2 | 1.25: c, UDP request: Penstock, few, beside other |";
        assert!(text.contains(cause), "{text}");
        let row = "| a: UDP request | Penstock, slow | other | p50 1.200 (95 % interval 1.200 to 1.200) |";
        assert!(text.contains(row), "{text}");
        for (name, is_slower) in [
            ("slow", true),
            ("few", true),
            ("fast", false),
            ("many", false),
        ] {
            assert_eq!(
                text.contains(&format!("Penstock, {name}")),
                is_slower,
                "{text}"
            );
        }
    }

    #[test]
    fn the_first_cause_that_fits_is_told() {
        let causes = "| in | what | who | why |\n| --- | --- | --- | --- |\n\
                      | node port | stream | XDP | segments |\n| node port | stream or one | TC | work |\n\
                      | Pods |  | Penstock | nobody looked |\n";
        let why = |title, what, who| cause(causes, title, what, who);
        assert_eq!(
            why("A node port of 1", "TCP stream", "Penstock, XDP"),
            Some("segments")
        );
        assert_eq!(
            why("A node port of 1", "TCP stream", "Penstock, TC"),
            Some("work")
        );
        assert_eq!(why("A node port of 1", "one", "Penstock, TC"), Some("work"));
        assert_eq!(why("A node port of 1", "one", "Penstock, XDP"), None);
        // An empty cell is no cause for whatever there may be.
        assert_eq!(why("Pods", "TCP stream", "Penstock"), None);
    }

    #[test]
    fn answers_that_the_other_leaves_out_are_the_cause_but_of_dsr() {
        let title = "A node port of 1, the backend on another node";
        let why = |what, ours, way: outside::Way| {
            let who = beside(ours, way.name(None));
            cause(CAUSES, title, what, &who)
        };
        for ours in [
            "Penstock, TC",
            "Penstock, TC, overlay",
            "Penstock, TC, tunnel",
        ] {
            let why = why("8 x TCP stream", ours, outside::Way::ThereOnly);
            assert!(why.is_some_and(|why| why.starts_with("answers")), "{ours}");
        }
        let [rr, stream] = [
            "TCP request and response, one processor for both",
            "TCP stream",
        ];
        let dsr = why(rr, "Penstock, TC, dsr", outside::Way::ThereOnly);
        assert!(dsr.is_some_and(|why| why.starts_with("tunnels")));
        let routed = why(stream, "Penstock, TC", outside::Way::Direct);
        assert!(routed.is_some_and(|why| !why.starts_with("answers")));
    }

    #[test]
    fn what_was_not_looked_into_has_no_cause() {
        let why = |title, what, who| cause(CAUSES, title, what, who);
        let [rr, stream] = [
            "TCP request and response, one processor for both",
            "TCP stream by iperf3, one processor for both",
        ];
        for (title, who) in [
            ("1 service", "Penstock, at the socket"),
            ("Pods on one node", "Penstock"),
        ] {
            assert!(why(title, rr, who).is_some(), "{title}");
            assert_eq!(why(title, stream, who), None, "{title}");
        }
        assert_eq!(why("CNI plugins", "ADD beside 50 pods", "Penstock"), None);
    }

    #[test]
    fn the_table_of_causes_can_be_read() {
        let written = CAUSES.lines().filter(|line| line.starts_with("| ")).count();
        // All but the head and the line under it.
        assert_eq!(rows(CAUSES).count(), written - 2);
        assert!(rows(CAUSES).all(|row| row.iter().all(|cell| !cell.is_empty())));
    }
}
