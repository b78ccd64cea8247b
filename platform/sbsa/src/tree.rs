//! The device tree of the board.
//!
//! The machine comes with a tree of its own at the start of memory, which says only what may differ from one machine to the next:
//! how much memory there is, which cores, and whether there is an ITS. [`Survey`] reads it, [`describe`] writes the whole.

use crate::map::{self, Place};
use alloc::format;
use alloc::vec::Vec;
use dtoolkit::error::{FdtParseError, ModelError};
use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node as _, Property as _, ToPropertyValue};

const GIC: u32 = 1;
const ITS: u32 = 2;
const SMMU: u32 = 3;
const CLOCK: u32 = 4;

const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE: u32 = 1;
const LEVEL: u32 = 4;

/// A tree of the machine's own that cannot be used, or one that cannot be made.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is no tree.
    #[error("the machine's device tree: {0}")]
    Parse(FdtParseError),
    /// It has no memory, or none that starts where the board has its memory.
    #[error("the machine's device tree has no memory at {:#x}", map::RAM)]
    NoMemory,
    /// It has no cores.
    #[error("the machine's device tree has no cores")]
    NoCores,
    /// It has a core where this board has none.
    #[error("the machine's device tree has a core with MPIDR {0:#x}")]
    Core(u64),
    /// The new tree has a name that none may have.
    #[error("{0}")]
    Model(ModelError),
}

/// What the machine says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Memory.
    pub memory: Vec<Place>,
    /// The MPIDR of each core.
    pub cores: Vec<u64>,
    /// Whether there is an ITS.
    pub its: bool,
}

impl Survey {
    /// Reads the machine's own tree.
    ///
    /// # Errors
    ///
    /// [`Error`] if it lacks what every machine has.
    pub fn read(blob: &[u8]) -> Result<Self, Error> {
        let tree = Fdt::new(blob).map_err(Error::Parse)?;
        let root = tree.root();
        let (mut memory, mut cores, mut its) = (Vec::new(), Vec::new(), false);
        for node in root.children() {
            let name = node.name();
            if name == "memory" || name.starts_with("memory@") {
                let reg = numbers(&node, "reg");
                memory.extend(reg.chunks_exact(2).filter_map(|pair| Some((*pair.first()?, *pair.get(1)?))));
            } else if name == "cpus" {
                for core in node.children().filter(|child| child.name().starts_with("cpu@")) {
                    cores.extend(numbers(&core, "reg"));
                }
            } else if name == "intc" {
                its = node.children().any(|child| child.name() == "its");
            }
        }
        memory.sort_unstable();
        cores.sort_unstable();
        if memory.first().is_none_or(|first| first.0 != map::RAM) {
            return Err(Error::NoMemory);
        }
        if cores.is_empty() {
            return Err(Error::NoCores);
        }
        match cores.iter().find(|&&mpidr| map::core_index(mpidr).is_none()) {
            Some(&nobody) => Err(Error::Core(nobody)),
            None => Ok(Self { memory, cores, its }),
        }
    }
}

/// Reads a property of 64-bit numbers.
fn numbers(node: &FdtNode<'_>, name: &str) -> Vec<u64> {
    let Some(property) = node.property(name) else { return Vec::new() };
    let chunks = property.value().chunks_exact(8);
    chunks.filter_map(|chunk| Some(u64::from_be_bytes(chunk.try_into().ok()?))).collect()
}

