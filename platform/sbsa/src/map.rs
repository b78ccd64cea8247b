//! Where things are on the board, and which interrupts they have.

/// A range of physical addresses: its start and its length in bytes.
pub type Place = (u64, u64);

/// Memory that all may use. How much there is, the machine says.
pub const RAM: u64 = 0x100_0000_0000;
/// The distributor of the GICv3.
pub const GIC_DISTRIBUTOR: Place = (0x4006_0000, 0x1_0000);
/// The redistributors of the GICv3, one after the other.
pub const GIC_REDISTRIBUTORS: Place = (0x4008_0000, 0x400_0000);
/// The ITS, in machines of version 0.2 and later.
pub const GIC_ITS: Place = (0x4408_1000, 0x2_0000);
/// The embedded controller, which switches the machine off. Seen from the secure world only.
pub const CONTROLLER: u64 = 0x5000_0000;
/// The PL011 of the normal world.
pub const UART: Place = (0x6000_0000, 0x1000);
/// The real-time clock, a PL031.
pub const RTC: Place = (0x6001_0000, 0x1000);
/// The SMMUv3 before the PCIe host.
pub const SMMU: Place = (0x6005_0000, 0x2_0000);
/// PCIe: I/O ports, as seen by the processor.
pub const PCIE_PORTS: Place = (0x7fff_0000, 0x1_0000);
/// PCIe: the window below 4 GiB.
pub const PCIE_LOW: Place = (0x8000_0000, 0x7000_0000);
/// PCIe: the configuration space of 256 buses.
pub const PCIE_ECAM: Place = (0xf000_0000, 0x1000_0000);
/// PCIe: the window above 4 GiB, up to [`RAM`].
pub const PCIE_HIGH: Place = (0x1_0000_0000, 0xff_0000_0000);

/// The most cores that there can be.
pub const MAX_CORES: usize = 512;

/// The shared interrupt of the UART.
pub const UART_SPI: u32 = 1;
/// The shared interrupt of the real-time clock.
pub const RTC_SPI: u32 = 2;
/// The shared interrupts of PCIe, INTA to INTD of slot 0.
pub const PCIE_SPI: u32 = 3;
/// The shared interrupts of the SMMU: events, page requests, CMD_SYNC, global errors.
pub const SMMU_SPI: u32 = 12;
/// The private interrupts of the timers, secure, normal, virtual and the hypervisor's.
pub const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];

/// Which core this MPIDR belongs to: cores stand in clusters of eight. `None` for what no core of this board has.
pub const fn core_index(mpidr: u64) -> Option<usize> {
    let affinity = mpidr & 0xff_00ff_ffff;
    let index = (affinity >> 8) * 8 + (affinity & 7);
    if affinity & !0xff07 == 0 && index < MAX_CORES as u64 { Some(index as usize) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_counted_in_clusters_of_eight() {
        assert_eq!(core_index(0x8000_0000), Some(0));
        assert_eq!(core_index(0x8000_0307), Some(31));
        assert_eq!(core_index(0x3f07), Some(511));
        for nobody in [0x8, 0x4000, 0x1_0000, 1 << 32] {
            assert_eq!(core_index(nobody), None, "{nobody:#x}");
        }
    }

    #[test]
    fn no_two_things_are_at_one_place() {
        let mut all = [
            GIC_DISTRIBUTOR,
            GIC_REDISTRIBUTORS,
            GIC_ITS,
            (CONTROLLER, 0x1000),
            UART,
            RTC,
            SMMU,
            PCIE_PORTS,
            PCIE_LOW,
            PCIE_ECAM,
            PCIE_HIGH,
            (RAM, 1),
        ];
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{all:x?}");
    }
}
