//! R6: a report says which buffer an address belongs to, who has it or had it, and since when not.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, Bounce, Fate, FromDevice, Limits, Policy, PoolSource, ToDevice};
use iommu::{Iova, IovaRange, PhysAddr, PhysRange, Prot};

#[test]
fn a_live_address_is_explained_with_its_loan_and_its_rights() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let (mapped, line) = (blk.device.map::<ToDevice, _>(blk.device.pages(8192).unwrap()).unwrap(), line!());
    let address = mapped.iova().checked_add(0x1234).unwrap();
    let explanation = blk.device.explain(address);
    let Fate::Live { range, prot, mapped_at } = explanation.fate else { panic!("{explanation}") };
    assert_eq!((range.start(), range.len(), prot), (mapped.iova(), 8192, Prot::READ));
    assert_eq!(mapped_at.unwrap().line(), line);
    let text = explanation.to_string();
    assert!(text.contains("byte 0x1234 of") && text.contains("lent to blk to read only"), "{text}");
    assert!(text.contains(&format!("reports.rs:{line}")), "{text}");
}

/// Caught: records of those devices only that nothing is special about.
#[test]
fn what_a_device_has_a_copy_of_is_on_record() {
    dma::tracker::enable(false);
    let system = FakeSystem::new();
    let policy = Policy { bounce: Bounce::Always(PoolSource::Own(2 << 20)), trusted: false };
    let blk = system.device_with_policy("blk", Limits::NONE, policy).unwrap();
    let mapped = blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    let explanation = blk.device.explain(mapped.iova());
    assert!(blk.device.copies() == 1 && matches!(explanation.fate, Fate::Live { .. }), "{explanation}");
}

/// Caught: `Records::end` that leaves the live record, or writes none into the ring.
#[test]
fn an_address_that_was_unmapped_is_explained_with_who_and_when() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    let iova = mapped.iova();
    let line = line!() + 1;
    mapped.unmap().unwrap();
    let explanation = blk.device.explain(iova.checked_add(0xfff).unwrap());
    let Fate::Ended { range, unmapped_at, .. } = explanation.fate else { panic!("{explanation}") };
    assert_eq!((range.start(), range.len(), unmapped_at.unwrap().line()), (iova, 4096, line));
    let text = explanation.to_string();
    assert!(text.contains("was unmapped ") && text.contains(&format!(" us ago by blk at reports.rs:{line}")), "{text}");
    assert!(matches!(blk.device.explain(iova.checked_add(0x1000).unwrap()).fate, Fate::Unknown { .. }));
}

#[test]
fn an_address_used_again_is_explained_by_its_last_user() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut last = None;
    for _ in 0..5 {
        let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
        last = Some((mapped.iova(), line!() + 1));
        mapped.unmap().unwrap();
    }
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    assert!(matches!(blk.device.explain(mapped.iova()).fate, Fate::Live { .. }));
    let iova = mapped.iova();
    let line = line!() + 1;
    drop(mapped.unmap().unwrap());
    let Fate::Ended { unmapped_at, .. } = blk.device.explain(iova).fate else { panic!() };
    assert_eq!(unmapped_at.unwrap().line(), line);
    assert!(last.is_some());
}

#[test]
fn an_address_that_was_never_mapped_is_explained_by_its_neighbours() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let far = Iova::new(0x7000_0000);
    assert!(blk.device.explain(far).to_string().ends_with("was never mapped for blk; nothing is"));
    let mapped = blk.device.map::<Bidirectional, _>(blk.device.pages(4096).unwrap()).unwrap();
    let past = mapped.iova().checked_add(0x1040).unwrap();
    let text = blk.device.explain(past).to_string();
    assert!(text.contains("was never mapped for blk") && text.ends_with("ends 0x40 below"), "{text}");
    let text = blk.device.explain(Iova::new(mapped.iova().get() - 8)).to_string();
    assert!(text.ends_with("begins 0x8 above"), "{text}");
}

#[test]
fn a_mapping_that_the_dma_api_did_not_make_is_explained_as_such() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let doorbell = IovaRange::new(Iova::new(0x800_0000), 4096).unwrap();
    let run = PhysRange::new(PhysAddr::new(0x808_0000), 4096).unwrap();
    // SAFETY: the fake bus has no memory there.
    unsafe { blk.domain.space().map(doorbell, &[run], Prot::WRITE) }.unwrap();
    let explanation = blk.device.explain(Iova::new(0x800_0040));
    assert_eq!(explanation.fate, Fate::Mapped { to: PhysAddr::new(0x808_0040), prot: Prot::WRITE });
}

#[test]
fn more_loans_than_there_are_places_are_counted_and_still_found_mapped() {
    dma::tracker::enable(false);
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let all: Vec<_> =
        (0..1500).map(|_| blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap()).collect();
    let stats = blk.device.stats();
    assert_eq!(stats.live_mappings, 1500);
    assert!(stats.unrecorded > 0 && stats.unrecorded < 800, "{}", stats.unrecorded);
    let fates = all.iter().map(|mapped| blk.device.explain(mapped.iova()).fate);
    let mut unrecorded = 0;
    for fate in fates {
        match fate {
            Fate::Live { .. } => {}
            Fate::Mapped { .. } => unrecorded += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(unrecorded, stats.unrecorded);
    drop(all);
    let again = blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    assert!(matches!(blk.device.explain(again.iova()).fate, Fate::Live { .. }));
}

/// Caught: `Place::claim` that does not note what it overwrites.
#[test]
fn what_was_forgotten_is_not_called_never() {
    dma::tracker::enable(false);
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let far = Iova::new(0x7000_0000_0000);
    drop(blk.device.map_at::<ToDevice, _>(far, blk.device.pages(4096).unwrap()).unwrap());
    assert!(matches!(blk.device.explain(far).fate, Fate::Ended { .. }));
    // More than there are places: none is left as it was.
    let all: Vec<_> =
        (0..1500).map(|_| blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap()).collect();
    let text = blk.device.explain(far).to_string();
    assert!(text.contains("is not mapped, nor was it lately"), "{text}");
    drop(all);
}

/// The history of an address is lost to another that needs its place, not to time.
#[test]
fn an_address_keeps_its_history_while_others_come_and_go() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    // The others use one address, whose place in the records is another.
    let far = Iova::new(0x7000_0012_3000);
    drop(blk.device.map_at::<ToDevice, _>(far, blk.device.pages(4096).unwrap()).unwrap());
    for _ in 0..1000 {
        drop(blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap());
    }
    assert!(matches!(blk.device.explain(far).fate, Fate::Ended { .. }));
    assert_eq!(blk.device.stats().total_mappings, 1001);
}
