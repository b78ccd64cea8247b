//! The GPU against a display in software, which notes where a backing lies when it is attached and reads it later.

use super::{now, soon};
use crate::device::Vectors;
use crate::fakes::{Behaviour, FakeDevice, MemoryDisplay, Registers};
use crate::gpu::{Backing, Gpu, Mode, Options, Rect, Resource, ResponseCode, RowOrder};
use crate::queue::Loans;
use crate::spec::gpu::{CTRL_HDR_SIZE, Format, MAX_BACKING_ENTRIES, command, config, feature, response};
use crate::{Error, Misbehaviour};
use base::Deadline;
use core::future::Future;
use dma::fakes::FakeSystem;
use dma::{Attachment, CpuWrites, FromDevice, Job, Ladder, Mapped, PageSet, SharedBuffer, ToDevice};
use proptest::prelude::*;
use std::sync::Arc;

type Picture = Mapped<ToDevice, PageSet>;

struct Rig {
    system: FakeSystem,
    host: dma::fakes::FakeDevice,
    display: MemoryDisplay,
    device: Arc<FakeDevice>,
}

impl Rig {
    fn new(change: impl FnOnce(&mut Registers)) -> Self {
        let system = FakeSystem::new();
        let host = system.device("gpu").unwrap();
        let display = MemoryDisplay::new(640, 480);
        let mut registers = display.registers();
        change(&mut registers);
        let device = FakeDevice::new(registers, display.clone(), Arc::new(host.master.clone()));
        Self { system, host, display, device }
    }

    fn start(&self) -> Result<Gpu, Error> {
        let options = Options { vectors: Vectors { config: Some(0), queue: Some(1) } };
        let gpu = Gpu::new(self.device.clone(), self.host.device.clone(), &options, Deadline::after_millis(20))?;
        self.device.connect(0, gpu.config_handler().unwrap());
        self.device.connect(1, gpu.queue_handler());
        Ok(gpu)
    }

    /// Lends `bytes` bytes, each of which tells where it is.
    fn lend(&self, bytes: u64) -> (Arc<Picture>, Vec<u8>) {
        let mut pages = PageSet::zeroed(self.system.memory, bytes, Ladder::SINGLE_PAGES).unwrap();
        let data: Vec<u8> = (0..pages.len()).map(crate::fakes::MemoryDisk::pattern).collect();
        pages.write_at(0, &data).unwrap();
        (Arc::new(self.host.device.map(pages).unwrap()), data)
    }

    fn check(&self) {
        assert_eq!(self.display.faults(), 0);
        assert_eq!(self.system.memory.violations(), Vec::<String>::new());
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    base::block_on(soon(), future).unwrap()
}

fn show(gpu: &Gpu, width: u32, height: u32, backing: Backing) -> Result<Resource, Error> {
    run(async {
        let resource = gpu.create_resource(width, height, Format::B8G8R8X8, backing).await?;
        gpu.set_scanout(0, &resource, resource.rect()).await?;
        resource.present(resource.rect()).await?;
        Ok(resource)
    })
}

fn give_back(picture: Arc<Picture>) {
    Arc::try_unwrap(picture).expect("somebody still holds the picture").unmap().unwrap();
}

#[test]
fn a_picture_in_scattered_memory_is_shown_from_where_it_lies() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, data) = rig.lend(64 * 48 * 4);
    let resource = show(&gpu, 64, 48, Backing::whole(&picture).unwrap()).unwrap();
    assert_eq!(rig.display.screen(0).unwrap(), data[..64 * 48 * 4]);
    assert_eq!(rig.display.backing(resource.id()).unwrap().len(), 1, "one loan is one entry");
    run(resource.destroy()).unwrap();
    assert_eq!(rig.display.resources(), (0, 0));
    assert_eq!(rig.display.shown(0), 0);
    give_back(picture);
    let log = rig.display.log();
    let end = [command::SET_SCANOUT, command::RESOURCE_DETACH_BACKING, command::RESOURCE_UNREF];
    assert_eq!(log[log.len() - 3..], end);
    rig.check();
}

