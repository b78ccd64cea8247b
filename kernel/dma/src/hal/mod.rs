//! Unmodified foreign drivers: those of the `virtio-drivers` crate, over this DMA-API.
//!
//! Their interface to a kernel, [`virtio_drivers::Hal`], is a set of functions without an object: a type stands for all devices
//! that a driver of that type may have. Here it stands for one. [`foreign_driver!`](crate::foreign_driver) declares such a type
//! together with a [`Slot`]; whoever owns the device fills the slot before the driver starts and empties it afterwards, and
//! everything in between goes to that device's own address space.
//!
//! # What is guaranteed
//!
//! - The device reaches copies and rings, in pages of their own, and nothing else. A driver shares borrowed memory, which is never
//!   lent (see [`Scoped`](crate::Scoped)): `share` lends a copy, `unshare` revokes it and copies back what the device may have
//!   written. What lies beside the buffer in its page is not shown.
//! - The device may do with the memory what its direction says: it cannot write descriptors, available rings or what it is to read.
//! - All that is lent is kept account of. To end what was never begun, to end it twice, or with another buffer, another direction
//!   or another size is a [`Misuse`]: logged, counted, and without effect but that the device loses the memory.
//! - `Hal` has no way to say that nothing could be shared. The driver then gets an address of a range that is set aside for that
//!   and never mapped: a device that uses it faults. For what is larger than this range the device is put out of use
//!   ([`Device::shut_down`](crate::Device::shut_down)). Either is a failure in the [`Report`].
//! - When the slot is emptied the device loses everything, and the [`Report`] says what the driver had left lent.
//!
//! # What is not
//!
//! - The drivers use `unsafe` of their own, and this is no fence around it: they read and write through the pointers that they
//!   get. The memory of rings stays allocated until the driver gives it back, even beyond the removal of its device (it may still
//!   look into it), and is leaked if it never does.
//! - A driver that waits for its device without a deadline waits for ever if the device does not answer, be it because it has
//!   faulted. Use the calls that do not block where that matters.
//! - A driver that keeps a `&mut` to a buffer that it has shared sees no change before `unshare`, which is harmless; one that
//!   gives a pointer to memory that is not its own breaks the contract of `Hal`, and nothing here can notice.
//! - What a partial transfer leaves in a buffer is what was in it: the copy starts with the contents of the buffer also where the
//!   device only writes. Where the format of the tables has no write-only memory the device can read that.
//!
//! # Locking
//!
//! One [`IrqMutex`](base::IrqMutex) for each slot, a leaf: what the driver has lent. Nothing is mapped, revoked, allocated or
//! freed while it is held. Not for interrupt handlers: ending a share waits for the IOMMU.

#![expect(unsafe_code, reason = "implements an unsafe interface, by which it is handed raw memory")]

mod account;
mod slot;

pub use account::{Misuse, Report};
pub use slot::Slot;

use core::marker::PhantomData;
use core::panic::Location;
use core::ptr::NonNull;
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

/// A type that stands for one device of a foreign driver; made by [`foreign_driver!`](crate::foreign_driver).
pub trait HasSlot: 'static {
    /// Where the device is to be found.
    fn slot() -> &'static Slot;
}

/// Declares types that each stand for one device of a foreign driver: [`ForeignHal`] of such a type is the driver's `Hal`.
///
/// ```
/// # #[cfg(feature = "fakes")] {
/// use dma::hal::{ForeignHal, HasSlot};
/// use virtio_drivers::{BufferDirection, Hal};
///
/// dma::foreign_driver! {
///     /// The disk with the pictures.
///     pub Pictures
/// }
///
/// # let system = dma::fakes::FakeSystem::new();
/// # let disk = system.device("disk").unwrap();
/// Pictures::slot().install(&disk.device)?;
/// // ... what the driver does with its `Hal`, `ForeignHal<Pictures>`:
/// let (address, ring) = ForeignHal::<Pictures>::dma_alloc(1, BufferDirection::Both);
/// assert_ne!(address, 0);
/// # disk.master.write(iommu::Iova::new(address), b"used").unwrap();
/// // SAFETY: allocated above.
/// unsafe { ForeignHal::<Pictures>::dma_dealloc(address, ring, 1) };
/// // ... and when it has been dropped:
/// let report = Pictures::slot().remove().unwrap();
/// assert_eq!((report.shares, report.rings, report.misuses), (0, 0, 0));
/// # }
/// # Ok::<(), dma::Error>(())
/// ```
#[macro_export]
macro_rules! foreign_driver {
    ($($(#[$meta:meta])* $visibility:vis $name:ident)+) => {
        $(
            $(#[$meta])*
            #[derive(Debug)]
            $visibility enum $name {}

            impl $crate::hal::HasSlot for $name {
                fn slot() -> &'static $crate::hal::Slot {
                    static SLOT: $crate::hal::Slot = $crate::hal::Slot::new();
                    &SLOT
                }
            }
        )+
    };
}

/// The `Hal` of the one device that `S` stands for.
#[derive(Debug)]
pub struct ForeignHal<S: HasSlot>(PhantomData<S>);

impl<S: HasSlot> ForeignHal<S> {
    /// Evaluated only where [`Hal::mmio_phys_to_virt`] is compiled for use.
    const NO_REGISTERS: () =
        panic!("registers are the board's: give the driver a transport that has them, not one that maps them itself");
}

// SAFETY:
// - `dma_alloc` returns zeroed pages of an allocation of its own, aligned to pages, which the slot keeps until `dma_dealloc` names
//   exactly them, and does not touch; or address 0, which stands for a failure;
// - `mmio_phys_to_virt` is in no program that compiles.
unsafe impl<S: HasSlot> Hal for ForeignHal<S> {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        S::slot().allocate(pages, direction, Location::caller())
    }

    /// Always returns 0: callers take anything else for a reason to panic.
    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        S::slot().deallocate(paddr, vaddr, pages, Location::caller());
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        let () = Self::NO_REGISTERS;
        NonNull::dangling()
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        // SAFETY: the caller's promise: valid, and accessed by nobody else meanwhile.
        unsafe { S::slot().share(buffer, direction, Location::caller()) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        // SAFETY: as above.
        unsafe { S::slot().unshare(paddr, buffer, direction, Location::caller()) }
    }
}
