//! Cache maintenance by virtual address, to the point of coherency.

use core::arch::asm;

/// The smallest data cache line of any core, in bytes.
fn line() -> usize {
    let ctr: usize;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags, pure)) };
    4 << (ctr >> 16 & 0xf)
}

macro_rules! maintenance {
    ($(#[$doc:meta])* $name:ident, $instruction:literal, $safety:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        ///
        #[doc = $safety]
        pub unsafe fn $name(address: usize, len: usize) {
            let line = line();
            let end = address.saturating_add(len);
            let mut at = address & !(line - 1);
            while at < end {
                // SAFETY: the caller answers for the range.
                unsafe { asm!(concat!("dc ", $instruction, ", {}"), in(reg) at, options(nostack, preserves_flags)) };
                at += line;
            }
            // SAFETY: a barrier: the maintenance is complete for every observer.
            unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
        }
    };
}

maintenance! {
    /// Writes the lines of `len` bytes at `address` back to memory: what this core wrote becomes visible to a device that does
    /// not look into caches.
    clean, "cvac", "The range is mapped."
}
maintenance! {
    /// Writes the lines back and drops them.
    clean_invalidate, "civac", "The range is mapped."
}
maintenance! {
    /// Drops the lines of `len` bytes at `address`, so that the next read sees what a device wrote.
    invalidate, "ivac", "The range is mapped, starts and ends at cache line boundaries ([`line_size`]), and nothing in it that was \
        written by a core and not yet cleaned is needed."
}

/// Has all cores fetch instructions anew, after some were written and cleaned to memory.
pub fn forget_instructions() {
    // SAFETY: drops instructions that are cached; those that are needed are fetched again.
    unsafe { asm!("dsb ish", "ic ialluis", "dsb ish", "isb", options(nostack, preserves_flags)) };
}

/// Fills whole pages with zeros, a block of the cache at a time where that is allowed (`DC ZVA`).
///
/// # Safety
///
/// The `len` bytes at `address`, both multiples of the page size, are mapped as memory and writable, and nobody else uses them.
pub unsafe fn zero(address: usize, len: usize) {
    let dczid: usize;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags, pure)) };
    let block = 4 << (dczid & 0xf);
    if dczid & 1 << 4 != 0 || block > crate::layout::PAGE_SIZE / 16 {
        // SAFETY: the caller's promise.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(address).write_bytes(0, len) };
        return;
    }
    let end = address + len;
    let mut at = address;
    while at < end {
        // SAFETY: inside the caller's range: sixteen blocks divide a page.
        unsafe {
            asm!(
                ".rept 16",
                "dc zva, {at}",
                "add {at}, {at}, {block}",
                ".endr",
                at = inout(reg) at,
                block = in(reg) block,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// The granule of cache maintenance in bytes: buffers that a non-coherent device writes start and end at its multiples.
pub fn line_size() -> usize {
    line()
}
