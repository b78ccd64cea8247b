//! Virtio over PCI \[4.1\], modern interface only.
//!
//! # Invariants
//!
//! The windows lie inside the BARs that the device's capabilities name, are at least as large as the layouts that are accessed
//! in them, and aligned as those need. A queue's doorbell has been checked to lie in the notification window.
//!
//! # Locking
//!
//! `select`: the registers that mean a different queue or half after a write to another register. Held for a few register
//! accesses; no other lock is taken meanwhile.

use super::{QueueSetup, Transport};
use crate::Error;
use crate::spec::pci::{
    CAP_VENDOR, DEVICE_ID_BASE, NO_VECTOR, VENDOR_ID, cap, cfg_type,
    common::{self, *},
};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::IrqMutex;
use core::sync::atomic::{AtomicUsize, Ordering};
use iommu::Iova;
use pci::Function;

/// The longest window that is mapped, whatever the device says: no layout needs more.
const MAX_WINDOW: u32 = 1 << 20;

/// No doorbell: the queue has not been set up.
const NO_DOORBELL: usize = usize::MAX;

/// A virtio device behind PCI.
pub struct PciTransport {
    function: Arc<Function>,
    device_type: u16,
    common: Mmio,
    notify: Mmio,
    config: Option<Mmio>,
    isr: Option<Mmio>,
    multiplier: u32,
    /// Offset in `notify` by queue.
    doorbells: Box<[AtomicUsize]>,
    select: IrqMutex<()>,
}

impl PciTransport {
    /// Finds and maps the register windows of `function`.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDevice`] if it is not a modern virtio device (type 0 stands for any), [`Error::MissingCapability`],
    /// [`Error::BadCapability`], [`Error::OutOfMemory`].
    pub fn new(function: Arc<Function>) -> Result<Self, Error> {
        let ids = function.ids();
        let device_type = ids.device.wrapping_sub(DEVICE_ID_BASE);
        if ids.vendor != VENDOR_ID || !(1..0x40).contains(&device_type) {
            return Err(Error::WrongDevice { expected: 0, found: ids.device });
        }
        let common = window(&function, "common configuration", cfg_type::COMMON, SIZE, 4)?
            .ok_or(Error::MissingCapability("common configuration"))?;
        let notify = window(&function, "notification", cfg_type::NOTIFY, 2, 2)?
            .ok_or(Error::MissingCapability("notification"))?;
        let multiplier = function.read_config32(notify.capability + cap::NOTIFY_OFF_MULTIPLIER);
        if multiplier != 0 && !(multiplier.is_power_of_two() && multiplier.is_multiple_of(2)) {
            return Err(Error::BadCapability {
                name: "notification",
                what: "its multiplier is not an even power of two",
            });
        }
        let config = window(&function, "device configuration", cfg_type::DEVICE, 4, 4)?.map(|found| found.mmio);
        let isr = window(&function, "ISR status", cfg_type::ISR, 1, 1)?.map(|found| found.mmio);
        let queues = common.mmio.read16(NUM_QUEUES);
        let mut doorbells = Vec::new();
        doorbells.try_reserve_exact(usize::from(queues)).map_err(|_| Error::OutOfMemory)?;
        doorbells.extend((0..queues).map(|_| AtomicUsize::new(NO_DOORBELL)));
        Ok(Self {
            function,
            device_type,
            common: common.mmio,
            notify: notify.mmio,
            config,
            isr,
            multiplier,
            doorbells: doorbells.into_boxed_slice(),
            select: IrqMutex::new(()),
        })
    }

    /// The PCI function.
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// Writes an address as two halves \[4.1.3.1\].
    fn write_address(&self, register: usize, address: Iova) {
        self.common.write32(register, address.get() as u32);
        self.common.write32(register + 4, (address.get() >> 32) as u32);
    }

    /// Writes a vector register and checks that the device took it \[4.1.5.1.2.2\].
    fn write_vector(&self, register: usize, vector: Option<u16>) -> Result<(), Error> {
        let value = vector.unwrap_or(NO_VECTOR);
        self.common.write16(register, value);
        if self.common.read16(register) != value {
            return Err(Error::NoVector(value));
        }
        Ok(())
    }
}

struct Window {
    /// Where the capability is in configuration space.
    capability: u16,
    mmio: Mmio,
}

