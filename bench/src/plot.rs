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
    turns::{Metric, Outcome},
};

/// The first contender, and the others.
const COLOURS: [RGBColor; 2] = [RGBColor(150, 150, 150), RGBColor(60, 110, 180)];
/// Pixels.
const WIDTH: i32 = 860;
const HEADING: i32 = 34;
const BAR: i32 = 22;
/// Where bars begin, and how long the longest is.
const LEFT: i32 = 300;
const LENGTH: i32 = 400;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Drawing fails where writing does.
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws all outcomes of a comparison into a file.
pub fn draw(path: &Path, title: &str, outcomes: &[&Outcome]) -> Result<()> {
    let panel = |outcome: &Outcome| HEADING + BAR * (outcome.turns.len() as i32 + 1);
    let panels = |outcome: &&Outcome| panel(outcome) * outcome.metrics.len() as i32;
    let height = HEADING + outcomes.iter().map(panels).sum::<i32>();
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    label(&area, title, (WIDTH / 2, HEADING / 2), HPos::Center, 20)?;
    let mut top = HEADING;
    for outcome in outcomes {
        for metric in &outcome.metrics {
            bars(&area, outcome, *metric, top)?;
            top += panel(outcome);
        }
    }
    area.present()?;
    Ok(())
}

fn bars(area: &Area, outcome: &Outcome, metric: Metric, top: i32) -> Drawn {
    let (unit, scale) = report::unit(outcome, metric);
    let better = if metric.is_less_better() {
        "less is better"
    } else {
        "more is better"
    };
    let heading = format!("{}, {} in {unit} ({better})", outcome.what, metric.name());
    label(area, &heading, (20, top + HEADING / 2), HPos::Left, 15)?;
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
        let [first, others] = COLOURS;
        let colour = if number == 0 { first } else { others };
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
        let value = format!("{:.2}", median.value / scale);
        label(area, &value, (high + 8, middle), HPos::Left, 13)?;
    }
    Ok(())
}

/// The trial whose median is shown by the number of services.
const GROWING: &str = "TCP connect, request, close, one processor for both";
/// The lines of a picture's ways, in their order.
const LINES: [RGBColor; 6] = [
    RGBColor(150, 150, 150),
    RGBColor(100, 160, 220),
    RGBColor(30, 80, 160),
    RGBColor(90, 60, 160),
    RGBColor(200, 80, 60),
    RGBColor(220, 150, 50),
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
fn asked_last(title: &str) -> Option<f64> {
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
    use crate::{load::Summary, turns::Turns};

    fn outcome(title: &str, nanos: u64) -> Outcome {
        let turns = |name: &str, p50| Turns {
            contender: name.to_owned(),
            summaries: vec![
                Summary {
                    p50,
                    ..Summary::default()
                };
                6
            ],
            evidence: Vec::new(),
        };
        Outcome {
            title: title.to_owned(),
            what: GROWING.to_owned(),
            metrics: vec![Metric::P50],
            turns: vec![turns("direct", 20_000), turns("other", nanos)],
        }
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
