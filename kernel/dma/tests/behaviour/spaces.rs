//! Address spaces that a driver fills by itself, and addresses that it insists on in the DMA-API's.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{Bidirectional, Error, FromDevice, Ladder, Mapped, OwnedDomain, PageSet, Pages, ToDevice};
use iommu::domain::ReservedKind;
use iommu::group::AttachmentState;
use iommu::{AttachError, Iova, IovaError, IovaRange, PAGE_SIZE, PhysRange, Prot};
use proptest::prelude::*;

const AT: Iova = Iova::new(0x10_0000);

fn pages(device: &FakeDevice, fill: u8) -> Pages {
    let mut pages = device.device.pages(PAGE_SIZE).unwrap();
    pages.as_mut_slice().fill(fill);
    pages
}

fn byte(device: &FakeDevice, at: Iova) -> Option<u8> {
    let mut byte = [0];
    device.master.read(at, &mut byte).ok().map(|()| byte[0])
}

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

/// Red when `detach_owned` was left out of the drop of an attachment, and when it blocked instead.
#[test]
fn an_owned_domain_replaces_what_the_dma_api_has_lent_and_its_end_brings_that_back() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let lent: Mapped<ToDevice, Pages> = device.device.map(pages(&device, 1)).unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let placed = domain.map_owned::<Bidirectional, _>(AT, pages(&device, 2)).unwrap();
    assert_eq!((byte(&device, lent.iova()), byte(&device, AT)), (Some(1), None));

    let attachment = domain.attach(&device.device).unwrap();
    assert_eq!((byte(&device, lent.iova()), byte(&device, AT)), (None, Some(2)));
    let refused = device.device.map::<ToDevice, _>(pages(&device, 3)).unwrap_err();
    assert_eq!(refused.error, Error::OwnedDomain("device".into()));
    assert!(device.device.explain(AT).to_string().contains("owned by its driver"));
    device.master.write(AT, &[7]).unwrap();
    let text = format!("{attachment:?} {placed:?}");
    assert!(text.contains("device") && text.contains("own"), "{text}");
    drop(attachment);
    assert_eq!((byte(&device, lent.iova()), byte(&device, AT)), (Some(1), None));
    drop(device.device.map::<ToDevice, _>(pages(&device, 3)).unwrap());
    assert_eq!(placed.unmap().unwrap().as_slice()[..2], [7, 2]);
    lent.unmap().unwrap();
}

/// Red when `end` did not revoke.
#[test]
fn what_was_placed_is_out_of_reach_when_its_guard_is_gone() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let placed = domain.map_owned::<ToDevice, _>(AT, pages(&device, 2)).unwrap();
    assert_eq!(byte(&device, AT), Some(2));
    assert!(device.master.write(AT, &[1]).is_err(), "it was placed to be read");
    drop(placed);
    assert_eq!((byte(&device, AT), domain.iova_to_phys(AT)), (None, None));
    // The place is free again.
    let again = domain.map_owned::<FromDevice, _>(AT, pages(&device, 4)).unwrap();
    device.master.write(AT, &[9]).unwrap();
    assert_eq!(again.view().read_array::<1>(0).unwrap(), [9]);
    drop((again, attachment));
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

#[test]
fn several_devices_share_a_domain_and_others_see_nothing_of_it() {
    let system = FakeSystem::new();
    let [one, two, other] = ["one", "two", "other"].map(|name| system.device(name).unwrap());
    let domain = OwnedDomain::new("shared", &one.device).unwrap();
    let placed = domain.map_owned::<Bidirectional, _>(AT, pages(&one, 5)).unwrap();
    let (first, second) = (domain.attach(&one.device).unwrap(), domain.attach(&two.device).unwrap());
    one.master.write(AT, &[6]).unwrap();
    assert_eq!((byte(&two, AT), byte(&other, AT)), (Some(6), None));
    drop(first);
    assert_eq!((byte(&one, AT), byte(&two, AT)), (None, Some(6)));
    drop(placed);
    assert_eq!(byte(&two, AT), None);
    drop(second);
}

#[test]
fn a_device_has_one_owner_and_only_while_it_is_alone_in_its_group() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let (one, two) =
        (OwnedDomain::new("one", &device.device).unwrap(), OwnedDomain::new("two", &device.device).unwrap());
    let attachment = one.attach(&device.device).unwrap();
    assert_eq!(two.attach(&device.device).unwrap_err(), Error::OwnedDomain("device".into()));
    attachment.detach().unwrap();
    // Another function of the same group comes into use.
    device.group.enter();
    assert_eq!(two.attach(&device.device).unwrap_err(), Error::Attach(AttachError::Shared(2)));
    device.group.leave().unwrap();
    two.attach(&device.device).unwrap().detach().unwrap();
}

