//! PNG files: chunks and filters; the compression is left to `miniz_oxide`. Not interlaced ones.
//!
//! W3C Portable Network Graphics (Third Edition), chapters 5, 7, 9 and 11.

use super::{Error, Limits, Picture, pixel, room};
use alloc::boxed::Box;
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

static CHECKSUM: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
const SIGNATURE: &[u8; 8] = b"\x89PNG\r\n\x1a\n";
/// Signature, and the first chunk: length, type, 13 bytes, checksum.
const HEADER: u64 = 8 + 8 + 13 + 4;

/// What the header chunk says.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header {
    width: u32,
    height: u32,
    /// Bits of a sample.
    depth: u8,
    colour: Colour,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Colour {
    Grey,
    Rgb,
    Indexed,
    GreyOpacity,
    Rgba,
}

impl Header {
    fn read(file: &[u8], size: u64) -> Result<Self, Error> {
        if file.get(..8).is_some_and(|signature| signature != SIGNATURE) {
            return Err(Error::NotAPicture);
        }
        let Some(chunk) = file.get(8..HEADER as usize) else {
            return Err(Error::Truncated { missing: HEADER.saturating_sub(size).max(1) });
        };
        let &[0, 0, 0, 13, b'I', b'H', b'D', b'R', w0, w1, w2, w3, h0, h1, h2, h3, depth, colour, 0, 0, interlace, ..] =
            chunk
        else {
            return Err(Error::DamagedPng("it does not begin with a header that is known"));
        };
        let colour = match (colour, depth) {
            (0, 1 | 2 | 4 | 8 | 16) => Colour::Grey,
            (2, 8 | 16) => Colour::Rgb,
            (3, 1 | 2 | 4 | 8) => Colour::Indexed,
            (4, 8 | 16) => Colour::GreyOpacity,
            (6, 8 | 16) => Colour::Rgba,
            _ => return Err(Error::DamagedPng("no picture has such pixels")),
        };
        match interlace {
            0 => {}
            1 => return Err(Error::Interlaced),
            _ => return Err(Error::DamagedPng("no picture is interlaced like that")),
        }
        let (width, height) = (u32::from_be_bytes([w0, w1, w2, w3]), u32::from_be_bytes([h0, h1, h2, h3]));
        Ok(Self { width, height, depth, colour })
    }

    fn channels(self) -> u64 {
        match self.colour {
            Colour::Grey | Colour::Indexed => 1,
            Colour::GreyOpacity => 2,
            Colour::Rgb => 3,
            Colour::Rgba => 4,
        }
    }

    /// Bits of a pixel.
    fn bits(self) -> u64 {
        self.channels() * u64::from(self.depth)
    }

    /// Bytes of a row, without the filter's number in front.
    fn row_bytes(self) -> u64 {
        (u64::from(self.width) * self.bits()).div_ceil(8)
    }
}

/// Colours and opacities of an indexed picture, or the colour that is transparent.
struct Palette {
    colours: [[u8; 4]; 256],
    count: usize,
    transparent: Option<[u16; 3]>,
}

/// Reads a PNG's header.
pub(super) fn recognise(head: &[u8], size: u64, limits: Limits) -> Result<Picture, Error> {
    let Header { width, height, .. } = Header::read(head, size)?;
    limits.check(width, height)?;
    Ok(Picture::Png { width, height })
}

/// Decodes all, then hands out the rows.
pub(super) fn decode(
    width: u32,
    height: u32,
    file: &[u8],
    row: &mut [u8],
    sink: &mut impl FnMut(u32, &[u8]),
) -> Result<(), Error> {
    let header = Header::read(file, file.len() as u64)?;
    if (header.width, header.height) != (width, height) {
        return Err(Error::DamagedPng("it is not the file whose head was recognised"));
    }
    let stride = header.row_bytes() + 1;
    let mut data = room(stride.checked_mul(height.into()).ok_or(Error::OutOfMemory { bytes: u64::MAX })?)?;
    let palette = inflate(&header, file, &mut data)?;

    let step = usize::try_from(header.bits().div_ceil(8)).unwrap_or(8);
    let (mut above, mut rest): (&[u8], &mut [u8]) = (&[], &mut data);
    for number in 0..height {
        let split = rest.split_at_mut_checked(stride as usize);
        let Some(((filter, here), below)) = split.and_then(|(row, rest)| Some((row.split_first_mut()?, rest))) else {
            return Err(Error::DamagedPng("too little compressed data"));
        };
        unfilter(*filter, step, above, here)?;
        expand(&header, &palette, here, row)?;
        sink(number, row);
        (above, rest) = (here, below);
    }
    Ok(())
}

