//! Random histories against a model: at every moment the device reaches what is lent at that moment, with the rights of its
//! direction, and nothing else; and whatever either side wrote arrives. Also where the device gets copies.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{Bidirectional, Bounce, Error, FromDevice, Ladder, Limits, Mapped, PageSet, Policy, PoolSource, ToDevice};
use iommu::Iova;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Map { direction: u8, pages: u64, fill: u8 },
    Unmap { which: usize },
    Drop { which: usize },
    DeviceWrites { which: usize, page: i64, offset: u64, len: usize, byte: u8 },
    DeviceReads { which: usize, page: i64, offset: u64, len: usize },
    CpuWrites { which: usize, offset: u64, len: usize, byte: u8 },
    CpuReads { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (which, page, offset, len) = (any::<usize>(), -2..12_i64, 0..4096_u64, 1..6000_usize);
    prop_oneof![
        3 => (0..3_u8, 1..9_u64, any::<u8>()).prop_map(|(direction, pages, fill)| Step::Map { direction, pages, fill }),
        2 => which.prop_map(|which| Step::Unmap { which }),
        1 => any::<usize>().prop_map(|which| Step::Drop { which }),
        4 => (any::<usize>(), page.clone(), offset.clone(), len.clone(), any::<u8>())
            .prop_map(|(which, page, offset, len, byte)| Step::DeviceWrites { which, page, offset, len, byte }),
        4 => (any::<usize>(), page, offset.clone(), len.clone())
            .prop_map(|(which, page, offset, len)| Step::DeviceReads { which, page, offset, len }),
        2 => (any::<usize>(), 0..40_000_u64, len, any::<u8>())
            .prop_map(|(which, offset, len, byte)| Step::CpuWrites { which, offset, len, byte }),
        1 => any::<usize>().prop_map(|which| Step::CpuReads { which }),
    ]
}

enum Any {
    To(Mapped<ToDevice, PageSet>),
    From(Mapped<FromDevice, PageSet>),
    Both(Mapped<Bidirectional, PageSet>),
}

struct Live {
    mapped: Any,
    iova: u64,
    contents: Vec<u8>,
}

impl Live {
    fn rights(&self) -> (bool, bool) {
        match self.mapped {
            Any::To(_) => (true, false),
            Any::From(_) => (false, true),
            Any::Both(_) => (true, true),
        }
    }

    fn unmap(self) -> (PageSet, Vec<u8>) {
        let set = match self.mapped {
            Any::To(mapped) => mapped.unmap(),
            Any::From(mapped) => mapped.unmap(),
            Any::Both(mapped) => mapped.unmap(),
        };
        (set.unwrap(), self.contents)
    }
}

struct World {
    system: FakeSystem,
    device: FakeDevice,
    live: Vec<Live>,
    /// Every address that was ever lent.
    seen: Vec<u64>,
}

impl World {
    fn new(system: FakeSystem, bounce: u8) -> Self {
        let bounce = match bounce {
            0 => Bounce::default(),
            1 => Bounce::Always(PoolSource::Own(4 << 20)),
            _ => Bounce::Restricted(crate::backends::restricted(&system, 4 << 20)),
        };
        let policy = Policy { bounce, trusted: false };
        let device = system.device_with_policy("model", Limits::NONE, policy).unwrap();
        Self { system, device, live: Vec::new(), seen: vec![0x1000] }
    }

    /// The mapping that has the byte at `address` and gives the asked right, and the byte's place in it.
    fn find(&self, address: u64, write: bool) -> Option<(usize, usize)> {
        self.live.iter().enumerate().find_map(|(index, live)| {
            let offset = address.checked_sub(live.iova)?;
            let right = if write { live.rights().1 } else { live.rights().0 };
            (right && offset < live.contents.len() as u64).then_some((index, offset as usize))
        })
    }

    /// The bytes from `address` on that the device reaches before the first page that it does not.
    fn reach(&self, address: u64, len: usize, write: bool) -> Vec<(usize, usize)> {
        (address..address + len as u64).map_while(|at| self.find(at, write)).collect()
    }

    fn target(&self, which: usize, page: i64, offset: u64) -> u64 {
        let base = self.seen[which % self.seen.len()];
        base.saturating_add_signed(page * 4096) + offset
    }

