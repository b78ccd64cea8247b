//! An address space with policy: whose it is, and which parts of it are taken.
//!
//! A domain joins an [`AddressSpace`] of the hardware with an [`IovaAllocator`] for it. Regions in which a device would not
//! reach memory, whatever the tables say (a host bridge keeps accesses to its own windows to itself; a write to the MSI
//! doorbell is an interrupt), or which firmware uses, are reserved by name when the domain is set up and can never be
//! allocated; there is no way to give them back.
//!
//! # Locking
//!
//! The list of reserved regions has an `IrqMutex`, under which those of the [`IovaAllocator`] are taken. Mapping and
//! allocating never take it, but for an owner's first. What an owner's mappings and revocations take stands in `placing`.

mod placing;

pub use placing::{Revoking, Turn};

use crate::contract::AddressSpace;
use crate::iova::IovaAllocator;
use crate::{Iova, IovaError, IovaRange, OutOfMemory};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::fmt;
use placing::Placing;
use spin::Once;

/// Who puts mappings into a domain. (Blocked and identity are states of a group, without a domain.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainKind {
    /// The DMA-API: the default of every device.
    Dma,
    /// A driver, by itself.
    Owned,
}

impl fmt::Display for DomainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dma => "DMA",
            Self::Owned => "owned",
        })
    }
}

/// Why a region is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReservedKind {
    /// Writes become interrupts.
    MsiDoorbell,
    /// A host bridge answers for itself: memory there is not reached.
    PciWindow,
    /// Firmware has given it to a device.
    Firmware,
    /// The bus does not carry it.
    Hole,
}

impl fmt::Display for ReservedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MsiDoorbell => "MSI doorbell",
            Self::PciWindow => "PCI window",
            Self::Firmware => "firmware",
            Self::Hole => "hole",
        })
    }
}

/// A part of a domain that is never allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// Where, in whole pages.
    pub range: IovaRange,
    /// Why.
    pub kind: ReservedKind,
}

/// One device address space and its rules.
pub struct Domain {
    kind: DomainKind,
    space: Arc<dyn AddressSpace>,
    iova: IovaAllocator,
    /// Only ever appended to.
    reserved: IrqMutex<Vec<Reserved>>,
    /// The range without a reserved region in which the owner has begun to map, once he has.
    clear: Once<IovaRange>,
    placing: Placing,
}

impl Domain {
    /// Makes a domain of `space`. Addresses are allocated from `window` (what the bus carries and the devices can express) as
    /// far as the hardware translates it.
    ///
    /// # Errors
    ///
    /// [`IovaError::OutOfWindow`] if no page can be both expressed and translated; [`IovaError::OutOfMemory`].
    pub fn new(kind: DomainKind, space: Arc<dyn AddressSpace>, window: IovaRange) -> Result<Self, IovaError> {
        Self::with_guard(kind, space, window, 0)
    }

    /// Like [`Domain::new`], with `guard` bytes free behind every allocation (see [`IovaAllocator::with_guard`]).
    ///
    /// # Errors
    ///
    /// As [`Domain::new`].
    pub fn with_guard(
        kind: DomainKind,
        space: Arc<dyn AddressSpace>,
        window: IovaRange,
        guard: u64,
    ) -> Result<Self, IovaError> {
        let aperture = space.aperture();
        let usable = intersection(window, aperture.range).ok_or(IovaError::OutOfWindow(window))?;
        let iova = IovaAllocator::with_guard(usable, aperture.page_size(), guard)?;
        let (reserved, clear, placing) = (IrqMutex::new(Vec::new()), Once::new(), Placing::new());
        Ok(Self { kind, space, iova, reserved, clear, placing })
    }

    /// Who puts mappings into it.
    pub fn kind(&self) -> DomainKind {
        self.kind
    }

    /// The hardware's side of it.
    pub fn space(&self) -> &Arc<dyn AddressSpace> {
        &self.space
    }

    /// The allocator of its addresses.
    pub fn iova(&self) -> &IovaAllocator {
        &self.iova
    }

    /// Lists what is reserved. What is reserved meanwhile may or may not be among it.
    pub fn reserved(&self) -> impl Iterator<Item = Reserved> {
        (0..).map_while(|index| self.reserved.lock().get(index).copied())
    }

    /// Says why `iova` is reserved, if it is: for reports.
    pub fn reservation_of(&self, iova: Iova) -> Option<ReservedKind> {
        self.reserved().find(|reserved| reserved.range.contains(iova)).map(|reserved| reserved.kind)
    }

