//! The memory that driver and device share: descriptors, available ring, used ring, and each slot's own little memory.
//!
//! The device may scribble on all of it, so nothing that the driver wrote is read back, and what the device wrote is read once
//! and judged in [`super::slots`]. Indices into this memory are the driver's own, or have been masked with the size.
//!
//! # Slots' memory
//!
//! Request headers, small answers and indirect tables must be somewhere that the device can reach. Each descriptor, as the head
//! of a request, has room of its own for them, so that no request allocates or maps anything: header, answer, table, in this order.
//!
//! Requests of one shape after the other in a slot, as those of a [`Lane`](super::Lane) are, need no new descriptors for header,
//! answer and table: [`Ring::shape`] writes these, and [`Ring::fill`] what is different each time. A device that scribbles on them
//! misleads nobody but itself: it reaches what it was lent, wherever its descriptors point.

use super::parts::Part;
use crate::spec::queue::{self as spec, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY};
use alloc::vec::Vec;
use base::barrier;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use dma::{Coherent, Device};
use iommu::Iova;

/// What a descriptor says, but for its position in a chain.
#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub part: Part,
    pub write: bool,
}

/// Bytes of each slot's memory.
#[derive(Clone, Copy)]
pub(super) struct SlotMemory {
    /// For the header, which the device reads.
    pub header: usize,
    /// For the answer, which the device writes.
    pub response: usize,
    /// Entries of the indirect table; 0 without indirect descriptors.
    pub indirect: usize,
}

pub(super) struct Ring {
    size: u16,
    descriptors: Coherent<[AtomicU64]>,
    available: Coherent<[AtomicU16]>,
    used: Coherent<[AtomicU32]>,
    /// The slots' memory, in words: so many slots in each area that no area is long.
    slots: Vec<Coherent<[AtomicU64]>>,
    /// The number of slots in an area is two to the power of this.
    area_shift: u32,
    /// Words of a slot.
    slot_words: usize,
    header_words: usize,
    response_words: usize,
    /// Words of a slot's indirect table.
    table_words: usize,
}

/// Bytes of an area of slots, unless one slot is longer: pools that a device may be bound to have little in one piece.
const AREA: usize = 128 << 10;

/// Words of a descriptor.
const ENTRY: usize = spec::DESC_SIZE / 8;

/// Where a shaped table has what: the header comes first, as a table begins with its first entry, and the answer has a place that
/// does not depend on the number of pieces.
const SHAPED_ANSWER: usize = 1;
const SHAPED_DATA: usize = 2;

impl Ring {
    /// Allocates and zeroes the memory of a queue of `size` entries, a power of two.
    #[track_caller]
    pub fn new(device: &Device, size: u16, memory: SlotMemory) -> Result<Self, dma::Error> {
        // The device finds each part naturally aligned; the two parts of a slot do not share a cache line.
        let header_words = memory.header.next_multiple_of(64) / 8;
        let response_words = memory.response.next_multiple_of(64) / 8;
        let table_words = memory.indirect * ENTRY;
        let slot_words = (header_words + response_words + table_words).next_multiple_of(8);
        let area_shift = (AREA / (8 * slot_words.max(1))).max(1).ilog2().min(u32::from(size).ilog2());
        let areas = usize::from(size) >> area_shift;
        let mut slots = Vec::new();
        slots.try_reserve_exact(areas)?;
        for _ in 0..areas {
            slots.push(device.coherent_slice(slot_words << area_shift)?);
        }
        Ok(Self {
            size,
            descriptors: device.coherent_slice(spec::descriptor_words(size))?,
            available: device.coherent_slice(spec::available_halves(size))?,
            used: device.coherent_slice(spec::used_words(size))?,
            slots,
            area_shift,
            slot_words,
            header_words,
            response_words,
            table_words,
        })
    }

    /// The three areas, for the transport.
    pub fn areas(&self) -> (Iova, Iova, Iova) {
        (self.descriptors.iova(), self.available.iova(), self.used.iova())
    }

