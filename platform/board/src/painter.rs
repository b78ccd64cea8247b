//! Who draws in the show: a process.
//!
//! It has the picture as a shared buffer, a page through which it is told what to draw and says what it did (`painting::Report`), and
//! two events: the kernel raises the one for each frame, the process the other when its access to the picture has begun. It runs on
//! another core if there is one that has nothing to do; else on this one, in turns, from one frame to the end of its access.
//!
//! # Locking
//!
//! What goes to another core, and comes back, goes through one lock, a leaf.

use crate::Error;
use crate::processes::{End, Killer, UserProcess};
use alloc::sync::Arc;
use base::{Deadline, IrqMutex, wait_until};
use core::mem;
use core::time::Duration;
use dma::{CpuReads, CpuWrites, Device, Ladder, SharedBuffer};
use kernel::class::{Painted, Painter};
use kernel::picture::{Layout, PixelFormat};
use painting::{Orders, Report};
use process::{Event, Quota};

/// Milliseconds that a process may take to be ended.
const END_MILLIS: u64 = 5_000;
/// Milliseconds after which a painter is at its end, whatever it is doing: whoever watches has gone home.
const LIFE_MILLIS: u64 = 24 * 60 * 60 * 1000;

/// What an image has for the show.
#[derive(Clone, Copy, Debug)]
pub struct Company {
    /// The program that draws: an ELF.
    pub program: &'static [u8],
    /// Its arguments.
    pub arguments: [u64; 3],
    /// Gives another core, if there is one that has nothing to do, this to run. Says whether it did.
    pub elsewhere: fn(fn(usize)) -> bool,
}

/// Why a painter does not paint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PainterError {
    /// It could not be started.
    #[error("{0}")]
    Start(Error),
    /// What it is to have cannot be shared with it.
    #[error("{0}")]
    Process(process::Error),
    /// The page for its orders.
    #[error("{0}")]
    Dma(dma::Error),
    /// Another process is on the way to another core.
    #[error("there is another one already")]
    Taken,
    /// It has come to its end.
    #[error("it {end} in frame {frame}")]
    Ended {
        /// The frame that it was to draw.
        frame: u32,
        /// How.
        end: End,
    },
    /// It does nothing.
    #[error("it has not begun frame {0} in time")]
    Idle(u32),
    /// It draws, and does not come to an end.
    #[error("it has not finished drawing frame {0} in time")]
    Endless(u32),
    /// It does not end.
    #[error("it does not end after its last frame")]
    Lingers,
    /// It has not done what it was told.
    #[error("it says that it drew {0} frames of {1}")]
    Short(u64, u32),
}

/// A process on its way to another core, there, or on its way back.
#[expect(clippy::large_enum_variant, reason = "there is one, and a box is memory that may run out")]
enum Guest {
    Nobody,
    Coming(UserProcess),
    There,
    Back(End),
}

static GUEST: IrqMutex<Guest> = IrqMutex::new(Guest::Nobody);

/// Runs the guest on this core.
fn host(_core: usize) {
    let process = {
        let mut guest = GUEST.lock();
        match mem::replace(&mut *guest, Guest::There) {
            Guest::Coming(process) => process,
            other => {
                *guest = other;
                return;
            }
        }
    };
    let end = process.run(Deadline::after_millis(LIFE_MILLIS));
    *GUEST.lock() = Guest::Back(end);
    base::notify();
}

fn is_back() -> bool {
    matches!(*GUEST.lock(), Guest::Back(_))
}

/// Where the process is.
#[expect(clippy::large_enum_variant, reason = "there is one, and a box is memory that may run out")]
enum Place {
    Here(UserProcess),
    Elsewhere,
    Gone(End),
}

/// A process that draws.
pub struct ProcessPainter {
    place: Place,
    killer: Killer,
    go: Arc<Event>,
    at_it: Arc<Event>,
    picture: SharedBuffer,
    page: SharedBuffer,
    frames: u32,
    /// The frame that it was told to draw last, from 1.
    frame: u32,
}

impl ProcessPainter {
    /// Starts a process that is to draw `frames` frames into `picture`, whose pixels lie like `layout`. Its page comes from the memory
    /// of `device`. What is put by for it has the numbers 0 (the picture) and 1 (the page), 0 (go) and 1 (at it).
    ///
    /// # Errors
    ///
    /// [`PainterError`].
    pub fn hire(
        company: &Company,
        device: &Device,
        picture: &SharedBuffer,
        layout: &Layout,
        frames: u32,
    ) -> Result<Self, PainterError> {
        let pages = device.page_set(painting::PAGE as u64, Ladder::SINGLE_PAGES).map_err(PainterError::Dma)?;
        let page = SharedBuffer::try_new("orders", pages).map_err(|rejected| PainterError::Dma(rejected.error))?;
        let mut orders = [0; painting::PAGE];
        Report::order(&mut orders, &Orders { layout: told(layout), frames });
        page.cpu_access::<CpuWrites>().and_then(|mut access| access.write_at(0, &orders)).map_err(PainterError::Dma)?;

        let event = || base::fallible::arc(Event::default()).map_err(|_| PainterError::Dma(dma::Error::OutOfMemory));
        let (go, at_it) = (event()?, event()?);
        let made = UserProcess::new("painter", company.program, company.arguments, Quota::default());
        let mut process = made.map_err(PainterError::Start)?;
        let rights = abi::READ | abi::WRITE;
        for buffer in [picture, &page] {
            process.process().share(buffer.clone(), rights).map_err(PainterError::Process)?;
        }
        for event in [&go, &at_it] {
            process.process().put_event(event.clone()).map_err(PainterError::Process)?;
        }
        let killer = process.killer();
        let place = Self::send(company, process)?;
        Ok(Self { place, killer, go, at_it, picture: picture.clone(), page, frames, frame: 0 })
    }

