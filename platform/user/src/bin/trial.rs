//! A program that does one thing, well or badly: which one is its first argument.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(program::main);

#[cfg(target_os = "none")]
mod program {
    use core::arch::asm;
    use core::sync::atomic::{AtomicU64, Ordering};
    use user::abi::{ErrorCode, PAGE, READ, WRITE};
    use user::{say, sys};

    static DATA: AtomicU64 = AtomicU64::new(0x1234);
    static ZEROED: AtomicU64 = AtomicU64::new(0);

    pub fn main([what, value, other]: [u64; 3]) -> u64 {
        match what {
            0 => value,
            1 => memory(),
            2 => load(value),
            3 => store(value),
            4 => loop {
                DATA.fetch_add(1, Ordering::Relaxed);
            },
            5 => jump(value),
            6 => recurse(value, &[0; 64]),
            7 => panic!("as asked: {value}"),
            8 => registers(value, other),
            9 => {
                sys::sleep(value);
                0
            }
            10 => undefined(),
            11 => trapped(value),
            12 => data_as_code(),
            13 => leftovers(),
            14 => shared::there_and_back(value),
            15 => shared::out_of_turn(value, other),
            16 => shared::held(value),
            17 => shared::aligned(value, other),
            18 => shared::watched(value, other),
            _ => u64::MAX,
        }
    }

    /// What the ELF says about data, and what `map` and `unmap` promise.
    fn memory() -> u64 {
        if DATA.load(Ordering::Relaxed) != 0x1234 || ZEROED.load(Ordering::Relaxed) != 0 {
            return 1;
        }
        DATA.store(1, Ordering::Relaxed);
        ZEROED.store(1, Ordering::Relaxed);
        say!("trial: {} words as they should be", 2);
        let Ok(at) = sys::map(3 * 4096, READ | WRITE) else { return 2 };
        // SAFETY: just mapped.
        let memory = unsafe { sys::Registers::of_memory(at, 3 * 4096) };
        for offset in (0..3 * 4096).step_by(8) {
            if memory.read64(offset) != 0 {
                return 3;
            }
            memory.write64(offset, offset);
        }
        // SAFETY: nothing refers to it.
        let part = unsafe { sys::unmap(at, 4096) };
        // SAFETY: as above.
        let whole = unsafe { sys::unmap(at, 3 * 4096) };
        // SAFETY: as above.
        let again = unsafe { sys::unmap(at, 3 * 4096) };
        if (part, whole, again) != (Err(ErrorCode::NotMapped), Ok(()), Err(ErrorCode::NotMapped)) {
            return 4;
        }
        let before = sys::time();
        sys::sleep(1_000_000);
        if sys::time() < before + 1_000_000 {
            return 5;
        }
        // Through a TLB that has not forgotten this would be read.
        load(at)
    }

    fn load(address: u64) -> u64 {
        let value;
        // SAFETY: whatever is there, it changes nothing.
        unsafe { asm!("ldr {}, [{}]", out(reg) value, in(reg) address, options(nostack, readonly)) };
        value
    }

    fn store(address: u64) -> u64 {
        // SAFETY: the caller wants to know what becomes of it.
        unsafe { asm!("str {0}, [{0}]", in(reg) address, options(nostack)) };
        0
    }

    fn jump(address: u64) -> u64 {
        // SAFETY: as above: it does not come back.
        unsafe { asm!("br {}", in(reg) address, options(noreturn)) }
    }

    #[inline(never)]
    fn recurse(left: u64, before: &[u64; 64]) -> u64 {
        let here = core::hint::black_box([before[1] + left; 64]);
        if left == 0 { here[0] } else { recurse(left - 1, &here) + here[63] }
    }

    fn undefined() -> u64 {
        // SAFETY: never executed.
        unsafe { asm!("udf #7", options(noreturn)) }
    }

