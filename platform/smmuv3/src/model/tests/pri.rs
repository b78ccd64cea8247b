//! The PRI queue: every group is answered, and none twice; and interrupts by message.
//!
//! Seen red: groups answered at every request, or at none; the answer without its SubstreamID; a Stop PASID marker answered; an
//! answer dropped when the command queue is full; the message's registers written while the interrupt is on; the PRI queue's
//! message left out.

use super::super::Consumption;
use super::*;
use crate::spec::command::{self, opcode};
use crate::spec::page_request::{ADDR, LAST, R, SSID, SSV, W};
use crate::spec::registers::{Gerror, idr0};
use crate::{Message, Messages};
use iommu::{Access, FaultReason};

/// PRI with 2^4 records, substreams of 8 bits.
fn with_pri() -> Traits {
    let pri = idr0::PRI.mask() as u32;
    let nested = Traits::NESTED;
    Traits { idr0: nested.idr0 | pri, idr1: nested.idr1 | 4 << 11 | 8 << 6, ..nested }
}

fn request(stream: u64, address: u64, flags: u64, group: u64) -> [u64; 2] {
    [stream | flags, ADDR.address(address) | group]
}

fn answer(stream: u64, substream: Option<u64>, group: u64) -> [u64; 2] {
    let substream = substream.map_or(0, |ssid| command::SSV.mask() | command::SSID.put(ssid));
    [opcode::PRI_RESP | command::SID.put(stream) | substream, group]
}

#[test]
fn every_group_of_page_requests_is_told_no_once() {
    let rig = rig(with_pri());
    let substream = SSV.mask() | SSID.put(5);
    for round in 0..20 {
        rig.model.page_request(request(8, 0x1000, R.mask(), round));
        rig.model.page_request(request(8, 0x2000, W.mask() | LAST.mask(), round));
        rig.model.page_request(request(9, 0x3000, R.mask() | substream | LAST.mask(), 0x1ff));
        rig.model.page_request(request(9, 0, substream | LAST.mask(), 0));
        rig.interrupt();
        let (answers, dropped) = rig.model.take_answers();
        assert_eq!(answers, [answer(8, None, round), answer(9, Some(5), 0x1ff)]);
        assert_eq!(dropped, 0);
        let faults = rig.log.take();
        assert_eq!(faults.len(), 3, "a Stop PASID marker asks for nothing");
        assert_eq!((faults[1].stream, faults[1].iova), (id(8), Some(Iova::new(0x2000))));
        assert_eq!((faults[1].access, faults[1].reason), (Some(Access::Write), FaultReason::NotMapped));
    }
    assert_eq!(rig.smmu.statistics().page_requests, 80);
    rig.model.assert_clean();
}

#[test]
fn an_answer_for_which_there_is_no_room_is_given_later() {
    let traits = Traits { idr1: with_pri().idr1 & !(0x1f << 21) | 3 << 21, ..with_pri() };
    let rig = rig_with(traits, hasty());
    let space = rig.attached(8);
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    for group in 0..16 {
        rig.model.page_request(request(8, group << 12, R.mask() | LAST.mask(), group));
    }
    rig.interrupt();
    assert!(rig.smmu.has_backlog());
    // The queue is full, and then closed: whoever needs it finds that it takes nothing.
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert!(space.revoke(&[iova(0x1000, PAGE)]).is_err());
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    assert!(!rig.smmu.is_dead());
    rig.smmu.service();
    rig.smmu.service();
    assert!(!rig.smmu.has_backlog());
    let (answers, dropped) = rig.model.take_answers();
    assert_eq!(answers, (0..16).map(|group| answer(8, None, group)).collect::<Vec<_>>());
    assert_eq!((dropped, rig.smmu.statistics().unanswered_page_requests), (0, 0));
    rig.model.assert_clean();
}

#[test]
fn an_overflow_of_page_requests_is_survived_and_counted() {
    let rig = rig(with_pri());
    for round in 1..=3 {
        for group in 0..40 {
            rig.model.page_request(request(8, 0, R.mask() | LAST.mask(), group));
        }
        rig.interrupt();
        let (answers, dropped) = rig.model.take_answers();
        assert_eq!((answers.len(), dropped), (16, 24 * round));
        assert_eq!(rig.smmu.statistics().page_request_overflows, round);
    }
    rig.model.raise(Gerror::PRIQ_ABT_ERR);
    rig.interrupt();
    rig.model.page_request(request(8, 0, R.mask() | LAST.mask(), 1));
    rig.interrupt();
    assert_eq!(rig.model.take_answers().0.len(), 1, "requests are taken again after the error");
    assert_eq!(rig.smmu.statistics().page_request_overflows, 4);
    rig.model.assert_clean();
}

#[test]
fn interrupts_go_where_the_board_wants_them() {
    let traits = Traits { idr0: with_pri().idr0 | idr0::MSI.mask() as u32, ..with_pri() };
    let rig = rig(traits);
    let at = |data| Message { address: 0x808_0040, data };
    // By wire until the board says otherwise.
    rig.model.page_request(request(8, 0, R.mask() | LAST.mask(), 1));
    assert!(rig.model.state.lock().interrupts.page_requests);
    rig.smmu.use_messages(&Messages { events: at(1), errors: at(2), page_requests: Some(at(3)) }).unwrap();
    assert_eq!(rig.model.take_answers().0.len(), 1, "what came before is not left behind");
    rig.model.take_interrupts();
    rig.model.page_request(request(8, 0, R.mask() | LAST.mask(), 1));
    assert!(rig.model.device_read(id(0xffff_0000), Iova::new(0), 4).is_err());
    rig.model.raise(Gerror::MSI_GERROR_ABT_ERR);
    assert_eq!(rig.model.take_interrupts(), Default::default(), "nothing by wire");
    let mut sent = rig.model.take_messages();
    sent.sort_unstable();
    assert_eq!(sent, [(0x808_0040, 1), (0x808_0040, 2), (0x808_0040, 3)]);
    rig.model.assert_clean();
}

#[test]
fn an_smmu_without_messages_keeps_its_wires() {
    let rig = rig(Traits::NESTED);
    let message = Message { address: 0x808_0040, data: 0 };
    let messages = Messages { events: message, errors: message, page_requests: None };
    assert!(matches!(rig.smmu.use_messages(&messages), Err(Error::Unsupported(_))));
    rig.model.assert_clean();
}