    /// Copies a header into the memory of slot `head` and returns its descriptor.
    pub fn put_header(&self, head: u16, header: &[u8]) -> Descriptor {
        let (whole, rest) = header.as_chunks::<8>();
        let words = &self.slot(head)[..self.header_words];
        for (word, bytes) in words.iter().zip(whole) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        if let (false, Some(word)) = (rest.is_empty(), words.get(whole.len())) {
            let mut bytes = [0; 8];
            bytes[..rest.len()].copy_from_slice(rest);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        self.descriptor(head, 0, header.len(), false)
    }

    /// Fills the first `len` bytes of slot `head`'s answer with ones, so that an answer that was never written is not mistaken
    /// for one, and returns its descriptor.
    pub fn prepare_response(&self, head: u16, len: usize) -> Descriptor {
        for word in &self.answer(head)[..len.div_ceil(8)] {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        self.descriptor(head, self.header_words, len, true)
    }

    /// Copies the beginning of slot `head`'s answer.
    pub fn response(&self, head: u16, out: &mut [u8]) {
        for (word, bytes) in self.answer(head).iter().zip(out.chunks_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes()[..bytes.len()]);
        }
    }

    /// The first byte of slot `head`'s answer.
    #[inline]
    pub fn status(&self, head: u16) -> u8 {
        self.slot(head)[self.header_words].load(Ordering::Relaxed).to_ne_bytes()[0]
    }

    #[inline]
    fn slot(&self, head: u16) -> &[AtomicU64] {
        &self.slots[usize::from(head) >> self.area_shift][self.in_area(head)..][..self.slot_words]
    }

    fn answer(&self, head: u16) -> &[AtomicU64] {
        &self.slot(head)[self.header_words..][..self.response_words]
    }

    /// Where word `word` of slot `head` is for the device.
    fn iova(&self, head: u16, word: usize) -> Iova {
        // The slots' memory is mapped: none of its addresses overflows.
        let area = self.slots[usize::from(head) >> self.area_shift].iova();
        Iova::new(area.get() + 8 * (self.in_area(head) + word) as u64)
    }

    /// The first word of slot `head` in its area.
    fn in_area(&self, head: u16) -> usize {
        (usize::from(head) & ((1 << self.area_shift) - 1)) * self.slot_words
    }

    fn descriptor(&self, head: u16, word: usize, len: usize, write: bool) -> Descriptor {
        // Header and answer are far below 4 GiB.
        Descriptor { part: Part { iova: self.iova(head, word), len: len as u32 }, write }
    }

    /// Prepares slot `head` for requests with a table, of `header` words, `pieces` pieces of data and one byte of answer.
    #[cold]
    pub fn shape(&self, head: u16, header: usize, pieces: usize) {
        let table = self.table(head);
        let next = if pieces == 0 { SHAPED_ANSWER } else { SHAPED_DATA };
        put_raw(table, 0, self.descriptor(head, 0, 8 * header, false).part, DESC_F_NEXT, next as u16);
        put_raw(table, SHAPED_ANSWER, self.descriptor(head, self.header_words, 1, true).part, DESC_F_WRITE, 0);
        self.put_table(head, SHAPED_DATA + pieces);
    }

    /// Writes a request into slot `head`, which has been shaped for it: the header, a blank answer, and the pieces of data.
    #[inline]
    pub fn fill<const N: usize>(&self, head: u16, header: [u64; N], mut data: impl Iterator<Item = Part>, write: bool) {
        let (words, table) = self.slot(head).split_at(self.header_words + self.response_words);
        for (word, value) in words.iter().zip(header) {
            word.store(value, Ordering::Relaxed);
        }
        if let Some(answer) = words.get(self.header_words) {
            answer.store(u64::MAX, Ordering::Relaxed);
        }
        let flags = u64::from(if write { DESC_F_WRITE } else { 0 } | DESC_F_NEXT) << 32;
        let Some(mut part) = data.next() else { return };
        let (entries, _) = table.as_chunks::<ENTRY>();
        // The next entry's number is where the last one is followed by the answer.
        for (entry, next) in entries.iter().skip(SHAPED_DATA).zip(SHAPED_DATA as u64 + 1..) {
            let following = data.next();
            let next = if following.is_some() { next } else { SHAPED_ANSWER as u64 };
            entry[0].store(part.iova.get().to_le(), Ordering::Relaxed);
            entry[1].store((u64::from(part.len) | flags | next << 48).to_le(), Ordering::Relaxed);
            match following {
                Some(following) => part = following,
                None => return,
            }
        }
    }

    /// Writes entry `index` of the descriptor area.
    pub fn put(&self, index: u16, descriptor: Descriptor, next: Option<u16>) {
        let flags = if descriptor.write { DESC_F_WRITE } else { 0 } | if next.is_some() { DESC_F_NEXT } else { 0 };
        put_raw(&self.descriptors, usize::from(index), descriptor.part, flags, next.unwrap_or(0));
    }

    /// Slot `head`'s indirect table.
    #[inline]
    pub fn table(&self, head: u16) -> &[AtomicU64] {
        &self.slot(head)[self.header_words + self.response_words..][..self.table_words]
    }

    /// Writes entry `index` of an indirect table.
    #[inline]
    pub fn put_indirect(table: &[AtomicU64], index: usize, descriptor: Descriptor, last: bool) {
        let flags = if descriptor.write { DESC_F_WRITE } else { 0 } | if last { 0 } else { DESC_F_NEXT };
        // A table has at most as many entries as fit `u16`, see `Queue::new`.
        let next = if last { 0 } else { index as u16 + 1 };
        put_raw(table, index, descriptor.part, flags, next);
    }

    /// Makes descriptor `head` refer to the first `entries` entries of its indirect table.
    pub fn put_table(&self, head: u16, entries: usize) {
        let iova = self.iova(head, self.header_words + self.response_words);
        let part = Part { iova, len: (entries * spec::DESC_SIZE) as u32 };
        put_raw(&self.descriptors, usize::from(head), part, DESC_F_INDIRECT, 0);
    }

    /// Publishes `head` as entry number `index` (free-running) of the available ring.
    pub fn publish(&self, index: u16, head: u16) {
        let at = usize::from(index & (self.size - 1));
        self.available[2 + at].store(head.to_le(), Ordering::Relaxed);
        barrier::device_write();
        self.available[1].store(index.wrapping_add(1).to_le(), Ordering::Release);
    }

    /// The device's index of the used ring (free-running). What lies before it may be read afterwards.
    pub fn used_index(&self) -> u16 {
        let word = u32::from_le(self.used[0].load(Ordering::Acquire));
        barrier::device_read();
        (word >> 16) as u16
    }

    /// Entry number `index` (free-running) of the used ring: id and length.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = 1 + 2 * usize::from(index & (self.size - 1));
        let load = |word: &AtomicU32| u32::from_le(word.load(Ordering::Relaxed));
        (load(&self.used[at]), load(&self.used[at + 1]))
    }

