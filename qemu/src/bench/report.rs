//! The results as a table.

use super::linux::{KERNELS, Row, Table};
use super::{Measured, Results, WALL_BOOTS};
use crate::emulator::Emulator;
use std::fmt::Write;

/// The results, in the order of Linux's table, by mode.
pub fn sorted<'a>(results: &'a Results, linux: &Table) -> Vec<&'a Measured> {
    let mut list: Vec<&Measured> = results.measured.iter().collect();
    list.sort_by_key(|one| (one.mode, linux.place(&one.name)));
    list
}

/// The whole report.
pub fn text(results: &Results, linux: &Table, emulator: &Emulator) -> String {
    let mut text = String::new();
    instructions(&mut text, results, linux);
    wall(&mut text, results, linux);
    if let Some((before, after)) = results.load {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let _ = writeln!(
            text,
            "\nWall time: medians of the fastest of {WALL_BOOTS} boots; this machine has {cores} cores, and its load was {before:.1} \
             before and {after:.1} after."
        );
    }
    let _ = writeln!(text, "\nSluice: QEMU {} (TCG), cortex-a57, medians.\nLinux: {}", emulator.version, linux.how);
    text
}

fn instructions(text: &mut String, results: &Results, linux: &Table) {
    let [old, new] = KERNELS;
    let head = ["min", "max", "commands"];
    let mut mode = None;
    for one in sorted(results, linux).into_iter().filter(|one| one.instructions.is_some()) {
        if mode != Some(one.mode) {
            mode = Some(one.mode);
            let title = format!("{}, instructions", one.mode);
            let _ = writeln!(
                text,
                "{title:<22}{:>10}{:>11}{:>11}{:>9}{:>11}{:>11}{:>8}{:>9}",
                "median",
                head[0],
                head[1],
                head[2],
                format!("Linux {old}"),
                format!("Linux {new}"),
                "ratio",
                "target"
            );
        }
        let row = linux.row(&one.name, "instructions");
        let figures = row.map_or([None; 2], |row| row.linux(one.mode));
        let _ = writeln!(
            text,
            "{:<22}{:>10}{:>11}{:>11}{:>9}{:>11}{:>11}{:>8}{:>9}{}",
            one.name,
            figure(one.instructions),
            figure(one.min),
            figure(one.max),
            one.commands.map_or(String::new(), |commands| format!("{commands:.2}")),
            figure(figures[0]),
            figure(figures[1]),
            ratio(figures[0], one.instructions),
            figure(row.and_then(|row| row.target(one.mode))),
            reached(row, one, one.instructions, false),
        );
    }
}

fn wall(text: &mut String, results: &Results, linux: &Table) {
    let mut begun = false;
    for one in sorted(results, linux).into_iter().filter(|one| one.wall_ns.is_some()) {
        let Some(ns) = one.wall_ns else { continue };
        if !begun {
            begun = true;
            let [old, new] = KERNELS;
            let (old, new) = (format!("Linux {old}"), format!("Linux {new}"));
            let _ = writeln!(text, "\n{:<30}{:>12}{:>16}{old:>12}{new:>12}{:>10}", "wall time", "ns", "", "target");
        }
        let (unit, value) = in_words(results, one, ns);
        let row = linux.row(&one.name, unit);
        let figures = row.map_or([None; 2], |row| row.linux(one.mode));
        let _ = writeln!(
            text,
            "{:<30}{:>12}{:>16}{:>12}{:>12}{:>10}{}",
            format!("{} {}", one.name, one.mode),
            figure(Some(ns)),
            if unit == "ns" { String::new() } else { format!("{} {unit}", figure(Some(value))) },
            figure(figures[0]),
            figure(figures[1]),
            figure(row.and_then(|row| row.target(one.mode))),
            reached(row, one, Some(value), unit != "ms"),
        );
    }
}

/// A time in the unit that the operation is known by.
fn in_words(results: &Results, one: &Measured, ns: f64) -> (&'static str, f64) {
    let alone =
        |name: &str| results.measured.iter().find(|other| other.name == name && other.mode == one.mode)?.wall_ns;
    // In the same boots, and so beside the same load of this machine.
    match (one.name.as_str(), alone("map4k_one_core")) {
        ("blk_4k_randread_qd32", _) => ("IOPS", 1e9 / ns),
        ("blk_1m_scattered" | "blk_1m_contiguous", _) => ("MB/s", f64::from(1 << 20) * 1e3 / ns),
        ("first_read", _) => ("ms", ns / 1e6),
        ("map4k_two_cores", Some(alone)) => ("times", alone / ns),
        _ => ("ns", ns),
    }
}

/// A mark where the target is missed.
fn reached(row: Option<&Row>, one: &Measured, value: Option<f64>, more_is_better: bool) -> &'static str {
    match (row.and_then(|row| row.target(one.mode)), value) {
        (Some(target), Some(value)) if (value > target) != more_is_better && value != target => "  missed",
        _ => "",
    }
}

/// A figure in as many digits as it deserves.
fn figure(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value.fract() == 0.0 || value >= 1000.0 => format!("{value:.0}"),
        Some(value) if value >= 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// A whole number, with `space` between its thousands.
pub(super) fn grouped(value: f64, space: &str) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push_str(space);
        }
        text.push(digit);
    }
    text
}

fn ratio(linux: Option<f64>, ours: Option<f64>) -> String {
    match (linux, ours) {
        (Some(linux), Some(ours)) if ours > 0.0 => format!("x{:.1}", linux / ours),
        _ => String::new(),
    }
}
