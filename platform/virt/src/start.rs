//! From the processor's first function to the image's.

use crate::panic;
use crate::pl011::{Pl011, REGISTERS};
use alloc::vec::Vec;
use arch::boot::{BootInfo, DeviceTreeError};
use arch::mmu::MapError;
use arch::psci::Conduit;
use core::fmt;
use iommu::{PhysAddr, PhysRange};
use kernel::cmdline::{self, CommandLine};
use kernel::log::Console;
use kernel::machine::{self, ConsoleKind, Machine, PoolKind, PsciConduit};
use kernel::mm;
use log::LevelFilter;
use spin::Once;

/// What the machine is when an image's `main` runs: on the first core, with interrupts masked, the other cores not started, memory
/// and heap at work.
pub struct Boot {
    /// What the machine is made of.
    pub machine: Machine,
    /// The kernel's command line. `exit` (`semihosting`, `psci`) and `log` (a level) are the board's.
    pub options: CommandLine,
    /// The exception level at which the image was entered: 1, 2 or 3.
    pub entered_at: u8,
    /// The console, where the machine has one.
    pub console: Option<&'static Pl011>,
}

impl fmt::Debug for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Boot").field("entered_at", &self.entered_at).finish_non_exhaustive()
    }
}

/// A machine that cannot be brought up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No device tree.
    #[error("{0}")]
    NoDeviceTree(DeviceTreeError),
    /// A device tree that makes no sense.
    #[error("device tree: {0}")]
    DeviceTree(machine::Error),
    /// A command line that cannot be understood.
    #[error("{0}")]
    CommandLine(cmdline::Error),
    /// The address space could not be made.
    #[error("address space: {0}")]
    Map(MapError),
    /// Memory management could not start.
    #[error("memory: {0}")]
    Memory(mm::Error),
}

static CONSOLE: Once<Pl011> = Once::new();
static BOOT: Once<Boot> = Once::new();

/// The debugger's console, while there is no other.
struct Debugger;

impl Console for Debugger {
    fn write(&self, text: &str) {
        arch::exit::semihosting_print(text);
    }
}

