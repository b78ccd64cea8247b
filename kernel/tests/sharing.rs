//! The show, on a screen that reads slowly and with a painter that draws slowly, each in two halves: whoever does not wait for the
//! other is seen in a frame of which one half is of another.
//!
//! Seen red, each by hand: a screen whose job is over before it has read; a screen that begins no job; a painter that is asked after the
//! screen.

use base::Deadline;
use dma::fakes::{FakeBusMaster, FakeDevice, FakeSystem};
use dma::{CpuWrites, Device, Job, Lent, SharedBuffer, Watch};
use image::{ImageFormat, Rgb, RgbImage};
use kernel::class::{Begun, Disk, Frame, Painted, Painter, Screen};
use kernel::demo::{Act, Failure, Played, Screenshot, Source, sharing};
use kernel::disk::{Extent, FatKind, File, Located, TableKind};
use kernel::picture::{HEAD, Layout, Limits, Picture, PixelFormat};
use std::future::{Ready, ready};
use std::ops::Range;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

const SIZE: (u32, u32) = (24, 16);
const FRAMES: u32 = 40;
/// Milliseconds after which whoever was not waited for has shown itself.
const HALF: Duration = Duration::from_millis(1);

fn bytes_at(master: &FakeBusMaster, loan: &dyn Lent, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let [segment] = loan.segments() else { panic!("one range of addresses") };
    master.read(segment.iova.checked_add(range.start).unwrap(), &mut bytes).unwrap();
    bytes
}

struct FakeDisk<'a> {
    device: &'a FakeDevice,
    file: Vec<u8>,
}

impl Disk for FakeDisk<'_> {
    type Error = String;
    type Transfer = Ready<Result<(), String>>;

    fn device(&self) -> &Device {
        &self.device.device
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn blocks(&self) -> u64 {
        1 << 20
    }
    fn largest_transfer<L: Lent>(&self, _: &L, _: u64) -> u64 {
        1024
    }
    fn read<L: Lent>(&self, block: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Self::Transfer, String> {
        let mut bytes = self.file.clone();
        bytes.resize(self.file.len().next_multiple_of(512), 0);
        let from = block as usize * 512;
        let bytes = &bytes[from..from + (range.end - range.start) as usize];
        let [segment] = loan.segments() else { panic!("one range of addresses") };
        self.device.master.write(segment.iova.checked_add(range.start).unwrap(), bytes).unwrap();
        Ok(ready(Ok(())))
    }
    fn wait_for_room(&self, _: Deadline) -> Result<(), String> {
        Ok(())
    }
}

/// A reading: the first half is read when it is begun, the second when somebody looks for the third time whether it is over.
struct Reading {
    master: FakeBusMaster,
    rows: Vec<Range<u64>>,
    loan: Arc<dyn Lent>,
    state: Mutex<(u32, Vec<u8>)>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Reading {
    fn read(&self, rows: Range<usize>, to: &mut Vec<u8>) {
        self.rows[rows].iter().for_each(|row| to.extend(bytes_at(&self.master, &*self.loan, row.clone())));
    }
}

impl Watch for Reading {
    fn outcome(&self) -> Option<bool> {
        let mut state = self.state.lock().unwrap();
        let (looks, bytes) = &mut *state;
        *looks += 1;
        let middle = self.rows.len() / 2;
        match *looks {
            1 => self.read(0..middle, bytes),
            2 => {}
            3 => {
                self.read(middle..self.rows.len(), bytes);
                self.seen.lock().unwrap().push(bytes.clone());
            }
            _ => return Some(true),
        }
        (*looks >= 3).then_some(true)
    }
}

/// The device's work, held by its queue until somebody has taken the result.
struct Refresh {
    reading: Arc<Reading>,
    job: Option<Arc<dyn Lent>>,
    fails: bool,
}

impl Future for Refresh {
    type Output = Result<(), String>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.reading.outcome().is_none() {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.job = None;
        Poll::Ready(if self.fails { Err("no picture".into()) } else { Ok(()) })
    }
}

struct FakeScreen<'a> {
    device: &'a FakeDevice,
    rows: Mutex<Vec<Range<u64>>>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    refreshes: Mutex<u32>,
    hidden: Mutex<u32>,
    fails_at: u32,
}

impl Screen for FakeScreen<'_> {
    type Error = String;
    type Shown = ();
    type Refresh = Refresh;

    fn device(&self) -> &Device {
        &self.device.device
    }
    fn size(&self, _: Deadline) -> Result<(u32, u32), String> {
        Ok((640, 480))
    }
    fn show<L: Lent>(&self, frame: &Frame<'_, L>, _: Deadline) -> Result<(), String> {
        // Single rows, so that there are two halves.
        let row = u64::from(frame.width) * 4;
        let rows = frame.rows.iter().flat_map(|rows| (rows.start..rows.end).step_by(row as usize));
        *self.rows.lock().unwrap() = rows.map(|start| start..start + row).collect();
        Ok(())
    }
    fn refresh<L: Lent>(&self, (): &(), loan: &Arc<L>, deadline: Deadline) -> Result<Begun<Refresh>, String> {
        let job = Job::begin(loan, deadline).map_err(|error| error.to_string())?.expect("a shared buffer");
        let mut refreshes = self.refreshes.lock().unwrap();
        *refreshes += 1;
        let reading = Arc::new(Reading {
            master: self.device.master.clone(),
            rows: self.rows.lock().unwrap().clone(),
            loan: loan.clone(),
            state: Mutex::default(),
            seen: self.seen.clone(),
        });
        assert_eq!(reading.outcome(), None);
        job.watch(reading.clone());
        let work = Refresh { reading, job: Some(job), fails: *refreshes == self.fails_at };
        Ok(Begun { work, waited: Some(Duration::from_nanos(5)) })
    }
    fn hide(&self, (): (), _: Deadline) -> Result<(), String> {
        *self.hidden.lock().unwrap() += 1;
        Ok(())
    }
}

