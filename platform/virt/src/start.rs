//! From the processor's first function to the image's.

use crate::panic;
use crate::pl011::{Pl011, REGISTERS};
use arch::boot::BootInfo;
use core::ops::Range;
use fdt::{Fdt, FdtError};
use log::LevelFilter;
use spin::Once;

/// What the machine is when an image's `main` runs.
#[derive(Debug)]
pub struct Boot {
    /// The exception level at which the image was entered.
    pub entered_at: u8,
    /// Its memory.
    pub memory: Range<u64>,
}

static CONSOLE: Once<Pl011> = Once::new();

/// The memory and the console's registers.
fn read_tree(tree: &[u8]) -> Result<(Range<u64>, u64), FdtError> {
    let fdt = Fdt::new_unaligned_fallible(tree)?;
    let root = fdt.root()?;
    let memory = root.memory()?;
    let range = memory.reg()?.iter::<u64, u64>().next().ok_or(FdtError::MissingRequiredProperty("reg"))??;
    let uart = root.chosen()?.stdout_path()?.ok_or(FdtError::MissingRequiredNode("stdout-path"))?;
    let uart = root.find_node(uart.path())?.ok_or(FdtError::MissingRequiredNode("stdout-path"))?;
    let uart = uart.reg()?.ok_or(FdtError::MissingRequiredProperty("reg"))?;
    let uart = uart.iter::<u64, u64>().next().ok_or(FdtError::MissingRequiredProperty("reg"))??;
    Ok((range.address..range.address.saturating_add(range.len), uart.address))
}

/// Brings the machine up and runs `main`.
pub fn start(info: BootInfo, main: fn(&Boot) -> u32) -> ! {
    panic::init();
    let Ok(Ok((memory, uart))) = info.with_device_tree(read_tree) else { arch::exit::exit(1) };
    if arch::boot::finish_tables([memory.clone()]).is_err() {
        arch::exit::exit(1);
    }
    let Ok(uart) = arch::mmu::map_device(uart, REGISTERS) else { arch::exit::exit(1) };
    let console = CONSOLE.call_once(|| Pl011::new(uart));
    kernel::log::init(console, LevelFilter::Info);
    let status = main(&Boot { entered_at: info.entered_at, memory });
    arch::exit::exit(status)
}
