//! The allocator of device addresses with few and with many live ranges: the cost is to be flat.

#![allow(missing_docs)] // What criterion's macros make.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use iommu::iova::IovaAllocator;
use iommu::{Iova, IovaRange, PAGE_SIZE};
use std::collections::VecDeque;
use std::hint::black_box;

const TOP: Iova = Iova::new(u64::MAX);

fn allocator() -> IovaAllocator {
    let window = IovaRange::new(Iova::new(0), 1 << 48).expect("48 bits");
    IovaAllocator::new(window, PAGE_SIZE).expect("memory for an allocator")
}

fn live(iova: &IovaAllocator, count: usize) -> VecDeque<IovaRange> {
    (0..count).map(|_| iova.allocate(PAGE_SIZE, PAGE_SIZE, TOP).expect("room in 48 bits")).collect()
}

/// One page is allocated and freed beside the others.
fn beside(c: &mut Criterion) {
    let mut group = c.benchmark_group("a page, beside so many live ranges");
    for count in [1, 100, 10_000, 1_000_000] {
        let iova = allocator();
        let others = live(&iova, count);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                let range = iova.allocate(black_box(PAGE_SIZE), PAGE_SIZE, TOP).expect("room");
                iova.free(range).expect("just allocated");
            });
        });
        drop(others);
    }
    group.finish();
}

/// The oldest range is freed and a new one allocated.
fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("the oldest of so many ranges for a new one");
    for count in [1, 100, 10_000, 1_000_000] {
        let iova = allocator();
        let mut ring = live(&iova, count);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                if let Some(range) = ring.pop_front() {
                    iova.free(range).expect("live");
                }
                ring.push_back(iova.allocate(black_box(PAGE_SIZE), PAGE_SIZE, TOP).expect("room"));
            });
        });
    }
    group.finish();
}

/// Sizes up to a chunk, and one beyond.
fn sizes(c: &mut Criterion) {
    let mut group = c.benchmark_group("so many pages");
    for pages in [1_u64, 16, 256, 512, 1024] {
        let iova = allocator();
        group.bench_function(BenchmarkId::from_parameter(pages), |b| {
            b.iter(|| {
                let range = iova.allocate(black_box(pages * PAGE_SIZE), PAGE_SIZE, TOP).expect("room");
                iova.free(range).expect("just allocated");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, beside, ring, sizes);
criterion_main!(benches);
