//! What it costs to split a range into range-based TLB invalidations: one command, and as many as there can be.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use iommu::{Iova, IovaRange};
use smmuv3::tlbi::Split;
use std::hint::black_box;

const START: u64 = 0x12_3456_7000;

fn pages(count: u64) -> IovaRange {
    IovaRange::new(Iova::new(START), count << 12).expect("in the space")
}

/// All pieces of a range: a power of two is one, a length whose bits are all set takes one for every five of them.
fn split(c: &mut Criterion) {
    let mut group = c.benchmark_group("split so many pages");
    for count in [1_u64, 512, 1023, (1 << 20) - 1, (1 << 35) - 1] {
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| Split::new(black_box(pages(count)), 12, 3).fold(0, |sum, (address, _)| sum ^ address));
        });
    }
    group.finish();
}

/// The way of what is one piece.
fn whole(c: &mut Criterion) {
    let mut group = c.benchmark_group("the only piece of so many pages");
    for count in [1_u64, 512, 1 << 18] {
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| Split::whole(black_box(pages(count)), 12, 3));
        });
    }
    group.finish();
}

criterion_group!(benches, split, whole);
criterion_main!(benches);
