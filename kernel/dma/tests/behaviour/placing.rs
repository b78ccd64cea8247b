//! What is placed in an owned domain again and again, over real tables: the short way by anchors refuses, waits and takes away as the
//! general way does.
//!
//! [`FakeIommu::maps`](dma::fakes::FakeIommu::maps) counts what went the general way.

use dma::fakes::{FakeDevice, FakeMemory, FakeSystem};
use dma::{Bidirectional, Error, OwnedDomain, PageRequest, Pages, Placed, ToDevice};
use iommu::{Iova, IovaError, IovaRange, PAGE_SIZE, PhysRange, Prot};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const AT: u64 = 64 * MIB;
const GROUP: u64 = 16 * PAGE_SIZE;
const BLOCK: u64 = 2 * MIB;

/// Aligned for one leaf.
fn pages(memory: &'static FakeMemory, len: u64, fill: u8) -> Pages {
    let align = 1 << len.ilog2();
    let mut pages = Pages::allocate(memory, PageRequest { align, ..PageRequest::anywhere(len) }).unwrap();
    pages.as_mut_slice().fill(fill);
    pages
}

fn byte(device: &FakeDevice, at: u64) -> Option<u8> {
    let mut byte = [0];
    device.master.read(Iova::new(at), &mut byte).ok().map(|()| byte[0])
}

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

fn place(
    domain: &OwnedDomain,
    memory: &'static FakeMemory,
    at: u64,
    len: u64,
    fill: u8,
) -> Option<Placed<Bidirectional, Pages>> {
    match domain.map_owned(Iova::new(at), pages(memory, len, fill)) {
        Ok(placed) => Some(placed),
        Err(rejected) => {
            assert_eq!(rejected.error, Error::Iova(IovaError::InUse(range(at, len))));
            assert!(rejected.buffer.as_slice().iter().all(|byte| *byte == fill), "the buffer comes back as it was");
            None
        }
    }
}

/// Places something at `at` and takes it away, until that goes by an anchor.
fn remember(domain: &OwnedDomain, system: &FakeSystem, at: u64, len: u64) {
    for _ in 0..64 {
        let before = system.iommu.maps();
        place(domain, system.memory, at, len, 0).unwrap().unmap().unwrap();
        if system.iommu.maps() == before {
            return;
        }
    }
    panic!("{at:#x} is never remembered");
}

/// Red when an anchor's revocation cleared nothing, or was taken for done without the IOMMU.
#[test]
fn what_is_placed_again_goes_a_shorter_way_to_the_same_end() {
    for len in [PAGE_SIZE, GROUP, BLOCK] {
        let system = FakeSystem::with_tables();
        let device = system.device("device").unwrap();
        let domain = OwnedDomain::new("own", &device.device).unwrap();
        let attachment = domain.attach(&device.device).unwrap();
        for fill in 1..6 {
            let placed = domain.map_owned::<ToDevice, _>(Iova::new(AT), pages(system.memory, len, fill)).unwrap();
            assert_eq!([AT, AT + len - 1].map(|at| byte(&device, at)), [Some(fill); 2]);
            assert_eq!((byte(&device, AT - 1), byte(&device, AT + len)), (None, None));
            assert!(device.master.write(Iova::new(AT), &[9]).is_err(), "it was placed to be read");
            let revocations = system.iommu.revocations();
            assert_eq!(placed.unmap().unwrap().as_slice()[0], fill);
            assert_eq!(system.iommu.revocations(), revocations + 1);
            assert_eq!([AT, AT + len - 1].map(|at| byte(&device, at)), [None; 2]);
            assert_eq!(domain.iova_to_phys(Iova::new(AT)), None);
            assert_eq!(system.iommu.maps(), 1, "only the first has no table");
        }
        drop((attachment, domain));
        assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
    }
}

