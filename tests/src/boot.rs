//! Boots the test image until every selected test has a result.
//!
//! A test that ends the image (a panic) or never ends (a hang) has failed with what the console said; the image is booted
//! again and goes on after it. A test that the image never reports has failed too. A boot in which no test began is the
//! last, so this ends.

use anyhow::Result;
use qemu::console::{self, Message, TestMessage};
use qemu::emulator::Emulator;
use qemu::firmware::{self, Firmware};
use qemu::machine::Machine;
use qemu::session::{Event, Session};
use qemu::symbols::{Backtrace, Symbols};
use std::collections::BTreeSet;
use std::time::Duration;

/// The longest list of names on the kernel's command line, in bytes; above it all tests of the machine are run.
const LONGEST_LIST: usize = 1500;

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It cannot run on this machine, with the reason.
    Skipped(String),
    /// It failed, with all that is known.
    Failed(String),
}

/// What is booted, and for how long.
#[derive(Debug)]
pub struct Boots<'a> {
    /// The QEMU.
    pub emulator: &'a Emulator,
    /// The machine, without a selection of tests.
    pub machine: &'a Machine,
    /// The machine's name.
    pub machine_name: &'a str,
    /// The test image.
    pub firmware: &'a Firmware,
    /// How long one test may take, and how long the image may take to begin.
    pub patience: Duration,
}

/// What one boot came to.
struct Boot {
    /// How many tests began.
    started: usize,
    /// How many tests the image has, if it said so.
    registered: Option<usize>,
    /// What the console said outside tests.
    console: Vec<String>,
    /// Why the boot did not end as it should.
    problem: Option<String>,
}

