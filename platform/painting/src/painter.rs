//! Balls of glass that fly across the picture and bounce off its sides.
//!
//! Each frame puts back what the balls of the last one covered, last ball first, because a ball lies over those before it; then saves
//! what each ball will cover and draws it. So the picture itself is in the buffer and in [`Painter`]'s own memory, and nowhere twice.

use crate::{Layout, PIXEL};

/// The largest radius, in pixels.
const RADIUS: u32 = 20;
/// Pixels in a row of the largest ball.
const SIDE: usize = 2 * RADIUS as usize + 1;
/// Bytes of what one ball covers, at most.
const COVERED: usize = SIDE * SIDE * PIXEL;

/// Bytes of its own memory that a painter needs, whatever the picture.
pub const KEPT: usize = BALLS.len() * COVERED;

/// One ball, in pixels a frame and pixels.
struct Ball {
    speed: (u32, u32),
    start: (u32, u32),
    colour: Colour,
}

/// Red, green, blue.
type Colour = [u8; 3];

const fn ball(speed: (u32, u32), start: (u32, u32), colour: Colour) -> Ball {
    Ball { speed, start, colour }
}

/// Speeds without common factors: it takes long until a frame comes again.
const BALLS: [Ball; 6] = [
    ball((3, 2), (40, 30), [255, 92, 76]),
    ball((5, 3), (520, 90), [255, 206, 84]),
    ball((2, 5), (300, 250), [108, 220, 130]),
    ball((7, 4), (120, 400), [84, 190, 255]),
    ball((4, 7), (610, 330), [190, 130, 255]),
    ball((6, 1), (220, 140), [255, 150, 210]),
];

/// What a ball covers: a square, in the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Square {
    x: u32,
    y: u32,
    side: u32,
}

/// Draws frames into a picture.
pub struct Painter<'a> {
    layout: Layout,
    radius: u32,
    /// What the balls of the last frame cover, in their order.
    kept: &'a mut [u8],
    /// The last frame, if there was one.
    last: Option<u32>,
}

impl<'a> Painter<'a> {
    /// A painter of a picture that lies like this in a buffer of `len` bytes, with [`KEPT`] bytes of its own. `None` where the picture is
    /// not in the buffer, or its own memory is too small.
    pub fn new(layout: Layout, len: u64, kept: &'a mut [u8]) -> Option<Self> {
        let shorter = layout.width.min(layout.height);
        let radius = RADIUS.min(shorter.saturating_sub(1) / 12);
        (layout.fits(len) && kept.len() >= KEPT).then_some(Self { layout, radius, kept, last: None })
    }

    /// Makes the buffer's `pixels` frame `number`: puts back what the last frame covered, and draws. Returns how many bytes of them it
    /// stored.
    pub fn draw(&mut self, pixels: &mut [u8], number: u32) -> u64 {
        let mut stored = self.put_back(pixels);
        for (index, ball) in BALLS.iter().enumerate() {
            let square = self.square(ball, number);
            self.save(pixels, index, square);
            stored += self.paint(pixels, ball, square);
        }
        self.last = Some(number);
        stored
    }

    /// Makes the picture what it was before the first frame. Returns how many bytes it stored.
    pub fn put_back(&mut self, pixels: &mut [u8]) -> u64 {
        let Some(last) = self.last.take() else { return 0 };
        let mut stored = 0;
        for (index, ball) in BALLS.iter().enumerate().rev() {
            let square = self.square(ball, last);
            for (row, kept) in rows(self.kept, index, square.side).enumerate() {
                let range = self.layout.pixels(square.x, square.y + row as u32, square.side);
                if let Some(place) = range.and_then(|range| pixels.get_mut(range)) {
                    place.copy_from_slice(kept);
                    stored += kept.len() as u64;
                }
            }
        }
        stored
    }

    fn save(&mut self, pixels: &[u8], index: usize, square: Square) {
        for (row, kept) in rows(self.kept, index, square.side).enumerate() {
            let range = self.layout.pixels(square.x, square.y + row as u32, square.side);
            if let Some(place) = range.and_then(|range| pixels.get(range)) {
                kept.copy_from_slice(place);
            }
        }
    }

