//! Copies that a device works on in place of a buffer.
//!
//! A device gets a copy where it cannot reach the buffer itself (its address lines, its bus windows, its alignment), where it
//! must not (its only memory is a restricted pool; a buffer shares its page with others and the device is not trusted), or
//! where somebody wants it so. Drivers do not notice: the mapping has the same type, its addresses are the copy's, and its
//! [`View`](crate::View) looks at the copy.
//!
//! # What is copied when
//!
//! | | at map | at a sync | at unmap |
//! |---|---|---|---|
//! | to the device | all | - | - |
//! | from the device | all | - | all |
//! | both ways | all | - | all |
//!
//! A buffer from the device is copied at first too: so what the device does not write comes back as it was, and what an earlier
//! user left in the pool is seen by nobody. What the CPU writes through the view goes into both. At a sync only caches are maintained,
//! because the view shows the copy; but of a shared buffer, which others look at meanwhile, exactly the part that the sync names is copied.
//! What a copy does not fill of a page that is lent to a device behind an IOMMU is zeroed.
//!
//! If a revocation fails the runs are never given back to the pool; the buffer itself, which the device never had, is not lost
//! to it.

#![expect(unsafe_code, reason = "lends memory of a pool, and clears it by pointer")]

use crate::buffer::{Span, Spans, check_range, for_each_span, to_usize};
use crate::device::Loan;
use crate::memory::{DmaMemory, RawPages};
use crate::pool::{MAX_RUN, PoolRef, Run, SLOT};
use crate::site::Site;
use crate::{Device, Direction, Error, copy, held, view};
use alloc::vec::Vec;
use iommu::{Iova, PAGE_SIZE, PhysRange};

/// Bytes that are copied at a time, on the stack.
const CHUNK: usize = 512;

/// Runs of a pool that stand in for a buffer. Gives them back when dropped.
///
/// # Invariants
///
/// The pieces are taken from `pool` and nobody else's, in order, and `runs` are their physical ranges; the buffer's bytes begin
/// at `skip` and are all inside.
pub(crate) struct Bounced {
    pool: PoolRef,
    pieces: Vec<Piece>,
    runs: Vec<PhysRange>,
    skip: u64,
    len: u64,
    /// What the device writes is of no interest.
    discarded: bool,
}

struct Piece {
    run: Run,
    memory: RawPages,
    /// The sum of the sizes before it.
    start: u64,
}

// SAFETY: it owns the runs, which any core may access.
unsafe impl Send for Bounced {}
// SAFETY: as above; it hands out pointers only.
unsafe impl Sync for Bounced {}

impl Bounced {
    /// Takes room for `len` bytes at `skip` of a page, in whole `unit`s; the first of them lies as far into a multiple of
    /// `align` as into the page.
    fn take(pool: PoolRef, skip: u64, len: u64, unit: u64, align: u64) -> Result<Self, Error> {
        // Where single slots will do, those before the first byte are left out.
        let (skip, phase) = if unit < PAGE_SIZE { (skip % unit, skip / unit * unit) } else { (skip, 0) };
        let total = skip.checked_add(len).and_then(|end| end.checked_next_multiple_of(unit));
        let total = total.ok_or(Error::BadSize(len))?;
        let exhausted = Error::PoolExhausted { pool: pool.name().clone(), len, size: pool.len() };
        if total > pool.len() {
            return Err(exhausted);
        }
        let mut bounced = Self { pool, pieces: Vec::new(), runs: Vec::new(), skip, len, discarded: false };
        let (mut done, mut longest) = (0, MAX_RUN.max(unit));
        while done < total {
            let now = (total - done).min(longest);
            let phase = if done == 0 { phase } else { 0 };
            let Some(run) = bounced.pool.take(now, align, phase) else {
                if now <= unit {
                    return Err(exhausted);
                }
                // Whole units: `now` is more than one.
                longest = (1_u64 << (now - 1).ilog2()).max(unit);
                continue;
            };
            bounced.push(run, now, done)?;
            done += now;
        }
        Ok(bounced)
    }

