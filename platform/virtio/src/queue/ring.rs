//! The memory that driver and device share: descriptors, available ring, used ring, and each slot's own little memory.
//!
//! The device may scribble on all of it, so nothing that the driver wrote is read back, and what the device wrote is read once
//! and judged in [`super::slots`]. Indices into this memory are the driver's own, or have been masked with the size.
//!
//! # Slots' memory
//!
//! Request headers, small answers and indirect tables must be somewhere that the device can reach. Each descriptor, as the head
//! of a request, has room of its own for them, so that no request allocates or maps anything.

use super::parts::Part;
use crate::spec::queue::{self as spec, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY};
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
    /// Per slot: header, then response, in words.
    scratch: Coherent<[AtomicU64]>,
    header_words: usize,
    response_words: usize,
    /// Per slot: an indirect table.
    tables: Option<Coherent<[AtomicU64]>>,
    /// 64-bit words of such a table.
    table_words: usize,
}

impl Ring {
    /// Allocates and zeroes the memory of a queue of `size` entries, a power of two.
    #[track_caller]
    pub fn new(device: &Device, size: u16, memory: SlotMemory) -> Result<Self, dma::Error> {
        // The device finds each part naturally aligned; the two parts of a slot do not share a cache line.
        let header_words = memory.header.next_multiple_of(64) / 8;
        let response_words = memory.response.next_multiple_of(64) / 8;
        let count = usize::from(size);
        let tables = match memory.indirect {
            0 => None,
            entries => Some(device.coherent_slice(count * entries * 2)?),
        };
        Ok(Self {
            size,
            descriptors: device.coherent_slice(spec::descriptor_words(size))?,
            available: device.coherent_slice(spec::available_halves(size))?,
            used: device.coherent_slice(spec::used_words(size))?,
            scratch: device.coherent_slice(count * (header_words + response_words))?,
            header_words,
            response_words,
            tables,
            table_words: memory.indirect * 2,
        })
    }

    /// The three areas, for the transport.
    pub fn areas(&self) -> (Iova, Iova, Iova) {
        (self.descriptors.iova(), self.available.iova(), self.used.iova())
    }

    /// Copies a header into the memory of slot `head` and returns its descriptor.
    pub fn put_header(&self, head: u16, header: &[u8]) -> Descriptor {
        let first = usize::from(head) * (self.header_words + self.response_words);
        let (whole, rest) = header.as_chunks::<8>();
        let words = &self.scratch[first..first + self.header_words];
        for (word, bytes) in words.iter().zip(whole) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        if let (false, Some(word)) = (rest.is_empty(), words.get(whole.len())) {
            let mut bytes = [0; 8];
            bytes[..rest.len()].copy_from_slice(rest);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        self.scratch_descriptor(first, header.len(), false)
    }

    /// Fills the first `len` bytes of slot `head`'s answer with ones, so that an answer that was never written is not mistaken
    /// for one, and returns its descriptor.
    pub fn prepare_response(&self, head: u16, len: usize) -> Descriptor {
        let first = self.response_at(head);
        for word in &self.scratch[first..first + len.div_ceil(8)] {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        self.scratch_descriptor(first, len, true)
    }

    /// Copies the beginning of slot `head`'s answer.
    pub fn response(&self, head: u16, out: &mut [u8]) {
        let first = self.response_at(head);
        for (word, bytes) in self.scratch[first..first + self.response_words].iter().zip(out.chunks_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes()[..bytes.len()]);
        }
    }

    /// The first byte of slot `head`'s answer.
    pub fn status(&self, head: u16) -> u8 {
        self.scratch[self.response_at(head)].load(Ordering::Relaxed).to_ne_bytes()[0]
    }

    fn response_at(&self, head: u16) -> usize {
        usize::from(head) * (self.header_words + self.response_words) + self.header_words
    }

    fn scratch_descriptor(&self, word: usize, len: usize, write: bool) -> Descriptor {
        // The slots' memory is mapped: none of its addresses overflows. Header and answer are far below 4 GiB.
        let iova = Iova::new(self.scratch.iova().get() + 8 * word as u64);
        Descriptor { part: Part { iova, len: len as u32 }, write }
    }

    /// Writes entry `index` of the descriptor area.
    pub fn put(&self, index: u16, descriptor: Descriptor, next: Option<u16>) {
        let flags = if descriptor.write { DESC_F_WRITE } else { 0 } | if next.is_some() { DESC_F_NEXT } else { 0 };
        put_raw(&self.descriptors, usize::from(index), descriptor.part, flags, next.unwrap_or(0));
    }

    /// Slot `head`'s indirect table.
    #[inline]
    pub fn table(&self, head: u16) -> &[AtomicU64] {
        let first = usize::from(head) * self.table_words;
        self.tables.as_ref().map_or(&[], |tables| &tables[first..first + self.table_words])
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
        if let Some(tables) = &self.tables {
            let bytes = (usize::from(head) * self.table_words * 8) as u64;
            let iova = Iova::new(tables.iova().get() + bytes);
            let part = Part { iova, len: (entries * spec::DESC_SIZE) as u32 };
            put_raw(&self.descriptors, usize::from(head), part, DESC_F_INDIRECT, 0);
        }
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
