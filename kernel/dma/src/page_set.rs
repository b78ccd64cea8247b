//! Owned, scattered pages: as few chunks as the memory allows.

#![expect(unsafe_code, reason = "promises that its chunks are the memory that it owns")]

use crate::buffer::{Span, Spans, to_usize};
use crate::memory::{DmaMemory, PageRequest};
use crate::pages::{Chunk, round_up};
use crate::{Error, Pages, Rejected};
use alloc::vec::Vec;
use core::fmt;
use iommu::{PAGE_SIZE, PhysRange};

/// The chunk sizes that an allocation tries, largest first. The last resort is always the smallest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ladder(&'static [u64]);

impl Ladder {
    /// Single pages only: the most scattered memory there is.
    pub const SINGLE_PAGES: Self = Self(&[PAGE_SIZE]);
    /// As many 1 MiB chunks as possible, then 64 KiB, then pages.
    pub const DEFAULT: Self = Self(&[1 << 20, 64 << 10, PAGE_SIZE]);

    /// A ladder of these sizes, or `None` unless each is a power of two, at least a page, and smaller than the one before.
    pub const fn new(sizes: &'static [u64]) -> Option<Self> {
        let mut i = 0;
        while i < sizes.len() {
            if !sizes[i].is_power_of_two() || sizes[i] < PAGE_SIZE || (i > 0 && sizes[i] >= sizes[i - 1]) {
                return None;
            }
            i += 1;
        }
        Some(Self(sizes))
    }

    /// The sizes in bytes.
    pub const fn sizes(self) -> &'static [u64] {
        self.0
    }
}

/// Memory in chunks that need not be neighbours. Plain slices while, and only while, no device has it.
///
/// # Invariants
///
/// `starts[i]` is the sum of the sizes of the chunks before `i`; `len` is the sum of all; `runs` are the chunks' physical
/// ranges in order, neighbours merged.
pub struct PageSet {
    chunks: Vec<Chunk>,
    starts: Vec<u64>,
    runs: Vec<PhysRange>,
    len: u64,
}

impl PageSet {
    /// Allocates at least `bytes` of zeroed memory, rounded up to whole pages, in chunks of `ladder`, each aligned to its size.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] for 0 bytes or a size that overflows.
    pub fn zeroed(memory: &'static dyn DmaMemory, bytes: u64, ladder: Ladder) -> Result<Self, Error> {
        Self::allocate(memory, PageRequest::anywhere(round_up(bytes)?), ladder)
    }

    /// Allocates zeroed memory under constraints, in chunks of `ladder`. The alignment of the request is the size of the
    /// smallest chunk: that of the pages of a device whose translation granule is larger than [`PAGE_SIZE`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] where the request breaks the rules of [`PageRequest`], or is not a multiple
    /// of its alignment.
    pub fn allocate(memory: &'static dyn DmaMemory, request: PageRequest, ladder: Ladder) -> Result<Self, Error> {
        let PageRequest { bytes, align: smallest, below } = request;
        if bytes == 0 || !smallest.is_power_of_two() || smallest < PAGE_SIZE || bytes % smallest != 0 {
            return Err(Error::BadSize(bytes));
        }
        let mut left = bytes;
        let mut set = Self { chunks: Vec::new(), starts: Vec::new(), runs: Vec::new(), len: 0 };
        let larger = ladder.sizes().iter().copied().filter(|size| *size > smallest);
        let mut sizes = larger.chain([smallest]).peekable();
        while left != 0 {
            // The smallest fits whatever is left, so the ladder ends only with an allocation that failed.
            let Some(&size) = sizes.peek() else { return Err(Error::OutOfMemory) };
            if size > left {
                sizes.next();
                continue;
            }
            match Chunk::zeroed(memory, PageRequest { bytes: size, align: size, below }) {
                Ok(chunk) => {
                    set.push(chunk)?;
                    left -= size;
                }
                Err(Error::OutOfMemory) => {
                    sizes.next();
                }
                Err(other) => return Err(other),
            }
        }
        Ok(set)
    }

