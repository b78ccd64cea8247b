//! The results as a bar chart: for each benchmark a bar for this kernel, below it thinner ones for Linux strict, lazy and
//! passthrough, and a mark at what is to be reached, all on one logarithmic scale.

use super::linux::{KERNELS, Table};
use super::{Measured, Mode, Results, report};
use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text, Title};

const LEFT: f64 = 236.0;
const WIDTH: f64 = 620.0;
const RIGHT: f64 = 88.0;
const TOP: f64 = 116.0;
const BOTTOM: f64 = 64.0;
/// Heights of bars, and what lies between benchmarks.
const BAR: f64 = 13.0;
const THIN: f64 = 6.0;
const GAP: f64 = 16.0;
/// Height of a headline between groups.
const HEADLINE: f64 = 28.0;

const INK: &str = "#22303c";
const FAINT: &str = "#6b7785";
const GRID: &str = "#e3e7eb";
const OURS: &str = "#11698e";
const TARGET: &str = "#d1495b";
/// Linux, by mode.
const LINUX: [(Mode, &str, &str); 3] =
    [(Mode::Strict, "#8d99a6", "strict"), (Mode::Lazy, "#b4bec8", "lazy"), (Mode::Direct, "#d6dce2", "passthrough")];

/// One benchmark in one mode, with the figures beside it.
struct Row<'a> {
    one: &'a Measured,
    ours: f64,
    linux: Vec<(&'static str, f64)>,
    target: Option<f64>,
}

impl<'a> Row<'a> {
    fn new(one: &'a Measured, table: &Table) -> Option<Self> {
        let row = table.row(&one.name, "instructions");
        // Beside what is strict here stands everything that Linux can do; beside the rest, the same mode.
        let beside = LINUX.iter().filter(|(mode, ..)| one.mode == Mode::Strict || *mode == one.mode);
        let linux = beside.filter_map(|(mode, colour, _)| Some((*colour, row?.linux(*mode)[0]?))).collect();
        Some(Self { one, ours: one.instructions?, linux, target: row.and_then(|row| row.target(one.mode)) })
    }

    fn height(&self) -> f64 {
        BAR + THIN * self.linux.len() as f64 + GAP
    }

    fn most(&self) -> f64 {
        self.linux.iter().map(|(_, value)| *value).chain(self.target).fold(self.ours, f64::max)
    }
}

/// From instructions to places on the drawing.
struct Scale {
    /// Powers of ten: the first and the last.
    from: i32,
    to: i32,
}

