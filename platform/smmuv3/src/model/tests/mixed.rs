//! Streams, substreams, caches in devices and both stages in any order, against a list of who has what.
//!
//! Seen red: a device cache not emptied when its space is replaced.

use super::*;
use crate::{Request, Translation};
use proptest::prelude::*;
use std::collections::BTreeMap;

const STREAMS: [u32; 2] = [8, 16];
/// The second two share a second level with none of the others.
const SUBSTREAMS: [Option<u32>; 4] = [None, Some(1), Some(70), Some(255)];
const SPACES: usize = 3;
const PAGES: u64 = 3;

#[derive(Clone, Copy, Debug)]
enum Step {
    Map(usize, u64),
    Revoke(usize, u64),
    Attach(usize, usize, usize),
    Detach(usize, usize),
    Block(usize),
    Ats(usize, bool),
    Request(usize, usize, u64),
    Read(usize, usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let (stream, substream, space, page) = (0..STREAMS.len(), 0..SUBSTREAMS.len(), 0..SPACES, 0..PAGES);
    prop_oneof![
        4 => (space.clone(), page.clone()).prop_map(|(s, p)| Step::Map(s, p)),
        3 => (space.clone(), page.clone()).prop_map(|(s, p)| Step::Revoke(s, p)),
        4 => (stream.clone(), substream.clone(), space).prop_map(|(s, n, a)| Step::Attach(s, n, a)),
        1 => (stream.clone(), 1..SUBSTREAMS.len()).prop_map(|(s, n)| Step::Detach(s, n)),
        1 => stream.clone().prop_map(Step::Block),
        1 => (stream.clone(), any::<bool>()).prop_map(|(s, on)| Step::Ats(s, on)),
        3 => (stream.clone(), substream.clone(), page.clone()).prop_map(|(s, n, p)| Step::Request(s, n, p)),
        4 => (stream, substream, page).prop_map(|(s, n, p)| Step::Read(s, n, p)),
    ]
}

struct Mixed {
    rig: Rig,
    spaces: Vec<Arc<dyn AddressSpace>>,
    /// What is mapped: page by space and page.
    mapped: BTreeMap<(usize, u64), u64>,
    /// The space of each stream and substream.
    attached: BTreeMap<(usize, usize), usize>,
    next: u64,
}

impl Mixed {
    fn new(traits: Traits, nested: bool, seed: u64) -> Self {
        let rig = rig(traits);
        rig.model.adversary(seed, STREAMS);
        let translation = if nested {
            let below = Request { translation: Translation::Stage2, input_bits: Some(40), ..Request::default() };
            let parent = rig.asked(&below);
            let all = PhysRange::new(PhysAddr::new(0), 1 << 40).unwrap();
            map(&parent, iova(0, 1 << 40), all, RW).unwrap();
            Translation::Nested(parent)
        } else {
            Translation::Stage1
        };
        let request = Request { translation, ..Request::default() };
        let spaces = (0..SPACES).map(|_| rig.asked(&request)).collect();
        let mut mixed = Self { rig, spaces, mapped: BTreeMap::new(), attached: BTreeMap::new(), next: 0 };
        // From where most things can happen at once.
        mixed.rig.smmu.enable_ats(id(STREAMS[0])).unwrap();
        for space in 0..SPACES {
            (0..PAGES).for_each(|page| mixed.run(Step::Map(space, page)).unwrap());
        }
        mixed
    }

    fn expected(&self, stream: usize, number: usize, page: u64) -> Option<u64> {
        self.mapped.get(&(*self.attached.get(&(stream, number))?, page)).map(|offset| RAM + offset)
    }

    fn run(&mut self, step: Step) -> Result<(), TestCaseError> {
        let at = |page: u64| 0x1000 + page * PAGE;
        let smmu = &self.rig.smmu;
        match step {
            Step::Map(space, page) => {
                if let std::collections::btree_map::Entry::Vacant(vacant) = self.mapped.entry((space, page)) {
                    map(&self.spaces[space], iova(at(page), PAGE), ram(self.next, PAGE), RW).unwrap();
                    vacant.insert(self.next);
                    self.next += PAGE;
                }
            }
            Step::Revoke(space, page) => {
                let revoked = self.spaces[space].revoke(&[iova(at(page), PAGE)]);
                let offset = self.mapped.remove(&(space, page));
                prop_assert_eq!(revoked.is_ok(), offset.is_some());
                if let Some(offset) = offset {
                    let run = ram(offset, PAGE);
                    let paths = self.rig.model.paths_to(run, &[]);
                    // With memory 1:1 below, a path of stage 2 alone is no device's.
                    let paths: Vec<_> = paths.iter().filter(|path| !path.contains("asid: None")).collect();
                    prop_assert!(paths.is_empty(), "{:#?}", paths);
                }
            }
            Step::Attach(stream, number, space) => {
                let result = match SUBSTREAMS[number] {
                    None => smmu.attach(id(STREAMS[stream]), &self.spaces[space]),
                    Some(ssid) => smmu.attach_substream(id(STREAMS[stream]), ssid, &self.spaces[space]),
                };
                prop_assert_eq!(result, Ok(()));
                self.attached.insert((stream, number), space);
            }
            Step::Detach(stream, number) => {
                let result = smmu.detach_substream(id(STREAMS[stream]), SUBSTREAMS[number].unwrap());
                prop_assert_eq!(result.is_ok(), self.attached.remove(&(stream, number)).is_some());
            }
            Step::Block(stream) => {
                smmu.block(id(STREAMS[stream])).unwrap();
                self.attached.retain(|(other, _), _| *other != stream);
            }
            Step::Ats(stream, true) => smmu.enable_ats(id(STREAMS[stream])).unwrap(),
            Step::Ats(stream, false) => smmu.disable_ats(id(STREAMS[stream])).unwrap(),
            Step::Request(stream, number, page) => {
                self.rig.model.ats_request(id(STREAMS[stream]), SUBSTREAMS[number], Iova::new(at(page)));
            }
            Step::Read(stream, number, page) => {
                let read = match SUBSTREAMS[number] {
                    None => self.rig.reads(STREAMS[stream], at(page)),
                    Some(ssid) => self.rig.reads_as(STREAMS[stream], ssid, at(page)),
                };
                prop_assert_eq!(read, self.expected(stream, number, page));
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(300), ..ProptestConfig::default() })]

    #[test]
    fn every_stream_and_substream_reaches_what_its_space_has_at_that_moment(
        steps in prop::collection::vec(step(), 1..60), seed: u64, coherent: bool, nested: bool
    ) {
        let mut mixed = Mixed::new(if coherent { FULL } else { FULL_NON_COHERENT }, nested, seed);
        for step in steps {
            mixed.run(step)?;
        }
        for stream in STREAMS {
            mixed.rig.smmu.block(id(stream)).unwrap();
        }
        let violations = mixed.rig.model.violations();
        prop_assert!(violations.is_empty(), "{:#?}", violations);
    }
}
