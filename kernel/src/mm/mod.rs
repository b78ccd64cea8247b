//! Memory: frames, the heap, and the linear map in which the kernel reaches all of it.
//!
//! # Order
//!
//! The heap works from the first instruction, on a small piece of the image; [`init`] gives the frame allocator all that the
//! machine has and nobody else uses, and from then on the heap grows by frames when it must.
//!
//! # Locking
//!
//! Two locks, both masking interrupts: the heap's and the frame allocator's. Neither is ever taken while the other is held: the
//! heap asks for frames between two attempts, and what the frame allocator allocates for its own books comes from an arena of its
//! own (see the module `heap`). Handlers allocate nothing.

mod alias;
mod frames;
mod heap;
mod zones;

pub use alias::{BLOCK, Backing, Pool, PoolStats};
pub use frames::{
    Frames, alloc, alloc_aligned, alloc_at_hand, alloc_in_area, alloc_zeroed, free, init, stats, subtract,
};
pub use heap::{HeapStats, heap_stats};
pub use zones::{FrameStats, Zone};

use core::sync::atomic::{AtomicU64, Ordering};
use iommu::{PAGE_SIZE, PhysAddr, PhysRange, VirtAddr};

/// Something that memory management could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No free run of frames of that length and alignment in the zone.
    #[error("no {count} free frames in a row ({zone:?})")]
    OutOfFrames {
        /// How many.
        count: usize,
        /// Where.
        zone: Zone,
    },
    /// Nothing, more than there can be, or an alignment that is not a power of two was asked for.
    #[error("{count} frames aligned to {alignment:#x} bytes cannot be allocated")]
    BadRequest {
        /// How many.
        count: usize,
        /// Aligned to how many bytes.
        alignment: u64,
    },
    /// Memory was given back that is not allocated: twice, too much of it, or never ours.
    #[error("{0:?} is not allocated, or not all of it")]
    NotAllocated(PhysRange),
    /// The machine has no memory left over after all that is reserved, or not enough to keep books in.
    #[error("the machine has too little free memory")]
    TooLittle,
    /// The frame allocator has its memory already.
    #[error("memory is set up already")]
    AlreadySetUp,
    /// The frame allocator has no memory yet.
    #[error("memory is not set up yet")]
    TooEarly,
}

/// What is added to a physical address to reach it. On a host, physical addresses are the process's own.
static LINEAR: AtomicU64 = AtomicU64::new(0);

/// The address at which the kernel reaches `address` in the linear map. Valid for memory that [`init`] was told of.
#[inline]
pub fn phys_to_virt(address: PhysAddr) -> VirtAddr {
    VirtAddr::new(address.get().wrapping_add(LINEAR.load(Ordering::Relaxed)))
}

/// The physical address of an address in the linear map. For others, such as those of the image, the result means nothing.
#[inline]
pub fn virt_to_phys(address: VirtAddr) -> PhysAddr {
    PhysAddr::new(address.get().wrapping_sub(LINEAR.load(Ordering::Relaxed)))
}

/// A pointer to `address` in the linear map.
#[inline]
pub fn pointer(address: PhysAddr) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(phys_to_virt(address).get() as usize)
}

/// The number of the frame that `address` lies in.
const fn frame_of(address: PhysAddr) -> usize {
    (address.get() / PAGE_SIZE) as usize
}

const fn address_of(frame: usize) -> PhysAddr {
    PhysAddr::new(frame as u64 * PAGE_SIZE)
}
