//! The show: what must be on the screen after its last frame.
//!
//! The kernel's painter and this module draw by the same source (`painting`); what the screen shows has come another way: by the disk,
//! through memory that a process and the display had at the same time.

use crate::cli::DemoOptions;
use crate::{disk, picture};
use anyhow::{Context, Result, bail};
use image::{Rgb, RgbImage};
use painting::{KEPT, Layout, Painter};
use std::path::Path;

/// Shows by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    /// A process draws into the picture between frames, in the very memory that the disk has filled and the display reads
    Sharing,
}

/// Frames of a show, unless the kernel's command line says otherwise.
pub const FRAMES: u32 = kernel::demo::Act::FRAMES;
/// Frames in a second when somebody watches.
pub const RATE: u32 = 60;

/// The words with which the kernel plays this show, `watched` or as fast as it can.
pub fn words(name: Name, watched: bool) -> Vec<String> {
    let Name::Sharing = name;
    let mut words = vec!["show=sharing".to_string()];
    if watched {
        words.push(format!("show.rate={RATE}"));
    }
    words
}

/// The picture with frame `number` drawn over it; the picture itself for 0.
///
/// # Errors
///
/// For a picture that is too large to be drawn into.
pub fn frame(picture: &RgbImage, number: u32) -> Result<RgbImage> {
    let (width, height) = picture.dimensions();
    let Some(stride) = width.checked_mul(4).filter(|_| width != 0 && height != 0) else {
        bail!("{width} x {height} pixels cannot be drawn into");
    };
    let layout = Layout { width, height, offset: 0, stride, bottom_up: false, red_first: true };
    let mut pixels: Vec<u8> = picture.pixels().flat_map(|Rgb([red, green, blue])| [*red, *green, *blue, 0]).collect();
    let mut kept = vec![0; KEPT];
    let painter = Painter::new(layout, pixels.len() as u64, &mut kept);
    let mut painter = painter.with_context(|| format!("{width} x {height} pixels cannot be drawn into"))?;
    if number != 0 {
        painter.draw(&mut pixels, number);
    }
    let colours = pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    RgbImage::from_raw(width, height, colours).context("as many pixels as before")
}

/// The last frame of the show that the options describe, and its number. `None` where only the user knows the picture.
///
/// # Errors
///
/// As [`frame`].
pub fn last(options: &DemoOptions) -> Result<Option<(RgbImage, u32)>> {
    let ours = [disk::PICTURE, disk::PICTURE_BOTTOM_UP, disk::PICTURE_24, disk::PICTURE_PNG];
    let words = || options.append.iter().flat_map(|more| more.split_whitespace());
    let known = options.picture.as_deref().is_none_or(|path| ours.contains(&path));
    if options.show.is_none() || options.disk.is_some() || !known || words().any(|word| word.starts_with("picture=")) {
        return Ok(None);
    }
    let frames = words().filter_map(|word| word.strip_prefix("show.frames=")).next_back();
    let Ok(number) = frames.map_or(Ok(FRAMES), str::parse) else { return Ok(None) };
    let (width, height) = disk::PICTURE_SIZE;
    Ok(Some((frame(&picture::draw(width, height), number)?, number)))
}

/// Compares what the screen shows, a PNG file, with what it must show. Says how many pixels differ.
///
/// # Errors
///
/// If the file cannot be read, or has another size.
pub fn compare(screen: &Path, expected: &RgbImage) -> Result<usize> {
    let screen = image::open(screen).context("the screenshot cannot be read")?.to_rgb8();
    if screen.dimensions() != expected.dimensions() {
        bail!("the screen shows {:?} pixels, not {:?}", screen.dimensions(), expected.dimensions());
    }
    Ok(screen.pixels().zip(expected.pixels()).filter(|(shown, wanted)| shown != wanted).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn options(arguments: &[&str]) -> DemoOptions {
        let cli = Cli::try_parse_from([&["x", "demo"], arguments].concat()).unwrap();
        let Some(Command::Demo(options)) = cli.command else { panic!("demo was not recognised") };
        options
    }

    #[test]
    fn what_is_expected_is_the_last_frame_of_a_picture_of_ours() {
        let picture = picture::draw(640, 480);
        let last = |arguments: &[&str]| last(&options(arguments)).unwrap();
        let (image, number) = last(&["--show", "sharing"]).unwrap();
        assert!(number == 300 && image == frame(&picture, 300).unwrap() && image != picture);
        assert!(last(&["--show", "sharing", "--append", "show.frames=7 log=debug"]).unwrap().1 == 7);
        assert!(last(&["--show", "sharing", "--picture", disk::PICTURE_PNG]).is_some());
        assert!(last(&[]).is_none());
        for unknown in
            [&["--disk", "x"], &["--picture", "/x"], &["--append", "picture=/x"], &["--append", "show.frames=x"]]
        {
            assert!(last(&[&["--show", "sharing"], &unknown[..]].concat()).is_none(), "{unknown:?}");
        }
        assert!(frame(&picture, 0).unwrap() == picture);
        assert!(frame(&RgbImage::new(0, 3), 1).is_err());
    }

    #[test]
    fn a_screen_that_shows_something_else_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("screen.png");
        let picture = picture::draw(64, 48);
        let mut other = picture.clone();
        other.put_pixel(3, 4, Rgb([1, 2, 3]));
        other.put_pixel(63, 47, Rgb([1, 2, 3]));
        other.save(&file).unwrap();
        assert_eq!(compare(&file, &picture).unwrap(), 2);
        assert_eq!(compare(&file, &other).unwrap(), 0);
        assert!(compare(&file, &RgbImage::new(64, 47)).is_err());
        assert!(compare(Path::new("/nowhere"), &picture).is_err());
    }
}
