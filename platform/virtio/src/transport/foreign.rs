//! Registers for foreign drivers: [`virtio_drivers::transport::Transport`] over this crate's own.
//!
//! The windows are those that were found, checked and mapped for the device; its bus mastering is the board's business and cannot
//! be reached from here. Two things the foreign drivers do not do themselves, and are done for them: they do not ask for
//! `ACCESS_PLATFORM`, without which their device would go around the IOMMU, and they do not look whether the device agreed to
//! their features. Most of their interface has no way to report an error. A device with which something is wrong is therefore
//! given up: it is told so, it is not started, and it has no queues, at which the driver fails with an error of its own.

use super::{QueueSetup, Transport, reset};
use crate::Error;
use crate::spec::{feature, status};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::Deadline;
use iommu::Iova;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus};
use virtio_drivers::{Error as ForeignError, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Milliseconds that a device gets for a reset, and for a configuration that does not change while it is read.
const PATIENCE_MILLIS: u64 = 1_000;

/// A device's registers, for a foreign driver.
pub struct ForeignTransport {
    registers: Arc<dyn Transport>,
    name: String,
    kind: DeviceType,
    /// The queues that are on.
    queues: Vec<u16>,
    /// The device was given up.
    given_up: bool,
}

impl ForeignTransport {
    /// Lends `registers` to a foreign driver. The `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDevice`] for a type of device that no foreign driver knows; [`Error::Legacy`]; [`Error::BypassesIommu`] for a
    /// device that would not go through the IOMMU.
    pub fn new(registers: Arc<dyn Transport>, name: &str) -> Result<Self, Error> {
        let found = registers.device_type();
        let kind = DeviceType::try_from(found).map_err(|_| Error::WrongDevice { expected: 0, found })?;
        let offered = registers.device_features();
        if offered & feature::VERSION_1 == 0 {
            return Err(Error::Legacy);
        }
        if offered & feature::ACCESS_PLATFORM == 0 {
            return Err(Error::BypassesIommu);
        }
        Ok(Self { registers, name: name.into(), kind, queues: Vec::new(), given_up: false })
    }

    /// Gives the device up for good.
    #[cold]
    fn give_up(&mut self, error: &Error) {
        log::error!("{}: {error}; it is given up", self.name);
        self.given_up = true;
        self.registers.set_status(self.registers.status() | status::FAILED);
    }

    fn reset(&mut self) {
        self.queues.clear();
        if let Err(error) = reset(&*self.registers, Deadline::after_millis(PATIENCE_MILLIS)) {
            self.give_up(&error);
        }
    }

    /// Checks that the configuration has `len` bytes at `offset`.
    fn check_config(&self, offset: usize, len: usize) -> Result<(), ForeignError> {
        self.registers.config_read(0).ok_or(ForeignError::ConfigSpaceMissing)?;
        let last = offset.checked_add(len.max(1)).ok_or(ForeignError::ConfigSpaceTooSmall)? - 1;
        self.registers.config_read(last & !3).map(drop).ok_or(ForeignError::ConfigSpaceTooSmall)
    }
}

impl virtio_drivers::transport::Transport for ForeignTransport {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.registers.device_features()
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.registers.set_driver_features(driver_features | feature::ACCESS_PLATFORM);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if self.given_up { 0 } else { self.registers.queue_size(queue).into() }
    }

    fn notify(&mut self, queue: u16) {
        self.registers.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.registers.status().into())
    }

    fn set_status(&mut self, wanted: DeviceStatus) {
        if self.given_up {
            return;
        }
        if wanted.is_empty() {
            self.reset();
            return;
        }
        // The defined bits are all in the low 8.
        let bits = wanted.bits() as u8;
        self.registers.set_status(bits);
        if bits & status::FEATURES_OK != 0 && self.registers.status() & status::FEATURES_OK == 0 {
            // Which they were, the driver knows.
            self.give_up(&Error::FeaturesRefused(feature::VERSION_1 | feature::ACCESS_PLATFORM));
        }
    }

    fn set_guest_page_size(&mut self, _: u32) {
        // Of legacy devices only.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        let [descriptors, driver, device] = [descriptors, driver, device].map(Iova::new);
        let result = match (u16::try_from(size), self.queues.try_reserve(1)) {
            (Ok(size), Ok(())) => {
                let setup = QueueSetup { size, descriptors, driver, device, vector: None };
                self.registers.set_up_queue(queue, &setup)
            }
            (Err(_), _) => Err(Error::BadQueueSize { queue, size: u16::MAX }),
            (_, Err(_)) => Err(Error::OutOfMemory),
        };
        match result {
            Ok(()) => self.queues.push(queue),
            Err(error) => self.give_up(&error),
        }
    }

    fn queue_unset(&mut self, _: u16) {
        // A queue stays on until the device is reset, which happens when the transport is dropped, before the queue's memory goes.
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.queues.contains(&queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_truncate(self.registers.interrupt_status().into())
    }

    fn read_config_generation(&self) -> u32 {
        self.registers.config_generation().into()
    }

    fn read_config_space<V: FromBytes + IntoBytes>(&self, offset: usize) -> Result<V, ForeignError> {
        self.check_config(offset, size_of::<V>())?;
        let mut value = V::new_zeroed();
        for (at, byte) in (offset..).zip(value.as_mut_bytes()) {
            let word = self.registers.config_read(at & !3).ok_or(ForeignError::ConfigSpaceTooSmall)?;
            *byte = (word >> (8 * (at & 3))) as u8;
        }
        Ok(value)
    }

    fn write_config_space<V: IntoBytes + Immutable>(&mut self, offset: usize, value: V) -> Result<(), ForeignError> {
        let bytes = value.as_bytes();
        self.check_config(offset, bytes.len())?;
        let (words, rest) = bytes.as_chunks::<4>();
        if offset.is_multiple_of(4) && rest.is_empty() {
            for (at, word) in (offset..).step_by(4).zip(words) {
                self.registers.config_write(at, u32::from_le_bytes(*word));
            }
        } else {
            for (at, byte) in (offset..).zip(bytes) {
                self.registers.config_write8(at, *byte);
            }
        }
        Ok(())
    }

    /// As the interface has it, but not for ever.
    fn read_consistent<V>(&self, read: impl Fn() -> Result<V, ForeignError>) -> Result<V, ForeignError> {
        let deadline = Deadline::after_millis(PATIENCE_MILLIS);
        loop {
            let before = self.registers.config_generation();
            let value = read();
            if self.registers.config_generation() == before {
                return value;
            }
            if deadline.has_passed() {
                return Err(ForeignError::NotReady);
            }
        }
    }
}

impl Drop for ForeignTransport {
    fn drop(&mut self) {
        self.reset();
    }
}

impl core::fmt::Debug for ForeignTransport {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ForeignTransport({})", self.name)
    }
}
