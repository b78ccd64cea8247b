//! The debug tracker: every live mapping with its device, size, direction, age and call site, and what is still lent at the end.
//!
//! The records that are always on ([`crate::Device::explain`]) have room for so many mappings and no time for more. With the
//! tracker on ([`enable`], the command line's `dma.track=all`, or the feature `track`) a device records every mapping, in a
//! table that grows. A table that cannot grow loses a record, never a mapping: that is counted, and the report says so. It is
//! decided when a device is made; a device made before keeps its ordinary records.
//!
//! [`report`] and [`Device::lendings`](crate::Device::lendings) list what is lent, whether the tracker is on or not; without
//! it they know no ages.
//!
//! # Locking
//!
//! `Exact` is under the lock of its device's records. A report is made without any other lock than those, one at a time.

use crate::record::{EndedMapping, LiveMapping, Records};
use crate::site::Site;
use crate::{Error, stats};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::Instant;
use base::time::Duration;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use iommu::{Iova, IovaRange, Prot};

/// Ended mappings that are remembered in their order, besides the history that each address has in the records.
const REMEMBERED: usize = 256;

static ON: AtomicBool = AtomicBool::new(cfg!(feature = "track"));

/// Has every device that is made from here on record all of its mappings, or no longer.
pub fn enable(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// Whether devices that are made now record all of their mappings.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Something that is lent to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lending {
    /// The device's name.
    pub device: Arc<str>,
    /// Where the device has it.
    pub range: IovaRange,
    /// What the device may do.
    pub prot: Prot,
    /// For how long; known to the tracker only.
    pub age: Option<Duration>,
    /// Where in the source it was lent.
    pub lent_at: Option<Site>,
}

/// What is lent at one moment, by device and address. Its `Display` is one short, aligned line for each, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is known in detail.
    pub lendings: Vec<Lending>,
    /// Mappings that are only counted.
    pub unlisted: u64,
}

impl Report {
    /// Whether nothing is lent.
    pub fn is_empty(&self) -> bool {
        self.lendings.is_empty() && self.unlisted == 0
    }

    /// How many mappings there are.
    pub fn count(&self) -> u64 {
        self.lendings.len() as u64 + self.unlisted
    }

    /// Adds what is lent to one device.
    pub(crate) fn add(&mut self, records: &Records) -> Result<(), Error> {
        let mut count = 0_usize;
        records.for_each_live(|_| count += 1);
        // More may come before they are listed.
        self.lendings.try_reserve(count.saturating_add(16))?;
        let now = Instant::now();
        let mut missed = 0;
        records.for_each_live(|live| {
            if self.lendings.len() == self.lendings.capacity() {
                missed += 1;
                return;
            }
            let age = live.since.map(|since| now.since(since));
            let LiveMapping { range, prot, site, .. } = live;
            self.lendings.push(Lending { device: records.name().clone(), range, prot, age, lent_at: site });
        });
        self.unlisted += records.unlisted() + missed;
        Ok(())
    }

    pub(crate) fn sort(&mut self) {
        self.lendings.sort_unstable_by(|a, b| (&a.device, a.range.start()).cmp(&(&b.device, b.range.start())));
    }
}

/// Lists what is lent to all devices at this moment.
///
/// # Errors
///
/// [`Error::OutOfMemory`] if there is no memory for the list.
pub fn report() -> Result<Report, Error> {
    let mut report = Report::default();
    for records in stats::all()? {
        report.add(&records)?;
    }
    report.sort();
    Ok(report)
}

/// The source's file name and line.
pub(crate) struct At(pub Option<Site>);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(site) => {
                let file = site.file();
                let name = file.rsplit_once(['/', '\\']).map_or(file, |(_, name)| name);
                write!(f, "{name}:{}", site.line())
            }
            None => f.write_str("an unknown place"),
        }
    }
}

/// A size with the largest unit that divides it.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes.is_multiple_of(1 << 20) => write!(f, "{:>6} MiB", bytes >> 20),
            bytes => write!(f, "{:>6} KiB", bytes >> 10),
        }
    }
}

