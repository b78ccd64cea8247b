//! Random histories of loans of every kind side by side, on a bus that does not snoop: whatever one side wrote the other reads, if
//! each is synced as its kind says, and nothing else changes. A sync that does less reads stale bytes here.

use crate::backends::restricted;
use base::Deadline;
use core::mem;
use dma::fakes::{FakeDevice, FakeSystem};
use dma::{
    Attachment, Bidirectional, Bounce, Bytes, CpuWrites, DeviceReads, DeviceWrites, Direction, FromDevice, Gather,
    Ladder, Lapsing, Lent, Limits, Linked, Mapped, MappedBytes, MappedList, PageSet, Pages, Placement, Policy,
    PoolSource, Reservation, SharedBuffer, Strictness, ToDevice, slice,
};
use proptest::prelude::*;

const PAGE: u64 = 4096;
/// Bytes of a reservation.
const ROOM: u64 = 1 << 20;

/// A loan of one kind.
enum Loan<D: Direction> {
    Mapped(Mapped<D, PageSet>),
    List(MappedList<D, Pages>),
    Linked(Linked<D, Pages>),
    Shared(SharedBuffer, Attachment<D>),
    Bytes(MappedBytes<D>),
}

/// How a mapping is ended, where there is more than one way.
#[derive(Clone, Copy, Debug)]
enum End {
    Strictly,
    Together,
    Lazily,
}

fn read_set(set: &PageSet) -> Vec<u8> {
    set.chunks().flatten().copied().collect()
}

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

impl<D: Direction> Loan<D> {
    /// Lends bytes that are all `fill`. `None` where the device cannot have this kind.
    fn new(world: &World, kind: u8, pages: u64, fill: u8) -> Option<Self> {
        let (device, memory) = (&world.device.device, world.system.memory);
        let filled = |bytes| {
            let mut pages = device.pages(bytes).unwrap();
            pages.as_mut_slice().fill(fill);
            pages
        };
        let set = || {
            let mut set = PageSet::zeroed(memory, pages * PAGE, Ladder::SINGLE_PAGES).unwrap();
            set.chunks_mut().for_each(|chunk| chunk.fill(fill));
            set
        };
        Some(match kind {
            0 => Self::Mapped(device.map(set()).unwrap()),
            1 => {
                let mut list = device.scatter_list(2).unwrap();
                list.push_part(filled(pages * PAGE), 100, pages * PAGE - 100).unwrap();
                list.push_part(filled(2 * PAGE), PAGE + 64, 999).unwrap();
                Self::List(device.map_list(list).unwrap())
            }
            2 => {
                let reservation = world.reservation.as_ref()?;
                let free = (0..ROOM / PAGE).find_map(|at| {
                    let at = at * 5 * PAGE % ROOM;
                    reservation.link(at, filled(pages * PAGE)).ok()
                });
                Self::Linked(free?)
            }
            3 => {
                let shared = SharedBuffer::new("shared", set());
                let attachment = shared.attach(device).unwrap();
                Self::Shared(shared, attachment)
            }
            _ => {
                // The bytes beside them are another's.
                let part = Bytes::cut(filled(pages * PAGE), &[70, pages * PAGE - 900]).unwrap().pop().unwrap();
                Self::Bytes(device.map_bytes(part).unwrap())
            }
        })
    }

    fn lent(&self) -> &dyn Lent {
        match self {
            Self::Mapped(loan) => loan,
            Self::List(loan) => loan,
            Self::Linked(loan) => loan,
            Self::Shared(_, loan) => loan,
            Self::Bytes(loan) => loan,
        }
    }

    /// Ends it, and says what it contains then.
    fn end(self, end: End) -> Vec<u8> {
        let parts = |pages: dma::ScatterList<Pages>| {
            let mut all = vec![0; pages.len() as usize];
            pages.read_at(0, &mut all).unwrap();
            all
        };
        match (self, end) {
            (Self::Mapped(loan), End::Strictly) => read_set(&loan.unmap().unwrap()),
            (Self::Mapped(loan), End::Together) => read_set(&alone(loan)),
            (Self::Mapped(loan), End::Lazily) => {
                let token: Lapsing<D, PageSet> = loan.unmap_lazy();
                read_set(&token.take(soon()).unwrap())
            }
            (Self::List(loan), End::Together) => parts(alone(loan)),
            (Self::List(loan), _) => parts(loan.unmap().unwrap()),
            (Self::Linked(loan), End::Together) => alone(loan).as_slice().to_vec(),
            (Self::Linked(loan), _) => loan.unlink().unwrap().as_slice().to_vec(),
            (Self::Shared(shared, loan), end) => {
                match end {
                    End::Together => alone(loan),
                    _ => loan.detach().unwrap(),
                }
                read_set(&shared.into_pages().unwrap())
            }
            (Self::Bytes(loan), _) => loan.unmap().unwrap().as_slice().to_vec(),
        }
    }
}