#[test]
fn a_picture_that_is_stored_bottom_up_is_shown_the_right_way_up() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, data) = rig.lend(54 + 300 * 260);
    // 60 pixels a row, with 20 bytes of padding, behind a header.
    let backing = Backing::rows(&picture, 54, 260, 240, 300, RowOrder::BottomUp).unwrap();
    assert_eq!(backing.len(), 300 * 240);
    let resource = show(&gpu, 60, 300, backing).unwrap();
    let upside: Vec<u8> = (0..300).rev().flat_map(|row| data[54 + row * 260..][..240].to_vec()).collect();
    assert!(rig.display.screen(0).unwrap() == upside);
    assert_eq!(rig.display.backing(resource.id()).unwrap().len(), 300);
    run(resource.destroy()).unwrap();
    give_back(picture);
    rig.check();
}

#[test]
fn rows_that_follow_each_other_become_one_entry() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let backing = Backing::rows(&picture, 0, 64, 64, 64, RowOrder::TopDown).unwrap();
    let resource = run(gpu.create_resource(16, 64, Format::R8G8B8X8, backing)).unwrap();
    assert_eq!(rig.display.backing(resource.id()).unwrap().len(), 1);
}

#[test]
fn several_loans_make_one_picture() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let loans: Vec<_> = (0..9).map(|_| rig.lend(4096)).collect();
    let mut backing = Backing::new();
    for (loan, _) in loans.iter().rev() {
        backing.push(loan, 1024..2048).unwrap();
    }
    let resource = show(&gpu, 16, 9 * 16, backing).unwrap();
    let data: Vec<u8> = loans.iter().rev().flat_map(|(_, data)| data[1024..2048].to_vec()).collect();
    assert!(rig.display.screen(0).unwrap() == data);
    run(resource.destroy()).unwrap();
    loans.into_iter().for_each(|(loan, _)| give_back(loan));
}

#[test]
fn the_largest_list_is_taken_and_a_longer_one_refused() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let rows = MAX_BACKING_ENTRIES as u32;
    let (picture, _) = rig.lend(u64::from(rows) * 8 + 8);
    let list = |rows| Backing::rows(&picture, 0, 8, 4, rows, RowOrder::BottomUp);
    let resource = run(gpu.create_resource(1, rows, Format::B8G8R8A8, list(rows).unwrap())).unwrap();
    assert_eq!(rig.display.backing(resource.id()).unwrap().len(), MAX_BACKING_ENTRIES);
    let max = MAX_BACKING_ENTRIES;
    assert_eq!(list(rows + 1).map(drop), Err(Error::TooManySegments { count: max + 1, max }));
    run(resource.destroy()).unwrap();
    give_back(picture);
}

#[test]
fn a_part_is_transferred_from_its_place_in_the_picture() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, data) = rig.lend(4096);
    let rect = Rect { x: 5, y: 3, width: 7, height: 11 };
    let screen = run(async {
        let resource = gpu.create_resource(32, 32, Format::B8G8R8X8, Backing::whole(&picture)?).await?;
        gpu.set_scanout(0, &resource, resource.rect()).await?;
        resource.transfer(rect).await?;
        resource.flush(rect).await?;
        let screen = rig.display.screen(0).unwrap();
        resource.destroy().await?;
        Ok::<_, Error>(screen)
    })
    .unwrap();
    for (index, pixel) in screen.chunks(4).enumerate() {
        let (x, y) = (index as u32 % 32, index as u32 / 32);
        let inside = (5..12).contains(&x) && (3..14).contains(&y);
        assert_eq!(pixel, if inside { &data[index * 4..][..4] } else { &[0; 4] }, "{x}, {y}");
    }
}

