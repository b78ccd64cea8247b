//! EL0: entering a process, and what it leaves by.
//!
//! A process runs inside a call of [`enter`]: the kernel sets the process's tables and registers, drops to EL0, and the call
//! returns when the process has asked for something, has done wrong, or an interrupt has come. So there is no scheduler in here,
//! and a process has no stack in the kernel: its state is a [`Context`], and whoever calls [`enter`] again lets it go on.
//!
//! # What a process cannot do
//!
//! - Reach the kernel: its tables are in TTBR0 only while it runs, those of the kernel have no entry for EL0.
//! - Have the kernel reach what it names: while the kernel runs, TTBR0 is a table without entries. Where the core has PAN it is
//!   always on.
//! - Run for ever: interrupts are not masked at EL0, and each stay has an alarm.
//! - Read what others left: all registers that EL0 can read are its own or zero. Counters, cache maintenance, WFI and debug
//!   registers are trapped, which ends it.
//!
//! # Translations (DDI 0487, D8.13)
//!
//! Leaves of processes are not global: TLBs tag them with the ASID in TTBR0. An ASID belongs to one set of tables from
//! [`Asid::allocate`] until it is dropped, which removes what is tagged with it from the TLBs of all cores.
//!
//! # Locking
//!
//! The list of ASIDs has an [`IrqMutex`], a leaf.

use crate::esr::Esr;
use crate::{irq, mmu, timer};
use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTKCTL_EL1, ID_AA64MMFR0_EL1, SCTLR_EL1, TCR_EL1, TTBR0_EL1};
use base::{IrqMutex, cpu};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tock_registers::interfaces::{ReadWriteable, Readable, Writeable};

global_asm!(include_str!("asm/user.s"));

/// The registers of a process that does not run. The layout is known to the assembly.
#[repr(C, align(16))]
#[derive(Clone, Debug)]
pub struct Context {
    /// x0 to x30.
    pub x: [u64; 31],
    /// SP_EL0.
    pub sp: u64,
    /// Where it goes on.
    pub pc: u64,
    spsr: u64,
    /// ESR_EL1 of the exception by which it left.
    esr: u64,
    /// FAR_EL1, likewise.
    far: u64,
    fpsr: u64,
    fpcr: u64,
    tpidr: u64,
    _padding: u64,
    q: [u128; 32],
}

const _: () = {
    assert!(core::mem::offset_of!(Context, sp) == 248);
    assert!(core::mem::offset_of!(Context, pc) == 256);
    assert!(core::mem::offset_of!(Context, esr) == 272);
    assert!(core::mem::offset_of!(Context, fpsr) == 288);
    assert!(core::mem::offset_of!(Context, tpidr) == 304);
    assert!(core::mem::offset_of!(Context, q) == 320);
};

/// Condition flags: all of SPSR_EL1 that a process decides about.
const SPSR_FLAGS: u64 = 0xf << 28;
/// SPSR_EL1.PAN. (The rest is zero: EL0, AArch64, nothing masked.)
const SPSR_PAN: u64 = 1 << 22;
/// SCTLR_EL1.SPAN: exceptions leave PSTATE.PAN alone.
const SPAN: u64 = 1 << 23;

impl Context {
    /// A process that begins at `pc` with its stack ending at `sp`. Every other register is zero.
    pub fn new(pc: u64, sp: u64) -> Self {
        Self { x: [0; 31], sp, pc, spsr: 0, esr: 0, far: 0, fpsr: 0, fpcr: 0, tpidr: 0, _padding: 0, q: [0; 32] }
    }
}

/// Why a process is not running any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An interrupt, which has been served; its alarm; or before it began it was told to stop, or there was something to catch up with.
    Interrupted,
    /// A system call: SVC with this immediate.
    Call(u16),
    /// An instruction that it may not execute, or that faulted.
    Fault {
        /// What it was.
        esr: Esr,
        /// The address of the access, where the syndrome says that it counts.
        far: u64,
    },
    /// An asynchronous abort that came while it ran: a device or the memory system has refused an access.
    SError,
}

/// Translation tables for EL0: the root's physical address, and the identifier of what TLBs have of them.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Physical address of a table of level 0 with granule 4 KiB, for 48-bit addresses, with the memory types of
    /// [`mmu::MAIR`].
    pub root: u64,
    /// Whose they are.
    pub asid: &'a Asid,
}