/// Makes the whole tree for the machine that `survey` tells of.
///
/// # Errors
///
/// [`Error::Model`].
pub fn describe(survey: &Survey, command_line: &str) -> Result<Vec<u8>, Error> {
    let mut tree = DeviceTree::new();
    let root = &mut tree.root;
    set(root, "compatible", "linux,sbsa-ref")?;
    set(root, "model", "QEMU sbsa-ref")?;
    set(root, "#address-cells", 2_u32)?;
    set(root, "#size-cells", 2_u32)?;
    set(root, "interrupt-parent", GIC)?;

    let mut chosen = node("chosen")?;
    set(&mut chosen, "stdout-path", format!("/{}", at("serial", map::UART)).as_str())?;
    if !command_line.is_empty() {
        set(&mut chosen, "bootargs", command_line)?;
    }
    root.add_child(chosen);

    for &place in &survey.memory {
        let mut memory = node(&at("memory", place))?;
        set(&mut memory, "device_type", "memory")?;
        set(&mut memory, "reg", cells(&[place]))?;
        root.add_child(memory);
    }
    root.add_child(cores(&survey.cores)?);

    let mut psci = node("psci")?;
    set(&mut psci, "compatible", ["arm,psci-1.0", "arm,psci-0.2"].as_slice())?;
    set(&mut psci, "method", "smc")?;
    root.add_child(psci);

    let mut timer = node("timer")?;
    set(&mut timer, "compatible", "arm,armv8-timer")?;
    set(&mut timer, "interrupts", map::TIMER_PPIS.into_iter().flat_map(|ppi| [PPI, ppi, LEVEL]).collect::<Vec<u32>>())?;
    set(&mut timer, "always-on", [0_u8; 0])?;
    root.add_child(timer);

    root.add_child(gic(survey.its)?);

    let mut clock = node("clock")?;
    set(&mut clock, "compatible", "fixed-clock")?;
    set(&mut clock, "#clock-cells", 0_u32)?;
    set(&mut clock, "clock-frequency", 24_000_000_u32)?;
    set(&mut clock, "phandle", CLOCK)?;
    root.add_child(clock);
    root.add_child(primecell("serial", "arm,pl011", map::UART, map::UART_SPI, ["uartclk", "apb_pclk"].as_slice())?);
    root.add_child(primecell("rtc", "arm,pl031", map::RTC, map::RTC_SPI, ["apb_pclk"].as_slice())?);

    root.add_child(smmu()?);
    root.add_child(pcie(survey.its)?);
    Ok(tree.to_dtb())
}

fn cores(mpidrs: &[u64]) -> Result<DeviceTreeNode, Error> {
    let mut cpus = node("cpus")?;
    set(&mut cpus, "#address-cells", 2_u32)?;
    set(&mut cpus, "#size-cells", 0_u32)?;
    for &mpidr in mpidrs {
        let mut cpu = node(&format!("cpu@{mpidr:x}"))?;
        set(&mut cpu, "device_type", "cpu")?;
        set(&mut cpu, "compatible", "arm,armv8")?;
        set(&mut cpu, "reg", mpidr)?;
        set(&mut cpu, "enable-method", "psci")?;
        cpus.add_child(cpu);
    }
    Ok(cpus)
}

fn gic(with_its: bool) -> Result<DeviceTreeNode, Error> {
    let mut gic = node(&at("interrupt-controller", map::GIC_DISTRIBUTOR))?;
    set(&mut gic, "compatible", "arm,gic-v3")?;
    set(&mut gic, "interrupt-controller", [0_u8; 0])?;
    set(&mut gic, "#interrupt-cells", 3_u32)?;
    set(&mut gic, "#redistributor-regions", 1_u32)?;
    set(&mut gic, "reg", cells(&[map::GIC_DISTRIBUTOR, map::GIC_REDISTRIBUTORS]))?;
    set(&mut gic, "phandle", GIC)?;
    set(&mut gic, "#address-cells", 2_u32)?;
    set(&mut gic, "#size-cells", 2_u32)?;
    set(&mut gic, "ranges", [0_u8; 0])?;
    if with_its {
        let mut its = node(&at("msi-controller", map::GIC_ITS))?;
        set(&mut its, "compatible", "arm,gic-v3-its")?;
        set(&mut its, "msi-controller", [0_u8; 0])?;
        set(&mut its, "#msi-cells", 1_u32)?;
        set(&mut its, "reg", cells(&[map::GIC_ITS]))?;
        set(&mut its, "phandle", ITS)?;
        gic.add_child(its);
    }
    Ok(gic)
}

