//! Shared buffers that an importer sees in another order.
//!
//! Seen red: pages mapped in the buffer's own order; a segment cut at the piece's offset in the buffer; a quarter turned the other way;
//! the rows of a tile not turned upside down.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{
    Bounce, Error, FromDevice, Ladder, Lent, Limits, PageSet, Policy, Pool, PoolSource, SharedBuffer, TILE, TileView,
    Tiles, ToDevice, Users, slice,
};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

const VIEWS: [TileView; 6] = [
    TileView::Upright,
    TileView::UpsideDown,
    TileView::Turned(0),
    TileView::Turned(1),
    TileView::Turned(2),
    TileView::Turned(3),
];

/// A pixel that no other place has.
fn pixel(x: u32, y: u32) -> [u8; 4] {
    (y << 16 | x).to_le_bytes()
}

/// A picture of this size in tiles, by the definition.
fn tiled(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (row, column) in (0..height / TILE).flat_map(|row| (0..width / TILE).map(move |column| (row, column))) {
        for (y, x) in (0..TILE).flat_map(|y| (0..TILE).map(move |x| (y, x))) {
            bytes.extend(pixel(column * TILE + x, row * TILE + y));
        }
    }
    bytes
}

/// What is seen at (x, y), by another way than the code's: turning a point, a quarter at a time.
fn expected(view: TileView, (width, height): (u32, u32), (x, y): (u32, u32)) -> [u8; 4] {
    match view {
        TileView::Upright => pixel(x, y),
        TileView::UpsideDown => pixel(x, height - 1 - y),
        TileView::Turned(quarters) => {
            // The tile's place is turned back as often, in the picture's size at each step.
            let (mut column, mut row, mut size) = (x / TILE, y / TILE, (width / TILE, height / TILE));
            for _ in 0..quarters {
                size = (size.1, size.0);
            }
            for _ in 0..quarters {
                // Counterclockwise: what is at the top was at the left.
                (column, row, size) = (row, size.0 - 1 - column, (size.1, size.0));
            }
            pixel(column * TILE + x % TILE, row * TILE + y % TILE)
        }
    }
}

/// Reads a whole loan as a device does that takes a list.
fn read(device: &FakeDevice, loan: &dyn Lent) -> Vec<u8> {
    let mut seen = vec![0; loan.len() as usize];
    let mut rest = &mut seen[..];
    for segment in slice(loan, 0, loan.len()).unwrap() {
        let (now, later) = rest.split_at_mut(segment.len as usize);
        device.master.read(segment.iova, now).unwrap();
        rest = later;
    }
    seen
}

fn devices(system: &FakeSystem) -> [FakeDevice; 2] {
    let pool = Pool::new("pool", system.memory, 4 << 20, iommu::PhysAddr::new(u64::MAX)).unwrap();
    let bounce = Bounce::Always(PoolSource::Shared(Arc::new(pool)));
    let copied = system.device_with_policy("copied", Limits::NONE, Policy { bounce, ..Policy::default() });
    [system.device("gpu").unwrap(), copied.unwrap()]
}

#[test]
fn a_tiled_picture_is_seen_linear_upside_down_and_turned_and_nothing_is_copied() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        for device in devices(&system) {
            for (width, height) in [(96, 64), (32, 32), (64, 160)] {
                let mut pages =
                    PageSet::zeroed(system.memory, 4096 + u64::from(width * height * 4), Ladder::SINGLE_PAGES).unwrap();
                pages.write_at(4096, &tiled(width, height)).unwrap();
                let picture = SharedBuffer::new("picture", pages);
                let tiles = Tiles::new(4096, width, height).unwrap();
                for view in VIEWS {
                    let shown = picture.attach_pieces::<ToDevice>(&device.device, tiles.linear(view)).unwrap();
                    let seen = read(&device, &shown);
                    let (columns, rows) = tiles.size(view);
                    assert_eq!(seen.len() as u32, columns * rows * 4);
                    for (index, found) in seen.chunks_exact(4).enumerate() {
                        let at = (index as u32 % columns, index as u32 / columns);
                        assert_eq!(
                            found,
                            expected(view, (width, height), at),
                            "{view:?} of {width} x {height} at {at:?}"
                        );
                    }
                    assert_eq!(device.device.copies() != 0, device.device.name() == "copied");
                    shown.detach().unwrap();
                }
                assert_eq!(picture.users(), Users::default());
            }
        }
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

#[test]
fn whole_tiles_in_any_order_are_one_range_by_the_mapping_alone() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let mut pages = PageSet::zeroed(system.memory, 96 * 64 * 4, Ladder::DEFAULT).unwrap();
    pages.write_at(0, &tiled(96, 64)).unwrap();
    let picture = SharedBuffer::new("picture", pages);
    let tiles = Tiles::new(0, 96, 64).unwrap();
    for view in VIEWS {
        let shown = picture.attach_pieces::<ToDevice>(&gpu.device, tiles.by_tile(view)).unwrap();
        assert_eq!(shown.segments().len(), 1, "{view:?}");
        let seen = read(&gpu, &shown);
        let columns = tiles.size(view).0 / TILE;
        for (index, tile) in (0..).zip(seen.chunks_exact(4096)) {
            let at = (index % columns * TILE, index / columns * TILE);
            let corner = if view == TileView::UpsideDown { (at.0, at.1 + TILE - 1) } else { at };
            assert_eq!(&tile[..4], expected(view, (96, 64), corner), "{view:?}: tile {index}");
        }
    }
}