impl Scale {
    fn of(rows: &[Row<'_>]) -> Self {
        let most = rows.iter().map(Row::most).fold(100.0, f64::max);
        let least =
            rows.iter().map(|row| row.target.map_or(row.ours, |target| target.min(row.ours))).fold(most, f64::min);
        Self { from: least.max(1.0).log10().floor() as i32, to: most.log10().ceil() as i32 }
    }

    fn x(&self, value: f64) -> f64 {
        let share = (value.max(1.0).log10() - f64::from(self.from)) / f64::from((self.to - self.from).max(1));
        LEFT + WIDTH * share.clamp(0.0, 1.0)
    }
}

/// The chart as an SVG file's text: instructions for one operation.
pub fn svg(results: &Results, linux: &Table) -> String {
    let rows: Vec<Row<'_>> =
        report::sorted(results, linux).into_iter().filter_map(|one| Row::new(one, linux)).collect();
    let scale = Scale::of(&rows);
    let mut modes: Vec<Mode> = rows.iter().map(|row| row.one.mode).collect();
    modes.dedup();
    let body: f64 = rows.iter().map(Row::height).sum::<f64>() + HEADLINE * modes.len() as f64;
    let (width, height) = (LEFT + WIDTH + RIGHT, TOP + body + BOTTOM);
    let mut chart = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("height", height)
        .set("font-family", "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif")
        .set("font-size", 12)
        .set("fill", INK)
        .add(Title::new("Instructions for one operation, Sluice and Linux"))
        .add(Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white"))
        .add(legend())
        .add(grid(&scale, TOP + body));
    let (mut y, mut mode) = (TOP, None);
    for row in &rows {
        if mode != Some(row.one.mode) {
            mode = Some(row.one.mode);
            chart = chart.add(text(24.0, y + 17.0, "start", headline(row.one.mode)).set("font-weight", "bold"));
            y += HEADLINE;
        }
        chart = chart.add(bars(row, &scale, y));
        y += row.height();
    }
    let words = "Logarithmic scale. Counted by the emulated processor (QEMU, cortex-a57, SMMUv3), the same machine for both; \
                 Linux's block figures include its block layer.";
    chart.add(text(24.0, height - 18.0, "start", words).set("font-size", 10.5).set("fill", FAINT)).to_string() + "\n"
}

fn headline(mode: Mode) -> &'static str {
    match mode {
        Mode::Strict => "Strict: what comes back is out of the device\u{2019}s reach",
        Mode::Lazy => "Lazy: out of reach a batch at a time",
        Mode::Direct => "Direct: the IOMMU lets the device through",
    }
}

fn legend() -> Group {
    let title = text(24.0, 34.0, "start", "Instructions for one operation: less is better");
    let mut group = Group::new().add(title.set("font-size", 18).set("font-weight", "bold"));
    let names = LINUX.iter().map(|(_, colour, name)| (*colour, format!("Linux {} {name}", KERNELS[0])));
    let mut at = 24.0;
    for (colour, name) in [(OURS, "Sluice".to_string())].into_iter().chain(names) {
        group = group.add(bar(at, 54.0, 14.0, 12.0, colour)).add(text(at + 20.0, 64.5, "start", &name));
        at += 46.0 + 7.2 * name.chars().count() as f64;
    }
    group.add(mark(at + 4.0, 52.0, 68.0)).add(text(at + 14.0, 64.5, "start", "target"))
}

fn grid(scale: &Scale, bottom: f64) -> Group {
    let mut group = Group::new();
    for power in scale.from..=scale.to {
        let x = scale.x(10_f64.powi(power));
        let line = Line::new().set("x1", x).set("x2", x).set("y1", TOP - 14.0).set("y2", bottom);
        group = group.add(line.set("stroke", GRID));
        for y in [TOP - 20.0, bottom + 16.0] {
            group = group.add(text(x, y, "middle", &grouped(10_f64.powi(power))).set("fill", FAINT));
        }
    }
    group
}

fn bars(row: &Row<'_>, scale: &Scale, top: f64) -> Group {
    let end = scale.x(row.ours);
    let mut group = Group::new().add(text(LEFT - 10.0, top + BAR - 2.0, "end", &row.one.name)).add(bar(
        LEFT,
        top,
        end - LEFT,
        BAR,
        OURS,
    ));
    let mut y = top + BAR;
    for (colour, value) in &row.linux {
        group = group.add(bar(LEFT, y, scale.x(*value) - LEFT, THIN, colour));
        y += THIN;
    }
    if let Some(target) = row.target {
        group = group.add(mark(scale.x(target), top - 3.0, y + 2.0));
    }
    // The label of our bar keeps clear of the mark; Linux's stands at the end of its longest bar.
    let clear = row.target.map(|target| scale.x(target)).filter(|at| (end..end + 50.0).contains(at)).unwrap_or(end);
    let ours = text(clear.max(end) + 6.0, top + BAR - 2.5, "start", &grouped(row.ours)).set("font-weight", "bold");
    group = group.add(ours.set("fill", OURS));
    if let Some(longest) = row.linux.iter().map(|(_, value)| *value).reduce(f64::max) {
        let at = text(scale.x(longest) + 6.0, top + BAR + THIN + 4.5, "start", &grouped(longest));
        group = group.add(at.set("font-size", 10.5).set("fill", FAINT));
    }
    group
}

/// A number with its thousands apart.
fn grouped(value: f64) -> String {
    report::grouped(value, "\u{202f}")
}

fn mark(x: f64, from: f64, to: f64) -> Line {
    let line = Line::new().set("x1", x).set("x2", x).set("y1", from).set("y2", to);
    line.set("stroke", TARGET).set("stroke-width", 2.5)
}

fn bar(x: f64, y: f64, width: f64, height: f64, colour: &str) -> Rectangle {
    Rectangle::new().set("x", x).set("y", y).set("width", width.max(1.0)).set("height", height).set("fill", colour)
}

fn text(x: f64, y: f64, anchor: &str, words: &str) -> Text {
    Text::new(words).set("x", x).set("y", y).set("text-anchor", anchor)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let results = Results { measured: vec![measured("map4k"), measured("a & b")], ..Results::default() };
        let chart = svg(&results, &Table::read());
        assert!(chart.starts_with("<svg"), "{chart}");
        assert!(chart.contains("map4k") && chart.contains("a &amp; b"), "{chart}");
        assert!(chart.contains("3\u{202f}004"), "Linux, strict: {chart}");
        // Two of ours, three of Linux beside the one that it has, and the legend's four; one white ground.
        assert_eq!(chart.matches("<rect").count(), 2 + 3 + 4 + 1, "{chart}");
        // A target, and that of the legend.
        assert_eq!(chart.matches(TARGET).count(), 2, "{chart}");
    }
}
