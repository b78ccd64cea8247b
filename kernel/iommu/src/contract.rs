//! The seam between the IOMMU-API and the hardware, and the contract of revocation.
//!
//! # The contract (rule R2)
//!
//! When [`AddressSpace::revoke`] returns `Ok` for a range, then **no device, through whatever stream is or ever was attached
//! to this address space, can reach the memory that was mapped there, and every access that was under way has completed**:
//! the table entries were cleared and the clearing was made visible to the table walker, the translations were removed from
//! every TLB (the IOMMU's and, where ATS is on, the devices'), and the completion of that removal was awaited (CMD_SYNC
//! consumed). Only after that does anybody free, reuse or read the memory, and only after an invalidation that covers all it
//! mapped is a translation table freed. When it returns `Err`, nothing may be assumed of the range, unless the variant says
//! otherwise, and the memory stays in quarantine.
//!
//! All of the DMA-API's safe functions rest on this paragraph, and on nothing else that a device might do.

#![allow(unsafe_code)] // Declarations only: what is promised here is what safe code above relies on.

use crate::domain::Reserved;
use crate::pgtable::{Anchor, Leaves};
use crate::{AttachError, Iova, IovaRange, MapError, OutOfMemory, PhysAddr, PhysRange, Prot, RevokeError, StreamId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::ops::Deref;
use core::sync::atomic::AtomicU64;

/// Where translation tables, stream tables and queues come from.
///
/// Objects of this trait live as long as the kernel.
///
/// # Safety
///
/// What hardware walks decides what devices reach, so the memory must be what it is said to be: [`TableMemory::allocate`] returns
/// memory that nobody else uses until it comes back through [`TableMemory::free`], at the physical address that it names, of
/// the size and alignment asked for, zeroed as the hardware sees it; [`TableMemory::publish`] and [`TableMemory::observe`] do
/// what they say.
pub unsafe trait TableMemory: Send + Sync {
    /// Allocates `bytes` (a power of two, at least 64) of zeroed, physically contiguous memory, aligned to its size, and makes
    /// the zeroes visible to the hardware walker.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory>;

    /// Takes back the memory of a [`TableBlock`]. Called by its `Drop` only.
    fn free(&self, phys: PhysAddr, words: &'static [AtomicU64]);

    /// Makes earlier stores to `words` visible to the hardware walker: cleans them to memory where the walker is not coherent,
    /// and in every case orders them before later stores and register writes ([`base::barrier::publish`]).
    fn publish(&self, words: &[AtomicU64]);

    /// Whether [`TableMemory::publish`] is [`base::barrier::publish`] and nothing else, now and for good, so that the barrier may
    /// stand in its place: memory that the hardware snoops.
    fn publishes_by_barrier(&self) -> bool {
        false
    }

    /// Makes what the hardware has written to `words` visible to later loads. Memory that the CPU caches and the hardware writes
    /// without snooping must drop its cached copy here (the CPU never stores to such words); for all other memory the barrier is
    /// enough, as it stands.
    fn observe(&self, words: &[AtomicU64]) {
        let _ = words;
        base::barrier::device_read();
    }
}

/// Owned memory that hardware walks. Dereferences to its 64-bit words; freed when dropped.
pub struct TableBlock {
    phys: PhysAddr,
    words: &'static [AtomicU64],
    memory: &'static dyn TableMemory,
    /// See [`TableMemory::publishes_by_barrier`].
    by_barrier: bool,
}

impl TableBlock {
    /// Wraps an allocation. For implementations of [`TableMemory`].
    ///
    /// # Safety
    ///
    /// `words` are at `phys`, come from `memory`, and are not used by anybody else until they come back through
    /// [`TableMemory::free`] of `memory`, which may then treat them as free.
    pub unsafe fn new(phys: PhysAddr, words: &'static [AtomicU64], memory: &'static dyn TableMemory) -> Self {
        Self { phys, words, memory, by_barrier: memory.publishes_by_barrier() }
    }

    /// Where the hardware finds it.
    #[inline]
    pub fn phys(&self) -> PhysAddr {
        self.phys
    }

    /// Makes earlier stores to the words `from..to` visible to the hardware (see [`TableMemory::publish`]). A range that is
    /// not inside the block publishes all of it.
    #[inline(always)]
    pub fn publish(&self, from: usize, to: usize) {
        if self.by_barrier {
            base::barrier::publish();
        } else {
            self.publish_words(from, to);
        }
    }

    /// As [`TableBlock::publish`]. `BARRIER`: the caller knows that a barrier does it ([`TableMemory::publishes_by_barrier`]).
    #[inline(always)]
    pub fn publish_as<const BARRIER: bool>(&self, from: usize, to: usize) {
        debug_assert!(self.by_barrier || !BARRIER, "publishing takes more than a barrier");
        if BARRIER {
            base::barrier::publish();
        } else {
            self.publish(from, to);
        }
    }

    #[inline(never)] // Costs more than the call.
    fn publish_words(&self, from: usize, to: usize) {
        self.memory.publish(self.words.get(from..to).unwrap_or(self.words));
    }

    /// Makes what the hardware has written to the words `from..to` visible to later loads (see [`TableMemory::observe`]). A
    /// range that is not inside the block observes all of it.
    #[inline]
    pub fn observe(&self, from: usize, to: usize) {
        self.memory.observe(self.words.get(from..to).unwrap_or(self.words));
    }

    /// The words, for who frees the block after the last use of them only.
    pub(crate) fn kept_words(&self) -> &'static [AtomicU64] {
        self.words
    }

    /// The memory it came from.
    pub fn memory(&self) -> &'static dyn TableMemory {
        self.memory
    }
}

