//! Pictures: a bar for each contender's median, with its interval.

use std::path::Path;

use anyhow::Result;
use plotters::{
    coord::Shift,
    drawing::DrawingAreaErrorKind,
    prelude::{
        BLACK, DrawingArea, IntoDrawingArea, PathElement, RGBColor, Rectangle, SVGBackend, Text,
        WHITE,
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

fn label(area: &Area, text: &str, at: (i32, i32), horizontal: HPos, size: i32) -> Drawn {
    let style: TextStyle = ("sans-serif", size).into_font().into();
    let style = style.pos(Pos::new(horizontal, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))
}
