//! Virtual contiguous memory: chunks by a ladder from memory that is in pieces, and one range of it for each space.

use super::pattern;
use crate::bench::soon;
use alloc::vec::Vec;
use board::KERNEL_SPACE;
use dma::vcm::{self, Cpu};
use dma::{Bidirectional, CpuReads, CpuWrites, Ladder, OwnedDomain, PageRequest, PageSet};
use iommu::{Iova, PAGE_SIZE};
use ktest::{expect, expect_eq, ktest};
use testdev::edu::Completion;

const MIB: u64 = 1 << 20;
const MEDIUM: u64 = 64 << 10;
const LADDER: Ladder = match Ladder::new(&[2 * MIB, MEDIUM, PAGE_SIZE]) {
    Some(ladder) => ladder,
    None => Ladder::DEFAULT,
};

ktest! {
    fn fragmented_memory_is_one_range_for_the_cpu_and_for_two_devices_by_the_largest_leaves(bench) {
        let (edu, disk) = (bench.edu()?, bench.disk()?);
        let memory = edu.master().device().memory();
        // In one piece, and not from the area for large allocations, which scattered memory leaves alone.
        let piece = |size| {
            let request = PageRequest { align: size, ..PageRequest::anywhere(size) };
            PageSet::allocate(memory, request, Ladder::SINGLE_PAGES).ok()
        };
        let (mut large, mut odd, mut even) = (Vec::new(), Vec::new(), Vec::new());
        large.try_reserve_exact(4096)?;
        odd.try_reserve_exact(8192)?;
        even.try_reserve_exact(8192)?;
        // All there is, in large pieces, then in middling ones.
        large.extend(core::iter::from_fn(|| piece(2 * MIB)).take(4096));
        expect!(large.len() > 64, "{} large pieces", large.len());
        odd.extend(core::iter::from_fn(|| piece(MEDIUM)).take(4096));
        // Eight large ones become middling ones, of which every second is free again; two large ones stay.
        large.truncate(large.len() - 8);
        let pieces = (0..).zip(core::iter::from_fn(|| piece(MEDIUM)).take(4096));
        let count = pieces.map(|(index, piece)| if index % 2 == 0 { even.push(piece) } else { odd.push(piece) }).count();
        expect!(count >= 8 * 32, "{count} pieces of eight large ones");
        odd.clear();
        large.truncate(large.len() - 2);

        let len = 4 * MIB + 20 * MEDIUM;
        let (buffer, chunks) = vcm::fill("fragmented", memory, len, LADDER)?;
        log::info!("{len:#x} bytes: {chunks}");
        let got: Vec<(u64, u64)> = chunks.iter().collect();
        expect_eq!(got, [(2 * MIB, 2), (MEDIUM, 20), (PAGE_SIZE, 0)]);
        // No large chunk is left, and the ladder goes on without.
        let (more, fewer) = vcm::fill("more", memory, 2 * MIB + PAGE_SIZE, LADDER)?;
        log::info!("and more: {fewer}");
        expect!(fewer.iter().any(|(size, count)| size == 2 * MIB && count == 0));
        drop(more);

        // So far up that no other test has mapped pages there: where there is a table for pages, there is no block.
        let for_edu = vcm::reserve(edu.master().device(), len, 64 << 30)?.back::<Bidirectional>(&buffer).map_err(|(_, error)| error)?;
        let for_disk = vcm::reserve(disk.block().device(), len, MEDIUM)?.back::<dma::ToDevice>(&buffer).map_err(|(_, error)| error)?;
        let cpu = Cpu(&KERNEL_SPACE);
        let for_cpu = vcm::reserve(&cpu, len, 2 * MIB)?.back::<Bidirectional>(&buffer).map_err(|(_, error)| error)?;
        expect!(for_edu.iova().get() % (2 * MIB) == 0 && for_disk.iova().get() % MEDIUM == 0 && for_cpu.start() % (2 * MIB) == 0);
        for (whose, leaves) in [("edu", for_edu.leaves()), ("cpu", for_cpu.leaves())] {
            let leaves = leaves.ok_or(board::Error::Missing("leaves"))?;
            log::info!("{whose}: {leaves}");
            expect_eq!((leaves.of(2 * MIB), leaves.of(PAGE_SIZE), leaves.contiguous), (2, 20 * 16, 20 * 16));
        }
        expect!(for_disk.leaves().is_some_and(|leaves| leaves.contiguous >= 20 * 16));

        // The same bytes, whoever looks.
        let bytes = pattern(5, 2048);
        let mut seen = alloc::vec![0; 2048];
        for at in [0, 2 * MIB - 1024, 4 * MIB - 1000, 4 * MIB + MEDIUM - 24, len - 2048] {
            // The device may write: the CPU has to wait.
            expect!(buffer.cpu_access::<CpuReads>().is_err());
            edu.edu().dma_to_device(Iova::new(for_edu.iova().get() + at), 2048, Completion::Interrupt, soon())?;
        }
        let area = for_edu.unmap()?;
        let since = bench.watch();
        edu.edu().dma_from_device(Iova::new(area.start()), 64, Completion::Interrupt, soon())?;
        expect!(bench.fault(edu.master().streams(), since).is_some(), "reached after it was unmapped");
        for at in [0, 2 * MIB - 1024, 4 * MIB - 1000, 4 * MIB + MEDIUM - 24, len - 2048] {
            for_cpu.write_at(&mut buffer.cpu_access::<CpuWrites>()?, at, &bytes)?;
            buffer.cpu_access::<CpuReads>()?.read_at(at, &mut seen)?;
            expect!(seen == bytes, "at {at:#x}");
        }
        let for_edu = area.back::<Bidirectional>(&buffer).map_err(|(_, error)| error)?;
        for at in [2 * MIB - 1024, 4 * MIB + MEDIUM - 24] {
            edu.edu().dma_to_device(Iova::new(for_edu.iova().get() + at), 2048, Completion::Interrupt, soon())?;
            edu.edu().dma_from_device(Iova::new(for_edu.iova().get() + 8192), 2048, Completion::Interrupt, soon())?;
        }
        drop(for_edu.unmap()?);
        for_cpu.read_at(&buffer.cpu_access::<CpuReads>()?, 8192, &mut seen)?;
        expect!(seen == bytes);

        let start = for_cpu.start();
        drop(for_cpu.unmap()?);
        // SAFETY: reading it changes nothing.
        let read = unsafe { arch::probe::read8(start) };
        expect!(read.is_err(), "the kernel still reaches what it has unmapped");
        drop(for_disk);
        expect!(buffer.into_pages().is_ok());
        drop((large, even));
        edu.stop()?;
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_devices_whole_address_space_is_exchanged_for_another_and_back(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let spaces = [OwnedDomain::new("one", device)?, OwnedDomain::new("two", device)?];
        let mut backed = Vec::new();
        let mut buffers = Vec::new();
        let mut at = None;
        for (space, fill) in spaces.iter().zip([0x11, 0x22]) {
            let (buffer, _) = vcm::fill("half", device.memory(), 2 * MEDIUM, Ladder::DEFAULT)?;
            buffer.cpu_access::<CpuWrites>()?.write_at(MEDIUM - 32, &[fill; 64])?;
            let area = match at {
                None => vcm::reserve(space, 2 * MEDIUM, MIB)?,
                Some(start) => vcm::reserve_at(space, start, 2 * MEDIUM)?,
            };
            at = Some(area.start());
            backed.push(area.back::<Bidirectional>(&buffer).map_err(|(_, error)| error)?);
            buffers.push(buffer);
        }
        let start = at.unwrap_or_default();
        let mut attached = spaces[0].attach(device)?;
        for (round, space) in (0..).zip([0, 1, 0, 1]) {
            attached.swap(&spaces[space])?;
            edu.edu().dma_to_device(Iova::new(start + MEDIUM - 32), 64, Completion::Interrupt, soon())?;
            edu.edu().dma_from_device(Iova::new(start + MEDIUM + 64 * (1 + round)), 64, Completion::Interrupt, soon())?;
        }
        attached.detach()?;
        drop(backed);
        for (buffer, (fill, rounds)) in buffers.into_iter().zip([(0x11, [1, 0, 1, 0]), (0x22, [0, 1, 0, 1])]) {
            for (round, mine) in (0..).zip(rounds) {
                let mut seen = [0; 64];
                buffer.cpu_access::<CpuReads>()?.read_at(MEDIUM + 64 * (1 + round), &mut seen)?;
                expect_eq!(seen, [fill * mine; 64]);
            }
        }
        edu.stop()?;
        Ok(())
    }
}
