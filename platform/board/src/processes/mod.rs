//! Processes on this machine: their tables, and running them.
//!
//! A process runs on the core of whoever calls [`UserProcess::run`], inside that call, until it exits, does wrong, is told to
//! stop, or its time is over. Nothing else runs on the core meanwhile but interrupt handlers. The call does what the process asks
//! for between two stays at EL0.

mod assignment;
mod tables;

pub use assignment::Assignment;
pub use tables::UserTables;

use crate::{COHERENT, Error};
use alloc::string::ToString;
use alloc::sync::Arc;
use arch::esr::Esr;
use arch::user::{self, Context, Exit};
use base::Deadline;
use core::fmt;
use process::{Control, Next, Process, Quota};

/// How a process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this code.
    Exited(u64),
    /// By an instruction that it may not execute, or that faulted.
    Crashed(Crash),
    /// It was told to.
    Killed,
    /// Its time was over.
    TimedOut,
}

/// What a process did wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The address of the instruction.
    pub pc: u64,
    /// The return address of the function that it was in, as far as x30 tells.
    pub link: u64,
    /// The stack pointer.
    pub sp: u64,
    /// What it was; none for an asynchronous abort.
    pub esr: Option<Esr>,
    /// The address of the access, where that means something.
    pub far: Option<u64>,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.esr {
            Some(esr) => write!(f, "{esr}")?,
            None => f.write_str("an access was refused by a device or the memory system")?,
        }
        if let Some(far) = self.far {
            write!(f, " of {far:#x}")?;
        }
        write!(f, " at pc {:#x}, called from {:#x}, sp {:#x}", self.pc, self.link, self.sp)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with {code}"),
            Self::Crashed(crash) => write!(f, "crashed: {crash}"),
            Self::Killed => f.write_str("was killed"),
            Self::TimedOut => f.write_str("ran out of time"),
        }
    }
}

/// A process with its registers.
pub struct UserProcess {
    // Dropped first: it stops the devices, and takes its memory out of the tables.
    process: Process,
    context: Context,
    tables: Arc<UserTables>,
}

/// How a process is ended from another core.
#[derive(Clone)]
pub struct Killer(Arc<Control>);

impl Killer {
    /// Ends the process, wherever it is: at EL0, in a wait, or not running.
    pub fn kill(&self) {
        if let Some(core) = self.0.stop() {
            user::interrupt(core);
        }
    }
}

impl UserProcess {
    /// Makes a process that runs the ELF `program`, which gets `arguments`.
    ///
    /// # Errors
    ///
    /// [`Error::Process`].
    pub fn new(name: &str, program: &[u8], arguments: [u64; 3], quota: Quota) -> Result<Self, Error> {
        Self::in_tables(UserTables::private().map_err(|error| failed(name, error))?, name, program, arguments, quota)
    }

    /// As [`UserProcess::new`], in these tables, which are empty.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn in_tables(
        tables: Arc<UserTables>,
        name: &str,
        program: &[u8],
        arguments: [u64; 3],
        quota: Quota,
    ) -> Result<Self, Error> {
        let made = Process::new(name, tables.clone(), &COHERENT, quota);
        let mut process = made.map_err(|error| failed(name, error))?;
        let start = process.load(program).map_err(|error| failed(name, error))?;
        let mut context = Context::new(start.entry, start.stack);
        context.x[..3].copy_from_slice(&arguments);
        Ok(Self { process, context, tables })
    }

    /// The process itself.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its tables.
    pub fn tables(&self) -> &Arc<UserTables> {
        &self.tables
    }

    /// How to end it from another core.
    pub fn killer(&self) -> Killer {
        Killer(self.process.control().clone())
    }

    /// Runs the process to its end, and gives back all that it had.
    pub fn run(mut self, deadline: Deadline) -> End {
        let end = self.run_and_keep(deadline);
        self.process.end();
        end
    }

    /// Runs the process to its end, and leaves what it has as it was then, to be looked at: devices go on, and whoever waits for one of
    /// its accesses waits. Dropping it gives back all that it had.
    pub fn run_and_keep(&mut self, deadline: Deadline) -> End {
        let end = self.run_until(deadline, || false).unwrap_or(End::TimedOut);
        match &end {
            End::Exited(_) => log::debug!("process {} {end}", self.process.name()),
            _ => log::warn!("process {} {end}", self.process.name()),
        }
        if let (refused @ 1.., last) = self.process.unsaid() {
            let last = last.unwrap_or("was said");
            log::warn!("process {}: {refused} lines too many; the last: {last}", self.process.name());
        }
        end
    }

    /// Runs the process until `enough` after one of its system calls, or to its end, which is returned. What it had it has until this
    /// object is dropped.
    pub fn run_until(&mut self, deadline: Deadline, enough: impl Fn() -> bool) -> Option<End> {
        let control = self.process.control().clone();
        loop {
            if control.is_stopped() {
                return Some(End::Killed);
            }
            if deadline.has_passed() {
                return Some(End::TimedOut);
            }
            // What handlers have left, while it was at EL0 too: it may never wait.
            base::deferred::catch_up();
            control.runs_on(Some(base::cpu::index()));
            let tables = self.tables.active();
            let until = deadline.instant().as_nanos();
            // SAFETY:
            // - what the tables map for EL0 are extents, to which nobody has a reference (contract of `process::contract`);
            // - the process holds the tables, and this object does;
            // - `UserTables::unmap` removes what it has cleared from TLBs.
            let exit = unsafe { user::enter(&mut self.context, tables, until, control.flag()) };
            control.runs_on(None);
            match exit {
                Exit::Interrupted => {}
                Exit::Call(_) => {
                    let [a, b, c, d, e, f, ..] = self.context.x;
                    match self.process.call(self.context.x[8], [a, b, c, d, e, f], deadline) {
                        Next::Return(error, value) => (self.context.x[0], self.context.x[1]) = (error, value),
                        Next::Exit(code) => return Some(End::Exited(code)),
                    }
                    if enough() {
                        return None;
                    }
                }
                Exit::Fault { esr, far } => {
                    return Some(End::Crashed(self.crash(Some(esr), esr.far_valid().then_some(far))));
                }
                Exit::SError => return Some(End::Crashed(self.crash(None, None))),
            }
        }
    }

    fn crash(&self, esr: Option<Esr>, far: Option<u64>) -> Crash {
        Crash { pc: self.context.pc, link: self.context.x[30], sp: self.context.sp, esr, far }
    }
}

fn failed(name: &str, error: process::Error) -> Error {
    Error::Process { name: name.to_string(), error }
}
