//! The same driver over every backend, direction and kind of coherence, against a plain array of bytes: a driver does not know
//! which one it is on.

use dma::fakes::{FakeBusMaster, FakeDevice, FakeMemory, FakeMemoryConfig, FakeSystem};
use dma::{
    Bidirectional, Bounce, BusWindow, Device, DeviceReads, DeviceWrites, DirectConfig, Direction, DmaMemory,
    FromDevice, Ladder, Lent, Limits, Mapped, PageRequest, PageSet, Policy, Pool, PoolSource, ToDevice, slice,
};
use iommu::{Iova, PhysAddr, PhysRange};
use proptest::prelude::*;
use std::sync::Arc;

/// Memory at these addresses.
pub fn memory_at(start: u64, snooped: bool) -> &'static FakeMemory {
    let range = PhysRange::new(PhysAddr::new(start), 1 << 40).unwrap();
    FakeMemory::new(FakeMemoryConfig { range, gap: 4096, snooped })
}

pub fn window(memory: u64, len: u64, bus: u64) -> BusWindow {
    BusWindow { memory: PhysRange::new(PhysAddr::new(memory), len).unwrap(), bus: Iova::new(bus) }
}

/// A pool for good, of memory of the system's.
pub fn restricted_of(memory: &'static FakeMemory, bytes: u64) -> &'static Pool {
    let raw = memory.allocate(PageRequest::anywhere(bytes)).unwrap();
    let range = PhysRange::new(raw.phys, raw.bytes).unwrap();
    // SAFETY: just allocated, and never freed.
    let pool = unsafe { Pool::carve_out("restricted", range, raw.ptr, memory) };
    Box::leak(Box::new(pool.unwrap()))
}

pub fn restricted(system: &FakeSystem, bytes: u64) -> &'static Pool {
    restricted_of(system.memory, bytes)
}

/// A bus master that nothing translates for.
pub struct DirectMaster {
    memory: &'static FakeMemory,
    windows: Vec<BusWindow>,
    mask: u64,
}

impl DirectMaster {
    fn phys(&self, at: Iova, len: u64) -> PhysAddr {
        assert!(at.get() + len - 1 <= self.mask, "{at} is beyond the address lines");
        let holds = |window: &&BusWindow| at.get().wrapping_sub(window.bus.get()) < window.memory.len();
        let window = self.windows.iter().find(holds).unwrap_or_else(|| panic!("{at} is in no window"));
        window.memory.start().checked_add(at.get() - window.bus.get()).unwrap()
    }

    pub fn read(&self, at: Iova, to: &mut [u8]) {
        assert!(self.memory.bus_read(self.phys(at, to.len() as u64), to));
    }

    pub fn write(&self, at: Iova, from: &[u8]) {
        assert!(self.memory.bus_write(self.phys(at, from.len() as u64), from));
    }
}

/// A device without an IOMMU, and the hands that move it.
pub fn direct(
    memory: &'static FakeMemory,
    windows: &[BusWindow],
    limits: Limits,
    bounce: Bounce,
) -> (Device, DirectMaster) {
    let coherent = memory.is_snooped();
    let config = DirectConfig { name: "legacy", windows, limits, coherent, memory };
    // SAFETY: the one bus master goes where the tests send it.
    let device = unsafe { Device::direct_with_policy(config, None, Policy { bounce, trusted: false }) }.unwrap();
    (device, DirectMaster { memory, windows: windows.to_vec(), mask: limits.address_mask })
}

enum Hands {
    Translated(FakeBusMaster),
    Direct(DirectMaster),
}

/// A machine with one device.
struct Machine {
    memory: &'static FakeMemory,
    device: Device,
    hands: Hands,
    /// Whether it must have got a copy.
    copies: bool,
}

/// A pool of the device's own.
const OWN: PoolSource = PoolSource::Own(1 << 20);
const KINDS: u8 = 8;