/// A peripheral with one interrupt, whose clocks are all the same.
fn primecell(name: &str, kind: &str, place: Place, spi: u32, clocks: &[&str]) -> Result<DeviceTreeNode, Error> {
    let mut device = node(&at(name, place))?;
    set(&mut device, "compatible", [kind, "arm,primecell"].as_slice())?;
    set(&mut device, "reg", cells(&[place]))?;
    set(&mut device, "interrupts", [SPI, spi, LEVEL])?;
    set(&mut device, "clocks", clocks.iter().map(|_| CLOCK).collect::<Vec<u32>>())?;
    set(&mut device, "clock-names", clocks)?;
    Ok(device)
}

fn smmu() -> Result<DeviceTreeNode, Error> {
    let mut smmu = node(&at("iommu", map::SMMU))?;
    set(&mut smmu, "compatible", "arm,smmu-v3")?;
    set(&mut smmu, "reg", cells(&[map::SMMU]))?;
    set(&mut smmu, "interrupts", (0..4).flat_map(|wire| [SPI, map::SMMU_SPI + wire, EDGE]).collect::<Vec<u32>>())?;
    set(&mut smmu, "interrupt-names", ["eventq", "priq", "cmdq-sync", "gerror"].as_slice())?;
    set(&mut smmu, "dma-coherent", [0_u8; 0])?;
    set(&mut smmu, "#iommu-cells", 1_u32)?;
    set(&mut smmu, "phandle", SMMU)?;
    Ok(smmu)
}

fn pcie(with_its: bool) -> Result<DeviceTreeNode, Error> {
    let mut host = node(&at("pcie", map::PCIE_ECAM))?;
    set(&mut host, "compatible", "pci-host-ecam-generic")?;
    set(&mut host, "device_type", "pci")?;
    set(&mut host, "#address-cells", 3_u32)?;
    set(&mut host, "#size-cells", 2_u32)?;
    set(&mut host, "linux,pci-domain", 0_u32)?;
    set(&mut host, "bus-range", [0, 255_u32])?;
    set(&mut host, "reg", cells(&[map::PCIE_ECAM]))?;
    set(&mut host, "dma-coherent", [0_u8; 0])?;
    set(&mut host, "iommu-map", [0, SMMU, 0, 0x1_0000_u32])?;
    if with_its {
        set(&mut host, "msi-map", [0, ITS, 0, 0x1_0000_u32])?;
    }
    // Ports start at 0 on the bus; memory has the same addresses on both sides.
    let window = |kind: u32, bus: u64, (start, len): Place| {
        let mut window = [kind, 0, 0, 0, 0, 0, 0];
        let pairs = [bus, start, len].into_iter().flat_map(|number| [(number >> 32) as u32, number as u32]);
        window.iter_mut().skip(1).zip(pairs).for_each(|(cell, value)| *cell = value);
        window
    };
    let windows = [
        window(0x100_0000, 0, map::PCIE_PORTS),
        window(0x200_0000, map::PCIE_LOW.0, map::PCIE_LOW),
        window(0x300_0000, map::PCIE_HIGH.0, map::PCIE_HIGH),
    ];
    set(&mut host, "ranges", windows.concat())?;
    set(&mut host, "#interrupt-cells", 1_u32)?;
    set(&mut host, "interrupt-map-mask", [0x1800, 0, 0, 7_u32])?;
    // Each slot's pins are wired one further than those of the slot before.
    let wires = (0..4_u32).flat_map(|slot| (0..4_u32).map(move |pin| (slot, pin)));
    let wires = wires
        .flat_map(|(slot, pin)| [slot << 11, 0, 0, pin + 1, GIC, 0, 0, SPI, map::PCIE_SPI + (slot + pin) % 4, LEVEL]);
    set(&mut host, "interrupt-map", wires.collect::<Vec<u32>>())?;
    Ok(host)
}

fn node(name: &str) -> Result<DeviceTreeNode, Error> {
    DeviceTreeNode::new(name).map_err(Error::Model)
}

fn at(name: &str, place: Place) -> alloc::string::String {
    format!("{name}@{:x}", place.0)
}

fn set(node: &mut DeviceTreeNode, name: &str, value: impl ToPropertyValue) -> Result<(), Error> {
    node.add_property(DeviceTreeProperty::new(name, value).map_err(Error::Model)?);
    Ok(())
}