    fn push(&mut self, chunk: Chunk) -> Result<(), Error> {
        let run = chunk.run();
        self.chunks.try_reserve(1)?;
        self.starts.try_reserve(1)?;
        self.runs.try_reserve(1)?;
        match self.runs.last_mut() {
            Some(last) if last.end() == run.start() => {
                *last = PhysRange::between(last.start(), run.end()).ok_or(Error::OutOfMemory)?;
            }
            _ => self.runs.push(run),
        }
        self.starts.push(self.len);
        self.len = self.len.checked_add(run.len()).ok_or(Error::OutOfMemory)?;
        self.chunks.push(chunk);
        Ok(())
    }

    /// The size in bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The physical runs in order, neighbours merged.
    pub fn runs(&self) -> &[PhysRange] {
        &self.runs
    }

    /// The memory, chunk by chunk.
    pub fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        self.chunks.iter().map(Chunk::as_slice)
    }

    /// The memory, chunk by chunk.
    pub fn chunks_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.chunks.iter_mut().map(Chunk::as_mut_slice)
    }

    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let (first, mut skip) = self.locate(offset, to.len())?;
        let mut to = to;
        for chunk in self.chunks.iter().skip(first) {
            let from = chunk.as_slice().get(skip..).unwrap_or_default();
            let bytes = from.len().min(to.len());
            let (now, rest) = to.split_at_mut(bytes);
            now.copy_from_slice(&from[..bytes]);
            (to, skip) = (rest, 0);
            if to.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let (first, mut skip) = self.locate(offset, from.len())?;
        let mut from = from;
        for chunk in self.chunks.iter_mut().skip(first) {
            let to = chunk.as_mut_slice().get_mut(skip..).unwrap_or_default();
            let bytes = to.len().min(from.len());
            let (now, rest) = from.split_at(bytes);
            to[..bytes].copy_from_slice(now);
            (from, skip) = (rest, 0);
            if from.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// The chunk in which `len` bytes at `offset` begin, and how far into it; checks that they are all inside.
    fn locate(&self, offset: u64, len: usize) -> Result<(usize, usize), Error> {
        let out = Error::OutOfRange { offset, len: len as u64, size: self.len };
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(out);
        }
        // The first start is 0, so at least one start is not above `offset`.
        let index = self.starts.partition_point(|start| *start <= offset).saturating_sub(1);
        let start = self.starts.get(index).ok_or(out)?;
        Ok((index, to_usize(offset - start)))
    }
}

impl PageSet {
    /// Makes a set of one chunk, without copying.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the pages back where there is no memory for the lists.
    pub fn of(pages: Pages) -> Result<Self, Rejected<Pages>> {
        let (mut chunks, mut starts, mut runs) = (Vec::new(), Vec::new(), Vec::new());
        let room = chunks.try_reserve_exact(1).and(starts.try_reserve_exact(1)).and(runs.try_reserve_exact(1));
        if room.is_err() {
            return Err(Rejected { buffer: pages, error: Error::OutOfMemory });
        }
        let chunk = pages.into_chunk();
        let run = chunk.run();
        chunks.push(chunk);
        starts.push(0);
        runs.push(run);
        Ok(Self { chunks, starts, runs, len: run.len() })
    }
}

/// As [`PageSet::of`]; ends the program where there is no memory for the lists.
impl From<Pages> for PageSet {
    fn from(pages: Pages) -> Self {
        let chunk = pages.into_chunk();
        let run = chunk.run();
        Self { chunks: alloc::vec![chunk], starts: alloc::vec![0], runs: alloc::vec![run], len: run.len() }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} bytes in {} chunks, {} runs)", self.len, self.chunks.len(), self.runs.len())
    }
}

// SAFETY:
// - the runs are those of the chunks, which the set owns, in their order (invariant);
// - spans are the chunks', which are held by pointer: moving the set or growing a vector moves no memory;
// - no reference is made here, and the memory is freed by the drop of the chunks only.
unsafe impl Spans for PageSet {
    #[inline]
    fn spans_runs(&self) -> &[PhysRange] {
        &self.runs
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        self.len
    }
    #[inline]
    fn span(&self, offset: u64) -> Option<Span> {
        let (index, skip) = self.locate(offset, 1).ok()?;
        self.chunks.get(index)?.span(skip as u64)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.chunks.first().map(Chunk::memory)
    }
}