/// Maps the window that the first usable capability of type `wanted` describes. `least` bytes are accessed in it, with
/// alignment `align`.
fn window(
    function: &Function,
    name: &'static str,
    wanted: u8,
    least: usize,
    align: u32,
) -> Result<Option<Window>, Error> {
    let bad = |what| Error::BadCapability { name, what };
    for found in function.capabilities().iter().filter(|found| found.id == CAP_VENDOR) {
        let at = found.offset;
        let need = if wanted == cfg_type::NOTIFY { cap::NOTIFY_SIZE } else { cap::SIZE };
        // A capability ends inside the first 256 bytes.
        if at + u16::from(cap::SIZE) > 256 || function.read_config8(at + cap::CFG_TYPE) != wanted {
            continue;
        }
        let bar = function.read_config8(at + cap::BAR);
        if bar > 5 {
            // Reserved values are for later versions of the specification: such a capability is to be skipped [4.1.4.1].
            continue;
        }
        if function.read_config8(at + cap::LEN) < need || at + u16::from(need) > 256 {
            return Err(bad("it is too short"));
        }
        let offset = function.read_config32(at + cap::OFFSET);
        let length = function.read_config32(at + cap::LENGTH).min(MAX_WINDOW);
        if !offset.is_multiple_of(align) {
            return Err(bad("its offset is not aligned"));
        }
        if usize::try_from(length).is_ok_and(|length| length < least) {
            return Err(bad("its window is too small"));
        }
        let mmio = function
            .bar_part(bar, u64::from(offset), u64::from(length))
            .map_err(|_| bad("its window cannot be mapped: it does not lie in a memory BAR"))?;
        return Ok(Some(Window { capability: at, mmio }));
    }
    Ok(None)
}

impl Transport for PciTransport {
    fn device_type(&self) -> u16 {
        self.device_type
    }

    fn device_features(&self) -> u64 {
        let _select = self.select.lock();
        self.common.write32(DEVICE_FEATURE_SELECT, 0);
        let low = u64::from(self.common.read32(DEVICE_FEATURE));
        self.common.write32(DEVICE_FEATURE_SELECT, 1);
        low | u64::from(self.common.read32(DEVICE_FEATURE)) << 32
    }

    fn set_driver_features(&self, features: u64) {
        let _select = self.select.lock();
        self.common.write32(DRIVER_FEATURE_SELECT, 0);
        self.common.write32(DRIVER_FEATURE, features as u32);
        self.common.write32(DRIVER_FEATURE_SELECT, 1);
        self.common.write32(DRIVER_FEATURE, (features >> 32) as u32);
    }

    fn status(&self) -> u8 {
        self.common.read8(DEVICE_STATUS)
    }

    fn set_status(&self, status: u8) {
        self.common.write8(DEVICE_STATUS, status);
    }

    fn queue_size(&self, queue: u16) -> u16 {
        if usize::from(queue) >= self.doorbells.len() {
            return 0;
        }
        let _select = self.select.lock();
        self.common.write16(QUEUE_SELECT, queue);
        self.common.read16(common::QUEUE_SIZE)
    }

    fn set_up_queue(&self, queue: u16, setup: &QueueSetup) -> Result<(), Error> {
        let doorbell = self.doorbells.get(usize::from(queue)).ok_or(Error::NoSuchQueue(queue))?;
        let _select = self.select.lock();
        self.common.write16(QUEUE_SELECT, queue);
        let offset = self.common.read16(QUEUE_NOTIFY_OFF);
        let at = usize::from(offset)
            .checked_mul(self.multiplier as usize)
            .filter(|at| self.notify.part(*at, 2).is_some())
            .ok_or(Error::BadNotifyOffset { queue, offset })?;
        self.common.write16(common::QUEUE_SIZE, setup.size);
        if self.common.read16(common::QUEUE_SIZE) != setup.size {
            return Err(Error::BadQueueSize { queue, size: setup.size });
        }
        self.write_vector(QUEUE_MSIX_VECTOR, setup.vector)?;
        self.write_address(QUEUE_DESC, setup.descriptors);
        self.write_address(QUEUE_DRIVER, setup.driver);
        self.write_address(QUEUE_DEVICE, setup.device);
        self.common.write16(QUEUE_ENABLE, 1);
        doorbell.store(at, Ordering::Release);
        Ok(())
    }

    fn notify(&self, queue: u16) {
        let at = self.doorbells.get(usize::from(queue)).map_or(NO_DOORBELL, |at| at.load(Ordering::Acquire));
        if at != NO_DOORBELL {
            self.notify.write16(at, queue);
        }
    }

    fn set_config_vector(&self, vector: Option<u16>) -> Result<(), Error> {
        self.write_vector(CONFIG_MSIX_VECTOR, vector)
    }

    fn interrupt_status(&self) -> u8 {
        self.isr.map_or(0, |isr| isr.read8(0))
    }

    fn config_generation(&self) -> u8 {
        self.common.read8(CONFIG_GENERATION)
    }

    fn config_read(&self, offset: usize) -> Option<u32> {
        Some(self.config?.part(offset, 4).filter(|_| offset.is_multiple_of(4))?.read32(0))
    }

    fn config_write(&self, offset: usize, value: u32) {
        let place = self.config.and_then(|config| config.part(offset, 4)).filter(|_| offset.is_multiple_of(4));
        if let Some(place) = place {
            place.write32(0, value);
        }
    }

    fn config_write8(&self, offset: usize, value: u8) {
        if let Some(place) = self.config.and_then(|config| config.part(offset, 1)) {
            place.write8(0, value);
        }
    }
}
