//! The DMA-API: streaming mappings, coherent memory, shared buffers.

use crate::memory::{adjacent, neighbours, scattered};
use crate::run::About::Memory;
use crate::run::{AT_ONCE, Benchmark};
use crate::stand::{Mode, Stand};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use base::Deadline;
use core::hint::black_box;
use core::sync::atomic::AtomicU64;
use dma::{
    Bidirectional, Device, FromDevice, Ladder, Lapsing, Lent, PageSet, Pages, Pending, ScatterList, SharedBuffer,
    ToDevice,
};
use iommu::PAGE_SIZE;
use ktest::{Outcome, TestResult};

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[
    Benchmark { name: "map4k", about: Memory, modes: ALL_MODES, run: |stand| pages(stand, "map4k", PAGE_SIZE, 1024) },
    Benchmark { name: "map64k", about: Memory, modes: ALL_MODES, run: |stand| pages(stand, "map64k", 64 << 10, 1024) },
    Benchmark { name: "map1m", about: Memory, modes: ALL_MODES, run: |stand| pages(stand, "map1m", 1 << 20, 256) },
    Benchmark { name: "map2m", about: Memory, modes: ALL_MODES, run: |stand| pages(stand, "map2m", 2 << 20, 1024) },
    Benchmark { name: "ring256_4k", about: Memory, modes: ALL_MODES, run: ring },
    Benchmark {
        name: "sg16x4k",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| list(stand, "sg16x4k", 256, scattered(stand.device(), 16)?),
    },
    Benchmark {
        name: "sg256x4k",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| list(stand, "sg256x4k", 64, scattered(stand.device(), 256)?),
    },
    Benchmark {
        name: "sgc256x4k",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| list(stand, "sgc256x4k", 64, neighbours(stand.device(), 256)?),
    },
    Benchmark {
        name: "coherent4k",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| coherent(stand, "coherent4k", 4 << 10, 256),
    },
    Benchmark {
        name: "coherent64k",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| coherent(stand, "coherent64k", 64 << 10, 64),
    },
    Benchmark {
        name: "coherent1m",
        about: Memory,
        modes: AT_ONCE,
        run: |stand| coherent(stand, "coherent1m", 1 << 20, 16),
    },
    Benchmark { name: "share", about: Memory, modes: &[Mode::Strict], run: share },
    Benchmark { name: "map4k_million", about: Memory, modes: &[Mode::Strict], run: million },
];

pub const ALL_MODES: &[Mode] = &[Mode::Strict, Mode::Lazy, Mode::Direct];

/// Buffers that are in turn where they end lazily: more than lapse before a flush.
pub const IN_TURN: u64 = 160;
/// Bytes of such buffers, likewise.
const BYTES_IN_TURN: u64 = 24 << 20;

/// Places in turn, as a driver's ring has them: each is emptied and filled again when it is reached.
pub struct Turns<T> {
    places: Vec<Option<T>>,
    next: usize,
}

impl<T> Turns<T> {
    fn of(count: u64, make: impl Fn() -> Result<T, Outcome>) -> Result<Self, Outcome> {
        Ok(Self { places: (0..count).map(|_| make().map(Some)).collect::<Result<_, _>>()?, next: 0 })
    }

    /// The place whose turn it is. (As everything that comes out of it, it is in memory.)
    #[inline(always)]
    fn next(&mut self) -> Option<&mut Option<T>> {
        let (this, behind) = (self.next, self.next.wrapping_add(1));
        self.next = if behind < self.places.len() { behind } else { 0 };
        self.places.get_mut(this).map(black_box)
    }
}

#[cold]
fn wait_for(pending: Pending<Bidirectional, Pages>) -> Result<Pages, Outcome> {
    match pending {
        Pending::Still(lapsed) => Ok(lapsed.take(Deadline::after_millis(10_000))?),
        lost => Err(lost.into()),
    }
}

/// Buffers of `bytes` that have lapsed, `count` of them in turn.
pub fn lapsing(device: &Device, count: u64, bytes: u64) -> Result<Turns<Lapsed>, Outcome> {
    Turns::of(count, || Ok(device.map::<Bidirectional, _>(adjacent(device, bytes)?)?.unmap_lazy()))
}

/// A buffer that lapses.
pub type Lapsed = Lapsing<Bidirectional, Pages>;

/// Takes the oldest buffer, maps it and lets it lapse.
#[inline(always)]
pub fn map_in_turn(device: &Device, lapsing: &mut Turns<Lapsed>) -> TestResult {
    let Some(place) = lapsing.next() else { ktest::skip!("there are none") };
    let Some(oldest) = place.take() else { ktest::skip!("a buffer is lost") };
    // It has been flushed long since. A driver that has too few waits.
    let buffer = match oldest.try_take() {
        Ok(buffer) => buffer,
        Err(pending) => wait_for(pending)?,
    };
    let mapped = device.map::<Bidirectional, _>(buffer)?;
    black_box(mapped.iova());
    *place = Some(mapped.unmap_lazy());
    Ok(())
}

