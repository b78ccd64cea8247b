//! A driver of QEMU's `edu`, at EL0.
//!
//! Arguments: what to do, with how many bytes, and a value. The exit code is 0 where everything was as it should be.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(driver::main);

#[cfg(target_os = "none")]
mod driver {
    use user::abi::{ErrorCode, Mode, PAGE, READ, Signal, WRITE};
    use user::say;
    use user::sys::{self, Device, Registers};

    const ID: u64 = 0x00;
    const LIVENESS: u64 = 0x04;
    const IRQ_STATUS: u64 = 0x24;
    const IRQ_RAISE: u64 = 0x60;
    const IRQ_ACK: u64 = 0x64;
    const DMA_SOURCE: u64 = 0x80;
    const DMA_DESTINATION: u64 = 0x88;
    const DMA_COUNT: u64 = 0x90;
    const DMA_COMMAND: u64 = 0x98;
    const RUN: u64 = 1;
    const TO_MEMORY: u64 = 2;
    const INTERRUPT: u64 = 4;
    /// Where the device's buffer lies for the device.
    const BUFFER: u64 = 0x4_0000;
    const PATIENCE: u64 = 5_000_000_000;
    /// The exit code where all was well, with interrupts by wire.
    const BY_WIRE: u64 = 100;

    /// What can be wrong, as an exit code.
    type Result<T> = core::result::Result<T, u64>;

    fn system(error: ErrorCode) -> u64 {
        say!("edu: {error:?}");
        1000 + error as u64
    }

    pub fn main([what, len, value]: [u64; 3]) -> u64 {
        let done = match what {
            0 => there_and_back(len, value),
            1 => in_the_middle(Mode::Own, value),
            2 => shared(len, value, false),
            3 => shared(len, value, true),
            4 => refusals(value),
            5 => reach(len, value),
            6 => masked(),
            7 => talk(value),
            8 => in_the_middle(Mode::Shared, value),
            9 => both(len, value),
            _ => Err(1),
        };
        done.map_or_else(|code| code, |()| 0)
    }

    struct Edu {
        device: Device,
        registers: Registers,
    }

    impl Edu {
        fn open(mode: Mode) -> Result<Self> {
            Self::open_number(0, mode)
        }

        fn open_number(number: u64, mode: Mode) -> Result<Self> {
            let device = Device::open(number, mode).map_err(system)?;
            if device.config(0).map_err(system)? != 0x11e8_1234 {
                return Err(2);
            }
            let registers = device.registers(0).map_err(system)?;
            registers.write32(LIVENESS, 0x1234_5678);
            if registers.read32(ID) & 0xff != 0xed || registers.read32(LIVENESS) != !0x1234_5678 {
                return Err(3);
            }
            Ok(Self { device, registers })
        }

        fn begin(&self, to_memory: bool, at: u64, len: u64, interrupt: bool) {
            let (source, destination) = if to_memory { (BUFFER, at) } else { (at, BUFFER) };
            self.registers.write64(DMA_SOURCE, source);
            self.registers.write64(DMA_DESTINATION, destination);
            self.registers.write64(DMA_COUNT, len);
            sys::barrier();
            let (way, how) = (u64::from(to_memory) * TO_MEMORY, u64::from(interrupt) * INTERRUPT);
            self.registers.write64(DMA_COMMAND, RUN | way | how);
        }

        /// Copies, and waits for the interrupt.
        fn copy(&self, to_memory: bool, at: u64, len: u64) -> Result<()> {
            self.begin(to_memory, at, len, true);
            loop {
                self.device.wait(PATIENCE).map_err(system)?;
                let status = self.registers.read32(IRQ_STATUS);
                self.registers.write32(IRQ_ACK, status);
                self.device.acknowledge().map_err(system)?;
                if status & 0x100 != 0 {
                    sys::barrier();
                    return Ok(());
                }
            }
        }

        /// Copies, and looks again and again.
        fn copy_polling(&self, to_memory: bool, at: u64, len: u64) -> Result<()> {
            self.begin(to_memory, at, len, false);
            let until = sys::time() + PATIENCE;
            while self.registers.read64(DMA_COMMAND) & RUN != 0 {
                if sys::time() > until {
                    return Err(4);
                }
                sys::sleep(1_000_000);
            }
            sys::barrier();
            Ok(())
        }
    }

    fn memory(pages: u64) -> Result<Registers> {
        let at = sys::map(pages * PAGE, READ | WRITE).map_err(system)?;
        // SAFETY: just mapped, and used through this only.
        Ok(unsafe { Registers::of_memory(at, pages * PAGE) })
    }

    fn fill(memory: Registers, from: u64, len: u64, value: u64) {
        for offset in (0..len & !7).step_by(8) {
            memory.write64(from + offset, value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ offset);
        }
    }

    fn check(memory: Registers, from: u64, len: u64, value: u64) -> bool {
        (0..len & !7)
            .step_by(8)
            .all(|offset| memory.read64(from + offset) == value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ offset)
    }