/// Runs the process of `context` on this core until it leaves. Interrupts that were enabled are served before this returns.
///
/// It is interrupted at `deadline`, in nanoseconds of [`timer::now`], and does not begin if `stop` is set; whoever sets it
/// afterwards interrupts the core ([`crate::user::interrupt`]). Nor does it if handlers have left something that the caller has not
/// caught up with ([`base::deferred::catch_up`]).
///
/// # Safety
///
/// - What `tables` map for EL0 may be read and written, as far as the entries allow, by anybody at any moment: Rust code has no
///   reference to it.
/// - `root` is the root of such tables, and they and all below it stay in place until this returns.
/// - What is no longer mapped has been removed from TLBs ([`Asid::invalidate`]) before it was used otherwise.
pub unsafe fn enter(context: &mut Context, tables: Tables<'_>, deadline: u64, stop: &AtomicBool) -> Exit {
    unsafe extern "C" {
        fn user_enter(context: *mut Context) -> u64;
    }
    prepare();
    context.spsr = context.spsr & SPSR_FLAGS | if has_pan() { SPSR_PAN } else { 0 };
    let state = irq::save();
    // Looked at with interrupts masked: who sets it later finds this core to interrupt, and a handler that leaves something later has
    // interrupted the process.
    if stop.load(Ordering::SeqCst) || base::deferred::is_behind() {
        irq::restore(state);
        return Exit::Interrupted;
    }
    timer::arm(deadline);
    TTBR0_EL1.set(tables.root | u64::from(tables.asid.0) << 48);
    barrier::isb(barrier::SY);
    // SAFETY:
    // - the context is exclusively borrowed, and laid out as the assembly expects;
    // - the function keeps what a function keeps by the rules of C, whatever the process does: it saves it on this stack, which
    //   has no entry in the process's tables; interrupts are masked on entry and when it returns;
    // - the caller answers for the tables.
    let kind = unsafe { user_enter(context) };
    mmu::leave_user();
    timer::rearm();
    irq::restore(state);
    match kind {
        0 => {
            let esr = Esr(context.esr);
            if esr.class() == 0x15 { Exit::Call(esr.iss() as u16) } else { Exit::Fault { esr, far: context.far } }
        }
        3 => Exit::SError,
        _ => Exit::Interrupted,
    }
}

/// Whether this core keeps the kernel from what EL0 can reach (PSTATE.PAN): `None` where it has no such thing. Set when a process
/// has run on it.
pub fn never() -> Option<bool> {
    has_pan().then(|| {
        let state: u64;
        // SAFETY: reads PSTATE.PAN, by its encoding.
        unsafe { asm!("mrs {}, s3_0_c4_c2_3", out(reg) state, options(nomem, nostack, preserves_flags)) };
        state & SPSR_PAN != 0
    })
}

/// Reads a word at `va` as the kernel, but with the tables of a process in place, which they never are while the kernel runs: for tests
/// of its protection. `allowed` lifts PAN meanwhile.
///
/// # Errors
///
/// The fault.
///
/// # Safety
///
/// As [`enter`]; nobody has a reference to what is read. A process has run on this core.
pub unsafe fn read_from_kernel(tables: Tables<'_>, va: u64, allowed: bool) -> Result<u64, crate::probe::Fault> {
    let lift = allowed && never() == Some(true);
    let state = irq::save();
    TTBR0_EL1.set(tables.root | u64::from(tables.asid.0) << 48);
    barrier::isb(barrier::SY);
    if lift {
        // SAFETY: MSR PAN, #0, for one load, with interrupts masked.
        unsafe { asm!(".inst 0xd500409f", options(nostack, preserves_flags)) };
    }
    // SAFETY: the caller's promise; it may fault.
    let read = unsafe { crate::probe::read64(va) };
    if lift {
        // SAFETY: MSR PAN, #1.
        unsafe { asm!(".inst 0xd500419f", options(nostack, preserves_flags)) };
    }
    mmu::leave_user();
    irq::restore(state);
    read
}

/// Interrupts the core with logical index `core`, so that a process that runs there leaves.
pub fn interrupt(core: usize) {
    <crate::hooks::Hooks as base::Hooks>::kick(1 << (core & (cpu::MAX_CPUS - 1)));
}

/// Whether the core has Privileged Access Never.
fn has_pan() -> bool {
    let features: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, id_aa64mmfr1_el1", out(reg) features, options(nomem, nostack, preserves_flags, pure)) };
    features >> 20 & 0xf != 0
}