#[test]
fn displays_and_edid_are_told() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let info = run(gpu.display_info()).unwrap();
    let whole = Rect { x: 0, y: 0, width: 640, height: 480 };
    assert_eq!(info.displays().collect::<Vec<_>>(), [(0, whole)]);
    assert_eq!(info.scanout(99), None);
    let edid = run(gpu.edid(0)).unwrap();
    assert!(edid.is_valid());
    assert_eq!(edid.preferred(), Some(Mode { width: 640, height: 480 }));
    assert_eq!(run(gpu.edid(1)), Err(Error::NoSuchScanout(1)));
}

#[test]
fn a_gpu_that_offers_no_edid_is_not_asked() {
    let rig = Rig::new(|registers| registers.features &= !feature::EDID);
    let gpu = rig.start().unwrap();
    assert_eq!(run(gpu.edid(0)), Err(Error::NoEdid));
    assert_eq!(rig.display.log(), [] as [u32; 0]);
}

#[test]
fn impossible_displays_and_edids_are_not_believed() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    rig.display.distort(command::GET_DISPLAY_INFO, |answer| answer[CTRL_HDR_SIZE + 8..][..4].fill(0xff));
    assert_eq!(run(gpu.display_info()).unwrap().displays().count(), 0);
    rig.display
        .distort(command::GET_EDID, |answer| answer[CTRL_HDR_SIZE..][..4].copy_from_slice(&1025_u32.to_le_bytes()));
    assert_eq!(run(gpu.edid(0)), Err(Error::BadConfig { field: "EDID size", value: 1025 }));
    rig.display.distort(command::GET_EDID, |answer| answer[CTRL_HDR_SIZE + 8 + 60] ^= 1);
    let edid = run(gpu.edid(0)).unwrap();
    assert!(!edid.is_valid());
    assert_eq!(edid.preferred(), None);
    rig.display.distort(command::GET_EDID, |answer| answer[CTRL_HDR_SIZE..][..4].fill(0));
    assert_eq!(run(gpu.edid(0)).unwrap().bytes(), [] as [u8; 0]);
}

#[test]
fn impossible_numbers_of_scanouts_are_refused() {
    for value in [0, 17, 255] {
        let rig = Rig::new(|registers| registers.config[config::NUM_SCANOUTS] = value);
        let bad = Error::BadConfig { field: "num_scanouts", value: value.into() };
        assert_eq!(rig.start().map(drop), Err(bad));
    }
}

#[test]
fn events_are_taken_once() {
    let rig = Rig::new(|registers| registers.config[config::EVENTS_READ] = 1);
    let gpu = rig.start().unwrap();
    assert!(gpu.displays_changed());
    rig.device.change(|registers| {
        assert_eq!(registers.config[config::EVENTS_CLEAR], 1);
        registers.config[config::EVENTS_READ] = 0;
    });
    assert!(!gpu.displays_changed());
}

