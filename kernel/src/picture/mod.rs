//! What a picture file is, and where in it the pixels are.
//!
//! [`Picture::recognise`] needs the first [`HEAD`] bytes of a file and its size. A 32-bit BMP comes out as a [`Layout`]: where
//! in the file its rows are, so that the bytes a disk wrote can be shown as they are. For the others, [`Picture::decode`] makes
//! 32-bit pixels with the processor.
//!
//! # The file is not trusted
//!
//! Sizes are checked against [`Limits`] and the size of the file before anything is allocated, and whatever is wrong is an
//! [`Error`]. The compression inside PNG is the `miniz_oxide` crate's business. (The PNG decoders for `no_std` that were tried,
//! `minipng` 1.0, `zune-png` 0.5 and `png-decoder` 0.2, panic on some damaged files.)
//!
//! # Locking
//!
//! None.

#![forbid(unsafe_code)]

mod bmp;
mod png;

use alloc::vec::Vec;

/// Bytes from the beginning of a file that suffice to recognise it. (Of a shorter file, all of it.)
pub const HEAD: usize = 256;

/// Why a file cannot be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither a BMP nor a PNG.
    #[error("it is not a picture: neither a BMP nor a PNG")]
    NotAPicture,
    /// The file ends before the picture does.
    #[error("it is truncated: {missing} bytes are missing")]
    Truncated {
        /// How many bytes are missing, at least.
        missing: u64,
    },
    /// The picture has more pixels than may be.
    #[error("{width} x {height} pixels are too many: at most {max_width} x {max_height} fit")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Most pixels in a row.
        max_width: u32,
        /// Most rows.
        max_height: u32,
    },
    /// The picture has no pixels.
    #[error("{width} x {height} pixels are none")]
    Empty {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// A BMP of a kind that is not known.
    #[error("BMP with {0} is not supported: 24 or 32 bits, uncompressed, are")]
    UnsupportedBmp(&'static str),
    /// A BMP compressed in some way.
    #[error("BMP compression {0} is not supported: 24 or 32 bits, uncompressed, are")]
    Compression(u32),
    /// A BMP with another number of bits per pixel.
    #[error("BMP with {0} bits per pixel is not supported: 24 and 32 are")]
    Depth(u16),
    /// A BMP whose header contradicts itself.
    #[error("the BMP is damaged: {0}")]
    DamagedBmp(&'static str),
    /// A PNG that is interlaced.
    #[error("interlaced PNG is not supported")]
    Interlaced,
    /// A PNG that cannot be decoded.
    #[error("the PNG is damaged: {0}")]
    DamagedPng(&'static str),
    /// The heap has no room for the pixels.
    #[error("no heap left to decode the picture: {bytes} bytes")]
    OutOfMemory {
        /// Bytes needed.
        bytes: u64,
    },
}

/// The largest picture that will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most pixels in a row.
    pub width: u32,
    /// Most rows.
    pub height: u32,
}

impl Limits {
    fn check(self, width: u32, height: u32) -> Result<(), Error> {
        if width == 0 || height == 0 {
            return Err(Error::Empty { width, height });
        }
        if width > self.width || height > self.height {
            return Err(Error::TooLarge { width, height, max_width: self.width, max_height: self.height });
        }
        Ok(())
    }
}

/// The order of a pixel's bytes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    /// Blue, green, red, and a byte that means nothing.
    Bgrx,
    /// Blue, green, red, opacity.
    Bgra,
    /// Red, green, blue, and a byte that means nothing.
    Rgbx,
    /// Red, green, blue, opacity.
    Rgba,
    /// Blue, green, red: 24 bits.
    Bgr,
}

impl PixelFormat {
    /// Gives the bytes of a pixel.
    pub const fn bytes(self) -> u32 {
        if matches!(self, Self::Bgr) { 3 } else { 4 }
    }
}

/// Where in a file the rows of a picture are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pixels in a row, at least 1.
    pub width: u32,
    /// Rows, at least 1.
    pub height: u32,
    /// Byte offset of the first row in the file.
    pub offset: u64,
    /// Bytes from one row in the file to the next.
    pub stride: u32,
    /// The first row in the file is the top row of the picture.
    pub top_down: bool,
    /// What a pixel is made of.
    pub format: PixelFormat,
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSpan {
    /// Byte offset in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Layout {
    /// Gives the bytes of a row that are pixels.
    pub const fn row_bytes(&self) -> u32 {
        self.width * self.format.bytes()
    }

    /// Gives the row that is shown `row` rows below the top.
    fn row(&self, row: u32) -> FileSpan {
        let place = if self.top_down { row } else { self.height - 1 - row };
        let offset = self.offset + u64::from(place) * u64::from(self.stride);
        FileSpan { offset, len: self.row_bytes().into() }
    }

    /// Gives the pieces of the file whose bytes, one after the other, are the picture's rows from top to bottom without
    /// gaps. Rows that follow each other in the file too are one piece: a top-down picture without padding is a single one.
    pub fn row_spans(&self) -> impl Iterator<Item = FileSpan> + Clone + use<> {
        let layout = *self;
        let merged = layout.top_down && layout.stride == layout.row_bytes();
        let rows = if merged { 1 } else { layout.height };
        (0..rows).map(move |row| {
            let span = layout.row(row);
            let rows = if merged { layout.height } else { 1 };
            FileSpan { len: span.len * u64::from(rows), ..span }
        })
    }

    /// Gives how many bytes the file must have.
    fn end(&self) -> u64 {
        // The padding behind the last row may be missing.
        self.offset + u64::from(self.height - 1) * u64::from(self.stride) + u64::from(self.row_bytes())
    }
}

/// A picture file that can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Picture {
    /// A BMP with 32 bits per pixel: what is in the file can be shown as it is.
    Direct(Layout),
    /// A BMP with 24 bits per pixel: to be decoded.
    Bmp24(Layout),
    /// A PNG: to be decoded.
    Png {
        /// Pixels in a row, at least 1.
        width: u32,
        /// Rows, at least 1.
        height: u32,
    },
}

