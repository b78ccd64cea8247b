//! The table of figures in README.md, which is written from the checked-in figures, so that it says what they say.

use super::figures::Figures;
use super::linux::{KERNELS, Table};
use super::{Mode, report};
use crate::firmware::workspace;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::PathBuf;

/// What encloses the table.
const BEGIN: &str = "<!-- figures: written by `cargo run -- bench --update` -->\n";
const END: &str = "<!-- end of figures -->\n";

/// The benchmarks of the table, and what they are called there.
const ROWS: [(&str, &str); 15] = [
    ("map4k", "map and unmap 4 KiB"),
    ("ring256_4k", "the same, oldest of 256"),
    ("map64k", "64 KiB"),
    ("map1m", "1 MiB"),
    ("map2m", "2 MiB, aligned"),
    ("sg16x4k", "list of 16 scattered pages"),
    ("sg256x4k", "list of 256 scattered pages"),
    ("sgc256x4k", "list of 256 adjacent pages"),
    ("coherent4k", "coherent 4 KiB, zeroed and freed"),
    ("coherent1m", "coherent 1 MiB"),
    ("iommu4k", "IOMMU-API, 4 KiB in a domain of one's own"),
    ("iova_to_phys", "look an address up"),
    ("blk_4k_randread_qd32", "disk: 4 KiB random read, 32 in flight"),
    ("blk_1m_contiguous", "disk: 1 MiB read into adjacent pages"),
    ("blk_1m_scattered", "disk: 1 MiB read into scattered pages"),
];

/// The table.
pub fn table(figures: &Figures, linux: &Table) -> String {
    let kernel = KERNELS[0];
    let mut text = format!(
        "| instructions | Sluice, strict | lazy | direct | Linux {kernel}, strict | lazy | passthrough |\n\
         |---|--:|--:|--:|--:|--:|--:|\n"
    );
    for (name, words) in ROWS {
        let row = linux.row(name, "instructions");
        let ours = Mode::USUAL.map(|mode| figures.instructions(name, mode));
        let theirs = Mode::USUAL.map(|mode| row.and_then(|row| row.linux(mode)[0]));
        let cells = ours.into_iter().chain(theirs).map(|value| value.map_or(String::new(), figure));
        let _ = writeln!(text, "| {words} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    if let Some(commands) = figures.commands("blk_4k_randread_qd32", Mode::Strict) {
        let _ = writeln!(
            text,
            "\nCommands to the SMMU for a 4 KiB read with 32 in flight: {commands:.2}, where Linux issues 2; what is returned \
             together is\nrevoked together, and nobody has a page back before."
        );
    }
    text
}

fn figure(value: f64) -> String {
    report::grouped(value, " ")
}

fn path() -> PathBuf {
    workspace().join("README.md")
}

/// Puts a table in the place of that in `readme`.
fn replaced(readme: &str, table: &str) -> Option<String> {
    let (before, rest) = readme.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

/// Writes the table of these figures into README.md.
pub fn update(figures: &Figures, linux: &Table) -> Result<()> {
    let file = path();
    let text = std::fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
    let text = replaced(&text, &table(figures, linux))
        .with_context(|| format!("{} has no place for the figures", file.display()))?;
    std::fs::write(&file, text).with_context(|| format!("{} cannot be written", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red with one digit of README.md changed.
    #[test]
    fn the_readme_says_what_the_checked_in_figures_say() {
        let text = std::fs::read_to_string(path()).unwrap();
        let expected = replaced(&text, &table(&Figures::read().unwrap(), &Table::read())).expect("a place for figures");
        assert_eq!(text, expected, "cargo run -- bench --update");
    }

    #[test]
    fn a_readme_without_a_place_for_the_figures_is_left_alone() {
        assert_eq!(replaced("nothing", "table"), None);
        assert_eq!(replaced(&format!("a\n{BEGIN}old{END}b\n"), "new\n"), Some(format!("a\n{BEGIN}new\n{END}b\n")));
    }
}
