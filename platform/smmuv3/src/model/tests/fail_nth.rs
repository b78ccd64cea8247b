//! The driver with the n-th allocation failing, for every n until none fails: heap and table memory count as one. An error each
//! time, no memory kept, and no identifier lost: not one more and not one less can be had afterwards. The model's own memory
//! does not fail.
//!
//! Seen red: the ASID and the VMID not given back where a space fails after it has one.

#![allow(unsafe_code)] // An allocator, and table memory that wraps the model's.

use super::*;
use crate::{Fleet, Offset, Registers, Request, Translation};
use alloc::boxed::Box;
use base::failing::{self, Failing, Spared, fails};
use core::sync::atomic::AtomicU64;
use iommu::contract::{TableBlock, TableMemory};
use iommu::{AttachError, OutOfMemory};

#[global_allocator]
static FAILING: Failing = Failing;

fn spared<T>(f: impl FnOnce() -> T) -> T {
    let _model = Spared::enter();
    f()
}

/// The model's memory, of which only being asked for may fail.
struct Memory(&'static ModelMemory);

// SAFETY: the model's memory is what it should be, and comes back to it.
unsafe impl TableMemory for Memory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        if fails() {
            return Err(OutOfMemory);
        }
        spared(|| {
            let block: &'static TableBlock = Box::leak(Box::new(self.0.allocate(bytes)?));
            // SAFETY: `block` is leaked, so that the words are this one's alone; they come back through `free`.
            Ok(unsafe { TableBlock::new(block.phys(), block, self) })
        })
    }
    fn free(&self, phys: PhysAddr, words: &'static [AtomicU64]) {
        spared(|| self.0.free(phys, words));
    }
    fn publish(&self, words: &[AtomicU64]) {
        spared(|| self.0.publish(words));
    }
    fn observe(&self, words: &[AtomicU64]) {
        spared(|| self.0.observe(words));
    }
}

#[derive(Clone)]
struct Window(Arc<Model>);

impl Registers for Window {
    type Register = Offset<Self>;

    fn register(&self, offset: usize) -> Offset<Self> {
        Offset { registers: self.clone(), offset }
    }
    fn read32(&self, offset: usize) -> u32 {
        spared(|| self.0.read32(offset))
    }
    fn write32(&self, offset: usize, value: u32) {
        spared(|| self.0.write32(offset, value));
    }
    fn read64(&self, offset: usize) -> u64 {
        spared(|| self.0.read64(offset))
    }
    fn write64(&self, offset: usize, value: u64) {
        spared(|| self.0.write64(offset, value));
    }
    fn size(&self) -> usize {
        self.0.size()
    }
}

/// ASIDs and VMIDs of eight bits.
const FEW: Traits = Traits { idr0: FULL.idr0 & !(1 << 12 | 1 << 18), ..FULL };

struct Machine {
    memory: &'static ModelMemory,
    model: Arc<Model>,
    smmu: Smmu<Window>,
}

impl Machine {
    /// How many more spaces of each stage can be made.
    fn spaces(&self) -> [usize; 2] {
        [Translation::Stage1, Translation::Stage2].map(|translation| {
            let request = Request { translation, ..Request::default() };
            let all: Vec<_> = core::iter::from_fn(|| self.smmu.create_with(&request).ok()).collect();
            all.len()
        })
    }
}

fn machine(memory: &'static Memory) -> Machine {
    let model = Model::new(FEW, memory.0);
    let smmu = Smmu::new(Window(Arc::clone(&model)), memory, Arc::new(Log::default()), patient()).unwrap();
    Machine { memory: memory.0, model, smmu }
}

fn memory() -> &'static Memory {
    Box::leak(Box::new(Memory(ModelMemory::new())))
}

