//! The main job, from the command line to the exit code.

use crate::arm64_image::KERNEL;
use crate::cli::DemoOptions;
use crate::console::{self, Message};
use crate::emulator::Emulator;
use crate::firmware::{self, Firmware};
use crate::machine::{Disk, Machine, percent_encoded};
use crate::progress::Progress;
use crate::session::{End, Event, Session};
use crate::symbols::{Backtrace, Symbols};
use crate::{board, disk, setup, show};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel reported success.
    Success,
    /// The kernel reported failure, or panicked.
    Failure,
    /// The kernel did not end in time.
    OutOfTime,
}

impl Verdict {
    /// Returns the exit code of the command.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::OutOfTime => 124,
        }
    }
}

/// Runs the demo. An error means that the command line or the environment is at fault.
pub fn run(options: &DemoOptions) -> Result<Verdict> {
    let mut progress = Progress::new();
    // What the user gave is looked at first: a mistyped name should not cost a build.
    let given = options.disk.as_deref().map(Disk::open).transpose()?;
    if let Some(file) = &options.screenshot {
        check_writable(file)?;
    }
    let emulator = setup::emulator(options.qemu.as_deref(), options.yes, options.gui, &mut progress)?;
    let window = if options.gui { Some(window(&emulator)?) } else { None };
    if let Some(topology) = options.topology {
        if options.board != board::Name::Virt {
            bail!("topologies are those of the board virt: leave --board or --topology out");
        }
        topology.check(&emulator)?;
    }
    setup::rust_target(firmware::workspace(), &mut progress)?;
    let firmware = firmware::build(KERNEL.0, KERNEL.1, &mut progress)?;
    let disk = match given {
        Some(disk) => disk,
        None => Disk::open(&disk::cached(&firmware, &mut progress)?)?,
    };
    let board = options.board.prepare(&mut progress)?;
    let mut machine = Machine { board, ..machine(options, disk, window) };
    if let Some(topology) = options.topology {
        machine = topology.machine(machine, &emulator)?;
    }
    progress.step(&format!("booting under QEMU {}", emulator.version));
    // With arguments of the user's, QEMU may be asked to say something. Otherwise its words are of interest only when
    // something fails: in a run that succeeds they are about what the kernel provokes to show that it is stopped.
    let live = !options.qemu_arguments.is_empty();
    let timeout = Duration::from_secs(options.timeout);
    let session = Session::start(&emulator, &machine, &firmware.image, timeout, live)?;
    Watch { options, firmware: &firmware, progress, symbols: None, backtrace: Backtrace::default(), shown: false }
        .watch(session)
}

/// Makes the machine that the options describe.
fn machine(options: &DemoOptions, disk: Disk, window: Option<&'static str>) -> Machine {
    let mut command_line = Vec::new();
    if let Some(picture) = &options.picture {
        command_line.push(format!("picture={}", percent_encoded(picture)));
    }
    if let Some(name) = options.show {
        command_line.extend(show::words(name, options.gui));
    }
    if options.screenshot.is_some() || options.show.is_some() || options.gui {
        command_line.push("screen.wait=1".to_string());
    }
    command_line.extend(options.append.iter().cloned());
    Machine {
        smp: options.smp,
        iommu: options.iommu,
        memory: options.memory.as_str().to_string(),
        cpu: options.cpu.clone(),
        disk: Some(disk),
        icount: options.icount,
        window,
        trace: options.trace.clone(),
        command_line,
        extra: options.qemu_arguments.clone(),
        ..Machine::default()
    }
}

fn window(emulator: &Emulator) -> Result<&'static str> {
    match emulator.window()? {
        Some(window) => Ok(window),
        None => bail!(
            "{} cannot open a window; install its graphical part (on Debian: sudo apt-get install qemu-system-gui), \
             or use --screenshot FILE.png",
            emulator.program.display()
        ),
    }
}

/// Fails if the screenshot could not be saved there: better now than after the run.
fn check_writable(file: &Path) -> Result<()> {
    if file.is_dir() {
        bail!("{} is a directory; give a file name with --screenshot", file.display());
    }
    let directory = match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    tempfile::tempfile_in(directory).with_context(|| {
        format!("{} cannot be written to; give another place with --screenshot", directory.display())
    })?;
    Ok(())
}

/// The file in which [`capture`] leaves what the screen shows.
const CAPTURED: &str = "screen.png";

/// Saves what the screen shows, in a directory of its own.
fn capture(session: &Session) -> Result<TempDir> {
    let directory = tempfile::tempdir().context("no temporary directory")?;
    session.screenshot(&directory.path().join(CAPTURED))?;
    Ok(directory)
}

/// A run being watched.
struct Watch<'a> {
    options: &'a DemoOptions,
    firmware: &'a Firmware,
    progress: Progress,
    symbols: Option<Symbols>,
    backtrace: Backtrace,
    /// Whether the guest said anything at all.
    shown: bool,
}