/// Brings the machine up and runs `main`, whose result is the exit status.
pub fn start(info: BootInfo, main: fn(&'static Boot) -> u32) -> ! {
    kernel::log::init_early(&Debugger);
    panic::init();
    let status = match bring_up(info) {
        Ok(boot) => main(BOOT.call_once(|| boot)),
        Err(error) => {
            kernel::println!("error: {error}");
            1
        }
    };
    arch::exit::exit(status)
}

fn bring_up(info: BootInfo) -> Result<Boot, Error> {
    let tree = info.with_device_tree(|tree| Machine::from_fdt(tree).map(|machine| (machine, tree.len())));
    let (mut machine, tree_size) = tree.map_err(Error::NoDeviceTree)?.map_err(Error::DeviceTree)?;

    // Entered at EL3, the image is all the firmware that there is, whatever the tree says.
    if let Some(psci) = machine.psci.filter(|_| info.entered_at < 3) {
        arch::psci::set_conduit(match psci.conduit {
            PsciConduit::Hvc => Conduit::Hvc,
            PsciConduit::Smc => Conduit::Smc,
        });
    }
    let tree = PhysRange::new(PhysAddr::new(info.device_tree), tree_size as u64);
    let homeless = machine.place(&own(&machine, tree).map_err(Error::Memory)?).map_err(Error::DeviceTree)?;
    let linear = mapped(&machine).map_err(Error::Memory)?;
    let bounds = linear.iter().map(|range| range.start().get()..range.end().get());
    arch::boot::finish_tables(bounds).map_err(Error::Map)?;
    let console = console(&machine)?;
    if let Some(console) = console {
        kernel::log::init(console, LevelFilter::Info);
    }
    let options = CommandLine::parse(&machine.chosen.bootargs).map_err(Error::CommandLine)?;
    let exit = options.choice("exit", &["semihosting", "psci"]).map_err(Error::CommandLine)?;
    arch::exit::use_semihosting(exit != Some(1));
    let level =
        options.choice("log", &["off", "error", "warn", "info", "debug", "trace"]).map_err(Error::CommandLine)?;
    let levels = LevelFilter::iter().nth(level.unwrap_or(3));
    log::set_max_level(levels.unwrap_or(LevelFilter::Info));

    if info.entered_at == 3 {
        log::warn!(
            "entered at EL3, so that there is no PSCI: one core runs, and the machine is not switched off at the end"
        );
    }
    for path in homeless {
        log::warn!("memory: there is no place for {path}");
    }
    let reserved = reserved(&machine, tree).map_err(Error::Memory)?;
    let wanted = options.number("cma", u64::MAX).map_err(Error::CommandLine)?;
    let area = machine.contiguous_area(wanted, &reserved).map_err(Error::DeviceTree)?;
    if area.is_none() && wanted != Some(0) {
        log::warn!("memory: there is no area for large allocations");
    }
    let reserved = without(reserved, area);
    let frames = mm::Frames { linear: arch::layout::LINEAR_BASE, memory: &linear, reserved: &reserved, area };
    // SAFETY: all of `linear` was put into the linear map just now; what of it the image, the boot loader and firmware use is in
    // `reserved`; nothing else runs.
    unsafe { mm::init(frames) }.map_err(Error::Memory)?;
    // SAFETY: the frames come zeroed from the allocator, which knows only memory of the linear map, and are never given back.
    unsafe {
        arch::mmu::set_table_source(|| mm::alloc_zeroed(1, mm::Zone::Any).ok().map(|frame| frame.start().get()));
    }
    Ok(Boot { machine, options, entered_at: info.entered_at, console })
}

/// What is reserved besides `area`, which the tree may have as a region.
fn without(mut reserved: Vec<PhysRange>, area: Option<PhysRange>) -> Vec<PhysRange> {
    reserved.retain(|range| Some(*range) != area);
    reserved
}

/// All memory that may be mapped: not what the tree calls `no-map`, and no carve-outs, which get an alias of their own. So does
/// an area for large allocations that is one device's.
fn mapped(machine: &Machine) -> Result<Vec<PhysRange>, mm::Error> {
    let hidden = machine.reserved.iter().filter(|region| match region.pool {
        Some(PoolKind::CarveOut) => true,
        Some(PoolKind::Contiguous) => !region.default,
        _ => region.no_map,
    });
    let hidden = collect(hidden.flat_map(|region| region.ranges.iter().copied()))?;
    mm::subtract(&machine.memory, &hidden)
}

/// What the image and the boot loader use.
fn own(machine: &Machine, tree: Option<PhysRange>) -> Result<Vec<PhysRange>, mm::Error> {
    let image = arch::mmu::image();
    let image = PhysRange::between(PhysAddr::new(image.start), PhysAddr::new(image.end));
    collect([image, tree, machine.chosen.initrd].into_iter().flatten())
}

/// All memory that is somebody's.
fn reserved(machine: &Machine, tree: Option<PhysRange>) -> Result<Vec<PhysRange>, mm::Error> {
    let regions = machine.reserved.iter().flat_map(|region| region.ranges.iter().copied());
    collect(own(machine, tree)?.into_iter().chain(machine.memreserve.iter().copied()).chain(regions))
}

fn collect(ranges: impl Iterator<Item = PhysRange>) -> Result<Vec<PhysRange>, mm::Error> {
    let mut list = Vec::new();
    for range in ranges {
        list.try_reserve(1).map_err(|_| mm::Error::TooLittle)?;
        list.push(range);
    }
    Ok(list)
}

fn console(machine: &Machine) -> Result<Option<&'static Pl011>, Error> {
    let Some(console) = &machine.console else {
        return Ok(None);
    };
    if console.kind != ConsoleKind::Pl011 || console.registers.len() < REGISTERS as u64 {
        return Ok(None);
    }
    let registers = arch::mmu::map_device(console.registers.start().get(), REGISTERS).map_err(Error::Map)?;
    Ok(Some(CONSOLE.call_once(|| Pl011::new(registers))))
}
