//! A piece of the window that is cut into equal slots: what the caches of small ranges are made of.

/// log2 of the pages in a chunk.
pub(super) const CHUNK_SHIFT: u32 = 9;
/// Pages in a chunk. Chunks begin at multiples of it.
pub(super) const CHUNK: u64 = 1 << CHUNK_SHIFT;
/// Size classes: slots of 1, 2, 4 ... 64 pages.
pub(super) const CLASSES: usize = 7;
/// No core.
pub(super) const NOBODY: u32 = u32::MAX;

const SLOTS: usize = CHUNK as usize;
const WORDS: usize = SLOTS / 64;

/// The slots of one chunk.
///
/// # Invariants
///
/// A slot is free exactly if its bit is set in `free` and its `used` is 0; `summary` has a bit for each word of `free` that is
/// not zero; `vacant` counts the free slots.
pub(super) struct Chunk {
    /// log2 of the pages in a slot, while the chunk belongs to the caches.
    pub class: Option<u8>,
    /// The core that allocates from it.
    pub owner: u32,
    /// Whether it is offered to cores that look for slots of its class.
    pub listed: bool,
    vacant: u16,
    summary: u8,
    free: [u64; WORDS],
    /// Pages in use of each slot.
    used: [u8; SLOTS],
}

impl Chunk {
    /// A chunk that does not belong to the caches.
    pub const fn new() -> Self {
        Self { class: None, owner: NOBODY, listed: false, vacant: 0, summary: 0, free: [0; WORDS], used: [0; SLOTS] }
    }

    /// Makes it a chunk of free slots of `class`, from which `owner` allocates.
    pub fn assign(&mut self, class: u8, owner: u32) {
        let slots = SLOTS >> class;
        *self = Self { class: Some(class), owner, vacant: slots as u16, ..Self::new() };
        for (number, word) in self.free.iter_mut().enumerate() {
            let here = slots.saturating_sub(number * 64).min(64) as u32;
            *word = u64::MAX.checked_shr(64 - here).unwrap_or(0);
            self.summary |= u8::from(here != 0) << number;
        }
    }

    /// Allocates the lowest free slot for `pages`. Returns the first page of it, counted from the chunk's start.
    #[inline]
    pub fn take(&mut self, pages: u8) -> Option<u64> {
        let class = self.class?;
        if self.summary == 0 {
            return None;
        }
        // INVARIANT: the word has a bit, and there is a vacant slot, so nothing wraps and no mask changes anything: they tell
        // the compiler so.
        let number = self.summary.trailing_zeros() as usize % WORDS;
        let word = &mut self.free[number];
        let slot = (number * 64 + word.trailing_zeros() as usize) % SLOTS;
        self.used[slot] = pages;
        *word &= word.wrapping_sub(1);
        self.summary &= !(u8::from(*word == 0) << number);
        self.vacant = self.vacant.wrapping_sub(1);
        Some((slot as u64) << (class % 64))
    }

    /// Frees the slot at `page` (counted from the chunk's start) of which exactly `pages` are in use. Returns whether there is
    /// such a slot.
    #[inline]
    pub fn put(&mut self, page: u64, pages: u64) -> bool {
        let Some(class) = self.class else { return false };
        let mask = (1 << (class % 64)) - 1;
        let slot = (page >> (class % 64)) as usize % SLOTS;
        let used = &mut self.used[slot];
        if page & mask != 0 || page >= CHUNK || *used == 0 || u64::from(*used) != pages {
            return false;
        }
        *used = 0;
        self.free[slot / 64] |= 1 << (slot % 64);
        self.summary |= 1 << (slot / 64);
        self.vacant = self.vacant.wrapping_add(1);
        true
    }

    /// Whether all slots are free.
    #[inline]
    pub fn is_vacant(&self) -> bool {
        self.class.is_some_and(|class| usize::from(self.vacant) == SLOTS >> class)
    }

    /// Whether enough slots are free for a core to make this chunk its own. Not at the first one, or cores would go from
    /// chunk to chunk for one slot each.
    #[inline]
    pub fn is_worthwhile(&self) -> bool {
        self.class.is_some_and(|class| usize::from(self.vacant) >= (SLOTS >> class) / 4)
    }

    /// How many slots are in use.
    pub fn live(&self) -> usize {
        self.class.map_or(0, |class| (SLOTS >> class) - usize::from(self.vacant))
    }

    /// The slots in use: first page, counted from the chunk's start, and pages.
    pub fn slots(&self) -> impl Iterator<Item = (u64, u64)> {
        let class = self.class.unwrap_or(0);
        self.used
            .iter()
            .enumerate()
            .filter(|(_, used)| **used != 0)
            .map(move |(slot, used)| ((slot as u64) << class, u64::from(*used)))
    }
}