impl Watch<'_> {
    /// Follows the console to the end of the run.
    fn watch(mut self, mut session: Session) -> Result<Verdict> {
        let (mut verdict, mut on_screen, mut out_of_time) = (None, false, false);
        let (mut screenshot, mut last_frame) = (None, None);
        loop {
            match session.next_event() {
                Event::Line(line) => match console::parse(&line) {
                    Some(Message::Screen { .. }) => {
                        on_screen = true;
                        if let Some(file) = &self.options.screenshot {
                            screenshot = Some(session.screenshot(file));
                        }
                        if self.options.show.is_some() {
                            last_frame = Some(capture(&session));
                        }
                        if self.options.gui {
                            self.stay(&mut session);
                        } else if self.options.screenshot.is_some() || self.options.show.is_some() {
                            session.type_line("");
                        }
                    }
                    Some(Message::End(success)) => verdict = Some(success),
                    _ => self.show(&line),
                },
                Event::Closed => break,
                Event::OutOfTime => {
                    out_of_time = true;
                    session.kill().iter().for_each(|line| self.show(line));
                    break;
                }
            }
        }
        self.progress.clear();
        let end = session.finish()?;
        let live = !self.options.qemu_arguments.is_empty();
        if !live && (out_of_time || !end.status.success()) {
            eprint!("{}", end.words);
        } else if !live {
            // A warning is about what the user asked for, such as a trace event that does not exist.
            end.words.lines().filter(|line| line.contains("warning: ")).for_each(|line| eprintln!("{line}"));
        }
        if out_of_time {
            eprintln!(
                "error: the kernel did not end within {} s; give it more with --timeout SECONDS",
                self.options.timeout
            );
            return Ok(Verdict::OutOfTime);
        }
        let verdict = self.judge(&end, verdict, on_screen)?;
        eprintln!("QEMU start to end: {:.2} s", end.elapsed.as_secs_f64());
        match (screenshot, &self.options.screenshot) {
            (Some(saved), Some(file)) => saved.map(|()| eprintln!("screenshot: {}", file.display()))?,
            (None, Some(_)) => eprintln!("no screenshot was taken: the kernel showed nothing"),
            _ => {}
        }
        match last_frame.transpose()? {
            Some(captured) if !self.is_last_frame(&captured.path().join(CAPTURED))? => Ok(Verdict::Failure),
            _ => Ok(verdict),
        }
    }

    /// Compares what the screen showed with what it must show after the show. Says whether that is the same, or not known.
    fn is_last_frame(&self, file: &Path) -> Result<bool> {
        let Some((expected, number)) = show::last(self.options)? else {
            eprintln!("last frame: not compared, because the picture is none of ours");
            return Ok(true);
        };
        let (wrong, all) = (show::compare(file, &expected)?, expected.pixels().len());
        let what = format!("those of the picture with frame {number} drawn over it");
        if wrong == 0 {
            eprintln!("last frame: all {all} pixels are {what}");
        } else {
            eprintln!("error: last frame: {wrong} of {all} pixels are not {what}");
        }
        Ok(wrong == 0)
    }

    /// Prints a line of the console; an address of a backtrace is printed as the function and the line.
    fn show(&mut self, line: &str) {
        self.progress.clear();
        self.shown = true;
        let mut stdout = std::io::stdout().lock();
        // Nobody reading is no reason to stop the run.
        let mut print = |line: &str| drop(writeln!(stdout, "{line}"));
        if let Some(Message::ProgramCounter(address)) = console::parse(line) {
            if self.symbols.is_none() {
                match Symbols::load(&self.firmware.elf, firmware::workspace()) {
                    Ok(symbols) => self.symbols = Some(symbols),
                    Err(error) => eprintln!("warning: {error:#}"),
                }
            }
            self.backtrace.frame(self.symbols.as_ref(), address).iter().for_each(|line| print(line));
        } else {
            self.backtrace.end();
            print(line);
        }
        drop(stdout.flush());
    }

    /// Lets the picture stay until the window is closed, which ends QEMU, or Enter is pressed, which the kernel waits for.
    fn stay(&mut self, session: &mut Session) {
        session.set_timeout(None);
        self.progress.clear();
        eprintln!("The picture stays until you close the window or press Enter.");
        if let Some(mut keyboard) = session.take_input() {
            std::thread::spawn(move || {
                let mut line = String::new();
                // At the end of our input there is no Enter to come: the window decides.
                if std::io::stdin().lock().read_line(&mut line).is_ok_and(|count| count > 0) {
                    let _ = keyboard.write_all(b"\n");
                } else {
                    std::thread::park();
                }
            });
        }
    }

    /// Decides how the run ended. QEMU's exit status is the guest's; but QEMU also ends with 0 when the machine is
    /// powered off or reset, so success needs the kernel's word too.
    fn judge(&self, end: &End, verdict: Option<bool>, on_screen: bool) -> Result<Verdict> {
        let words = end.words.trim_end();
        match (end.status.code(), verdict) {
            (Some(0), Some(true)) => Ok(Verdict::Success),
            (Some(0), None) if self.options.gui && on_screen => Ok(Verdict::Success),
            (Some(0), Some(false)) => Ok(Verdict::Failure),
            (Some(0), None) => {
                eprintln!("error: the machine went off before the kernel gave its verdict");
                Ok(Verdict::Failure)
            }
            (Some(_), None) if !self.shown && !words.is_empty() => bail!("QEMU refused to start; see its words above"),
            (Some(_), _) => Ok(Verdict::Failure),
            (None, _) => bail!("QEMU itself died ({}); see its words above, if any", end.status),
        }
    }
}
