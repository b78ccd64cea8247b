//! Every topology on several QEMUs, and the table of it in README.md.

use crate::arm64_image::KERNEL;
use crate::cli::{MatrixOptions, TopologiesOptions};
use crate::demo::Verdict;
use crate::disk;
use crate::emulator::Emulator;
use crate::firmware::{self, workspace};
use crate::machine::{Disk, Machine};
use crate::progress::Progress;
use crate::setup;
use crate::topology::{TOPOLOGIES, Topology};
use crate::trial::{self, Expect};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

/// What encloses the table.
const BEGIN: &str = "<!-- matrix: written by `cargo run -- matrix --update` -->\n";
const END: &str = "<!-- end of matrix -->\n";

/// How many machines run at a time: each has several threads of its own.
const AT_ONCE: usize = 2;

/// What came of a topology on a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// What was expected.
    Held(Expect),
    /// This QEMU has no such machine, with what is missing.
    Absent(String),
    /// Something else, with all that is known.
    Failed(String),
}

impl Outcome {
    /// The word for it in the table.
    fn word(&self) -> &'static str {
        match self {
            Self::Held(Expect::Picture) => "yes",
            Self::Held(Expect::Refusal(_)) => "refused",
            Self::Absent(_) => "-",
            Self::Failed(_) => "FAILED",
        }
    }
}

/// Runs the main job on a machine of this shape, and judges it.
pub fn outcome(topology: &Topology, emulator: &Emulator, image: &Path, disk: &Disk, patience: Duration) -> Outcome {
    let attempt = || -> Result<Outcome> {
        if let Some(missing) = topology.missing(emulator)? {
            return Ok(Outcome::Absent(missing));
        }
        let machine = Machine { disk: Some(disk.clone()), ..Machine::default() };
        let ran = trial::run(emulator, &topology.machine(machine, emulator)?, image, patience)?;
        Ok(match topology.judge(&ran) {
            Ok(()) => Outcome::Held(topology.expect),
            Err(problem) => Outcome::Failed(problem),
        })
    };
    attempt().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")))
}

/// Lists the topologies, and what of them this QEMU does not have.
pub fn list(options: &TopologiesOptions) -> Result<()> {
    let mut progress = Progress::new();
    let emulator = setup::emulator(options.qemu.as_deref(), options.yes, false, &mut progress)?;
    progress.step(&format!("asking QEMU {} what it has", emulator.version));
    let width = TOPOLOGIES.iter().map(|topology| topology.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for topology in TOPOLOGIES {
        let refused = if topology.expect == Expect::Picture { "" } else { "; the kernel refuses" };
        let missing = topology.missing(&emulator)?.map(|missing| format!(" (not here: {missing})")).unwrap_or_default();
        let _ = writeln!(text, "{:<width$}  {}{refused}{missing}", topology.name, topology.about);
    }
    progress.clear();
    // Whoever reads may stop when they have seen enough.
    let _ = std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes());
    Ok(())
}

/// Runs every topology on every QEMU, and prints the table; with `--update` it goes into README.md.
pub fn run(options: &MatrixOptions) -> Result<Verdict> {
    let mut progress = Progress::new();
    let emulators = if options.qemu.is_empty() {
        vec![setup::emulator(None, options.yes, false, &mut progress)?]
    } else {
        options.qemu.iter().map(|path| Emulator::inspect(path)).collect::<Result<_>>()?
    };
    setup::rust_target(workspace(), &mut progress)?;
    let firmware = firmware::build(KERNEL.0, KERNEL.1, &mut progress)?;
    let disk = Disk::open(&disk::cached(&firmware, &mut progress)?)?;
    let patience = Duration::from_secs(options.timeout);
    let mut columns = Vec::new();
    for emulator in &emulators {
        columns.push(column(emulator, &firmware.image, &disk, patience, &mut progress));
    }
    progress.clear();
    let text = table(&emulators, &columns);
    let _ = std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes());
    let mut verdict = Verdict::Success;
    for (emulator, column) in emulators.iter().zip(&columns) {
        for (topology, outcome) in TOPOLOGIES.iter().zip(column) {
            if let Outcome::Failed(problem) = outcome {
                eprintln!("\n{} on QEMU {}: {problem}", topology.name, emulator.version);
                verdict = Verdict::Failure;
            }
        }
    }
    if options.update {
        update(&text)?;
    }
    Ok(verdict)
}

