//! The show: disk -> shared buffer -> screen, and somebody who draws into the same buffer between frames.
//!
//! Nobody here orders the painter's writing and the screen's reading: each begins an access or a job, and waits for the other's by
//! itself. What is said is only whose frame is next. So a frame is
//!
//! 1. the painter's access begins, when the screen has read the last frame;
//! 2. the screen is told to read the next, which it does when that access has ended;
//! 3. and meanwhile the painter is asked for the one after it.
//!
//! The buffer is attached to the screen once and stays where it is. The kernel stores no byte of a picture that needs no decoding.

use super::show::{decode, detach, finish, layout_bytes, put_on, read};
use super::{Failure, STEP_MILLIS, Screenshot, Source};
use crate::class::{Begun, Disk, Painted, Painter, Screen};
use crate::picture::{Layout, Picture};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, Instant, block_on, wait_until};
use core::time::Duration;
use dma::{Attachment, FromDevice, Ladder, Lent, SharedBuffer, ToDevice};

/// What is to be played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Act {
    /// Frames.
    pub frames: u32,
    /// Frames in a second, at most; as many as there can be, if none is given.
    pub rate: Option<u32>,
    /// Milliseconds for which painter or screen are waited for, each time.
    pub patience: u64,
}

impl Act {
    /// Frames of a show, if nothing else is asked for.
    pub const FRAMES: u32 = 300;
}

impl Default for Act {
    fn default() -> Self {
        Self { frames: Self::FRAMES, rate: None, patience: STEP_MILLIS }
    }
}

/// How long frames took: from one that is on the screen to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// How many.
    pub count: u32,
    /// All of them.
    pub all: Duration,
    /// The shortest.
    pub shortest: Duration,
    /// The one in the middle.
    pub median: Duration,
    /// The longest.
    pub longest: Duration,
}

/// What was moved, by whom, and who waited for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Played {
    /// Bytes that the disk wrote to memory.
    pub from_disk: u64,
    /// Transfers that the disk was asked for.
    pub transfers: usize,
    /// Bytes that the screen's device read from memory.
    pub to_screen: u64,
    /// Bytes of pixels that the kernel wrote.
    pub copied: u64,
    /// Physical runs that the buffer is made of.
    pub runs: usize,
    /// Addresses that the screen was told for it.
    pub segments: usize,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// The frames.
    pub frames: Frames,
    /// Times that the screen waited for the painter.
    pub waits: u64,
    /// How long it waited, in all.
    pub waited: Duration,
    /// What the painter says that it did.
    pub painted: Painted,
}

/// Plays `act`: brings the picture to the screen, has a painter, whom `hire` finds for the buffer, the pixels in it and the number
/// of frames, draw into it, lets `screenshot` look at the last frame, and takes everything back.
///
/// # Errors
///
/// What went wrong. The painter has ended then, and whatever was lent has been taken back, or stays lent for ever (and is counted) where
/// a device did not let go.
pub fn sharing<D: Disk, S: Screen, P: Painter>(
    disk: &D,
    screen: &S,
    source: &Source,
    act: &Act,
    hire: impl FnOnce(&SharedBuffer, &Layout, u32) -> Result<P, P::Error>,
    screenshot: &impl Screenshot,
) -> Result<Played, Failure> {
    let size = (source.picture.width(), source.picture.height());
    let mut played = Played { size, ..Played::default() };
    let (picture, layout) = load(disk, screen, source, &mut played)?;
    let loan = Arc::new(picture.attach::<ToDevice>(screen.device()).map_err(Failure::dma)?);
    played.segments = loan.segments().len();
    let shown = put_on(screen, &layout, &loan, Deadline::after_millis(STEP_MILLIS))?;
    played.to_screen += layout_bytes(&layout);
    let result = hire(&picture, &layout, act.frames).map_err(Failure::painter).and_then(|mut painter| {
        play(screen, &mut painter, &shown, &loan, act, &layout, &mut played)?;
        played.painted = painter.finish(Deadline::after_millis(act.patience)).map_err(Failure::painter)?;
        screenshot.ready(layout.width, layout.height);
        Ok(())
    });
    // However it went, the picture comes off the screen; what went wrong first matters more.
    let hidden = screen.hide(shown, Deadline::after_millis(STEP_MILLIS)).map_err(Failure::screen);
    result.and(hidden)?;
    detach(loan)?;
    Ok(played)
}

