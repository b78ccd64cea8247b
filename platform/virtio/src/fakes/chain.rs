//! The device's side of a split virtqueue, written from the specification and independent of the driver's side.

use super::Bus;
use crate::spec::queue::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, need_event};
use crate::transport::QueueSetup;
use iommu::Iova;
use std::vec::Vec;

/// One request as the device sees it.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The head's index.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<(Iova, u32)>,
    /// What the device may write, in order.
    pub writable: Vec<(Iova, u32)>,
    /// Descriptors of the chain.
    pub descriptors: usize,
    /// Whether they were in an indirect table.
    pub indirect: bool,
}

impl Chain {
    /// Bytes that the device may write.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.writable.iter().map(|(_, len)| u64::from(*len)).sum()
    }

    /// Reads everything that the device may read.
    #[must_use]
    pub fn read_all(&self, bus: &dyn Bus) -> Option<Vec<u8>> {
        let mut all = Vec::new();
        for (iova, len) in &self.readable {
            let start = all.len();
            all.resize(start + *len as usize, 0);
            bus.read(*iova, &mut all[start..]).then_some(())?;
        }
        Some(all)
    }

    /// Writes `bytes` from byte `offset` of what the device may write on.
    #[must_use]
    pub fn write_at(&self, bus: &dyn Bus, offset: u64, mut bytes: &[u8]) -> bool {
        let mut skip = offset;
        for (iova, len) in &self.writable {
            let len = u64::from(*len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let count = bytes.len().min((len - skip) as usize);
            let (now, later) = bytes.split_at(count);
            let Some(at) = iova.checked_add(skip) else { return false };
            if !now.is_empty() && !bus.write(at, now) {
                return false;
            }
            bytes = later;
            skip = 0;
        }
        bytes.is_empty()
    }
}

/// The device's side of one queue.
#[derive(Clone, Debug)]
pub struct DeviceQueue {
    /// Where it is.
    pub setup: QueueSetup,
    /// The available index up to which requests were taken.
    pub taken: u16,
    /// The used index.
    pub used: u16,
    /// Whether `EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Whether the device has written where only the driver may: what is malformed is its own doing then.
    pub scribbled: bool,
}

impl DeviceQueue {
    fn read<const N: usize>(bus: &dyn Bus, base: Iova, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        bus.read(base.checked_add(offset as u64)?, &mut bytes).then_some(bytes)
    }

    /// The driver's index of the available ring.
    #[must_use]
    pub fn available(&self, bus: &dyn Bus) -> Option<u16> {
        Self::read(bus, self.setup.driver, 2).map(u16::from_le_bytes)
    }

    /// Insists on what a driver must keep to.
    fn expect(&self, holds: bool, broken: &str) -> Option<()> {
        assert!(holds || self.scribbled, "{broken}");
        holds.then_some(())
    }

    /// Takes the next request.
    #[must_use]
    pub fn pop(&mut self, bus: &dyn Bus) -> Option<Chain> {
        if self.available(bus)? == self.taken {
            return None;
        }
        let slot = usize::from(self.taken % self.setup.size);
        let head = u16::from_le_bytes(Self::read(bus, self.setup.driver, 4 + 2 * slot)?);
        self.taken = self.taken.wrapping_add(1);
        let mut chain = Chain { head, ..Chain::default() };
        let (mut table, mut count, mut at) = (self.setup.descriptors, u32::from(self.setup.size), u32::from(head));
        loop {
            self.expect(at < count, "a descriptor outside its table")?;
            let longest = usize::from(self.setup.size);
            self.expect(chain.descriptors < longest, "a chain that is longer than the queue, or a circle")?;
            let address = u64::from_le_bytes(Self::read(bus, table, 16 * at as usize)?);
            let len = u32::from_le_bytes(Self::read(bus, table, 16 * at as usize + 8)?);
            let flags = u16::from_le_bytes(Self::read(bus, table, 16 * at as usize + 12)?);
            let next = u16::from_le_bytes(Self::read(bus, table, 16 * at as usize + 14)?);
            let iova = Iova::new(address);
            if flags & DESC_F_INDIRECT != 0 {
                self.expect(flags == DESC_F_INDIRECT, "an indirect descriptor with other flags")?;
                self.expect(!chain.indirect && len != 0 && len.is_multiple_of(16), "a bad indirect table")?;
                chain.indirect = true;
                (table, count, at) = (iova, len / 16, 0);
                continue;
            }
            self.expect(len != 0, "an empty descriptor")?;
            chain.descriptors += 1;
            if flags & DESC_F_WRITE != 0 {
                chain.writable.push((iova, len));
            } else {
                self.expect(chain.writable.is_empty(), "a readable descriptor after a writable one")?;
                chain.readable.push((iova, len));
            }
            if flags & DESC_F_NEXT == 0 {
                return Some(chain);
            }
            at = u32::from(next);
        }
    }

    /// Writes a used entry without telling the driver.
    pub fn put_used(&mut self, bus: &dyn Bus, id: u32, len: u32) {
        let at = 4 + 8 * u64::from(self.used % self.setup.size);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&id.to_le_bytes());
        bytes[4..].copy_from_slice(&len.to_le_bytes());
        if let Some(iova) = self.setup.device.checked_add(at) {
            bus.write(iova, &bytes);
        }
        self.used = self.used.wrapping_add(1);
    }

    /// Publishes the used index and says whether the driver wants an interrupt.
    pub fn publish_used(&mut self, bus: &dyn Bus, old: u16) -> bool {
        self.write_used_index(bus, self.used);
        if !self.event_idx {
            return Self::read(bus, self.setup.driver, 0).is_some_and(|flags| u16::from_le_bytes(flags) & 1 == 0);
        }
        let event = Self::read(bus, self.setup.driver, 4 + 2 * usize::from(self.setup.size));
        event.is_some_and(|event| need_event(u16::from_le_bytes(event), self.used, old))
    }

    /// Writes any used index.
    pub fn write_used_index(&self, bus: &dyn Bus, index: u16) {
        if let Some(iova) = self.setup.device.checked_add(2) {
            bus.write(iova, &index.to_le_bytes());
        }
    }

    /// Asks to be notified when the available index passes what has been taken, or not before it passes `index`.
    pub fn ask(&self, bus: &dyn Bus, index: u16) {
        let at = 4 + 8 * u64::from(self.setup.size);
        if let Some(iova) = self.setup.device.checked_add(at) {
            bus.write(iova, &index.to_le_bytes());
        }
    }
}