    /// Sends `len` bytes to the device and has them written back elsewhere, at addresses that it chooses.
    fn there_and_back(len: u64, value: u64) -> Result<()> {
        let edu = Edu::open(Mode::Own)?;
        edu.device.connect(0).map_err(system)?;
        let (out, back) = (memory(1)?, memory(2)?);
        fill(out, 0, len, value);
        let (from, to) = (0x5000_0000_0000, 0x1000);
        // SAFETY: both are volatile memory.
        unsafe { edu.device.lend(from, out.base(), PAGE, READ) }.map_err(system)?;
        // SAFETY: as above.
        unsafe { edu.device.lend(to, back.base() + PAGE, PAGE, WRITE) }.map_err(system)?;
        for round in 0..3 {
            fill(out, 0, len, value + round);
            edu.copy(false, from, len)?;
            edu.copy(true, to, len)?;
            if !check(back, PAGE, len, value + round) {
                return Err(5);
            }
        }
        if (0..PAGE).step_by(8).any(|offset| back.read64(offset) != 0) {
            return Err(6);
        }
        edu.device.take_back(from, PAGE).map_err(system)?;
        edu.device.take_back(to, PAGE).map_err(system)?;
        // Lent no more: what the device writes now goes nowhere.
        fill(back, PAGE, PAGE, 0x77);
        edu.copy(true, to, len)?;
        if check(back, PAGE, PAGE, 0x77) { Ok(()) } else { Err(7) }
    }

    /// Has the device write to its memory without end, and waits to be killed.
    fn in_the_middle(mode: Mode, value: u64) -> Result<()> {
        let edu = Edu::open(mode)?;
        let back = memory(1)?;
        let at = match mode {
            Mode::Own => {
                // SAFETY: volatile memory.
                unsafe { edu.device.lend(value, back.base(), PAGE, READ | WRITE) }.map_err(system)?;
                value
            }
            Mode::Shared => back.base(),
        };
        edu.copy_polling(false, at, PAGE - 8)?;
        loop {
            edu.begin(true, at, PAGE - 8, false);
            while edu.registers.read64(DMA_COMMAND) & RUN != 0 {
                core::hint::spin_loop();
            }
        }
    }

    /// Two devices, both with the process's own pointers: what one writes the other reads.
    fn both(len: u64, value: u64) -> Result<()> {
        let (one, two) = (Edu::open(Mode::Shared)?, Edu::open_number(1, Mode::Shared)?);
        let memory = memory(2)?;
        fill(memory, 0, len, value);
        one.copy_polling(false, memory.base(), len)?;
        fill(memory, 0, len, !value);
        one.copy_polling(true, memory.base(), len)?;
        two.copy_polling(false, memory.base(), len)?;
        two.copy_polling(true, memory.base() + PAGE, len)?;
        if check(memory, 0, len, value) && check(memory, PAGE, len, value) { Ok(()) } else { Err(5) }
    }

    /// The device uses the process's own pointers. All is well with [`BY_WIRE`] too.
    fn shared(len: u64, value: u64, unmap: bool) -> Result<()> {
        let before = memory(1)?;
        let edu = Edu::open(Mode::Shared)?;
        let signal = edu.device.connect(0).map_err(system)?;
        let after = memory(2)?;
        fill(before, 0, len, value);
        edu.copy(false, before.base(), len)?;
        edu.copy(true, after.base() + PAGE, len)?;
        if !check(after, PAGE, len, value) {
            return Err(5);
        }
        if unmap {
            // SAFETY: not used any more, but by the device, which is to be stopped.
            unsafe { sys::unmap(after.base(), 2 * PAGE) }.map_err(system)?;
            edu.copy_polling(true, after.base() + PAGE, len)?;
        }
        if signal == Signal::Wire { Err(BY_WIRE) } else { Ok(()) }
    }

