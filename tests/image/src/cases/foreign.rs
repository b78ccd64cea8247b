//! Drivers that were written for other kernels, as they come from crates.io, each with an address space of its device's own.
//!
//! Red when `unshare` kept the mapping, when all drivers had one slot, and when their transport did not ask for the way through the
//! IOMMU on their behalf.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::sync::Arc;
use alloc::vec::Vec;
use alloc::{format, vec};
use base::{Deadline, wait_until};
use board::{Error, Master};
use dma::hal::{ForeignHal, HasSlot};
use dma::{FromDevice, Ladder, Limits};
use iommu::{Iova, IovaRange, PAGE_SIZE};
use ktest::{Outcome, expect, expect_eq, ktest};
use virtio::transport::{ForeignTransport, PciTransport};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::common::Feature;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Hal};

dma::foreign_driver! {
    /// The disk.
    Disk
    /// The source of random numbers.
    Random
    /// One end of the wire.
    Here
    /// The other end.
    There
}

type Console<S> = VirtIOConsole<ForeignHal<S>, ForeignTransport>;

const BLOCK: u16 = 0x1042;
const CONSOLE: u16 = 0x1043;
const ENTROPY: u16 = 0x1044;
const SECTOR: usize = 512;

/// Attaches the `nth` device of a kind, fills the slot of `S` with it, and lets it loose: a foreign driver can be started on it.
fn attach<S: HasSlot>(bench: &Bench, device: u16, nth: usize) -> Result<(Master, ForeignTransport), Outcome> {
    let (host, function) = bench.function(0x1af4, device, nth)?;
    let name = format!("foreign {device:#x}");
    let master = bench.hardware.attach(host, &function, &name, Limits::NONE, false)?;
    // Off the bus until here: nothing that the driver is made of could have let it loose.
    expect!(!function.is_bus_master());
    S::slot().install(master.device())?;
    let transport = ForeignTransport::new(Arc::new(PciTransport::new(function)?), master.device().name())?;
    master.release()?;
    Ok((master, transport))
}

/// Takes the device out of the slot of `S`, of which the driver is gone, and off the bus. Nothing may be left or have gone wrong.
fn detach<S: HasSlot>(master: &Master) -> Result<(), Outcome> {
    let report = S::slot().remove().ok_or(Error::Missing("device in the slot"))?;
    expect_eq!((report.shares, report.rings, report.failures, report.misuses), (0, 0, 0, 0), "{report}");
    expect_eq!(master.device().stats().live_mappings, 0);
    master.arrest()?;
    Ok(())
}

/// What the device of `S` has, by its own addresses.
fn lent<S: HasSlot>() -> Vec<IovaRange> {
    S::slot().lent().collect()
}

/// Where an address of a device is in memory.
fn behind(master: &Master, iova: Iova) -> Option<u64> {
    let domain = master.group()?.domain()?;
    domain.space().translate(iova).map(|translation| translation.0.get())
}

