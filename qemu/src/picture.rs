//! The picture on the generated disk: a sluice gate at dusk, drawn by code.
//!
//! It has structure everywhere (gradients, edges, fine streaks), so that a row in the wrong place, a swapped channel or a
//! page from somewhere else is seen at once.

use anyhow::{Context, Result, bail};
use image::{ExtendedColorType, ImageEncoder, Rgb, RgbImage};

type Colour = [f32; 3];

const SKY_HIGH: Colour = [16.0, 24.0, 64.0];
const SKY_LOW: Colour = [250.0, 166.0, 92.0];
const SUN: Colour = [255.0, 236.0, 180.0];
const HILL_FAR: Colour = [96.0, 70.0, 104.0];
const HILL_NEAR: Colour = [46.0, 42.0, 72.0];
const WATER_FAR: Colour = [214.0, 140.0, 96.0];
const WATER_NEAR: Colour = [18.0, 40.0, 78.0];
const FOAM: Colour = [232.0, 244.0, 255.0];
const STONE: Colour = [136.0, 128.0, 126.0];
const MORTAR: Colour = [84.0, 78.0, 82.0];
const WOOD: Colour = [138.0, 84.0, 44.0];
const IRON: Colour = [44.0, 46.0, 54.0];
const BRASS: Colour = [222.0, 176.0, 84.0];
const PAPER: Colour = [255.0, 246.0, 226.0];

/// The letters of the name, five by seven dots each, a row a byte.
const LETTERS: [[u8; 7]; 6] = [
    [0b01111, 0b10000, 0b10000, 0b01110, 0b00001, 0b00001, 0b11110],
    [0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b11111],
    [0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110],
    [0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b11111],
    [0b01111, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b01111],
    [0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111],
];

/// Draws the picture, `width` by `height` pixels.
pub fn draw(width: u32, height: u32) -> RgbImage {
    /// Samples a pixel in each direction, against jagged edges.
    const FINE: u32 = 3;
    RgbImage::from_fn(width, height, |column, row| {
        let mut sum = [0.0; 3];
        for sample in 0..FINE * FINE {
            let x = (column as f32 + ((sample % FINE) as f32 + 0.5) / FINE as f32) * 640.0 / width as f32;
            let y = (row as f32 + ((sample / FINE) as f32 + 0.5) / FINE as f32) * 480.0 / height as f32;
            let colour = colour_at(x, y);
            for (total, value) in sum.iter_mut().zip(colour) {
                *total += value / (FINE * FINE) as f32;
            }
        }
        // A float cast saturates, so no value can wrap.
        Rgb(sum.map(|value| value.round() as u8))
    })
}

/// Returns the colour at a point of a 640 by 480 canvas.
fn colour_at(x: f32, y: f32) -> Colour {
    let mut colour = if y < 300.0 { sky(x, y) } else { water(x, y) };
    for (over, opacity) in [flow(x, y), gate(x, y), pillars(x, y), wheel(x, y), name(x, y)].into_iter().flatten() {
        colour = mix(colour, over, opacity);
    }
    colour
}

fn sky(x: f32, y: f32) -> Colour {
    let mut colour = mix(SKY_HIGH, SKY_LOW, (y / 290.0).powf(1.4));
    let distance = (x - 492.0).hypot(y - 196.0);
    colour = mix(colour, SUN, (1.0 - distance / 230.0).clamp(0.0, 1.0).powi(2) * 0.8);
    if distance < 44.0 {
        colour = SUN;
    }
    for number in 0..60_u32 {
        let (star_x, star_y) = ((number * 7919 % 640) as f32, (number * 104_729 % 170) as f32);
        let size = 0.6 + (number % 3) as f32 * 0.35;
        if (x - star_x).hypot(y - star_y) < size {
            colour = mix(colour, PAPER, 0.9 - star_y / 240.0);
        }
    }
    let far = 250.0 + 16.0 * (x / 61.0).sin() + 9.0 * (x / 23.0 + 1.0).sin();
    let near = 278.0 + 12.0 * (x / 83.0 + 2.0).sin() + 4.0 * (x / 17.0).sin();
    if y > near {
        HILL_NEAR
    } else if y > far {
        mix(HILL_FAR, SKY_LOW, (y - far) / 120.0)
    } else {
        colour
    }
}

