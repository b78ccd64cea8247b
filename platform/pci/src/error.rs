//! What can go wrong with a PCI function.

use crate::Bdf;
use iommu::OutOfMemory;

/// Why a function, or a part of it, cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// The ECAM window is too small for the bus range, or the range is empty.
    #[error("the configuration window of {len:#x} bytes does not hold buses {first:#x}..={last:#x}")]
    BadEcam {
        /// Bytes in the window.
        len: usize,
        /// First bus.
        first: u8,
        /// Last bus.
        last: u8,
    },
    /// A window of the host bridge passes the end of an address space.
    #[error("the host window at bus address {0:#x} is not a range of addresses")]
    BadWindow(u64),
    /// The function's header has a layout that is neither a device's nor a PCI-PCI bridge's.
    #[error("header type {0:#04x} is not supported")]
    HeaderType(u8),
    /// A BAR reads back as something that no BAR can be.
    #[error("BAR {0} does not describe a power-of-two region")]
    BadBar(u8),
    /// No window has room for a BAR.
    #[error("no room for BAR {bar} of {size:#x} bytes")]
    NoSpace {
        /// Index of the BAR.
        bar: u8,
        /// Bytes that it asks for.
        size: u64,
    },
    /// A BAR did not keep the address that was written.
    #[error("BAR {0} does not keep its address")]
    BarNotWritable(u8),
    /// The function has no such memory BAR.
    #[error("there is no memory BAR {0}")]
    NoBar(u8),
    /// A region does not lie inside its BAR.
    #[error("{len:#x} bytes at {offset:#x} are not inside BAR {bar}")]
    OutsideBar {
        /// Index of the BAR.
        bar: u8,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The list of capabilities runs in a circle or points outside its space.
    #[error("the capability list is damaged at offset {0:#x}")]
    BadCapabilityList(u16),
    /// The function lacks a capability.
    #[error("the function has no {0} capability")]
    NoCapability(&'static str),
    /// No bus number is left for the bus behind a bridge.
    #[error("no bus number is left for the bus behind this bridge")]
    NoBusNumber,
    /// A bridge did not keep the bus numbers that were written.
    #[error("the bridge does not keep its bus numbers")]
    BridgeNotWritable,
    /// Bridges are nested deeper than we follow.
    #[error("bridges are nested too deep")]
    TooDeep,
    /// The proof of attachment is for another bus master.
    #[error("{0} is not attached")]
    NotAttached(Bdf),
    /// Transactions of the function were still pending some time after bus mastering was disabled.
    #[error("transactions are still pending after bus mastering was disabled")]
    TransactionsPending,
    /// The function does not answer after a reset, or is another.
    #[error("the function does not answer after its reset")]
    NotReady,
    /// There is no such interrupt vector.
    #[error("vector {vector} of {count}")]
    NoVector {
        /// The vector asked for.
        vector: u16,
        /// How many there are.
        count: u16,
    },
    /// The interrupt message does not fit the function's capability (32-bit address, 16-bit data).
    #[error("the interrupt message does not fit the capability")]
    MessageTooWide,
    /// The interrupt controller gave no message.
    #[error(transparent)]
    Msi(#[from] MsiError),
    /// An interrupt line was asserted over and over by none of the functions that use it, and has been masked.
    #[error("a PCI interrupt line was asserted by nobody that uses it, again and again: it is masked")]
    LineMasked,
    /// A function did not take its wired interrupt back, and has been cut off from the line.
    #[error("{0} does not take its interrupt back: it has none any more")]
    WireStuck(Bdf),
    /// The function's wired interrupt cannot be shut off and let again in its Command register (as before PCI 2.3).
    #[error("the function's wired interrupt has no gate")]
    NoGate,
    /// Registers could not be mapped.
    #[error("the registers could not be mapped")]
    MapFailed,
    /// No memory.
    #[error("out of memory")]
    OutOfMemory,
}

impl From<OutOfMemory> for PciError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Why an interrupt controller gives or takes back no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsiError {
    /// The machine has no MSI controller for this bus master.
    #[error("the machine has no MSI controller for this device")]
    NoController,
    /// No more interrupts.
    #[error("no interrupt is free")]
    Exhausted,
    /// The message was not given out by this controller.
    #[error("the message was not given out by this controller")]
    Unknown,
    /// The doorbell could not be mapped into the device's address space.
    #[error("the doorbell could not be mapped for the device")]
    Doorbell,
    /// The interrupt controller failed or did not answer in time.
    #[error("the interrupt controller failed")]
    Failed,
}
