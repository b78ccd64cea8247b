//! Scattered memory in one range: blocks where address and memory lie so, pages with the Contiguous bit where sixteen do, else
//! pages (DDI 0487, D8.6).

use super::tables::{ADDRESS, MapError, TABLE_OR_PAGE, Tables, Use, VALID, index, span, unmap};
use core::sync::atomic::Ordering;

const CONTIGUOUS: u64 = 1 << 52;
const PAGE: u64 = 4096;
const BLOCK: u64 = 2 << 20;
/// Bytes of a group of pages that may carry the Contiguous bit.
const GROUP: u64 = 16 * PAGE;

/// Maps `runs` of (physical address, length) one after another at `va` in the tables below `root`: all or nothing.
///
/// # Errors
///
/// [`MapError`]. What was mapped before the error has been taken away again, but TLBs may have it: walkers look ahead.
pub fn map_runs(
    tables: &mut impl Tables,
    root: u64,
    va: u64,
    runs: impl Iterator<Item = (u64, u64)>,
    purpose: Use,
) -> Result<u64, MapError> {
    let mut done = 0;
    let mut result = Ok(());
    for (pa, len) in runs {
        result = map_run(tables, root, va, &mut done, (pa, len), purpose);
        if result.is_err() {
            break;
        }
    }
    match result {
        Ok(()) => Ok(done),
        Err(error) => {
            if done != 0 {
                // Whole leaves, which have just been made.
                unmap(tables, root, va, done, |_| ())?;
            }
            Err(error)
        }
    }
}

/// Maps one run at `va + done`, and counts its leaves' bytes there.
fn map_run(
    tables: &mut impl Tables,
    root: u64,
    va: u64,
    done: &mut u64,
    (pa, len): (u64, u64),
    purpose: Use,
) -> Result<(), MapError> {
    let start = va.wrapping_add(*done);
    let fits = pa.checked_add(len).filter(|end| *end <= 1 << 48).and(start.checked_add(len));
    if len == 0 || (start | pa | len) & (PAGE - 1) != 0 {
        return Err(MapError::NotPages { va: start, pa, len });
    }
    if fits.is_none() {
        return Err(MapError::OutOfReach(pa));
    }
    let mut mapped = 0;
    while mapped < len {
        let (at, pa, left) = (start + mapped, pa + mapped, len - mapped);
        let lies = |size| (at | pa) & (size - 1) == 0 && left >= size;
        let middle = table_at(tables, root, at, 2)?;
        let slot = tables.entry(middle, index(at, 2));
        if lies(BLOCK) && slot.load(Ordering::Relaxed) & VALID == 0 {
            slot.store(pa | purpose.bits(), Ordering::Release);
            (mapped, *done) = (mapped + BLOCK, *done + BLOCK);
            continue;
        }
        // (Where a table is linked already its pages do as well.)
        let table = table_at(tables, root, at, 3)?;
        let (count, hint) = if lies(GROUP) { (16, CONTIGUOUS) } else { (1, 0) };
        for page in 0..count {
            let (at, pa) = (at + page * PAGE, pa + page * PAGE);
            let slot = tables.entry(table, index(at, 3));
            if slot.load(Ordering::Relaxed) & VALID != 0 {
                return Err(MapError::AlreadyMapped(at));
            }
            slot.store(pa | purpose.bits() | TABLE_OR_PAGE | hint, Ordering::Release);
            (mapped, *done) = (mapped + PAGE, *done + PAGE);
        }
    }
    Ok(())
}

/// The table of `level` on the way to `va`, linked if there is none.
fn table_at(tables: &mut impl Tables, root: u64, va: u64, level: u32) -> Result<u64, MapError> {
    let mut table = root;
    for above in 0..level {
        let entry = tables.entry(table, index(va, above)).load(Ordering::Relaxed);
        table = match entry & (VALID | TABLE_OR_PAGE) {
            0 | TABLE_OR_PAGE => {
                let next = tables.allocate().ok_or(MapError::NoTables)?;
                tables.entry(table, index(va, above)).store(next | VALID | TABLE_OR_PAGE, Ordering::Release);
                next
            }
            VALID => return Err(MapError::AlreadyMapped(va)),
            _ => entry & ADDRESS,
        };
    }
    Ok(table)
}