/// Makes this core fit for processes, if it is not.
fn prepare() {
    if TCR_EL1.matches_all(TCR_EL1::EPD0::EnableTTBR0Walks) {
        return;
    }
    // The table in TTBR0 has no entries, so that nothing comes of walks that are now allowed.
    mmu::leave_user();
    // No counter, physical or virtual, and no timer at EL0.
    CNTKCTL_EL1.set(0);
    if has_pmu() {
        // SAFETY: keeps EL0 from the PMU.
        unsafe { asm!("msr pmuserenr_el0, xzr", options(nostack, preserves_flags)) };
    }
    // SAFETY: keeps EL0 from the debug communication channel (MDSCR_EL1.TDCC), and switches debugging off.
    unsafe { asm!("msr mdscr_el1, {}", in(reg) 1_u64 << 12, options(nostack, preserves_flags)) };
    if has_amu() {
        // SAFETY: AMUSERENR_EL0, by its encoding: keeps EL0 from the activity monitors.
        unsafe { asm!("msr s3_3_c13_c2_3, xzr", options(nostack, preserves_flags)) };
    }
    if has_pan() {
        // PAN is set by every exception from EL0 too.
        SCTLR_EL1.set(SCTLR_EL1.get() & !SPAN);
        // SAFETY: MSR PAN, #1, by its encoding: the assembler knows it only where the target has it. The kernel never touches what
        // EL0 can reach.
        unsafe { asm!(".inst 0xd500419f", options(nostack, preserves_flags)) };
    }
    let wide = ID_AA64MMFR0_EL1.matches_all(ID_AA64MMFR0_EL1::ASIDBits::Bits_16);
    TCR_EL1
        .modify(TCR_EL1::EPD0::EnableTTBR0Walks + if wide { TCR_EL1::AS::ASID16Bits } else { TCR_EL1::AS::ASID8Bits });
    barrier::isb(barrier::SY);
    // SAFETY: drops this core's translations, which may have been tagged by shorter ASIDs; the tables are as they should be.
    unsafe { asm!("tlbi vmalle1", "dsb nsh", "isb", options(nostack, preserves_flags)) };
}

fn has_pmu() -> bool {
    let features: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, id_aa64dfr0_el1", out(reg) features, options(nomem, nostack, preserves_flags, pure)) };
    !matches!(features >> 8 & 0xf, 0 | 0xf)
}

fn has_amu() -> bool {
    let features: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, id_aa64pfr0_el1", out(reg) features, options(nomem, nostack, preserves_flags, pure)) };
    features >> 44 & 0xf != 0
}

/// Identifiers that every core has: 8 bits of them.
const ASIDS: usize = 256;

/// One bit for each identifier in use; 0 is the kernel's. After them where the next search begins.
static USED: IrqMutex<([u64; ASIDS / 64], usize)> = IrqMutex::new(([1, 0, 0, 0], 1));
/// Identifiers in use, for reports.
static IN_USE: AtomicU64 = AtomicU64::new(0);

/// An identifier of translations in the TLBs of all cores (DDI 0487, D8.13.1: ASID). One owner, one set of tables.
#[derive(Debug)]
pub struct Asid(u16);

impl Asid {
    /// Takes an identifier, if one is free: with which no TLB has an entry tagged. A freed one rests as long as possible.
    pub fn allocate() -> Option<Self> {
        let mut guard = USED.lock();
        let (used, next) = &mut *guard;
        let free = (0..ASIDS).map(|step| (*next + step) % ASIDS).find(|id| used[id / 64] >> (id % 64) & 1 == 0)?;
        used[free / 64] |= 1 << (free % 64);
        *next = (free + 1) % ASIDS;
        IN_USE.fetch_add(1, Ordering::Relaxed);
        Some(Self(free as u16))
    }

    /// How many are in use.
    pub fn in_use() -> u64 {
        IN_USE.load(Ordering::Relaxed)
    }

    /// The number.
    pub fn get(&self) -> u16 {
        self.0
    }

    /// Removes the pages of `len` bytes at `va`, whose entries are gone from the tables, from the TLBs of all cores. When this
    /// returns no access through them is under way any more.
    pub fn invalidate(&self, va: u64, len: u64) {
        /// Pages beyond which everything goes.
        const MANY: u64 = 64;
        let page = crate::layout::PAGE_SIZE as u64;
        if len / page > MANY {
            return self.invalidate_all();
        }
        barrier::dsb(barrier::ISHST);
        for at in (va..va.saturating_add(len)).step_by(crate::layout::PAGE_SIZE) {
            let operand = u64::from(self.0) << 48 | at >> 12 & 0xfff_ffff_ffff;
            // SAFETY: drops cached translations; the tables are as they should be.
            unsafe { asm!("tlbi vale1is, {}", in(reg) operand, options(nostack, preserves_flags)) };
        }
        barrier::dsb(barrier::ISH);
        barrier::isb(barrier::SY);
    }

    /// Removes everything that is tagged so from the TLBs of all cores.
    pub fn invalidate_all(&self) {
        barrier::dsb(barrier::ISHST);
        let operand = u64::from(self.0) << 48;
        // SAFETY: drops cached translations.
        unsafe { asm!("tlbi aside1is, {}", in(reg) operand, options(nostack, preserves_flags)) };
        barrier::dsb(barrier::ISH);
        barrier::isb(barrier::SY);
    }
}

impl Drop for Asid {
    fn drop(&mut self) {
        self.invalidate_all();
        let id = usize::from(self.0);
        USED.lock().0[id / 64 % 4] &= !(1 << (id % 64));
        IN_USE.fetch_sub(1, Ordering::Relaxed);
    }
}
