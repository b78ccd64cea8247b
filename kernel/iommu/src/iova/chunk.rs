//! A piece of the window that is cut into equal slots: what the caches of small ranges are made of.

/// log2 of the pages in a chunk.
pub(super) const CHUNK_SHIFT: u32 = 9;
/// Pages in a chunk. Chunks begin at multiples of it.
pub(super) const CHUNK: u64 = 1 << CHUNK_SHIFT;
/// Size classes: slots of 1, 2, 4 ... 512 pages.
pub(super) const CLASSES: usize = CHUNK_SHIFT as usize + 1;
/// The class of a chunk whose pages are taken by address, for good or until they are released: it has no slots.
pub(super) const BY_ADDRESS: u8 = CLASSES as u8;
/// No core.
pub(super) const NOBODY: u32 = u32::MAX;

const SLOTS: usize = CHUNK as usize;
const WORDS: usize = SLOTS / 64;

/// The slots of one chunk.
///
/// # Invariants
///
/// A slot is free exactly if its bit is set in `free` and its `used` is 0; `summary` has a bit for each word of `free` that is
/// not zero; `vacant` counts the free slots. In a chunk [`BY_ADDRESS`] the bits are those of pages, `used` of the first page of
/// a range is its length, and there is no `summary`.
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
    used: [u16; SLOTS],
}

impl Chunk {
    /// A chunk that does not belong to the caches.
    pub const fn new() -> Self {
        Self { class: None, owner: NOBODY, listed: false, vacant: 0, summary: 0, free: [0; WORDS], used: [0; SLOTS] }
    }

    /// Makes it a chunk of free slots of `class`, from which `owner` allocates.
    pub fn assign(&mut self, class: u8, owner: u32) {
        let slots = if class == BY_ADDRESS { SLOTS } else { SLOTS >> class };
        *self = Self { class: Some(class), owner, vacant: slots as u16, ..Self::new() };
        for (number, word) in self.free.iter_mut().enumerate() {
            let here = slots.saturating_sub(number * 64).min(64) as u32;
            *word = u64::MAX.checked_shr(64 - here).unwrap_or(0);
            self.summary |= u8::from(here != 0) << number;
        }
    }

    /// Allocates (in a chunk of slots) the lowest free slot for `pages`. Returns the first page of it, counted from the chunk's start.
    #[inline]
    pub fn take(&mut self, pages: u16) -> Option<u64> {
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
        let Some(class) = self.class.filter(|class| *class != BY_ADDRESS) else { return false };
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

    /// Takes the `pages` from `page` on, of a chunk [`BY_ADDRESS`]. Returns whether all of them were free.
    #[inline]
    pub fn take_at(&mut self, page: u64, pages: u64) -> bool {
        if page >= CHUNK || pages == 0 || pages > CHUNK - page || !self.all_free(page, pages) {
            return false;
        }
        self.each_word(page, pages, |word, mask| *word &= !mask);
        self.used[page as usize % SLOTS] = pages as u16;
        self.vacant = self.vacant.wrapping_sub(pages as u16);
        true
    }

    /// Frees the range that is exactly this one, of a chunk [`BY_ADDRESS`]. Returns whether there is one.
    #[inline]
    pub fn put_at(&mut self, page: u64, pages: u64) -> bool {
        let used = &mut self.used[page as usize % SLOTS];
        if page >= CHUNK || *used == 0 || u64::from(*used) != pages {
            return false;
        }
        *used = 0;
        self.each_word(page, pages, |word, mask| *word |= mask);
        self.vacant = self.vacant.wrapping_add(pages as u16);
        true
    }

    fn all_free(&mut self, page: u64, pages: u64) -> bool {
        let mut free = true;
        self.each_word(page, pages, |word, mask| free &= *word & mask == mask);
        free
    }

    /// Calls `f` with each word that has bits of the `pages` from `page` on, and those bits. They lie in the chunk.
    #[inline]
    fn each_word(&mut self, page: u64, pages: u64, mut f: impl FnMut(&mut u64, u64)) {
        let mut at = page as usize;
        let end = at.wrapping_add(pages as usize);
        while at < end {
            let bit = at % 64;
            let count = (64 - bit).min(end - at);
            f(&mut self.free[at / 64 % WORDS], (u64::MAX >> ((64 - count) % 64)) << bit);
            at += count;
        }
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
        // By address, ranges are no more than pages.
        self.class
            .map_or(0, |class| (if class == BY_ADDRESS { SLOTS } else { SLOTS >> class }) - usize::from(self.vacant))
    }

    /// The slots in use: first page, counted from the chunk's start, and pages.
    pub fn slots(&self) -> impl Iterator<Item = (u64, u64)> {
        let class = self.class.filter(|class| *class != BY_ADDRESS).unwrap_or(0);
        self.used
            .iter()
            .enumerate()
            .filter(|(_, used)| **used != 0)
            .map(move |(slot, used)| ((slot as u64) << class, u64::from(*used)))
    }
}
