//! A disk that breaks the rules while it runs.

use super::*;
use crate::Misbehaviour;
use crate::fakes::Behaviour;
use crate::spec::feature;
use core::future::Future;

/// Has one request kept by the device, provokes `behaviour` with another, and checks that both end with the error, that loans
/// stay where they are until the reset, and that nothing is left after it.
fn breaks(behaviour: Behaviour, what: impl Fn(&Error) -> bool) {
    for indirect in [0, feature::INDIRECT_DESC] {
        let rig = Rig::new(64, |registers| registers.features &= !indirect);
        let block = rig.start(16).unwrap();
        let (kept, other) = (rig.lend(512), rig.lend(512));
        rig.device.plan(&[Behaviour::Keep, behaviour]);
        let mut first = block.read(0, &kept, 0..512).unwrap();
        let mut second = block.read(1, &other, 0..512).unwrap();
        for transfer in [&mut first, &mut second] {
            // Twice and the like may still have returned the request properly before they broke the rules.
            match transfer.wait(Deadline::after_millis(2)) {
                Err(error) => assert!(what(&error), "{behaviour:?}: {error}"),
                Ok(()) => assert_eq!(behaviour, Behaviour::Twice),
            }
        }
        drop(first);
        drop(second);
        assert_eq!(Arc::strong_count(&kept), 2, "{behaviour:?}: the device has not been reset");
        let error = block.flush().map(drop).unwrap_err();
        assert!(what(&error), "{behaviour:?}: {error}");
        while rig.device.release(0) {}
        assert!(block.flush().is_err());
        assert_eq!(Arc::strong_count(&kept), 2, "a broken queue takes nothing more from the device");
        block.shut_down(soon()).unwrap();
        take_back(kept);
        take_back(other);
        assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}

fn misbehaved(expected: fn(&Misbehaviour) -> bool) -> impl Fn(&Error) -> bool {
    move |error| matches!(error, Error::DeviceMisbehaved { what } if expected(what))
}

#[test]
fn an_id_outside_the_table_breaks_the_queue() {
    for id in [16, 17, 0x1_0000, u32::MAX] {
        breaks(Behaviour::WrongId(id), move |error| {
            *error == Error::DeviceMisbehaved { what: Misbehaviour::NoSuchDescriptor(id) }
        });
    }
}

#[test]
fn an_id_that_is_not_in_flight_breaks_the_queue() {
    breaks(Behaviour::WrongId(15), misbehaved(|what| *what == Misbehaviour::NotInFlight(15)));
}

#[test]
fn a_request_that_is_returned_twice_breaks_the_queue() {
    breaks(Behaviour::Twice, misbehaved(|what| matches!(what, Misbehaviour::NotInFlight(_))));
}

#[test]
fn a_used_index_that_jumps_breaks_the_queue() {
    for by in [2, 15, 100, 0x7fff, 0xfffe] {
        breaks(Behaviour::Jump(by), misbehaved(|what| matches!(what, Misbehaviour::UsedIndexJumped { .. })));
    }
}

#[test]
fn a_device_that_needs_a_reset_ends_all_waiting() {
    breaks(Behaviour::NeedReset, |error| *error == Error::NeedsReset);
}

#[test]
fn a_device_that_resets_itself_is_found_out_when_a_wait_has_taken_too_long() {
    breaks(Behaviour::ResetItself, |error| *error == Error::NeedsReset);
}

#[test]
fn one_request_that_is_returned_in_place_of_another_is_that_one() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let (kept, other) = (rig.lend(512), rig.lend(512));
    rig.device.plan(&[Behaviour::Keep, Behaviour::WrongId(0)]);
    let mut first = block.read(0, &kept, 0..512).unwrap();
    let mut second = block.read(1, &other, 0..512).unwrap();
    assert_eq!(first.wait(soon()), Ok(()));
    assert_eq!(second.wait(now()), Err(Error::TimedOut));
    assert_eq!(Arc::strong_count(&other), 2);
}

#[test]
fn a_device_that_never_answers_costs_a_deadline_and_keeps_the_loan() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    let iova = loan.iova();
    rig.device.plan(&[Behaviour::Swallow]);
    let mut transfer = block.read(0, &loan, 0..512).unwrap();
    assert_eq!(transfer.wait(Deadline::after_millis(2)), Err(Error::TimedOut));
    assert_eq!(transfer.wait(now()), Err(Error::TimedOut), "it may be waited for again");
    drop(transfer);
    drop(loan);
    assert!(rig.reaches(iova));
    block.shut_down(soon()).unwrap();
    assert!(!rig.reaches(iova));
}

