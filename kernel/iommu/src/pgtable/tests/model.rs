//! Random mapping and unmapping against a map of pages, and what tables say against what the walker sees.

use super::fake::FakeMemory;
use super::*;
use crate::pgtable::PageTable;
use crate::{MapError, Prot, RevokeError};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use proptest::prelude::*;

const PROTS: [Prot; 4] = [
    Prot::READ,
    Prot::READ.union(Prot::WRITE),
    Prot::READ.union(Prot::WRITE).union(Prot::NON_COHERENT),
    Prot::READ.union(Prot::WRITE).union(Prot::MMIO).union(Prot::PRIVILEGED),
];

#[derive(Clone, Debug)]
enum Step {
    /// Page and pages of a mapping; where its runs lie; permissions; whether page by page.
    Map { page: u64, runs: Vec<(u64, u64)>, prot: usize, pagewise: bool },
    /// Unmaps one of the mappings that are there.
    UnmapMapping(prop::sample::Index),
    /// Unmaps anything.
    UnmapRange { page: u64, pages: u64 },
}

/// Positions near a few places where tables begin, so that mappings meet.
fn page() -> impl Strategy<Value = u64> {
    (0..3_u64, 0..1200_u64).prop_map(|(place, offset)| place * ((1 << 18) - 400) + offset)
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1..20_u64, 2 => Just(16_u64), 2 => Just(512_u64), 1 => 1..1500_u64]
}

fn step() -> impl Strategy<Value = Step> {
    let run =
        (prop_oneof![0..0x1_0000_u64, (0..64_u64).prop_map(|n| n * 512), (0..512_u64).prop_map(|n| n * 16)], count());
    let aligned =
        prop_oneof![2 => page(), 1 => page().prop_map(|page| page & !511), 1 => page().prop_map(|page| page & !15)];
    prop_oneof![
        5 => (aligned, prop::collection::vec(run, 1..4), 0..PROTS.len(), prop::bool::weighted(0.2))
            .prop_map(|(page, runs, prot, pagewise)| Step::Map { page, runs, prot, pagewise }),
        4 => any::<prop::sample::Index>().prop_map(Step::UnmapMapping),
        1 => (page(), count()).prop_map(|(page, pages)| Step::UnmapRange { page, pages }),
    ]
}

fn geometry() -> impl Strategy<Value = Geometry> {
    let granule = prop_oneof![3 => Just(Granule::K4), 1 => Just(Granule::K16), 1 => Just(Granule::K64)];
    (granule, prop::bool::ANY, prop_oneof![Just(36_u8), Just(39), Just(40), Just(48)]).prop_map(
        |(granule, two, bits)| Geometry::new(granule, if two { Stage::Two } else { Stage::One }, bits, 48).unwrap(),
    )
}

/// Every page, and the permissions as the format can tell them apart.
type Model = BTreeMap<u64, (u64, Prot)>;

struct Checker {
    memory: &'static FakeMemory,
    table: PageTable,
    model: Model,
    mappings: Vec<(u64, u64)>,
}