/// Runs every topology on one QEMU.
fn column(emulator: &Emulator, image: &Path, disk: &Disk, patience: Duration, progress: &mut Progress) -> Vec<Outcome> {
    let next = Mutex::new(TOPOLOGIES.iter().enumerate());
    let mut outcomes: Vec<Option<Outcome>> = vec![None; TOPOLOGIES.len()];
    std::thread::scope(|scope| {
        let (sender, ended) = channel();
        for _ in 0..AT_ONCE {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                let take = || next.lock().ok().and_then(|mut rest| rest.next());
                while let Some((index, topology)) = take() {
                    let outcome = outcome(topology, emulator, image, disk, patience);
                    if sender.send((index, outcome)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (count, (index, outcome)) in ended.iter().enumerate() {
            if let Some((topology, place)) = TOPOLOGIES.get(index).zip(outcomes.get_mut(index)) {
                let (count, all) = (count + 1, TOPOLOGIES.len());
                progress.step(&format!(
                    "QEMU {}: {count} of {all}, {}: {}",
                    emulator.version,
                    topology.name,
                    outcome.word()
                ));
                *place = Some(outcome);
            }
        }
    });
    let lost = || Outcome::Failed("it was not run".into());
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(lost)).collect()
}

/// The table, a row for each topology and a column for each QEMU.
fn table(emulators: &[Emulator], columns: &[Vec<Outcome>]) -> String {
    let versions = emulators.iter().map(|emulator| format!(" QEMU {}.{} |", emulator.version.0, emulator.version.1));
    let mut text = format!("| `--topology` | the machine |{}\n|---|---|", versions.collect::<String>());
    text.extend(emulators.iter().map(|_| ":-:|"));
    text.push('\n');
    for (index, topology) in TOPOLOGIES.iter().enumerate() {
        let words = columns.iter().map(|column| column.get(index).map_or("", Outcome::word));
        let cells: String = words.map(|word| format!(" {word} |")).collect();
        let _ = writeln!(text, "| `{}` | {} |{cells}", topology.name, topology.about);
    }
    text
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

fn update(table: &str) -> Result<()> {
    let file = path();
    let text = std::fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?;
    let text = replaced(&text, table).with_context(|| format!("{} has no place for the matrix", file.display()))?;
    std::fs::write(&file, text).with_context(|| format!("{} cannot be written", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::Version;

    /// Red where a topology was added, renamed or described anew and `cargo run -- matrix --update` was forgotten.
    #[test]
    fn the_readme_has_every_topology_and_no_other_and_an_outcome_of_each() {
        let text = std::fs::read_to_string(path()).unwrap();
        let (_, rest) = text.split_once(BEGIN).expect("a place for the matrix");
        let (table, _) = rest.split_once(END).expect("the end of the matrix");
        let rows: Vec<Vec<&str>> = table.lines().skip(2).map(|row| row.split('|').map(str::trim).collect()).collect();
        let names: Vec<String> = TOPOLOGIES.iter().map(|topology| format!("`{}`", topology.name)).collect();
        assert_eq!(rows.iter().map(|row| row[1]).collect::<Vec<_>>(), names, "cargo run -- matrix --update");
        let columns = table.lines().next().unwrap_or_default().matches(" QEMU ").count();
        for (row, topology) in rows.iter().zip(TOPOLOGIES) {
            assert_eq!(row[2], topology.about, "cargo run -- matrix --update");
            let expected = Outcome::Held(topology.expect);
            let known = |cell: &&str| [expected.word(), "-", "FAILED"].contains(cell);
            let cells = &row[3..row.len() - 1];
            assert!(cells.len() == columns && columns > 0 && cells.iter().all(known), "{row:?}");
        }
    }

    #[test]
    fn a_table_says_what_came_of_each_topology_on_each_qemu() {
        let emulator = |version| Emulator { program: "qemu".into(), version, bounce_buffer_limit: true };
        let emulators = [emulator(Version(7, 2, 22)), emulator(Version(10, 0, 2))];
        let mut column = vec![Outcome::Held(Expect::Picture); TOPOLOGIES.len()];
        let other = column.clone();
        column[0] = Outcome::Absent("no".into());
        column[1] = Outcome::Failed("no".into());
        column[2] = Outcome::Held(Expect::Refusal("x"));
        let text = table(&emulators, &[column, other]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("| QEMU 7.2 | QEMU 10.0 |"), "{text}");
        assert!(lines[2].ends_with(" | - | yes |") && lines[3].ends_with(" | FAILED | yes |"), "{text}");
        assert!(lines[4].ends_with(" | refused | yes |"), "{text}");
        assert_eq!(lines.len(), TOPOLOGIES.len() + 2);
    }

    #[test]
    fn a_readme_without_a_place_for_the_matrix_is_left_alone() {
        assert_eq!(replaced("nothing", "table"), None);
        assert_eq!(replaced(&format!("a\n{BEGIN}old{END}b\n"), "new\n"), Some(format!("a\n{BEGIN}new\n{END}b\n")));
    }
}
