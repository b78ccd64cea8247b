//! Device registers: a checked window of memory-mapped I/O.
//!
//! Accesses are single instructions of the stated width in assembly, with a plain base register and no writeback, because a
//! hypervisor can only decode such accesses when they trap (a Rust volatile access may compile to a post-indexed load). On a
//! host they are volatile accesses, so that a window can be laid over ordinary memory in a test.
//!
//! # Invariants
//!
//! A [`Mmio`] covers `len` bytes that stay mapped for the rest of the kernel's life. No `&` reference to them exists. They do not
//! pass the end of the address space (no object does), so the sum of `base` and an offset inside does not overflow.

use core::fmt;
use core::ptr::NonNull;

/// A window of device registers.
///
/// Copies share the window; registers have no owner here, the driver that holds the window orders its accesses.
#[derive(Clone, Copy)]
pub struct Mmio {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: register accesses are single instructions and valid from every core (see the invariant); ordering between cores is
// the driver's business, as it is on one core.
unsafe impl Send for Mmio {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mmio {}

impl fmt::Debug for Mmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mmio({:p}, {:#x} bytes)", self.base, self.len)
    }
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $ldr:literal, $str:literal, $reg:tt) => {
        #[doc = concat!("Reads the `", stringify!($type), "` at byte `offset`.")]
        ///
        /// # Panics
        ///
        /// If the access does not lie in the window or is not aligned: offsets come from the driver, never from a device.
        #[inline]
        #[track_caller]
        pub fn $read(&self, offset: usize) -> $type {
            let pointer = self.at(offset, size_of::<$type>()).cast::<$type>();
            #[cfg(target_arch = "aarch64")]
            {
                let value: $type;
                // SAFETY: `at` has checked range and alignment; the window is mapped (invariant).
                unsafe {
                    core::arch::asm!(
                        concat!($ldr, " {value", $reg, "}, [{pointer}]"),
                        value = out(reg) value,
                        pointer = in(reg) pointer.as_ptr(),
                        options(nostack, preserves_flags),
                    );
                }
                value
            }
            #[cfg(not(target_arch = "aarch64"))]
            // SAFETY: `at` has checked range and alignment; the window is mapped (invariant).
            unsafe {
                pointer.as_ptr().read_volatile()
            }
        }

        #[doc = concat!("Writes the `", stringify!($type), "` at byte `offset`.")]
        ///
        /// # Panics
        ///
        /// If the access does not lie in the window or is not aligned.
        #[inline]
        #[track_caller]
        pub fn $write(&self, offset: usize, value: $type) {
            let pointer = self.at(offset, size_of::<$type>()).cast::<$type>();
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `at` has checked range and alignment; the window is mapped (invariant). What the store makes a device do
            // is bounded by its address space in the IOMMU.
            unsafe {
                core::arch::asm!(
                    concat!($str, " {value", $reg, "}, [{pointer}]"),
                    value = in(reg) value,
                    pointer = in(reg) pointer.as_ptr(),
                    options(nostack, preserves_flags),
                );
            }
            #[cfg(not(target_arch = "aarch64"))]
            // SAFETY: `at` has checked range and alignment; the window is mapped (invariant).
            unsafe {
                pointer.as_ptr().write_volatile(value);
            }
        }
    };
}

impl Mmio {
    /// Makes a window of `len` bytes at `base`.
    ///
    /// # Safety
    ///
    /// - The `len` bytes at `base` are mapped, with a Device memory type on the target, for the rest of the kernel's life.
    /// - They belong to a device, or (in tests) to memory that nothing holds a reference to.
    pub const unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// Where the window begins, for drivers of other crates that keep their own kind of register pointer.
    pub const fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }

