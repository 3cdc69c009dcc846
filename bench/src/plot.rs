//! Pictures: a bar for each contender's median, with its interval.

use std::path::Path;

use anyhow::Result;
use plotters::{
    coord::Shift,
    drawing::DrawingAreaErrorKind,
    prelude::{
        BLACK, ChartBuilder, DrawingArea, IntoDrawingArea, IntoLogRange, LineSeries, PathElement,
        RGBColor, Rectangle, SVGBackend, SeriesLabelPosition, Text, WHITE,
    },
    style::{
        Color, IntoFont, TextStyle,
        text_anchor::{HPos, Pos, VPos},
    },
};

use crate::{
    report,
    turns::{Metric, Outcome, Turns},
};

/// Ways of Penstock's, of kube-proxy's, and all others.
const OURS: RGBColor = RGBColor(40, 100, 180);
const KUBE_PROXY: RGBColor = RGBColor(225, 145, 60);
const OTHERS: RGBColor = RGBColor(165, 165, 165);
/// Pixels.
const WIDTH: i32 = 860;
const HEADING: i32 = 34;
const BAR: i32 = 22;
/// Where bars begin, and how long the longest is.
const LEFT: i32 = 270;
const LENGTH: i32 = 310;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Drawing fails where writing does.
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws an outcome into a file: a panel for each metric.
pub fn draw(path: &Path, outcome: &Outcome) -> Result<()> {
    let panel = HEADING + BAR * outcome.turns.len() as i32 + BAR / 2;
    let height = 2 * HEADING + panel * outcome.metrics.len() as i32;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let (title, what) = (&outcome.title, &outcome.what);
    label(&area, title, (20, HEADING * 2 / 3), HPos::Left, 19)?;
    label(&area, what, (20, HEADING * 3 / 2), HPos::Left, 15)?;
    for (number, metric) in outcome.metrics.iter().enumerate() {
        bars(&area, outcome, *metric, 2 * HEADING + panel * number as i32)?;
    }
    area.present()?;
    Ok(())
}

/// A number as it is read easily: three digits at least that count, and thousands apart.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        small if small < 10.0 => 2,
        small if small < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
    let mut shown = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    if !rest.is_empty() {
        shown.push('.');
        shown.push_str(rest);
    }
    shown
}

/// What stands behind a bar: the median, and for a way of Penstock's how much of kube-proxy's that is, where
/// that can be told.
fn behind(outcome: &Outcome, turns: &Turns, metric: Metric, scale: f64) -> String {
    let mut text = number(turns.median(metric).value / scale);
    if turns.is_ours() {
        let ratios = report::ratios_to_kube_proxy(outcome, turns, metric);
        let ratios: Vec<String> = ratios
            .into_iter()
            .filter(|(_, ratio)| ratio.is_sized())
            .map(|(mode, ratio)| format!("{:.2} × {mode}", ratio.value))
            .collect();
        if !ratios.is_empty() {
            text.push_str(&format!("  ({})", ratios.join(", ")));
        }
    }
    text
}

fn bars(area: &Area, outcome: &Outcome, metric: Metric, top: i32) -> Drawn {
    let (unit, scale) = report::unit(outcome, metric);
    let heading = format!("{}, {unit} ({})", metric.name(), metric.better());
    label(area, &heading, (LEFT, top + HEADING / 2), HPos::Left, 14)?;
    let medians: Vec<_> = outcome
        .turns
        .iter()
        .map(|turns| turns.median(metric))
        .collect();
    let most = medians.iter().map(|median| median.high).fold(0.0, f64::max);
    let at = |value: f64| LEFT + (value / most * f64::from(LENGTH)) as i32;
    for (number, (turns, median)) in outcome.turns.iter().zip(&medians).enumerate() {
        let middle = top + HEADING + BAR * number as i32 + BAR / 2;
        label(area, &turns.contender, (LEFT - 10, middle), HPos::Right, 14)?;
        let colour = match turns.mode() {
            _ if turns.is_ours() => OURS,
            Some(_) => KUBE_PROXY,
            None => OTHERS,
        };
        let corners = [
            (LEFT, middle - BAR / 3),
            (at(median.value), middle + BAR / 3),
        ];
        area.draw(&Rectangle::new(corners, colour.filled()))?;
        let (low, high) = (at(median.low), at(median.high));
        for line in [
            [(low, middle), (high, middle)],
            [(low, middle - 4), (low, middle + 4)],
            [(high, middle - 4), (high, middle + 4)],
        ] {
            area.draw(&PathElement::new(line, BLACK.stroke_width(1)))?;
        }
        let text = behind(outcome, turns, metric, scale);
        label(area, &text, (high + 8, middle), HPos::Left, 13)?;
    }
    Ok(())
}