/// Calls `leaf` with the size of each leaf that maps a byte of the `len` bytes at `va`, and whether it carries the Contiguous bit.
pub fn for_each_leaf(tables: &impl Tables, root: u64, va: u64, len: u64, mut leaf: impl FnMut(u64, bool)) {
    let mut done = 0;
    while done < len {
        let at = va.wrapping_add(done);
        let (mut table, mut level) = (root, 0);
        loop {
            let entry = tables.entry(table, index(at, level)).load(Ordering::Relaxed);
            if entry & VALID == 0 || level == 3 || entry & TABLE_OR_PAGE == 0 {
                if entry & VALID != 0 {
                    leaf(span(level), entry & CONTIGUOUS != 0);
                }
                done += span(level) - at % span(level);
                break;
            }
            table = entry & ADDRESS;
            level += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tables::fake::Fake;
    use super::*;
    use std::vec::Vec;

    const VA: u64 = 0xffff_e000_0000_0000;

    fn leaves(fake: &Fake, root: u64, len: u64) -> [u64; 3] {
        let mut found = [0; 3];
        for_each_leaf(fake, root, VA, len, |size, contiguous| {
            found[if size == BLOCK { 0 } else { 1 + usize::from(!contiguous) }] += 1;
        });
        found
    }

    /// Seen red: a block put where only the virtual address is aligned; the hint on a group that begins in the middle of one; a failure
    /// that leaves leaves behind.
    #[test]
    fn every_byte_of_scattered_runs_is_mapped_by_the_largest_leaves_that_lie_so() {
        let runs = [
            (0x4020_0000, BLOCK),
            // Aligned for groups only.
            (0x5001_0000, 2 * GROUP),
            // Aligned for nothing.
            (0x6000_3000, GROUP + PAGE),
            // Memory would do, the address does not.
            (0x7000_0000, GROUP),
        ];
        let (mut fake, root) = Fake::new(64);
        let len: u64 = runs.iter().map(|(_, len)| len).sum();
        assert_eq!(map_runs(&mut fake, root, VA, runs.into_iter(), Use::Data), Ok(len));
        let mut at = VA;
        for (pa, len) in runs {
            for offset in (0..len).step_by(PAGE as usize) {
                let (found, bits) = fake.walk(root, at + offset).unwrap();
                assert_eq!(found, pa + offset);
                if bits & CONTIGUOUS != 0 {
                    // All of the group are of one run, in order.
                    let first = (at + offset) & !(GROUP - 1);
                    for page in 0..16 {
                        let (other, bits) = fake.walk(root, first + page * PAGE).unwrap();
                        assert_eq!((other, bits & CONTIGUOUS), ((found & !(GROUP - 1)) + page * PAGE, CONTIGUOUS));
                    }
                }
            }
            at += len;
        }
        assert_eq!(fake.walk(root, VA + len), None);
        assert_eq!(leaves(&fake, root, len), [1, 32, 17 + 16]);

        unmap(&fake, root, VA, len, |_| ()).unwrap();
        assert_eq!(leaves(&fake, root, len), [0, 0, 0]);
        // A block where tables have been: by their pages.
        let block = core::iter::once((0x8000_0000, 2 * BLOCK));
        assert_eq!(map_runs(&mut fake, root, VA, block, Use::Data), Ok(2 * BLOCK));
        assert_eq!(leaves(&fake, root, 2 * BLOCK), [1, 512, 0]);
        let taken = map_runs(&mut fake, root, VA + BLOCK, core::iter::once((0, PAGE)), Use::Data);
        assert_eq!(taken, Err(MapError::AlreadyMapped(VA + BLOCK)));
    }

    #[test]
    fn what_cannot_be_mapped_to_its_end_is_not_mapped_at_all() {
        let scattered: Vec<(u64, u64)> = (0..1024).map(|page| (page * 2 * PAGE, PAGE)).collect();
        for limit in 1..5 {
            let (mut fake, root) = Fake::new(limit);
            let failed = map_runs(&mut fake, root, VA, scattered.iter().copied(), Use::Data);
            assert_eq!(failed, Err(MapError::NoTables));
            assert_eq!(leaves(&fake, root, 4 << 20), [0; 3], "{limit}");
        }
        let (mut fake, root) = Fake::new(64);
        let odd = [(0, PAGE), (1 << 48, PAGE)];
        assert_eq!(map_runs(&mut fake, root, VA, odd.into_iter(), Use::Data), Err(MapError::OutOfReach(1 << 48)));
        assert_eq!(leaves(&fake, root, 4 << 20), [0; 3]);
    }
}