/// Has the disk fill a buffer, and finds the pixels in it.
fn load<D: Disk, S: Screen>(
    disk: &D,
    screen: &S,
    source: &Source,
    played: &mut Played,
) -> Result<(SharedBuffer, Layout), Failure> {
    let bytes = source.located.file.size.next_multiple_of(u64::from(disk.block_size()));
    let pages = disk.device().page_set(bytes, Ladder::SINGLE_PAGES).map_err(Failure::dma)?;
    (played.runs, played.from_disk) = (pages.runs().len(), bytes);
    let file = SharedBuffer::try_new("picture", pages).map_err(|rejected| Failure::dma(rejected.error))?;
    let filled = Arc::new(file.attach::<FromDevice>(disk.device()).map_err(Failure::dma)?);
    let reading = read(disk, &source.located.file.extents, &filled, bytes)?;
    played.transfers = reading.count;
    finish(reading)?;
    // Nobody gets an access while there is a device that may write.
    detach(filled)?;
    if let Picture::Direct(layout) = source.picture {
        return Ok((file, layout));
    }
    let (pixels, layout, copied) = decode(screen, source, &file)?;
    played.copied = copied;
    Ok((pixels, layout))
}

/// All frames, one after another.
fn play<S: Screen, P: Painter>(
    screen: &S,
    painter: &mut P,
    shown: &S::Shown,
    loan: &Arc<Attachment<ToDevice>>,
    act: &Act,
    layout: &Layout,
    played: &mut Played,
) -> Result<(), Failure> {
    let patience = || Deadline::after_millis(act.patience);
    let mut times = Vec::new();
    let room = times.try_reserve_exact(act.frames as usize);
    room.map_err(|_| Failure::OutOfMemory("the list of frames"))?;
    let begun = Instant::now();
    let mut last = begun;
    let mut under_way: Option<S::Refresh> = None;
    let mut finish = |work: S::Refresh| -> Result<(), Failure> {
        block_on(patience(), work).map_err(Failure::screen)?.map_err(Failure::screen)?;
        let now = Instant::now();
        times.push(now.since(last));
        last = now;
        Ok(())
    };
    for number in 0..act.frames {
        if let Some(rate) = act.rate {
            let due = u64::from(number) * 1_000_000_000 / u64::from(rate.max(1));
            let due = Instant::from_nanos(begun.as_nanos().saturating_add(due));
            // It is the time itself that is waited for.
            let _ = wait_until(Deadline::at(due), || false);
        }
        painter.draw(patience()).map_err(Failure::painter)?;
        if let Some(work) = under_way.take() {
            finish(work)?;
        }
        let Begun { work, waited } = match screen.refresh(shown, loan, patience()) {
            Ok(begun) => begun,
            // Most likely whoever draws did not come to an end.
            Err(error) => return Err(painter.trouble().map_or_else(|| Failure::screen(error), Failure::painter)),
        };
        played.waits += u64::from(waited.is_some());
        played.waited += waited.unwrap_or_default();
        under_way = Some(work);
    }
    if let Some(work) = under_way {
        finish(work)?;
    }
    // What was awaited to its end has been read.
    played.to_screen += layout_bytes(layout) * times.len() as u64;
    played.frames = frames(&mut times, begun);
    Ok(())
}

/// Sorts how long frames took, and says what there is to say about it.
fn frames(times: &mut [Duration], begun: Instant) -> Frames {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    let last = times.len().saturating_sub(1);
    Frames {
        count: times.len() as u32,
        all: begun.elapsed(),
        shortest: at(0),
        median: at(times.len() / 2),
        longest: at(last),
    }
}