/// Red when an anchor did not look at what is mapped.
#[test]
#[expect(unsafe_code, reason = "maps raw memory")]
fn a_range_that_is_remembered_is_refused_while_anything_is_mapped_in_it() {
    let system = FakeSystem::with_tables();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let inner = AT + GROUP - PAGE_SIZE;
    for (at, len) in [(AT, GROUP), (inner, PAGE_SIZE)] {
        remember(&domain, &system, at, len);
    }
    // By its own anchor, and by the other's.
    let group = place(&domain, system.memory, AT, GROUP, 1).unwrap();
    assert!(place(&domain, system.memory, AT, GROUP, 2).is_none());
    assert!(place(&domain, system.memory, inner, PAGE_SIZE, 2).is_none());
    assert_eq!((byte(&device, AT), byte(&device, inner)), (Some(1), Some(1)));
    group.unmap().unwrap();
    let page = place(&domain, system.memory, inner, PAGE_SIZE, 3).unwrap();
    assert!(place(&domain, system.memory, AT, GROUP, 4).is_none());
    assert_eq!((byte(&device, AT), byte(&device, inner)), (None, Some(3)));
    page.unmap().unwrap();
    // By what is no buffer.
    let kept = pages(system.memory, PAGE_SIZE, 5);
    let run: PhysRange = kept.phys_runs()[0];
    // SAFETY: the device of this test reads only, and `kept` outlives the mapping.
    unsafe { domain.map_raw(range(inner, PAGE_SIZE), &[run], Prot::READ) }.unwrap();
    assert!(place(&domain, system.memory, inner, PAGE_SIZE, 6).is_none());
    assert!(place(&domain, system.memory, AT, GROUP, 6).is_none());
    assert_eq!(byte(&device, inner), Some(5));
    domain.unmap(range(inner, PAGE_SIZE)).unwrap();
    // Where a table has come to be, pages take a block's place.
    remember(&domain, &system, AT + BLOCK, BLOCK);
    let page =
        place(&domain, system.memory, AT + BLOCK + PAGE_SIZE, PAGE_SIZE, 7).unwrap_or_else(|| panic!("it is free"));
    assert!(place(&domain, system.memory, AT + BLOCK, BLOCK, 8).is_none());
    page.unmap().unwrap();
    let block = place(&domain, system.memory, AT + BLOCK, BLOCK, 8).unwrap();
    assert_eq!(byte(&device, AT + BLOCK + PAGE_SIZE), Some(8));
    block.unmap().unwrap();
    assert_eq!(byte(&device, AT + BLOCK + PAGE_SIZE), None);
    drop((attachment, domain, kept));
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

/// Red when a failed revocation by an anchor was not noted, and when a remembered range was not looked for among what was lost.
#[test]
fn a_remembered_range_whose_revocation_failed_is_never_used_again() {
    let system = FakeSystem::with_tables();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let inner = AT + 3 * PAGE_SIZE;
    for (at, len) in [(AT, GROUP), (inner, PAGE_SIZE), (AT + GROUP, PAGE_SIZE)] {
        remember(&domain, &system, at, len);
    }
    let maps = system.iommu.maps();
    let placed = place(&domain, system.memory, AT, GROUP, 1).unwrap();
    assert_eq!((byte(&device, inner), system.iommu.maps()), (Some(1), maps));
    system.iommu.wedge(true);
    let lost = placed.unmap().unwrap_err();
    assert!(lost.to_string().contains("own") && lost.to_string().contains("placing.rs"), "{lost}");
    system.iommu.wedge(false);
    // The device still has its translation, and nobody has the memory.
    assert_eq!((byte(&device, inner), system.memory.live_allocations()), (Some(1), 1));
    for (at, len) in [(AT, GROUP), (inner, PAGE_SIZE), (AT, BLOCK)] {
        assert!(place(&domain, system.memory, at, len, 2).is_none(), "{at:#x} {len:#x}");
    }
    let beside = place(&domain, system.memory, AT + GROUP, PAGE_SIZE, 3).unwrap();
    assert_eq!((byte(&device, AT + GROUP), system.iommu.maps()), (Some(3), maps));
    drop((beside, attachment));
    assert_eq!(system.memory.violations().len(), 0);
}

/// Red when a mapping by an anchor did not wait for the revocations in its range.
#[test]
fn what_is_placed_by_an_anchor_where_a_revocation_is_under_way_counts_when_that_is_complete() {
    // A page of a group: by an anchor that is remembered, by one that is made, and, where that is with the other guard, in the general
    // way.
    for (at, remembered, general) in [(AT + PAGE_SIZE, true, 0), (AT + PAGE_SIZE, false, 0), (AT, true, 1)] {
        let system = FakeSystem::with_tables();
        let device = system.device("device").unwrap();
        let domain = OwnedDomain::new("own", &device.device).unwrap();
        let attachment = domain.attach(&device.device).unwrap();
        if remembered {
            remember(&domain, &system, at, PAGE_SIZE);
        }
        remember(&domain, &system, AT, GROUP);
        let (old, maps) = (place(&domain, system.memory, AT, GROUP, 1).unwrap(), system.iommu.maps());
        assert_eq!(byte(&device, at), Some(1));
        let (new, waited) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(false)));
        let hook = {
            let (domain, new, waited) = (domain.clone(), new.clone(), waited.clone());
            let buffer = Mutex::new(Some(pages(system.memory, PAGE_SIZE, 2)));
            move |_| {
                let Some(buffer) = buffer.lock().unwrap().take() else { return };
                let placed = Arc::new(AtomicBool::new(false));
                let (domain, flag) = (domain.clone(), placed.clone());
                *new.lock().unwrap() = Some(thread::spawn(move || {
                    let placed = domain.map_owned::<Bidirectional, _>(Iova::new(at), buffer).unwrap();
                    flag.store(true, Ordering::SeqCst);
                    placed
                }));
                // So that one which does not wait is seen not to; whoever does may take as long.
                thread::sleep(Duration::from_millis(20));
                waited.store(!placed.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        };
        system.iommu.on_clear(hook);
        old.unmap().unwrap();
        assert!(waited.load(Ordering::SeqCst), "a device was still sent to the old memory");
        let new = new.lock().unwrap().take().unwrap().join().unwrap();
        assert_eq!((byte(&device, at), system.iommu.maps()), (Some(2), maps + general));
        new.unmap().unwrap();
        system.iommu.on_clear(|_| ());
        drop((attachment, domain));
        assert_eq!(system.memory.violations().len(), 0);
    }
}

/// Red when a place was never given to another, when what had no place went by the anchor of the one that had it, when a place kept
/// what a guard had, and when a guard did not give it back.
#[test]
fn ranges_that_share_a_place_take_it_from_each_other_and_are_placed_at_the_same_time() {
    let system = FakeSystem::with_tables();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let ranges = [AT, AT + 64 * PAGE_SIZE, AT + 128 * PAGE_SIZE];
    for at in ranges {
        remember(&domain, &system, at, PAGE_SIZE);
    }
    let all = ranges.map(|at| place(&domain, system.memory, at, PAGE_SIZE, (at / PAGE_SIZE / 64) as u8).unwrap());
    assert_eq!(ranges.map(|at| byte(&device, at)), ranges.map(|at| Some((at / PAGE_SIZE / 64) as u8)));
    all.into_iter().for_each(|placed| drop(placed.unmap().unwrap()));
    assert_eq!(ranges.map(|at| byte(&device, at)), [None; 3]);
    // While a guard has the anchor of a place nobody else gets one for it.
    let guard = place(&domain, system.memory, ranges[2], PAGE_SIZE, 1).unwrap();
    let maps = system.iommu.maps();
    (0..40).for_each(|_| drop(place(&domain, system.memory, ranges[0], PAGE_SIZE, 2).unwrap().unmap().unwrap()));
    assert_eq!((system.iommu.maps(), byte(&device, ranges[2])), (maps + 40, Some(1)));
    guard.unmap().unwrap();
    // A guard that is forgotten keeps what it has, and nothing else.
    std::mem::forget(place(&domain, system.memory, AT + 128 * PAGE_SIZE, PAGE_SIZE, 1).unwrap());
    for at in ranges {
        assert_eq!(place(&domain, system.memory, at, PAGE_SIZE, 1).is_some(), at != AT + 128 * PAGE_SIZE);
    }
    drop(attachment);
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (1, 0));
}