impl Machine {
    fn new(kind: u8, snooped: bool) -> Self {
        let system = |bounce| {
            let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
            let bounce = match bounce {
                0 => Bounce::Never,
                1 => Bounce::Always(OWN),
                _ => Bounce::Restricted(restricted(&system, 1 << 20)),
            };
            let policy = Policy { bounce: bounce.clone(), trusted: false };
            let FakeDevice { device, master, .. } = system.device_with_policy("new", Limits::NONE, policy).unwrap();
            let copies = !matches!(bounce, Bounce::Never);
            Self { memory: system.memory, device, hands: Hands::Translated(master), copies }
        };
        let straight = |start, windows: &[BusWindow], limits, bounce, copies| {
            let memory = memory_at(start, snooped);
            let bounce = match bounce {
                Some(bounce) => bounce,
                None => Bounce::Restricted(restricted_of(memory, 1 << 20)),
            };
            let (device, hands) = direct(memory, windows, limits, bounce);
            Self { memory, device, hands: Hands::Direct(hands), copies }
        };
        let all = [BusWindow::identity()];
        match kind {
            0..=2 => system(kind),
            3 => straight(0x4000_0000, &all, Limits::NONE, Some(Bounce::Never), false),
            4 => {
                let windows = [window(0x8000_0000, 0x3000, 0x4000_0000), window(0x8000_3000, 1 << 30, 0x1_0000_0000)];
                straight(0x8000_0000, &windows, Limits::NONE, Some(Bounce::Never), false)
            }
            5 => {
                // The buffers lie beyond what 32 bits reach, the pool does not.
                let memory = memory_at(0xffe0_0000, snooped);
                let pool = Pool::new("low", memory, 1 << 20, PhysAddr::new(u32::MAX.into())).unwrap();
                let bounce = Bounce::Needed(PoolSource::Shared(Arc::new(pool)));
                let (device, hands) = direct(memory, &all, Limits::address_bits(32), bounce);
                Self { memory, device, hands: Hands::Direct(hands), copies: true }
            }
            6 => straight(0x4000_0000, &all, Limits::NONE, Some(Bounce::Always(OWN)), true),
            _ => straight(0x4000_0000, &all, Limits::NONE, None, true),
        }
    }

    /// A buffer that the device may not reach.
    fn buffer(&self, pages: u64) -> PageSet {
        let place = |bytes| PageSet::zeroed(self.memory, bytes, Ladder::SINGLE_PAGES).unwrap();
        let narrow = self.device.limits().address_mask != u64::MAX;
        if narrow {
            // What is left of low memory.
            while place(4096).runs()[0].start().get() < 1 << 32 {}
        }
        place(pages * 4096)
    }

    fn read(&self, at: Iova, to: &mut [u8]) {
        match &self.hands {
            Hands::Translated(master) => master.read(at, to).unwrap(),
            Hands::Direct(master) => master.read(at, to),
        }
    }

    fn write(&self, at: Iova, from: &[u8]) {
        match &self.hands {
            Hands::Translated(master) => master.write(at, from).unwrap(),
            Hands::Direct(master) => master.write(at, from),
        }
    }

    /// Reads at an offset of a loan.
    fn read_at(&self, lent: &dyn Lent, offset: u64, len: u64) -> Vec<u8> {
        let mut all = Vec::new();
        for segment in slice(lent, offset, len).unwrap() {
            let mut part = vec![0; segment.len as usize];
            self.read(segment.iova, &mut part);
            all.extend(part);
        }
        assert_eq!(all.len() as u64, len);
        all
    }

    fn write_at(&self, lent: &dyn Lent, offset: u64, from: &[u8]) {
        let mut from = from;
        for segment in slice(lent, offset, from.len() as u64).unwrap() {
            let (now, rest) = from.split_at(segment.len as usize);
            self.write(segment.iova, now);
            from = rest;
        }
        assert!(from.is_empty());
    }
}

