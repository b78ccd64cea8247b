//! One running QEMU: console in and out, deadline, end.
//!
//! The guest's console is QEMU's standard input and output. A thread reads it line by line until the pipe closes, so
//! nothing is lost when QEMU ends, and nothing waits for a QEMU that died. QEMU's own words (standard error) are kept
//! apart. A session ends only its own child, by handle; dropping it does so too.

use crate::console::LineSplitter;
use crate::emulator::{Emulator, Version};
use crate::machine::{DISPLAY, Machine};
use crate::qmp::Qmp;
use crate::setup::find_in_path;
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long QEMU may take to end after its console closed.
const GRACE: Duration = Duration::from_secs(10);
/// How long QEMU may take to answer on its control socket.
const CONTROL: Duration = Duration::from_secs(20);
/// How much of QEMU's own words is kept, in bytes.
const KEPT: usize = 64 * 1024;

/// What happened on the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A line, without its line end.
    Line(String),
    /// QEMU closed the console: it has ended, or is about to.
    Closed,
    /// The deadline passed.
    OutOfTime,
}

/// How a session ended.
#[derive(Debug)]
pub struct End {
    /// QEMU's exit status; with semihosting it is the guest's.
    pub status: ExitStatus,
    /// From QEMU's start to its end.
    pub elapsed: Duration,
    /// What QEMU itself said on standard error.
    pub words: String,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Session {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    words: Option<JoinHandle<String>>,
    started: Instant,
    deadline: Option<Instant>,
    control: PathBuf,
    // Holds the control socket; removed with the session.
    _directory: TempDir,
}

impl Session {
    /// Starts QEMU. The deadline is `timeout` from now. With `show_words`, QEMU's standard error is passed on as it comes.
    pub fn start(
        emulator: &Emulator,
        machine: &Machine,
        image: &Path,
        timeout: Duration,
        show_words: bool,
    ) -> Result<Self> {
        // A socket's path may have 107 bytes, so not below the target directory.
        let directory = tempfile::Builder::new().prefix("sluice-").tempdir().context("no temporary directory")?;
        let control = directory.path().join("qmp");
        let start = machine.board.start(image, &machine.command_line.join(" "), directory.path())?;
        let arguments = machine.arguments(emulator, start, &control)?;
        let mut command = command(emulator);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("{} cannot be started", emulator.program.display()))?;
        let input = child.stdin.take();
        let (sender, lines) = sync_channel(4096);
        if let Some(mut output) = child.stdout.take() {
            std::thread::spawn(move || {
                let (mut splitter, mut buffer) = (LineSplitter::default(), [0; 4096]);
                // A send fails only when the session is gone; reading on keeps QEMU from stopping at a full pipe.
                while let Ok(count @ 1..) = output.read(&mut buffer) {
                    splitter.push(&buffer[..count], |line| drop(sender.send(line)));
                }
                splitter.remainder().map(|line| sender.send(line));
            });
        }
        let words = child.stderr.take().map(|errors| std::thread::spawn(move || collect(errors, show_words)));
        let deadline = started.checked_add(timeout);
        Ok(Self { child, input, lines, words, started, deadline, control, _directory: directory })
    }

