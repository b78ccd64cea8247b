//! Translation tables: what mapping and unmapping costs the CPU, by size and by the leaves it takes.

#![allow(missing_docs)] // What criterion's macros make.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use iommu::contract::{TableBlock, TableMemory};
use iommu::pgtable::{Geometry, Granule, PageTable, Stage};
use iommu::{Iova, IovaRange, OutOfMemory, PhysAddr, PhysRange, Prot};
use std::hint::black_box;
use std::sync::atomic::AtomicU64;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const LOW: u64 = 16 << 20;
const HIGH: u64 = 64 << 30;

/// Memory that no hardware walks.
struct Quiet;

// SAFETY: leaked words of the benchmark's own.
unsafe impl TableMemory for Quiet {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let words: &'static [AtomicU64] = Box::leak((0..bytes / 8).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>());
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(PhysAddr::new(words.as_ptr().addr() as u64 & !0xfff), words, self) })
    }

    fn free(&self, _: PhysAddr, _: &'static [AtomicU64]) {}

    fn publish(&self, _: &[AtomicU64]) {}
}

fn table() -> PageTable {
    let geometry = Geometry::new(Granule::K4, Stage::One, 48, 44).expect("a shape that exists");
    PageTable::new(geometry, &Quiet).expect("memory for a table")
}

/// One run is mapped and unmapped.
fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("map and unmap one run");
    // A page off, nothing but single pages fits.
    for (name, at, len) in [
        ("a page below 1 GiB", LOW, 4 << 10),
        ("a page", HIGH, 4 << 10),
        ("64 KiB", HIGH, 64 << 10),
        ("1 MiB", HIGH, 1 << 20),
        ("2 MiB in pages", HIGH + 0x1000, 2 << 20),
        ("a block of 2 MiB", HIGH + (4 << 20), 2 << 20),
        ("a block of 1 GiB", HIGH + (1 << 30), 1 << 30),
    ] {
        let table = table();
        let range = IovaRange::new(Iova::new(at), len).expect("in the space");
        let run = PhysRange::new(PhysAddr::new(1 << 30), len).expect("in the space");
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                table.map_exclusively::<false>(black_box(range), &[run], RW).expect("free");
                let _ = black_box(table.unmap(range).expect("whole"));
            });
        });
    }
    group.finish();
}

/// As many runs as pages, none adjacent, are mapped and unmapped together.
fn lists(c: &mut Criterion) {
    let mut group = c.benchmark_group("map and unmap so many runs of a page");
    for count in [16_u64, 256] {
        let table = table();
        let range = IovaRange::new(Iova::new(LOW), count << 12).expect("in the space");
        let run = |i: u64| PhysRange::new(PhysAddr::new((1 << 30) + (i << 13)), 4096).expect("in the space");
        let runs: Vec<PhysRange> = (0..count).map(run).collect();
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                table.map_exclusively::<false>(black_box(range), &runs, RW).expect("free");
                let _ = black_box(table.unmap(range).expect("whole"));
            });
        });
    }
    group.finish();
}

/// Where a byte is.
fn translate(c: &mut Criterion) {
    let table = table();
    for at in [LOW, HIGH] {
        let range = IovaRange::new(Iova::new(at), 4096).expect("in the space");
        let run = PhysRange::new(PhysAddr::new(1 << 30), 4096).expect("in the space");
        table.map_exclusively::<false>(range, &[run], RW).expect("free");
        c.bench_function(&format!("translate at {at:#x}"), |b| b.iter(|| table.translate(black_box(range.start()))));
    }
}

criterion_group!(benches, runs, lists, translate);
criterion_main!(benches);
