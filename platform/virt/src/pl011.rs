//! The PL011 UART (DDI 0183), as a console: polled, because its users include fault handlers.

use arch::mmio::Mmio;
use base::{Deadline, TimedOut, wait_until};
use core::time::Duration;
use kernel::log::Console;

const DR: usize = 0x00;
const FR: usize = 0x18;
const LCR_H: usize = 0x2c;
const CR: usize = 0x30;
const IMSC: usize = 0x38;

const FR_RXFE: u32 = 1 << 4;
const FR_TXFF: u32 = 1 << 5;
const LCR_H_FEN: u32 = 1 << 4;
const LCR_H_WLEN_8: u32 = 3 << 5;
const CR_UARTEN: u32 = 1 << 0;
const CR_TXE: u32 = 1 << 8;
const CR_RXE: u32 = 1 << 9;

/// How many bytes of registers the UART has.
pub const REGISTERS: usize = 0x1000;

/// How long to wait for room in the transmit queue before a byte is dropped: many times what a byte takes at 9600 baud.
const PATIENCE_MILLIS: u64 = 50;

/// How often a reader looks for a byte.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// A UART.
#[derive(Debug)]
pub struct Pl011 {
    registers: Mmio,
}

impl Pl011 {
    /// Sets up the UART at `registers` (at least [`REGISTERS`] bytes): 8 bits, queues on, no interrupts. The speed stays as
    /// firmware set it.
    pub fn new(registers: Mmio) -> Self {
        registers.write32(CR, 0);
        registers.write32(IMSC, 0);
        registers.write32(LCR_H, LCR_H_WLEN_8 | LCR_H_FEN);
        registers.write32(CR, CR_UARTEN | CR_TXE | CR_RXE);
        Self { registers }
    }

    fn put(&self, byte: u8) {
        if self.registers.read32(FR) & FR_TXFF != 0 {
            let deadline = Deadline::after_millis(PATIENCE_MILLIS);
            while self.registers.read32(FR) & FR_TXFF != 0 {
                if deadline.has_passed() {
                    return;
                }
                core::hint::spin_loop();
            }
        }
        self.registers.write32(DR, u32::from(byte));
    }

    /// Takes a byte that has come in, if there is one.
    pub fn try_read(&self) -> Option<u8> {
        (self.registers.read32(FR) & FR_RXFE == 0).then(|| self.registers.read32(DR) as u8)
    }

    /// Waits for a byte.
    ///
    /// # Errors
    ///
    /// [`TimedOut`] if none has come when `deadline` passes.
    pub fn read(&self, deadline: Deadline) -> Result<u8, TimedOut> {
        loop {
            if let Some(byte) = self.try_read() {
                return Ok(byte);
            }
            if deadline.has_passed() {
                return Err(TimedOut);
            }
            // Nobody interrupts for a byte: the wait is only a pause, and always runs into its own deadline.
            let _ = wait_until(Deadline::after(LOOK_EVERY).min(deadline), || false);
        }
    }

    /// Reads a line into `buffer`, echoing it, until return is typed; backspace takes back. What does not fit, and what is not
    /// printable ASCII, is ignored. Returns the line without its end.
    ///
    /// # Errors
    ///
    /// [`TimedOut`] if the line is not finished when `deadline` passes; what was typed is lost.
    pub fn read_line<'a>(&self, buffer: &'a mut [u8], deadline: Deadline) -> Result<&'a str, TimedOut> {
        let mut len = 0;
        loop {
            match self.read(deadline)? {
                b'\r' | b'\n' => {
                    self.write("\n");
                    // Only ASCII was stored.
                    return Ok(buffer.get(..len).and_then(|line| core::str::from_utf8(line).ok()).unwrap_or(""));
                }
                0x08 | 0x7f if len != 0 => {
                    len -= 1;
                    self.write("\x08 \x08");
                }
                byte @ b' '..=b'~' => {
                    if let Some(place) = buffer.get_mut(len) {
                        *place = byte;
                        len += 1;
                        self.put(byte);
                    }
                }
                _ => {}
            }
        }
    }
}

impl Console for Pl011 {
    fn write(&self, text: &str) {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
    }
}