    /// Everything that must be refused, each with its own code. `doorbell` is an address that is set aside.
    fn refusals(doorbell: u64) -> Result<()> {
        let edu = Edu::open(Mode::Own)?;
        let own = memory(4)?;
        let readable = sys::map(PAGE, READ).map_err(system)?;
        let device = &edu.device;
        let wrong = [
            // Not the process's: nothing there, the kernel's, past the end, registers, code to be written.
            (0x100_0000, 0x9000_0000, PAGE, READ, ErrorCode::BadAddress),
            (0x100_0000, 0xffff_0000_0000_0000, PAGE, READ, ErrorCode::BadAddress),
            (0x100_0000, own.base() + 3 * PAGE, 2 * PAGE, READ, ErrorCode::BadAddress),
            (0x100_0000, edu.registers.base(), PAGE, READ, ErrorCode::BadAddress),
            (0x100_0000, readable, PAGE, WRITE, ErrorCode::BadAddress),
            (0x100_0000, readable, PAGE, READ | WRITE, ErrorCode::BadAddress),
            // Lengths, alignment, rights.
            (0x100_0000, own.base(), 0, READ, ErrorCode::BadLength),
            (0x100_0000, own.base(), 100, READ, ErrorCode::BadLength),
            (0x100_0000, own.base(), 0u64.wrapping_sub(PAGE), READ, ErrorCode::BadLength),
            (0x100_0800, own.base(), PAGE, READ, ErrorCode::Misaligned),
            (0x100_0000, own.base() + 8, PAGE, READ, ErrorCode::Misaligned),
            (0x100_0000, own.base(), PAGE, 0, ErrorCode::BadRights),
            (0x100_0000, own.base(), PAGE, 8, ErrorCode::BadRights),
            // Where nothing may be, and where nothing can be.
            (doorbell & !(PAGE - 1), own.base(), PAGE, READ | WRITE, ErrorCode::Reserved),
            (1 << 60, own.base(), PAGE, READ, ErrorCode::OutOfReach),
        ];
        for (case, (iova, address, len, rights, code)) in (0..).zip(wrong) {
            // SAFETY: volatile memory, should it succeed.
            let result = unsafe { device.lend(iova, address, len, rights) };
            if result != Err(code) {
                say!("edu: case {case}: {result:?}");
                return Err(10 + case);
            }
        }
        // SAFETY: volatile memory.
        unsafe { device.lend(0x200_0000, own.base(), 2 * PAGE, READ | WRITE) }.map_err(system)?;
        // SAFETY: as above.
        let overlap = unsafe { device.lend(0x200_1000, own.base() + 2 * PAGE, PAGE, READ) };
        // The same memory at another address is the process's business.
        // SAFETY: as above.
        unsafe { device.lend(0x300_0000, own.base(), PAGE, READ) }.map_err(system)?;
        let not_whole = device.take_back(0x200_0000, PAGE);
        // While a transfer is under way.
        edu.begin(false, 0x200_0000, PAGE - 8, false);
        // SAFETY: not used meanwhile.
        let lent = unsafe { sys::unmap(own.base(), 4 * PAGE) };
        let taken = device.take_back(0x200_0000, 2 * PAGE);
        // SAFETY: as above.
        let still_lent = unsafe { sys::unmap(own.base(), 4 * PAGE) };
        let other = device.take_back(0x300_0000, PAGE);
        // SAFETY: as above.
        let free = unsafe { sys::unmap(own.base(), 4 * PAGE) };
        let again = device.take_back(0x300_0000, PAGE);
        let results = [overlap, not_whole, lent, taken, still_lent, other, free, again];
        let wanted = [
            Err(ErrorCode::Overlap),
            Err(ErrorCode::NotMapped),
            Err(ErrorCode::Busy),
            Ok(()),
            Err(ErrorCode::Busy),
            Ok(()),
            Ok(()),
            Err(ErrorCode::NotMapped),
        ];
        if results != wanted {
            say!("edu: {results:?}");
            return Err(30);
        }
        if device.connect(1) != Err(ErrorCode::NoSuchDevice) || device.registers(3).is_ok() {
            return Err(31);
        }
        let handle = edu.device.handle();
        drop(edu);
        // SAFETY: closing what is closed.
        let (stale, _) = unsafe { sys::raw(user::abi::Call::Config as u64, [handle, 0, 0, 0, 0, 0]) };
        if stale == ErrorCode::BadHandle as u64 { Ok(()) } else { Err(32) }
    }

    /// An interrupt is masked from the first on, until it is acknowledged.
    fn masked() -> Result<()> {
        const SHORT: u64 = 20_000_000;
        let edu = Edu::open(Mode::Own)?;
        edu.device.connect(0).map_err(system)?;
        let raise = || {
            edu.registers.write32(IRQ_RAISE, 1);
            edu.registers.write32(IRQ_ACK, 1);
        };
        for _ in 0..3 {
            raise();
            let first = edu.device.wait(PATIENCE);
            raise();
            raise();
            let second = edu.device.wait(SHORT);
            edu.device.acknowledge().map_err(system)?;
            if (first, second) != (Ok(1), Err(ErrorCode::TimedOut)) {
                say!("edu: {first:?} {second:?}");
                return Err(50);
            }
        }
        Ok(())
    }

    /// Says more than it may, and panics then.
    fn talk(value: u64) -> Result<()> {
        let mut refused = false;
        for _ in 0..value {
            refused |= sys::write(b"edu: and on and on") == Err(ErrorCode::Quota);
        }
        if !refused {
            return Err(60);
        }
        panic!("last words")
    }

    /// Has the device reach for `value`, which was never lent, both ways.
    fn reach(len: u64, value: u64) -> Result<()> {
        let edu = Edu::open(Mode::Own)?;
        edu.copy_polling(false, value, len)?;
        edu.copy_polling(true, value, len)
    }
}