#[test]
fn a_swap_under_the_device_shows_one_space_or_the_other() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let spaces = [1, 2].map(|fill| {
        let domain = OwnedDomain::new("swapped", &device.device).unwrap();
        let placed = domain.map_owned::<ToDevice, _>(AT, pages(&device, fill)).unwrap();
        (domain, placed)
    });
    let mut attachment = spaces[0].0.attach(&device.device).unwrap();
    let master = device.master.clone();
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = [0_u64; 3];
            while !done.load(std::sync::atomic::Ordering::Relaxed) || seen[1] == 0 {
                let mut byte = [0];
                // Neither is an error here.
                master.read(AT, &mut byte).unwrap();
                seen[usize::from(byte[0])] += 1;
            }
            seen
        });
        for round in 0..2000 {
            attachment.swap(&spaces[(round + 1) % 2].0).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert_eq!(seen[0], 0);
    drop(attachment);
    assert!(system.iommu.faults().is_empty());
}

/// Red when the end of an attachment took a group out of its blocked state.
#[test]
fn a_device_that_was_contained_under_its_owner_stays_blocked() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let lent: Mapped<ToDevice, Pages> = device.device.map(pages(&device, 1)).unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let mut attachment = domain.attach(&device.device).unwrap();
    device.group.block().unwrap();
    let other = OwnedDomain::new("other", &device.device).unwrap();
    assert_eq!(attachment.swap(&other).unwrap_err(), Error::Attach(AttachError::NotOwned));
    attachment.detach().unwrap();
    assert_eq!((device.group.current(), byte(&device, lent.iova())), (AttachmentState::Blocked, None));
}

#[test]
#[expect(unsafe_code, reason = "maps raw memory and vouches for a fake")]
fn raw_ranges_and_identity_need_a_promise_and_end_as_everything_does() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let target = pages(&device, 8);
    let run: PhysRange = target.phys_runs()[0];
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let at = range(0x20_0000, PAGE_SIZE);
    // SAFETY: the device of this test reads only, and `target` outlives the mapping.
    unsafe { domain.map_raw(at, &[run], Prot::READ) }.unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    assert_eq!(domain.iova_to_phys(at.start()), Some((run.start(), Prot::READ)));
    assert_eq!(byte(&device, at.start()), Some(8));
    let taken = domain.map_owned::<ToDevice, _>(at.start(), pages(&device, 1)).unwrap_err();
    assert_eq!(taken.error, Error::Iova(IovaError::InUse(at)));
    let placed = domain.map_owned::<ToDevice, _>(AT, pages(&device, 1)).unwrap();
    // What was placed is its guard's to end.
    assert_eq!(domain.unmap(placed.range()).unwrap_err(), Error::Iova(IovaError::NotAllocated(placed.range())));
    assert_eq!(byte(&device, AT), Some(1));
    domain.unmap(at).unwrap();
    assert_eq!(domain.unmap(at).unwrap_err(), Error::Iova(IovaError::NotAllocated(at)));
    assert_eq!(byte(&device, at.start()), None);
    drop((placed, attachment));

    // SAFETY: as above.
    let identity = dma::IdentityAttachment::new(&device.device, unsafe { dma::vouch() }).unwrap();
    assert_eq!(byte(&device, Iova::new(run.start().get())), Some(8));
    drop(identity);
    assert_eq!(byte(&device, Iova::new(run.start().get())), None);
    assert_eq!(device.group.current(), AttachmentState::Default);
    drop(target);
    assert_eq!(system.memory.violations().len(), 0);
}

#[test]
fn a_revocation_that_fails_in_an_owned_domain_quarantines_the_pages() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    let placed = domain.map_owned::<Bidirectional, _>(AT, pages(&device, 3)).unwrap();
    assert_eq!(byte(&device, AT), Some(3));
    system.iommu.wedge(true);
    let lost = placed.unmap().unwrap_err();
    assert!(lost.to_string().contains("own") && lost.to_string().contains("spaces.rs"), "{lost}");
    assert_eq!(system.memory.live_allocations(), 1, "the pages stay");
    device.master.write(AT, &[1]).unwrap();
    assert_eq!(system.memory.violations().len(), 0);
    system.iommu.wedge(false);
    drop(attachment);
}