impl<D: DeviceReads> Loan<D> {
    fn cpu_writes(&self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        match self {
            Self::Mapped(loan) => {
                loan.view().write(offset, data).and_then(|()| loan.sync_for_device(offset, len)).unwrap();
            }
            Self::List(loan) => {
                loan.view().write(offset, data).and_then(|()| loan.sync_for_device(offset, len)).unwrap();
            }
            Self::Linked(loan) => {
                loan.view().write(offset, data).and_then(|()| loan.sync_for_device(offset, len)).unwrap();
            }
            Self::Shared(shared, loan) => {
                shared.cpu_access::<CpuWrites>().unwrap().write_at(offset, data).unwrap();
                loan.sync_for_device(offset, len).unwrap();
            }
            Self::Bytes(loan) => {
                loan.view().write(offset, data).and_then(|()| loan.sync_for_device(offset, len)).unwrap();
            }
        }
    }
}

impl<D: DeviceWrites> Loan<D> {
    fn cpu_reads(&self, offset: u64, to: &mut [u8]) -> bool {
        let len = to.len() as u64;
        match self {
            Self::Mapped(loan) => loan.sync_for_cpu(offset, len).and_then(|()| loan.view().read(offset, to)).unwrap(),
            Self::List(loan) => loan.sync_for_cpu(offset, len).and_then(|()| loan.view().read(offset, to)).unwrap(),
            Self::Linked(loan) => loan.sync_for_cpu(offset, len).and_then(|()| loan.view().read(offset, to)).unwrap(),
            Self::Bytes(loan) => loan.sync_for_cpu(offset, len).and_then(|()| loan.view().read(offset, to)).unwrap(),
            // The CPU has no access while a device may write.
            Self::Shared(..) => return false,
        }
        true
    }
}

/// Ends a loan in a gather.
fn alone<L: dma::Endable>(loan: L) -> L::Back {
    let mut gather = Gather::<L, 1>::new();
    assert!(gather.push(loan).is_ok());
    gather.finish().next().unwrap().unwrap()
}

enum Any {
    To(Loan<ToDevice>),
    From(Loan<FromDevice>),
    Both(Loan<Bidirectional>),
}

struct Live {
    loan: Any,
    contents: Vec<u8>,
}

struct World {
    system: FakeSystem,
    device: FakeDevice,
    reservation: Option<Reservation>,
    live: Vec<Live>,
}

#[derive(Clone, Debug)]
enum Step {
    Lend { kind: u8, direction: u8, pages: u64, fill: u8 },
    End { which: usize, end: End },
    DeviceWrites { which: usize, at: (usize, usize), byte: u8 },
    DeviceReads { which: usize, at: (usize, usize) },
    CpuWrites { which: usize, at: (usize, usize), byte: u8 },
    CpuReads { which: usize, at: (usize, usize) },
}

fn step() -> impl Strategy<Value = Step> {
    let which = any::<usize>;
    let at = || (any::<usize>(), 1..5000_usize);
    let end = prop_oneof![Just(End::Strictly), Just(End::Together), Just(End::Lazily)];
    prop_oneof![
        3 => (0..5_u8, 0..3_u8, 1..5_u64, any::<u8>())
            .prop_map(|(kind, direction, pages, fill)| Step::Lend { kind, direction, pages, fill }),
        2 => (which(), end).prop_map(|(which, end)| Step::End { which, end }),
        4 => (which(), at(), any::<u8>()).prop_map(|(which, at, byte)| Step::DeviceWrites { which, at, byte }),
        4 => (which(), at()).prop_map(|(which, at)| Step::DeviceReads { which, at }),
        4 => (which(), at(), any::<u8>()).prop_map(|(which, at, byte)| Step::CpuWrites { which, at, byte }),
        4 => (which(), at()).prop_map(|(which, at)| Step::CpuReads { which, at }),
    ]
}

impl World {
    fn new(bounce: u8) -> Self {
        let system = FakeSystem::non_coherent();
        let bounce = match bounce {
            0 => Bounce::default(),
            1 => Bounce::Always(PoolSource::Own(2 << 20)),
            _ => Bounce::Restricted(restricted(&system, 4 << 20)),
        };
        // Links are never copied.
        let links = !matches!(bounce, Bounce::Always(_));
        let device = system.device_with_policy("kinds", Limits::NONE, Policy { bounce, trusted: false }).unwrap();
        device.device.set_strictness(Strictness::Relaxed);
        let reservation = links.then(|| device.device.reserve(ROOM, Placement::Anywhere).unwrap());
        Self { system, device, reservation, live: Vec::new() }
    }