    /// Sends the process to another core, or keeps it here.
    fn send(company: &Company, process: UserProcess) -> Result<Place, PainterError> {
        {
            let mut guest = GUEST.lock();
            if !matches!(*guest, Guest::Nobody) {
                drop(guest);
                return Err(PainterError::Taken);
            }
            *guest = Guest::Coming(process);
        }
        if (company.elsewhere)(host) {
            return Ok(Place::Elsewhere);
        }
        match mem::replace(&mut *GUEST.lock(), Guest::Nobody) {
            Guest::Coming(process) => Ok(Place::Here(process)),
            // Nobody was told of it.
            _ => Err(PainterError::Taken),
        }
    }

    /// Whether it runs on another core.
    pub fn is_elsewhere(&self) -> bool {
        matches!(self.place, Place::Elsewhere)
    }

    /// How it is ended from elsewhere.
    pub fn killer(&self) -> &Killer {
        &self.killer
    }

    /// Lets it run until `enough`, or its end.
    fn until(&mut self, deadline: Deadline, enough: impl Fn() -> bool) {
        match &mut self.place {
            Place::Here(process) => {
                if let Some(end) = process.run_until(deadline, enough) {
                    // What it had goes with it.
                    self.place = Place::Gone(end);
                }
            }
            Place::Elsewhere => {
                // Out of time or not: what there is now is looked at by the caller.
                let _ = wait_until(deadline, || enough() || is_back());
                self.fetch();
            }
            Place::Gone(_) => {}
        }
    }

    /// Takes note that it is back from another core.
    fn fetch(&mut self) {
        let mut guest = GUEST.lock();
        if matches!(*guest, Guest::Back(_))
            && let Guest::Back(end) = mem::replace(&mut *guest, Guest::Nobody)
        {
            drop(guest);
            self.place = Place::Gone(end);
        }
    }

    /// Ends the process, if it has not ended.
    fn end(&mut self) {
        if matches!(self.place, Place::Elsewhere) {
            self.killer.kill();
            if wait_until(Deadline::after_millis(END_MILLIS), is_back).is_err() {
                log::error!("the process that draws cannot be ended");
                return;
            }
            self.fetch();
        }
        if let Place::Here(_) = self.place {
            self.place = Place::Gone(End::Killed);
        }
    }
}

impl Painter for ProcessPainter {
    type Error = PainterError;

    fn draw(&mut self, deadline: Deadline) -> Result<(), PainterError> {
        self.frame = self.frame.saturating_add(1);
        self.go.raise();
        let (at_it, picture) = (self.at_it.clone(), self.picture.clone());
        let here = matches!(self.place, Place::Here(_));
        // On this core it has to draw now: nobody goes on before it has ended its access.
        self.until(deadline, || at_it.is_raised() && !(here && picture.users().cpu_writers != 0));
        let begun = self.at_it.take() != 0;
        match &self.place {
            Place::Gone(End::TimedOut) if begun => Err(PainterError::Endless(self.frame)),
            Place::Gone(End::TimedOut) => Err(PainterError::Idle(self.frame)),
            // It was its last frame, or it has left too early: who asks for the next is told.
            Place::Gone(End::Exited(0)) if begun => Ok(()),
            Place::Gone(end) => Err(PainterError::Ended { frame: self.frame, end: end.clone() }),
            _ if !begun => Err(PainterError::Idle(self.frame)),
            _ => Ok(()),
        }
    }

    fn trouble(&self) -> Option<PainterError> {
        (self.picture.users().cpu_writers != 0).then_some(PainterError::Endless(self.frame))
    }

    fn finish(mut self, deadline: Deadline) -> Result<Painted, PainterError> {
        self.until(deadline, || false);
        match &self.place {
            Place::Gone(End::Exited(0)) => {}
            Place::Gone(End::TimedOut) | Place::Here(_) | Place::Elsewhere => return Err(PainterError::Lingers),
            Place::Gone(end) => return Err(PainterError::Ended { frame: self.frame, end: end.clone() }),
        }
        let mut page = [0; painting::PAGE];
        let access = self.page.cpu_access_by::<CpuReads>(deadline).map_err(PainterError::Dma)?;
        access.read_at(0, &mut page).map_err(PainterError::Dma)?;
        let said = Report::accounted(&page);
        if said.frames != u64::from(self.frames) {
            return Err(PainterError::Short(said.frames, self.frames));
        }
        let waited = Duration::from_nanos(said.waited);
        Ok(Painted { frames: said.frames, bytes: said.bytes, waits: said.waits, waited })
    }
}

impl Drop for ProcessPainter {
    fn drop(&mut self) {
        self.end();
    }
}

/// The layout, in the painter's words.
fn told(layout: &Layout) -> painting::Layout {
    painting::Layout {
        width: layout.width,
        height: layout.height,
        offset: layout.offset,
        stride: layout.stride,
        bottom_up: !layout.top_down,
        red_first: matches!(layout.format, PixelFormat::Rgbx | PixelFormat::Rgba),
    }
}