/// Walks the chunks, and decompresses what is in the IDATs until `to` is full.
fn inflate(header: &Header, file: &[u8], to: &mut [u8]) -> Result<Palette, Error> {
    let flags = inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER
        | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF
        | inflate_flags::TINFL_FLAG_COMPUTE_ADLER32;
    let mut state = Box::<DecompressorOxide>::default();
    let mut palette = Palette { colours: [[0, 0, 0, 255]; 256], count: 0, transparent: None };
    let (mut filled, mut done) = (0, false);
    let mut rest = file.get(HEADER as usize..).unwrap_or_default();
    while !done {
        let (kind, data, tail) = chunk(rest)?;
        rest = tail;
        match kind {
            b"PLTE" if header.colour == Colour::Indexed => {
                let (entries, odd) = data.as_chunks::<3>();
                if entries.len() > 256 || !odd.is_empty() {
                    return Err(Error::DamagedPng("bad palette"));
                }
                for (colour, &[red, green, blue]) in palette.colours.iter_mut().zip(entries) {
                    *colour = [red, green, blue, 255];
                }
                palette.count = entries.len();
            }
            b"tRNS" => transparency(header, data, &mut palette)?,
            b"IDAT" => {
                let more = flags | inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
                let (status, _, written) = decompress(&mut state, data, to, filled, more);
                filled += written;
                done = match status {
                    TINFLStatus::Done => true,
                    TINFLStatus::NeedsMoreInput => false,
                    TINFLStatus::HasMoreOutput => return Err(Error::DamagedPng("too much compressed data")),
                    TINFLStatus::Adler32Mismatch => return Err(Error::DamagedPng("bad checksum")),
                    _ => return Err(Error::DamagedPng("bad compressed data")),
                };
            }
            b"IEND" => return Err(Error::DamagedPng("too little compressed data")),
            b"PLTE" => {}
            // The fifth bit of the first letter says that others may leave the chunk alone.
            &[first, ..] if first & 0x20 != 0 => {}
            _ => return Err(Error::DamagedPng("unknown critical chunk")),
        }
    }
    if filled != to.len() {
        return Err(Error::DamagedPng("too little compressed data"));
    }
    if header.colour == Colour::Indexed && palette.count == 0 {
        return Err(Error::DamagedPng("no palette"));
    }
    Ok(palette)
}

/// A chunk's type, its data, and what follows it.
type Chunk<'a> = (&'a [u8; 4], &'a [u8], &'a [u8]);

/// Takes a chunk off the front.
fn chunk(file: &[u8]) -> Result<Chunk<'_>, Error> {
    let missing = |needed: u64| Error::Truncated { missing: needed.saturating_sub(file.len() as u64).max(1) };
    let (length, body) = file.split_first_chunk::<4>().ok_or(missing(12))?;
    let length = u32::from_be_bytes(*length);
    let needed = u64::from(length) + 12;
    let (covered, tail) = body.split_at_checked(length as usize + 4).ok_or(missing(needed))?;
    let (sum, tail) = tail.split_first_chunk::<4>().ok_or(missing(needed))?;
    if CHECKSUM.checksum(covered) != u32::from_be_bytes(*sum) {
        return Err(Error::DamagedPng("bad checksum of a chunk"));
    }
    let (kind, data) = covered.split_first_chunk::<4>().ok_or(missing(needed))?;
    Ok((kind, data, tail))
}

fn transparency(header: &Header, data: &[u8], palette: &mut Palette) -> Result<(), Error> {
    match (header.colour, data) {
        (Colour::Indexed, data) if data.len() <= palette.count => {
            for ([.., opacity], &value) in palette.colours.iter_mut().zip(data) {
                *opacity = value;
            }
        }
        (Colour::Grey, &[high, low]) => palette.transparent = Some([u16::from_be_bytes([high, low]); 3]),
        (Colour::Rgb, &[r0, r1, g0, g1, b0, b1]) => {
            palette.transparent = Some([[r0, r1], [g0, g1], [b0, b1]].map(u16::from_be_bytes));
        }
        _ => return Err(Error::DamagedPng("bad transparency")),
    }
    Ok(())
}