    fn lend(&mut self, kind: u8, direction: u8, pages: u64, fill: u8) {
        let loan = match direction {
            0 => Loan::new(self, kind, pages, fill).map(Any::To),
            1 => Loan::new(self, kind, pages, fill).map(Any::From),
            _ => Loan::new(self, kind, pages, fill).map(Any::Both),
        };
        let Some(loan) = loan else { return };
        let len = lent(&loan).len() as usize;
        self.live.push(Live { loan, contents: vec![fill; len] });
    }

    fn finish(mut self, end: End) {
        for live in mem::take(&mut self.live) {
            live.end(end);
        }
        assert_eq!((self.device.device.stats().live_mappings, self.system.memory.violations()), (0, Vec::new()));
    }

    fn run(&mut self, step: Step) {
        let master = self.device.master.clone();
        match step {
            Step::Lend { kind, direction, pages, fill } => self.lend(kind, direction, pages, fill),
            Step::End { which, end } if !self.live.is_empty() => {
                self.live.swap_remove(which % self.live.len()).end(end);
            }
            Step::DeviceWrites { which, at, byte } if !self.live.is_empty() => {
                let index = which % self.live.len();
                let live = &mut self.live[index];
                let (offset, len) = live.part(at);
                let allowed = !matches!(live.loan, Any::To(_));
                for segment in slice(lent(&live.loan), offset as u64, len as u64).unwrap() {
                    let result = master.write(segment.iova, &vec![byte; segment.len as usize]);
                    assert_eq!(result.is_ok(), allowed);
                }
                if allowed {
                    live.contents[offset..offset + len].fill(byte);
                }
            }
            Step::DeviceReads { which, at } if !self.live.is_empty() => {
                let live = &self.live[which % self.live.len()];
                let (offset, len) = live.part(at);
                let mut at = offset;
                for segment in slice(lent(&live.loan), offset as u64, len as u64).unwrap() {
                    let mut seen = vec![0; segment.len as usize];
                    let result = master.read(segment.iova, &mut seen);
                    assert_eq!(result.is_ok(), !matches!(live.loan, Any::From(_)));
                    if result.is_ok() {
                        assert!(seen == live.contents[at..at + seen.len()], "the device reads what is stale");
                    }
                    at += seen.len();
                }
                assert_eq!(at, offset + len);
            }
            Step::CpuWrites { which, at, byte } if !self.live.is_empty() => {
                let index = which % self.live.len();
                let live = &mut self.live[index];
                let (offset, len) = live.part(at);
                let data = vec![byte; len];
                match &live.loan {
                    Any::To(loan) => loan.cpu_writes(offset as u64, &data),
                    // The device may have written to the lines that it shares: its data first.
                    Any::Both(loan) if loan.cpu_reads(offset as u64, &mut vec![0; len]) => {
                        loan.cpu_writes(offset as u64, &data);
                    }
                    _ => return,
                }
                live.contents[offset..offset + len].fill(byte);
            }
            Step::CpuReads { which, at } if !self.live.is_empty() => {
                let live = &self.live[which % self.live.len()];
                let (offset, len) = live.part(at);
                let mut seen = vec![0; len];
                let read = match &live.loan {
                    Any::To(_) => false,
                    Any::From(loan) => loan.cpu_reads(offset as u64, &mut seen),
                    Any::Both(loan) => loan.cpu_reads(offset as u64, &mut seen),
                };
                assert!(!read || seen == live.contents[offset..offset + len], "the CPU reads what is stale");
            }
            _ => {}
        }
    }
}

fn lent(loan: &Any) -> &dyn Lent {
    match loan {
        Any::To(loan) => loan.lent(),
        Any::From(loan) => loan.lent(),
        Any::Both(loan) => loan.lent(),
    }
}

impl Live {
    /// A part of it.
    fn part(&self, (offset, len): (usize, usize)) -> (usize, usize) {
        let offset = offset % self.contents.len();
        (offset, len.min(self.contents.len() - offset))
    }

    fn end(self, end: End) {
        // Of a list, the parts alone are compared; of bytes, these.
        let back = match self.loan {
            Any::To(loan) => loan.end(end),
            Any::From(loan) => loan.end(end),
            Any::Both(loan) => loan.end(end),
        };
        assert!(back == self.contents, "what comes back is stale");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    /// Caught: a view of a list that does not look at the copy that the device has.
    #[test]
    fn loans_of_every_kind_are_as_fresh_as_their_syncs_say(
        steps in prop::collection::vec(step(), 1..80),
        bounce in 0..3_u8,
        last in prop_oneof![Just(End::Strictly), Just(End::Together), Just(End::Lazily)],
    ) {
        let mut world = World::new(bounce);
        for step in steps {
            world.run(step);
        }
        world.finish(last);
    }
}
