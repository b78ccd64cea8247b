//! The CPU interface of a GICv3: system registers of the calling core.

#[cfg(all(target_os = "none", target_arch = "aarch64"))]
mod hardware {
    use aarch64_cpu::asm::barrier;
    use aarch64_cpu::registers::{MPIDR_EL1, Readable};
    use arm_gic::gicv3::{GicCpuInterface, SgiTarget, SgiTargetGroup};
    use arm_gic::{IntId, InterruptGroup};
    use arm_sysregs::el1::{accessors::write_icc_ctlr_el1, registers::IccCtlrEl1};

    /// The affinity of this core, as `GICR_TYPER` spells it.
    pub fn affinity() -> u32 {
        let mpidr = MPIDR_EL1.get();
        (mpidr & 0xff_ffff) as u32 | (mpidr >> 8 & 0xff00_0000) as u32
    }

    /// Lets this core take interrupts of group 1 of every priority.
    pub fn enable() {
        GicCpuInterface::enable_system_register_el1();
        barrier::isb(barrier::SY);
        // A write to the EOI register also deactivates.
        write_icc_ctlr_el1(IccCtlrEl1::empty());
        GicCpuInterface::set_priority_mask(0xff);
        GicCpuInterface::enable_group1(true);
        barrier::isb(barrier::SY);
    }

    /// Acknowledges the most urgent pending interrupt.
    pub fn acknowledge() -> u32 {
        let id = GicCpuInterface::get_and_acknowledge_interrupt(InterruptGroup::Group1).unwrap_or(IntId::SPECIAL_NONE);
        // What the device wrote before it interrupted is seen by the handler.
        barrier::dsb(barrier::SY);
        id.into()
    }

    /// Awaits all accesses of this core so far, also those to devices.
    pub fn finish() {
        barrier::dsb(barrier::SY);
    }

    /// Ends the interrupt `id`, which this core acknowledged.
    pub fn end(id: u32) {
        // The handler's register writes, which silence a level-triggered device, come first.
        finish();
        if let Ok(id) = IntId::try_from(id) {
            GicCpuInterface::end_interrupt(id, InterruptGroup::Group1);
        }
        barrier::isb(barrier::SY);
    }

    /// Sends software generated interrupt `sgi` (below 16) to the core with `affinity`, whose Aff0 is below 16.
    pub fn send_sgi(sgi: u32, affinity: u32) {
        let [affinity0, affinity1, affinity2, affinity3] = affinity.to_le_bytes();
        let target = SgiTarget::List { affinity3, affinity2, affinity1, target_list: 1 << (affinity0 & 0xf) };
        // What was written before is seen by who takes the interrupt.
        barrier::dsb(barrier::ISHST);
        // It fails for an `IntId` that is no SGI only.
        let _ = GicCpuInterface::send_sgi(IntId::sgi(sgi & 0xf), target, SgiTargetGroup::CurrentGroup1);
        barrier::isb(barrier::SY);
    }
}

#[cfg(all(target_os = "none", target_arch = "aarch64"))]
pub(crate) use hardware::*;

/// A host's cores have no CPU interface: what a test puts into the thread's queue is what is pending.
#[cfg(not(all(target_os = "none", target_arch = "aarch64")))]
mod imagined {
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    std::thread_local! {
        pub static AFFINITY: Cell<u32> = const { Cell::new(0) };
        pub static PENDING: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        pub static ENDED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        pub static SENT: RefCell<Vec<(u32, u32)>> = const { RefCell::new(Vec::new()) };
    }

    pub fn affinity() -> u32 {
        AFFINITY.get()
    }
    pub fn enable() {}
    pub fn finish() {}
    pub fn acknowledge() -> u32 {
        PENDING.with_borrow_mut(Vec::pop).unwrap_or(1023)
    }
    pub fn end(id: u32) {
        ENDED.with_borrow_mut(|ended| ended.push(id));
    }
    pub fn send_sgi(sgi: u32, affinity: u32) {
        SENT.with_borrow_mut(|sent| sent.push((sgi, affinity)));
    }
}

#[cfg(not(all(target_os = "none", target_arch = "aarch64")))]
pub(crate) use imagined::*;
