//! The secure half of the interrupt controller: all interrupts become the normal world's (GICv3, Arm IHI 0069).

use crate::registers::{read, write};
use sbsa::map::{GIC_DISTRIBUTOR, GIC_REDISTRIBUTORS};

const GICD_CTLR: u64 = 0x0;
const GICD_TYPER: u64 = 0x4;
const GICD_IGROUPR: u64 = 0x80;
const GICD_CTLR_ARE_S: u32 = 1 << 4;
const GICD_CTLR_ARE_NS: u32 = 1 << 5;
const GICD_CTLR_RWP: u32 = 1 << 31;

const GICR_TYPER: u64 = 0x8;
const GICR_WAKER: u64 = 0x14;
const GICR_IGROUPR0: u64 = 0x1_0080;
const GICR_TYPER_LAST: u32 = 1 << 4;
const GICR_WAKER_PROCESSOR_SLEEP: u32 = 1 << 1;
const GICR_WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;
const GICR_FRAMES: u64 = 0x2_0000;

/// How often a register is looked at before it is given up.
const LOOKS: u32 = 1_000_000;

/// Gives all interrupts of all cores to the normal world, with affinity routing, and wakes the redistributors, which only the secure
/// world can. Returns whether the controller did all that.
pub(crate) fn give_away() -> bool {
    let (distributor, _) = GIC_DISTRIBUTOR;
    let settled = || (0..LOOKS).any(|_| read(distributor + GICD_CTLR) & GICD_CTLR_RWP == 0);
    write(distributor + GICD_CTLR, GICD_CTLR_ARE_S | GICD_CTLR_ARE_NS);
    let mut done = settled();
    let words = u64::from(read(distributor + GICD_TYPER) & 0x1f) + 1;
    for word in 1..words {
        write(distributor + GICD_IGROUPR + 4 * word, u32::MAX);
    }
    let (start, len) = GIC_REDISTRIBUTORS;
    for frame in (start..start + len).step_by(GICR_FRAMES as usize) {
        write(frame + GICR_WAKER, read(frame + GICR_WAKER) & !GICR_WAKER_PROCESSOR_SLEEP);
        done &= (0..LOOKS).any(|_| read(frame + GICR_WAKER) & GICR_WAKER_CHILDREN_ASLEEP == 0);
        write(frame + GICR_IGROUPR0, u32::MAX);
        if read(frame + GICR_TYPER) & GICR_TYPER_LAST != 0 {
            break;
        }
    }
    done && settled()
}