    /// Draws a ball: the more opaque and the darker, the nearer to its edge.
    fn paint(&self, pixels: &mut [u8], ball: &Ball, square: Square) -> u64 {
        let [red, green, blue] = ball.colour;
        let colour = if self.layout.red_first { [red, green, blue] } else { [blue, green, red] };
        let middle = self.radius;
        let edge = (middle * middle).max(1);
        let mut stored = 0;
        for row in 0..square.side {
            let down = row.abs_diff(middle).pow(2);
            // The chord: so far to the left and to the right of the middle the ball goes in this row.
            let reach = (0..=middle).rev().find(|across| across * across + down <= middle * middle);
            let Some(reach) = reach else { continue };
            let range = self.layout.pixels(square.x + middle - reach, square.y + row, 2 * reach + 1);
            let Some(place) = range.and_then(|range| pixels.get_mut(range)) else { continue };
            for (across, pixel) in place.chunks_exact_mut(PIXEL).enumerate() {
                let distance = (across as u32).abs_diff(reach).pow(2) + down;
                let opacity = 96 + 144 * distance / edge;
                let light = 256 - 96 * distance / edge;
                for (under, over) in pixel.iter_mut().zip(colour) {
                    let over = u32::from(over) * light / 256;
                    *under = ((u32::from(*under) * (256 - opacity) + over * opacity) / 256) as u8;
                }
            }
            stored += place.len() as u64;
        }
        stored
    }

    /// What a ball covers in a frame.
    fn square(&self, ball: &Ball, number: u32) -> Square {
        let side = 2 * self.radius + 1;
        let x = bounce(number, ball.speed.0, ball.start.0, self.layout.width.saturating_sub(side));
        let y = bounce(number, ball.speed.1, ball.start.1, self.layout.height.saturating_sub(side));
        Square { x, y, side }
    }
}

/// The rows of what ball `index` covers, in the painter's own memory.
fn rows(kept: &mut [u8], index: usize, side: u32) -> impl Iterator<Item = &mut [u8]> {
    let own = kept.chunks_exact_mut(COVERED).nth(index).unwrap_or_default();
    own.chunks_exact_mut((side as usize * PIXEL).max(1)).take(side as usize)
}

