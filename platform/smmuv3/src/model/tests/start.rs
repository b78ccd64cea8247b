//! From reset to translation.
//!
//! Seen red: GBPA.ABORT not set; tables programmed after SMMUEN; no invalidation before SMMUEN; IPS not clamped; CR0ACK not
//! awaited.

use super::*;
use crate::spec::command::opcode;
use crate::spec::registers::{self as reg, gbpa};
use crate::{Features, Registers};
use alloc::string::ToString;
use std::vec;

#[test]
fn every_kind_of_smmu_starts_with_everything_blocked_and_no_rule_broken() {
    for traits in [Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL] {
        let rig = rig(traits);
        assert!(rig.model.is_enabled());
        for stream in [0, 1, 8, 63, 64, 0x1234, 0xffff, 0x1_0000, u32::MAX] {
            assert_eq!(rig.reads(stream, 0x4000_0000), None, "stream {stream:#x}");
        }
        rig.model.assert_clean();
    }
}

#[test]
fn the_door_is_shut_before_anything_else_is_written() {
    let memory = ModelMemory::new();
    let model = Model::new(Traits::NESTED, memory);
    assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_ok(), "an SMMU in reset lets everything pass");
    // No memory for any table: the start fails after the door was shut.
    memory.allow(Some(0));
    assert_eq!(start(memory, &model, hasty()).0.err(), Some(Error::OutOfMemory));
    assert!(gbpa::ABORT.is_set(u64::from(model.read32(reg::GBPA))));
    assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_err());
    model.assert_clean();
}

#[test]
fn an_smmu_without_gbpa_is_started_and_the_open_window_is_reported() {
    let old = rig(Traits::OLD);
    assert!(!old.smmu.boot_window_closed());
    assert!(old.smmu.to_string().contains("untranslated until it was enabled"));
    assert!(rig(Traits::NESTED).smmu.boot_window_closed());
}

#[test]
fn nothing_cached_from_before_survives_the_start() {
    let rig = {
        let memory = ModelMemory::new();
        let model = Model::new(Traits::NESTED, memory);
        let (smmu, log) = start(memory, &model, hasty());
        Rig { memory, model, smmu: smmu.unwrap(), log }
    };
    let log = rig.model.take_log();
    let expected = [opcode::CFGI_STE_RANGE, opcode::TLBI_NSNH_ALL, opcode::SYNC].map(|opcode| opcode as u8);
    assert_eq!(log, expected);
}

#[test]
fn an_smmu_that_firmware_left_on_is_stopped_and_started_anew() {
    let memory = ModelMemory::new();
    let model = Model::new(Traits::NESTED, memory);
    let (first, _) = start(memory, &model, hasty());
    let first = first.unwrap();
    let space = first.create().unwrap();
    first.attach(id(8), &space).unwrap();
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_ok());
    let (second, _) = start(memory, &model, hasty());
    second.unwrap();
    assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_err());
    model.assert_clean();
}

#[test]
fn a_register_that_never_acknowledges_ends_the_start_with_its_name() {
    let memory = ModelMemory::new();
    let model = Model::new(Traits::NESTED, memory);
    model.behave(|b| b.gbpa_updates = false);
    assert_eq!(start(memory, &model, hasty()).0.err(), Some(Error::NoAcknowledge("GBPA")));
    let model = Model::new(Traits::NESTED, memory);
    model.behave(|b| b.acknowledges = false);
    assert_eq!(start(memory, &model, hasty()).0.err(), Some(Error::NoAcknowledge("CR0")));
}

#[test]
fn a_command_queue_that_never_moves_ends_the_start() {
    let memory = ModelMemory::new();
    let model = Model::new(Traits::NESTED, memory);
    model.behave(|b| b.consumption = super::super::Consumption::Stuck);
    assert_eq!(start(memory, &model, hasty()).0.err(), Some(Error::SyncTimedOut));
    assert!(!model.is_enabled());
    assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_err());
}

#[test]
fn out_of_memory_at_any_allocation_is_an_error_and_leaves_the_door_shut() {
    for count in 0..16 {
        let memory = ModelMemory::new();
        let model = Model::new(Traits::NESTED, memory);
        memory.allow(Some(count));
        match start(memory, &model, hasty()).0 {
            Err(error) => assert_eq!(error, Error::OutOfMemory),
            Ok(_) => {
                assert!(count > 0);
                return;
            }
        }
        assert!(model.device_read(id(8), Iova::new(0x1000), 4).is_err());
    }
    panic!("the start needs more allocations than it should");
}

#[test]
fn the_features_of_qemus_smmu_are_read_as_documented() {
    let memory = ModelMemory::new();
    let features = Features::read(&Model::new(Traits::NESTED, memory)).unwrap();
    assert_eq!(
        features.to_string(),
        "SMMUv3.1, stages 1 and 2, 44 bits out, granules 4K 16K 64K, 16-bit StreamIDs (two-level), 16-bit ASIDs, \
         coherent, range invalidation"
    );
    assert_eq!((features.cmdq_log2, features.eventq_log2, features.bbml), (19, 19, 2));
    // A processor's PARange may be larger than what the SMMU puts out.
    assert_eq!(
        (features.ips(52), features.ips(48), features.ips(44), features.ips(40), features.ips(32)),
        (4, 4, 4, 2, 0)
    );
}

#[test]
fn what_cannot_be_driven_is_refused_by_name() {
    for (traits, what) in [
        (Traits { idr0: 0x0d44_1018, ..Traits::NESTED }, "an SMMU without translation"),
        (Traits { idr0: 0x0d44_1017, ..Traits::NESTED }, "an SMMU without VMSAv8-64 tables"),
        (Traits { idr0: 0x0e44_101b, ..Traits::NESTED }, "an SMMU that stalls every fault"),
        (Traits { idr1: 0x2273_0010, ..Traits::NESTED }, "queues at preset addresses"),
        (Traits { idr1: 0x4273_0010, ..Traits::NESTED }, "a stream table at a preset address"),
        (Traits { idr5: 0x04, ..Traits::NESTED }, "an SMMU without a granule"),
    ] {
        let memory = ModelMemory::new();
        let model = Model::new(traits, memory);
        assert_eq!(start(memory, &model, hasty()).0.err(), Some(Error::Unsupported(what)));
        assert!(!model.is_enabled());
    }
    assert_eq!(vec![0_u8; 0], rig(Traits::MINIMAL).model.take_log());
}