/// Red when `OwnedDomain::new` did not take the fixed mappings over, and when `check` was left out.
#[test]
#[expect(unsafe_code, reason = "maps raw memory")]
fn what_firmware_and_the_board_have_mapped_for_a_device_is_in_its_owned_domains_too() {
    let system = FakeSystem::new();
    let (device, plain) = (system.device("device").unwrap(), system.device("plain").unwrap());
    let kept = pages(&device, 4);
    let run = kept.phys_runs()[0];
    let region = range(run.start().get(), PAGE_SIZE);
    device.domain.reserve(region, ReservedKind::Firmware).unwrap();
    // SAFETY: `kept` outlives the test's accesses.
    unsafe { device.domain.space().map(region, &[run], Prot::READ) }.unwrap();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    let attachment = domain.attach(&device.device).unwrap();
    assert_eq!(byte(&device, region.start()), Some(4));
    let refused = domain.map_owned::<ToDevice, _>(region.start(), pages(&device, 0)).unwrap_err();
    assert_eq!(refused.error, Error::Iova(IovaError::InUse(region)));
    let unfit = domain.attach(&plain.device).unwrap_err();
    assert_eq!(unfit, Error::Unfit { domain: "own".into(), device: "plain".into() });
    let other = OwnedDomain::new("other", &plain.device).unwrap();
    assert!(matches!(other.attach(&device.device), Err(Error::Unfit { .. })));
    drop(attachment);
}

#[test]
fn a_device_that_left_its_group_maps_and_attaches_no_more_while_its_sibling_does() {
    let system = FakeSystem::new();
    let device = system.device("device").unwrap();
    device.group.enter();
    let domain = OwnedDomain::new("own", &device.device).unwrap();
    device.device.shut_down().unwrap();
    assert_eq!(device.group.current(), AttachmentState::Default, "the sibling uses it");
    let refused = device.device.map::<ToDevice, _>(pages(&device, 3)).unwrap_err();
    assert!(matches!(refused.error, Error::NotAttached { state: AttachmentState::Blocked, .. }));
    assert!(matches!(domain.attach(&device.device), Err(Error::NotAttached { .. })));
    assert_eq!(device.group.leave(), Ok(true));
    assert_eq!(device.group.current(), AttachmentState::Blocked);
}

#[derive(Clone, Debug)]
enum Step {
    Map { pages: u64 },
    MapAt { page: u64, pages: u64 },
    Unmap { which: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..5_u64).prop_map(|pages| Step::Map { pages }),
        (0..64_u64, 1..5_u64).prop_map(|(page, pages)| Step::MapAt { page, pages }),
        any::<usize>().prop_map(|which| Step::Unmap { which }),
    ]
}

proptest! {
    /// Red when `map_at` did not reserve its range: the allocator gave the same addresses out.
    #[test]
    fn addresses_that_a_driver_insists_on_and_those_of_the_allocator_never_collide(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let system = FakeSystem::new();
        let device = system.device("device").unwrap();
        let mut live: Vec<(IovaRange, Mapped<Bidirectional, PageSet>)> = Vec::new();
        let buffer = |pages: u64| device.device.page_set(pages * PAGE_SIZE, Ladder::SINGLE_PAGES).unwrap();
        for step in steps {
            match step {
                Step::Map { pages } => {
                    // There is room for all: it never fails, wherever fixed mappings lie.
                    let mapped = device.device.map::<Bidirectional, _>(buffer(pages)).unwrap();
                    let range = range(mapped.iova().get(), pages * PAGE_SIZE);
                    prop_assert!(live.iter().all(|(other, _)| !other.overlaps(range)));
                    live.push((range, mapped));
                }
                Step::MapAt { page, pages } => {
                    let wanted = range(page * PAGE_SIZE, pages * PAGE_SIZE);
                    let free = page != 0 && live.iter().all(|(other, _)| !other.overlaps(wanted));
                    match device.device.map_at::<Bidirectional, _>(wanted.start(), buffer(pages)) {
                        Ok(mapped) => {
                            prop_assert!(free, "{wanted} was not free");
                            prop_assert_eq!(mapped.iova(), wanted.start());
                            live.push((wanted, mapped));
                        }
                        Err(rejected) => prop_assert!(!free, "{wanted}: {}", rejected.error),
                    }
                }
                Step::Unmap { which } if !live.is_empty() => {
                    let (range, mapped) = live.swap_remove(which % live.len());
                    mapped.unmap().unwrap();
                    prop_assert!(device.master.read(range.start(), &mut [0]).is_err());
                }
                Step::Unmap { .. } => {}
            }
            for (number, (range, mapped)) in live.iter().enumerate() {
                device.master.write(range.start(), &[number as u8]).unwrap();
                prop_assert_eq!(mapped.view().read_array::<1>(0).unwrap(), [number as u8]);
            }
        }
        drop(live);
        prop_assert_eq!(system.memory.live_allocations(), 0);
        prop_assert!(system.memory.violations().is_empty());
    }
}
