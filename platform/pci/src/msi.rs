//! Message signalled interrupts: the seam to the interrupt controller, MSI and MSI-X.
//!
//! A message is a 32-bit store by the function, so it passes the IOMMU: `address` is what the *device* must write to, and the
//! controller's owner has mapped the doorbell there.
//!
//! # Locking
//!
//! Vectors are set up and masked by one driver at a time (`&mut self`); a handler may run on any core meanwhile.

use crate::caps::id;
use crate::{Function, MsiError, PciError, RequesterId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::irq::Handler;

/// What a function stores where to interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// The device address of the doorbell.
    pub address: u64,
    /// The value that tells the interrupt.
    pub data: u32,
}

/// Who turns messages into interrupts. Implemented by the board over its interrupt controller and IOMMU.
pub trait MsiController: Send + Sync {
    /// Whether `requester` could be given `count` interrupts now.
    fn has(&self, requester: RequesterId, count: usize) -> bool;

    /// Allocates an interrupt for `requester` that calls `handler`, and returns the message that raises it. The interrupt is
    /// enabled on return.
    ///
    /// # Errors
    ///
    /// See [`MsiError`].
    fn allocate(&self, requester: RequesterId, handler: Arc<dyn Handler>) -> Result<MsiMessage, MsiError>;

    /// Takes the interrupt back. On `Ok` its handler does not run and will not run again.
    ///
    /// # Errors
    ///
    /// See [`MsiError`]; the handler may still run, and the interrupt is not given out again.
    fn free(&self, requester: RequesterId, message: MsiMessage) -> Result<(), MsiError>;
}

const MSIX_CONTROL: u16 = 2;
const MSIX_TABLE: u16 = 4;
const MSIX_PENDING: u16 = 8;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;
const MSIX_ENTRY: usize = 16;
const ENTRY_MASKED: u32 = 1;

/// A function's MSI-X table. Every vector starts masked; dropping it disables MSI-X and gives the interrupts back.
pub struct Msix {
    function: Arc<Function>,
    controller: Arc<dyn MsiController>,
    capability: u16,
    table: Mmio,
    messages: Vec<Option<MsiMessage>>,
}

impl Msix {
    /// Checks the function's table, masks all vectors and enables MSI-X.
    ///
    /// # Errors
    ///
    /// [`PciError::NoCapability`]; [`PciError::NoBar`] or [`PciError::OutsideBar`] if table or pending bits do not lie in a
    /// memory BAR; [`PciError::MapFailed`]; [`PciError::OutOfMemory`].
    pub fn new(function: Arc<Function>, controller: Arc<dyn MsiController>) -> Result<Self, PciError> {
        function.check()?;
        let capability = function.capability(id::MSIX).ok_or(PciError::NoCapability("MSI-X"))?.offset;
        let count = (function.read_config16(capability + MSIX_CONTROL) & 0x7ff) + 1;
        let region = |register: u16, len: u64| {
            let value = function.read_config32(capability + register);
            let (bar, offset) = ((value & 7) as u8, u64::from(value & !7));
            let size = function.memory_bar(bar)?.size;
            if offset.checked_add(len).is_none_or(|end| end > size) {
                return Err(PciError::OutsideBar { bar, offset, len });
            }
            Ok((bar, offset, len))
        };
        // One bit per vector, in whole 64-bit words.
        region(MSIX_PENDING, u64::from(count).div_ceil(64) * 8)?;
        let (bar, offset, len) = region(MSIX_TABLE, u64::from(count) * MSIX_ENTRY as u64)?;
        let mut messages = Vec::new();
        messages.try_reserve_exact(usize::from(count)).map_err(|_| PciError::OutOfMemory)?;
        messages.resize(usize::from(count), None);
        let table = function.bar_part(bar, offset, len)?;
        function.update16(capability + MSIX_CONTROL, |control| control | MSIX_ENABLE | MSIX_MASK_ALL);
        for vector in 0..usize::from(count) {
            table.write32(vector * MSIX_ENTRY + 12, ENTRY_MASKED);
        }
        function.update16(capability + MSIX_CONTROL, |control| control & !MSIX_MASK_ALL);
        Ok(Self { function, controller, capability, table, messages })
    }

    /// The number of vectors.
    pub fn count(&self) -> u16 {
        // The table size field has 11 bits.
        self.messages.len() as u16
    }

    /// Gives vector `vector` an interrupt that calls `handler`, and unmasks it. It replaces the one that the vector had.
    ///
    /// # Errors
    ///
    /// [`PciError::NoVector`], [`PciError::Msi`].
    pub fn connect(&mut self, vector: u16, handler: Arc<dyn Handler>) -> Result<(), PciError> {
        self.disconnect(vector)?;
        let message = self.controller.allocate(self.function.requester_id(), handler)?;
        let at = usize::from(vector) * MSIX_ENTRY;
        self.table.write32(at, message.address as u32);
        self.table.write32(at + 4, (message.address >> 32) as u32);
        self.table.write32(at + 8, message.data);
        if let Some(slot) = self.messages.get_mut(usize::from(vector)) {
            *slot = Some(message);
        }
        self.table.write32(at + 12, 0);
        Ok(())
    }

    /// Masks vector `vector` and takes its interrupt away, if it has one.
    ///
    /// # Errors
    ///
    /// [`PciError::NoVector`], [`PciError::Msi`].
    pub fn disconnect(&mut self, vector: u16) -> Result<(), PciError> {
        self.mask(vector, true)?;
        match self.messages.get_mut(usize::from(vector)).and_then(Option::take) {
            Some(message) => Ok(self.controller.free(self.function.requester_id(), message)?),
            None => Ok(()),
        }
    }

