//! Buffers that several devices have at once.

use dma::fakes::FakeSystem;
use dma::{
    Bidirectional, BusyWith, CpuReads, CpuWrites, Error, FromDevice, Ladder, Lent, PageSet, SharedBuffer, ToDevice,
    Users,
};
use iommu::FaultReason;

fn buffer(system: &FakeSystem, bytes: u64) -> SharedBuffer {
    SharedBuffer::new("picture", PageSet::zeroed(system.memory, bytes, Ladder::SINGLE_PAGES).unwrap())
}

fn busy(error: Error) -> BusyWith {
    match error {
        Error::Busy { by, buffer } => {
            assert_eq!(&*buffer, "picture");
            by
        }
        other => panic!("{other}"),
    }
}

#[test]
fn what_one_device_writes_the_other_reads_each_at_its_own_address_with_its_own_rights() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    // So that the two do not get the same address by chance.
    let other = gpu.device.map::<ToDevice, _>(gpu.device.pages(4096).unwrap()).unwrap();
    let picture = buffer(&system, 5 * 4096);
    let (reading, showing) =
        (picture.attach::<FromDevice>(&blk.device).unwrap(), picture.attach::<ToDevice>(&gpu.device).unwrap());
    assert_ne!(reading.iova(), showing.iova());
    assert_eq!((reading.segments().len(), Lent::len(&showing)), (1, 5 * 4096));
    blk.master.write(reading.iova().checked_add(8190).unwrap(), b"pixels").unwrap();
    let mut seen = [0; 6];
    gpu.master.read(showing.iova().checked_add(8190).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"pixels");
    assert_eq!(gpu.master.write(showing.iova(), b"x").unwrap_err().reason, FaultReason::Permission);
    assert_eq!(gpu.device.check_loan(&reading).unwrap_err().to_string(), "memory was lent to blk, not to gpu");
    drop(other);
}

/// Caught: `Held::end` without `Loan::end`, and `Held` without its `Drop`.
#[test]
fn the_pages_come_back_when_the_last_attachment_and_the_last_clone_are_gone() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let picture = buffer(&system, 4096);
    let reading = picture.attach::<FromDevice>(&blk.device).unwrap();
    let showing = picture.attach::<ToDevice>(&gpu.device).unwrap();
    blk.master.write(reading.iova(), b"done").unwrap();
    let (iova, shown) = (reading.iova(), showing.iova());
    reading.detach().unwrap();
    assert_eq!(blk.master.write(iova, b"late").unwrap_err().reason, FaultReason::NotMapped);
    let picture = picture.into_pages().unwrap_err();
    gpu.master.read(shown, &mut [0; 4]).unwrap();
    drop(showing);
    assert!(gpu.master.read(shown, &mut [0; 4]).is_err());
    let clone = picture.clone();
    let picture = picture.into_pages().unwrap_err();
    drop(clone);
    let set = picture.into_pages().unwrap();
    let mut seen = [0; 4];
    set.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"done");
}

#[test]
fn the_pages_live_until_the_last_attachment_is_revoked_even_if_nobody_else_has_them() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let picture = buffer(&system, 4096);
    let showing = picture.attach::<ToDevice>(&gpu.device).unwrap();
    drop(picture);
    gpu.master.read(showing.iova(), &mut [0; 4]).unwrap();
    assert_eq!(showing.buffer().name(), "picture");
    drop(showing);
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

/// Caught: `cpu_access` that does not look for writing devices; `DeviceUser::enter` that does not look for the CPU.
#[test]
fn the_cpu_and_a_device_never_race_they_are_told_that_the_buffer_is_busy() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let picture = buffer(&system, 4096);

    let writer = picture.attach::<FromDevice>(&blk.device).unwrap();
    assert_eq!(busy(picture.cpu_access::<CpuReads>().err().unwrap()), BusyWith::DeviceWrites);
    assert_eq!(busy(picture.cpu_access::<CpuWrites>().err().unwrap()), BusyWith::DeviceWrites);
    drop(writer);

    // A device that only reads does not keep the CPU out, but the CPU keeps devices out while it writes.
    let reader = picture.attach::<ToDevice>(&gpu.device).unwrap();
    let reads = (picture.cpu_access::<CpuReads>().unwrap(), picture.cpu_access::<CpuReads>().unwrap());
    assert_eq!(busy(picture.cpu_access::<CpuWrites>().err().unwrap()), BusyWith::CpuReads);
    assert_eq!(busy(picture.attach::<Bidirectional>(&blk.device).unwrap_err()), BusyWith::CpuReads);
    drop(reads);
    let mut writes = picture.cpu_access::<CpuWrites>().unwrap();
    assert_eq!(busy(picture.cpu_access::<CpuReads>().err().unwrap()), BusyWith::CpuWrites);
    assert_eq!(busy(picture.attach::<ToDevice>(&blk.device).unwrap_err()), BusyWith::CpuWrites);
    assert_eq!(busy(picture.attach::<FromDevice>(&blk.device).unwrap_err()), BusyWith::CpuWrites);
    writes.write_at(4092, b"cpu!").unwrap();
    assert!(writes.write_at(4093, b"cpu!").is_err());
    let mut seen = [0; 4];
    gpu.master.read(reader.iova().checked_add(4092).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"cpu!");
    drop(writes);
    drop(reader);
    assert_eq!(picture.users(), Users::default());
}

/// Caught: `Held::end` that drops its hold of the buffer when the revocation failed.
#[test]
fn a_device_that_could_not_be_revoked_keeps_the_buffer_busy_and_its_pages_allocated() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let picture = buffer(&system, 4096);
    let writer = picture.attach::<FromDevice>(&blk.device).unwrap();
    let iova = writer.iova();
    blk.master.write(iova, b"x").unwrap();
    system.iommu.wedge(true);
    writer.detach().unwrap_err();
    system.iommu.wedge(false);
    assert_eq!(busy(picture.cpu_access::<CpuReads>().err().unwrap()), BusyWith::DeviceWrites);
    drop(picture.into_pages().unwrap_err());
    blk.master.write(iova, b"still").unwrap();
    assert_eq!((system.memory.violations().len(), system.memory.live_allocations()), (0, 1));
}
