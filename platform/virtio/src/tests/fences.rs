//! What those who wait for a transfer to a shared buffer get to know of it, whoever takes its result, and whenever.
//!
//! Seen red: a place that is free before its request's loans are dropped; a watch that looks at whatever request is there; a job
//! that went well because it is over; a failed job that is out of the way while the disk has it.

use super::*;
use crate::fakes::Behaviour;
use crate::queue::{self, Access, Command, Loans, Parts};
use crate::spec::blk::{request, status};
use dma::{Attachment, Fence, FromDevice, Job, SharedBuffer, ToDevice, Watch};
use std::sync::Mutex;

/// A disk, and a display that shows what it reads.
struct Pair {
    rig: Rig,
    block: Block,
    written: Arc<Attachment<FromDevice>>,
    shown: Arc<Attachment<ToDevice>>,
}

impl Pair {
    fn new() -> Self {
        let rig = Rig::new(64, |_| {});
        let block = rig.start(16).unwrap();
        let gpu = rig.system.device("gpu").unwrap();
        let picture = SharedBuffer::new("picture", rig.pages(4096));
        let written = Arc::new(picture.attach(&rig.host.device).unwrap());
        let shown = Arc::new(picture.attach(&gpu.device).unwrap());
        Self { rig, block, written, shown }
    }

    /// A read that the disk keeps, and its fence.
    fn read(&self) -> (crate::blk::Transfer, Fence) {
        let job = Job::begin(&self.written, now()).unwrap().unwrap();
        self.rig.device.plan(&[Behaviour::Keep]);
        let transfer = self.block.read(0, &job, 0..512).unwrap();
        job.watch(Arc::new(transfer.watch().unwrap()));
        (transfer, job.fence())
    }

    /// Whether the display may read now, or is told that what it would read is not there.
    fn shows(&self) -> bool {
        match Job::begin(&self.shown, now()) {
            Ok(_) => true,
            Err(dma::Error::JobFailed(_)) => false,
            Err(other) => panic!("{other}"),
        }
    }
}

fn header(kind: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header
}

fn flush(header: &[u8; 16]) -> Command<'_> {
    Command { header, data: Parts::none(), access: Access::Read, response: 1, loans: Loans::none() }
}

struct Look(queue::Watch);

impl Watch for Look {
    fn outcome(&self) -> Option<bool> {
        let mut answer = [u8::MAX];
        let len = self.0.look(&mut answer)?;
        Some(len.is_ok() && answer == [status::OK])
    }
}

/// One core takes the result, and another looks before the last of the loans has gone. Nor does a third one come to the place that
/// is looked at.
#[test]
fn who_looks_while_the_loans_of_a_read_are_being_dropped_sees_how_it_went() {
    for abandoned in [false, true] {
        let Pair { rig, block, written, .. } = Pair::new();
        let queue = block.queue_handler();
        let job = Job::begin(&written, now()).unwrap().unwrap();
        let read = header(request::IN);
        // The first loan to be dropped tells when that is.
        let first = rig.host.device.map::<FromDevice, _>(rig.pages(512)).unwrap();
        let mut loans = Loans::one(Arc::new(first));
        loans.add(job.clone()).unwrap();
        let data = Parts::new(&*job, &(0..512), u32::MAX).unwrap();
        let command = Command { header: &read, data, access: Access::Write, response: 1, loans };
        rig.device.plan(&[Behaviour::Keep, Behaviour::Keep]);
        let mut taken = queue.submit(command).unwrap();
        job.watch(Arc::new(Look(taken.watch().unwrap())));
        let fence = job.fence();
        drop(job);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (sees, looks, other) = (seen.clone(), fence.clone(), queue.clone());
        rig.system.iommu.on_revoke(move |_| {
            let mut seen = sees.lock().unwrap();
            if seen.is_empty() {
                seen.push(looks.outcome());
                let header = header(request::FLUSH);
                let comes = other.submit(flush(&header)).unwrap();
                seen.push(looks.outcome());
                drop(comes);
            }
        });
        if abandoned {
            drop(taken);
            rig.device.release(0);
            // Whoever comes next ends what nobody takes.
            block.flush().unwrap().wait(soon()).unwrap();
        } else {
            rig.device.release(0);
            assert_eq!(taken.wait(soon(), &mut [0]), Ok(513));
        }
        let seen = seen.lock().unwrap().clone();
        assert_eq!(seen, [Some(true); 2], "abandoned: {abandoned}");
        assert_eq!(fence.outcome(), Some(true));
        while rig.device.release(0) {}
        block.flush().unwrap().wait(soon()).unwrap();
        assert_eq!(queue.in_flight(), 0);
        // No place has been lost.
        let all: Vec<_> = (0..queue.size()).map(|_| block.flush().unwrap()).collect();
        assert_eq!(block.flush().map(drop), Err(Error::QueueFull));
        drop(all);
        block.shut_down(soon()).unwrap();
        rig.check();
    }
}

