//! Pictures made with another crate are laid out and decoded pixel by pixel; damaged ones end in errors.

mod random;

use image::{DynamicImage, GrayImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use kernel::picture::{Error, FileSpan, HEAD, Layout, Limits, Picture, PixelFormat};
use random::Random;
use std::io::Cursor;

const LIMITS: Limits = Limits { width: 640, height: 480 };

fn recognise(file: &[u8]) -> Result<Picture, Error> {
    Picture::recognise(&file[..file.len().min(HEAD)], file.len() as u64, LIMITS)
}

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.into().write_to(&mut file, format).unwrap();
    file.into_inner()
}

/// A picture with structure in it.
fn colours(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7 + y) as u8, (x ^ y) as u8, (y * 11) as u8]))
}

fn bgrx(image: &RgbImage) -> Vec<u8> {
    image.pixels().flat_map(|&Rgb([red, green, blue])| [blue, green, red, 255]).collect()
}

fn decode(file: &[u8]) -> Result<Vec<u8>, Error> {
    let picture = recognise(file)?;
    let (mut pixels, mut next) = (Vec::new(), 0);
    picture.decode(file, |number, row| {
        assert_eq!((number, row.len()), (next, picture.width() as usize * 4));
        next += 1;
        pixels.extend(row);
    })?;
    assert_eq!(next, picture.height());
    Ok(pixels)
}

/// A BMP with 32 bits per pixel; `masks` follow the smallest header, or are part of a larger one.
fn bmp32(image: &RgbImage, top_down: bool, info: u32, masks: Option<[u32; 4]>) -> Vec<u8> {
    let (width, height) = image.dimensions();
    let behind = if info == 40 && masks.is_some() { 12 } else { 0 };
    let offset = 14 + info + behind;
    let signed_height = if top_down { (height as i32).wrapping_neg() } else { height as i32 };
    let mut file = b"BM".to_vec();
    let compression = if masks.is_some() { 3 } else { 0 };
    for number in [offset + width * height * 4, 0, offset, info, width, signed_height as u32, 32 << 16 | 1, compression]
    {
        file.extend(number.to_le_bytes());
    }
    file.resize(14 + 40, 0);
    file.extend(masks.unwrap_or_default().iter().flat_map(|mask| mask.to_le_bytes()));
    file.resize(offset as usize, 0);
    let rows: Vec<u32> = if top_down { (0..height).collect() } else { (0..height).rev().collect() };
    for y in rows {
        for x in 0..width {
            let Rgb([red, green, blue]) = *image.get_pixel(x, y);
            let shifted = |value: u8, mask: u32| u32::from(value) << mask.trailing_zeros();
            let [r, g, b, a] = masks.unwrap_or([0xff_0000, 0xff00, 0xff, 0]);
            let opacity = if a == 0 { 0 } else { a };
            file.extend((shifted(red, r) | shifted(green, g) | shifted(blue, b) | opacity).to_le_bytes());
        }
    }
    file
}