/// Places as a `reg` of two cells each for start and length.
fn cells(places: &[Place]) -> Vec<u8> {
    places.iter().flat_map(|place| [place.0, place.1]).flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// A tree such as the machine makes.
    fn machine(its: bool, mpidrs: &[u64], memory: &[Place]) -> Vec<u8> {
        let mut tree = DeviceTree::new();
        for &place in memory {
            let mut node = node(&at("memory", place)).unwrap();
            set(&mut node, "reg", cells(&[place])).unwrap();
            tree.root.add_child(node);
        }
        let mut cpus = node("cpus").unwrap();
        for (number, &mpidr) in mpidrs.iter().enumerate() {
            let mut cpu = node(&format!("cpu@{number}")).unwrap();
            set(&mut cpu, "reg", mpidr).unwrap();
            cpus.add_child(cpu);
        }
        tree.root.add_child(cpus);
        let mut intc = node("intc").unwrap();
        if its {
            intc.add_child(node("its").unwrap());
        }
        tree.root.add_child(intc);
        tree.to_dtb()
    }

    const MEMORY: Place = (map::RAM, 512 << 20);

    #[test]
    fn what_the_machine_says_about_itself_is_read() {
        let survey = Survey::read(&machine(true, &[1, 0], &[MEMORY])).unwrap();
        assert_eq!(survey, Survey { memory: vec![MEMORY], cores: vec![0, 1], its: true });
        assert!(!Survey::read(&machine(false, &[0], &[MEMORY])).unwrap().its);
    }

    #[test]
    fn a_machine_that_cannot_be_is_refused() {
        let read = |mpidrs: &[u64], memory: &[Place]| Survey::read(&machine(true, mpidrs, memory)).unwrap_err();
        assert!(matches!(read(&[0], &[]), Error::NoMemory));
        assert!(matches!(read(&[0], &[(0x4000_0000, 1 << 20)]), Error::NoMemory));
        assert!(matches!(read(&[], &[MEMORY]), Error::NoCores));
        assert!(matches!(read(&[0, 0x9], &[MEMORY]), Error::Core(9)));
        assert!(matches!(Survey::read(b"no tree").unwrap_err(), Error::Parse(_)));
        let whole = machine(true, &[0], &[MEMORY]);
        assert!(matches!(Survey::read(&whole[..whole.len() - 8]).unwrap_err(), Error::Parse(_)));
    }

    #[test]
    fn the_whole_tree_says_what_the_machine_said_and_what_the_board_is() {
        let survey = Survey { memory: vec![MEMORY], cores: vec![0, 1, 0x100], its: true };
        let blob = describe(&survey, "exit=psci").unwrap();
        let tree = Fdt::new(&blob).unwrap();
        assert_eq!(Survey::read(&blob).unwrap().memory, survey.memory);
        let value = |path: &str, name: &str| tree.find_node(path).unwrap().property(name).unwrap().value().to_vec();
        assert_eq!(value("/chosen", "bootargs"), b"exit=psci\0");
        assert_eq!(value("/cpus/cpu@100", "enable-method"), b"psci\0");
        assert_eq!(value("/chosen", "stdout-path"), b"/serial@60000000\0");
        assert!(tree.find_node("/serial@60000000").is_some());
        let word = |bytes: &[u8], at: usize| u32::from_be_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap());
        // INTB of slot 3 comes back to the first wire.
        let wires = value("/pcie@f0000000", "interrupt-map");
        assert_eq!((word(&wires, 130), word(&wires, 133), word(&wires, 138)), (3 << 11, 2, map::PCIE_SPI));
        let windows = value("/pcie@f0000000", "ranges");
        let high: Vec<u32> = (14..21).map(|at| word(&windows, at)).collect();
        assert_eq!(high, [0x300_0000, 1, 0, 1, 0, 0xff, 0]);
    }

    #[test]
    fn without_an_its_there_are_no_messages() {
        let blob = describe(&Survey { memory: vec![MEMORY], cores: vec![0], its: false }, "").unwrap();
        let tree = Fdt::new(&blob).unwrap();
        assert!(tree.find_node("/pcie@f0000000").unwrap().property("msi-map").is_none());
        assert!(tree.find_node("/interrupt-controller@40060000/msi-controller@44081000").is_none());
    }
}