/// The trial whose median is shown by the number of services.
pub const GROWING: &str = "TCP connect, request, close, one processor for both";
/// The lines of a picture's ways, in their order.
const LINES: [RGBColor; 8] = [
    RGBColor(190, 190, 190),
    RGBColor(110, 110, 110),
    RGBColor(30, 80, 160),
    RGBColor(100, 160, 220),
    RGBColor(200, 80, 60),
    RGBColor(150, 60, 50),
    RGBColor(140, 80, 160),
    RGBColor(225, 145, 60),
];

/// Draws how long connecting takes by the number of services, where the last of them is asked, if two
/// numbers or more were measured; whether they were.
pub fn growth(path: &Path, outcomes: &[Outcome]) -> Result<bool> {
    let mut lines: Vec<(&str, Vec<(f64, f64)>)> = Vec::new();
    for outcome in outcomes.iter().filter(|one| one.what == GROWING) {
        let Some(count) = asked_last(&outcome.title) else {
            continue;
        };
        for turns in &outcome.turns {
            let point = (count, turns.median(Metric::P50).value / 1e3);
            match lines.iter_mut().find(|(name, _)| *name == turns.contender) {
                Some((_, points)) => points.push(point),
                None => lines.push((&turns.contender, vec![point])),
            }
        }
    }
    let points = || lines.iter().flat_map(|(_, points)| points);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(0.0, f64::max);
    let (counts, micros) = (most(|point| point.0), most(|point| point.1));
    if counts <= 1.0 || !lines.iter().any(|(_, points)| points.len() > 1) {
        return Ok(false);
    }
    let least = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let area = SVGBackend::new(path, (WIDTH as u32, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(report::GROWTH, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(
            (1.0..counts * 1.2).log_scale(),
            (decade(least, f64::floor)..decade(micros, f64::ceil)).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("services")
        .y_desc("p50 in µs, less is better")
        .x_label_formatter(&|count| format!("{count:.0}"))
        .y_label_formatter(&|micros| format!("{micros:.0}"))
        .draw()?;
    for ((name, points), colour) in lines.iter().zip(LINES.iter().cycle()) {
        let colour = *colour;
        chart
            .draw_series(
                LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3),
            )?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(true)
}

/// The power of ten at one side of a value: a logarithmic scale has numbers at these.
fn decade(value: f64, side: fn(f64) -> f64) -> f64 {
    10_f64.powf(side(value.log10()))
}

/// How many services there are where the last one is asked, or the only one.
pub fn asked_last(title: &str) -> Option<f64> {
    if title == "1 service" {
        return Some(1.0);
    }
    let count = title.strip_suffix(" services, the last")?;
    count.parse().ok()
}

fn label(area: &Area, text: &str, at: (i32, i32), horizontal: HPos, size: i32) -> Drawn {
    let style: TextStyle = ("sans-serif", size).into_font().into();
    let style = style.pos(Pos::new(horizontal, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(title: &str, nanos: u64) -> Outcome {
        let turns = [("direct", 20_000), ("other", nanos)];
        Outcome::of(title, GROWING, Metric::P50, &turns)
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.5, 9.994, 12.34, 999.6, 12_345.6, 1_234_567.0].map(number);
        let expected = ["0.50", "9.99", "12.3", "1,000", "12,346", "1,234,567"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn bars_say_how_much_of_kube_proxys_they_are() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("bars.svg");
        let rates = [
            ("kube-proxy, iptables", 400_000),
            ("kube-proxy's rules, nftables", 500_000),
            ("Penstock, XDP", 1_500_000),
            ("no service", 900_000),
        ];
        let outcome = Outcome::of("Packets", "UDP packets", Metric::Packets, &rates);
        draw(&path, &outcome)?;
        let text = std::fs::read_to_string(&path)?;
        for wanted in [
            "1,500  (3.75 × iptables, 3.00 × nftables)",
            "UDP packets",
            "900",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in {text}");
        }
        Ok(())
    }

    #[test]
    fn growth_is_drawn_where_there_is_some() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("growth.svg");
        let one = outcome("1 service", 30_000);
        assert!(!growth(&path, std::slice::from_ref(&one))?);
        assert!(!path.exists());
        let first = outcome("1000 services, the first", 30_000);
        let last = outcome("1000 services, the last", 60_000);
        assert!(growth(&path, &[one, first, last])?);
        let text = std::fs::read_to_string(&path)?;
        for name in ["direct", "other", report::GROWTH, "10", "100"] {
            assert!(text.contains(name), "{name} is not in the picture");
        }
        Ok(())
    }
}