impl Checker {
    fn page(&self) -> u64 {
        self.table.geometry().granule().size()
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Map { page, runs, prot, pagewise } => self.map(page, &runs, PROTS[prot], pagewise),
            Step::UnmapMapping(which) if !self.mappings.is_empty() => {
                let (page, pages) = self.mappings.swap_remove(which.index(self.mappings.len()));
                self.unmap(page, pages);
            }
            Step::UnmapMapping(_) => {}
            Step::UnmapRange { page, pages } => self.unmap(page, pages),
        }
        self.compare();
    }

    fn map(&mut self, page: u64, runs: &[(u64, u64)], prot: Prot, pagewise: bool) {
        let size = self.page();
        let pages: u64 = runs.iter().map(|(_, len)| len).sum();
        let ranges: Vec<PhysRange> = runs.iter().map(|(at, len)| phys(at * size, len * size)).collect();
        let taken = (page..page + pages).find(|page| self.model.contains_key(page));
        // Stage 2 does not know privilege.
        let told = if self.table.geometry().stage() == Stage::Two { prot - Prot::PRIVILEGED } else { prot };
        let asked = if pagewise { prot | Prot::PAGEWISE } else { prot };
        // Both ways are the same to whoever is alone.
        let range = iova(page * size, pages * size);
        let result = if self.model.len().is_multiple_of(2) {
            self.table.map_exclusively::<false>(range, &ranges, asked)
        } else {
            self.table.map(range, &ranges, asked)
        };
        match taken {
            Some(_) => {
                // A block that does not fit may be reported at its start, which is before the page that is in the way.
                let Err(MapError::AlreadyMapped(at)) = result else { panic!("{result:?} over a mapped page") };
                assert!(at.get() >= page * size && at.get() < (page + pages) * size);
            }
            None => {
                result.unwrap();
                let frames = runs.iter().flat_map(|(at, len)| *at..at + len);
                self.model.extend((page..).zip(frames.map(|frame| (frame * size, told))));
                self.mappings.push((page, pages));
                if pagewise {
                    let leaves = self.memory.leaves(&self.table);
                    let inside =
                        |leaf: &&super::fake::SeenLeaf| (page * size..(page + pages) * size).contains(&leaf.iova);
                    assert!(leaves.iter().filter(inside).all(|leaf| leaf.size == size && !leaf.contiguous()));
                }
            }
        }
    }

    fn unmap(&mut self, page: u64, pages: u64) {
        let size = self.page();
        match self.table.unmap(iova(page * size, pages * size)) {
            Ok(unmapped) => {
                let missing = (page..page + pages).find(|page| !self.model.contains_key(page));
                assert_eq!(unmapped.missing, missing.map(|page| Iova::new(page * size)));
                let before = self.model.len();
                self.model.retain(|at, _| !(page..page + pages).contains(at));
                let bytes = (before - self.model.len()) as u64 * size;
                if let Some(leaf) = unmapped.leaf_size {
                    assert_eq!(unmapped.leaves * leaf, bytes);
                }
                assert_eq!(unmapped.leaves == 0, bytes == 0);
                self.mappings.retain(|(at, len)| (*at..at + len).any(|page| self.model.contains_key(&page)));
            }
            Err(RevokeError::SplitsBlock(at)) => {
                // Justified only if a unit that the walker sees really reaches over an edge.
                let (start, end) = (page * size, (page + pages) * size);
                let units = units(&self.memory.leaves(&self.table), self.table.geometry());
                let cut = units.iter().find(|(from, _)| *from == at.get()).expect("a unit begins where the error says");
                assert!((cut.0 < start && start < cut.1) || (cut.0 < end && end < cut.1));
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// The walker, the tree and the model agree.
    fn compare(&self) {
        let size = self.page();
        let leaves = self.memory.leaves(&self.table);
        let mut seen = Model::new();
        for leaf in &leaves {
            for offset in (0..leaf.size).step_by(size as usize) {
                let prot = self.table.translate(Iova::new(leaf.iova + offset)).expect("the tree knows it too");
                assert_eq!(prot.0.get(), leaf.phys + offset);
                seen.insert((leaf.iova + offset) / size, (leaf.phys + offset, prot.1));
            }
        }
        let difference = seen.iter().zip(&self.model).find(|(seen, told)| seen != told);
        assert_eq!((difference, seen.len()), (None, self.model.len()), "walker and model");
        units(&leaves, self.table.geometry());
    }
}

/// The leaves and contiguous groups. Groups must be whole, aligned and physically contiguous, with equal attributes.
fn units(leaves: &[super::fake::SeenLeaf], geometry: &Geometry) -> Vec<(u64, u64)> {
    let mut units = Vec::new();
    let mut index = 0;
    while let Some(leaf) = leaves.get(index) {
        let mut count = 1;
        if leaf.contiguous() {
            count = match (geometry.granule(), leaf.size > geometry.granule().size()) {
                (Granule::K4, _) => 16,
                (Granule::K16, false) => 128,
                _ => 32,
            };
            assert_eq!((leaf.iova | leaf.phys) % (count as u64 * leaf.size), 0);
            for (n, member) in leaves[index..index + count].iter().enumerate() {
                let step = n as u64 * leaf.size;
                assert_eq!((member.iova, member.entry), (leaf.iova + step, leaf.entry + step));
            }
        }
        units.push((leaf.iova, leaf.iova + count as u64 * leaf.size));
        index += count;
    }
    units
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Red with: a claim by a plain store instead of an exchange; the claims of a refused mapping not given up; no check of
    /// an unmap's edges; the Contiguous bit without a check of the physical alignment; a forgotten publication.
    #[test]
    fn tables_hold_exactly_what_was_mapped_and_not_unmapped(
        geometry in geometry(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let memory = FakeMemory::new();
        let mut checker = Checker { memory, table: memory.table(geometry), model: Model::new(), mappings: Vec::new() };
        for step in steps {
            checker.step(step);
        }
        for (page, pages) in core::mem::take(&mut checker.mappings) {
            checker.unmap(page, pages);
        }
        checker.compare();
        drop(checker);
        prop_assert_eq!(memory.live(), 0, "no table is left");
    }
}

/// Red with: claims that are not given up; claims that hardware takes for leaves.
#[test]
fn every_failing_allocation_leaves_nothing_mapped_and_nothing_leaked() {
    let runs = [phys(0x20_0000, 0x60_0000), phys(0x4000_0000, 0x1000), phys(0x9000_0000, 0x100_0000)];
    let range = iova(0x3fff_f000 - 0x60_0000, 0x60_0000 + 0x1000 + 0x100_0000);
    for stage in [Stage::One, Stage::Two] {
        let mut failures = 0;
        loop {
            let memory = FakeMemory::new();
            let table = memory.table(Geometry::new(Granule::K4, stage, 48, 48).unwrap());
            memory.fail_nth(failures);
            let result = table.map(range, &runs, Prot::READ);
            if memory.spare() {
                result.unwrap();
                break;
            }
            assert_eq!(result, Err(MapError::OutOfMemory));
            assert!(memory.leaves(&table).is_empty());
            assert_eq!(memory.exposed(), 0, "hardware has seen part of a mapping that was not made");
            // Nothing stands in the way of a second attempt, and of a third one after everything was taken away again.
            for _ in 0..2 {
                table.map(range, &runs, Prot::READ).unwrap();
                assert_eq!(table.unmap(range).unwrap().missing, None);
            }
            drop(table);
            assert_eq!(memory.live(), 0);
            failures += 1;
        }
        assert!(failures >= 4, "{failures}");
    }
    let memory = FakeMemory::new();
    memory.fail_nth(0);
    assert!(PageTable::new(stage1(Granule::K4, 48, 48), memory).is_err());
}
