//! What the flash holds beside the hand-over: the kernel image and its command line.
//!
//! | offset in flash | what |
//! |---|---|
//! | 0 | the hand-over |
//! | [`HEADER`] | [`MAGIC`], the image's length, the command line's length (both 64 bits, little-endian) |
//! | [`HEADER`] + 0x1000 | the command line |
//! | [`IMAGE`] | the kernel image, flat, with the arm64 Image header |

use alloc::vec::Vec;

/// Bytes of the first flash.
pub const FLASH: usize = 256 << 20;
/// Where in flash the payload begins.
pub const HEADER: usize = 1 << 20;
/// Where in flash the image begins.
pub const IMAGE: usize = 2 << 20;
/// What the payload begins with.
pub const MAGIC: [u8; 8] = *b"SLUICE\0\x01";

const COMMAND_LINE: usize = HEADER + 0x1000;
/// The longest command line, in bytes.
pub const LONGEST: usize = IMAGE - COMMAND_LINE;

/// A flash that cannot be made, or not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hand-over reaches into the payload.
    #[error("the hand-over has {0} bytes, which is more than there is room for")]
    HandOver(usize),
    /// The command line is too long.
    #[error("the command line has {0} bytes, and may have {LONGEST}")]
    CommandLine(usize),
    /// The image is too large.
    #[error("the image has {0} bytes, which is more than the flash has")]
    Image(usize),
    /// What is there is no payload.
    #[error("the flash holds no payload")]
    Missing,
    /// The command line is no text.
    #[error("the command line is not UTF-8")]
    NoText,
    /// The image does not start with an arm64 Image header.
    #[error("the image is not an arm64 Image")]
    NoImage,
}

/// The payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload<'a> {
    /// The kernel image.
    pub image: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
}

impl<'a> Payload<'a> {
    /// Finds the payload in what the flash holds from [`HEADER`] on.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] or another reason why it cannot be used.
    pub fn find(header: &'a [u8]) -> Result<Self, Error> {
        if header.get(..8) != Some(MAGIC.as_slice()) {
            return Err(Error::Missing);
        }
        let image = number(header, 8).ok_or(Error::Missing)?;
        let line = number(header, 16).ok_or(Error::Missing)?;
        if line > LONGEST {
            return Err(Error::CommandLine(line));
        }
        let line = header.get(COMMAND_LINE - HEADER..).and_then(|rest| rest.get(..line)).ok_or(Error::Missing)?;
        let image = header.get(IMAGE - HEADER..).and_then(|rest| rest.get(..image)).ok_or(Error::Image(image))?;
        if image.get(0x38..0x3c) != Some(b"ARM\x64".as_slice()) {
            return Err(Error::NoImage);
        }
        Ok(Self { image, command_line: core::str::from_utf8(line).map_err(|_| Error::NoText)? })
    }

    /// How many bytes of memory the image takes once it runs, from its header.
    pub fn size_in_memory(&self) -> u64 {
        let stated = number(self.image, 16).unwrap_or(0) as u64;
        stated.max(self.image.len() as u64)
    }

    /// Makes the flash's contents, with `hand_over` at the beginning.
    ///
    /// # Errors
    ///
    /// [`Error`] if something does not fit.
    pub fn flash(&self, hand_over: &[u8]) -> Result<Vec<u8>, Error> {
        if hand_over.len() > HEADER {
            return Err(Error::HandOver(hand_over.len()));
        }
        if self.command_line.len() > LONGEST {
            return Err(Error::CommandLine(self.command_line.len()));
        }
        if self.image.len() > FLASH - IMAGE {
            return Err(Error::Image(self.image.len()));
        }
        let mut flash = Vec::with_capacity(IMAGE + self.image.len());
        flash.extend_from_slice(hand_over);
        flash.resize(HEADER, 0);
        flash.extend_from_slice(&MAGIC);
        flash.extend_from_slice(&(self.image.len() as u64).to_le_bytes());
        flash.extend_from_slice(&(self.command_line.len() as u64).to_le_bytes());
        flash.resize(COMMAND_LINE, 0);
        flash.extend_from_slice(self.command_line.as_bytes());
        flash.resize(IMAGE, 0);
        flash.extend_from_slice(self.image);
        Ok(flash)
    }
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn image() -> Vec<u8> {
        let mut image = vec![0; 100];
        image[16..24].copy_from_slice(&0x5000_u64.to_le_bytes());
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        image
    }

    #[test]
    fn what_is_put_into_the_flash_is_found_there() {
        let image = image();
        let payload = Payload { image: &image, command_line: "a=1 b" };
        let flash = payload.flash(b"code").unwrap();
        assert_eq!(&flash[..5], b"code\0");
        assert_eq!(Payload::find(&flash[HEADER..]).unwrap(), payload);
        assert_eq!(payload.size_in_memory(), 0x5000);
    }

    #[test]
    fn a_flash_that_was_cut_or_holds_something_else_is_refused() {
        let image = image();
        let flash = Payload { image: &image, command_line: "" }.flash(b"").unwrap();
        assert_eq!(Payload::find(&flash[HEADER..flash.len() - 1]), Err(Error::Image(100)));
        assert_eq!(Payload::find(&flash[HEADER..HEADER + 12]), Err(Error::Missing));
        assert_eq!(Payload::find(&[]), Err(Error::Missing));
        let with = |at: usize, value: u8| {
            let mut flash = flash.clone();
            flash[at] = value;
            Payload::find(&flash[HEADER..]).unwrap_err()
        };
        assert_eq!(with(HEADER, 0), Error::Missing);
        assert_eq!(with(IMAGE + 0x38, 0), Error::NoImage);
        assert_eq!(with(HEADER + 15, 0xff), Error::Image(0xff00_0000_0000_0064));
        assert_eq!(with(HEADER + 23, 1), Error::CommandLine(1 << 56));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let image = image();
        let long = "x".repeat(LONGEST + 1);
        let payload = Payload { image: &image, command_line: &long };
        assert_eq!(payload.flash(b""), Err(Error::CommandLine(LONGEST + 1)));
        let payload = Payload { image: &image, command_line: "" };
        assert_eq!(payload.flash(&vec![0; HEADER + 1]), Err(Error::HandOver(HEADER + 1)));
    }
}