    /// The gate of a vector's messages.
    ///
    /// # Errors
    ///
    /// [`PciError::NoVector`].
    pub fn gate(&self, vector: u16) -> Result<MessageGate, PciError> {
        if vector >= self.count() {
            return Err(PciError::NoVector { vector, count: self.count() });
        }
        Ok(MessageGate(Gate::Vector { table: self.table, at: usize::from(vector) * MSIX_ENTRY + 12 }))
    }

    /// Masks or unmasks a vector. A masked one is remembered as pending by the device. The write has arrived on return.
    ///
    /// # Errors
    ///
    /// [`PciError::NoVector`].
    pub fn mask(&mut self, vector: u16, masked: bool) -> Result<(), PciError> {
        if vector >= self.count() {
            return Err(PciError::NoVector { vector, count: self.count() });
        }
        let at = usize::from(vector) * MSIX_ENTRY + 12;
        self.table.write32(at, if masked { ENTRY_MASKED } else { 0 });
        let _pushed = self.table.read32(at);
        Ok(())
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for vector in 0..self.count() {
            if let Err(error) = self.disconnect(vector) {
                log::warn!("{:?}: MSI-X vector {vector} was not given back: {error}", self.function);
            }
        }
        self.function.update16(self.capability + MSIX_CONTROL, |control| control & !MSIX_ENABLE);
    }
}

const MSI_CONTROL: u16 = 2;
const MSI_ADDRESS: u16 = 4;
const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
const MSI_MULTIPLE_ENABLE: u16 = 7 << 4;

/// A function's MSI capability, used with one vector. Dropping it disables MSI and gives the interrupt back.
pub struct Msi {
    function: Arc<Function>,
    controller: Arc<dyn MsiController>,
    capability: u16,
    message: MsiMessage,
}

/// Lets a function's messages through, or not: for interrupts that are masked by their handler. A gate that outlives the
/// [`Msi`] or [`Msix`] that it belongs to does nothing that matters.
#[derive(Clone)]
pub struct MessageGate(Gate);

#[derive(Clone)]
enum Gate {
    /// A message of MSI-X: the function remembers that it is pending.
    Vector { table: Mmio, at: usize },
    /// MSI without masks of its own is enabled as a whole: what comes meanwhile is lost, and whoever opens the gate looks what it
    /// was.
    Whole { function: Arc<Function>, capability: u16 },
}

impl MessageGate {
    /// Opens or shuts the gate. The write has arrived on return. Safe to call from handlers.
    pub fn set(&self, open: bool) {
        match &self.0 {
            Gate::Vector { table, at } => {
                table.write32(*at, if open { 0 } else { ENTRY_MASKED });
                let _pushed = table.read32(*at);
            }
            Gate::Whole { function, capability } => {
                function.update16(capability + MSI_CONTROL, |control| {
                    if open { control | MSI_ENABLE } else { control & !MSI_ENABLE }
                });
            }
        }
    }
}

/// The BARs in which the table of MSI-X and its pending bits lie: whoever writes there says where interrupts go.
pub fn msix_bars(function: &Function) -> [Option<u8>; 2] {
    let Some(capability) = function.capability(id::MSIX) else { return [None; 2] };
    [MSIX_TABLE, MSIX_PENDING].map(|register| Some((function.read_config32(capability.offset + register) & 7) as u8))
}

impl Msi {
    /// The gate of the function's messages, to be had before they are enabled.
    ///
    /// # Errors
    ///
    /// [`PciError::NoCapability`].
    pub fn gate(function: &Arc<Function>) -> Result<MessageGate, PciError> {
        let capability = function.capability(id::MSI).ok_or(PciError::NoCapability("MSI"))?.offset;
        Ok(MessageGate(Gate::Whole { function: function.clone(), capability }))
    }

    /// Gives the function an interrupt that calls `handler`, and enables MSI with one vector.
    ///
    /// # Errors
    ///
    /// [`PciError::NoCapability`]; [`PciError::MessageTooWide`] if the message does not fit; [`PciError::Msi`].
    pub fn new(
        function: Arc<Function>,
        controller: Arc<dyn MsiController>,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, PciError> {
        function.check()?;
        let capability = function.capability(id::MSI).ok_or(PciError::NoCapability("MSI"))?.offset;
        let wide = function.read_config16(capability + MSI_CONTROL) & MSI_WIDE != 0;
        let requester = function.requester_id();
        let message = controller.allocate(requester, handler)?;
        if message.data > 0xffff || (!wide && message.address > u64::from(u32::MAX)) {
            controller.free(requester, message)?;
            return Err(PciError::MessageTooWide);
        }
        let config = &function.config;
        config.write32(capability + MSI_ADDRESS, message.address as u32);
        if wide {
            config.write32(capability + MSI_ADDRESS + 4, (message.address >> 32) as u32);
        }
        config.write16(capability + if wide { 12 } else { 8 }, message.data as u16);
        function.update16(capability + MSI_CONTROL, |control| control & !MSI_MULTIPLE_ENABLE | MSI_ENABLE);
        Ok(Self { function, controller, capability, message })
    }
}

impl Drop for Msi {
    fn drop(&mut self) {
        self.function.update16(self.capability + MSI_CONTROL, |control| control & !MSI_ENABLE);
        if let Err(error) = self.controller.free(self.function.requester_id(), self.message) {
            log::warn!("{:?}: MSI was not given back: {error}", self.function);
        }
    }
}