/// One turn of either side, with the sync that belongs to it.
#[derive(Clone, Debug)]
struct Turn {
    by_device: bool,
    write: bool,
    offset: u64,
    len: u64,
    byte: u8,
}

fn turn() -> impl Strategy<Value = Turn> {
    (any::<bool>(), any::<bool>(), 0..5 * 4096_u64, 1..5000_u64, any::<u8>())
        .prop_map(|(by_device, write, offset, len, byte)| Turn { by_device, write, offset, len, byte })
}

impl Turn {
    /// The bytes that are written.
    fn data(&self, len: u64) -> Vec<u8> {
        (0..len).map(|at| self.byte.wrapping_add(at as u8)).collect()
    }
}

/// What a direction lets the CPU do.
trait Cpu: Direction + Sized {
    fn write(mapped: &Mapped<Self, PageSet>, offset: u64, from: &[u8]) -> bool;
    fn read(mapped: &Mapped<Self, PageSet>, offset: u64, len: u64) -> Option<Vec<u8>>;
}

fn cpu_writes<D: DeviceReads>(mapped: &Mapped<D, PageSet>, offset: u64, from: &[u8]) -> bool {
    mapped.view().write(offset, from).unwrap();
    mapped.sync_for_device(offset, from.len() as u64).unwrap();
    true
}

fn cpu_reads<D: DeviceWrites>(mapped: &Mapped<D, PageSet>, offset: u64, len: u64) -> Option<Vec<u8>> {
    let mut seen = vec![0; len as usize];
    mapped.sync_for_cpu(offset, len).unwrap();
    mapped.view().read(offset, &mut seen).unwrap();
    Some(seen)
}

impl Cpu for ToDevice {
    fn write(mapped: &Mapped<Self, PageSet>, offset: u64, from: &[u8]) -> bool {
        cpu_writes(mapped, offset, from)
    }
    fn read(_: &Mapped<Self, PageSet>, _: u64, _: u64) -> Option<Vec<u8>> {
        None
    }
}
impl Cpu for FromDevice {
    fn write(_: &Mapped<Self, PageSet>, _: u64, _: &[u8]) -> bool {
        false
    }
    fn read(mapped: &Mapped<Self, PageSet>, offset: u64, len: u64) -> Option<Vec<u8>> {
        cpu_reads(mapped, offset, len)
    }
}
impl Cpu for Bidirectional {
    fn write(mapped: &Mapped<Self, PageSet>, offset: u64, from: &[u8]) -> bool {
        // What the device wrote into the same lines comes first.
        mapped.sync_for_cpu(offset, from.len() as u64).unwrap();
        cpu_writes(mapped, offset, from)
    }
    fn read(mapped: &Mapped<Self, PageSet>, offset: u64, len: u64) -> Option<Vec<u8>> {
        cpu_reads(mapped, offset, len)
    }
}