/// What becomes of a painter.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Well,
    /// It is gone before it begins this frame.
    Crashes(u32),
    /// It begins this frame, and does not end it before it is ended.
    Stops(u32),
    /// It does not do as many frames.
    ExitsEarly,
}

/// On a thread of its own: fills the picture with the frame's number, in two halves.
struct FakePainter {
    go: Option<Sender<u32>>,
    at_it: Receiver<()>,
    thread: Option<JoinHandle<()>>,
    frames: u32,
    drawn: u32,
    way: Way,
    buffer: SharedBuffer,
}

impl FakePainter {
    fn hire(buffer: &SharedBuffer, layout: &Layout, frames: u32, way: Way) -> Result<Self, String> {
        let ((go, orders), (begun, at_it)) = (channel(), channel());
        let (own, layout) = (buffer.clone(), *layout);
        let thread = std::thread::spawn(move || {
            for number in orders.iter() {
                let mut access = own.cpu_access_by::<CpuWrites>(Deadline::after_millis(5_000)).unwrap();
                let rows: Vec<_> = layout.row_spans().collect();
                let bytes: u64 = rows.iter().map(|row| row.len).sum();
                let start = rows.iter().map(|row| row.offset).min().unwrap();
                let half = vec![number as u8; (bytes / 2) as usize];
                // First what the screen reads last: if it is reading, it sees this.
                access.write_at(start + bytes / 2, &half).unwrap();
                begun.send(()).unwrap();
                std::thread::sleep(HALF);
                if way == Way::Stops(number) {
                    // Until it is ended.
                    while orders.recv().is_ok() {}
                }
                access.write_at(start, &half).unwrap();
            }
        });
        Ok(Self { go: Some(go), at_it, thread: Some(thread), frames, drawn: 0, way, buffer: buffer.clone() })
    }

    fn end(&mut self) {
        self.go = None;
        self.thread.take().map(JoinHandle::join);
    }
}

