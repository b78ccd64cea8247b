//! `cargo run -- bench`: what the kernel's way to memory costs, beside what Linux's costs on the same emulated machine.
//!
//! Instructions are exact: the machine counts them instead of time, so that two runs of one image say the same. Wall time is of
//! this machine, and only its ratios travel. What is measured stands in the image (`tests/bench`); here it is booted ([`boot`]),
//! compared with Linux ([`linux`]) and with what was measured before ([`figures`]), and told ([`report`], [`chart`], [`readme`]).

pub mod boot;
pub mod chart;
pub mod figures;
pub mod linux;
pub mod readme;
pub mod report;

use crate::cli::BenchOptions;
use crate::demo::Verdict;
use crate::emulator::Emulator;
use crate::firmware::{self, Firmware};
use crate::progress::Progress;
use crate::setup;
use anyhow::{Context, Result};
use boot::{Boot, Clock, FIRST_READ, LIST};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// The package with the benchmarks, and its binary.
pub const IMAGE: (&str, &str) = ("bench-image", "bench-image");

/// Boots of which the fastest counts, where time is measured.
pub const WALL_BOOTS: usize = 5;

/// How the memory of devices is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Mode {
    /// By the IOMMU, and what is taken back is out of reach before it is handed out
    Strict,
    /// By the IOMMU, and what is taken back is handed out when a batch of it is out of reach
    Lazy,
    /// Not at all: the IOMMU lets the devices through
    Direct,
}

impl Mode {
    /// The modes that are measured unless others are asked for.
    pub const USUAL: [Self; 3] = [Self::Strict, Self::Lazy, Self::Direct];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Lazy => "lazy",
            Self::Direct => "direct",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What one benchmark came to: figures for one operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Its name.
    pub name: String,
    /// How memory was protected.
    pub mode: Mode,
    /// Instructions, the median of the batches.
    pub instructions: Option<f64>,
    /// Commands to the SMMU.
    pub commands: Option<f64>,
    /// Instructions in the cheapest batch.
    pub min: Option<f64>,
    /// Instructions in the dearest batch.
    pub max: Option<f64>,
    /// Nanoseconds of this machine's time, the median of the batches, in the fastest of [`WALL_BOOTS`] boots.
    pub wall_ns: Option<f64>,
}

/// All that was measured, and what could not be.
#[derive(Debug, Default)]
pub struct Results {
    /// By benchmark and mode, each once.
    pub measured: Vec<Measured>,
    /// Benchmarks that failed, with what they said.
    pub failed: Vec<String>,
    /// Where time was measured: the load of this machine before and after.
    pub load: Option<(f64, f64)>,
}

impl Results {
    /// Adds what one boot measured.
    fn add(&mut self, mode: Mode, clock: Clock, result: boot::Figure) {
        let place = self.measured.iter().position(|one| one.name == result.name && one.mode == mode);
        let index = place.unwrap_or_else(|| {
            let name = result.name.clone();
            let (instructions, commands, min, max, wall_ns) = (None, None, None, None, None);
            self.measured.push(Measured { name, mode, instructions, commands, min, max, wall_ns });
            self.measured.len() - 1
        });
        let one = &mut self.measured[index];
        if clock == Clock::Wall {
            // Whatever else this machine does makes it slower: the fastest boot has least of that.
            one.wall_ns = Some(one.wall_ns.map_or(result.median, |best| best.min(result.median)));
            one.commands = one.commands.or(Some(result.commands));
        } else {
            one.instructions = Some(result.median);
            (one.min, one.max, one.commands) = (Some(result.min), Some(result.max), Some(result.commands));
        }
    }
}

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The benchmarks by name; all if there is none.
    pub names: Vec<String>,
    /// The modes.
    pub modes: Vec<Mode>,
    /// Whether time is measured too.
    pub wall: bool,
    /// How long one benchmark may take.
    pub patience: Duration,
}

/// Measures what `plan` says, each benchmark in a machine of its own: what it costs does not depend on what ran before. Fails if
/// the image cannot be booted; a benchmark that fails is told in the results.
pub fn measure(emulator: &Emulator, firmware: &Firmware, plan: &Plan, progress: &mut Progress) -> Result<Results> {
    let mut results = Results { load: plan.wall.then(load), ..Results::default() };
    for &mode in &plan.modes {
        let clocks = [Clock::Instructions, Clock::Work, Clock::Wall];
        for clock in clocks.into_iter().filter(|clock| plan.wall || *clock != Clock::Wall) {
            let run = |names: &[String], progress: &mut Progress| {
                let boot = Boot { emulator, firmware, mode, clock, names, patience: plan.patience, trace: None };
                boot.run(progress).with_context(|| format!("{mode}, {clock}: {}", names.join(", ")))
            };
            let mut names = run(&[LIST.to_string()], progress)?.names;
            if clock == Clock::Wall {
                names.push(FIRST_READ.to_string());
            }
            if !plan.names.is_empty() {
                names.retain(|name| plan.names.contains(name));
            }
            for name in names {
                for _ in 0..if clock == Clock::Wall { WALL_BOOTS } else { 1 } {
                    let told = run(std::slice::from_ref(&name), progress)?;
                    told.figures.into_iter().for_each(|figure| results.add(mode, clock, figure));
                    results.failed.extend(told.failed.into_iter().map(|what| format!("{mode}, {clock}: {what}")));
                }
            }
        }
    }
    if let Some((_, after)) = &mut results.load {
        *after = load().0;
    }
    Ok(results)
}

/// Processes of this machine that run or would like to, over a minute: twice, for before and after.
fn load() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(f64::NAN);
    (load, load)
}

/// Runs the command. An error means that the command line or the environment is at fault.
pub fn run(options: &BenchOptions) -> Result<Verdict> {
    let mut progress = Progress::new();
    let emulator = setup::emulator(options.qemu.as_deref(), options.yes, false, &mut progress)?;
    setup::rust_target(firmware::workspace(), &mut progress)?;
    let firmware = firmware::build(IMAGE.0, IMAGE.1, &mut progress)?;
    let modes = if options.mode.is_empty() { Mode::USUAL.to_vec() } else { options.mode.clone() };
    let patience = Duration::from_secs(options.timeout);
    let plan = Plan { names: options.names.clone(), modes, wall: options.wall, patience };
    let results = measure(&emulator, &firmware, &plan, &mut progress)?;
    progress.clear();
    let linux = linux::Table::read();
    print!("{}", report::text(&results, &linux, &emulator));
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&results.measured)? + "\n";
        std::fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))?;
    }
    if let Some(file) = &options.svg {
        std::fs::write(file, chart::svg(&results, &linux))
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    if options.update {
        let mut kept = figures::Figures::read().unwrap_or_default();
        kept.update(&results, &emulator);
        kept.write()?;
        readme::update(&kept, &linux)?;
        eprintln!("{} and the table of README.md are up to date", figures::path().display());
    }
    for failure in &results.failed {
        eprintln!("failed: {failure}");
    }
    Ok(if results.failed.is_empty() { Verdict::Success } else { Verdict::Failure })
}