impl Picture {
    /// Recognises a picture by the first [`HEAD`] bytes of its file (all of a shorter one), of `size` bytes in all.
    ///
    /// # Errors
    ///
    /// If it is not a picture, is larger than `limits`, is truncated, or of a kind that is not supported.
    pub fn recognise(head: &[u8], size: u64, limits: Limits) -> Result<Self, Error> {
        match head {
            [b'B', b'M', ..] => bmp::recognise(head, size, limits),
            [0x89, b'P', b'N', b'G', ..] => png::recognise(head, size, limits),
            _ => Err(Error::NotAPicture),
        }
    }

    /// Gives the number of pixels in a row.
    pub fn width(&self) -> u32 {
        match *self {
            Self::Direct(layout) | Self::Bmp24(layout) => layout.width,
            Self::Png { width, .. } => width,
        }
    }

    /// Gives the number of rows.
    pub fn height(&self) -> u32 {
        match *self {
            Self::Direct(layout) | Self::Bmp24(layout) => layout.height,
            Self::Png { height, .. } => height,
        }
    }

    /// Gives the name of the file's format, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Direct(_) => "32-bit BMP",
            Self::Bmp24(_) => "24-bit BMP",
            Self::Png { .. } => "PNG",
        }
    }

    /// Decodes `file`, from whose head this was recognised, to pixels of 4 bytes ([`PixelFormat::Bgrx`], the fourth byte 255),
    /// and hands each row from the top down, with its number, to `sink`. What is transparent lies on black.
    ///
    /// # Errors
    ///
    /// If the file is damaged, or the heap full. Some rows may have been handed out by then.
    pub fn decode(&self, file: &[u8], mut sink: impl FnMut(u32, &[u8])) -> Result<(), Error> {
        let bytes = u64::from(self.width()) * 4;
        let mut row = room(bytes)?;
        match self {
            Self::Direct(layout) | Self::Bmp24(layout) => bmp::decode(layout, file, &mut row, &mut sink),
            Self::Png { width, height } => png::decode(*width, *height, file, &mut row, &mut sink),
        }
    }
}

/// Gives zeroed bytes, or says that the heap is full.
fn room(bytes: u64) -> Result<Vec<u8>, Error> {
    let full = Error::OutOfMemory { bytes };
    let count = usize::try_from(bytes).map_err(|_| full)?;
    let mut room = Vec::new();
    room.try_reserve_exact(count).map_err(|_| full)?;
    room.resize(count, 0);
    Ok(room)
}

/// Makes one pixel, on black: `colour * opacity`, rounded.
fn pixel(to: &mut [u8; 4], [red, green, blue]: [u8; 3], opacity: u8) {
    let on_black = |colour: u8| {
        let product = u16::from(colour) * u16::from(opacity);
        // At most 255: 255 * 255 / 255.
        u8::try_from((product + 127) / 255).unwrap_or(u8::MAX)
    };
    *to = [on_black(blue), on_black(green), on_black(red), 255];
}