    /// Reserves every page that has a byte in `range`, for good. Regions may overlap earlier ones and lie outside what can be
    /// allocated anyway.
    ///
    /// # Errors
    ///
    /// [`IovaError::InUse`] if part of it is allocated, or an owner has begun to map; [`IovaError::OutOfMemory`]. Nothing is
    /// reserved then.
    pub fn reserve(&self, range: IovaRange, kind: ReservedKind) -> Result<(), IovaError> {
        if range.is_empty() {
            return Ok(());
        }
        let page = self.iova.page_size();
        let last = Iova::new(range.end().get() - 1).align_down(page);
        // A region that reaches into the last page of the 64-bit space ends before that page: it is beyond every aperture.
        let end = last.checked_add(page).unwrap_or(last);
        let range = IovaRange::between(range.start().align_down(page), end).unwrap_or(range);
        let mut reserved = self.reserved.lock();
        if self.clear.is_completed() {
            return Err(IovaError::InUse(range));
        }
        reserved.try_reserve(1).map_err(|_| OutOfMemory)?;
        if let Some(usable) = intersection(range, self.iova.window()) {
            self.withhold(&reserved, usable)?;
        }
        reserved.push(Reserved { range, kind });
        Ok(())
    }

    /// Begins to map `range`, for an owner that says by himself what lies where: nobody else begins to until the turn is given back
    /// ([`Turn::mapped`], or a drop where nothing came of it). The tables say whether something is there already.
    ///
    /// # Errors
    ///
    /// [`IovaError::Misaligned`], [`IovaError::OutOfWindow`]; [`IovaError::InUse`] if part of it is reserved, or its revocation failed.
    #[inline(always)]
    pub fn begin_mapping(&self, range: IovaRange) -> Result<Turn<'_>, IovaError> {
        self.check(range)?;
        self.take_turn(range)
    }

    /// [`Domain::begin_mapping`] of a range of which [`Domain::check`] has returned `Ok` at any time, or will before it is mapped: what
    /// that looks at does not change any more once an owner has begun to map.
    ///
    /// # Errors
    ///
    /// [`IovaError::InUse`] if the revocation of part of it failed.
    #[inline(always)]
    pub fn take_turn(&self, range: IovaRange) -> Result<Turn<'_>, IovaError> {
        self.placing.begin(range)
    }

    /// Whether an owner may map at `range`, as far as that has been laid down, which from now on it is for good.
    ///
    /// # Errors
    ///
    /// [`IovaError::Misaligned`], [`IovaError::OutOfWindow`]; [`IovaError::InUse`] if part of it is reserved.
    #[inline(always)]
    pub fn check(&self, range: IovaRange) -> Result<(), IovaError> {
        let clear = self
            .clear
            .get()
            // (Without a branch for each.)
            .is_some_and(|clear| clear.covers(range) & !range.is_empty() & range.is_aligned(self.iova.page_size()));
        if clear { Ok(()) } else { self.check_unreserved(range) }
    }

    /// Begins to revoke `range`, which was mapped since [`Domain::begin_mapping`] of it.
    #[inline(always)]
    pub fn begin_revoking(&self, range: IovaRange) -> Revoking<'_> {
        self.placing.revoke(range)
    }

    /// [`Self::check`], where something is reserved, or nothing was asked yet.
    #[inline(never)]
    fn check_unreserved(&self, range: IovaRange) -> Result<(), IovaError> {
        if let Some(error) = placing::refused(self.iova.window(), self.iova.page_size(), range) {
            return Err(error);
        }
        let reserved = self.reserved.lock();
        if reserved.iter().any(|reserved| reserved.range.overlaps(range)) {
            return Err(IovaError::InUse(range));
        }
        // Under the lock, after which nothing is reserved any more.
        self.clear.call_once(|| gaps(&reserved, self.iova.window()).find(|gap| gap.covers(range)).unwrap_or_default());
        Ok(())
    }

    /// Withholds what of `range` no earlier reservation covers: all of it, or nothing.
    fn withhold(&self, reserved: &[Reserved], range: IovaRange) -> Result<(), IovaError> {
        for gap in gaps(reserved, range) {
            if let Err(error) = self.iova.withhold(gap) {
                gaps(reserved, range).take_while(|done| *done != gap).for_each(|done| self.iova.restore(done));
                return Err(error);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} domain (", self.kind)?;
        self.space.describe(f)?;
        write!(f, ", {})", self.iova.window())
    }
}

/// The bytes that both ranges have, if any.
fn intersection(a: IovaRange, b: IovaRange) -> Option<IovaRange> {
    let both = IovaRange::between(a.start().max(b.start()), a.end().min(b.end()))?;
    (!both.is_empty()).then_some(both)
}

/// The parts of `range` that no region covers, in order.
fn gaps(reserved: &[Reserved], range: IovaRange) -> impl Iterator<Item = IovaRange> {
    let mut at = range.start();
    core::iter::from_fn(move || {
        while at < range.end() {
            match reserved.iter().find(|other| other.range.contains(at)) {
                Some(other) => at = other.range.end(),
                None => {
                    let starts = reserved.iter().map(|other| other.range.start()).filter(|start| *start > at);
                    let end = starts.min().map_or(range.end(), |start| start.min(range.end()));
                    let gap = IovaRange::between(at, end);
                    at = end;
                    return gap;
                }
            }
        }
        None
    })
}

#[cfg(test)]
mod tests;