    fn push(&mut self, run: Run, bytes: u64, start: u64) -> Result<(), Error> {
        let room = self.pieces.try_reserve(1).and_then(|()| self.runs.try_reserve(1));
        let memory = self.pool.memory_of(run);
        let range = memory.as_ref().and_then(|memory| PhysRange::new(memory.phys, bytes));
        let (Ok(()), Some(memory), Some(range)) = (room, memory, range) else {
            self.pool.give(run);
            return Err(Error::OutOfMemory);
        };
        self.pieces.push(Piece { run, memory: RawPages { bytes, ..memory }, start });
        match self.runs.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = PhysRange::between(last.start(), range.end()).unwrap_or(*last);
            }
            _ => self.runs.push(range),
        }
        Ok(())
    }

    /// Bytes in all pieces.
    fn total(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.memory.bytes).sum()
    }

    /// Takes nothing over of what the device writes.
    pub(crate) fn discard(&mut self) {
        self.discarded = true;
    }

    /// Clears what the copy does not fill.
    fn clear_padding(&self) {
        for (from, to) in [(0, self.skip), (self.skip + self.len, self.total())] {
            let mut at = from;
            while let Some(span) = self.raw(at).filter(|_| at < to) {
                let bytes = span.bytes.min(to_usize(to - at));
                // SAFETY: inside a run that is ours alone: no device has it yet.
                unsafe { span.ptr.write_bytes(0, bytes) };
                at += bytes as u64;
            }
        }
    }

    /// Hands all pieces to a device that does not snoop.
    fn clean<D: Direction>(&self) {
        for Piece { memory, .. } in &self.pieces {
            if D::DEVICE_WRITES {
                self.pool.maintained_by().clean_invalidate(memory.ptr, to_usize(memory.bytes));
            } else {
                self.pool.maintained_by().clean(memory.ptr, to_usize(memory.bytes));
            }
        }
    }

    /// What is contiguous from byte `at` of all pieces on.
    fn raw(&self, at: u64) -> Option<Span> {
        let index = self.pieces.partition_point(|piece| piece.start <= at).checked_sub(1)?;
        let piece = self.pieces.get(index)?;
        let skip = at - piece.start;
        let bytes = piece.memory.bytes.checked_sub(skip).filter(|bytes| *bytes != 0)?;
        // SAFETY: `skip` is below the size of the piece.
        let ptr = unsafe { piece.memory.ptr.add(to_usize(skip)) };
        Some(Span { ptr, bytes: to_usize(bytes) })
    }
}

impl Drop for Bounced {
    fn drop(&mut self) {
        for piece in &self.pieces {
            self.pool.give(piece.run);
        }
    }
}

// SAFETY:
// - the runs are of the pool, taken for this object alone, in the order of the spans;
// - spans point into them, and the pool is kept by `pool`; nothing here makes a reference;
// - forgotten, it never gives the runs back.
unsafe impl Spans for Bounced {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.runs
    }
    fn spans_len(&self) -> u64 {
        self.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let left = self.len.checked_sub(offset).filter(|left| *left != 0)?;
        let span = self.raw(self.skip + offset)?;
        Some(Span { bytes: span.bytes.min(to_usize(left)), ..span })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        Some(self.pool.maintained_by())
    }
}

/// Copies the `len` bytes at `offset` of one memory to the same place of another. Devices may be using either.
fn transfer(from: &impl Spans, to: &impl Spans, offset: u64, len: u64) -> Result<(), Error> {
    check_range(to, offset, len)?;
    let mut at = offset;
    let mut result = Ok(());
    for_each_span(from, offset, len, |span| {
        let mut done = 0;
        while done < span.bytes && result.is_ok() {
            let mut chunk = [0; CHUNK];
            let now = chunk.len().min(span.bytes - done);
            let Some(chunk) = chunk.get_mut(..now) else { return };
            // SAFETY: less than the span's size.
            let ptr = unsafe { span.ptr.add(done) };
            // SAFETY: the span is valid as long as `from` (contract of Spans), and reached by atomics only: it belongs to a
            // loan or is on its way into one or out of it.
            unsafe { copy::load(Span { ptr, bytes: now }, chunk) };
            result = view::write(to, at, chunk);
            done += now;
            at += now as u64;
        }
    })?;
    result
}

