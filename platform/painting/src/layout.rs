//! Where the pixels of a picture lie.

use crate::PIXEL;
use core::ops::Range;

/// Where in a buffer the pixels of a picture are, four bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The byte at which the first row in memory begins.
    pub offset: u64,
    /// Bytes from one row in memory to the next.
    pub stride: u32,
    /// The first row in memory is the bottom of the picture.
    pub bottom_up: bool,
    /// Red is the first byte of a pixel and blue the third; otherwise it is the other way round.
    pub red_first: bool,
}

impl Layout {
    /// Whether all of it is within `len` bytes, and there is a pixel at all.
    #[must_use]
    pub fn fits(&self, len: u64) -> bool {
        let row = u64::from(self.width) * PIXEL as u64;
        let rows = u64::from(self.stride) * u64::from(self.height.saturating_sub(1));
        let end = self.offset.checked_add(rows).and_then(|end| end.checked_add(row));
        let overlap = u64::from(self.stride) < row && self.height > 1;
        self.width != 0 && self.height != 0 && !overlap && end.is_some_and(|end| end <= len)
    }

    /// The bytes of `count` pixels from column `x` on in row `y`, counted from the top. `None` for what is outside the picture.
    #[must_use]
    pub fn pixels(&self, x: u32, y: u32, count: u32) -> Option<Range<usize>> {
        if y >= self.height || x.checked_add(count)? > self.width {
            return None;
        }
        let row = if self.bottom_up { self.height - 1 - y } else { y };
        let start = u64::from(row) * u64::from(self.stride) + u64::from(x) * PIXEL as u64;
        let start = usize::try_from(start.checked_add(self.offset)?).ok()?;
        Some(start..start.checked_add(usize::try_from(count).ok()?.checked_mul(PIXEL)?)?)
    }
}