#[test]
fn what_is_wrong_with_a_picture_is_found_before_the_device_hears_of_it() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let make = |width, height, backing| run(gpu.create_resource(width, height, Format::B8G8R8X8, backing)).map(drop);
    let whole = || Backing::whole(&picture).unwrap();
    assert_eq!(make(0, 4, whole()), Err(Error::BadSize { width: 0, height: 4 }));
    assert_eq!(make(4, 16385, whole()), Err(Error::BadSize { width: 4, height: 16385 }));
    assert_eq!(make(32, 33, whole()), Err(Error::BackingTooSmall { needed: 4224, found: 4096 }));
    let other = rig.system.device("other").unwrap();
    let pages = || PageSet::zeroed(rig.system.memory, 4096, Ladder::SINGLE_PAGES).unwrap();
    let foreign = Arc::new(other.device.map::<ToDevice, _>(pages()).unwrap());
    assert_eq!(make(4, 4, Backing::whole(&foreign).unwrap()), Err(Error::ForeignDevice));
    let write_only = Arc::new(rig.host.device.map::<FromDevice, _>(pages()).unwrap());
    assert_eq!(Backing::whole(&write_only).map(drop), Err(Error::WrongDirection("read")));
    let outside = Error::OutsideLoan { offset: 4000, len: 200, loan: 4096 };
    assert_eq!(Backing::new().push(&picture, 4000..4200), Err(outside));
    assert_eq!(Backing::rows(&picture, 8, u64::MAX, 4, 2, RowOrder::BottomUp).map(drop), Err(Error::TooLong));
    assert_eq!(rig.display.log(), [] as [u32; 0]);
    assert_eq!(gpu.resources(), 0);
    let resource = run(gpu.create_resource(32, 32, Format::B8G8R8X8, whole())).unwrap();
    for rect in [
        Rect { x: 1, y: 0, width: 32, height: 1 },
        Rect { x: 0, y: 32, width: 1, height: 1 },
        Rect { x: u32::MAX, y: 0, width: 2, height: 1 },
        Rect { x: 0, y: 0, width: 0, height: 1 },
    ] {
        assert_eq!(run(resource.present(rect)), Err(Error::OutsidePicture));
        assert_eq!(run(gpu.set_scanout(0, &resource, rect)), Err(Error::OutsidePicture));
    }
    assert_eq!(run(gpu.set_scanout(1, &resource, resource.rect())), Err(Error::NoSuchScanout(1)));
}

#[test]
fn a_refusal_names_the_command_and_the_code() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    for (refused, name) in [
        (command::RESOURCE_CREATE_2D, "RESOURCE_CREATE_2D"),
        (command::RESOURCE_ATTACH_BACKING, "RESOURCE_ATTACH_BACKING"),
    ] {
        rig.display.refuse(refused, Some(response::ERR_OUT_OF_MEMORY));
        let result = run(gpu.create_resource(32, 32, Format::B8G8R8X8, Backing::whole(&picture).unwrap())).map(drop);
        let code = ResponseCode(response::ERR_OUT_OF_MEMORY);
        assert_eq!(result, Err(Error::Gpu { command: name, code }));
        assert_eq!(result.unwrap_err().to_string(), format!("the GPU refused {name}: ERR_OUT_OF_MEMORY (0x1201)"));
        rig.display.refuse(refused, None);
        assert_eq!((rig.display.resources(), gpu.resources()), ((0, 0), 0), "nothing is left behind");
    }
    give_back(picture);
}

#[test]
fn a_device_that_does_not_confirm_the_detaching_keeps_the_picture() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    rig.display.refuse(command::RESOURCE_DETACH_BACKING, Some(response::ERR_UNSPEC));
    rig.display.refuse(command::RESOURCE_UNREF, Some(response::ERR_UNSPEC));
    let error = run(resource.destroy()).unwrap_err();
    let code = ResponseCode(response::ERR_UNSPEC);
    assert_eq!(error, Error::Gpu { command: "RESOURCE_DETACH_BACKING", code });
    assert_eq!(Arc::strong_count(&picture), 2);
    assert_eq!(gpu.resources(), 1);
    rig.display.refuse(command::RESOURCE_DETACH_BACKING, None);
    assert!(run(gpu.reclaim()).is_err());
    assert_eq!(Arc::strong_count(&picture), 1, "detached is enough for the memory");
    rig.display.refuse(command::RESOURCE_UNREF, None);
    rig.display.refuse(command::RESOURCE_DETACH_BACKING, None);
    // The backing is gone, which the device says; the resource goes now.
    assert!(run(gpu.reclaim()).is_err());
    assert_eq!(gpu.resources(), 0);
    give_back(picture);
}

