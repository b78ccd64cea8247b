//! Which way data moves, as sealed types (rule R5).
//!
//! A direction decides three things at compile time: what the device may do with the pages, which copies a
//! [`View`](crate::View) has, and which cache maintenance a device that does not snoop the caches needs.

use iommu::Prot;

mod sealed {
    pub trait Sealed {}
}

/// The device reads what the CPU wrote; to the device the pages are read-only.
#[derive(Clone, Copy, Debug)]
pub struct ToDevice;

/// The device writes what the CPU will read; to the device the pages are write-only where the format can say so.
#[derive(Clone, Copy, Debug)]
pub struct FromDevice;

/// The device reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Bidirectional;

/// A direction of DMA: [`ToDevice`], [`FromDevice`] or [`Bidirectional`].
pub trait Direction: sealed::Sealed + Send + Sync + 'static {
    /// What the device may do.
    const PROT: Prot;
    /// Whether the device may read.
    const DEVICE_READS: bool = Self::PROT.contains(Prot::READ);
    /// Whether the device may write.
    const DEVICE_WRITES: bool = Self::PROT.contains(Prot::WRITE);
}

/// A direction in which the device reads: the CPU may supply data.
pub trait DeviceReads: Direction {}

/// A direction in which the device writes: the CPU may fetch data.
pub trait DeviceWrites: Direction {}

impl sealed::Sealed for ToDevice {}
impl sealed::Sealed for FromDevice {}
impl sealed::Sealed for Bidirectional {}

impl Direction for ToDevice {
    const PROT: Prot = Prot::READ;
}
impl Direction for FromDevice {
    const PROT: Prot = Prot::WRITE;
}
impl Direction for Bidirectional {
    const PROT: Prot = Prot::READ.union(Prot::WRITE);
}

impl DeviceReads for ToDevice {}
impl DeviceReads for Bidirectional {}
impl DeviceWrites for FromDevice {}
impl DeviceWrites for Bidirectional {}
