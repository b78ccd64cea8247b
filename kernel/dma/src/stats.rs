//! What is lent at this moment, and what was: by device and in sum.
//!
//! # Locking
//!
//! The list of all devices has an [`IrqMutex`], taken when a device is made and for reports; the heap's lock comes after it.

use crate::Error;
use crate::record::{Records, Sums};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::Ordering;

/// The records of all devices, for [`live`].
static DEVICES: IrqMutex<Vec<Weak<Records>>> = IrqMutex::new(Vec::new());

/// Puts a new device on the list.
pub(crate) fn register(records: &Arc<Records>) -> Result<(), Error> {
    let mut devices = DEVICES.lock();
    devices.retain(|records| records.strong_count() != 0);
    devices.try_reserve(1)?;
    devices.push(Arc::downgrade(records));
    Ok(())
}

/// The records of all devices that exist, or of which a mapping does.
pub(crate) fn all() -> Result<Vec<Arc<Records>>, Error> {
    let mut all = Vec::new();
    loop {
        let count = DEVICES.lock().len();
        // A few more, for devices that are made meanwhile.
        all.try_reserve(count.saturating_add(4))?;
        let devices = DEVICES.lock();
        if devices.len() <= all.capacity() {
            all.extend(devices.iter().filter_map(Weak::upgrade));
            return Ok(all);
        }
    }
}

/// What is lent to a device, and what was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Mappings at this moment, those in quarantine among them.
    pub live_mappings: u64,
    /// Bytes in them. (Where nothing translates, those in whole pages.)
    pub live_bytes: u64,
    /// Mappings ever made. (Where nothing translates, modulo 2^31.)
    pub total_mappings: u64,
    /// Bytes in them. (Where nothing translates, those in whole pages, modulo 16 TiB, and a page more for each 2^31 mappings.)
    pub total_bytes: u64,
    /// Pages whose revocation failed.
    pub quarantined_pages: u64,
    /// Mappings for which there was no place in the records that [`Device::explain`](crate::Device::explain) reads.
    pub unrecorded: u64,
}

impl DeviceStats {
    pub(crate) fn of(records: &Records) -> Self {
        let Sums { live, live_bytes, total, total_bytes } = records.sums();
        Self {
            live_mappings: live,
            live_bytes,
            total_mappings: total,
            total_bytes,
            quarantined_pages: records.quarantined.load(Ordering::Relaxed),
            unrecorded: records.unrecorded(),
        }
    }
}

impl core::ops::AddAssign for DeviceStats {
    fn add_assign(&mut self, other: Self) {
        self.live_mappings += other.live_mappings;
        self.live_bytes += other.live_bytes;
        self.total_mappings += other.total_mappings;
        self.total_bytes += other.total_bytes;
        self.quarantined_pages += other.quarantined_pages;
        self.unrecorded += other.unrecorded;
    }
}

/// The sum over all devices that exist, or of which a mapping does.
pub fn live() -> DeviceStats {
    let mut sum = DeviceStats::default();
    let mut next = 0;
    loop {
        // One at a time: the sums of a device take a while, and may have to be its last owner's.
        let records = DEVICES.lock().get(next).map(Weak::upgrade);
        match records {
            Some(Some(records)) => sum += DeviceStats::of(&records),
            Some(None) => {}
            None => return sum,
        }
        next += 1;
    }
}