#[test]
fn a_watch_sees_nothing_of_the_request_that_comes_to_its_place() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let queue = block.queue_handler();
    let header = header(request::FLUSH);
    let mut first = queue.submit(flush(&header)).unwrap();
    let watch = first.watch().unwrap();
    assert_eq!(watch.look(&mut [0]), Some(Ok(1)));
    assert_eq!(first.wait(soon(), &mut [0]), Ok(1));
    assert!(first.watch().is_none(), "its result has been taken");
    assert_eq!(watch.look(&mut [0]), None);
    rig.disk.answer(&[status::IOERR]);
    let mut second = queue.submit(flush(&header)).unwrap();
    let other = second.watch().unwrap();
    assert_eq!((watch.look(&mut [0]), other.look(&mut [0])), (None, Some(Ok(1))));
    second.wait(soon(), &mut [0]).unwrap();
    block.shut_down(soon()).unwrap();
    assert_eq!(watch.look(&mut [0]), None);
}

#[test]
fn a_read_whose_future_was_dropped_ends_as_it_went_and_the_next_one_is_told() {
    let pair = Pair::new();
    for (answer, well) in [(&[][..], true), (&[status::IOERR], false), (&[status::UNSUPP], false)] {
        pair.rig.disk.answer(answer);
        let (transfer, fence) = pair.read();
        drop(transfer);
        pair.rig.device.release(0);
        // Nobody has looked; whoever comes next ends what nobody takes.
        pair.block.flush().unwrap().wait(soon()).unwrap();
        assert_eq!(fence.outcome(), Some(well));
        assert_eq!(pair.shows(), well, "a stale picture is not shown");
        assert!(pair.shows(), "one has been told");
    }
    pair.rig.check();
}

#[test]
fn what_a_reset_ends_has_failed() {
    for dropped in [false, true] {
        let pair = Pair::new();
        let (transfer, fence) = pair.read();
        let mut transfer = Some(transfer);
        if dropped {
            transfer = None;
        }
        let Pair { rig, block, written, shown } = pair;
        block.shut_down(soon()).unwrap();
        assert_eq!(fence.outcome(), Some(false));
        if let Some(mut transfer) = transfer {
            assert_eq!(transfer.wait(soon()), Err(Error::ShutDown));
        }
        assert!(matches!(Job::begin(&shown, now()), Err(dma::Error::JobFailed(_))));
        drop(Job::begin(&shown, now()).unwrap());
        drop(written);
        rig.check();
    }
}

/// The disk breaks the rules while it has a read: the queue is dead, the disk is not.
#[test]
fn a_read_that_a_broken_disk_still_has_is_in_the_way_until_the_disk_is_reset() {
    let pair = Pair::new();
    let (mut transfer, fence) = pair.read();
    pair.rig.device.plan(&[Behaviour::WrongId(15)]);
    assert!(pair.block.flush().unwrap().wait(soon()).is_err());
    assert!(transfer.wait(soon()).is_err());
    drop(transfer);
    fence.known_to_have_failed();
    for _ in 0..3 {
        assert!(!pair.shows());
        assert!(pair.rig.reaches(pair.written.iova()), "it writes");
    }
    let Pair { rig, block, written: _written, shown } = pair;
    block.shut_down(soon()).unwrap();
    drop(Job::begin(&shown, now()).unwrap());
    rig.check();
}
