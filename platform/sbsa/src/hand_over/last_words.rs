//! What is said when there is no way on.

use crate::registers::{cause, read, wait, write};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use sbsa::map;

const DR: u64 = map::UART.0;
const FR: u64 = map::UART.0 + 0x18;
const LCR_H: u64 = map::UART.0 + 0x2c;
const CR: u64 = map::UART.0 + 0x30;

const FR_TXFF: u32 = 1 << 5;
const LCR_H_8_BITS_FIFO: u32 = 7 << 4;
const CR_TRANSMIT: u32 = 1 << 8 | 1;

/// How often a full transmit queue is looked at before a byte is dropped.
const LOOKS: u32 = 1_000_000;

/// What the embedded controller does when it is told.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Power {
    /// Switches the machine off.
    Off = 1,
    /// Resets it.
    Reset = 2,
}

/// Has the machine switched off or reset, and waits for it.
pub(crate) fn power(what: Power) -> ! {
    write(map::CONTROLLER, what as u32);
    loop {
        wait();
    }
}

struct Uart;

impl Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if (0..LOOKS).any(|_| read(FR) & FR_TXFF == 0) {
                write(DR, byte.into());
            }
        }
        Ok(())
    }
}

/// Says why there is no way on, and switches the machine off.
pub(crate) fn fatal(why: &dyn fmt::Display) -> ! {
    write(LCR_H, LCR_H_8_BITS_FIFO);
    write(CR, CR_TRANSMIT);
    // Writing to the UART does not fail.
    let _ = write!(Uart, "\r\nhand-over: {why}\r\n");
    power(Power::Off)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    fatal(info)
}

/// An exception that nothing expects.
#[unsafe(no_mangle)]
extern "C" fn surprise() -> ! {
    fatal(&format_args!("exception at EL3: ESR {:#x}, ELR {:#x}, FAR {:#x}", cause(0), cause(1), cause(2)))
}