fn water(x: f32, y: f32) -> Colour {
    let depth = (y - 300.0) / 180.0;
    let mut colour = mix(WATER_FAR, WATER_NEAR, depth.powf(0.6));
    let ripple = ((y - 296.0).ln() * 34.0 + 0.9 * (x / 31.0).sin() + 0.6 * (x / 11.0 + y / 7.0).sin()).sin();
    colour = mix(colour, SKY_LOW, (ripple - 0.55).max(0.0) * (1.0 - depth) * 0.9);
    // The sun's path on the water.
    let path = 14.0 + 70.0 * depth;
    if (x - 492.0).abs() < path && ripple > 0.1 {
        colour = mix(colour, SUN, 0.55 * (1.0 - depth));
    }
    colour
}

/// The water that comes through below the gate.
fn flow(x: f32, y: f32) -> Option<(Colour, f32)> {
    if y < 268.0 {
        return None;
    }
    let fall = (y - 268.0) / 212.0;
    let half = 70.0 + 92.0 * fall.powf(1.5);
    let across = (x - 320.0) / half;
    if across.abs() > 1.0 {
        return None;
    }
    let strands = (across * 26.0 + 2.0 * (fall * 9.0 + across * 3.0).sin()).sin() * 0.5 + 0.5;
    let foam = (fall * 40.0 - across * across * 9.0 + (across * 17.0).sin()).sin() * 0.5 + 0.5;
    let colour = mix([66.0, 132.0, 178.0], FOAM, strands * 0.55 + foam * 0.35 * fall);
    Some((colour, (1.0 - across.abs().powi(6)) * (1.0 - fall * 0.45)))
}

/// The wooden leaf, raised a little, with its iron bands and its screw.
fn gate(x: f32, y: f32) -> Option<(Colour, f32)> {
    if (x - 320.0).abs() < 5.0 && (60.0..170.0).contains(&y) {
        let thread = ((y + x * 0.8) * 0.9).sin() * 0.5 + 0.5;
        return Some((mix(IRON, STONE, thread), 1.0));
    }
    if (x - 320.0).abs() > 70.0 || !(160.0..272.0).contains(&y) {
        return None;
    }
    if (y - 178.0).abs() < 5.0 || (y - 254.0).abs() < 5.0 {
        let rivet = ((x - 250.0).rem_euclid(20.0) - 10.0).hypot((y - 178.0).abs().min((y - 254.0).abs())) < 2.4;
        return Some((if rivet { BRASS } else { IRON }, 1.0));
    }
    let plank = (x - 250.0).rem_euclid(20.0);
    let grain = (y / 6.0 + (x / 20.0).floor() * 2.3 + (x / 3.0).sin()).sin() * 14.0;
    let shade = if plank < 1.5 { 0.45 } else { 0.85 + plank / 90.0 };
    Some((WOOD.map(|value| (value + grain) * shade), 1.0))
}

/// The masonry: two pillars and the beam across.
fn pillars(x: f32, y: f32) -> Option<(Colour, f32)> {
    let pillar = ((x - 228.0).abs() < 24.0 || (x - 412.0).abs() < 24.0) && (118.0..372.0).contains(&y);
    let beam = (x - 320.0).abs() < 132.0 && (112.0..142.0).contains(&y);
    if !(pillar || beam) {
        return None;
    }
    let course = ((y - 112.0) / 15.0).floor();
    let brick = (x + if course.rem_euclid(2.0) < 1.0 { 0.0 } else { 15.0 }).rem_euclid(30.0);
    if (y - 112.0).rem_euclid(15.0) < 1.8 || brick < 1.8 {
        return Some((MORTAR, 1.0));
    }
    let tone =
        ((course * 12.9 + ((x + 15.0 * course.rem_euclid(2.0)) / 30.0).floor() * 78.2).sin() * 43758.5).fract() * 22.0;
    let light = 0.74 + (x - 200.0) / 600.0;
    Some((STONE.map(|value| (value + tone) * light), 1.0))
}

/// The hand wheel on top.
fn wheel(x: f32, y: f32) -> Option<(Colour, f32)> {
    let (dx, dy) = (x - 320.0, y - 72.0);
    let radius = dx.hypot(dy);
    let spoke = (dy.atan2(dx) * 3.0).sin().abs() * radius < 7.0 && radius < 40.0;
    let rim = (radius - 40.0).abs() < 4.5;
    if rim || spoke || radius < 9.0 {
        let shine = ((dx - dy) / 46.0).clamp(-1.0, 1.0) * 0.25 + 0.8;
        return Some((BRASS.map(|value| value * shine), 1.0));
    }
    None
}