#[test]
fn a_device_that_never_answers_keeps_the_picture_until_it_is_reset() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let iova = picture.iova();
    let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    rig.device.plan(&[Behaviour::Swallow]);
    assert!(base::block_on(Deadline::after_millis(2), resource.destroy()).is_err());
    drop(picture);
    assert!(rig.host.master.read(iova, &mut [0]).is_ok());
    gpu.shut_down(soon()).unwrap();
    assert!(rig.host.master.read(iova, &mut [0]).is_err());
    assert_eq!(rig.host.device.stats().live_mappings, 0);
}

#[test]
fn a_device_that_cannot_be_reset_keeps_the_picture_for_ever() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let iova = picture.iova();
    let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    rig.device.change(|registers| registers.resets = false);
    assert_eq!(gpu.shut_down(Deadline::after_millis(2)), Err(Error::ResetTimedOut));
    assert_eq!(run(resource.destroy()), Err(Error::ShutDown));
    drop(picture);
    assert!(rig.host.master.read(iova, &mut [0]).is_ok());
}

#[test]
fn a_dropped_handle_leaves_an_orphan_that_can_be_reclaimed() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    assert_eq!(run(gpu.reclaim()), Ok(0), "a resource that is held is left alone");
    drop(resource);
    assert_eq!(Arc::strong_count(&picture), 2);
    assert_eq!(run(gpu.reclaim()), Ok(1));
    assert_eq!(rig.display.resources(), (0, 0));
    give_back(picture);
}

#[test]
fn giving_up_half_way_through_creation_leaves_an_orphan() {
    for step in 0..2 {
        let rig = Rig::new(|_| {});
        let gpu = rig.start().unwrap();
        let (picture, _) = rig.lend(4096);
        let mut plan = vec![Behaviour::Honest; step];
        plan.push(Behaviour::Keep);
        rig.device.plan(&plan);
        let creation = gpu.create_resource(32, 32, Format::B8G8R8X8, Backing::whole(&picture).unwrap());
        assert!(base::block_on(now(), creation).is_err());
        assert_eq!(Arc::strong_count(&picture), 2);
        rig.device.release(0);
        // Without a backing the detaching is refused; the rest is done all the same.
        let reclaimed = run(gpu.reclaim());
        assert_eq!(reclaimed.is_ok(), step == 1);
        assert_eq!((rig.display.resources(), gpu.resources()), ((0, 0), 0));
        give_back(picture);
    }
}

#[test]
fn a_new_picture_stays_when_the_one_before_it_is_destroyed() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let first = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    let second = show(&gpu, 32, 16, Backing::whole(&picture).unwrap()).unwrap();
    run(first.destroy()).unwrap();
    assert_eq!(rig.display.shown(0), second.id());
    run(gpu.disable_scanout(0)).unwrap();
    assert_eq!(rig.display.shown(0), 0);
    run(second.destroy()).unwrap();
    give_back(picture);
}

#[test]
fn transfer_and_flush_are_fenced_and_share_a_doorbell() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(4096);
    let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
    let before = rig.device.notified();
    run(resource.present(resource.rect())).unwrap();
    assert_eq!(rig.device.notified(), before + 1);
    rig.display.distort(command::TRANSFER_TO_HOST_2D, |answer| answer[8] ^= 0x80);
    assert!(matches!(run(resource.present(resource.rect())), Err(Error::BadFence { .. })));
    rig.display.distort(command::TRANSFER_TO_HOST_2D, |answer| answer[4] = 0);
    assert!(matches!(run(resource.present(resource.rect())), Err(Error::BadFence { found: 0, .. })));
}

/// A shared buffer that the display has attached, of 32 by 32 pixels.
fn shared(rig: &Rig) -> (SharedBuffer, Arc<Attachment<ToDevice>>) {
    let pages = PageSet::zeroed(rig.system.memory, 4096, Ladder::SINGLE_PAGES).unwrap();
    let buffer = SharedBuffer::new("canvas", pages);
    let loan = Arc::new(buffer.attach::<ToDevice>(&rig.host.device).unwrap());
    (buffer, loan)
}