/// Undoes the filter of a row. `step` is the bytes of a pixel, at least 1; `above` is empty for the first row.
fn unfilter(filter: u8, step: usize, above: &[u8], here: &mut [u8]) -> Result<(), Error> {
    if filter > 4 {
        return Err(Error::DamagedPng("bad filter"));
    }
    for at in 0..here.len() {
        let left_of = |row: &[u8]| at.checked_sub(step).and_then(|left| row.get(left)).copied().unwrap_or(0);
        let (left, corner) = (left_of(here), left_of(above));
        let up = above.get(at).copied().unwrap_or(0);
        let prediction = match filter {
            1 => left,
            2 => up,
            3 => left.midpoint(up),
            4 => paeth(left, up, corner),
            _ => 0,
        };
        if let Some(byte) = here.get_mut(at) {
            *byte = byte.wrapping_add(prediction);
        }
    }
    Ok(())
}

fn paeth(left: u8, up: u8, corner: u8) -> u8 {
    let estimate = i16::from(left) + i16::from(up) - i16::from(corner);
    let distance = |value: u8| (estimate - i16::from(value)).unsigned_abs();
    if distance(left) <= distance(up) && distance(left) <= distance(corner) {
        left
    } else if distance(up) <= distance(corner) {
        up
    } else {
        corner
    }
}

/// Makes pixels of 32 bits out of a row.
fn expand(header: &Header, palette: &Palette, from: &[u8], to: &mut [u8]) -> Result<(), Error> {
    let (to, _) = to.as_chunks_mut::<4>();
    let channels = header.channels() as usize;
    let short = Error::DamagedPng("too little compressed data");
    for (index, to) in to.iter_mut().enumerate() {
        let sample = |channel: usize| sample(from, header.depth, index * channels + channel).ok_or(short);
        // A sample of 16 bits loses its lower ones; one of less than 8 is spread.
        let byte = |value: u16| match header.depth {
            16 => value.to_be_bytes()[0],
            8 => value.to_le_bytes()[0],
            depth => u8::try_from(value * 255 / ((1 << depth) - 1)).unwrap_or(u8::MAX),
        };
        let (colour, opacity) = match header.colour {
            Colour::Grey => ([sample(0)?; 3], None),
            Colour::GreyOpacity => ([sample(0)?; 3], Some(sample(1)?)),
            Colour::Rgb => ([sample(0)?, sample(1)?, sample(2)?], None),
            Colour::Rgba => ([sample(0)?, sample(1)?, sample(2)?], Some(sample(3)?)),
            Colour::Indexed => {
                let entries = palette.colours.get(..palette.count).unwrap_or_default();
                let entry = entries.get(usize::from(sample(0)?));
                let &[red, green, blue, opacity] = entry.ok_or(Error::DamagedPng("a pixel is not in the palette"))?;
                pixel(to, [red, green, blue], opacity);
                continue;
            }
        };
        let opacity = match opacity {
            Some(opacity) => byte(opacity),
            None if palette.transparent == Some(colour) => 0,
            None => 255,
        };
        pixel(to, colour.map(byte), opacity);
    }
    Ok(())
}

/// Gives a sample of `depth` bits: 1, 2, 4, 8 or 16.
fn sample(row: &[u8], depth: u8, index: usize) -> Option<u16> {
    match depth {
        16 => {
            let start = index.checked_mul(2)?;
            Some(u16::from_be_bytes([*row.get(start)?, *row.get(start + 1)?]))
        }
        8 => row.get(index).copied().map(u16::from),
        _ => {
            let per_byte = usize::from(8 / depth);
            let byte = row.get(index / per_byte)?;
            // The leftmost pixel is in the highest bits.
            let shift = usize::from(depth) * (per_byte - 1 - index % per_byte);
            Some(u16::from(byte >> shift & ((1 << depth) - 1)))
        }
    }
}