/// Lends a copy of `memory` to `device`, which refused the memory itself, or was told to, because of `why`.
///
/// # Errors
///
/// `why`, where a copy would not help or the device has no pool; [`Error::PoolExhausted`]; and as
/// [`Device::map`](crate::Device::map) of the copy.
#[cold]
pub(crate) fn lend<D: Direction, M: Spans>(
    device: &Device,
    at: Option<Iova>,
    memory: &M,
    site: Site,
    why: Error,
) -> Result<Loan, Error> {
    lend_part::<D, M>(device, at, memory, 0, site, why)
}

/// As [`lend`], of memory that begins `skip` bytes into a page.
pub(crate) fn lend_part<D: Direction, M: Spans>(
    device: &Device,
    at: Option<Iova>,
    memory: &M,
    skip: u64,
    site: Site,
    why: Error,
) -> Result<Loan, Error> {
    let pool = device.pool_for(why)?;
    let len = memory.spans_len();
    let unit = if device.is_isolated() { device.page_size() } else { SLOT };
    let align = unit.max(PAGE_SIZE).max(if device.is_isolated() { 0 } else { device.limits().min_align });
    let bounced = Bounced::take(pool, skip, len, unit, align)?;
    transfer(memory, &bounced, 0, len)?;
    bounced.clear_padding();
    if !device.is_coherent() {
        bounced.clean::<D>();
    }
    let room = Loan::room()?;
    // SAFETY: nobody has a reference into the runs, which are reached through atomics only until the loan has ended; they
    // are not given back before: the loan has them, and leaks them where its end fails.
    let mut loan = unsafe { device.lend_copy(at, &bounced.runs, bounced.total(), D::PROT, site) }?;
    loan.narrow(room, bounced.skip, len, Some(bounced));
    device.count_copy();
    Ok(loan)
}

/// Takes what the device wrote over into `memory`, after the copy was revoked, and gives the copy up.
#[cold]
pub(crate) fn take_over<D: Direction, M: Spans>(bounced: Bounced, memory: &M, coherent: bool) {
    if !D::DEVICE_WRITES || bounced.discarded {
        return;
    }
    let len = bounced.spans_len();
    if !coherent {
        // The whole is always in range, here and below.
        let _ = held::fetch::<D, _>(&bounced, 0, len);
    }
    base::barrier::device_read();
    let _ = transfer(&bounced, memory, 0, len);
    if memory.has_others() {
        let _ = held::prepare::<crate::ToDevice, _>(memory, 0, len);
    }
}

/// [`Held::sync_for_cpu`](held::Held::sync_for_cpu) of a copy.
#[cold]
pub(crate) fn sync_for_cpu<D: Direction, M: Spans>(
    bounced: &Bounced,
    memory: &M,
    offset: u64,
    len: u64,
    coherent: bool,
) -> Result<(), Error> {
    if !D::DEVICE_WRITES {
        return Ok(());
    }
    if !coherent {
        held::fetch::<D, _>(bounced, offset, len)?;
    }
    if memory.has_others() {
        transfer(bounced, memory, offset, len)?;
        held::prepare::<crate::ToDevice, _>(memory, offset, len)?;
    }
    Ok(())
}

/// [`Held::sync_for_device`](held::Held::sync_for_device) of a copy.
#[cold]
pub(crate) fn sync_for_device<D: Direction, M: Spans>(
    bounced: &Bounced,
    memory: &M,
    offset: u64,
    len: u64,
    coherent: bool,
) -> Result<(), Error> {
    if memory.has_others() && D::DEVICE_READS {
        transfer(memory, bounced, offset, len)?;
    }
    if !coherent {
        held::prepare::<D, _>(bounced, offset, len)?;
    }
    Ok(())
}