/// Red when the job is not the loan of the command: its fence then ends with whoever gives up waiting.
#[test]
fn nobody_writes_a_picture_until_the_device_has_read_it_whoever_has_given_up_waiting() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (buffer, loan) = shared(&rig);
    let resource = show(&gpu, 32, 32, Backing::whole(&loan).unwrap()).unwrap();
    let write = |deadline| buffer.cpu_access_by::<CpuWrites>(deadline).map(drop);
    let begin = || {
        let job = Job::begin(&loan, soon()).unwrap().unwrap();
        let presenting = resource.begin_present(resource.rect(), Loans::one(job.clone())).unwrap();
        job.watch(Arc::new(presenting.watch().unwrap()));
        presenting
    };
    write(now()).unwrap();
    rig.device.plan(&[Behaviour::Keep]);
    let late = begin();
    assert!(matches!(write(now()), Err(dma::Error::Busy { .. })));
    // The device does not answer in time: it has the picture all the same.
    drop(late);
    assert!(matches!(write(now()), Err(dma::Error::Busy { .. })));
    assert!(rig.device.release(0));
    write(soon()).unwrap();
    // Read, though nobody has looked at the answer; a refusal is an end too.
    let presenting = begin();
    write(now()).unwrap();
    run(presenting).unwrap();
    rig.display.refuse(command::TRANSFER_TO_HOST_2D, Some(response::ERR_UNSPEC));
    let refused = begin();
    write(now()).unwrap();
    assert!(matches!(run(refused), Err(Error::Gpu { .. })));
    rig.display.refuse(command::TRANSFER_TO_HOST_2D, None);
    // A device that has broken the rules may still read.
    rig.device.plan(&[Behaviour::Keep, Behaviour::Twice]);
    let broken = begin();
    assert!(write(soon()).is_err());
    assert!(run(broken).is_err());
    drop(resource);
    gpu.shut_down(soon()).unwrap();
    write(now()).unwrap();
    Arc::try_unwrap(loan).unwrap_or_else(|_| panic!("somebody has it")).detach().unwrap();
    rig.check();
}

#[test]
fn answers_that_are_none_are_errors() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    for (kind, found) in
        [(0_u32, 0), (response::OK_NODATA, response::OK_NODATA), (0x1206, 0x1206), (u32::MAX, u32::MAX)]
    {
        let distort: fn(&mut Vec<u8>) = match kind {
            0 => |answer| answer[..4].fill(0),
            response::OK_NODATA => |answer| answer[..4].copy_from_slice(&response::OK_NODATA.to_le_bytes()),
            0x1206 => |answer| answer[..4].copy_from_slice(&0x1206_u32.to_le_bytes()),
            _ => |answer| answer[..4].fill(0xff),
        };
        rig.display.distort(command::GET_DISPLAY_INFO, distort);
        assert_eq!(run(gpu.display_info()), Err(Error::BadResponse { command: "GET_DISPLAY_INFO", found }));
    }
    rig.display.distort(command::GET_DISPLAY_INFO, |answer| answer.truncate(100));
    assert_eq!(run(gpu.display_info()), Err(Error::ShortAnswer { expected: 408, found: 100 }));
    rig.display.distort(command::GET_DISPLAY_INFO, |answer| answer.truncate(8));
    assert_eq!(run(gpu.display_info()), Err(Error::ShortAnswer { expected: 24, found: 8 }));
    rig.device.plan(&[Behaviour::Ignore(408)]);
    let none = Error::BadResponse { command: "GET_DISPLAY_INFO", found: u32::MAX };
    assert_eq!(run(gpu.display_info()), Err(none));
}