/// The name, in dots, at the lower left.
fn name(x: f32, y: f32) -> Option<(Colour, f32)> {
    const DOT: f32 = 6.0;
    let (across, down) = ((x - 26.0) / DOT, (y - 414.0) / DOT);
    if !(0.0..7.0).contains(&down) || !(0.0..36.0).contains(&across) {
        return None;
    }
    // Casts are of small positive numbers.
    let (letter, column, row) = ((across / 6.0) as usize, (across % 6.0) as u32, down as usize);
    let bits = LETTERS.get(letter)?.get(row)?;
    if column > 4 || bits >> (4 - column) & 1 == 0 {
        return None;
    }
    let inside = (across.fract() - 0.5).hypot(down.fract() - 0.5) < 0.56;
    inside.then_some((PAPER, 0.92))
}

fn mix(under: Colour, over: Colour, opacity: f32) -> Colour {
    let opacity = opacity.clamp(0.0, 1.0);
    [0, 1, 2].map(|channel: usize| under[channel] + (over[channel] - under[channel]) * opacity)
}

/// In which order a BMP's rows stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// The top row first (negative height).
    TopDown,
    /// The bottom row first, as most programs write it.
    BottomUp,
}

/// Codes a picture as an uncompressed 32-bit BMP: blue, green, red and an unused byte for each pixel.
pub fn bmp32(picture: &RgbImage, rows: Rows) -> Result<Vec<u8>> {
    const HEADERS: u32 = 14 + 40;
    let (width, height) = (i32::try_from(picture.width())?, i32::try_from(picture.height())?);
    let Some(size) = picture.width().checked_mul(picture.height()).and_then(|pixels| pixels.checked_mul(4)) else {
        bail!("a picture of {width} by {height} pixels is too large for a BMP");
    };
    let mut file = Vec::new();
    file.extend_from_slice(b"BM");
    file.extend_from_slice(&(HEADERS + size).to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&HEADERS.to_le_bytes());
    file.extend_from_slice(&40_u32.to_le_bytes());
    file.extend_from_slice(&width.to_le_bytes());
    file.extend_from_slice(&if rows == Rows::TopDown { -height } else { height }.to_le_bytes());
    file.extend_from_slice(&1_u16.to_le_bytes());
    file.extend_from_slice(&32_u16.to_le_bytes());
    file.extend_from_slice(&0_u32.to_le_bytes());
    file.extend_from_slice(&size.to_le_bytes());
    file.extend_from_slice(&2835_i32.to_le_bytes());
    file.extend_from_slice(&2835_i32.to_le_bytes());
    file.extend_from_slice(&[0; 8]);
    let mut lines: Vec<Vec<u8>> =
        picture.rows().map(|row| row.flat_map(|Rgb([red, green, blue])| [*blue, *green, *red, 0]).collect()).collect();
    if rows == Rows::BottomUp {
        lines.reverse();
    }
    file.extend(lines.into_iter().flatten());
    Ok(file)
}

/// Codes a picture as a 24-bit BMP, bottom row first.
pub fn bmp24(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    image::codecs::bmp::BmpEncoder::new(&mut file)
        .write_image(picture, picture.width(), picture.height(), ExtendedColorType::Rgb8)
        .context("the picture cannot be coded as BMP")?;
    Ok(file)
}

/// Codes a picture as a PNG.
pub fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    image::codecs::png::PngEncoder::new(&mut file)
        .write_image(picture, picture.width(), picture.height(), ExtendedColorType::Rgb8)
        .context("the picture cannot be coded as PNG")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_coding_decodes_to_the_same_pixels() {
        let picture = draw(61, 43);
        let files = [
            bmp32(&picture, Rows::TopDown).unwrap(),
            bmp32(&picture, Rows::BottomUp).unwrap(),
            bmp24(&picture).unwrap(),
            png(&picture).unwrap(),
        ];
        for file in files {
            assert!(image::load_from_memory(&file).unwrap().to_rgb8() == picture);
        }
    }

    #[test]
    fn the_picture_has_structure() {
        let picture = draw(640, 480);
        let rows: HashSet<Vec<u8>> = picture.rows().map(|row| row.flat_map(|pixel| pixel.0).collect()).collect();
        assert_eq!(rows.len(), 480, "two rows are alike: a misplaced row would go unseen");
        let colours: HashSet<[u8; 3]> = picture.pixels().map(|pixel| pixel.0).collect();
        assert!(colours.len() > 20_000, "{} colours", colours.len());
        let lopsided = picture.pixels().filter(|pixel| pixel.0[0] != pixel.0[2]).count();
        assert!(lopsided > 250_000, "swapped channels would go unseen in {} pixels", 640 * 480 - lopsided);
    }
}