    /// Instructions that the kernel keeps for itself.
    fn trapped(which: u64) -> u64 {
        macro_rules! run {
            ($($asm:tt)*) => {
                // SAFETY: each but the last ends the program, and that changes nothing but x0.
                unsafe { asm!($($asm)*) }
            };
        }
        match which {
            0 => run!("mrs {}, ttbr0_el1", out(reg) _),
            1 => run!("wfi"),
            2 => run!("msr daifset, #15"),
            3 => run!("mrs {}, cntvct_el0", out(reg) _),
            4 => run!("brk #3"),
            5 => run!("hvc #0"),
            6 => run!("mrs {}, pmccntr_el0", out(reg) _),
            7 => run!("tlbi vmalle1"),
            8 => run!("msr vbar_el1, xzr"),
            9 => run!("mrs {}, mdccsr_el0", out(reg) _),
            10 => run!("dc civac, {}", in(reg) &raw const ZEROED),
            // PACGA x0, x1, x2: above EL0 only EL2 and EL3 can trap it.
            _ => run!(".inst 0x9ac23020", out("x0") _),
        }
        0
    }

    fn data_as_code() -> u64 {
        let code: [u32; 2] = core::hint::black_box([0xd65f_03c0, 0xd65f_03c0]);
        jump(code.as_ptr().addr() as u64)
    }

    /// Buffers that others have too, each the first that was put by.
    mod shared {
        use super::{PAGE, READ, WRITE, load, store};
        use user::sys::{self, Access, Buffer, Event};

        /// As long as it takes.
        const EVER: u64 = u64::MAX;

        /// The word at `offset`.
        fn word(seed: u64, offset: u64) -> u64 {
            (seed + offset).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        }

        fn fill(access: &mut Access<'_>, seed: u64) {
            for (place, offset) in access.bytes_mut().chunks_exact_mut(8).zip((0..).step_by(8)) {
                place.copy_from_slice(&word(seed, offset).to_le_bytes());
            }
        }

        fn holds(access: &Access<'_>, seed: u64) -> bool {
            access
                .bytes()
                .chunks_exact(8)
                .zip((0..).step_by(8))
                .all(|(place, offset)| place == word(seed, offset).to_le_bytes())
        }

        /// Draws, says so, and waits until the next picture is to be seen; so many times. Events 0 and 1 are asked for and given.
        pub fn there_and_back(times: u64) -> u64 {
            let (Ok(mut buffer), Ok(go), Ok(done)) = (Buffer::open(0), Event::open(0), Event::open(1)) else {
                return 1;
            };
            if buffer.map(PAGE).is_err() {
                return 2;
            }
            for turn in 0..times {
                let Ok(mut access) = buffer.begin(READ | WRITE, EVER) else { return 3 };
                fill(&mut access, turn);
                drop(access);
                if done.raise().is_err() || go.wait(EVER) != Ok(1) {
                    return 4;
                }
                let Ok(access) = buffer.begin(READ, EVER) else { return 5 };
                if !holds(&access, turn + 1000) {
                    return 6;
                }
                if access.end().is_err() {
                    return 7;
                }
            }
            0
        }

        /// Touches the buffer when it must not, at `offset`: 0 before an access, 1 after one, 2 writing in one that reads, 3 the first byte
        /// after it.
        pub fn out_of_turn(when: u64, offset: u64) -> u64 {
            let Ok(mut buffer) = Buffer::open(0) else { return 1 };
            let Ok(at) = buffer.map(PAGE) else { return 2 };
            if when == 0 {
                return load(at + offset);
            }
            let len = buffer.len();
            let Ok(mut access) = buffer.begin(if when == 2 { READ } else { READ | WRITE }, 0) else { return 3 };
            fill(&mut access, 5);
            match when {
                1 => {
                    drop(access);
                    load(at + offset)
                }
                2 => store(at + offset),
                _ => load(at + len),
            }
        }

        /// Begins an access and keeps it: 0 for as long as it runs, 1 until event 0, after which it ends the access; 2 does not even begin.
        /// Event 1 says when.
        pub fn held(how: u64) -> u64 {
            let (Ok(mut buffer), Ok(go), Ok(done)) = (Buffer::open(0), Event::open(0), Event::open(1)) else {
                return 1;
            };
            if buffer.map(PAGE).is_err() {
                return 2;
            }
            if how == 2 && done.raise().is_err() {
                return 3;
            }
            let Ok(mut access) = buffer.begin(READ | WRITE, EVER) else { return 4 };
            if how == 2 {
                return 5;
            }
            fill(&mut access, 6);
            if done.raise().is_err() || go.wait(EVER).is_err() {
                return 6;
            }
            u64::from(access.end().is_err())
        }

