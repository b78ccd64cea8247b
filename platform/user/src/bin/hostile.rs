//! A program that asks for whatever comes to its mind, and has its device do likewise.
//!
//! Arguments: how many calls, with bit 63 where its device is to go by its own table; a seed; an address that it should not have. The
//! exit code is the number of different error codes that it has seen.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(program::main);

#[cfg(target_os = "none")]
mod program {
    use user::abi::{Call, Mode, PAGE, READ, WRITE};
    use user::sys::{self, Device, Registers};

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
        fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
        fn of(&mut self, choices: &[u64]) -> u64 {
            let index = self.below(choices.len() as u64) as usize;
            choices.get(index).copied().unwrap_or_default()
        }
    }

    /// What it remembers of what it was given: addresses with lengths, addresses of its device's, and handles of buffers and events, with
    /// addresses and lengths of the former.
    #[derive(Default)]
    struct Memory {
        maps: [(u64, u64); 16],
        loans: [(u64, u64); 16],
        handles: [Option<(u64, u64, u64)>; 8],
    }

    pub fn main([calls, seed, secret]: [u64; 3]) -> u64 {
        let mut random = Random(seed | 1);
        let mut memory = Memory::default();
        let mode = if calls >> 63 == 0 { Mode::Own } else { Mode::Shared };
        let calls = calls << 1 >> 1;
        let device = Device::open(0, mode).ok();
        let registers = device.as_ref().and_then(|device| device.registers(0).ok());
        let handle = device.as_ref().map_or(0, Device::handle);
        let mut seen = 0_u64;
        for number in 0..calls {
            let (call, arguments) = think(&mut random, &memory, handle, secret);
            // SAFETY: what it may take away it has not used since: all of it was asked for by calls like this.
            let (code, value) = unsafe { sys::raw(call, arguments) };
            seen |= 1 << (code & 63);
            remember(&mut memory, &mut random, call, arguments, code, value);
            if let Some(registers) = registers.filter(|_| number % 64 == 0) {
                provoke(registers, &mut random, secret, memory.maps[0].0);
            }
        }
        u64::from((seen & !1).count_ones())
    }

    fn think(random: &mut Random, memory: &Memory, handle: u64, secret: u64) -> (u64, [u64; 6]) {
        let map = memory.maps.get(random.below(16) as usize).copied().unwrap_or_default();
        let loan = memory.loans.get(random.below(16) as usize).copied().unwrap_or_default();
        let shared = memory.handles.get(random.below(8) as usize).copied().flatten().unwrap_or_default();
        let mut arguments = core::array::from_fn(|_| match random.below(13) {
            0 => random.next(),
            1 => random.below(8),
            2 => PAGE * random.below(10),
            3 => map.0 + PAGE * random.below(4),
            4 => map.1,
            5 => loan.0,
            6 => random.of(&[u64::MAX, u64::MAX - PAGE + 1, 1 << 48, 0xffff_0000_0000_0000, 1 << 63]),
            7 => secret & !(PAGE - 1),
            8 => handle,
            9 => shared.0,
            10 => shared.1,
            11 => 1 << random.below(64),
            _ => random.below(1 << 13),
        });
        let none = random.next() | 64;
        let call = random.of(&[
            Call::Write as u64,
            Call::Map as u64,
            Call::Unmap as u64,
            Call::Lend as u64,
            Call::Lend as u64,
            Call::TakeBack as u64,
            Call::Config as u64,
            Call::Registers as u64,
            Call::BarSize as u64,
            Call::Connect as u64,
            Call::Acknowledge as u64,
            Call::Open as u64,
            Call::Time as u64,
            Call::Wait as u64,
            Call::Close as u64,
            Call::OpenBuffer as u64,
            Call::BufferSize as u64,
            Call::MapBuffer as u64,
            Call::MapBuffer as u64,
            Call::BeginAccess as u64,
            Call::BeginAccess as u64,
            Call::EndAccess as u64,
            Call::OpenEvent as u64,
            Call::Raise as u64,
            Call::MapMemory as u64,
            Call::MemorySize as u64,
            none,
        ]);
        let meant = random.below(2) == 0;
        if call == Call::Write as u64 {
            // A log full of nothing helps nobody: what it may read it does not write.
            arguments[0] |= 1 << 47;
        } else if call == Call::Wait as u64 {
            arguments[1] = 0;
        } else if call == Call::Close as u64 {
            // Its device it keeps.
            arguments[0] = if meant && shared.0 != handle { shared.0 } else { arguments[0] | 1 << 20 };
        } else if call == Call::BeginAccess as u64 {
            arguments[2] = random.below(1000);
            if meant {
                (arguments[0], arguments[1]) = (shared.0, random.of(&[READ, READ | WRITE]));
            }
        } else if (call == Call::OpenBuffer as u64 || call == Call::OpenEvent as u64) && meant {
            arguments[0] = random.below(3);
        } else if call == Call::MapBuffer as u64 && meant {
            (arguments[0], arguments[1]) = (shared.0, PAGE << random.below(20));
        } else if (call == Call::EndAccess as u64 || call == Call::Raise as u64) && meant {
            arguments[0] = shared.0;
        } else if call == Call::MapMemory as u64 && meant {
            (arguments[0], arguments[1]) = (random.below(3), random.of(&[READ, READ | WRITE]));
        } else if call == Call::Map as u64 && meant {
            (arguments[0], arguments[1]) = (PAGE * (1 + random.below(8)), random.of(&[READ, READ | WRITE]));
        } else if call == Call::Unmap as u64 {
            // Its own code, stack and registers it keeps: this is about others.
            (arguments[0], arguments[1]) = if meant { map } else { (arguments[0] | 1 << 36, arguments[1]) };
        } else if call == Call::Lend as u64 && meant {
            let iova = 0x5000_0000 + PAGE * random.below(64);
            arguments = [handle, iova, map.0, map.1.min(PAGE * (1 + random.below(8))), random.of(&[1, 2, 3]), 0];
        } else if call == Call::TakeBack as u64 && meant {
            arguments = [handle, loan.0, loan.1, 0, 0, 0];
        }
        (call, arguments)
    }

    fn remember(memory: &mut Memory, random: &mut Random, call: u64, arguments: [u64; 6], code: u64, value: u64) {
        if code != 0 {
            return;
        }
        if call == Call::Map as u64 {
            let place = memory.maps.iter().position(|(at, _)| *at == 0).unwrap_or(random.below(16) as usize);
            if let Some(place) = memory.maps.get_mut(place) {
                *place = (value, arguments[0]);
            }
        } else if call == Call::Unmap as u64 {
            memory.maps.iter_mut().filter(|(at, _)| *at == arguments[0]).for_each(|place| *place = (0, 0));
        } else if call == Call::Lend as u64 {
            let place = memory.loans.iter().position(|(at, _)| *at == 0).unwrap_or(random.below(16) as usize);
            if let Some(place) = memory.loans.get_mut(place) {
                *place = (arguments[1], arguments[3]);
            }
        } else if call == Call::TakeBack as u64 {
            memory.loans.iter_mut().filter(|(at, _)| *at == arguments[1]).for_each(|place| *place = (0, 0));
        } else if call == Call::MapMemory as u64 {
            let place = memory.maps.iter().position(|(at, _)| *at == 0).unwrap_or(random.below(16) as usize);
            // SAFETY: changes nothing.
            let (_, len) = unsafe { sys::raw(Call::MemorySize as u64, [arguments[0], 0, 0, 0, 0, 0]) };
            if let Some(place) = memory.maps.get_mut(place) {
                *place = (value, len);
            }
        } else if call == Call::OpenBuffer as u64 || call == Call::OpenEvent as u64 {
            let place = memory.handles.iter().position(Option::is_none).unwrap_or(random.below(8) as usize);
            if let Some(place) = memory.handles.get_mut(place) {
                *place = Some((value, 0, 0));
            }
        } else if call == Call::Close as u64 {
            let closed = |place: &&mut Option<_>| matches!(place, Some((handle, _, _)) if *handle == arguments[0]);
            memory.handles.iter_mut().filter(closed).for_each(|place| *place = None);
        } else if call == Call::MapBuffer as u64 {
            // SAFETY: changes nothing.
            let (_, len) = unsafe { sys::raw(Call::BufferSize as u64, [arguments[0], 0, 0, 0, 0, 0]) };
            for (handle, at, bytes) in memory.handles.iter_mut().flatten() {
                if *handle == arguments[0] {
                    (*at, *bytes) = (value, len);
                }
            }
        } else if call == Call::BeginAccess as u64 && arguments[1] & WRITE != 0 {
            let begun = memory.handles.iter().flatten().find(|(handle, _, _)| *handle == arguments[0]);
            if let Some((_, at, len)) = begun.filter(|(_, _, len)| *len != 0) {
                // SAFETY: the memory is there until the access ends, and nothing refers to it.
                let buffer = unsafe { Registers::of_memory(*at, *len) };
                buffer.write64(random.below(*len) & !7, random.next());
            }
        }
    }

    /// Has edu copy from anywhere to anywhere. (Never more than its buffer has: an emulator may not survive that.)
    fn provoke(registers: Registers, random: &mut Random, secret: u64, own: u64) {
        if registers.read64(0x98) & 1 != 0 {
            return;
        }
        let at = random.of(&[secret, own, 0x5000_0000, 0x5000_1000, 0x1000, 0x4000_0000]);
        let to_memory = random.below(2) == 0;
        let (source, destination) = if to_memory { (0x4_0000, at) } else { (at, 0x4_0000) };
        registers.write64(0x80, source);
        registers.write64(0x88, destination);
        registers.write64(0x90, 1 + random.below(64));
        registers.write64(0x98, 1 | u64::from(to_memory) << 1 | random.below(2) << 2);
    }
}
