//! The queue itself, below a driver.

use super::*;
use crate::fakes::Behaviour;
use crate::queue::{Access, Command, Loans, Parts};
use crate::spec::blk::request;

fn flush(header: &[u8]) -> Command<'_> {
    Command { header, data: Parts::none(), access: Access::Read, response: 1, loans: Loans::none() }
}

fn header(kind: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header
}

#[test]
fn a_used_length_is_at_most_what_the_device_could_write() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let queue = block.queue_handler();
    let loan = rig.lend(1024);
    rig.device.plan(&[Behaviour::Length(u32::MAX), Behaviour::Length(2), Behaviour::Length(u32::MAX)]);
    let (flush_header, read_header) = (header(request::FLUSH), header(request::IN));
    assert_eq!(queue.submit(flush(&flush_header)).unwrap().wait(soon(), &mut [0]), Ok(1));
    assert_eq!(queue.submit(flush(&flush_header)).unwrap().wait(soon(), &mut [0]), Ok(1));
    let read = Command {
        header: &read_header,
        data: Parts::new(&*loan, &(0..1024), u32::MAX).unwrap(),
        access: Access::Write,
        response: 1,
        loans: Loans::one(loan.clone()),
    };
    assert_eq!(queue.submit(read).unwrap().wait(soon(), &mut [0]), Ok(1025));
}

#[test]
fn a_request_holds_all_its_loans() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let queue = block.queue_handler();
    let loans = [rig.lend(512), rig.lend(512), rig.lend(512)];
    let mut held = Loans::none();
    assert!(held.is_empty());
    for loan in &loans {
        held.add(loan.clone()).unwrap();
    }
    assert_eq!(held.len(), 3);
    rig.device.plan(&[Behaviour::Keep]);
    let header = header(request::FLUSH);
    let request = queue.submit(Command { loans: held, ..flush(&header) }).unwrap();
    drop(request);
    assert!(loans.iter().all(|loan| Arc::strong_count(loan) == 2));
    rig.device.release(0);
    block.flush().unwrap().wait(soon()).unwrap();
    assert!(loans.iter().all(|loan| Arc::strong_count(loan) == 1));
}

#[test]
fn headers_and_answers_that_do_not_fit_their_slot_are_refused() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let queue = block.queue_handler();
    for command in [flush(&[]), flush(&[0; 17]), Command { response: 22, ..flush(&[0; 16]) }] {
        assert_eq!(queue.submit(command).map(drop), Err(Error::TooLong));
    }
    assert_eq!(rig.device.notified(), 0);
}

#[test]
fn drivers_and_their_futures_go_from_core_to_core() {
    fn goes<T: Send>(_: &T) {}
    fn shared<T: Send + Sync>() {}
    shared::<Block>();
    shared::<crate::gpu::Gpu>();
    shared::<crate::gpu::Resource>();
    shared::<crate::transport::PciTransport>();
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    goes(&block.flush().unwrap());
    let future = |gpu: crate::gpu::Gpu, resource: crate::gpu::Resource| async move {
        let _ = gpu.reclaim().await;
        let _ = resource.present(resource.rect()).await;
        resource.destroy().await
    };
    fn check<A, B, F: Send>(_: impl Fn(A, B) -> F) {}
    check(future);
}
