//! The IOMMU-API: a domain of the driver's own, attached in place of the DMA domain.

use crate::memory::adjacent;
use crate::run::About::Memory;
use crate::run::Benchmark;
use crate::stand::{Mode, Stand};
use core::hint::black_box;
use dma::{Bidirectional, OwnedDomain};
use iommu::{Iova, PAGE_SIZE};
use ktest::TestResult;

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[
    Benchmark {
        name: "iommu4k",
        about: Memory,
        modes: &[Mode::Strict],
        run: |stand| place(stand, "iommu4k", AT, PAGE_SIZE, 1024),
    },
    Benchmark {
        name: "iommu2m",
        about: Memory,
        modes: &[Mode::Strict],
        run: |stand| place(stand, "iommu2m", AT, 2 << 20, 1024),
    },
    Benchmark {
        name: "iommu1g",
        about: Memory,
        modes: &[Mode::Strict],
        run: |stand| place(stand, "iommu1g", AT, 1 << 30, 1024),
    },
    // A page off, so that no two of its pages make a block, nor sixteen a contiguous run.
    Benchmark {
        name: "iommu2m_as_512x4k",
        about: Memory,
        modes: &[Mode::Strict],
        run: |stand| place(stand, "iommu2m_as_512x4k", AT + PAGE_SIZE, 2 << 20, 128),
    },
    Benchmark { name: "iova_to_phys", about: Memory, modes: &[Mode::Strict], run: translate },
];

/// Where to map: aligned for the largest block.
const AT: u64 = 0x10_0000_0000;

/// Places a buffer in the domain and takes it out again.
fn place(stand: &Stand, name: &str, at: u64, bytes: u64, batch: u32) -> TestResult {
    let domain = OwnedDomain::new("bench", stand.device())?;
    let attachment = domain.attach(stand.device())?;
    let mut buffer = Some(adjacent(stand.device(), bytes)?);
    stand.measure(name, batch, || {
        let Some(pages) = buffer.take() else { ktest::skip!("the buffer is lost") };
        let placed = domain.map_owned::<Bidirectional, _>(black_box(Iova::new(at)), pages)?;
        black_box(placed.range());
        buffer = Some(placed.unmap()?);
        Ok(())
    })?;
    attachment.detach()?;
    Ok(())
}

/// Asks where a byte is.
fn translate(stand: &Stand) -> TestResult {
    let domain = OwnedDomain::new("bench", stand.device())?;
    let attachment = domain.attach(stand.device())?;
    let pages = adjacent(stand.device(), PAGE_SIZE)?;
    let placed = domain.map_owned::<Bidirectional, _>(Iova::new(AT), pages)?;
    stand.measure("iova_to_phys", 4096, || {
        black_box(domain.iova_to_phys(black_box(Iova::new(AT + 8))));
        Ok(())
    })?;
    placed.unmap()?;
    attachment.detach()?;
    Ok(())
}
