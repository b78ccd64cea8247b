//! One boot of the benchmarks.

use super::Mode;
use crate::cli::TraceRequest;
use crate::console::{self, BenchMessage, Message};
use crate::emulator::Emulator;
use crate::firmware::{self, Firmware};
use crate::machine::{Iommu, Machine};
use crate::progress::Progress;
use crate::session::{Event, Session};
use crate::symbols::{Backtrace, Symbols};
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::fmt;
use std::time::Duration;

/// The benchmark that is timed from outside, and has a boot of its own.
pub const FIRST_READ: &str = "first_read";

/// In place of a name: the image is to say which benchmarks there are.
pub const LIST: &str = "?";

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Instructions, one nanosecond each; idle time takes none.
    Instructions,
    /// Instructions too, but idle time takes what it takes: for what a device in host time has to answer.
    Work,
    /// Time.
    Wall,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Instructions => "instructions",
            Self::Work => "instructions with devices",
            Self::Wall => "wall time",
        })
    }
}

impl Clock {
    /// The benchmarks that belong to this clock, as the image knows them.
    fn word(self) -> &'static str {
        match self {
            Self::Instructions => "instructions",
            Self::Work => "work",
            Self::Wall => "wall",
        }
    }
}

/// What the image reports of one benchmark: figures for one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Its name.
    pub name: String,
    /// What is counted: `instructions` or `ns`.
    pub unit: String,
    /// The cheapest batch.
    pub min: f64,
    /// The batch in the middle.
    pub median: f64,
    /// The dearest batch.
    pub max: f64,
    /// Commands to the SMMU.
    pub commands: f64,
}

/// What a boot came to.
#[derive(Debug, Default)]
pub struct Told {
    /// The benchmarks that there are, if that was asked.
    pub names: Vec<String>,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// What failed, with what was said.
    pub failed: Vec<String>,
    /// Commands that the SMMUs were given, by the driver's count.
    pub commands: u64,
}

/// What is booted.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The QEMU.
    pub emulator: &'a Emulator,
    /// The image.
    pub firmware: &'a Firmware,
    /// How memory is protected.
    pub mode: Mode,
    /// What is counted.
    pub clock: Clock,
    /// The benchmarks by name; all if there is none.
    pub names: &'a [String],
    /// How long one may take.
    pub patience: Duration,
    /// Where QEMU writes what its SMMU does, if anywhere.
    pub trace: Option<TraceRequest>,
}

impl Boot<'_> {
    /// The machine: as Linux had it, with two edus and a disk whose data comes from nowhere.
    pub fn machine(&self) -> Machine {
        let mut command_line = vec![format!("bench.mode={}", self.mode), format!("bench.clock={}", self.clock.word())];
        if !self.names.is_empty() {
            command_line.push(format!("bench={}", self.names.join(",")));
        }
        let mut extra: Vec<OsString> = Vec::new();
        let mut add = |option: &str, value: &str| extra.extend([option.into(), value.into()]);
        match self.clock {
            Clock::Instructions => add("-icount", "shift=0,sleep=off"),
            Clock::Work => add("-icount", "shift=0,sleep=on"),
            Clock::Wall => {}
        }
        add("-device", "edu,addr=4,dma_mask=0xffffffffffffffff");
        add("-blockdev", "driver=null-co,node-name=nothing,size=1073741824,read-zeroes=on");
        let bounce = if self.emulator.bounce_buffer_limit { ",x-max-bounce-buffer-size=0" } else { "" };
        add("-device", &format!("virtio-blk-pci,addr=2,drive=nothing,disable-legacy=on,iommu_platform=on{bounce}"));
        Machine {
            smp: if self.clock == Clock::Wall { 2 } else { 1 },
            memory: "4G".into(),
            cpu: "cortex-a57".into(),
            iommu: Iommu::SmmuV3,
            gpu: false,
            trace: self.trace.iter().cloned().collect(),
            command_line,
            extra,
            ..Machine::default()
        }
    }

    /// Boots, and collects what the image reports until it ends.
    pub fn run(&self, progress: &mut Progress) -> Result<Told> {
        let mut session = Session::start(self.emulator, &self.machine(), &self.firmware.image, self.patience, false)?;
        let (mut told, mut running, mut said) = (Told::default(), None::<String>, Vec::new());
        let (mut symbols, mut backtrace) = (None, Backtrace::default());
        let (mut plan, mut out_of_time) = (None, false);
        loop {
            let line = match session.next_event() {
                Event::Line(line) => line,
                Event::Closed => break,
                Event::OutOfTime => {
                    out_of_time = true;
                    said.extend(session.kill());
                    break;
                }
            };
            match console::parse(&line) {
                Some(Message::Bench(message)) => match message {
                    BenchMessage::Has(name) => told.names.push(name),
                    BenchMessage::Plan(count) => plan = Some(count),
                    BenchMessage::Start(name) => {
                        session.set_timeout(Some(self.patience));
                        progress.step(&format!("{}, {}: {name}", self.mode, self.clock));
                        running = Some(name);
                    }
                    BenchMessage::Commands(count) => told.commands = count,
                    BenchMessage::Result(mut figure) => {
                        running = None;
                        if figure.name == FIRST_READ {
                            figure.median = session.elapsed().as_secs_f64() * 1e9;
                        }
                        let unit = if self.clock == Clock::Wall { "ns" } else { "instructions" };
                        if figure.unit == unit {
                            told.figures.push(figure);
                        } else {
                            told.failed.push(format!("{}: counted {}, not {unit}", figure.name, figure.unit));
                        }
                    }
                    BenchMessage::Skip(_, _) => running = None,
                    BenchMessage::Fail(name, message) => {
                        running = None;
                        told.failed.push(format!("{name}: {message}"));
                    }
                },
                Some(Message::ProgramCounter(address)) => {
                    let load = || Symbols::load(&self.firmware.elf, firmware::workspace()).ok();
                    said.extend(backtrace.frame(symbols.get_or_insert_with(load).as_ref(), address));
                }
                _ => said.push(line),
            }
        }
        let end = session.finish()?;
        let ended = !out_of_time && end.status.code().is_some_and(|code| code == 0 || !told.failed.is_empty());
        if plan.is_none() || !ended || running.is_some() {
            let what = running.as_deref().unwrap_or("the image");
            let how = if out_of_time { "did not end in time".into() } else { format!("ended early ({})", end.status) };
            bail!("{what} {how}\n{}\n{}", said.join("\n"), end.words.trim_end());
        }
        Ok(told)
    }
}