/// One buffer, mapped and unmapped. Where it ends lazily there are several: each is had again when a flush has covered it.
fn pages(stand: &Stand, name: &str, bytes: u64, batch: u32) -> TestResult {
    let device = stand.device();
    if stand.mode != Mode::Lazy {
        let mut place = Some(adjacent(device, bytes)?);
        return stand.measure(name, batch, || {
            // The buffer comes out of memory and goes back there, as a driver's does.
            let place = black_box(&mut place);
            let Some(buffer) = place.take() else { ktest::skip!("the buffer is lost") };
            let mapped = device.map::<Bidirectional, _>(buffer)?;
            black_box(mapped.iova());
            *place = Some(mapped.unmap()?);
            Ok(())
        });
    }
    let mut lapsing = lapsing(device, IN_TURN.min(BYTES_IN_TURN / bytes), bytes)?;
    stand.measure(name, batch, || map_in_turn(device, &mut lapsing))
}

/// A scatter list, mapped as one.
fn list(stand: &Stand, name: &str, batch: u32, list: ScatterList<Pages>) -> TestResult {
    let device = stand.device();
    let mut place = Some(list);
    stand.measure(name, batch, || {
        let Some(list) = place.take() else { ktest::skip!("the list is lost") };
        let mapped = device.map_list::<Bidirectional, _>(black_box(list))?;
        black_box(mapped.segments());
        place = Some(black_box(mapped.unmap()?));
        Ok(())
    })
}

/// 256 mappings outstanding; the oldest ends and is made again.
fn ring(stand: &Stand) -> TestResult {
    let device = stand.device();
    let mut flying = VecDeque::with_capacity(257);
    let map = |buffer| device.map::<Bidirectional, _>(buffer);
    for _ in 0..256 {
        flying.push_back(map(adjacent(device, PAGE_SIZE)?)?);
    }
    if stand.mode != Mode::Lazy {
        return stand.measure("ring256_4k", 1024, || {
            let Some(oldest) = flying.pop_front() else { ktest::skip!("the ring is empty") };
            let buffer = black_box(oldest.unmap()?);
            flying.push_back(map(black_box(buffer))?);
            Ok(())
        });
    }
    let mut lapsing = Turns::of(IN_TURN, || Ok(map(adjacent(device, PAGE_SIZE)?)?.unmap_lazy()))?;
    stand.measure("ring256_4k", 1024, || {
        let (Some(oldest), Some(place)) = (flying.pop_front(), lapsing.next()) else {
            ktest::skip!("the ring is empty")
        };
        let Some(lapsed) = place.replace(oldest.unmap_lazy()) else { ktest::skip!("a buffer is lost") };
        let buffer = match lapsed.try_take() {
            Ok(buffer) => buffer,
            Err(pending) => wait_for(pending)?,
        };
        flying.push_back(map(buffer)?);
        Ok(())
    })
}

/// Zeroed memory that device and CPU share, allocated and released.
fn coherent(stand: &Stand, name: &str, bytes: usize, batch: u32) -> TestResult {
    let device = stand.device();
    stand.measure(name, batch, || {
        let memory = device.coherent_slice::<AtomicU64>(black_box(bytes) / size_of::<AtomicU64>())?;
        black_box(memory.iova());
        Ok(memory.release()?)
    })
}

/// A buffer of 1 MiB that one device has is lent to a second one.
fn share(stand: &Stand) -> TestResult {
    let second = stand.second()?;
    let pages = PageSet::zeroed(stand.device().memory(), 1 << 20, Ladder::DEFAULT)?;
    let buffer = SharedBuffer::new("bench", pages);
    let first = buffer.attach::<FromDevice>(stand.device())?;
    let device = second.master().device();
    stand.measure("share", 256, || {
        let attachment = black_box(&buffer).attach::<ToDevice>(device)?;
        black_box(attachment.iova());
        Ok(attachment.detach()?)
    })?;
    first.detach()?;
    second.stop()?;
    Ok(())
}

/// Live mappings beside which one more is made.
const LIVE: usize = 1_000_000;

/// As `map4k`, while the device has a million other mappings.
fn million(stand: &Stand) -> TestResult {
    let device = stand.device();
    // One page, lent a million times: each is a mapping of its own, at an address of its own.
    let page = SharedBuffer::new("bench", PageSet::from(adjacent(device, PAGE_SIZE)?));
    let mut live = Vec::new();
    live.try_reserve_exact(LIVE)?;
    for _ in 0..LIVE {
        live.push(page.attach::<ToDevice>(device)?);
    }
    pages(stand, "map4k_million", PAGE_SIZE, 1024)
}