        /// Ends within an access to the buffer at a multiple of `alignment`, behind so many places for it at the next free page. What was
        /// there is looked at and replaced: each word by its complement.
        pub fn aligned(alignment: u64, before: u64) -> u64 {
            let mut others: [Option<Buffer>; 4] = [const { None }; 4];
            for place in others.iter_mut().take(before as usize) {
                let Ok(mut buffer) = Buffer::open(0) else { return 1 };
                if buffer.map(PAGE).is_err() {
                    return 2;
                }
                *place = Some(buffer);
            }
            let Ok(mut buffer) = Buffer::open(0) else { return 3 };
            let Ok(at) = buffer.map(alignment) else { return 4 };
            let Ok(mut access) = buffer.begin(READ | WRITE, EVER) else { return 5 };
            for place in access.bytes_mut().chunks_exact_mut(8) {
                place.iter_mut().for_each(|byte| *byte = !*byte);
            }
            sys::exit(at)
        }

        /// Looks at memory that a device and the kernel have too, for the byte `value` at the beginning and at the end, and writes the next
        /// one to the places in between. Event 0 says that it is there, event 1 that it was seen.
        pub fn watched(value: u64, rights: u64) -> u64 {
            let (Ok(go), Ok(done)) = (Event::open(0), Event::open(1)) else { return 1 };
            let Ok(memory) = sys::map_memory(0, rights) else { return 2 };
            if sys::map_memory(0, rights | 4).is_ok() || done.raise().is_err() || go.wait(EVER).is_err() {
                return 3;
            }
            sys::barrier();
            let len = memory.len();
            if memory.read8(0) != value as u8 || memory.read8(len - 1) != value as u8 {
                return 4;
            }
            for offset in (PAGE..len - PAGE).step_by(8) {
                memory.write64(offset, u64::from_le_bytes([value as u8 + 1; 8]));
            }
            sys::barrier();
            u64::from(done.raise().is_err())
        }
    }

    /// Fills SIMD and thread registers with `value`, asks the kernel for the time, and looks again; for so many `nanoseconds`.
    fn registers(value: u64, nanoseconds: u64) -> u64 {
        let end = sys::time() + nanoseconds;
        // SAFETY: changes a register that nothing here uses.
        unsafe { asm!("msr tpidr_el0, {}", in(reg) value, options(nostack, nomem)) };
        loop {
            let (seen, thread, now): (u64, u64, u64);
            // SAFETY: a system call that changes x0 and x1, and registers that the compiler is told of.
            unsafe {
                asm!(
                    "dup v0.2d, {value}",
                    "dup v8.2d, {value}",
                    "dup v31.2d, {value}",
                    "svc #0",
                    "and v0.16b, v0.16b, v8.16b",
                    "and v0.16b, v0.16b, v31.16b",
                    "mov {seen}, v0.d[1]",
                    "mrs {thread}, tpidr_el0",
                    value = in(reg) value,
                    seen = out(reg) seen,
                    thread = out(reg) thread,
                    in("x8") user::abi::Call::Time as u64,
                    out("x0") _,
                    out("x1") now,
                    out("v0") _,
                    out("v8") _,
                    out("v31") _,
                    options(nostack)
                );
            }
            if seen != value || thread != value {
                return 1;
            }
            if now > end {
                return 0;
            }
        }
    }

    /// Whether registers hold what others have left there: not 0 if they do. (The compiler's code may use v0 to v7.)
    fn leftovers() -> u64 {
        let (thread, read_only, low, high): (u64, u64, u64, u64);
        // SAFETY: reads registers, and changes one.
        unsafe {
            asm!(
                "mrs {thread}, tpidr_el0",
                "mrs {read_only}, tpidrro_el0",
                "movi v0.2d, #0",
                ".irp n, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
                "orr v0.16b, v0.16b, v\\n\\().16b",
                ".endr",
                "mov {low}, v0.d[0]",
                "mov {high}, v0.d[1]",
                thread = out(reg) thread,
                read_only = out(reg) read_only,
                low = out(reg) low,
                high = out(reg) high,
                out("v0") _,
                options(nostack)
            );
        }
        thread | read_only | low | high
    }
}