impl Boots<'_> {
    /// Runs the named tests and reports each exactly once.
    pub fn run(&self, names: &[&str], mut report: impl FnMut(&str, Outcome)) {
        let mut open: BTreeSet<&str> = names.iter().copied().collect();
        let list = names.join(",");
        let selection = if list.len() > LONGEST_LIST { format!("@{}", self.machine_name) } else { list };
        let mut from = 0;
        let reason = loop {
            let boot = self.boot(&selection, from, &mut |name: &str, outcome: Outcome| {
                // Of all tests of a machine, some may not have been asked for; and a name counts once.
                if open.remove(name) {
                    report(name, outcome);
                }
            });
            let boot = match boot {
                Ok(boot) => boot,
                Err(error) => break format!("{error:#}"),
            };
            from += boot.started;
            match boot.problem {
                None => break "the test image never reported this test".to_string(),
                Some(problem) if boot.started == 0 => break with_console(&problem, &boot.console),
                // Of the test that was running the problem is told already; the others have yet to run.
                Some(_) if open.is_empty() => break String::new(),
                Some(_) => {}
            }
        };
        for name in open {
            report(name, Outcome::Failed(reason.clone()));
        }
    }

    /// Boots with no test selected and returns how many tests the image has.
    pub fn registered(&self) -> Result<usize, String> {
        let boot = self.boot("", 0, &mut |_, _| {}).map_err(|error| format!("{error:#}"))?;
        match (boot.problem, boot.registered) {
            (None, Some(registered)) => Ok(registered),
            (problem, _) => {
                let problem = problem.unwrap_or("the image did not say how many tests it has".into());
                Err(with_console(&problem, &boot.console))
            }
        }
    }

    /// Boots once.
    fn boot(&self, selection: &str, from: usize, report: &mut dyn FnMut(&str, Outcome)) -> Result<Boot> {
        let mut machine = self.machine.clone();
        machine.command_line.push(format!("ktest={selection}"));
        machine.command_line.push(format!("ktest.from={from}"));
        let mut session = Session::start(self.emulator, &machine, &self.firmware.image, self.patience, false)?;
        let mut boot = Boot { started: 0, registered: None, console: Vec::new(), problem: None };
        let (mut running, mut planned): (Option<(String, Vec<String>)>, Option<usize>) = (None, None);
        let (mut symbols, mut backtrace) = (None, Backtrace::default());
        let (mut out_of_time, mut failed) = (false, false);
        loop {
            let line = match session.next_event() {
                Event::Line(line) => line,
                Event::Closed => break,
                Event::OutOfTime => {
                    out_of_time = true;
                    let rest = session.kill();
                    running.as_mut().map_or(&mut boot.console, |(_, said)| said).extend(rest);
                    break;
                }
            };
            let said = running.as_mut().map_or(&mut boot.console, |(_, said)| said);
            match console::parse(&line) {
                Some(Message::Test(message)) => {
                    backtrace.end();
                    match message {
                        TestMessage::Registered(count) => boot.registered = Some(count),
                        TestMessage::Plan(count) => planned = Some(count),
                        TestMessage::Start(name) => {
                            boot.started += 1;
                            session.set_timeout(Some(self.patience));
                            if let Some((name, said)) = running.replace((name, Vec::new())) {
                                report(&name, Outcome::Failed(with_console("the test never ended", &said)));
                            }
                        }
                        TestMessage::Ok(name) => end(&mut running, &name, Outcome::Passed, report),
                        TestMessage::Skip(name, reason) => {
                            end(&mut running, &name, Outcome::Skipped(unescaped(&reason)), report);
                        }
                        TestMessage::Fail(name, message) => {
                            failed = true;
                            let text = with_console(&unescaped(&message), said);
                            end(&mut running, &name, Outcome::Failed(text), report);
                        }
                    }
                }
                Some(Message::ProgramCounter(address)) => {
                    let load = || Symbols::load(&self.firmware.elf, firmware::workspace()).ok();
                    said.extend(backtrace.frame(symbols.get_or_insert_with(load).as_ref(), address));
                }
                Some(Message::End(_)) => {}
                _ => {
                    backtrace.end();
                    said.push(line);
                }
            }
        }
        let finished = session.finish()?;
        let words = finished.words.trim_end();
        if !words.is_empty() {
            let said = running.as_mut().map_or(&mut boot.console, |(_, said)| said);
            said.push(format!("QEMU says: {words}"));
        }
        let problem = if out_of_time {
            Some(format!("nothing more happened for {} s", self.patience.as_secs_f32()))
        } else if running.is_some() || planned != Some(boot.started) {
            Some(format!("the test image ended before its tests did ({})", finished.status))
        } else if !finished.status.success() && !failed {
            Some(format!("the test image failed outside its tests ({})", finished.status))
        } else {
            None
        };
        if let Some((name, said)) = running {
            let problem = problem.as_deref().unwrap_or_default();
            report(&name, Outcome::Failed(with_console(problem, &said)));
        }
        boot.problem = problem;
        Ok(boot)
    }
}

/// Ends the running test if it is the one named; a result for any other is not to be trusted.
fn end(
    running: &mut Option<(String, Vec<String>)>,
    name: &str,
    outcome: Outcome,
    report: &mut dyn FnMut(&str, Outcome),
) {
    match running.take() {
        Some((begun, _)) if begun == name => report(name, outcome),
        Some((begun, _)) => report(&begun, Outcome::Failed(format!("the image reports {name} in the middle of it"))),
        None => {}
    }
}

fn with_console(message: &str, console: &[String]) -> String {
    if console.is_empty() { message.to_string() } else { format!("{message}\nconsole:\n  {}", console.join("\n  ")) }
}

/// Undoes what `ktest` does to messages of several lines.
fn unescaped(message: &str) -> String {
    let (mut text, mut characters) = (String::new(), message.chars());
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('n') => text.push('\n'),
                Some('r') => {}
                Some(other) => text.push(other),
                None => text.push('\\'),
            },
            other => text.push(other),
        }
    }
    text
}

#[cfg(test)]
mod tests;
