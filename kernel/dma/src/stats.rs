//! What is lent at this moment, and what was: by device and in sum.
//!
//! # Locking
//!
//! The list of all devices has an [`IrqMutex`], taken when a device is made and for reports; the heap's lock comes after it.

use crate::Error;
use crate::record::Records;
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

/// What is lent to a device, and what was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Mappings at this moment, those in quarantine among them.
    pub live_mappings: u64,
    /// Bytes in them.
    pub live_bytes: u64,
    /// Mappings ever made.
    pub total_mappings: u64,
    /// Bytes in them.
    pub total_bytes: u64,
    /// Pages whose revocation failed.
    pub quarantined_pages: u64,
    /// Mappings for which there was no place in the records that [`Device::explain`](crate::Device::explain) reads.
    pub unrecorded: u64,
}

impl DeviceStats {
    pub(crate) fn of(records: &Records) -> Self {
        let counters = &records.counters;
        // The ended first: a mapping that comes and goes in between then counts as live rather than as less than nothing.
        let ended = counters.ended.load(Ordering::Acquire);
        let ended_bytes = counters.ended_bytes.load(Ordering::Acquire);
        let (total_mappings, total_bytes) =
            (counters.mappings.load(Ordering::Relaxed), counters.bytes.load(Ordering::Relaxed));
        Self {
            live_mappings: total_mappings.saturating_sub(ended),
            live_bytes: total_bytes.saturating_sub(ended_bytes),
            total_mappings,
            total_bytes,
            quarantined_pages: counters.quarantined.load(Ordering::Relaxed),
            unrecorded: counters.unrecorded.load(Ordering::Relaxed),
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
    for records in DEVICES.lock().iter().filter_map(Weak::upgrade) {
        sum += DeviceStats::of(&records);
    }
    sum
}
