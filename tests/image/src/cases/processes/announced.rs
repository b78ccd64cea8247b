//! What handlers leave while a process has the only core: nobody waits or is idle, who would do it.

use super::{start, trial};
use crate::bench::soon;
use aarch64_cpu::registers::{CNTP_CTL_EL0, CNTP_TVAL_EL0, Writeable};
use alloc::sync::Arc;
use arch::user::{self, Asid, Context, Exit, Tables};
use base::IrqMutex;
use base::deferred::{self, Ticket};
use board::{COHERENT, End, Error, Killer};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gic::{Priority, Trigger};
use iommu::pgtable::{Geometry, Granule, PageTable, Stage};
use ktest::{Outcome, expect, expect_eq, ktest};

/// How long a process runs before the handler announces something: it is at EL0 by then. (If it is not, the test sees less.)
const MILLIS: u64 = 30;
/// The interrupt of the physical timer, which nobody else uses.
const TIMER: u32 = 14;

/// Whom the work ends.
static VICTIM: IrqMutex<Option<Killer>> = IrqMutex::new(None);
/// How often it was done.
static DONE: AtomicU64 = AtomicU64::new(0);

fn work() {
    DONE.fetch_add(1, Ordering::SeqCst);
    let victim = VICTIM.lock().take();
    if let Some(victim) = victim {
        victim.kill();
    }
}

fn ticket() -> Result<Ticket, Outcome> {
    DONE.store(0, Ordering::SeqCst);
    deferred::register(work).ok_or_else(|| Error::Missing("ticket").into())
}

ktest! {
    /// The work ends the process, which does nothing that waits: if it is not done while the process runs, its time does, ten seconds
    /// later. Seen red without catching up between two stays at EL0.
    fn what_a_handler_leaves_is_done_though_a_process_never_waits(_bench) {
        let (ticket, process) = (ticket()?, start(trial::LOOP, 0, 0)?);
        let (gic, timer) = (board::gic().ok_or(Error::Missing("GIC"))?, gic::ppi(TIMER)?);
        let announce = move || {
            CNTP_CTL_EL0.set(0);
            ticket.raise();
        };
        gic.enable(timer, Trigger::Level, Priority::NORMAL, Arc::new(announce))?;
        *VICTIM.lock() = Some(process.killer());
        CNTP_TVAL_EL0.set(arch::timer::frequency() * MILLIS / 1000);
        CNTP_CTL_EL0.write(CNTP_CTL_EL0::ENABLE::SET);
        let end = process.run(soon());
        CNTP_CTL_EL0.set(0);
        gic.disable(timer)?;
        // Not where it was never called: it would end another.
        *VICTIM.lock() = None;
        expect_eq!(end, End::Killed);
        expect_eq!(DONE.load(Ordering::SeqCst), 1);
        Ok(())
    }
    machine: smp1
}

ktest! {
    /// A handler may come between catching up and EL0. There is nothing at the process's first instruction: it has not been there if it
    /// has no fault. Seen red where only a process that was told to stop does not begin.
    fn a_process_does_not_begin_before_what_was_announced_is_done(_bench) {
        let geometry = Geometry::new(Granule::K4, Stage::One, 48, 48).map_err(|_| Error::Missing("geometry"))?;
        let table = PageTable::new(geometry, &COHERENT)?;
        let asid = Asid::allocate().ok_or(Error::Missing("ASID"))?;
        let (ticket, stop) = (ticket()?, AtomicBool::new(false));
        let enter = || {
            let mut context = Context::new(process::PROGRAM.start, 0);
            let tables = Tables { root: table.root().get(), asid: &asid };
            // SAFETY: nothing is mapped, and the table stays.
            unsafe { user::enter(&mut context, tables, soon().instant().as_nanos(), &stop) }
        };
        ticket.raise();
        expect_eq!(enter(), Exit::Interrupted);
        expect_eq!(DONE.load(Ordering::SeqCst), 0, "entering is not doing");
        deferred::catch_up();
        expect_eq!(DONE.load(Ordering::SeqCst), 1);
        let exit = enter();
        expect!(matches!(exit, Exit::Fault { far, .. } if far == process::PROGRAM.start), "{exit:?}");
        // Before the table.
        drop(asid);
        Ok(())
    }
    machine: smp1
}