fn direct(file: &[u8]) -> Layout {
    match recognise(file) {
        Ok(Picture::Direct(layout)) => layout,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_32_bit_bmp_is_used_where_it_is() {
    let image = colours(13, 7);
    for (top_down, info) in [(true, 40), (false, 40), (true, 108), (false, 124)] {
        for (masks, format) in [
            (None, PixelFormat::Bgrx),
            (Some([0xff_0000, 0xff00, 0xff, 0]), PixelFormat::Bgrx),
            (Some([0xff_0000, 0xff00, 0xff, 0xff00_0000]), PixelFormat::Bgra),
            (Some([0xff, 0xff00, 0xff_0000, 0xff00_0000]), PixelFormat::Rgba),
            (Some([0xff, 0xff00, 0xff_0000, 0]), PixelFormat::Rgbx),
        ] {
            let has_opacity = masks.is_some_and(|masks| masks[3] != 0);
            if info == 40 && has_opacity {
                continue;
            }
            let file = bmp32(&image, top_down, info, masks);
            let layout = direct(&file);
            assert_eq!((layout.width, layout.height, layout.top_down, layout.format), (13, 7, top_down, format));
            // The spans, one after the other, are the picture from the top down.
            let shown: Vec<u8> = layout
                .row_spans()
                .flat_map(|FileSpan { offset, len }| file[offset as usize..(offset + len) as usize].to_vec())
                .collect();
            let rgb: Vec<[u8; 3]> = shown
                .chunks_exact(4)
                .map(|pixel| match format {
                    PixelFormat::Bgrx | PixelFormat::Bgra => [pixel[2], pixel[1], pixel[0]],
                    _ => [pixel[0], pixel[1], pixel[2]],
                })
                .collect();
            assert_eq!(rgb, image.pixels().map(|pixel| pixel.0).collect::<Vec<_>>());
            assert_eq!(layout.row_spans().count(), if top_down { 1 } else { 7 });
            assert_eq!(decode(&file), Ok(bgrx(&image)));
        }
    }
}

#[test]
fn a_24_bit_bmp_is_decoded_like_another_crate_does() {
    // All four paddings.
    for width in 1..=5 {
        let image = colours(width, 9);
        let file = encode(image.clone(), ImageFormat::Bmp);
        assert!(matches!(recognise(&file), Ok(Picture::Bmp24(_))), "{width}");
        assert_eq!(decode(&file), Ok(bgrx(&image)));
    }
}

#[test]
fn a_png_is_decoded_like_another_crate_does() {
    for (width, height) in [(1, 1), (31, 17), (640, 480)] {
        let image = colours(width, height);
        assert_eq!(decode(&encode(image.clone(), ImageFormat::Png)), Ok(bgrx(&image)));
        let grey = GrayImage::from_fn(width, height, |x, y| image::Luma([(x * y) as u8]));
        let expected = bgrx(&DynamicImage::from(grey.clone()).to_rgb8());
        assert_eq!(decode(&encode(grey, ImageFormat::Png)), Ok(expected));
        let deep = DynamicImage::from(image.clone()).to_rgb16();
        assert_eq!(decode(&encode(deep, ImageFormat::Png)), Ok(bgrx(&image)));
    }
    let clear = RgbaImage::from_fn(16, 16, |x, y| Rgba([200, 100, 50, (x * 16 + y) as u8]));
    let on_black = |colour: u32, opacity: u8| ((colour * u32::from(opacity) + 127) / 255) as u8;
    let expected: Vec<u8> = clear
        .pixels()
        .flat_map(|&Rgba([.., opacity])| [on_black(50, opacity), on_black(100, opacity), on_black(200, opacity), 255])
        .collect();
    assert_eq!(decode(&encode(clear, ImageFormat::Png)), Ok(expected));
}

#[test]
fn a_truncated_picture_says_how_many_bytes_are_missing() {
    let image = colours(10, 10);
    let file = bmp32(&image, true, 40, None);
    assert_eq!(file.len(), 454);
    assert_eq!(recognise(&file[..400]), Err(Error::Truncated { missing: 54 }));
    assert_eq!(recognise(&file[..453]), Err(Error::Truncated { missing: 1 }));
    for length in 2..file.len() {
        assert!(matches!(recognise(&file[..length]), Err(Error::Truncated { .. })), "{length}");
    }
    let png = encode(image, ImageFormat::Png);
    // Without its last chunk the picture is still whole: 12 bytes, and the checksum before it.
    for length in 4..png.len() - 16 {
        assert!(decode(&png[..length]).is_err(), "{length}");
    }
}

#[test]
fn what_is_no_picture_or_not_supported_says_so() {
    assert_eq!(recognise(b""), Err(Error::NotAPicture));
    assert_eq!(recognise(b"GIF89a"), Err(Error::NotAPicture));
    assert_eq!(recognise(&[0; 4096]), Err(Error::NotAPicture));
    let too_large = Error::TooLarge { width: 641, height: 480, max_width: 640, max_height: 480 };
    assert_eq!(recognise(&encode(colours(641, 480), ImageFormat::Png)), Err(too_large));
    assert_eq!(recognise(&bmp32(&colours(641, 480), true, 40, None)), Err(too_large));
    let good = bmp32(&colours(4, 4), true, 40, None);
    let with = |offset: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        recognise(&file)
    };
    assert_eq!(with(28, &[16, 0]), Err(Error::Depth(16)));
    assert_eq!(with(28, &[8, 0]), Err(Error::Depth(8)));
    assert_eq!(with(28, &[8, 0, 1, 0]), Err(Error::Compression(1)));
    assert_eq!(with(30, &[4, 0]), Err(Error::Compression(4)));
    assert_eq!(with(18, &[0, 0, 0, 0]), Err(Error::Empty { width: 0, height: 4 }));
    assert_eq!(with(22, &[0, 0, 0, 0]), Err(Error::Empty { width: 4, height: 0 }));
    assert!(matches!(with(18, &[0xff; 4]), Err(Error::DamagedBmp(_))));
    assert!(matches!(with(22, &[0, 0, 0, 0x80]), Err(Error::TooLarge { height: 0x8000_0000, .. })));
    assert!(matches!(with(10, &[20, 0, 0, 0]), Err(Error::DamagedBmp(_))));
    assert!(matches!(with(26, &[2, 0]), Err(Error::DamagedBmp(_))));
    let mut interlaced = encode(colours(4, 4), ImageFormat::Png);
    interlaced[28] = 1;
    repair(&mut interlaced);
    assert_eq!(recognise(&interlaced), Err(Error::Interlaced));
}

/// Puts a chunk's data in place of what the first chunk of this kind has.
fn replace_chunk(file: &[u8], kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let at = file.windows(4).position(|window| window == kind).unwrap();
    let length = u32::from_be_bytes(file[at - 4..at].try_into().unwrap()) as usize;
    let mut changed = file[..at - 4].to_vec();
    changed.extend((data.len() as u32).to_be_bytes());
    changed.extend(kind);
    changed.extend(data);
    changed.extend(&file[at + 4 + length..]);
    repair(&mut changed);
    changed
}

/// Caught: rows that the compressed data does not have, shown as they were allocated.
#[test]
fn a_png_with_too_little_or_too_much_in_it_is_refused() {
    let file = encode(colours(2, 2), ImageFormat::Png);
    // Stored, not compressed: filter and two pixels for each row.
    let with_rows = |rows: usize| {
        let data: Vec<u8> = (0..rows).flat_map(|row| [0, 1, 2, 3, 4, 5, row as u8]).collect();
        let mut zlib = vec![0x78, 0x01, 1, data.len() as u8, 0, !(data.len() as u8), 0xff];
        zlib.extend(&data);
        let (a, b) = data.iter().fold((1u32, 0u32), |(a, b), &byte| (a + u32::from(byte), a + u32::from(byte) + b));
        zlib.extend((b << 16 | a).to_be_bytes());
        decode(&replace_chunk(&file, b"IDAT", &zlib))
    };
    assert_eq!(with_rows(2), Ok(vec![3, 2, 1, 255, 0, 5, 4, 255, 3, 2, 1, 255, 1, 5, 4, 255]));
    assert_eq!(with_rows(1), Err(Error::DamagedPng("too little compressed data")));
    assert_eq!(with_rows(3), Err(Error::DamagedPng("too much compressed data")));
}

/// Makes the checksums of a PNG's chunks right.
fn repair(file: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = file.get(at..at + 4) {
        let end = at + 8 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
        if file.len() < end + 4 {
            return;
        }
        let sum = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(&file[at + 4..end]);
        file[end..end + 4].copy_from_slice(&sum.to_be_bytes());
        at = end + 4;
    }
}

#[test]
fn damaged_pictures_are_decoded_or_refused() {
    let small = colours(24, 16);
    let indexed = {
        // Made by hand: 2 bits per pixel, a palette, stored without compression.
        let mut encoder_input = Vec::new();
        for y in 0..8u8 {
            encoder_input.push(0);
            encoder_input.extend([y.wrapping_mul(37), 0x1b]);
        }
        let mut zlib = vec![0x78, 0x01, 1, encoder_input.len() as u8, 0, !(encoder_input.len() as u8), 0xff];
        zlib.extend(&encoder_input);
        let (mut a, mut b) = (1u32, 0u32);
        for &byte in &encoder_input {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        zlib.extend((b << 16 | a).to_be_bytes());
        let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
        let palette = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255];
        let ihdr = [0, 0, 0, 8, 0, 0, 0, 8, 2, 3, 0, 0, 0];
        for (kind, data) in
            [(b"IHDR", &ihdr[..]), (b"PLTE", &palette), (b"tRNS", &[255, 128]), (b"IDAT", &zlib), (b"IEND", &[])]
        {
            file.extend((data.len() as u32).to_be_bytes());
            file.extend(kind);
            file.extend(data);
            file.extend([0; 4]);
        }
        repair(&mut file);
        assert_eq!(decode(&file).map(|pixels| pixels.len()), Ok(256));
        file
    };
    let originals = [
        encode(small.clone(), ImageFormat::Png),
        encode(DynamicImage::from(small.clone()).to_rgba8(), ImageFormat::Png),
        encode(DynamicImage::from(small.clone()).to_luma_alpha16(), ImageFormat::Png),
        encode(DynamicImage::from(small.clone()).to_rgb16(), ImageFormat::Png),
        indexed,
        encode(small.clone(), ImageFormat::Bmp),
        bmp32(&small, true, 40, None),
        bmp32(&small, false, 124, Some([0xff_0000, 0xff00, 0xff, 0xff00_0000])),
    ];
    let mut random = Random(7);
    let (mut good, mut bad) = (0, 0);
    for round in 0..40_000 {
        let mut file = originals[round % originals.len()].clone();
        for _ in 0..1 + random.below(4) {
            // Headers are hit more often than their share.
            let limit = if random.below(2) == 0 { 64.min(file.len()) } else { file.len() };
            match random.below(4) {
                0 => {
                    let at = random.below(limit);
                    file[at] ^= 1 << random.below(8);
                }
                1 => {
                    let at = random.below(limit);
                    file[at] = random.next() as u8;
                }
                2 => {
                    let at = random.below(limit);
                    file.insert(at, random.next() as u8);
                }
                _ if random.below(8) == 0 => file.truncate(2 + random.below(file.len() - 2)),
                _ => {
                    let (from, to) = (random.below(limit), random.below(limit));
                    file[to] = file[from];
                }
            }
        }
        // Checksums must not be all that stands between damage and the decoder.
        if random.below(8) != 0 {
            repair(&mut file);
        }
        match decode(&file) {
            Ok(_) => good += 1,
            Err(_) => bad += 1,
        }
    }
    println!("{good} decoded, {bad} refused");
    assert!(good > 1000 && bad > 1000);
}

#[test]
fn a_picture_whose_head_and_body_disagree_is_refused() {
    let (small, large) = (encode(colours(4, 4), ImageFormat::Png), encode(colours(400, 400), ImageFormat::Png));
    let picture = recognise(&small).unwrap();
    assert!(picture.decode(&large, |_, _| ()).is_err());
    let picture = recognise(&bmp32(&colours(4, 4), true, 40, None)).unwrap();
    assert!(matches!(picture.decode(b"BM", |_, _| ()), Err(Error::Truncated { .. })));
}