#[test]
fn a_device_that_cannot_be_reset_keeps_its_loans_for_ever() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    rig.device.change(|registers| registers.resets = false);
    let loan = rig.lend(512);
    let iova = loan.iova();
    rig.device.plan(&[Behaviour::Swallow]);
    let mut transfer = block.read(0, &loan, 0..512).unwrap();
    let mappings = rig.host.device.stats().live_mappings;
    assert_eq!(block.shut_down(Deadline::after_millis(2)), Err(Error::ResetTimedOut));
    assert_eq!(transfer.wait(now()), Err(Error::ShutDown));
    drop(transfer);
    drop(loan);
    assert!(rig.reaches(iova));
    assert_eq!(rig.host.device.stats().live_mappings, mappings, "rings and loan stay");
    rig.check();
}

#[test]
fn lengths_beyond_the_buffer_are_clamped_and_lengths_short_of_it_are_errors() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    rig.device.plan(&[Behaviour::Length(u32::MAX), Behaviour::Length(512), Behaviour::Length(0)]);
    block.read(0, &loan, 0..512).unwrap().wait(soon()).unwrap();
    let short = |found| Err(Error::ShortAnswer { expected: 513, found });
    assert_eq!(block.read(0, &loan, 0..512).unwrap().wait(soon()), short(512));
    assert_eq!(block.read(0, &loan, 0..512).unwrap().wait(soon()), short(0));
    block.read(0, &loan, 0..512).unwrap().wait(soon()).unwrap();
    take_back(loan);
}

#[test]
fn an_answer_that_was_never_written_is_not_success() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    // The first request leaves a status of success in the slot's memory.
    block.read(0, &loan, 0..512).unwrap().wait(soon()).unwrap();
    rig.device.plan(&[Behaviour::Ignore(513)]);
    assert_eq!(block.read(0, &loan, 0..512).unwrap().wait(soon()), Err(Error::BadStatus(0xff)));
}

#[test]
fn status_bytes_have_their_errors() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    rig.disk.answer(&[1, 2, 3, 0xfe]);
    for error in [Error::Io, Error::Unsupported, Error::BadStatus(3), Error::BadStatus(0xfe)] {
        assert_eq!(block.flush().unwrap().wait(soon()), Err(error));
    }
    assert_eq!(block.flush().unwrap().wait(soon()), Ok(()));
}

#[test]
fn scribbling_over_the_descriptors_confuses_nobody() {
    for indirect in [0, feature::INDIRECT_DESC] {
        let rig = Rig::new(64, |registers| registers.features &= !indirect);
        let block = rig.start(8).unwrap();
        for round in 0..20 {
            let loan = rig.lend(1024);
            rig.device.plan(&[Behaviour::Scribble]);
            block.read(round, &loan, 0..1024).unwrap().wait(soon()).unwrap();
            assert_eq!(take_back(loan)[..1024], expected(round, 1024));
        }
        rig.check();
    }
}

#[test]
fn who_sleeps_is_woken_when_the_device_fails() {
    for behaviour in [Behaviour::NeedReset, Behaviour::WrongId(99), Behaviour::Jump(9)] {
        let rig = Rig::new(64, |_| {});
        let block = rig.start(16).unwrap();
        rig.device.set_eager(false);
        rig.device.plan(&[Behaviour::Keep, behaviour]);
        let (first, second) = (block.flush().unwrap(), block.flush().unwrap());
        let (polled, waits) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let sleepers = [first, second].map(|transfer| {
                let polled = polled.clone();
                scope.spawn(move || {
                    let mut transfer = core::pin::pin!(transfer);
                    let future = core::future::poll_fn(|context| {
                        let result = transfer.as_mut().poll(context);
                        polled.send(()).unwrap();
                        result
                    });
                    base::block_on(soon(), future)
                })
            });
            // Both have been found in flight and listen.
            waits.recv().unwrap();
            waits.recv().unwrap();
            rig.device.run(2);
            for sleeper in sleepers {
                let result = sleeper.join().unwrap().expect("it was not woken");
                assert!(matches!(result, Err(Error::NeedsReset | Error::DeviceMisbehaved { .. })), "{result:?}");
            }
        });
    }
}
