//! What a process says in the log: not more than its share, and never without its last words.
//!
//! So many lines may come at once, and one more for each [`REFILL`] since: a loop that talks does not drown what others say. A line too
//! many is an error code, and is kept until the next one, whichever that is. So whoever reports the end of the process can say what
//! its last line was, and how many were left out.

use abi::LINE;
use base::time::{Duration, Instant};

/// The time after which a process that has said as much as it may, may say one line more.
pub const REFILL: Duration = Duration::from_millis(100);

/// The lines of one process.
pub(crate) struct Lines {
    most: u32,
    left: u32,
    /// When what is left was counted.
    counted: Instant,
    refused: u64,
    last: [u8; LINE as usize],
    /// Bytes of the last line, if it was refused.
    len: Option<usize>,
}

impl Lines {
    pub fn new(most: u32) -> Self {
        let counted = Instant::from_nanos(0);
        Self { most, left: most, counted, refused: 0, last: [0; LINE as usize], len: None }
    }

    /// Whether `line` may be said at `now`. It is kept otherwise.
    pub fn may_say(&mut self, line: &[u8], now: Instant) -> bool {
        let more = now.since(self.counted).as_nanos() / REFILL.as_nanos();
        if more != 0 {
            self.left = self.left.saturating_add(u32::try_from(more).unwrap_or(u32::MAX)).min(self.most);
            self.counted = now;
        }
        if let Some(left) = self.left.checked_sub(1) {
            (self.left, self.len) = (left, None);
            return true;
        }
        self.refused = self.refused.saturating_add(1);
        let len = line.len().min(self.last.len());
        if let (Some(to), Some(from)) = (self.last.get_mut(..len), line.get(..len)) {
            to.copy_from_slice(from);
        }
        self.len = Some(len);
        false
    }

    /// How many lines were refused, and the last line of all if it was one of them.
    pub fn refused(&self) -> (u64, Option<&str>) {
        let last = self.len.and_then(|len| core::str::from_utf8(self.last.get(..len)?).ok());
        (self.refused, last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(millis * 1_000_000)
    }

    /// Red without the count, without its bound, and where a refusal begins the time anew.
    #[test]
    fn a_process_says_so_many_lines_at_once_and_then_one_each_so_often() {
        let mut lines = Lines::new(3);
        let mut say = |millis, times: usize| (0..times).filter(|_| lines.may_say(b"again", at(millis))).count();
        assert_eq!(say(1_000_000, 10), 3);
        assert_eq!(say(1_000_050, 10), 0);
        assert_eq!(say(1_000_100, 10), 1);
        assert_eq!(say(1_000_350, 10), 2);
        assert_eq!(say(9_000_000, 10), 3, "not more for having been silent");
    }

    #[test]
    fn the_last_line_is_kept_if_it_was_refused() {
        let mut lines = Lines::new(1);
        assert_eq!(lines.refused(), (0, None));
        assert!(lines.may_say(b"first", at(1000)));
        assert_eq!(lines.refused(), (0, None));
        assert!(!lines.may_say(b"a long second", at(1000)) && !lines.may_say(b"third", at(1001)));
        assert_eq!(lines.refused(), (2, Some("third")));
        assert!(lines.may_say(b"fourth", at(2000)));
        assert_eq!(lines.refused(), (2, None), "it was said");
        assert!(!lines.may_say(&[b'x'; 2 * LINE as usize], at(2000)));
        assert_eq!(lines.refused().1.map(str::len), Some(LINE as usize));
    }
}