    /// Whether the device does not want to hear of new entries (meaningful without `EVENT_IDX`).
    pub fn no_notify(&self) -> bool {
        let word = u32::from_le(self.used[0].load(Ordering::Relaxed));
        word as u16 & USED_F_NO_NOTIFY != 0
    }

    /// The available index at which the device wants to be notified (meaningful with `EVENT_IDX`).
    pub fn avail_event(&self) -> u16 {
        let word = self.used[1 + 2 * usize::from(self.size)].load(Ordering::Relaxed);
        u32::from_le(word) as u16
    }

    /// Asks for no interrupts. With `EVENT_IDX` that cannot be said: one in 65536 entries will interrupt.
    pub fn decline_interrupts(&self, event_idx: bool) {
        if event_idx {
            // The entry before the first comes last.
            self.set_used_event(u16::MAX);
        } else {
            self.available[0].store(spec::AVAIL_F_NO_INTERRUPT.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks for an interrupt when the used index passes `index` (meaningful with `EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.available[2 + usize::from(self.size)].store(index.to_le(), Ordering::Relaxed);
        barrier::publish();
    }
}

/// Writes entry `index` of a descriptor table.
#[inline]
fn put_raw(table: &[AtomicU64], index: usize, part: Part, flags: u16, next: u16) {
    let second = u64::from(part.len) | u64::from(flags) << 32 | u64::from(next) << 48;
    let entry = &table[2 * index..][..2];
    entry[0].store(part.iova.get().to_le(), Ordering::Relaxed);
    entry[1].store(second.to_le(), Ordering::Relaxed);
}
