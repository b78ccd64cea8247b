//! A driver of virtio-blk, at EL0: virtio 1.2 over PCI \[4.1\], one split queue \[2.7\], interrupts by message or by wire.
//!
//! Arguments: what to do, a sector, and a value. The exit code is 0 where everything was as it should be.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(driver::main);

#[cfg(target_os = "none")]
mod driver {
    use user::abi::{ErrorCode, Mode, PAGE, READ, Signal, WRITE};
    use user::say;
    use user::sys::{self, Device, Event, Registers};

    /// What can be wrong, as an exit code.
    type Result<T> = core::result::Result<T, u64>;

    fn system(error: ErrorCode) -> u64 {
        say!("blk: {error:?}");
        1000 + error as u64
    }

    /// The common configuration \[4.1.4.3\].
    mod common {
        pub const SIZE: u64 = 56;
        pub const DEVICE_FEATURE_SELECT: u64 = 0;
        pub const DEVICE_FEATURE: u64 = 4;
        pub const DRIVER_FEATURE_SELECT: u64 = 8;
        pub const DRIVER_FEATURE: u64 = 12;
        pub const CONFIG_VECTOR: u64 = 16;
        pub const STATUS: u64 = 20;
        pub const QUEUE_SELECT: u64 = 22;
        pub const QUEUE_SIZE: u64 = 24;
        pub const QUEUE_VECTOR: u64 = 26;
        pub const QUEUE_ENABLE: u64 = 28;
        pub const QUEUE_NOTIFY_OFF: u64 = 30;
        pub const QUEUE_DESC: u64 = 32;
        pub const QUEUE_DRIVER: u64 = 40;
        pub const QUEUE_DEVICE: u64 = 48;
    }

    const ACKNOWLEDGE: u8 = 1;
    const DRIVER: u8 = 2;
    const DRIVER_OK: u8 = 4;
    const FEATURES_OK: u8 = 8;
    /// VERSION_1 and ACCESS_PLATFORM, of the second 32 features.
    const FEATURES: u32 = 3;
    const NO_VECTOR: u16 = 0xffff;

    /// Requests at once.
    const SLOTS: u64 = 8;
    /// Descriptors: three for each.
    const DESCRIPTORS: u64 = 32;
    const AVAILABLE: u64 = 512;
    const USED: u64 = 1024;
    const HEADERS: u64 = 2048;
    const STATUSES: u64 = 3072;
    const NEXT: u16 = 1;
    const DEVICE_WRITES: u16 = 2;
    const IN: u32 = 0;
    const OUT: u32 = 1;

    /// Addresses of the device's, as the driver likes them.
    const RING_AT: u64 = 0x300_0000_0000;
    const DATA_AT: u64 = 0x2000;
    const SECTORS: u64 = PAGE / 512;
    const PATIENCE: u64 = 5_000_000_000;

    pub fn main([what, sector, value]: [u64; 3]) -> u64 {
        let done = Blk::start().and_then(|mut blk| match what {
            0 => blk.write_and_read(sector, value),
            1 => blk.without_end(sector),
            2 => blk.deaf(sector, value),
            3 => blk.masked(sector),
            _ => Err(1),
        });
        done.map_or_else(|code| code, |()| 0)
    }

    struct Blk {
        device: Device,
        doorbell: Registers,
        /// The interrupt status \[4.1.4.5\], where the device interrupts by wire: it takes its interrupt back when that is read.
        isr: Option<Registers>,
        ring: Registers,
        data: Registers,
        submitted: u16,
        completed: u16,
    }