/// Runs `operation` until nothing fails any more, and after each failure looks for what was lost on `machines`.
fn survives(machines: &[&Machine], operation: impl Fn() -> Result<(), AttachError>) -> u64 {
    operation().unwrap();
    let live = |machine: &Machine| machine.memory.live();
    let free = machines.first().map(|machine| machine.spaces()).unwrap();
    let before: Vec<usize> = machines.iter().map(|machine| live(machine)).collect();
    for n in 0.. {
        failing::arm(n);
        let result = operation();
        let failed = failing::disarm();
        let after: Vec<usize> = machines.iter().map(|machine| live(machine)).collect();
        assert_eq!(before, after, "failure {n} keeps memory: {result:?}");
        for machine in machines {
            assert_eq!(machine.spaces(), free, "failure {n}: {result:?}");
            machine.model.assert_clean();
        }
        match result {
            Ok(()) if !failed => return n,
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, AttachError::OutOfMemory, "failure {n}");
                assert!(failed, "failure {n}");
            }
        }
    }
    unreachable!()
}

#[test]
fn a_space_that_cannot_be_made_gives_its_identifier_back() {
    let machine = machine(memory());
    assert_eq!(machine.spaces(), [255, 255]);
    for translation in [Translation::Stage1, Translation::Stage2] {
        let request = Request { translation, ..Request::default() };
        let failures = survives(&[&machine], || machine.smmu.create_with(&request).map(drop));
        assert!(failures >= 4, "{failures}");
    }
    let below = Request { translation: Translation::Stage2, input_bits: Some(40), ..Request::default() };
    let failures = survives(&[&machine], || {
        let parent = machine.smmu.create_with(&below)?;
        let tables = PhysRange::new(PhysAddr::new(0), 1 << 40).unwrap();
        map(&parent, iova(0, 1 << 40), tables, RW).map_err(|_| AttachError::OutOfMemory)?;
        machine.smmu.create_with(&Request { translation: Translation::Nested(parent), ..Request::default() }).map(drop)
    });
    assert!(failures >= 8, "{failures}");
}

#[test]
fn a_space_of_two_smmus_that_cannot_be_made_for_the_second_is_given_back_by_the_first() {
    let memory = memory();
    let machines = [machine(memory), machine(memory)];
    let fleet = Fleet::new(machines.iter().map(|machine| machine.smmu.clone()));
    let failures = survives(&[&machines[0], &machines[1]], || fleet.create(&Request::default()).map(drop));
    assert!(failures >= 6, "{failures}");
}

#[test]
fn a_stream_that_cannot_be_changed_for_want_of_memory_keeps_what_it_has() {
    let machine = machine(memory());
    let space = machine.smmu.create().unwrap();
    machine.smmu.attach(id(8), &space).unwrap();
    machine.smmu.enable_ats(id(8)).unwrap();
    let changes = || {
        let other = machine.smmu.create()?;
        let result = machine.smmu.attach(id(8), &other);
        let substream = result.and_then(|()| machine.smmu.attach_substream(id(8), 70, &other));
        // Neither of these may want memory: they are how a device is stopped.
        machine.smmu.block(id(8)).unwrap();
        substream?;
        machine.smmu.attach(id(8), &space)
    };
    let failures = survives(&[&machine], || {
        let result = changes();
        failing::unfailing(|| machine.smmu.attach(id(8), &space)).unwrap();
        result
    });
    assert!(failures >= 8, "{failures}");
}

/// A table of streams that grew without asking would end the process here.
#[test]
fn a_stream_that_cannot_be_entered_for_want_of_memory_stays_blocked_and_is_attached_later() {
    let machine = machine(memory());
    let space = machine.smmu.create().unwrap();
    machine.smmu.attach(id(8), &space).unwrap();
    let mut failures = 0;
    // All in the second-level table that is there now; the table of streams grows now and then.
    for stream in 9..73 {
        failing::arm(0);
        let result = machine.smmu.attach(id(stream), &space);
        let failed = failing::disarm();
        assert_eq!(result, if failed { Err(AttachError::OutOfMemory) } else { Ok(()) });
        if failed {
            failures += 1;
            assert_eq!(machine.smmu.attached_streams(), stream as usize - 8);
            machine.smmu.attach(id(stream), &space).unwrap();
        }
        assert_eq!(machine.smmu.attached_streams(), stream as usize - 7);
        machine.model.assert_clean();
    }
    assert!(failures >= 3, "{failures}");
}
