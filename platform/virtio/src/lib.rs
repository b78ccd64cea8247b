//! Modern virtio (1.x) devices over PCI: queue, transport, block, GPU.
//!
//! The device is not trusted. Everything it supplies (capabilities, configuration, indices, identifiers, lengths, status bytes,
//! responses) is checked before use, and what is wrong becomes an [`Error`] that names it. What it can *reach* is not decided
//! here: a driver hands out only addresses of memory that was lent to this very device through `dma`, and insists on
//! `VIRTIO_F_ACCESS_PLATFORM`, without which the device would go around the IOMMU.
//!
//! # Who holds a loan, and until when
//!
//! A request names memory as `Arc<impl dma::Lent>`. The queue keeps a clone of that `Arc` from before the device learns the
//! address until it has *validated* that the device returned the request, or until the device has been reset. No future and no
//! handle can end that: dropping or forgetting one only means that nobody listens for the answer. When the queue has let go,
//! the caller's own `Arc` is the last one and `Arc::try_unwrap` gives the mapping back.
//!
//! # Layers
//!
//! - [`spec`]: constants and layouts of "Virtual I/O Device (VIRTIO) Version 1.2", with its names. No code.
//! - [`transport`]: registers. [`transport::Transport`] is what a bus must offer; `PciTransport` is virtio over PCI;
//!   `ForeignTransport` (feature `virtio-drivers`) lends it to drivers of the `virtio-drivers` crate.
//! - [`device`]: reset, feature negotiation, start and stop of one device.
//! - [`queue`]: the split virtqueue, its in-flight table, requests as futures.
//! - [`blk`], [`gpu`]: the drivers.
//! - [`iommu`]: the driver of an IOMMU that is itself a virtio device. It implements the contract of `iommu::contract`, and only
//!   for that says `unsafe`.
//!
//! # Locking
//!
//! Each queue has one `base::IrqMutex` around its bookkeeping; the GPU has one around its table of resources (those of the IOMMU:
//! see [`iommu`]). Neither is held
//! while the other is taken, nor while a loan is dropped, a waker is woken, or anything is awaited. Handlers take the queue's
//! lock only, allocate nothing and drop no loan (ending a loan waits for the IOMMU).

#![cfg_attr(not(any(test, feature = "fakes")), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod blk;
pub mod device;
mod error;
#[cfg(any(test, feature = "fakes"))]
pub mod fakes;
pub mod gpu;
pub mod iommu;
pub mod queue;
pub mod spec;
pub mod transport;

#[cfg(test)]
mod tests;

pub use error::{Error, Misbehaviour};
