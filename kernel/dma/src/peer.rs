//! Registers and memory of one device, lent to another: peer-to-peer.
//!
//! A [`PeerRange`] is a piece of the bus, not of memory: it is mapped with device attributes, no cache is ever maintained for it,
//! there is no view of it for the CPU, and it is never copied. A device whose only memory is a restricted pool is not lent any.

#![expect(unsafe_code, reason = "lends what lies on the bus by somebody's promise")]

use crate::Error;
use crate::buffer::{Span, Spans};
use crate::held::Held;
use crate::lent::lent_by_held;
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Device, Direction, Rejected};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, PAGE_SIZE, PhysRange};

/// A range of the bus that is not memory.
pub struct PeerRange {
    run: [PhysRange; 1],
}

impl PeerRange {
    /// Takes charge of `range`, in whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::BadSize`] unless it is made of whole pages.
    ///
    /// # Safety
    ///
    /// - The range is registers or memory of a device, and none of the kernel's own.
    /// - It stays that for as long as the object lives, for ever if that is forgotten.
    /// - Whatever is read and written there, in any order, breaks no promise that memory safety rests on: the device to which it
    ///   belongs reaches no memory but what it was lent, whatever it is told.
    pub unsafe fn new(range: PhysRange) -> Result<Self, Error> {
        if range.is_empty() || !range.is_aligned(PAGE_SIZE) {
            return Err(Error::BadSize(range.len()));
        }
        Ok(Self { run: [range] })
    }

    /// Where it is on the CPU's bus.
    pub fn range(&self) -> PhysRange {
        let [range] = self.run;
        range
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.range().len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.range().is_empty()
    }
}

impl fmt::Debug for PeerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerRange({})", self.range())
    }
}

// SAFETY:
// - the run is the object's to lend, by the promise made to `new`; the CPU sees no byte of it, so that there are no spans and no
//   references;
// - forgotten, it stays what it is for ever, by the same promise.
unsafe impl Spans for PeerRange {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.run
    }
    fn spans_len(&self) -> u64 {
        self.len()
    }
    fn span(&self, _: u64) -> Option<Span> {
        None
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        None
    }
}

/// A [`PeerRange`] that a device has, in direction `D`. [`MappedPeer::unmap`] and dropping it revoke.
#[must_use = "dropping a mapping ends it"]
pub struct MappedPeer<D: Direction> {
    held: Held<D, PeerRange>,
}

impl<D: Direction> MappedPeer<D> {
    pub(crate) fn new(device: &Device, range: PeerRange, site: Site) -> Result<Self, Rejected<PeerRange>> {
        // SAFETY: the range may be accessed in any way (promise of `new`); it goes into the `Held`, which gives it up after the
        // revocation only.
        match unsafe { device.lend_peer(&range.run, range.len(), D::PROT, site) } {
            Ok(loan) => Ok(Self { held: Held::of(loan, range) }),
            Err(error) => Err(Rejected { buffer: range, error }),
        }
    }

    /// The device's address of the first byte; all others follow it behind an IOMMU.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.held.memory().len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Revokes the device's access and gives the range back.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the range is lost.
    #[track_caller]
    pub fn unmap(self) -> Result<PeerRange, Quarantined> {
        self.held.take_back(Location::caller())
    }
}

lent_by_held!([D: Direction] MappedPeer<D>, D, |this| Self::len(this));

impl<D: Direction> fmt::Debug for MappedPeer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loan = self.held.loan();
        write!(f, "MappedPeer({:?} to {} at {}, {:?})", self.held.memory(), loan.device.name(), loan.range(), D::PROT)
    }
}
