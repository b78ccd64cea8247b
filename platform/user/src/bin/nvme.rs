//! A driver of an NVMe controller, at EL0: the admin queue (NVM Express Base 2.0, 3.1.3, 3.3 and 5.17), interrupts by message.
//!
//! Arguments: what to do. The exit code is 0 where everything was as it should be.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(driver::main);

#[cfg(target_os = "none")]
mod driver {
    use user::abi::{ErrorCode, Mode, PAGE, READ, WRITE};
    use user::say;
    use user::sys::{self, Device, Registers};

    /// What can be wrong, as an exit code.
    type Result<T> = core::result::Result<T, u64>;

    fn system(error: ErrorCode) -> u64 {
        say!("nvme: {error:?}");
        1000 + error as u64
    }

    const CONFIGURATION: u64 = 0x14;
    const STATUS: u64 = 0x1c;
    const ADMIN_SIZES: u64 = 0x24;
    const ADMIN_SUBMISSION: u64 = 0x28;
    const ADMIN_COMPLETION: u64 = 0x30;
    const SUBMITTED: u64 = 0x1000;
    const COMPLETED: u64 = 0x1004;

    /// Entries of 64 and 16 bytes, and it is on.
    const ON: u32 = 6 << 16 | 4 << 20 | 1;
    const READY: u32 = 1;
    const IDENTIFY: u32 = 6;
    const CONTROLLER: u32 = 1;

    /// Entries of each queue.
    const ENTRIES: u64 = 16;
    /// Addresses of the device's, as the driver likes them.
    const SUBMISSION_AT: u64 = 0x4000;
    const COMPLETION_AT: u64 = 0x6000;
    const DATA_AT: u64 = 0x100_0000_0000;
    const PATIENCE: u64 = 5_000_000_000;

    pub fn main([what, ..]: [u64; 3]) -> u64 {
        let done = match what {
            0 => Nvme::start().and_then(|mut nvme| nvme.identify()),
            1 => Nvme::start().and_then(|mut nvme| nvme.without_end()),
            _ => Err(1),
        };
        done.map_or_else(|code| code, |()| 0)
    }

    struct Nvme {
        device: Device,
        registers: Registers,
        submission: Registers,
        completion: Registers,
        data: Registers,
        submitted: u64,
        completed: u64,
    }

    fn lent(device: &Device, iova: u64) -> Result<Registers> {
        let at = sys::map(PAGE, READ | WRITE).map_err(system)?;
        // SAFETY: just mapped, and used through this only.
        let memory = unsafe { Registers::of_memory(at, PAGE) };
        // SAFETY: volatile memory.
        unsafe { device.lend(iova, at, PAGE, READ | WRITE) }.map_err(system)?;
        Ok(memory)
    }

    impl Nvme {
        /// Takes a device that knows of nobody before.
        fn start() -> Result<Self> {
            let device = Device::open(0, Mode::Own).map_err(system)?;
            // An NVMe controller, by its class.
            if device.config(8).map_err(system)? >> 8 != 0x01_08_02 {
                return Err(2);
            }
            let registers = device.registers(0).map_err(system)?;
            let known = [CONFIGURATION, STATUS].map(|offset| registers.read32(offset));
            if known != [0, 0] {
                say!("nvme: configuration {:#x}, status {:#x}", known[0], known[1]);
                return Err(3);
            }
            let submission = lent(&device, SUBMISSION_AT)?;
            let completion = lent(&device, COMPLETION_AT)?;
            let data = lent(&device, DATA_AT)?;
            device.connect(0).map_err(system)?;
            registers.write32(ADMIN_SIZES, (ENTRIES as u32 - 1) << 16 | (ENTRIES as u32 - 1));
            for (register, at) in [(ADMIN_SUBMISSION, SUBMISSION_AT), (ADMIN_COMPLETION, COMPLETION_AT)] {
                registers.write32(register, at as u32);
                registers.write32(register + 4, (at >> 32) as u32);
            }
            registers.write32(CONFIGURATION, ON);
            let until = sys::time() + PATIENCE;
            while registers.read32(STATUS) & READY == 0 {
                if sys::time() > until {
                    return Err(4);
                }
            }
            Ok(Self { device, registers, submission, completion, data, submitted: 0, completed: 0 })
        }

        /// Has the controller write what it is to memory.
        fn submit(&mut self) {
            let at = self.submitted % ENTRIES * 64;
            (0..64).step_by(8).for_each(|offset| self.submission.write64(at + offset, 0));
            self.submission.write32(at, IDENTIFY | (self.submitted as u32 & 0xffff) << 16);
            self.submission.write64(at + 24, DATA_AT);
            self.submission.write32(at + 40, CONTROLLER);
            self.submitted += 1;
            sys::barrier();
            self.registers.write32(SUBMITTED, (self.submitted % ENTRIES) as u32);
        }

        /// Waits for the answer to the oldest command.
        fn answer(&mut self) -> Result<()> {
            let at = self.completed % ENTRIES * 16;
            // The phase is 1 in the first round, then 0, and so on.
            let phase = (self.completed / ENTRIES).is_multiple_of(2);
            while (self.completion.read32(at + 12) >> 16 & 1 == 1) != phase {
                self.device.wait(PATIENCE).map_err(system)?;
                self.device.acknowledge().map_err(system)?;
            }
            sys::barrier();
            let status = self.completion.read32(at + 12) >> 17;
            self.completed += 1;
            self.registers.write32(COMPLETED, (self.completed % ENTRIES) as u32);
            if status == 0 { Ok(()) } else { Err(10) }
        }

        fn identify(&mut self) -> Result<()> {
            for _ in 0..40 {
                self.data.write32(4, 0);
                self.submit();
                self.answer()?;
                // The serial number that the machine has given it: "sluice".
                if self.data.read32(4) != u32::from_le_bytes(*b"slui") {
                    return Err(5);
                }
            }
            Ok(())
        }

        /// Goes on until it is killed.
        fn without_end(&mut self) -> Result<()> {
            self.submit();
            loop {
                self.submit();
                self.answer()?;
            }
        }
    }
}