/// A device writes rows, and they come to lie in tiles.
#[test]
fn what_a_device_writes_linear_comes_to_lie_in_tiles() {
    let system = FakeSystem::non_coherent();
    for device in devices(&system) {
        let picture =
            SharedBuffer::new("picture", PageSet::zeroed(system.memory, 64 * 64 * 4, Ladder::SINGLE_PAGES).unwrap());
        let tiles = Tiles::new(0, 64, 64).unwrap();
        let filled = picture.attach_pieces::<FromDevice>(&device.device, tiles.linear(TileView::Upright)).unwrap();
        let linear: Vec<u8> = (0..64).flat_map(|y| (0..64).flat_map(move |x| pixel(x, y))).collect();
        let mut rest = &linear[..];
        for segment in slice(&filled, 0, filled.len()).unwrap() {
            let (now, later) = rest.split_at(segment.len as usize);
            device.master.write(segment.iova, now).unwrap();
            rest = later;
        }
        filled.detach().unwrap();
        let mut found = vec![0; 64 * 64 * 4];
        picture.into_pages().unwrap().read_at(0, &mut found).unwrap();
        assert_eq!(found, tiled(64, 64));
    }
}

#[test]
fn pages_that_no_piece_touches_are_not_reached() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let picture =
        SharedBuffer::new("picture", PageSet::zeroed(system.memory, 16 * 4096, Ladder::SINGLE_PAGES).unwrap());
    let runs = picture.extents().unwrap().runs().to_vec();
    let pieces = [5 * 4096 + 100..5 * 4096 + 200, 2 * 4096..4 * 4096];
    let shown = picture.attach_pieces::<ToDevice>(&gpu.device, pieces.into_iter()).unwrap();
    let first = shown.segments()[0].iova.align_down(4096).get();
    let reached: Vec<u64> = (first - 4096..first + 8 * 4096)
        .step_by(4096)
        .filter_map(|at| Some(gpu.domain.space().translate(iommu::Iova::new(at))?.0.get()))
        .collect();
    let wanted: Vec<u64> = [5, 2, 3].iter().map(|page: &usize| runs[*page].start().get()).collect();
    assert_eq!(reached, wanted);
    assert_eq!(shown.len(), 100 + 8192);
    let refused = |pieces: &[(u64, u64)]| {
        let pieces = pieces.iter().map(|(start, end)| *start..*end);
        picture.attach_pieces::<ToDevice>(&gpu.device, pieces).unwrap_err()
    };
    for piece in [(0, 16 * 4096 + 1), (8192, 4096), (u64::MAX - 1, u64::MAX)] {
        assert!(matches!(refused(&[piece]), Error::OutOfRange { .. }), "{piece:?}");
    }
    assert_eq!((refused(&[]), refused(&[(77, 77)])), (Error::BadSize(0), Error::BadSize(0)));
    for (width, height) in [(0, 32), (32, 0), (33, 32), (32, 16)] {
        assert_eq!(Tiles::new(0, width, height), None);
    }
    assert_eq!(Tiles::new(100, 32, 32), None);
    assert_eq!(Tiles::new(u64::MAX - 4095, 32, 32), None);
}

proptest! {
    #[test]
    fn any_pieces_are_read_in_their_order(
        pieces in prop::collection::vec((0_u64..8 * 4096, 0_u64..9000), 1..20),
        scattered in any::<bool>(),
    ) {
        let system = FakeSystem::new();
        let size = 8 * 4096_u64;
        let ladder = if scattered { Ladder::SINGLE_PAGES } else { Ladder::DEFAULT };
        let bytes: Vec<u8> = (0..size).map(|at| (at ^ at >> 8 ^ at >> 13) as u8).collect();
        for device in devices(&system) {
            let mut pages = PageSet::zeroed(system.memory, size, ladder).unwrap();
            pages.write_at(0, &bytes).unwrap();
            let buffer = SharedBuffer::new("buffer", pages);
            let ranges: Vec<Range<u64>> = pieces.iter().map(|(start, len)| *start..(start + len).min(size)).collect();
            let wanted: Vec<u8> = ranges.iter().flat_map(|range| bytes[range.start as usize..range.end as usize].to_vec()).collect();
            match buffer.attach_pieces::<ToDevice>(&device.device, ranges.into_iter()) {
                Ok(loan) => prop_assert_eq!(read(&device, &loan), wanted),
                Err(error) => prop_assert_eq!((error, wanted.len()), (Error::BadSize(0), 0)),
            }
        }
        prop_assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}
