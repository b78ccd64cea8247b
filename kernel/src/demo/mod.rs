//! The main job: a picture on a disk becomes a picture on a screen, every byte moved by device DMA, and nothing else in memory
//! reachable by either device.
//!
//! 1. `source` finds the file: partition table, filesystem, extents, and looks at its head. This is metadata, read through a
//!    window of one page that is lent to the disk.
//! 2. [`show`] makes a shared buffer of scattered pages, lends it to disk and screen at once, has the disk fill it and the
//!    screen show it. A 32-bit picture is shown from where the disk put it; others are decoded by the CPU into a second buffer.
//!    [`sharing`] has somebody draw into it on the way, again and again, in the very same memory.
//! 3. `fence` has every device that can be made to stray do so, and looks whether it was stopped.
//! 4. The report, for people.
//!
//! Everything that can be wrong with disk, file or devices ends in a [`Failure`]: one sentence.

#![forbid(unsafe_code)]

mod fence;
mod reader;
mod sharing;
mod show;
mod source;

pub use fence::{Proof, Verdict, prove};
pub use sharing::{Act, Frames, Played, sharing};
pub use show::{Outcome, Screenshot, show};
pub use source::{Source, find};

use crate::disk;
use crate::picture;
use alloc::string::{String, ToString};
use core::fmt::{self, Display};

/// The picture that is shown if the command line names none.
pub const DEFAULT_PICTURE: &str = "/pictures/Sluice at work.bmp";

/// Milliseconds that a device gets for one step.
pub const STEP_MILLIS: u64 = 10_000;

/// Why there is no picture on the screen. One sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The disk, or what is on it.
    #[error("disk: {0}")]
    Disk(String),
    /// The file is not in order.
    #[error("picture {path}: {error}")]
    Picture {
        /// Where it is on the disk.
        path: String,
        /// What is wrong with it.
        error: picture::Error,
    },
    /// The screen.
    #[error("screen: {0}")]
    Screen(String),
    /// Who draws.
    #[error("painter: {0}")]
    Painter(String),
    /// Memory could not be lent, or not be taken back.
    #[error("{0}")]
    Dma(String),
    /// There is not enough memory.
    #[error("out of memory: {0}")]
    OutOfMemory(&'static str),
}

impl Failure {
    fn disk(error: impl Display) -> Self {
        Self::Disk(error.to_string())
    }

    fn screen(error: impl Display) -> Self {
        Self::Screen(error.to_string())
    }

    fn painter(error: impl Display) -> Self {
        Self::Painter(error.to_string())
    }

    fn dma(error: impl Display) -> Self {
        Self::Dma(error.to_string())
    }
}

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Self {
        Self::disk(error)
    }
}

/// A number of bytes with its thousands apart.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (index, digit) in digits.char_indices() {
            if index != 0 && (digits.len() - index).is_multiple_of(3) {
                f.write_str(" ")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_their_thousands_apart() {
        assert_eq!(Bytes(0).to_string(), "0");
        assert_eq!(Bytes(999).to_string(), "999");
        assert_eq!(Bytes(1000).to_string(), "1 000");
        assert_eq!(Bytes(1_228_800).to_string(), "1 228 800");
    }
}