#[test]
fn a_gpu_that_breaks_the_rules_keeps_the_picture_until_it_is_reset() {
    for behaviour in [Behaviour::WrongId(999), Behaviour::Twice, Behaviour::Jump(5), Behaviour::NeedReset] {
        let rig = Rig::new(|_| {});
        let gpu = rig.start().unwrap();
        let (picture, _) = rig.lend(4096);
        let resource = show(&gpu, 32, 32, Backing::whole(&picture).unwrap()).unwrap();
        rig.device.plan(&[behaviour]);
        let error = run(async {
            resource.present(resource.rect()).await?;
            resource.present(resource.rect()).await
        });
        match behaviour {
            Behaviour::NeedReset => assert_eq!(error, Err(Error::NeedsReset)),
            Behaviour::WrongId(id) => {
                assert_eq!(error, Err(Error::DeviceMisbehaved { what: Misbehaviour::NoSuchDescriptor(id) }));
            }
            _ => assert!(matches!(error, Err(Error::DeviceMisbehaved { .. })), "{error:?}"),
        }
        assert!(run(resource.destroy()).is_err());
        assert!(run(gpu.reclaim()).is_err());
        assert_eq!(Arc::strong_count(&picture), 2, "{behaviour:?}");
        gpu.shut_down(soon()).unwrap();
        give_back(picture);
        assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}

#[test]
fn running_out_of_memory_while_a_picture_is_made_leaves_nothing_behind() {
    let rig = Rig::new(|_| {});
    let gpu = rig.start().unwrap();
    let (picture, _) = rig.lend(8192);
    let backing = || Backing::rows(&picture, 0, 256, 128, 32, RowOrder::BottomUp).unwrap();
    rig.system.memory.fail_after(0);
    let result = run(gpu.create_resource(32, 32, Format::B8G8R8X8, backing())).map(drop);
    assert_eq!(result, Err(Error::Dma(dma::Error::OutOfMemory)));
    assert_eq!(gpu.resources(), 0);
    let resource = run(gpu.create_resource(32, 32, Format::B8G8R8X8, backing())).unwrap();
    run(resource.destroy()).unwrap();
    give_back(picture);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_hostile_gpu_gets_typed_errors_out_of_the_driver_and_no_picture_early(
        plan in proptest::collection::vec(super::order::any_behaviour(), 0..30),
        refusals in proptest::collection::vec((0x100_u32..0x10b, 0x1200_u32..0x1208), 0..3),
        indirect: bool,
    ) {
        let without = if indirect { 0 } else { crate::spec::feature::INDIRECT_DESC };
        let rig = Rig::new(|registers| registers.features &= !without);
        let gpu = rig.start().unwrap();
        rig.device.plan(&plan);
        for (command, code) in refusals {
            rig.display.refuse(command, Some(code));
        }
        let mut pictures = Vec::new();
        let mut resources = Vec::new();
        let patient = || Deadline::after_millis(1);
        let _ = base::block_on(patient(), gpu.display_info());
        let _ = base::block_on(patient(), gpu.edid(0));
        for _ in 0..4 {
            let (picture, _) = rig.lend(4096);
            let backing = Backing::rows(&picture, 0, 128, 64, 32, RowOrder::BottomUp).unwrap();
            if let Ok(Ok(resource)) = base::block_on(patient(), gpu.create_resource(16, 32, Format::B8G8R8X8, backing)) {
                let _ = base::block_on(patient(), gpu.set_scanout(0, &resource, resource.rect()));
                let _ = base::block_on(patient(), resource.present(resource.rect()));
                resources.push((resource, Arc::downgrade(&picture)));
            }
            pictures.push(picture);
        }
        for (resource, picture) in resources {
            let id = resource.id();
            let result = base::block_on(patient(), resource.destroy());
            let held = picture.strong_count() == 2;
            // The device is believed when it confirms: then the loan is back, and otherwise only if the detaching was confirmed.
            if let Ok(Ok(())) = result {
                prop_assert!(!held);
            } else if rig.display.backing(id).is_some() && rig.device.resets() == 1 {
                prop_assert!(held, "the device still has it");
            }
        }
        gpu.shut_down(soon()).unwrap();
        pictures.into_iter().for_each(give_back);
        prop_assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}
