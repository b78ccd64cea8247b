//! Floods of events where the board calls later: nothing is left for which nobody comes.
//!
//! Seen red: no call asked for; the interrupt left on while polling; not switched on again; served by an interrupt that came in
//! while polling; IRQ_CTRL written before the last write was acknowledged; the look after it was switched on left out.

use super::super::Overflow;
use super::*;
use crate::Registers;
use crate::spec::registers::{self as reg, IrqCtrl};
use core::cell::Cell;

std::thread_local! {
    /// Calls that were asked for and not made.
    static ASKED: Cell<u32> = const { Cell::new(0) };
}

pub(super) fn later() {
    ASKED.set(ASKED.get() + 1);
}

fn rig_with_clock() -> Rig {
    ASKED.set(0);
    rig_with(Traits::NESTED, Config { defer: Some(later), ..patient() })
}

impl Rig {
    /// Makes the deferred calls until none is asked for. Says how many.
    pub(super) fn ticks(&self) -> u32 {
        for tick in 0..100 {
            if ASKED.replace(0) == 0 {
                return tick;
            }
            self.smmu.serve_backlog();
        }
        panic!("it never ends");
    }

    fn event_interrupt_is_on(&self) -> bool {
        self.model.read32(reg::IRQ_CTRL) & IrqCtrl::EVENTQ_IRQEN.bits() != 0
    }

    fn is_empty(&self) -> bool {
        let [prod, cons] = [reg::EVENTQ_PROD, reg::EVENTQ_CONS].map(|offset| self.model.read32(offset) & 0xff);
        prod == cons
    }
}

#[test]
fn a_flood_is_polled_until_it_is_over_and_then_interrupts_again() {
    let rig = rig_with_clock();
    let _space = rig.attached(8);
    // A new record for each write of EVENTQ_CONS: about 80 writes in a call.
    rig.model.behave(|b| b.flood = 1000);
    assert!(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err());
    rig.interrupt();
    let first = rig.log.take();
    assert_eq!(first[0].iova, Some(Iova::new(0x5000)), "the first record is told, whatever comes after it");
    assert!(rig.smmu.has_backlog() && !rig.event_interrupt_is_on());
    assert_eq!(ASKED.get(), 1, "somebody comes back");
    assert_eq!(rig.smmu.statistics().floods, 1);
    let ticks = rig.ticks();
    assert!(ticks > 3, "a call does its share and no more: {ticks}");
    assert!(!rig.smmu.has_backlog() && rig.event_interrupt_is_on() && rig.is_empty());
    rig.log.take();
    rig.model.take_interrupts();
    assert!(rig.model.device_read(id(8), Iova::new(0x7000), 4).is_err());
    rig.interrupt();
    assert_eq!(rig.log.take().len(), 1, "calm again: the interrupt serves");
    assert_eq!((rig.ticks(), rig.smmu.statistics().floods), (0, 1));
    rig.model.assert_clean();
}

#[test]
fn what_comes_in_while_the_interrupt_is_switched_on_is_not_left_behind() {
    let rig = rig_with_clock();
    let _space = rig.attached(8);
    rig.model.behave(|b| b.flood = 1000);
    assert!(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err());
    rig.interrupt();
    rig.model.behave(|b| b.flood = 0);
    // This call sees the queue empty and switches the interrupt on, which takes its time.
    rig.model.behave(|b| b.acknowledges = false);
    rig.smmu.serve_backlog();
    assert!(rig.event_interrupt_is_on());
    rig.model.take_interrupts();
    rig.log.take();
    assert!(rig.model.device_read(id(8), Iova::new(0x9000), 4).is_err());
    assert!(!rig.model.take_interrupts().events, "not yet on: no interrupt for this one");
    rig.smmu.serve_backlog();
    rig.model.behave(|b| b.acknowledges = true);
    {
        let mut state = rig.model.state.lock();
        state.regs.irq_ctrlack = state.regs.irq_ctrl;
    }
    ASKED.set(1);
    rig.ticks();
    assert_eq!(rig.log.take().len(), 1);
    assert!(rig.is_empty());
    rig.model.assert_clean();
}

#[test]
fn what_comes_in_between_the_last_look_and_the_interrupt_being_on_is_not_left_behind() {
    let rig = rig_with_clock();
    let _space = rig.attached(8);
    rig.model.behave(|b| b.flood = 1000);
    assert!(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err());
    rig.interrupt();
    rig.model.behave(|b| b.flood = 0);
    rig.smmu.serve_backlog();
    assert!(rig.event_interrupt_is_on());
    rig.model.take_interrupts();
    // The next call sees the queue empty, then one more record comes, then the interrupt is found to be on. Of that record's
    // interrupt a handler on another core has found that the queue was being polled.
    rig.model.behave(|b| b.late_records = 1);
    let before = rig.smmu.statistics().events;
    rig.smmu.serve_backlog();
    assert_eq!(rig.smmu.statistics().events, before + 1);
    assert!(rig.is_empty());
    rig.model.assert_clean();
}

#[test]
fn interrupts_of_a_flood_that_is_polled_do_nothing() {
    for overflow in [Overflow::Flag, Overflow::Abort] {
        let rig = rig_with_clock();
        let _space = rig.attached(8);
        rig.model.behave(|b| {
            b.flood = 1000;
            b.overflow = overflow;
        });
        assert!(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err());
        rig.interrupt();
        let before = rig.smmu.statistics();
        rig.model.behave(|b| b.records = 300);
        assert!(rig.model.device_read(id(8), Iova::new(0x6000), 4).is_err());
        for _ in 0..10 {
            rig.smmu.event_handler().handle();
            rig.smmu.error_handler().handle();
        }
        assert_eq!(rig.smmu.statistics(), before, "no work is done for it outside the deferred calls");
        rig.model.behave(|b| b.records = 1);
        rig.ticks();
        assert!(rig.is_empty() && rig.event_interrupt_is_on());
        assert!(rig.smmu.statistics().event_overflows > before.event_overflows);
        rig.log.take();
        assert!(rig.model.device_read(id(8), Iova::new(0x7000), 4).is_err());
        rig.interrupt();
        assert_eq!(rig.log.take().len(), 1, "events are told again");
        rig.model.assert_clean();
    }
}
