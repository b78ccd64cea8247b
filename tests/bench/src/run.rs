//! Choosing benchmarks, and running one after the other.

use crate::stand::{Mode, Stand};
use crate::{blk, maps, owned, time};
use kernel::println;
use ktest::{Outcome, TestResult};
use virt::Boot;

/// A benchmark.
pub struct Benchmark {
    /// Its name in reports.
    pub name: &'static str,
    /// What it is about.
    pub about: About,
    /// The modes in which it means something.
    pub modes: &'static [Mode],
    /// Measures, and reports by [`Stand::measure`].
    pub run: fn(&Stand) -> TestResult,
}

/// What a benchmark is about, and so what can be counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// The processor's own work: instructions exactly, or time.
    Memory,
    /// Work around what a device does in its own time.
    Device,
    /// Nothing but time.
    Time,
}

impl About {
    /// Whether it is measured by this clock.
    fn suits(self, clock: &str) -> bool {
        match self {
            Self::Memory => clock != "work",
            Self::Device => clock != "instructions",
            Self::Time => clock == "wall",
        }
    }
}

/// Modes of benchmarks that end nothing lazily.
pub const AT_ONCE: &[Mode] = &[Mode::Strict, Mode::Direct];

/// The benchmark that has to be named: a first read is the first of a machine that does nothing else.
pub const FIRST_READ: &str = "first_read";

/// In place of names: say which there are.
const LIST: &str = "?";

/// Every benchmark.
const ALL: &[&[Benchmark]] = &[maps::ALL, owned::ALL, blk::ALL, time::ALL];

/// The value of `key` on the command line.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// What the image runs.
pub fn main(boot: &'static Boot) -> u32 {
    let line = &boot.machine.chosen.bootargs;
    let names = value(line, "bench");
    let selected = |name: &str| match names {
        Some(names) if names != LIST => names.split(',').any(|one| one == name),
        _ => name != FIRST_READ,
    };
    let clock = value(line, "bench.clock").unwrap_or("wall");
    let mode = match value(line, "bench.mode").unwrap_or("strict") {
        "strict" => Mode::Strict,
        "lazy" => Mode::Lazy,
        "direct" => Mode::Direct,
        other => {
            println!("error: bench.mode={other} is none of strict, lazy, direct");
            return 1;
        }
    };
    let chosen = || {
        let all = ALL.iter().copied().flatten();
        let suits = |one: &&Benchmark| one.modes.contains(&mode) && one.about.suits(clock);
        all.filter(move |one| suits(one) && selected(one.name))
    };
    if names == Some(LIST) {
        println!("##bench plan 0");
        chosen().for_each(|benchmark| println!("##bench has {}", benchmark.name));
        return 0;
    }
    let stand = match Stand::bring_up(boot, mode) {
        Ok(stand) => stand,
        Err(error) => {
            println!("error: {error}");
            return 1;
        }
    };
    println!("##bench plan {}", chosen().count());
    let mut passed = true;
    for benchmark in chosen() {
        println!("##bench start {}", benchmark.name);
        match (benchmark.run)(&stand) {
            Ok(()) => {}
            Err(Outcome::Skipped(reason)) => println!("##bench skip {} {reason}", benchmark.name),
            Err(Outcome::Failed(message)) => {
                passed = false;
                println!("##bench fail {} {message}", benchmark.name);
            }
        }
    }
    println!("##bench commands {}", stand.finish());
    u32::from(!passed)
}
