//! BMP files with 24 or 32 bits per pixel.
//!
//! Only the header is of interest: the pixels are used where they are. (`BITMAPINFOHEADER` to `BITMAPV5HEADER` of Windows GDI.)

use super::{Error, Layout, Limits, Picture, PixelFormat, pixel};

const FILE_HEADER: usize = 14;
const BI_RGB: u32 = 0;
const BI_BITFIELDS: u32 = 3;
const BI_ALPHABITFIELDS: u32 = 6;

/// Little-endian numbers of a header; what lies behind its end is missing from the file.
struct Fields<'a> {
    head: &'a [u8],
    size: u64,
}

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> Result<[u8; N], Error> {
        let end = offset + N;
        let missing = Error::Truncated { missing: (end as u64).saturating_sub(self.size).max(1) };
        self.head.get(offset..end).and_then(|bytes| bytes.try_into().ok()).ok_or(missing)
    }

    fn u16(&self, offset: usize) -> Result<u16, Error> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32, Error> {
        self.bytes(offset).map(u32::from_le_bytes)
    }
}

/// Reads a BMP's headers.
pub(super) fn recognise(head: &[u8], size: u64, limits: Limits) -> Result<Picture, Error> {
    let fields = Fields { head, size };
    let (offset, info) = (fields.u32(10)?, fields.u32(FILE_HEADER)?);
    if !matches!(info, 40 | 52 | 56 | 64 | 108 | 124) {
        return Err(match info {
            12 | 16 => Error::UnsupportedBmp("an OS/2 header"),
            _ => Error::DamagedBmp("its header has a size that no header has"),
        });
    }
    let (width, height) = (fields.u32(18)?.cast_signed(), fields.u32(22)?.cast_signed());
    let (planes, depth, compression) = (fields.u16(26)?, fields.u16(28)?, fields.u32(30)?);
    let width = u32::try_from(width).map_err(|_| Error::DamagedBmp("its width is negative"))?;
    limits.check(width, height.unsigned_abs())?;
    if planes != 1 {
        return Err(Error::DamagedBmp("it does not have one plane"));
    }
    let masks_behind = info == 40;
    let mut header_end = FILE_HEADER as u64 + u64::from(info);
    let format = match (depth, compression) {
        (24, BI_RGB) => PixelFormat::Bgr,
        (32, BI_RGB) => PixelFormat::Bgrx,
        (32, BI_BITFIELDS | BI_ALPHABITFIELDS) => {
            // The masks are part of larger headers, and follow the smallest one.
            let at = FILE_HEADER + 40;
            let masks = [fields.u32(at)?, fields.u32(at + 4)?, fields.u32(at + 8)?];
            let has_opacity = if masks_behind { compression == BI_ALPHABITFIELDS } else { info >= 56 && info != 64 };
            let opacity = if has_opacity { fields.u32(at + 12)? } else { 0 };
            if masks_behind {
                header_end += if has_opacity { 16 } else { 12 };
            }
            match (masks, opacity) {
                ([0xff_0000, 0xff00, 0xff], 0) => PixelFormat::Bgrx,
                ([0xff_0000, 0xff00, 0xff], 0xff00_0000) => PixelFormat::Bgra,
                ([0xff, 0xff00, 0xff_0000], 0) => PixelFormat::Rgbx,
                ([0xff, 0xff00, 0xff_0000], 0xff00_0000) => PixelFormat::Rgba,
                _ => return Err(Error::UnsupportedBmp("unusual colour masks")),
            }
        }
        (1 | 4 | 8 | 16 | 24, BI_RGB | BI_BITFIELDS) => return Err(Error::Depth(depth)),
        (1 | 4 | 8 | 16 | 24 | 32 | 0, _) => return Err(Error::Compression(compression)),
        _ => return Err(Error::DamagedBmp("no picture has that many bits per pixel")),
    };
    if u64::from(offset) < header_end {
        return Err(Error::DamagedBmp("its pixels begin inside its header"));
    }
    let row = u64::from(width) * u64::from(format.bytes());
    let stride = u32::try_from(row.next_multiple_of(4)).map_err(|_| Error::DamagedBmp("its rows are too long"))?;
    let height_rows = height.unsigned_abs();
    let layout = Layout { width, height: height_rows, offset: offset.into(), stride, top_down: height < 0, format };
    match layout.end().checked_sub(size) {
        Some(missing @ 1..) => Err(Error::Truncated { missing }),
        _ if format == PixelFormat::Bgr => Ok(Picture::Bmp24(layout)),
        _ => Ok(Picture::Direct(layout)),
    }
}

/// Copies the rows from the top down, made 32 bits wide.
pub(super) fn decode(
    layout: &Layout,
    file: &[u8],
    row: &mut [u8],
    sink: &mut impl FnMut(u32, &[u8]),
) -> Result<(), Error> {
    let size = layout.format.bytes() as usize;
    for number in 0..layout.height {
        let span = layout.row(number);
        let missing = Error::Truncated { missing: (span.offset + span.len).saturating_sub(file.len() as u64).max(1) };
        let start = usize::try_from(span.offset).map_err(|_| missing)?;
        let end = start.checked_add(layout.row_bytes() as usize).ok_or(missing)?;
        let from = file.get(start..end).ok_or(missing)?;
        let (to, _) = row.as_chunks_mut::<4>();
        for (to, from) in to.iter_mut().zip(from.chunks_exact(size)) {
            match (layout.format, from) {
                (PixelFormat::Bgr, &[blue, green, red]) | (PixelFormat::Bgrx, &[blue, green, red, _]) => {
                    *to = [blue, green, red, 255];
                }
                (PixelFormat::Rgbx, &[red, green, blue, _]) => *to = [blue, green, red, 255],
                (PixelFormat::Bgra, &[blue, green, red, opacity])
                | (PixelFormat::Rgba, &[red, green, blue, opacity]) => {
                    pixel(to, [red, green, blue], opacity);
                }
                _ => {}
            }
        }
        sink(number, row);
    }
    Ok(())
}