/// Where something is that goes to and fro between 0 and `span`.
fn bounce(number: u32, speed: u32, start: u32, span: u32) -> u32 {
    if span == 0 {
        return 0;
    }
    let (span, way) = (u64::from(span), u64::from(number) * u64::from(speed) + u64::from(start));
    let place = way % (2 * span);
    // At most `span`, which was a u32.
    if place <= span { place as u32 } else { (2 * span - place) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PICTURE: Layout =
        Layout { width: 160, height: 120, offset: 54, stride: 640, bottom_up: false, red_first: false };

    fn buffer(layout: &Layout) -> Vec<u8> {
        let len = layout.offset as usize + layout.stride as usize * layout.height as usize;
        (0..len).map(|index| (index * 7 + index / 253) as u8).collect()
    }

    /// Frame `number` alone.
    fn frame(layout: Layout, number: u32) -> Vec<u8> {
        let (mut pixels, mut kept) = (buffer(&layout), vec![0; KEPT]);
        Painter::new(layout, pixels.len() as u64, &mut kept).unwrap().draw(&mut pixels, number);
        pixels
    }

    /// Red when what was covered is not put back, or in the order in which it was saved.
    #[test]
    fn a_frame_is_the_same_whatever_was_drawn_before() {
        for layout in [PICTURE, Layout { bottom_up: true, stride: 700, ..PICTURE }] {
            let (mut pixels, mut kept) = (buffer(&layout), vec![0xaa; KEPT]);
            let len = pixels.len() as u64;
            let mut painter = Painter::new(layout, len, &mut kept).unwrap();
            let mut stored = 0;
            for number in 1..=300 {
                stored += painter.draw(&mut pixels, number);
                if number % 50 == 0 {
                    assert!(pixels == frame(layout, number), "frame {number}");
                }
            }
            assert!(stored > 300 * 6 * 100, "{stored}");
            assert!(pixels != buffer(&layout));
            painter.put_back(&mut pixels);
            assert!(pixels == buffer(&layout));
        }
    }

    #[test]
    fn a_ball_is_where_it_should_be_and_in_its_colour() {
        let layout = Layout { width: 640, height: 480, stride: 2560, ..PICTURE };
        let mut pixels = vec![0; buffer(&layout).len()];
        let mut kept = vec![0; KEPT];
        Painter::new(layout, pixels.len() as u64, &mut kept).unwrap().draw(&mut pixels, 10);
        // The first: from (40, 30), 10 frames by (3, 2), and its middle 20 further.
        let middle = layout.pixels(90, 70, 1).unwrap();
        assert_eq!(pixels[middle], [28, 34, 95, 0]);
        // Outside of the circle, inside of the square.
        assert_eq!(pixels[layout.pixels(70, 50, 1).unwrap()], [0; 4]);
    }

    #[test]
    fn the_order_of_bytes_and_rows_is_the_only_difference_between_layouts() {
        let other = Layout { red_first: true, bottom_up: true, stride: 644, offset: 0, ..PICTURE };
        let (mut one, mut two) = (vec![9; 54 + 640 * 120], vec![9; 644 * 120]);
        let mut kept = vec![0; KEPT];
        Painter::new(PICTURE, one.len() as u64, &mut kept).unwrap().draw(&mut one, 77);
        Painter::new(other, two.len() as u64, &mut kept).unwrap().draw(&mut two, 77);
        for y in 0..PICTURE.height {
            for x in 0..PICTURE.width {
                let one = &one[PICTURE.pixels(x, y, 1).unwrap()];
                let two = &two[other.pixels(x, y, 1).unwrap()];
                assert_eq!([one[2], one[1], one[0], one[3]], [two[0], two[1], two[2], two[3]], "{x} {y}");
            }
        }
        let gaps = (0..120).any(|row| two[row * 644 + 640..row * 644 + 644] != [9; 4]);
        assert!(!gaps && one[..54] == [9; 54]);
    }

    #[test]
    fn no_picture_is_too_small_or_too_odd() {
        for width in 1..40 {
            for height in (1..40).chain([1000]) {
                let layout = Layout { width, height, stride: width * 4, ..PICTURE };
                let (mut pixels, mut kept) = (buffer(&layout), vec![0; KEPT]);
                let whole = pixels.clone();
                let mut painter = Painter::new(layout, pixels.len() as u64, &mut kept).unwrap();
                for number in [0, 1, 2, 77, u32::MAX] {
                    assert!(painter.draw(&mut pixels, number) > 0);
                }
                assert!(pixels != whole, "{width} x {height}");
                painter.put_back(&mut pixels);
                assert!(pixels == whole, "{width} x {height}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let len = buffer(&PICTURE).len() as u64;
        let refused = |layout, len, own: usize| Painter::new(layout, len, &mut vec![0; own]).is_none();
        assert!(!refused(PICTURE, len, KEPT));
        assert!(refused(PICTURE, len - 1, KEPT));
        assert!(refused(PICTURE, len, KEPT - 1));
        assert!(refused(Layout { width: 0, ..PICTURE }, len, KEPT));
        assert!(refused(Layout { height: 0, ..PICTURE }, len, KEPT));
        assert!(refused(Layout { offset: u64::MAX, ..PICTURE }, len, KEPT));
        assert!(refused(Layout { stride: 639, ..PICTURE }, len, KEPT));
        assert!(refused(Layout { stride: u32::MAX, height: u32::MAX, ..PICTURE }, len, KEPT));
        // A buffer that is not the promised one: nothing happens.
        let mut kept = vec![0; KEPT];
        let mut painter = Painter::new(PICTURE, len, &mut kept).unwrap();
        assert_eq!(painter.draw(&mut [], 1), 0);
    }
}
