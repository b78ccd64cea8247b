//! Giving all interrupts to the normal world, which only the secure state can: what firmware does, where there is firmware.
//!
//! IHI 0069, 12.9 (GICD_IGROUPR, GICR_IGROUPR0); IHI 0048, 4.3.4 and 4.4.2.

use crate::GicError;
use iommu::{PhysAddr, PhysRange};

/// Accesses of words by physical address, as the secure state makes them.
pub trait Secure {
    /// Reads a register.
    fn read(&self, address: PhysAddr) -> u32;
    /// Writes a register.
    fn write(&self, address: PhysAddr, value: u32);
}

/// How often a register is looked at before it is given up.
const LOOKS: u32 = 1_000_000;

const CTLR: u64 = 0x0;
const TYPER: u64 = 0x4;
const IGROUPR: u64 = 0x80;
const IGRPMODR: u64 = 0xd00;
const CTLR_ARE_BOTH: u32 = 1 << 4 | 1 << 5;
const CTLR_RWP: u32 = 1 << 31;

const REDISTRIBUTOR_TYPER: u64 = 0x8;
const WAKER: u64 = 0x14;
const SGI_FRAME: u64 = 0x1_0000;
const TYPER_VLPIS: u32 = 1 << 1;
const TYPER_LAST: u32 = 1 << 4;
const WAKER_SLEEP: u32 = 1 << 1;
const WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;
const FRAMES: u64 = 0x2_0000;

const INTERFACE_PMR: u64 = 0x4;

struct Window<'a>(&'a dyn Secure, PhysRange);

impl Window<'_> {
    /// The address of a register that lies in the window.
    fn at(&self, offset: u64) -> Option<PhysAddr> {
        offset.checked_add(4).filter(|end| *end <= self.1.len())?;
        self.1.start().checked_add(offset)
    }

    fn read(&self, offset: u64) -> u32 {
        self.at(offset).map_or(0, |address| self.0.read(address))
    }

    fn write(&self, offset: u64, value: u32) {
        if let Some(address) = self.at(offset) {
            self.0.write(address, value);
        }
    }

    fn settles(&self, what: &'static str, offset: u64, busy: u32) -> Result<(), GicError> {
        if (0..LOOKS).any(|_| self.read(offset) & busy == 0) { Ok(()) } else { Err(GicError::TimedOut(what)) }
    }
}

/// Gives all interrupts of a GICv3 to the normal world, with affinity routing, and wakes the redistributors.
///
/// # Errors
///
/// [`GicError::TimedOut`].
pub fn give_away_v3(
    secure: &dyn Secure,
    distributor: PhysRange,
    redistributors: impl IntoIterator<Item = PhysRange>,
) -> Result<(), GicError> {
    let window = Window(secure, distributor);
    window.write(CTLR, CTLR_ARE_BOTH);
    window.settles("the distributor did not take a write", CTLR, CTLR_RWP)?;
    for word in 1..=u64::from(window.read(TYPER) & 0x1f) {
        window.write(IGROUPR + 4 * word, u32::MAX);
        window.write(IGRPMODR + 4 * word, 0);
    }
    for region in redistributors {
        let mut offset = 0;
        while let Some(frame) = region.part(offset, FRAMES) {
            let frame = Window(secure, frame);
            frame.write(WAKER, frame.read(WAKER) & !WAKER_SLEEP);
            frame.settles("a redistributor did not wake", WAKER, WAKER_CHILDREN_ASLEEP)?;
            frame.write(SGI_FRAME + IGROUPR, u32::MAX);
            frame.write(SGI_FRAME + IGRPMODR, 0);
            let typer = frame.read(REDISTRIBUTOR_TYPER);
            if typer & TYPER_LAST != 0 {
                break;
            }
            offset += if typer & TYPER_VLPIS != 0 { 2 * FRAMES } else { FRAMES };
        }
    }
    window.settles("the distributor did not take a write", CTLR, CTLR_RWP)
}

