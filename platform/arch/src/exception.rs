//! Exceptions: interrupts go to the registered entry, expected faults to their landing, all else is reported and ends the
//! kernel.
//!
//! Handlers run with interrupts masked on the core's exception stack (see `asm/vectors.s`).

use crate::esr::Esr;
use crate::{exit, percore};
use core::arch::global_asm;
use core::fmt;
use core::sync::atomic::{AtomicPtr, Ordering};

global_asm!(include_str!("asm/vectors.s"));

/// What the vectors save of the interrupted code. The layout is known to the assembly.
#[repr(C, align(16))]
#[derive(Clone, Debug)]
pub struct Frame {
    /// x0 to x30.
    pub x: [u64; 31],
    /// The stack pointer.
    pub sp: u64,
    /// ELR_EL1: where the code was, or where it will go on.
    pub elr: u64,
    /// SPSR_EL1.
    pub spsr: u64,
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1.
    pub far: u64,
    fpsr: u64,
    fpcr: u64,
    record: [u64; 2],
    q: [u128; 32],
}

const _: () = assert!(size_of::<Frame>() == 832);

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A synchronous exception: a fault, or an instruction that asks for one.
    Synchronous,
    /// An interrupt.
    Irq,
    /// A fast interrupt.
    Fiq,
    /// An asynchronous abort.
    SError,
    /// Something from a lower exception level in a state in which nothing runs there. (What processes do, see [`crate::user`].)
    LowerLevel,
}

/// An exception that nothing expected.
#[derive(Debug)]
pub struct Unexpected<'a> {
    /// What came.
    pub kind: Kind,
    /// The interrupted code's registers.
    pub frame: &'a Frame,
}

impl Unexpected<'_> {
    /// Calls `frame` with the address of the interrupted instruction and of each call that led there.
    pub fn backtrace(&self, mut frame: impl FnMut(u64)) {
        frame(self.frame.elr);
        // After a jump to where no code is, the link register still says who jumped.
        if !crate::layout::text().contains(&self.frame.elr) && crate::layout::text().contains(&self.frame.x[30]) {
            frame(self.frame.x[30] - 4);
        }
        crate::backtrace::from(self.frame.x[29], frame);
    }

    /// Whether the fault was in the page below a stack of this core: a stack that overflowed.
    pub fn is_stack_overflow(&self) -> bool {
        let esr = Esr(self.frame.esr);
        let far = self.frame.far;
        self.kind == Kind::Synchronous
            && esr.is_translation_fault()
            && percore::stacks(percore::index())
                .ranges()
                .iter()
                .any(|range| far < range.start && range.start - far <= crate::layout::PAGE_SIZE as u64)
    }
}

impl fmt::Display for Unexpected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let esr = Esr(self.frame.esr);
        let core = percore::index();
        match self.kind {
            Kind::Synchronous if self.is_stack_overflow() => write!(f, "stack overflow on core {core}: {esr}")?,
            Kind::Synchronous => write!(f, "exception on core {core}: {esr}")?,
            Kind::Irq | Kind::Fiq => write!(f, "interrupt without a handler on core {core}")?,
            Kind::SError => write!(f, "SError on core {core}: a device or the memory system refused an access")?,
            Kind::LowerLevel => write!(f, "exception from a lower level on core {core}: {esr}")?,
        }
        if esr.far_valid() && self.kind == Kind::Synchronous {
            write!(f, " of {:#018x}", self.frame.far)?;
        }
        writeln!(f)?;
        let frame = self.frame;
        writeln!(f, "  pc  {:#018x}  sp  {:#018x}  far {:#018x}", frame.elr, frame.sp, frame.far)?;
        write!(f, "  esr {:#018x}  spsr {:#x}", frame.esr, frame.spsr)?;
        for (index, value) in frame.x.iter().enumerate() {
            if index % 4 == 0 {
                writeln!(f)?;
            }
            write!(f, "  x{index:<2} {value:#018x}")?;
        }
        Ok(())
    }
}

static IRQ_ENTRY: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static REPORTER: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Makes `entry` the handler of all interrupts, on every core. It is called with interrupts masked, once for each time the
/// processor takes the interrupt; it serves whatever its controller says is pending.
pub fn set_irq_entry(entry: fn()) {
    IRQ_ENTRY.store(entry as *mut (), Ordering::Release);
}

/// Makes `reporter` the last word on exceptions that nothing expected. Without one the kernel exits with status 1 in silence.
pub fn set_reporter(reporter: fn(&Unexpected<'_>) -> !) {
    REPORTER.store(reporter as *mut (), Ordering::Release);
}

#[unsafe(no_mangle)]
extern "C" fn exception_rust(kind: u64, frame: &mut Frame) {
    let kind = match kind {
        0 => Kind::Synchronous,
        1 => Kind::Irq,
        2 => Kind::Fiq,
        3 => Kind::SError,
        _ => Kind::LowerLevel,
    };
    match kind {
        Kind::Irq => {
            crate::smp::stop_if_told();
            let entry = IRQ_ENTRY.load(Ordering::Acquire);
            if !entry.is_null() {
                // SAFETY: the pointer is not null, so `set_irq_entry` stored a `fn()` there.
                let entry = unsafe { core::mem::transmute::<*mut (), fn()>(entry) };
                entry();
                return;
            }
        }
        Kind::Synchronous if crate::probe::land(frame) => return,
        _ => {}
    }
    let reporter = REPORTER.load(Ordering::Acquire);
    if reporter.is_null() {
        exit::exit(1);
    }
    // SAFETY: the pointer is not null, so `set_reporter` stored a function of this type there.
    let reporter = unsafe { core::mem::transmute::<*mut (), fn(&Unexpected<'_>) -> !>(reporter) };
    reporter(&Unexpected { kind, frame });
}

/// A fault while a fault of a handler was being reported: nothing can be trusted any more.
#[unsafe(no_mangle)]
extern "C" fn fault_while_reporting() -> ! {
    exit::exit(1)
}