impl Deref for TableBlock {
    type Target = [AtomicU64];
    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        self.words
    }
}

impl Drop for TableBlock {
    fn drop(&mut self) {
        self.memory.free(self.phys, self.words);
    }
}

impl fmt::Debug for TableBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableBlock({}, {} words)", self.phys, self.words.len())
    }
}

/// What an address space can translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aperture {
    /// The input addresses that can be mapped.
    pub range: IovaRange,
    /// One bit for each size that a single leaf can map; the lowest is the page size.
    pub page_sizes: u64,
    /// The largest physical address that can be put out.
    pub output_max: PhysAddr,
}

impl Aperture {
    /// The smallest unit of mapping, in bytes.
    pub const fn page_size(&self) -> u64 {
        self.page_sizes & self.page_sizes.wrapping_neg()
    }
}

/// One device address space as the hardware knows it: full control, no allocation of addresses.
///
/// All methods may be called from several cores at once and from the same core with interrupts masked.
///
/// # Safety
///
/// Implementations keep the contract of this module: [`AddressSpace::revoke`] returns `Ok` only when it holds, and no device
/// reaches anything through this address space but what `map`, or [`Anchor::map`] of an anchor of it, was told, with no more than the
/// permissions it was told (but see [`Prot`] for what a format cannot deny).
pub unsafe trait AddressSpace: Any + Send + Sync {
    /// What can be translated.
    fn aperture(&self) -> Aperture;

    /// Maps `iova` to the `runs` one after another, all or nothing. Needs no invalidation: nothing invalid is cached.
    ///
    /// # Errors
    ///
    /// See [`MapError`]; nothing is mapped after an error.
    ///
    /// # Safety
    ///
    /// Until a later `revoke` of the range returns `Ok`, the devices attached now or later may access the memory of `runs`
    /// within `prot` at any moment: nobody holds a reference to it that this would invalidate, and it is not freed.
    ///
    /// Nobody else maps in `iova` at the same time: an allocator of addresses or a reservation sees to that. (What is mapped there
    /// already makes this fail.)
    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError>;

    /// As [`AddressSpace::map`], but the devices need not find the mapping before a [`AddressSpace::sync`] of its range has returned
    /// `Ok`: for many mappings with one completion. They may find it at once, and it is revoked as any other, synced or not.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::map`].
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError>;

    /// Completes the mappings in `ranges` that [`AddressSpace::map_unsynced`] has made, with one completion for all: what had been
    /// remembered of there being none is forgotten, what had not been told is told. (Nothing, where a mapping that is visible
    /// to the walker is found at once, as on an SMMU.)
    ///
    /// # Errors
    ///
    /// See [`MapError`]. Devices may or may not find any of it then, until it is revoked.
    fn sync(&self, ranges: &[IovaRange]) -> Result<(), MapError> {
        let _ = ranges;
        Ok(())
    }

    /// Revokes all mappings in `ranges`, with one completion for all. `Ok` means what the module's contract says.
    ///
    /// # Errors
    ///
    /// See [`RevokeError`] for what each variant leaves behind.
    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError>;

    /// Finds where `range`, which the caller has for himself, would be mapped by one leaf, for who maps it again and again: by
    /// [`Anchor::map`] in place of [`AddressSpace::map`], and revoked by [`AddressSpace::revoke_anchored`] then. `None` where that
    /// cannot be, or cannot be at present.
    fn anchor(&self, range: IovaRange) -> Option<Anchor> {
        let _ = range;
        None
    }

    /// [`AddressSpace::revoke`] of what was mapped by an anchor of this address space.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::revoke`].
    ///
    /// # Safety
    ///
    /// The anchor is one that this address space has returned.
    unsafe fn revoke_anchored(&self, anchor: &Anchor) -> Result<(), RevokeError> {
        self.revoke(&[anchor.range()])
    }

    /// Translates as the device would be, without a device.
    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)>;

    /// For reports: the leaves that map `range`; `None` where there are no tables to look at.
    fn leaves(&self, range: IovaRange) -> Option<Leaves> {
        let _ = range;
        None
    }

    /// For reports: what the hardware calls it, such as its ASID.
    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

/// One IOMMU: it gives address spaces to streams.
///
/// # Safety
///
/// Implementations block every stream that has not been attached, and keep the contract of this module across attach, replace
/// and block: after [`Iommu::attach`] or [`Iommu::block`] returned `Ok`, the stream reaches nothing through the address space
/// that it had before.
pub unsafe trait Iommu: Send + Sync {
    /// A name for reports, such as `smmuv3@9050000`.
    fn name(&self) -> &str;

    /// Asks the IOMMU itself which parts of `stream`'s address space are not for mappings, beyond what the machine's description
    /// says. What is returned as [`ReservedKind::MsiDoorbell`](crate::domain::ReservedKind::MsiDoorbell) reaches the interrupt
    /// controller without a mapping.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    fn reserved(&self, stream: StreamId) -> Result<Vec<Reserved>, AttachError> {
        let _ = stream;
        Ok(Vec::new())
    }

    /// Makes an empty address space in which nothing is mapped.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError>;

    /// Gives `stream` the address space `space`, in place of the one it had, without a moment in between in which it is
    /// translated by neither.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError>;

    /// Takes the address space away: every access of `stream` is stopped from here on.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    fn block(&self, stream: StreamId) -> Result<(), AttachError>;

    /// Lets `stream` reach all of physical memory, untranslated.
    ///
    /// # Errors
    ///
    /// See [`AttachError`].
    ///
    /// # Safety
    ///
    /// The board vouches for the device: it accesses no memory but what its driver tells it to, and that driver hands it only
    /// memory that may be accessed so.
    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError>;
}