    /// Waits for the next thing that happens on the console.
    pub fn next_event(&mut self) -> Event {
        let Some(deadline) = self.deadline else {
            return self.lines.recv().map_or(Event::Closed, Event::Line);
        };
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => Event::Line(line),
            Err(RecvTimeoutError::Disconnected) => Event::Closed,
            Err(RecvTimeoutError::Timeout) => Event::OutOfTime,
        }
    }

    /// Moves the deadline to `timeout` from now; `None` means that the session may take for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    }

    /// Returns the time since QEMU was started.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Types a line on the guest's console. That QEMU ended meanwhile is no error here: [`Self::finish`] will tell.
    pub fn type_line(&mut self, line: &str) {
        if let Some(input) = &mut self.input {
            let _ = input.write_all(format!("{line}\n").as_bytes()).and_then(|()| input.flush());
        }
    }

    /// Takes the guest's keyboard, so that another thread can type on it.
    pub fn take_input(&mut self) -> Option<ChildStdin> {
        self.input.take()
    }

    /// Saves what the screen shows as a PNG file.
    pub fn screenshot(&self, file: &Path) -> Result<()> {
        let file = std::path::absolute(file).context("the current directory is gone")?;
        let mut control = Qmp::connect(&self.control, CONTROL)?;
        control
            .execute(
                "screendump",
                serde_json::json!({ "filename": file, "format": "png", "device": DISPLAY, "head": 0 }),
            )
            .with_context(|| format!("the screen could not be saved to {}", file.display()))?;
        Ok(())
    }

    /// Ends QEMU if it is still running, and returns the lines that were not yet read.
    pub fn kill(&mut self) -> Vec<String> {
        // It may have ended by itself just now, which is as good.
        let _ = self.child.kill();
        let mut rest = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(GRACE) {
            rest.push(line);
        }
        rest
    }

    /// Waits until QEMU has ended, and ends it if it does not.
    pub fn finish(mut self) -> Result<End> {
        let patience = Instant::now() + GRACE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > patience {
                let _ = self.child.kill();
                break self.child.wait()?;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let elapsed = self.started.elapsed();
        let words = self.words.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        Ok(End { status, elapsed, words })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the command that starts QEMU so that it ends with this process, however this process ends. QEMU does that by
/// itself from 11.0 on; for older ones `setpriv` asks the kernel for it, where it is installed.
fn command(emulator: &Emulator) -> Command {
    if cfg!(target_os = "linux")
        && emulator.version < Version(11, 0, 0)
        && let Some(setpriv) = find_in_path("setpriv")
    {
        let mut command = Command::new(setpriv);
        command.args(["--pdeathsig", "KILL", "--"]).arg(&emulator.program);
        return command;
    }
    Command::new(&emulator.program)
}

/// Reads QEMU's own words to their end and returns the first [`KEPT`] bytes of them.
fn collect(mut errors: impl Read, show: bool) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = errors.read(&mut buffer) {
        if show {
            let _ = std::io::stderr().write_all(&buffer[..count]);
        }
        let room = KEPT.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&buffer[..room]);
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A stand-in for QEMU: a shell script. Sessions are about processes and pipes, not about what runs in them.
    fn script(text: &str) -> (TempDir, Emulator) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("qemu");
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        (directory, Emulator { program, version: Version(10, 0, 0), bounce_buffer_limit: true })
    }

    fn start(emulator: &Emulator, timeout: Duration) -> Session {
        // Another test's fork may hold the fresh script open for a moment, which the system calls "text file busy".
        loop {
            match Session::start(emulator, &Machine::default(), Path::new("x"), timeout, false) {
                Ok(session) => return session,
                Err(error) if format!("{error:#}").contains("busy") => std::thread::yield_now(),
                Err(error) => panic!("{error:#}"),
            }
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_is_complete_when_qemu_dies_at_once() {
        let (_keep, emulator) = script("seq 1 5000; printf unfinished; echo why >&2; exit 7");
        let mut session = start(&emulator, LONG);
        let mut lines = Vec::new();
        while let Event::Line(line) = session.next_event() {
            lines.push(line);
        }
        assert_eq!(lines.len(), 5001);
        assert_eq!(lines.last().map(String::as_str), Some("unfinished"));
        let end = session.finish().unwrap();
        assert_eq!(end.status.code(), Some(7));
        assert_eq!(end.words, "why\n");
    }

    #[test]
    fn typed_lines_reach_the_guest() {
        let (_keep, emulator) = script("read line; echo got $line");
        let mut session = start(&emulator, LONG);
        session.type_line("hello");
        assert_eq!(session.next_event(), Event::Line("got hello".into()));
        assert_eq!(session.next_event(), Event::Closed);
    }

    #[test]
    fn a_deadline_ends_the_child_and_keeps_its_last_words() {
        let (_keep, emulator) = script("echo first; printf partial; exec sleep 1000");
        let mut session = start(&emulator, LONG);
        assert_eq!(session.next_event(), Event::Line("first".into()));
        session.set_timeout(Some(Duration::ZERO));
        assert_eq!(session.next_event(), Event::OutOfTime);
        let rest = session.kill();
        assert!(rest.is_empty() || rest == ["partial"], "{rest:?}");
        assert!(!session.finish().unwrap().status.success());
    }

    #[test]
    fn a_dropped_session_leaves_no_process() {
        let (_keep, emulator) = script("echo $$; exec sleep 1000");
        let mut session = start(&emulator, LONG);
        let Event::Line(process) = session.next_event() else { panic!("the script said nothing") };
        assert!(Path::new("/proc").join(&process).exists());
        drop(session);
        assert!(!Path::new("/proc").join(&process).exists());
    }
}
