//! An address space exchanged for another under a stream at work.

use super::super::Consumption;
use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a swap between two spaces may show at one address: the old page or the new one.
fn both(rig: &Rig) -> [Arc<dyn AddressSpace>; 2] {
    let spaces = [rig.space(), rig.space()];
    for (space, page) in spaces.iter().zip([0, PAGE]) {
        map(space, iova(0x1000, PAGE), ram(page, PAGE), RW).unwrap();
    }
    spaces
}

/// Stage 1, where a space is one word of the STE. (A stage 2 has its VMID and its table in two, so that a swap passes by V=0.)
/// Whatever is consumed when, and however much is cached ahead: a device that accesses memory all the time faults at no
/// moment, and sees the new space only when the swap has returned.
#[test]
fn a_stream_at_work_sees_the_old_space_or_the_new_one_and_never_neither() {
    for (traits, eager) in [(Traits::NESTED, true), (Traits::NESTED, false), (Traits::OLD, true)] {
        for consumption in [Consumption::Immediate, Consumption::PerLook(1)] {
            let rig = rig(traits);
            if eager {
                rig.model.eager([8]);
            }
            rig.model.behave(|b| b.consumption = consumption);
            let spaces = both(&rig);
            rig.smmu.attach(id(8), &spaces[0]).unwrap();
            let (done, accesses) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                let device = scope.spawn(|| {
                    while !done.load(Ordering::Acquire) {
                        let seen = rig.reads(8, 0x1000);
                        assert!(matches!(seen, Some(at) if at == RAM || at == RAM + PAGE), "{traits:?}: {seen:?}");
                        accesses.fetch_add(1, Ordering::Relaxed);
                    }
                });
                for round in 0..12_u64 {
                    let now = (round as usize + 1) % 2;
                    // The device is at work between any two swaps.
                    let before = accesses.load(Ordering::Relaxed);
                    while accesses.load(Ordering::Relaxed) == before && !device.is_finished() {
                        std::thread::yield_now();
                    }
                    rig.smmu.attach(id(8), &spaces[now]).unwrap();
                    assert_eq!(rig.reads(8, 0x1000), Some(RAM + PAGE * now as u64));
                }
                done.store(true, Ordering::Release);
            });
            assert_eq!(rig.log.take(), []);
            rig.model.assert_clean();
        }
    }
}

/// Every word as it is stored: a stream that is served between any two of them never has no space.
#[test]
fn no_single_store_of_a_swap_leaves_the_stream_without_a_space() {
    use crate::descriptors::ste_stage1;
    use crate::entry::{Entry, Kind, Sink, update};
    struct Watch(Entry, Vec<Entry>);
    impl Sink for Watch {
        fn store(&mut self, index: usize, word: u64) {
            self.0[index] = word;
            self.1.push(self.0);
        }
        fn sync(&mut self) -> Result<(), Error> {
            Ok(())
        }
    }
    let entries = [ste_stage1(0x4000_0000, true), ste_stage1(0x7fff_ff40, true)];
    for (from, to) in [(0, 1), (1, 0)] {
        let mut watch = Watch(entries[from], Vec::new());
        let outcome = update(Kind::Ste, &entries[from], &entries[to], &mut watch).unwrap();
        assert!(outcome.hitless && outcome.syncs == 1, "{outcome:?}");
        assert_eq!(watch.1, [entries[to]], "one store, from one space to the other");
    }
}
