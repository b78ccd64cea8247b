//! Device registers and the processor, as the hand-over sees them: the first through an identity map, the second by entry.s.

use core::arch::global_asm;

global_asm!(include_str!("entry.s"));

unsafe extern "C" {
    /// Leaves for `entry` at EL2, with `argument` in x0.
    pub(crate) safe fn enter(entry: u64, argument: u64) -> !;
    /// Writes the data cache lines of `start..end` back to memory.
    pub(crate) safe fn clean(start: u64, end: u64);
    /// Waits until another core calls [`wake`], or for no reason.
    pub(crate) safe fn wait();
    /// Wakes the cores that [`wait`].
    pub(crate) safe fn wake();
    /// Why this core is at EL3: 0 ESR_EL3, 1 ELR_EL3, 2 FAR_EL3.
    pub(crate) safe fn cause(which: u64) -> u64;
}

/// A device's register.
fn register(address: u64) -> *mut u32 {
    // Registers lie between 1 and 2 GiB, where entry.s maps devices; anything else would be memory.
    assert!((0x4000_0000..0x8000_0000).contains(&address) && address.is_multiple_of(4));
    core::ptr::with_exposed_provenance_mut(address as usize)
}

/// Reads a device's register.
pub(crate) fn read(address: u64) -> u32 {
    // SAFETY: an aligned word of device memory, which holds nothing of the language's.
    unsafe { register(address).read_volatile() }
}

/// Writes a device's register.
pub(crate) fn write(address: u64, value: u32) {
    // SAFETY: as in `read`.
    unsafe { register(address).write_volatile(value) }
}