    /// The window's size in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the window covers nothing.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part of `len` bytes at byte `offset`, or `None` where that is not inside this window. For offsets that a device
    /// supplies, such as those of virtio capabilities.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: `offset` is at most `self.len`, so the sum stays in or one past the window.
        let base = unsafe { self.base.add(offset) };
        // SAFETY: the part lies inside a window for which the same was promised.
        Some(unsafe { Self::new(base, len) })
    }

    #[inline(always)]
    #[track_caller]
    fn at(&self, offset: usize, size: usize) -> NonNull<u8> {
        // Sizes are powers of two, far below any length of a window.
        let inside = size <= self.len && offset <= self.len - size;
        let aligned = self.base.addr().get().wrapping_add(offset) & (size - 1) == 0;
        assert!(inside && aligned, "register offset outside the window");
        // SAFETY: `offset` is below `self.len`, so the sum stays in the window.
        unsafe { self.base.add(offset) }
    }

    /// Finds the 32-bit register at byte `offset`, for those that are used again and again: it is looked for once.
    ///
    /// # Panics
    ///
    /// If it does not lie in the window or is not aligned.
    #[track_caller]
    pub fn register32(&self, offset: usize) -> Register32 {
        Register32 { pointer: self.at(offset, size_of::<u32>()).cast() }
    }

    access!(read8, write8, u8, "ldrb", "strb", ":w");
    access!(read16, write16, u16, "ldrh", "strh", ":w");
    access!(read32, write32, u32, "ldr", "str", ":w");
    access!(read64, write64, u64, "ldr", "str", ":x");
}

/// One 32-bit register of a window.
///
/// # Invariants
///
/// `pointer` is aligned and lies in a window (see [`Mmio`]), which stays for ever.
#[derive(Debug)]
pub struct Register32 {
    pointer: NonNull<u32>,
}

// SAFETY: as for the window that it is part of.
unsafe impl Send for Register32 {}
// SAFETY: as above.
unsafe impl Sync for Register32 {}

impl Register32 {
    /// Reads it.
    #[inline(always)]
    pub fn read(&self) -> u32 {
        #[cfg(target_arch = "aarch64")]
        {
            let value: u32;
            // SAFETY: a mapped and aligned register (invariant).
            unsafe {
                core::arch::asm!(
                    "ldr {value:w}, [{pointer}]",
                    value = out(reg) value,
                    pointer = in(reg) self.pointer.as_ptr(),
                    options(nostack, preserves_flags),
                );
            }
            value
        }
        #[cfg(not(target_arch = "aarch64"))]
        // SAFETY: a mapped and aligned register (invariant).
        unsafe {
            self.pointer.as_ptr().read_volatile()
        }
    }

    /// Writes it.
    #[inline(always)]
    pub fn write(&self, value: u32) {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a mapped and aligned register (invariant). What the store makes a device do is bounded by its address space in
        // the IOMMU.
        unsafe {
            core::arch::asm!(
                "str {value:w}, [{pointer}]",
                value = in(reg) value,
                pointer = in(reg) self.pointer.as_ptr(),
                options(nostack, preserves_flags),
            );
        }
        #[cfg(not(target_arch = "aarch64"))]
        // SAFETY: a mapped and aligned register (invariant).
        unsafe {
            self.pointer.as_ptr().write_volatile(value);
        }
    }
}

/// A window of registers as a trait, so that tests can put something behind it that reacts.
pub trait Registers: Send + Sync {
    /// Reads 32 bits at byte `offset`.
    fn read32(&self, offset: usize) -> u32;
    /// Writes 32 bits at byte `offset`.
    fn write32(&self, offset: usize, value: u32);
    /// Reads 64 bits at byte `offset`.
    fn read64(&self, offset: usize) -> u64;
    /// Writes 64 bits at byte `offset`.
    fn write64(&self, offset: usize, value: u64);
}

impl Registers for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        Self::read32(self, offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        Self::write32(self, offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        Self::read64(self, offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        Self::write64(self, offset, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(memory: &mut [u64]) -> Mmio {
        let len = size_of_val(memory);
        let base = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        // SAFETY: the memory outlives the window in each test and is not referenced meanwhile.
        unsafe { Mmio::new(base, len) }
    }

    #[test]
    fn accesses_have_their_width_and_place() {
        let mut memory = [0_u64; 2];
        let mmio = window(&mut memory);
        mmio.write64(8, 0x1122_3344_5566_7788);
        assert_eq!(mmio.read32(8), 0x5566_7788);
        assert_eq!(mmio.read16(14), 0x1122);
        mmio.write8(15, 0xaa);
        assert_eq!(mmio.read64(8), 0xaa22_3344_5566_7788);
    }

    #[test]
    fn a_part_cannot_reach_outside_its_window() {
        let mut memory = [0_u64; 2];
        let mmio = window(&mut memory);
        assert!(mmio.part(8, 8).is_some());
        assert!(mmio.part(8, 9).is_none());
        assert!(mmio.part(usize::MAX, 2).is_none());
    }

    #[test]
    #[should_panic(expected = "outside the window")]
    fn an_access_past_the_end_is_refused() {
        let mut memory = [0_u64; 1];
        window(&mut memory).read32(8);
    }
}