fn run<D: Cpu>(machine: &Machine, pages: u64, turns: &[Turn]) {
    let mut buffer = machine.buffer(pages);
    let size = pages * 4096;
    let mut reference: Vec<u8> = (0..size).map(|at| (at * 7) as u8).collect();
    buffer.write_at(0, &reference).unwrap();
    let copies = machine.device.copies();
    let mapped = machine.device.map::<D, _>(buffer).unwrap();
    assert_eq!(machine.device.copies() - copies, u64::from(machine.copies));
    for turn in turns {
        let offset = turn.offset % size;
        let len = turn.len.min(size - offset);
        let place = offset as usize..(offset + len) as usize;
        match (turn.by_device, turn.write) {
            (true, true) if D::DEVICE_WRITES => {
                machine.write_at(&mapped, offset, &turn.data(len));
                reference[place].copy_from_slice(&turn.data(len));
            }
            (true, false) if D::DEVICE_READS => {
                assert!(machine.read_at(&mapped, offset, len) == reference[place], "the device reads");
            }
            (false, true) if D::write(&mapped, offset, &turn.data(len)) => {
                reference[place].copy_from_slice(&turn.data(len));
            }
            (false, false) => {
                let seen = D::read(&mapped, offset, len);
                assert!(seen.is_none_or(|seen| seen == reference[place]), "the CPU reads");
            }
            _ => {}
        }
    }
    let buffer = mapped.unmap().unwrap();
    assert!(buffer.chunks().flatten().eq(&reference), "what comes back");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    /// Caught: each of the copies of `bounce` left out (at map, at unmap, of the CPU's writes); `View` that looks at the buffer
    /// instead of the copy; syncs of a copy without their maintenance; `Windows::segments` without its offset.
    #[test]
    fn all_data_arrives_whatever_lies_between_the_driver_and_its_device(
        kind in 0..KINDS,
        snooped in any::<bool>(),
        direction in 0..3_u8,
        pages in 1..6_u64,
        turns in prop::collection::vec(turn(), 0..24),
    ) {
        let machine = Machine::new(kind, snooped);
        match direction {
            0 => run::<ToDevice>(&machine, pages, &turns),
            1 => run::<FromDevice>(&machine, pages, &turns),
            _ => run::<Bidirectional>(&machine, pages, &turns),
        }
        prop_assert_eq!(machine.device.stats().live_mappings, 0);
        prop_assert_eq!(machine.memory.violations(), Vec::<String>::new());
    }
}

/// Caught: each of the two syncs of a copy without its maintenance.
#[test]
fn without_a_sync_a_device_that_does_not_snoop_and_the_cpu_see_the_past_on_every_backend() {
    for kind in 0..KINDS {
        let machine = Machine::new(kind, false);
        let mapped = machine.device.map::<Bidirectional, _>(machine.buffer(2)).unwrap();
        machine.write_at(&mapped, 5000, b"device");
        assert_eq!(mapped.view().read_array::<6>(5000).unwrap(), [0; 6], "{kind}");
        mapped.sync_for_cpu(0, 4096).unwrap();
        assert_eq!(mapped.view().read_array::<6>(5000).unwrap(), [0; 6], "{kind}");
        mapped.sync_for_cpu(5000, 6).unwrap();
        assert_eq!(&mapped.view().read_array::<6>(5000).unwrap(), b"device", "{kind}");
        mapped.view().write(100, b"cpu").unwrap();
        assert_eq!(machine.read_at(&mapped, 100, 3), [0; 3], "{kind}");
        mapped.sync_for_device(4096, 4096).unwrap();
        assert_eq!(machine.read_at(&mapped, 100, 3), [0; 3], "{kind}");
        mapped.sync_for_device(100, 3).unwrap();
        assert_eq!(machine.read_at(&mapped, 100, 3), b"cpu", "{kind}");
    }
}

/// Caught: `Windows::segments` and `Direct::near`, each without the window's bus address.
#[test]
fn physical_2_gib_is_exactly_1_gib_to_the_device_in_every_window_it_has() {
    let memory = memory_at(0x8000_0000, true);
    let windows = [window(0x8000_0000, 0x10_0000, 0x4000_0000), window(0x8010_0000, 0x10_0000, 0x9000_0000)];
    let (device, _) = direct(memory, &windows, Limits::NONE, Bounce::Never);
    let first = device.map::<ToDevice, _>(dma::Pages::zeroed(memory, 4096).unwrap()).unwrap();
    assert_eq!(first.iova(), Iova::new(0x4000_0000));
    let request = PageRequest { align: 0x10_0000, ..PageRequest::anywhere(4096) };
    let second = device.map::<ToDevice, _>(dma::Pages::allocate(memory, request).unwrap()).unwrap();
    assert_eq!(second.iova(), Iova::new(0x9000_0000));
    assert_eq!((device.copies(), device.is_isolated()), (0, false));
}