/// A time with a unit that leaves it few digits.
struct Age(Option<Duration>);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("   age ?"),
            Some(age) if age.as_micros() < 10_000 => write!(f, "{:>5} us", age.as_micros()),
            Some(age) if age.as_millis() < 10_000 => write!(f, "{:>5} ms", age.as_millis()),
            Some(age) => write!(f, "{:>6} s", age.as_secs()),
        }
    }
}

impl fmt::Display for Lending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match (self.prot.contains(Prot::READ), self.prot.contains(Prot::WRITE)) {
            (true, true) => "both ways",
            (true, false) => "to device",
            (false, _) => "from device",
        };
        let Self { device, range, age, lent_at, .. } = self;
        let (start, size) = (range.start().get(), Size(range.len()));
        write!(f, "{device:<20} {start:>#14x} {size} {direction:<11} {} {}", Age(*age), At(*lent_at))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for lending in &self.lendings {
            write!(f, "{}{lending}", if first { "" } else { "\n" })?;
            first = false;
        }
        if self.unlisted != 0 {
            write!(f, "{}{} that are only counted", if first { "" } else { "\n" }, self.unlisted)?;
        }
        Ok(())
    }
}

/// No entry.
const NOWHERE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Entry {
    range: IovaRange,
    prot: Prot,
    mapped_at: Site,
    since: Instant,
    /// When and where it ended.
    ended: Option<(Instant, Site)>,
    /// The entry that ended next after this.
    next: u32,
}

/// Every mapping of one device: the live ones, and those that ended last in the order in which they did.
pub(crate) struct Exact {
    entries: Vec<Entry>,
    oldest: u32,
    newest: u32,
    ended: usize,
    forgotten: bool,
    total: u64,
    total_bytes: u64,
}

impl Exact {
    pub(crate) const fn new() -> Self {
        let entries = Vec::new();
        Self { entries, oldest: NOWHERE, newest: NOWHERE, ended: 0, forgotten: false, total: 0, total_bytes: 0 }
    }

    /// Records a mapping; `None` where there is no memory for it.
    pub(crate) fn begin(&mut self, range: IovaRange, prot: Prot, mapped_at: Site) -> Option<u32> {
        let entry = Entry { range, prot, mapped_at, since: Instant::now(), ended: None, next: NOWHERE };
        let grows = self.ended < REMEMBERED && self.entries.len() < u32::MAX as usize / 2;
        let index = if grows && self.entries.try_reserve(1).is_ok() {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        } else {
            let index = self.oldest;
            let place = self.entries.get_mut(index as usize)?;
            self.oldest = place.next;
            *place = entry;
            if self.oldest == NOWHERE {
                self.newest = NOWHERE;
            }
            self.ended -= 1;
            self.forgotten = true;
            index
        };
        self.total += 1;
        self.total_bytes += range.len();
        Some(index)
    }

    /// Records the end of a mapping.
    pub(crate) fn end(&mut self, index: u32, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        let Some(entry) = self.entries.get_mut(index as usize) else { return };
        *entry = Entry { range, mapped_at, ended: Some((Instant::now(), unmapped_at)), next: NOWHERE, ..*entry };
        match self.entries.get_mut(self.newest as usize) {
            Some(newest) => newest.next = index,
            None => self.oldest = index,
        }
        self.newest = index;
        self.ended += 1;
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = LiveMapping> {
        self.entries.iter().filter(|entry| entry.ended.is_none()).map(|entry| LiveMapping {
            range: entry.range,
            prot: entry.prot,
            site: Some(entry.mapped_at),
            since: Some(entry.since),
        })
    }

    pub(crate) fn last_ended(&self, address: Iova) -> Option<EndedMapping> {
        let ended = |entry: &Entry| {
            let (when, site) = entry.ended.filter(|_| entry.range.contains(address))?;
            let (mapped_at, unmapped_at) = (Some(entry.mapped_at), Some(site));
            Some(EndedMapping { range: entry.range, mapped_at, unmapped_at, when })
        };
        self.entries.iter().filter_map(ended).max_by_key(|ended| ended.when)
    }

    pub(crate) fn has_forgotten(&self) -> bool {
        self.forgotten
    }

    /// Mappings ever made, and the bytes in them.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.total, self.total_bytes)
    }
}