impl Painter for FakePainter {
    type Error = String;

    fn draw(&mut self, _: Deadline) -> Result<(), String> {
        self.drawn += 1;
        if self.way == Way::Crashes(self.drawn) {
            return Err("crashed".into());
        }
        self.go.as_ref().unwrap().send(self.drawn).unwrap();
        self.at_it.recv().map_err(|_| "gone".to_string())
    }
    fn trouble(&self) -> Option<String> {
        (self.buffer.users().cpu_writers != 0).then(|| format!("frame {} does not end", self.drawn))
    }
    fn finish(mut self, _: Deadline) -> Result<Painted, String> {
        self.end();
        if self.way == Way::ExitsEarly {
            return Err("exited with 3".into());
        }
        assert_eq!(self.drawn, self.frames);
        Ok(Painted { frames: self.drawn.into(), bytes: 9, waits: 7, waited: HALF })
    }
}

impl Drop for FakePainter {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Default)]
struct Look(Mutex<Vec<(u32, u32)>>);

impl Screenshot for Look {
    fn ready(&self, width: u32, height: u32) {
        self.0.lock().unwrap().push((width, height));
    }
}

struct Run {
    result: Result<Played, Failure>,
    /// What the screen read, without what it showed first.
    seen: Vec<Vec<u8>>,
    looked: Vec<(u32, u32)>,
}

fn source(file: &[u8]) -> Source {
    let size = file.len() as u64;
    let limits = Limits { width: 640, height: 480 };
    let extents = vec![Extent { lba: 0, sectors: size.div_ceil(512) }];
    Source {
        path: "/picture".into(),
        located: Located { table: TableKind::Gpt, partition: 1, fat: FatKind::Fat32, file: File { size, extents } },
        picture: Picture::recognise(&file[..file.len().min(HEAD)], size, limits).unwrap(),
        screen: (640, 480),
        metadata: 0,
    }
}

fn picture() -> RgbImage {
    RgbImage::from_fn(SIZE.0, SIZE.1, |x, y| Rgb([x as u8, y as u8, 200]))
}

/// A 32-bit BMP, top row first.
fn bmp32() -> Vec<u8> {
    let mut file = b"BM".to_vec();
    let (width, height) = (SIZE.0 as i32, SIZE.1 as i32);
    let words: [u32; 6] = [54 + SIZE.0 * SIZE.1 * 4, 0, 54, 40, width as u32, (-height) as u32];
    words.iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend([1, 0, 32, 0]);
    file.extend([0; 24]);
    picture().pixels().for_each(|Rgb([red, green, blue])| file.extend([*blue, *green, *red, 0]));
    file
}

fn run(file: Vec<u8>, act: Act, way: Way, fails_at: u32) -> Run {
    let system = FakeSystem::new();
    let (disk, gpu) = (system.device("disk").unwrap(), system.device("gpu").unwrap());
    let source = source(&file);
    let disk = FakeDisk { device: &disk, file };
    let screen = FakeScreen {
        device: &gpu,
        rows: Mutex::default(),
        seen: Arc::default(),
        refreshes: Mutex::default(),
        hidden: Mutex::default(),
        fails_at,
    };
    let look = Look::default();
    let hire = |buffer: &SharedBuffer, layout: &Layout, frames| FakePainter::hire(buffer, layout, frames, way);
    let result = sharing(&disk, &screen, &source, &act, hire, &look);
    assert_eq!(*screen.hidden.lock().unwrap(), 1, "the picture comes off the screen, however it went");
    assert_eq!(system.memory.violations(), Vec::<String>::new());
    assert_eq!((disk.device.device.stats().live_mappings, gpu.device.stats().live_mappings), (0, 0));
    assert_eq!(system.memory.live_bytes(), 0, "all memory comes back");
    let seen = screen.seen.lock().unwrap().clone();
    Run { result, seen, looked: look.0.into_inner().unwrap() }
}

fn act() -> Act {
    Act { frames: FRAMES, patience: 5_000, ..Act::default() }
}

