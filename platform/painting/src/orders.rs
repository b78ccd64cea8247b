//! What kernel and painter tell each other, as words in a page that both have: what is to be drawn, and what was.
//!
//! Neither believes the other: whatever the page holds, reading it gives a value or none.

use crate::Layout;

/// Bytes of the page, of which the rest is not used.
pub const PAGE: usize = 4096;

/// Bytes of [`Orders`], at the page's beginning.
const ORDERS: usize = 8 * 8;
/// Says that a page has orders.
const MAGIC: u64 = u64::from_le_bytes(*b"painting");

/// What a painter is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orders {
    /// What it draws into.
    pub layout: Layout,
    /// How many frames.
    pub frames: u32,
}

/// What a painter has done, as it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Frames.
    pub frames: u64,
    /// Bytes of pixels that it stored: drawn, and put back.
    pub bytes: u64,
    /// Accesses for which it had to wait.
    pub waits: u64,
    /// Nanoseconds for which it waited, in all.
    pub waited: u64,
}

/// What is in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report;

impl Report {
    /// Writes what is to be done into a page that is empty otherwise.
    pub fn order(page: &mut [u8], orders: &Orders) {
        let Orders { layout, frames } = orders;
        let flags = u64::from(layout.bottom_up) | u64::from(layout.red_first) << 1;
        let sizes = [layout.width.into(), layout.height.into(), layout.offset, layout.stride.into()];
        let [width, height, offset, stride] = sizes;
        put(page, 0, &[MAGIC, width, height, offset, stride, flags, u64::from(*frames)]);
    }

    /// Reads what is to be done. `None` where that makes no sense.
    #[must_use]
    pub fn orders(page: &[u8]) -> Option<Orders> {
        let [magic, width, height, offset, stride, flags, frames] = get(page, 0)?;
        let narrow = |word: u64| u32::try_from(word).ok();
        let layout = Layout {
            width: narrow(width)?,
            height: narrow(height)?,
            offset,
            stride: narrow(stride)?,
            bottom_up: flags & 1 != 0,
            red_first: flags & 2 != 0,
        };
        (magic == MAGIC && flags < 4).then_some(Orders { layout, frames: narrow(frames)? })
    }

    /// Writes what was done.
    pub fn account(page: &mut [u8], account: &Account) {
        let Account { frames, bytes, waits, waited } = *account;
        put(page, ORDERS, &[frames, bytes, waits, waited]);
    }

    /// Reads what was done; nothing, if the page is shorter than that.
    #[must_use]
    pub fn accounted(page: &[u8]) -> Account {
        let [frames, bytes, waits, waited] = get(page, ORDERS).unwrap_or_default();
        Account { frames, bytes, waits, waited }
    }
}

/// Writes words; those behind the end of the page are left out.
fn put(page: &mut [u8], at: usize, words: &[u64]) {
    let room = page.get_mut(at..).unwrap_or_default();
    for (place, word) in room.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

fn get<const N: usize>(page: &[u8], at: usize) -> Option<[u64; N]> {
    let mut words = [0; N];
    let bytes = page.get(at..at.checked_add(N * 8)?)?;
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_account_are_read_as_they_were_written() {
        let layout = Layout { width: 640, height: 480, offset: 54, stride: 2560, bottom_up: true, red_first: false };
        for orders in [
            Orders { layout, frames: 300 },
            Orders { layout: Layout { bottom_up: false, red_first: true, ..layout }, frames: u32::MAX },
        ] {
            let mut page = [0; PAGE];
            Report::order(&mut page, &orders);
            let account = Account { frames: 1, bytes: u64::MAX, waits: 3, waited: 4 };
            Report::account(&mut page, &account);
            assert_eq!(Report::orders(&page), Some(orders));
            assert_eq!(Report::accounted(&page), account);
        }
    }

    #[test]
    fn what_makes_no_sense_is_none() {
        assert_eq!(Report::orders(&[0; PAGE]), None);
        assert_eq!(Report::orders(&[]), None);
        assert_eq!(Report::orders(&[0xff; PAGE]), None);
        assert_eq!(Report::accounted(&[1; 65]), Account::default());
        let mut short = [0; 12];
        Report::account(&mut short, &Account::default());
        assert_eq!(short, [0; 12]);
    }
}
