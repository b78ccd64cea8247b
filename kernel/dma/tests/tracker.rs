//! The debug tracker: every mapping, with its site and age. In a process of its own, because the switch is the system's.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, Fate, FromDevice, Ladder, Mapped, PageSet, ToDevice, tracker};
use iommu::Prot;

/// Far more than the records that are always on have places for.
const MANY: usize = 5000;

/// One test, since the order matters: what is made before the switch is what it was. Caught: `Exact::end` that
/// leaves the entry live.
#[test]
fn every_mapping_is_listed_with_its_device_size_direction_age_and_site() {
    tracker::enable(false);
    let system = FakeSystem::new();
    let before = system.device("before").unwrap();
    let early = before.device.map::<ToDevice, _>(before.device.pages(4096).unwrap()).unwrap();
    tracker::enable(true);
    let blk = system.device("blk").unwrap();
    let all: Vec<_> =
        (0..MANY).map(|_| blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap()).collect();
    let line = line!() - 1;
    let set = PageSet::zeroed(system.memory, 3 << 20, Ladder::DEFAULT).unwrap();
    let large: Mapped<Bidirectional, _> = blk.device.map(set).unwrap();

    let stats = blk.device.stats();
    assert_eq!((stats.live_mappings, stats.unrecorded), (MANY as u64 + 1, 0));
    let report = blk.device.lendings().unwrap();
    assert_eq!((report.lendings.len(), report.unlisted), (MANY + 1, 0));
    for mapped in &all {
        assert!(matches!(blk.device.explain(mapped.iova()).fate, Fate::Live { .. }));
    }
    let one = report.lendings.iter().find(|lending| lending.range.start() == all[0].iova()).unwrap();
    assert_eq!((&*one.device, one.range.len(), one.prot), ("blk", 4096, Prot::WRITE));
    assert_eq!(one.lent_at.unwrap().line(), line);
    assert!(one.age.is_some());
    let text = report.to_string();
    assert!(text.lines().all(|line| line.len() < 100), "{text}");
    assert!(text.contains("3 MiB both ways") && text.contains("4 KiB from device"), "{text}");
    assert!(text.contains(&format!("tracker.rs:{line}")), "{text}");

    // What was made before is listed too, but its age is not known.
    let report = tracker::report().unwrap();
    assert_eq!(report.count(), MANY as u64 + 2);
    let old = report.lendings.iter().find(|lending| &*lending.device == "before").unwrap();
    assert_eq!((old.range.start(), old.age), (early.iova(), None));

    // Ended mappings are remembered as they always are, and their entries are used again.
    let iova = all[17].iova();
    drop(all);
    assert!(matches!(blk.device.explain(large.iova()).fate, Fate::Live { .. }));
    assert!(matches!(blk.device.explain(iova).fate, Fate::Ended { .. }));
    assert_eq!(blk.device.lendings().unwrap().count(), 1);
    drop(large);
    for _ in 0..MANY {
        drop(blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap());
    }
    assert_eq!(blk.device.stats().total_mappings, 2 * MANY as u64 + 1);
    drop(early);
    assert!(tracker::report().unwrap().is_empty());
    assert_eq!(tracker::report().unwrap().to_string(), "");
    removal(&system);
    history(&system);
}

/// What a report of a fault says of an address with the tracker off it says with the tracker on.
fn history(system: &FakeSystem) {
    let net = system.device("net").unwrap();
    let far = iommu::Iova::new(0x7000_0012_3000);
    let line = line!() + 1;
    drop(net.device.map_at::<ToDevice, _>(far, net.device.pages(4096).unwrap()).unwrap().unmap().unwrap());
    for _ in 0..1000 {
        drop(net.device.map::<ToDevice, _>(net.device.pages(4096).unwrap()).unwrap());
    }
    let text = net.device.explain(far).to_string();
    assert!(text.contains("was unmapped ") && text.contains(&format!(" us ago by net at tracker.rs:{line}")), "{text}");
}

/// Misuse 18.
fn removal(system: &FakeSystem) {
    let gpu = system.device("gpu").unwrap();
    let (kept, line) = (gpu.device.map::<ToDevice, _>(gpu.device.pages(8192).unwrap()).unwrap(), line!());
    let iova = kept.iova();
    gpu.master.read(iova, &mut [0]).unwrap();
    let left = gpu.device.remove().unwrap();
    assert_eq!(left.count(), 1);
    assert_eq!((left.lendings[0].range.start(), left.lendings[0].lent_at.unwrap().line()), (iova, line));
    // Whatever was left, the device has nothing any more.
    assert!(gpu.master.read(iova, &mut [0]).is_err());
    drop(kept);
    assert!(gpu.device.remove().unwrap().is_empty());
    assert_eq!(system.memory.violations(), Vec::<String>::new());
}
