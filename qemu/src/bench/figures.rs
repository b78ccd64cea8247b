//! The checked-in figures, and what has become worse.
//!
//! Instructions are exact for one image, whatever the machine: a figure that moves was moved by a change to the code.

use super::{Measured, Mode, Results};
use crate::emulator::Emulator;
use crate::firmware::workspace;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How far a figure may move, as a share of itself.
pub const TOLERANCE: f64 = 0.05;

/// What was measured when somebody last looked.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Figures {
    /// The QEMU that it was measured with.
    pub qemu: String,
    /// Instructions for one operation.
    pub figures: Vec<Figure>,
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The benchmark.
    pub name: String,
    /// The mode.
    pub mode: Mode,
    /// Instructions.
    pub instructions: f64,
    /// Commands to the SMMU.
    pub commands: f64,
}

/// What has moved by more than [`TOLERANCE`].
#[derive(Debug, Default, PartialEq)]
pub struct Moved {
    /// For the worse, or gone: a line each.
    pub worse: Vec<String>,
    /// For the better, or new.
    pub better: Vec<String>,
}

/// Where the figures are kept.
pub fn path() -> PathBuf {
    workspace().join("tests/bench/figures.json")
}

impl Figures {
    /// Reads the checked-in figures.
    pub fn read() -> Result<Self> {
        let file = path();
        let text = std::fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} makes no sense", file.display()))
    }

    fn find(&self, name: &str, mode: Mode) -> Option<&Figure> {
        self.figures.iter().find(|one| one.name == name && one.mode == mode)
    }

    /// Instructions for one operation.
    pub fn instructions(&self, name: &str, mode: Mode) -> Option<f64> {
        Some(self.find(name, mode)?.instructions)
    }

    /// Commands to the SMMU for one operation.
    pub fn commands(&self, name: &str, mode: Mode) -> Option<f64> {
        Some(self.find(name, mode)?.commands)
    }

    /// Takes over what was measured now; what was not is kept.
    pub fn update(&mut self, results: &Results, emulator: &Emulator) {
        self.qemu = emulator.version.to_string();
        for one in &results.measured {
            let (Some(instructions), Some(commands)) = (one.instructions, one.commands) else { continue };
            self.figures.retain(|old| (&old.name, old.mode) != (&one.name, one.mode));
            self.figures.push(Figure { name: one.name.clone(), mode: one.mode, instructions, commands });
        }
        self.figures.sort_by(|one, other| (&one.name, one.mode).cmp(&(&other.name, other.mode)));
    }

    /// Writes the figures, one a line so that a change is easy to read.
    pub fn write(&self) -> Result<()> {
        let lines: Result<Vec<String>, _> = self.figures.iter().map(serde_json::to_string).collect();
        let text = format!("{{\"qemu\":\"{}\",\"figures\":[\n{}\n]}}\n", self.qemu, lines?.join(",\n"));
        std::fs::write(path(), text).with_context(|| format!("{} cannot be written", path().display()))
    }

    /// Compares with what was measured now, in `modes`.
    pub fn compare(&self, measured: &[Measured], modes: &[Mode]) -> Moved {
        let mut moved = Moved::default();
        for old in self.figures.iter().filter(|old| modes.contains(&old.mode)) {
            let (name, mode, was) = (&old.name, old.mode, old.instructions);
            let now = measured.iter().find(|one| one.name == *name && one.mode == mode);
            let Some(now) = now.and_then(|one| one.instructions) else {
                moved.worse.push(format!("{name} {mode}: {was} instructions before, not measured now"));
                continue;
            };
            let line =
                format!("{name} {mode}: {was} instructions before, {now} now ({:+.1} %)", 100.0 * (now / was - 1.0));
            if now > was * (1.0 + TOLERANCE) {
                moved.worse.push(line);
            } else if now < was * (1.0 - TOLERANCE) {
                moved.better.push(line);
            }
        }
        for new in measured.iter().filter(|one| one.instructions.is_some()) {
            if !self.figures.iter().any(|old| old.name == new.name && old.mode == new.mode) {
                moved.better.push(format!("{} {}: new", new.name, new.mode));
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(instructions: f64) -> Measured {
        let (name, mode) = ("map".to_string(), Mode::Strict);
        Measured {
            name,
            mode,
            instructions: Some(instructions),
            commands: Some(2.0),
            min: None,
            max: None,
            wall_ns: None,
        }
    }

    fn moved(before: f64, now: &[Measured]) -> (usize, usize) {
        let figure = Figure { name: "map".into(), mode: Mode::Strict, instructions: before, commands: 2.0 };
        let moved = Figures { qemu: String::new(), figures: vec![figure] }.compare(now, &[Mode::Strict]);
        (moved.worse.len(), moved.better.len())
    }

    #[test]
    fn what_moves_by_more_than_a_twentieth_is_told() {
        assert_eq!(moved(100.0, &[measured(105.0)]), (0, 0));
        assert_eq!(moved(100.0, &[measured(105.1)]), (1, 0));
        assert_eq!(moved(100.0, &[measured(95.0)]), (0, 0));
        assert_eq!(moved(100.0, &[measured(94.0)]), (0, 1));
        assert_eq!(moved(100.0, &[]), (1, 0));
    }
}