    fn map(&mut self, direction: u8, pages: u64, fill: u8) {
        let mut set = PageSet::zeroed(self.system.memory, pages * 4096, Ladder::SINGLE_PAGES).unwrap();
        set.chunks_mut().for_each(|chunk| chunk.fill(fill));
        let device = &self.device.device;
        let (mapped, iova) = match direction {
            0 => device.map(set).map(|mapped| (mapped.iova(), Any::To(mapped))),
            1 => device.map(set).map(|mapped| (mapped.iova(), Any::From(mapped))),
            _ => device.map(set).map(|mapped| (mapped.iova(), Any::Both(mapped))),
        }
        .map(|(iova, mapped)| (mapped, iova.get()))
        .unwrap();
        for other in &self.live {
            assert!(iova + pages * 4096 <= other.iova || other.iova + other.contents.len() as u64 <= iova);
        }
        self.seen.push(iova);
        self.live.push(Live { mapped, iova, contents: vec![fill; (pages * 4096) as usize] });
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Map { direction, pages, fill } => self.map(direction, pages, fill),
            Step::Unmap { which } if !self.live.is_empty() => {
                let (set, contents) = self.live.swap_remove(which % self.live.len()).unmap();
                assert!(set.chunks().flatten().eq(&contents), "contents after unmap");
            }
            Step::Drop { which } if !self.live.is_empty() => drop(self.live.swap_remove(which % self.live.len())),
            Step::DeviceWrites { which, page, offset, len, byte } => {
                let at = self.target(which, page, offset);
                let reached = self.reach(at, len, true);
                let result = self.device.master.write(Iova::new(at), &vec![byte; len]);
                assert_eq!(result.is_ok(), reached.len() == len, "write of {len:#x} at {at:#x}");
                for (index, offset) in reached {
                    self.live[index].contents[offset] = byte;
                }
            }
            Step::DeviceReads { which, page, offset, len } => {
                let at = self.target(which, page, offset);
                self.publish();
                let reached = self.reach(at, len, false);
                let mut seen = vec![0; len];
                let result = self.device.master.read(Iova::new(at), &mut seen);
                assert_eq!(result.is_ok(), reached.len() == len, "read of {len:#x} at {at:#x}");
                for (seen, (index, offset)) in seen.iter().zip(reached) {
                    assert_eq!(*seen, self.live[index].contents[offset]);
                }
            }
            Step::CpuWrites { which, offset, len, byte } if !self.live.is_empty() => {
                let index = which % self.live.len();
                let live = &mut self.live[index];
                let data = vec![byte; len];
                let result = match &live.mapped {
                    Any::To(mapped) => mapped.view().write(offset, &data),
                    // The device may have written: its data first, then ours.
                    Any::Both(mapped) => mapped
                        .sync_for_cpu(offset, len as u64)
                        .and_then(|()| mapped.view().write(offset, &data))
                        .and_then(|()| mapped.sync_for_device(offset, len as u64)),
                    Any::From(_) => return,
                };
                let end = offset as usize + len;
                match live.contents.get_mut(offset as usize..end) {
                    Some(contents) => {
                        result.unwrap();
                        contents.fill(byte);
                    }
                    None => assert!(matches!(result, Err(Error::OutOfRange { .. }))),
                }
            }
            Step::CpuReads { which } if !self.live.is_empty() => {
                let live = &self.live[which % self.live.len()];
                let mut seen = vec![0; live.contents.len()];
                let len = seen.len() as u64;
                match &live.mapped {
                    Any::From(mapped) => {
                        mapped.sync_for_cpu(0, len).and_then(|()| mapped.view().read(0, &mut seen)).unwrap();
                    }
                    Any::Both(mapped) => {
                        mapped.sync_for_cpu(0, len).and_then(|()| mapped.view().read(0, &mut seen)).unwrap();
                    }
                    Any::To(_) => return,
                }
                assert!(seen == live.contents, "contents through a view");
            }
            _ => {}
        }
    }

    /// Hands over what the CPU wrote to what the device only reads.
    fn publish(&self) {
        for live in &self.live {
            if let Any::To(mapped) = &live.mapped {
                mapped.sync_for_device(0, mapped.len()).unwrap();
            }
        }
    }

    fn finish(mut self, before: usize) {
        let live = self.live.len() as u64;
        assert_eq!(self.device.device.stats().live_mappings, live);
        while let Some(live) = self.live.pop() {
            let (set, contents) = live.unmap();
            assert!(set.chunks().flatten().eq(&contents), "contents at the end");
        }
        assert_eq!(self.device.device.stats().live_bytes, 0);
        // A pool of the device's own goes with it.
        drop(self.device);
        assert_eq!(self.system.memory.live_allocations(), before);
        assert_eq!(self.system.memory.violations(), Vec::<String>::new());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    /// Caught: an unmap that revokes the first page only; a map that always lets the device write; `Held::lend` without
    /// `prepare`; `Held::end` without `fetch`.
    #[test]
    fn the_device_reaches_what_is_lent_and_all_data_arrives(
        steps in prop::collection::vec(step(), 1..120),
        snooped in any::<bool>(),
        bounce in 0..3_u8,
    ) {
        let mut world = World::new(if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() }, bounce);
        let before = world.system.memory.live_allocations();
        for step in steps {
            world.run(step);
        }
        world.finish(before);
    }
}