ktest! {
    fn a_foreign_block_driver_reads_and_writes_the_same_disk_as_our_own(bench) {
        let ours = bench.disk()?;
        let sectors = ours.block().geometry().sectors;
        let device = ours.block().device();
        let pages = device.page_set(8 * PAGE_SIZE, Ladder::SINGLE_PAGES)?;
        let into = Arc::new(device.map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
        base::block_on(soon(), ours.block().read(0, &into, 0..8 * PAGE_SIZE)?)??;
        let mut known = vec![0; 8 * PAGE_SIZE as usize];
        into.view().read(0, &mut known)?;
        drop(into);
        ours.stop()?;
        // A partition table.
        expect!(&known[SECTOR..SECTOR + 8] == b"EFI PART");

        let since = bench.watch();
        let (master, transport) = attach::<Disk>(bench, BLOCK, 0)?;
        let mut disk = VirtIOBlk::<ForeignHal<Disk>, _>::new(transport)?;
        expect_eq!(disk.capacity(), sectors);
        // Neither begins at a page.
        let mut found = vec![0; known.len() + 8];
        disk.read_blocks(0, &mut found[8..])?;
        expect!(found[8..] == known[..]);
        expect!(found[..8] == [0; 8]);
        let scratch = sectors as usize - 4096;
        let bytes = pattern(61, 5 * SECTOR);
        disk.write_blocks(scratch, &bytes)?;
        disk.flush()?;
        let mut back = vec![0; bytes.len()];
        disk.read_blocks(scratch, &mut back)?;
        expect!(back == bytes);
        expect_eq!(Disk::slot().report().shares, 0);
        expect_eq!(Disk::slot().report().rings, 2);
        drop(disk);
        expect!(!bench.has_faulted(master.streams(), since));
        detach::<Disk>(&master)?;

        let ours = bench.disk()?;
        let device = ours.block().device();
        let pages = device.page_set(bytes.len() as u64, Ladder::SINGLE_PAGES)?;
        let into = Arc::new(device.map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
        base::block_on(soon(), ours.block().read(scratch as u64, &into, 0..bytes.len() as u64)?)??;
        let mut found = vec![0; bytes.len()];
        into.view().read(0, &mut found)?;
        drop(into);
        ours.stop()?;
        expect!(found == bytes);
        Ok(())
    }
    machine: foreign
}

ktest! {
    fn a_foreign_entropy_driver_gets_bytes_that_differ(bench) {
        let since = bench.watch();
        let (master, transport) = attach::<Random>(bench, ENTROPY, 0)?;
        let mut random = VirtIORng::<ForeignHal<Random>, _>::new(transport)?;
        let mut drawn = Vec::new();
        for _ in 0..8 {
            let mut bytes = [0; 40];
            let count = random.request_entropy(&mut bytes[3..35])?;
            expect!((1..=32).contains(&count), "{count}");
            // Nothing beside the buffer was written.
            expect!(bytes[..3] == [0; 3] && bytes[35..] == [0; 5]);
            expect!(bytes[3..35] != [0; 32]);
            expect!(!drawn.contains(&bytes));
            drawn.push(bytes);
        }
        drop(random);
        expect!(!bench.has_faulted(master.streams(), since));
        detach::<Random>(&master)
    }
    machine: foreign
}

/// Receives until `wanted` bytes are there.
fn receive<S: HasSlot>(console: &mut Console<S>, wanted: usize) -> Result<Vec<u8>, Outcome> {
    let (mut bytes, deadline) = (Vec::new(), soon());
    while bytes.len() < wanted {
        match console.recv(true)? {
            Some(byte) => bytes.push(byte),
            None if deadline.has_passed() => return Err(Error::Missing("rest of a message").into()),
            // No interrupt says that there is more: look again in a moment.
            None => drop(wait_until(Deadline::after_millis(1), || false)),
        }
    }
    Ok(bytes)
}

ktest! {
    /// The machine's two consoles are the ends of one wire. Each has an address space of its own, though the driver is the same.
    fn two_foreign_console_drivers_talk_to_each_other_each_in_an_address_space_of_its_own(bench) {
        let since = bench.watch();
        let (here, transport) = attach::<Here>(bench, CONSOLE, 0)?;
        let mut one: Console<Here> = VirtIOConsole::new(transport)?;
        let (there, transport) = attach::<There>(bench, CONSOLE, 1)?;
        let mut other: Console<There> = VirtIOConsole::new(transport)?;

        // Two rings of two parts each, and a buffer to receive into.
        let (of_one, of_other) = (lent::<Here>(), lent::<There>());
        expect_eq!((of_one.len(), of_other.len()), (5, 5));
        for range in &of_one {
            let phys = behind(&here, range.start()).ok_or(Error::Missing("translation"))?;
            expect!(phys != range.start().get());
            // The same number is something else for the other device, or nothing.
            expect!(behind(&there, range.start()) != Some(phys));
        }

        let message = pattern(62, 700);
        one.send_bytes(&message)?;
        let heard = receive(&mut other, message.len())?;
        expect!(heard == message);
        // The echo.
        for piece in heard.chunks(100) {
            other.send_bytes(piece)?;
        }
        expect!(receive(&mut one, message.len())? == message);
        drop((one, other));
        expect!(!bench.has_faulted(here.streams(), since) && !bench.has_faulted(there.streams(), since));
        for (report, master) in [(Here::slot().remove(), &here), (There::slot().remove(), &there)] {
            let report = report.ok_or(Error::Missing("device in the slot"))?;
            // This driver never unshares the buffer with which it waits for the next message.
            expect_eq!((report.shares, report.rings, report.failures, report.misuses), (1, 0, 0, 0), "{report}");
            expect_eq!(master.device().stats().live_mappings, 0);
            master.arrest()?;
        }
        Ok(())
    }
    machine: foreign
}

ktest! {
    /// A driver that tells its device of a buffer, and takes the buffer back before the device has used it.
    fn what_a_foreign_driver_has_unshared_its_device_no_longer_reaches(bench) {
        let (master, mut transport) = attach::<Disk>(bench, BLOCK, 0)?;
        let _ = transport.begin_init(Feature::VERSION_1);
        let mut queue = VirtQueue::<ForeignHal<Disk>, 16>::new(&mut transport, 0, false, false)?;
        transport.finish_init();
        // Reads sector 0.
        let (request, mut response) = ([0; 16], [0xff]);
        let mut buffer = vec![0x5a; SECTOR];
        let since = bench.watch();
        // SAFETY: all three live until the queue is gone.
        unsafe { queue.add(&[&request], &mut [&mut buffer, &mut response]) }?;
        // The two parts of the ring, then the request, the buffer and the status.
        let ranges = lent::<Disk>();
        expect_eq!(ranges.len(), 2 + 3);
        let address = ranges[3].start();
        expect!(behind(&master, address).is_some());
        let slice = core::ptr::NonNull::from(&mut buffer[..]);
        // SAFETY: the share that was made of `buffer`. What is wrong is only that the device has yet to use it.
        unsafe { ForeignHal::<Disk>::unshare(address.get(), slice, BufferDirection::DeviceToDriver) };
        expect_eq!((Disk::slot().report().misuses, behind(&master, address)), (0, None));
        transport.notify(0);
        let noted = bench.fault(master.streams(), since).ok_or(Error::Missing("fault record"))?;
        expect_eq!((noted.fault.iova, noted.fault.event), (Some(address), "F_TRANSLATION"));
        let explained = bench.hardware.explain(&noted.fault).unwrap_or_default();
        expect!(explained.contains("foreign"), "{explained}");
        expect!(buffer.iter().all(|byte| *byte == 0x5a));
        expect!(response == [0xff]);

        // Contained: off the bus, and all that it had is taken back and named.
        let report = Disk::slot().remove().ok_or(Error::Missing("device in the slot"))?;
        expect_eq!((report.shares, report.rings, report.misuses, report.quarantined), (2, 2, 0, 0), "{report}");
        expect_eq!(master.device().stats().live_mappings, 0);
        master.arrest()?;
        // The driver gives its rings back when it goes, after its device.
        drop((transport, queue));
        expect_eq!(Disk::slot().report().misuses, 0);
        drop(master);
        // And the device works for the next.
        let ours = bench.disk()?;
        ours.stop()?;
        Ok(())
    }
    machine: foreign
}

ktest! {
    fn a_foreign_driver_without_a_device_gets_nothing_and_fails_by_itself(bench) {
        let (host, function) = bench.function(0x1af4, ENTROPY, 0)?;
        let master = bench.hardware.attach(host, &function, "foreign", Limits::NONE, false)?;
        let transport = ForeignTransport::new(Arc::new(PciTransport::new(function)?), "foreign")?;
        // Its slot is empty.
        let failed = VirtIORng::<ForeignHal<Random>, _>::new(transport);
        expect!(matches!(failed, Err(virtio_drivers::Error::DmaError)));
        master.arrest()?;
        Ok(())
    }
    machine: foreign
}
