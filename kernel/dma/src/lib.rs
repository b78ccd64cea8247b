//! The DMA-API: a device reaches exactly the memory it was lent, for exactly as long as it was lent it.
//!
//! A [`Device`] is one bus master. A driver takes owned memory ([`Pages`], [`PageSet`]), lends it with [`Device::map`], names
//! the addresses of the resulting [`Mapped`] to its device, and gets the memory back from [`Mapped::unmap`]. Rings are
//! [`Coherent`], what several devices use is a [`SharedBuffer`], borrowed bytes go through [`Device::with_mapped`].
//!
//! ```
//! # #[cfg(feature = "fakes")] {
//! # let system = dma::fakes::FakeSystem::new();
//! # let fake = system.device("disk").unwrap();
//! # let device = &fake.device;
//! use dma::{FromDevice, Ladder, PageSet, slice};
//!
//! let buffer = PageSet::zeroed(device.memory(), 16384, Ladder::SINGLE_PAGES)?; // anywhere in memory
//! let mapped = device.map::<FromDevice, _>(buffer)?; // consumed: nobody but the device has it
//! let segment = slice(&mapped, 4096, 512)?.next().unwrap(); // for a descriptor
//! # fake.master.write(segment.iova, b"data").unwrap();
//! // ... the device writes; meanwhile the CPU may look, but not refer:
//! assert_eq!(&mapped.view().read_array::<4>(4096)?, b"data");
//! let buffer = mapped.unmap()?; // revoked: plain memory again
//! assert_eq!(buffer.chunks().nth(1).unwrap()[..4], *b"data");
//! # }
//! # Ok::<(), dma::Error>(())
//! ```
//!
//! # What holds, whatever safe code, a device or firmware does
//!
//! - Memory is reachable by a device from `map` until a *successful* revocation, and is owned by the mapping meanwhile:
//!   references to it exist only before and after (R3, R4). In between the CPU looks at it through a [`View`].
//! - Who forgets a mapping leaks memory, and nothing else. A revocation that fails puts the memory into [`quarantine`].
//! - The permission of the device follows from the type of the direction (R5), and so does what the CPU may copy.
//! - A DMA address belongs to one device: drivers check a loan with [`Device::check_loan`].
//!
//! Loans that are over together end together ([`Gather`]), those whose memory is not needed soon end lazily ([`Mapped::unmap_lazy`]).
//! Many buffers, or parts of them, are one [`ScatterList`]; addresses that are wanted before the memory are a [`Reservation`].
//!
//! What several devices, the CPU and processes have at once is a [`SharedBuffer`]: exporters, importers, fences, moves. One range of
//! addresses over memory in pieces is [`vcm`].
//!
//! A driver that wants an address space for itself has an [`OwnedDomain`] (the IOMMU-API): it says what lies where, and swaps
//! whole address spaces under a running device.
//!
//! All of it rests on the contract of [`iommu::contract`], and on the promises of [`DmaMemory`]. Devices without an IOMMU are
//! held by nothing: making one is `unsafe` ([`Device::direct`]).
//!
//! # Kinds of memory
//!
//! | kind | how |
//! |---|---|
//! | coherent, in one step or in two | [`Device::coherent`], [`Device::coherent_init`] and [`Unpublished::publish`] |
//! | for privileged transactions only | [`Device::coherent_privileged`], [`Unpublished::publish_privileged`] |
//! | write-combined, for the device to read | [`Device::write_combined`] |
//! | cached, with explicit synchronization | [`Device::non_coherent`]: a [`Mapped`] with its `sync_for_cpu` and `sync_for_device` |
//! | without a mapping in the kernel | [`Device::hidden`] |
//! | contiguous, whatever it takes | [`Device::pages`] |
//! | single pages | [`Device::page_set`] with [`Ladder::SINGLE_PAGES`] |
//!
//! All are revoked and freed by their drop, and kept in quarantine when that fails. What a device, a memory or an address space
//! cannot give is [`Error::Unsupported`] or [`Error::Attributes`].
//!
//! # Locking
//!
//! Mapping and unmapping take the locks of the group, the address allocator, the page table and, on unmap, the command queue,
//! one after the other, and none of this crate's. The crate's own locks (list of devices, quarantine, users of a shared
//! buffer) are held for a few instructions; only under the one of the list of devices is memory allocated. Nothing here is for
//! interrupt handlers but [`Device::explain`], which neither locks nor allocates by itself.
//!
//! Drivers of the `virtio-drivers` crate run unmodified over it: see `hal` (feature `virtio-drivers`).
//!
//! # Unsafe code
//!
//! Is allowed in the modules that touch raw memory, and nowhere else; each says why.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
#[macro_use]
extern crate std;

mod attributed;
mod berth;
mod bounce;
mod buffer;
mod bytes;
mod coherent;
mod combined;
pub(crate) mod copy;
mod device;
mod direct;
mod direction;
mod error;
mod explain;
#[cfg(feature = "fakes")]
pub mod fakes;
mod gather;
#[cfg(feature = "virtio-drivers")]
pub mod hal;
mod held;
mod hidden;
pub mod lazy;
mod lent;
mod limits;
mod list;
mod mapped;
mod memory;
mod open;
mod owned;
mod page_set;
mod pages;
mod peer;
mod policy;
mod pool;
pub mod quarantine;
mod record;
mod reserve;
mod scoped;
mod share;
mod site;
mod stats;
mod stray;
pub mod tracker;
mod translated;
pub mod vcm;
mod view;
mod words;

pub use buffer::Buffer;
pub use bytes::{Bytes, MappedBytes};
pub use coherent::{Coherent, DeviceShared, Unpublished};
pub use combined::WriteCombined;
pub use device::{Device, DeviceConfig, DirectConfig};
pub use direct::BusWindow;
pub use direction::{Bidirectional, DeviceReads, DeviceWrites, Direction, FromDevice, ToDevice};
pub use error::{BusyWith, Error, Rejected};
pub use explain::{Explanation, Fate};
pub use gather::{Drain, Endable, Ending, Ends, Finished, Gather, end_together};
pub use hidden::HiddenPages;
pub use lazy::{Lapsing, Pending, Strictness};
pub use lent::{Lent, Segment, Slices, slice};
pub use limits::Limits;
pub use list::{ListView, MappedList, ScatterList};
pub use mapped::Mapped;
pub use memory::{AttributeError, Cacheability, DmaMemory, PageRequest, RawPages};
pub use open::OpenPages;
pub use owned::{IdentityAttachment, OwnedAttachment, OwnedDomain, Placed, vouch};
pub use page_set::{Ladder, PageSet};
pub use pages::Pages;
pub use peer::{MappedPeer, PeerRange};
pub use policy::{Bounce, Policy, PoolSource};
pub use pool::Pool;
pub use quarantine::Quarantined;
pub use reserve::{Assembled, Carved, Linkable, Linked, NotLinked, Part, Placement, Reservation, Staged, Stages};
pub use scoped::Scoped;
pub use share::{
    Attachment, Attributes, CarvedOut, CoherentPages, CpuAccess, CpuIntent, CpuReads, CpuWrites, Exporter, Extents,
    Fence, Import, Importer, Job, Remapped, SharedBuffer, SpaceAccess, TILE, TileView, Tiles, Turn, Users, Watch,
};
pub use stats::{DeviceStats, live};
pub use stray::Stray;
pub use view::View;
