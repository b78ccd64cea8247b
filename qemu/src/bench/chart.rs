//! The results as a bar chart: for each benchmark a bar for this kernel and one for Linux, on a logarithmic scale.

use super::linux::{KERNELS, Table};
use super::{Results, report};
use svg::Document;
use svg::node::element::{Line, Rectangle, Text, Title};

const LEFT: f64 = 200.0;
const WIDTH: f64 = 640.0;
const RIGHT: f64 = 80.0;
const TOP: f64 = 56.0;
const BAR: f64 = 9.0;
const GAP: f64 = 12.0;
const OURS: &str = "#1b6ca8";
const LINUX: &str = "#b8b8b8";

/// The chart as an SVG file's text: instructions for one operation.
pub fn svg(results: &Results, linux: &Table) -> String {
    let rows: Vec<(String, f64, Option<f64>)> = report::sorted(results, linux)
        .into_iter()
        .filter_map(|one| {
            let row = linux.row(&one.name, "instructions");
            Some((report::label(one), one.instructions?, row.and_then(|row| row.linux(one.mode)[0])))
        })
        .collect();
    let most = rows.iter().map(|(_, ours, linux)| ours.max(linux.unwrap_or(0.0))).fold(10.0, f64::max);
    let decades = most.log10().ceil().max(1.0);
    // From one instruction to the most, a decade each.
    let x = |value: f64| LEFT + WIDTH * value.max(1.0).log10() / decades;
    let height = TOP + rows.len() as f64 * (2.0 * BAR + GAP) + 24.0;
    let mut chart = Document::new()
        .set("viewBox", (0, 0, LEFT + WIDTH + RIGHT, height))
        .set("width", LEFT + WIDTH + RIGHT)
        .set("height", height)
        .set("font-family", "sans-serif")
        .set("font-size", 11)
        .add(Title::new("Instructions for one operation"))
        .add(Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white"))
        .add(text(LEFT, 18.0, "start", "Instructions for one operation (logarithmic; less is better)"));
    let legend = [(OURS, "Sluice".to_string(), 0.0), (LINUX, format!("Linux {}", KERNELS[0]), 80.0)];
    for (colour, name, at) in legend {
        chart = chart.add(bar(LEFT + at, 26.0, 10.0, colour)).add(text(LEFT + at + 14.0, 35.0, "start", &name));
    }
    for decade in 0..=decades as u32 {
        let at = x(10_f64.powi(decade as i32));
        let line = Line::new().set("x1", at).set("x2", at).set("y1", TOP - 6.0).set("y2", height - 20.0);
        chart = chart.add(line.set("stroke", "#e4e4e4"));
        chart = chart.add(text(at, height - 6.0, "middle", &format!("{}", 10_u64.pow(decade))));
    }
    for (index, (name, ours, linux)) in rows.iter().enumerate() {
        let y = TOP + index as f64 * (2.0 * BAR + GAP);
        chart = chart.add(text(LEFT - 8.0, y + BAR + 4.0, "end", name));
        for (value, colour, y) in [(Some(*ours), OURS, y), (*linux, LINUX, y + BAR)] {
            let Some(value) = value else { continue };
            chart = chart.add(bar(LEFT, y, x(value) - LEFT, colour));
            chart = chart.add(text(x(value) + 4.0, y + BAR, "start", &format!("{value:.0}")));
        }
    }
    chart.to_string() + "\n"
}

fn bar(x: f64, y: f64, width: f64, colour: &str) -> Rectangle {
    Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", BAR).set("fill", colour)
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> Text {
    Text::new(words).set("x", x).set("y", y).set("text-anchor", anchor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Measured, Mode};

    #[test]
    fn every_benchmark_has_its_bars() {
        let measured = |name: &str| Measured {
            name: name.into(),
            mode: Mode::Strict,
            instructions: Some(300.0),
            commands: Some(2.0),
            min: None,
            max: None,
            wall_ns: None,
        };
        let results = Results { measured: vec![measured("map4k"), measured("a & b")], failed: Vec::new() };
        let chart = svg(&results, &Table::read());
        assert!(chart.starts_with("<svg"), "{chart}");
        assert!(chart.contains("map4k") && chart.contains("a &amp; b") && chart.contains("3004"), "{chart}");
    }
}
