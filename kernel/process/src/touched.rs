//! What the tables of a device's address space have cost.
//!
//! Tables are freed with their address space and not before, so that a device is never sent through a freed one. A process that lends one
//! page here and one there would have a table for each place, for as long as it keeps the device: each place is charged once, and stays
//! charged.

use crate::Error;
use alloc::vec::Vec;
use iommu::IovaRange;

/// log2 of the bytes that a last-level table maps.
const UNIT: u32 = 21;
/// log2 of the units that a table above maps.
const ABOVE: u32 = 9;
/// Pages that a table above costs: itself, and what the kernel keeps beside it.
const ABOVE_PAGES: u64 = 10;

/// The places at which a device's address space may have tables.
pub(crate) struct Touched {
    /// Numbers of units of 2 MiB, in order.
    units: Vec<u64>,
    pages: u64,
    max: u64,
}

impl Touched {
    /// Nothing yet, and at most `max` pages of tables.
    pub fn new(max: u64) -> Self {
        Self { units: Vec::new(), pages: 0, max }
    }

    /// Charges what `range`, which is no longer than a process's memory, may need.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`]. What was charged before the error stays so.
    pub fn charge(&mut self, range: IovaRange) -> Result<(), Error> {
        let (Some(last), first) = (range.len().checked_sub(1), range.start().get()) else { return Ok(()) };
        for unit in first >> UNIT..=(first.saturating_add(last)) >> UNIT {
            let Err(place) = self.units.binary_search(&unit) else { continue };
            let near = [place.checked_sub(1), Some(place)].map(|at| at.and_then(|at| self.units.get(at)));
            let new =
                |levels: u32| !near.iter().flatten().any(|near| *near >> (ABOVE * levels) == unit >> (ABOVE * levels));
            let pages = 1 + ABOVE_PAGES * (u64::from(new(1)) + u64::from(new(2)));
            if pages > self.max.saturating_sub(self.pages) {
                return Err(Error::Quota("pages of tables"));
            }
            self.units.try_reserve(1)?;
            self.units.insert(place, unit);
            self.pages += pages;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::Iova;

    fn charge(touched: &mut Touched, start: u64, len: u64) -> Result<u64, Error> {
        touched.charge(IovaRange::new(Iova::new(start), len).unwrap())?;
        Ok(touched.pages)
    }

    #[test]
    fn each_place_is_charged_once_with_the_tables_above_it() {
        let mut touched = Touched::new(100);
        assert_eq!(charge(&mut touched, 0x1000, 0x1000).unwrap(), 21);
        assert_eq!(charge(&mut touched, 0x5000, 0x1000).unwrap(), 21);
        // Across the end of a unit; another of the same GiB; another GiB below what is there; another 512 GiB.
        assert_eq!(charge(&mut touched, 0x1f_f000, 0x2000).unwrap(), 22);
        assert_eq!(charge(&mut touched, 0x3fe0_0000, 0x20_0000).unwrap(), 23);
        assert_eq!(charge(&mut touched, 0xc000_0000, 0x1000).unwrap(), 34);
        assert_eq!(charge(&mut touched, 0x8000_0000, 0x1000).unwrap(), 45);
        assert_eq!(charge(&mut touched, 0x80_0000_0000, 0x1000).unwrap(), 66);
        assert_eq!(charge(&mut touched, 0x80_0000_0000, 0x1000).unwrap(), 66);
        assert_eq!(charge(&mut touched, 0xffff_ffff_f000, 0x1000).unwrap(), 87);
        assert!(matches!(charge(&mut touched, 0x1_0000_0000_0000, 0x1000), Err(Error::Quota(_))));
        assert_eq!(charge(&mut touched, 0xa000, 0x1000).unwrap(), 87);
    }
}
