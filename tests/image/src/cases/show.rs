//! The show with painters that do wrong: each ends it with a sentence, and nothing of it is left.

use crate::Bench;
use crate::bench::soon;
use alloc::string::{String, ToString};
use base::{Deadline, wait_until};
use board::{Company, PainterError, ProcessPainter};
use core::cell::Cell;
use kernel::class::{Painted, Painter};
use kernel::demo::{self, Act, DEFAULT_PICTURE, Played, Screenshot};
use ktest::{Outcome, expect, expect_eq, ktest};
use programs::{BUNGLER, PAINTER, TRIAL};
use virt::cores;

/// What the program `trial` is told to do.
const EXIT: u64 = 0;
const STORE: u64 = 3;
const LOOP: u64 = 4;

/// How often somebody looked at the screen.
#[derive(Default)]
struct Looks(Cell<u32>);

impl Screenshot for Looks {
    fn ready(&self, _: u32, _: u32) {
        self.0.set(self.0.get() + 1);
    }
}

/// A painter that is killed before it is told to draw this frame; 0 for none.
struct Mortal {
    painter: ProcessPainter,
    last: u32,
    drawn: u32,
}

impl Painter for Mortal {
    type Error = PainterError;

    fn draw(&mut self, deadline: Deadline) -> Result<(), PainterError> {
        self.drawn += 1;
        if self.drawn == self.last {
            self.painter.killer().kill();
        }
        self.painter.draw(deadline)
    }
    fn trouble(&self) -> Option<PainterError> {
        self.painter.trouble()
    }
    fn finish(self, deadline: Deadline) -> Result<Painted, PainterError> {
        self.painter.finish(deadline)
    }
}

fn nowhere(_: cores::Job) -> bool {
    false
}

/// Plays, and takes everything back. What it came to, and on another core or not.
fn play(bench: &Bench, company: &Company, act: &Act, last: u32) -> Result<(Result<Played, String>, bool), Outcome> {
    let (disk, screen) = (bench.disk()?, bench.gpu()?);
    let live = || [disk.master(), screen.master()].map(|master| master.device().stats().live_mappings);
    let before = live();
    let source = demo::find(&disk, &screen, DEFAULT_PICTURE)?;
    let (looks, mut elsewhere) = (Looks::default(), false);
    let hire = |picture: &_, layout: &_, frames| {
        let painter = ProcessPainter::hire(company, screen.master().device(), picture, layout, frames)?;
        elsewhere = painter.is_elsewhere();
        Ok(Mortal { painter, last, drawn: 0 })
    };
    let played = demo::sharing(&disk, &screen, &source, act, hire, &looks).map_err(|failure| failure.to_string());
    expect_eq!(looks.0.get(), u32::from(played.is_ok()));
    // The picture is off the screen, which has let go of its memory, and so has the process.
    expect_eq!(screen.gpu().resources(), 0);
    expect_eq!(live(), before);
    screen.stop()?;
    disk.stop()?;
    wait_until(soon(), || bench.cores < 2 || cores::is_idle(1))?;
    Ok((played, elsewhere))
}

/// Gives a core something to run, and says whether it did.
type Elsewhere = fn(cores::Job) -> bool;

/// Where a painter may run, and whether that is another core.
fn places(bench: &Bench) -> [(Elsewhere, bool); 2] {
    [(cores::run_anywhere, bench.cores > 1), (nowhere, false)]
}

/// Plays with this program on another core, if there is one, and in turns on this one: the show must end with this sentence.
fn ends_with(
    bench: &Bench,
    (program, arguments): (&'static [u8], [u64; 3]),
    act: &Act,
    last: u32,
    sentence: &str,
) -> Result<(), Outcome> {
    for (elsewhere, is_elsewhere) in places(bench) {
        let company = Company { program, arguments, elsewhere };
        let (played, was_elsewhere) = play(bench, &company, act, last)?;
        expect_eq!(was_elsewhere, is_elsewhere);
        match played {
            Ok(_) => return Err(Outcome::failed(format_args!("{arguments:?}: it went well, not: {sentence}"))),
            Err(said) => expect!(said.starts_with(sentence), "{arguments:?}: {said:?}, not {sentence:?}"),
        }
    }
    Ok(())
}

/// Plays with a painter that does well.
fn goes_well(bench: &Bench) -> Result<(), Outcome> {
    for (elsewhere, _) in places(bench) {
        let company = Company { program: PAINTER, arguments: [0; 3], elsewhere };
        let (played, _) = play(bench, &company, &Act { frames: 12, ..Act::default() }, 0)?;
        let played = played.map_err(|said| Outcome::failed(format_args!("{said}")))?;
        expect_eq!((played.frames.count, played.painted.frames, played.copied), (12, 12, 0));
        expect!(played.painted.bytes > 12 * 4096, "{} bytes", played.painted.bytes);
    }
    Ok(())
}

ktest! {
    /// It exits, crashes, draws out of turn, goes away while it draws, or is killed.
    fn a_painter_that_goes_away_ends_the_show_and_leaves_nothing(bench) {
        let act = Act { frames: 5, ..Act::default() };
        let three = Act { frames: 3, ..act };
        let all = || -> Result<(), Outcome> {
            ends_with(bench, (TRIAL, [EXIT, 3, 0]), &act, 0, "painter: it exited with 3 in frame 1")?;
            ends_with(bench, (TRIAL, [STORE, 0, 0]), &act, 0, "painter: it crashed: ")?;
            ends_with(bench, (BUNGLER, [1, 2, 0]), &act, 0, "painter: it crashed: ")?;
            ends_with(bench, (BUNGLER, [2, 2, 0]), &act, 0, "painter: it exited with 0 in frame 3")?;
            ends_with(bench, (BUNGLER, [2, 3, 0]), &three, 0, "painter: it says that it drew 0 frames of 3")?;
            ends_with(bench, (PAINTER, [0; 3]), &act, 4, "painter: it was killed in frame 4")
        };
        all()?;
        let before = (kernel::mm::stats().free, arch::user::Asid::in_use());
        all()?;
        expect_eq!((kernel::mm::stats().free, arch::user::Asid::in_use()), before);
        goes_well(bench)
    }
}

ktest! {
    /// It does nothing at all, begins to draw and does not end, or says that it draws and does not.
    fn a_painter_that_stops_is_named_and_ended(bench) {
        let act = Act { frames: 3, patience: 1_000, ..Act::default() };
        ends_with(bench, (TRIAL, [LOOP, 0, 0]), &act, 0, "painter: it has not begun frame 1 in time")?;
        ends_with(bench, (BUNGLER, [0, 2, 0]), &act, 0, "painter: it has not finished drawing frame 2 in time")?;
        ends_with(bench, (BUNGLER, [3, 1, 0]), &act, 0, "painter: it does not end after its last frame")?;
        goes_well(bench)
    }
}