/// Gives all shared interrupts of a GICv2, and the calling core's private ones, to the normal world, which may have any priority.
pub fn give_away_v2(secure: &dyn Secure, distributor: PhysRange, interface: PhysRange) {
    let window = Window(secure, distributor);
    for word in 0..=u64::from(window.read(TYPER) & 0x1f) {
        window.write(IGROUPR + 4 * word, u32::MAX);
    }
    // A mask in the secure half would be beyond the normal world's reach.
    Window(secure, interface).write(INTERFACE_PMR, 0xff);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use core::cell::RefCell;

    #[derive(Default)]
    struct Registers {
        fixed: BTreeMap<u64, u32>,
        written: RefCell<BTreeMap<u64, u32>>,
    }

    impl Secure for Registers {
        fn read(&self, address: PhysAddr) -> u32 {
            let address = address.get();
            let written = self.written.borrow().get(&address).copied();
            self.fixed.get(&address).copied().or(written).unwrap_or(0)
        }
        fn write(&self, address: PhysAddr, value: u32) {
            self.written.borrow_mut().insert(address.get(), value);
        }
    }

    fn range(start: u64, len: u64) -> PhysRange {
        PhysRange::new(PhysAddr::new(start), len).unwrap()
    }

    const DISTRIBUTOR: u64 = 0x800_0000;
    const REDISTRIBUTORS: u64 = 0x80a_0000;

    #[test]
    fn every_interrupt_of_every_core_is_given_away_and_nothing_outside_is_touched() {
        let mut registers = Registers::default();
        registers.fixed.insert(DISTRIBUTOR + 4, 3);
        // The second has virtual LPIs, and the last bit is nowhere.
        registers.fixed.insert(REDISTRIBUTORS + FRAMES + 8, TYPER_VLPIS);
        let regions = [range(REDISTRIBUTORS, 4 * FRAMES)];
        give_away_v3(&registers, range(DISTRIBUTOR, 0x1_0000), regions).unwrap();
        let written = registers.written.borrow();
        let groups: Vec<u64> = written.iter().filter(|(_, value)| **value == u32::MAX).map(|(at, _)| *at).collect();
        let distributor = (1..=3).map(|word| DISTRIBUTOR + 0x80 + 4 * word);
        let cores = [0, 1, 3].map(|frame| REDISTRIBUTORS + frame * FRAMES + 0x1_0080);
        assert_eq!(groups, distributor.chain(cores).collect::<Vec<_>>());
        assert_eq!(written[&DISTRIBUTOR], 0x30);
        assert!(written.keys().all(|at| regions[0].contains(PhysAddr::new(*at)) || *at < DISTRIBUTOR + 0x1_0000));
    }

    #[test]
    fn hardware_that_does_not_settle_is_a_timeout() {
        let mut registers = Registers::default();
        registers.fixed.insert(DISTRIBUTOR, CTLR_RWP);
        assert!(matches!(give_away_v3(&registers, range(DISTRIBUTOR, 0x1_0000), []), Err(GicError::TimedOut(_))));
        let mut registers = Registers::default();
        registers.fixed.insert(REDISTRIBUTORS + WAKER, WAKER_CHILDREN_ASLEEP);
        let regions = [range(REDISTRIBUTORS, FRAMES)];
        let result = give_away_v3(&registers, range(DISTRIBUTOR, 0x1_0000), regions);
        assert!(matches!(result, Err(GicError::TimedOut(_))));
    }

    #[test]
    fn a_gicv2_gives_away_its_interrupts_and_every_priority() {
        let mut registers = Registers::default();
        registers.fixed.insert(DISTRIBUTOR + 4, 1);
        give_away_v2(&registers, range(DISTRIBUTOR, 0x1000), range(0x801_0000, 0x1000));
        let written = registers.written.borrow().clone();
        assert_eq!(
            written.into_iter().collect::<Vec<_>>(),
            [(DISTRIBUTOR + 0x80, u32::MAX), (DISTRIBUTOR + 0x84, u32::MAX), (0x801_0004, 0xff)]
        );
    }
}
