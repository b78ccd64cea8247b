//! Pieces of lent memory, cut to what a device takes.

use crate::Error;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use dma::{Device, Lent, Segment, Slices};
use iommu::Iova;

/// One contiguous piece of a device's address space, as a descriptor names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where.
    pub iova: Iova,
    /// Bytes.
    pub len: u32,
}

/// The longest piece, in bytes, where the device sets no limit: as long as a descriptor can say and still leave the next piece
/// aligned to pages.
pub const MAX_PIECE: u32 = !0xfff;

/// What a request lets the device do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// Checks that `loan` is to `device` and permits `access`, and that `range` (in bytes) lies inside it.
///
/// # Errors
///
/// [`Error::ForeignDevice`], [`Error::WrongDirection`], [`Error::OutsideLoan`].
#[inline]
pub fn check_loan<L: Lent + ?Sized>(
    loan: &L,
    device: &Device,
    access: Access,
    range: &Range<u64>,
) -> Result<(), Error> {
    if loan.device() != device {
        return Err(Error::ForeignDevice);
    }
    match access {
        Access::Read if !loan.device_reads() => return Err(Error::WrongDirection("read")),
        Access::Write if !loan.device_writes() => return Err(Error::WrongDirection("write")),
        _ => {}
    }
    if range.start > range.end || range.end > loan.len() {
        let len = range.end.saturating_sub(range.start);
        return Err(Error::OutsideLoan { offset: range.start, len, loan: loan.len() });
    }
    Ok(())
}

/// The pieces of a range of a loan, none longer than a limit.
#[derive(Clone)]
pub struct Parts<'a> {
    slices: Option<Slices<'a>>,
    /// What is left of the piece in hand.
    current: Segment,
    max: u64,
}

impl<'a> Parts<'a> {
    /// Cuts bytes `range` of `loan` into pieces of at most `max` bytes (at least 1), and as the bus master's limits demand.
    ///
    /// # Errors
    ///
    /// [`Error::Dma`] if the range is not inside the loan.
    pub fn new(loan: &'a dyn Lent, range: &Range<u64>, max: u32) -> Result<Self, Error> {
        let slices = dma::slice(loan, range.start, range.end.saturating_sub(range.start))?;
        Ok(Self { slices: Some(slices), current: NOTHING, max: u64::from(max.max(1)) })
    }

    /// The one piece that bytes `range` of `loan` are for a device that has no limits but `max` bytes a piece, if that is so: most
    /// are, and need no cutting.
    #[inline]
    pub fn single<L: Lent + ?Sized>(loan: &L, range: &Range<u64>, max: u32) -> Option<Part> {
        let [segment] = loan.segments() else { return None };
        let limits = loan.device().limits();
        let len = range.end.checked_sub(range.start)?;
        let whole = range.end <= segment.len && len <= u64::from(max) && len <= limits.max_segment;
        let iova = segment.iova.checked_add(range.start)?;
        // `max` is a `u32`.
        (whole && limits.boundary.is_none()).then_some(Part { iova, len: len as u32 })
    }

    /// No pieces.
    #[must_use]
    pub const fn none() -> Self {
        Self { slices: None, current: NOTHING, max: 1 }
    }
}

const NOTHING: Segment = Segment { iova: Iova::new(0), len: 0 };

impl Iterator for Parts<'_> {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        if self.current.len == 0 {
            self.current = self.slices.as_mut()?.next()?;
        }
        let len = self.current.len.min(self.max);
        // `max` is a `u32`.
        let part = Part { iova: self.current.iova, len: len as u32 };
        self.current = Segment { iova: part.iova.checked_add(len)?, len: self.current.len - len };
        Some(part)
    }
}

/// The loans of one request; the queue keeps them for as long as the device has it.
#[derive(Default)]
pub struct Loans {
    first: Option<Arc<dyn Lent>>,
    more: Vec<Arc<dyn Lent>>,
}

impl Loans {
    /// No loan.
    #[must_use]
    pub const fn none() -> Self {
        Self { first: None, more: Vec::new() }
    }

    /// One loan; needs no memory.
    #[must_use]
    pub fn one(loan: Arc<dyn Lent>) -> Self {
        Self { first: Some(loan), more: Vec::new() }
    }

    /// Adds a loan.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn add(&mut self, loan: Arc<dyn Lent>) -> Result<(), Error> {
        if self.first.is_none() {
            self.first = Some(loan);
        } else {
            self.more.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
            self.more.push(loan);
        }
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }
}
