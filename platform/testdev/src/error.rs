//! What can go wrong with a test device.

use pci::PciError;

/// Why a test device did not do what was asked. That a transfer completed says nothing about where its bytes went: the devices
/// do not report what an IOMMU stopped (but see [`TestdevError::Blocked`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TestdevError {
    /// The function is another device.
    #[error("the function is not this device")]
    WrongDevice,
    /// The identification register or the liveness check gave something else.
    #[error("the registers do not answer as they should: {0:#x}")]
    NotAlive(u32),
    /// The transfer does not lie inside the device's buffer, is empty, or is longer than the device can do.
    #[error("{len} bytes at byte {offset} of the device's buffer of {size}")]
    OutsideBuffer {
        /// First byte in the buffer.
        offset: u32,
        /// Bytes asked for.
        len: u32,
        /// Bytes that can be used.
        size: u32,
    },
    /// Another transfer is under way.
    #[error("the device is busy")]
    Busy,
    /// The device did not finish in time. The transfer may still happen.
    #[error("the device did not finish in time")]
    TimedOut,
    /// An IOMMU stopped the transfer.
    #[error("the transfer was stopped on its way")]
    Blocked,
    /// The device read back something else than it wrote.
    #[error("the memory does not hold what the device wrote")]
    Mismatch,
    /// The device refused the parameters, with this code.
    #[error("the device refused with {0:#010x}")]
    Refused(u32),
    /// The PCI function.
    #[error(transparent)]
    Pci(#[from] PciError),
}
