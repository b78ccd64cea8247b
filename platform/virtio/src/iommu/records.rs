//! What is mapped in one address space, as the driver knows it: the device keeps no record that could be read back.
//!
//! # Invariants
//!
//! Records are sorted, not empty, and do not overlap.

use ::iommu::{Iova, IovaRange, OutOfMemory, PhysAddr, PhysRange, Prot};
use alloc::vec::Vec;

/// A contiguous piece of a mapping: one `MAP` request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Piece {
    pub iova: u64,
    pub len: u64,
    pub phys: u64,
}

/// Where a mapping is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// In the records only: the device has no such domain.
    #[default]
    Recorded,
    /// The device has not been told: the sync that does is yet to come.
    Unsynced,
    /// Requests about it are on their way. Only who has set this ends it.
    Busy,
    /// In the device.
    Mapped,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub piece: Piece,
    pub prot: Option<Prot>,
    pub stage: Stage,
}

impl Record {
    /// Where it is.
    pub fn range(&self) -> IovaRange {
        IovaRange::new(Iova::new(self.piece.iova), self.piece.len).unwrap_or_default()
    }

    /// The address after its last byte.
    pub fn end(&self) -> u64 {
        self.piece.iova + self.piece.len
    }
}

/// The pieces of `iova` mapped to `runs` one after another. Runs that touch are one piece, unless `page` says how long a piece
/// may be. The lengths have been checked.
pub(super) fn pieces(iova: IovaRange, runs: &[PhysRange], page: Option<u64>) -> impl Iterator<Item = Piece> + Clone {
    let mut at = iova.start().get();
    let mut runs = runs.iter().copied().filter(|run| !run.is_empty()).peekable();
    let mut left: Option<PhysRange> = None;
    core::iter::from_fn(move || {
        let mut run = match left.take() {
            Some(run) => run,
            None => runs.next()?,
        };
        if let Some(page) = page.filter(|page| *page < run.len()) {
            left = run.part(page, run.len() - page);
            run = run.part(0, page)?;
        } else if page.is_none() {
            while let Some(next) = runs.next_if(|next| next.start() == run.end()) {
                run = PhysRange::between(run.start(), next.end())?;
            }
        }
        let piece = Piece { iova: at, len: run.len(), phys: run.start().get() };
        at += run.len();
        Some(piece)
    })
}

/// All mappings of an address space.
#[derive(Default)]
pub(super) struct Records(Vec<Record>);

impl Records {
    /// The indices of the records that have a byte in `range`.
    fn touching(&self, range: IovaRange) -> core::ops::Range<usize> {
        let (start, end) = (range.start().get(), range.end().get());
        let first = self.0.partition_point(|record| record.end() <= start);
        let last = self.0.partition_point(|record| record.piece.iova < end);
        first..last.max(first)
    }

    /// The records that have a byte in `range`.
    pub fn within(&mut self, range: IovaRange) -> &mut [Record] {
        let touching = self.touching(range);
        self.0.get_mut(touching).unwrap_or_default()
    }

    /// All records.
    pub fn all(&mut self) -> &mut [Record] {
        &mut self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Records that start at `from` or later.
    pub fn from(&mut self, from: u64) -> impl Iterator<Item = &mut Record> {
        let first = self.0.partition_point(|record| record.piece.iova < from);
        self.0.iter_mut().skip(first)
    }

    /// Adds `count` records, sorted, that lie in one range in which there is none.
    pub fn insert(&mut self, count: usize, records: impl Iterator<Item = Record>) -> Result<(), OutOfMemory> {
        self.0.try_reserve(count).map_err(|_| OutOfMemory)?;
        let mut records = records.take(count).peekable();
        let Some(first) = records.peek().map(|record| record.piece.iova) else { return Ok(()) };
        let (at, old) = (self.0.partition_point(|record| record.piece.iova < first), self.0.len());
        self.0.extend(records);
        let added = self.0.len() - old;
        if let Some(tail) = self.0.get_mut(at..) {
            tail.rotate_right(added);
        }
        Ok(())
    }

    /// Removes the records that have a byte in `range`.
    pub fn remove(&mut self, range: IovaRange) {
        let touching = self.touching(range);
        self.0.drain(touching);
    }

    /// Looks an address up.
    pub fn find(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        let at = self.0.partition_point(|record| record.end() <= iova.get());
        let record = self.0.get(at)?;
        let offset = iova.get().checked_sub(record.piece.iova)?;
        Some((PhysAddr::new(record.piece.phys + offset), record.prot?))
    }
}