#[test]
fn nobody_draws_while_the_screen_reads_and_it_does_not_read_while_somebody_draws() {
    let Run { result, seen, looked } = run(bmp32(), act(), Way::Well, 0);
    let played = result.unwrap();
    assert_eq!(looked, [SIZE]);
    assert_eq!(seen.len(), FRAMES as usize);
    for (number, frame) in (1..).zip(&seen) {
        let other = frame.iter().position(|byte| *byte != number);
        assert_eq!(other, None, "frame {number} has {:?} at {other:?} of {}", frame[other.unwrap_or(0)], frame.len());
    }
    let bytes = u64::from(SIZE.0 * SIZE.1 * 4);
    assert_eq!(played.to_screen, bytes * u64::from(FRAMES + 1));
    assert_eq!((played.copied, played.from_disk, played.size), (0, 2048, SIZE));
    assert_eq!((played.waits, played.waited), (FRAMES.into(), Duration::from_nanos(5) * FRAMES));
    assert_eq!(played.painted, Painted { frames: FRAMES.into(), bytes: 9, waits: 7, waited: HALF });
    let frames = played.frames;
    assert_eq!(frames.count, FRAMES);
    assert!(frames.shortest <= frames.median && frames.median <= frames.longest && frames.longest <= frames.all);
    assert!(frames.all >= HALF * FRAMES, "{frames:?}");
}

#[test]
fn a_picture_that_is_decoded_is_drawn_into_as_well_and_its_bytes_are_counted() {
    let mut file = std::io::Cursor::new(Vec::new());
    picture().write_to(&mut file, ImageFormat::Png).unwrap();
    let Run { result, seen, .. } = run(file.into_inner(), act(), Way::Well, 0);
    let played = result.unwrap();
    assert_eq!(played.copied, u64::from(SIZE.0 * SIZE.1 * 4));
    assert!((1..).zip(&seen).all(|(number, frame)| frame.iter().all(|byte| *byte == number)));
}

#[test]
fn frames_come_no_faster_than_they_are_asked_for() {
    let act = Act { frames: 11, rate: Some(100), ..act() };
    let played = run(bmp32(), act, Way::Well, 0).result.unwrap();
    assert!(played.frames.all >= Duration::from_millis(100), "{:?}", played.frames);
}

#[test]
fn a_painter_that_fails_is_named_and_everything_comes_back() {
    let short = Act { patience: 50, ..act() };
    for (way, frames, sentence) in [
        (Way::Crashes(1), 0, "painter: crashed"),
        (Way::Crashes(5), 4, "painter: crashed"),
        (Way::Stops(3), 2, "painter: frame 3 does not end"),
        (Way::ExitsEarly, FRAMES as usize, "painter: exited with 3"),
    ] {
        let Run { result, seen, looked } = run(bmp32(), short, way, 0);
        assert_eq!(result.unwrap_err().to_string(), sentence);
        assert!(looked.is_empty() && seen.len() <= frames, "{sentence}: {} frames", seen.len());
    }
}

#[test]
fn a_screen_that_fails_is_named_and_everything_comes_back() {
    for fails_at in [1, 7, FRAMES] {
        let Run { result, looked, .. } = run(bmp32(), act(), Way::Well, fails_at);
        assert_eq!(result.unwrap_err().to_string(), "screen: no picture");
        assert!(looked.is_empty());
    }
}

#[test]
fn a_show_without_frames_shows_the_picture() {
    let Run { result, looked, seen } = run(bmp32(), Act { frames: 0, ..act() }, Way::Well, 0);
    assert_eq!((result.unwrap().frames.count, looked.len(), seen.len()), (0, 1, 0));
}

#[test]
fn the_pixels_are_where_the_file_has_them() {
    let Picture::Direct(layout) = source(&bmp32()).picture else { panic!("it can be shown as it is") };
    assert_eq!((layout.offset, layout.stride, layout.format), (54, 96, PixelFormat::Bgrx));
}