    /// The window that the capability of type `kind` describes, and where the capability is.
    fn window(device: &Device, kind: u8, bars: &mut [Option<Registers>; 6]) -> Result<(Registers, u64)> {
        let mut at = u64::from(device.config8(0x34).map_err(system)? & !3);
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            let byte = |offset| device.config8(at + offset).map_err(system);
            let bar = u64::from(byte(4)?);
            if byte(0)? == 9 && byte(3)? == kind && bar < 6 {
                let word = |offset| device.config(at + offset).map_err(system);
                let place = bars.get_mut(bar as usize).ok_or(20_u64)?;
                let registers = match *place {
                    Some(registers) => registers,
                    None => *place.insert(device.registers(bar).map_err(system)?),
                };
                let part = registers.part(word(8)?.into(), word(12)?.into()).ok_or(21_u64)?;
                return Ok((part, at));
            }
            at = u64::from(byte(1)? & !3);
        }
        Err(22)
    }

    fn memory(pages: u64) -> Result<Registers> {
        let at = sys::map(pages * PAGE, READ | WRITE).map_err(system)?;
        // SAFETY: just mapped, and used through this only.
        Ok(unsafe { Registers::of_memory(at, pages * PAGE) })
    }

    impl Blk {
        fn start() -> Result<Self> {
            let device = Device::open(0, Mode::Own).map_err(system)?;
            let mut bars = [None; 6];
            let (common, _) = window(&device, 1, &mut bars)?;
            let (notify, notify_at) = window(&device, 2, &mut bars)?;
            let multiplier = u64::from(device.config(notify_at + 16).map_err(system)?);
            common.part(0, common::SIZE).ok_or(23_u64)?;
            common.write8(common::STATUS, 0);
            let until = sys::time() + PATIENCE;
            while common.read8(common::STATUS) != 0 {
                if sys::time() > until {
                    return Err(24);
                }
            }
            common.write8(common::STATUS, ACKNOWLEDGE | DRIVER);
            common.write32(common::DEVICE_FEATURE_SELECT, 1);
            if common.read32(common::DEVICE_FEATURE) & FEATURES != FEATURES {
                return Err(25);
            }
            for (half, features) in [(0, 0), (1, FEATURES)] {
                common.write32(common::DRIVER_FEATURE_SELECT, half);
                common.write32(common::DRIVER_FEATURE, features);
            }
            common.write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
            if common.read8(common::STATUS) & FEATURES_OK == 0 {
                return Err(26);
            }
            let (ring, data) = (memory(1)?, memory(SLOTS)?);
            // SAFETY: volatile memory.
            unsafe { device.lend(RING_AT, ring.base(), PAGE, READ | WRITE) }.map_err(system)?;
            // SAFETY: as above.
            unsafe { device.lend(DATA_AT, data.base(), SLOTS * PAGE, READ | WRITE) }.map_err(system)?;
            let signal = device.connect(0).map_err(system)?;
            let isr = match signal {
                Signal::Message => None,
                Signal::Wire => Some(window(&device, 3, &mut bars)?.0),
            };
            common.write16(common::QUEUE_SELECT, 0);
            if u64::from(common.read16(common::QUEUE_SIZE)) < DESCRIPTORS {
                return Err(27);
            }
            common.write16(common::QUEUE_SIZE, DESCRIPTORS as u16);
            for (register, offset) in
                [(common::QUEUE_DESC, 0), (common::QUEUE_DRIVER, AVAILABLE), (common::QUEUE_DEVICE, USED)]
            {
                common.write32(register, (RING_AT + offset) as u32);
                common.write32(register + 4, ((RING_AT + offset) >> 32) as u32);
            }
            if isr.is_none() {
                common.write16(common::CONFIG_VECTOR, NO_VECTOR);
                common.write16(common::QUEUE_VECTOR, 0);
                if common.read16(common::QUEUE_VECTOR) != 0 {
                    return Err(28);
                }
            }
            let offset = u64::from(common.read16(common::QUEUE_NOTIFY_OFF)) * multiplier;
            let doorbell = notify.part(offset, 2).ok_or(29_u64)?;
            common.write16(common::QUEUE_ENABLE, 1);
            common.write8(common::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            Ok(Self { device, doorbell, isr, ring, data, submitted: 0, completed: 0 })
        }

        fn descriptor(&self, index: u64, address: u64, len: u64, flags: u16) {
            let at = index * 16;
            self.ring.write64(at, address);
            self.ring.write32(at + 8, len as u32);
            self.ring.write16(at + 12, flags);
            self.ring.write16(at + 14, index as u16 + 1);
        }

        /// Hands the device a request for one page, in a slot that is free. It is not told yet.
        fn submit(&mut self, slot: u64, kind: u32, sector: u64) {
            let (first, header) = (slot * 3, HEADERS + slot * 16);
            self.ring.write32(header, kind);
            self.ring.write32(header + 4, 0);
            self.ring.write64(header + 8, sector);
            self.ring.write8(STATUSES + slot, 0xff);
            let way = if kind == IN { DEVICE_WRITES } else { 0 };
            self.descriptor(first, RING_AT + header, 16, NEXT);
            self.descriptor(first + 1, DATA_AT + slot * PAGE, PAGE, NEXT | way);
            self.descriptor(first + 2, RING_AT + STATUSES + slot, 1, DEVICE_WRITES);
            let place = u64::from(self.submitted) % DESCRIPTORS;
            self.ring.write16(AVAILABLE + 4 + 2 * place, first as u16);
            self.submitted = self.submitted.wrapping_add(1);
        }

        fn tell(&self) {
            sys::barrier();
            self.ring.write16(AVAILABLE + 2, self.submitted);
            // A store to memory, then one to a register: the device sees them so.
            sys::barrier();
            self.doorbell.write16(0, 0);
        }

        /// Has the device take its interrupt back, where it has to.
        fn take_back(&self) -> Result<()> {
            let Some(isr) = self.isr else { return Ok(()) };
            let status = isr.read8(0);
            // Bit 0 is the queue's. The wire may be another's, but that is the kernel's business.
            if status & 1 == 0 {
                return Err(42);
            }
            Ok(())
        }

        /// Waits for one answer; the slot it is of.
        fn answer(&mut self) -> Result<u64> {
            while self.ring.read16(USED + 2) == self.completed {
                self.device.wait(PATIENCE).map_err(system)?;
                self.take_back()?;
                self.device.acknowledge().map_err(system)?;
            }
            sys::barrier();
            let place = u64::from(self.completed) % DESCRIPTORS;
            let slot = u64::from(self.ring.read32(USED + 4 + 8 * place)) / 3;
            self.completed = self.completed.wrapping_add(1);
            // The device's word is checked.
            if slot >= SLOTS || self.ring.read8(STATUSES + slot) != 0 {
                return Err(40);
            }
            Ok(slot)
        }

        /// Moves all slots at once, from or to neighbouring sectors.
        fn all(&mut self, kind: u32, sector: u64) -> Result<()> {
            (0..SLOTS).for_each(|slot| self.submit(slot, kind, sector + slot * SECTORS));
            self.tell();
            (0..SLOTS).try_for_each(|_| self.answer().map(drop))
        }

        fn word(offset: u64, value: u64) -> u64 {
            value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ offset
        }

        /// Writes a pattern to the disk and reads it back.
        fn write_and_read(&mut self, sector: u64, value: u64) -> Result<()> {
            let len = SLOTS * PAGE;
            (0..len).step_by(8).for_each(|offset| self.data.write64(offset, Self::word(offset, value)));
            self.all(OUT, sector)?;
            (0..len).step_by(8).for_each(|offset| self.data.write64(offset, 0));
            self.all(IN, sector)?;
            let same = (0..len).step_by(8).all(|offset| self.data.read64(offset) == Self::word(offset, value));
            if same { Ok(()) } else { Err(41) }
        }

        /// Never has the device take its interrupt back: by wire it comes once for each time that it is acknowledged.
        fn deaf(&mut self, sector: u64, rounds: u64) -> Result<()> {
            const SHORT: u64 = 10_000_000;
            self.submit(0, IN, sector);
            self.tell();
            for round in 0..rounds {
                let first = self.device.wait(PATIENCE);
                let second = if round % 16 == 0 { self.device.wait(SHORT) } else { Err(ErrorCode::TimedOut) };
                if (first, second) != (Ok(1), Err(ErrorCode::TimedOut)) {
                    say!("blk: round {round}: {first:?} {second:?}");
                    return Err(50);
                }
                self.device.acknowledge().map_err(system)?;
            }
            Ok(())
        }

        /// An interrupt that comes while it is masked comes when it is not any more, however it comes.
        fn masked(&mut self, sector: u64) -> Result<()> {
            const SHORT: u64 = 20_000_000;
            for _ in 0..3 {
                let done = self.completed;
                self.submit(0, IN, sector);
                self.tell();
                let first = self.device.wait(PATIENCE);
                self.take_back()?;
                self.submit(1, IN, sector);
                self.tell();
                let second = self.device.wait(SHORT);
                // It is through, and nobody was told.
                let through = self.ring.read16(USED + 2) == done.wrapping_add(2);
                self.device.acknowledge().map_err(system)?;
                let third = self.device.wait(PATIENCE);
                self.take_back()?;
                self.device.acknowledge().map_err(system)?;
                if (first, second, through, third) != (Ok(1), Err(ErrorCode::TimedOut), true, Ok(1)) {
                    say!("blk: {first:?} {second:?} {through} {third:?}");
                    return Err(51);
                }
                self.answer()?;
                self.answer()?;
            }
            Ok(())
        }

        /// Reads, with as many requests under way as there can be, until it is killed. Raises the event that it was given, if it was,
        /// for each that is done.
        fn without_end(&mut self, sector: u64) -> Result<()> {
            let served = Event::open(0).ok();
            (0..SLOTS).for_each(|slot| self.submit(slot, IN, sector + slot * SECTORS));
            self.tell();
            loop {
                let slot = self.answer()?;
                self.submit(slot, IN, sector + slot * SECTORS);
                self.tell();
                served.as_ref().map_or(Ok(()), Event::raise).map_err(system)?;
            }
        }
    }
}
