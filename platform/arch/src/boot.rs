//! From the boot loader to the board's code.

use crate::layout::{self, FDT_MAX, FDT_VA};
use crate::{el3, irq, mmu, percore, pmu};
use aarch64_cpu::asm::barrier;
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

// One block for both: the vectors' constants are used by the entry code.
global_asm!(include_str!("asm/entry.s"));
global_asm!(include_str!("asm/el2.s"));

/// Bytes mapped by an entry of the table below.
const BLOCK: usize = 2 << 20;
/// Where in the early tables the one is that maps the device tree.
const FDT_TABLE: usize = 0x6000;

/// What the boot loader told, and how it came.
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// The physical address of the device tree, as found in x0.
    pub device_tree: u64,
    /// The exception level at which the image was entered: 1, 2 or 3. It runs at 1.
    pub entered_at: u8,
}

/// A device tree that cannot be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceTreeError {
    /// x0 was 0: not started by the Linux boot protocol.
    #[error("the boot loader gave no device tree (is this a flat Image?)")]
    Missing,
    /// The address is not a multiple of 8.
    #[error("the device tree's address {0:#x} is not aligned")]
    Misaligned(u64),
    /// What is there does not start with the magic number.
    #[error("no device tree at {address:#x} (magic number {magic:#x})")]
    BadMagic {
        /// Physical address.
        address: u64,
        /// The number found.
        magic: u32,
    },
    /// The tree claims a size that cannot be.
    #[error("the device tree claims to measure {0} bytes")]
    BadSize(u32),
    /// The final tables are on: the tree is not mapped any more.
    #[error("the device tree is not mapped any more")]
    TooLate,
}

static GONE: AtomicBool = AtomicBool::new(false);

impl BootInfo {
    /// Calls `f` with the device tree's bytes. Possible until [`mmu::init`].
    ///
    /// # Errors
    ///
    /// [`DeviceTreeError`]; its contents are `f`'s to check.
    pub fn with_device_tree<R>(&self, f: impl FnOnce(&[u8]) -> R) -> Result<R, DeviceTreeError> {
        if GONE.load(Ordering::Acquire) {
            return Err(DeviceTreeError::TooLate);
        }
        let address = self.device_tree;
        if address == 0 {
            return Err(DeviceTreeError::Missing);
        }
        if !address.is_multiple_of(8) {
            return Err(DeviceTreeError::Misaligned(address));
        }
        let offset = (address & (BLOCK as u64 - 1)) as usize;
        let start = core::ptr::with_exposed_provenance::<u32>(FDT_VA as usize + offset);
        // SAFETY: the entry code has mapped the 2 MiB block in which the tree starts; the address is aligned to 8.
        let magic = u32::from_be(unsafe { start.read_volatile() });
        if magic != 0xd00d_feed {
            return Err(DeviceTreeError::BadMagic { address, magic });
        }
        // SAFETY: 8-byte alignment puts the second word into the same block.
        let second = unsafe { start.add(1) };
        // SAFETY: as for the first word.
        let size = u32::from_be(unsafe { second.read_volatile() });
        if size as usize > FDT_MAX || size < 40 {
            return Err(DeviceTreeError::BadSize(size));
        }
        map_blocks((offset + size as usize).div_ceil(BLOCK));
        // SAFETY: the range lies in the blocks mapped just now, read-only; the boot loader leaves it alone, and so does the kernel,
        // which has no memory of its own there before the final tables.
        Ok(f(unsafe { core::slice::from_raw_parts(start.cast::<u8>(), size as usize) }))
    }
}

/// Maps `count` blocks (at most 512) from the one in which the device tree starts, which the entry code has mapped. Only called for
/// a tree that says that it reaches so far.
fn map_blocks(count: usize) {
    let table = core::ptr::with_exposed_provenance_mut::<[AtomicU64; 512]>(layout::boot_tables() as usize + FDT_TABLE);
    // SAFETY: the seventh of the early tables: 512 entries in the image's variables, which after the entry code only this function
    // writes, and the walkers read.
    let table = unsafe { &*table };
    if let Some((first, others)) = table.split_first() {
        let first = first.load(Ordering::Relaxed);
        for (number, entry) in others.iter().enumerate().take(count.saturating_sub(1)) {
            entry.store(first + (number as u64 + 1) * BLOCK as u64, Ordering::Release);
        }
    }
    base::barrier::publish();
    barrier::isb(barrier::SY);
}

/// Makes the final tables (see [`mmu::init`]); the device tree is out of reach after that.
///
/// # Errors
///
/// As [`mmu::init`].
pub fn finish_tables(memory: impl IntoIterator<Item = mmu::Physical>) -> Result<(), mmu::MapError> {
    GONE.store(true, Ordering::Release);
    mmu::init(memory)
}

unsafe extern "Rust" {
    /// The board's first function, defined by its `entry!`.
    fn __sluice_entry(boot: BootInfo) -> !;
}

#[unsafe(no_mangle)]
extern "C" fn primary_rust(device_tree: u64, entered_at: u64) -> ! {
    percore::stacks(0).set(layout::boot_main_top(), layout::boot_exception_top(), layout::boot_emergency_top());
    irq::enable_serror();
    mmu::note_image();
    pmu::start();
    if entered_at == 3 {
        el3::note_entry();
    }
    let boot = BootInfo { device_tree, entered_at: entered_at as u8 };
    // SAFETY: the board's `entry!` defines the function with this signature.
    unsafe { __sluice_entry(boot) }
}