/// Red when what was placed went by the anchor of another range, and when an anchor cleared nothing. (That the turn keeps others out is
/// tested in `iommu::domain::placing`; an anchor cannot be taken without one.)
#[test]
fn owners_on_several_cores_never_have_each_others_memory() {
    let system = FakeSystem::with_tables();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let ranges = [(AT, GROUP), (AT, PAGE_SIZE), (AT + PAGE_SIZE, PAGE_SIZE), (AT + 64 * PAGE_SIZE, PAGE_SIZE)];
    thread::scope(|scope| {
        for thread in 1..5_u8 {
            let (domain, device, memory) = (&domain, &device, system.memory);
            scope.spawn(move || {
                let mut placed = 0;
                for round in 0..100_000 {
                    let (at, len) = ranges[(round * usize::from(thread)) % ranges.len()];
                    let Some(mine) = place(domain, memory, at, len, thread) else { continue };
                    let last = at + len - 1;
                    assert_eq!([at, last].map(|at| byte(device, at)), [Some(thread); 2]);
                    device.master.write(Iova::new(last), &[thread + 10]).unwrap();
                    let back = mine.unmap().unwrap();
                    assert_eq!((back.as_slice()[0], back.as_slice().last()), (thread, Some(&(thread + 10))));
                    placed += 1;
                    if placed == 400 {
                        break;
                    }
                }
                assert_eq!(placed, 400);
            });
        }
    });
    drop((attachment, domain));
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

#[derive(Clone, Debug)]
enum Step {
    Place { at: u64, len: u64 },
    Unmap { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    // Few, so that they come again, share places, and lie in each other.
    let len = prop_oneof![3 => Just(PAGE_SIZE), 2 => Just(GROUP), 1 => Just(BLOCK), 1 => Just(3 * PAGE_SIZE)];
    prop_oneof![
        (0..10_u64, 0..2_u64, len).prop_map(|(page, block, len)| {
            let at = AT
                + block * BLOCK
                + if len == BLOCK { 0 } else { [0, 1, 2, 15, 16, 17, 32, 64, 65, 128][page as usize] * PAGE_SIZE };
            Step::Place { at, len }
        }),
        any::<usize>().prop_map(|which| Step::Unmap { which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_placed_is_what_devices_reach_and_nothing_overlaps(steps in prop::collection::vec(step(), 1..150)) {
        let system = FakeSystem::with_tables();
        let device = system.device("device").unwrap();
        let domain = OwnedDomain::new("own", &device.device).unwrap();
        let attachment = domain.attach(&device.device).unwrap();
        let mut live: Vec<(IovaRange, u8, Placed<Bidirectional, Pages>)> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Place { at, len } => {
                    let (wanted, fill) = (range(at, len), number as u8);
                    let free = live.iter().all(|(other, ..)| !other.overlaps(wanted));
                    let placed = place(&domain, system.memory, at, len, fill);
                    prop_assert_eq!(placed.is_some(), free, "{}", wanted);
                    live.extend(placed.map(|placed| (wanted, fill, placed)));
                }
                Step::Unmap { which } if !live.is_empty() => {
                    let (range, fill, placed) = live.swap_remove(which % live.len());
                    prop_assert_eq!(placed.unmap().unwrap().as_slice()[0], fill);
                    for at in [range.start().get(), range.end().get() - 1] {
                        prop_assert_eq!(byte(&device, at), None);
                    }
                }
                Step::Unmap { .. } => {}
            }
            for (range, fill, _) in &live {
                for at in [range.start().get(), range.end().get() - 1] {
                    prop_assert_eq!(byte(&device, at), Some(*fill));
                }
            }
        }
        drop((live, attachment, domain));
        prop_assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
    }
}
