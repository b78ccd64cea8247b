//! A painter that does wrong, for tests: it has what `painter` has.
//!
//! Arguments: what it does, and in which frame. 0: it begins to draw, and does not end. 1: it draws when it has ended. 2: it exits while
//! it draws. 3: it raises its event without an access, and does nothing else.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(program::main);

#[cfg(target_os = "none")]
mod program {
    use user::abi::{ErrorCode, PAGE, READ, WRITE};
    use user::sys::{Buffer, Event, Registers, exit};

    const LONG: u64 = 60_000_000_000;

    pub fn main([what, when, _]: [u64; 3]) -> u64 {
        draw(what, when).map_or_else(|error| 1000 + error as u64, |()| 0)
    }

    fn draw(what: u64, when: u64) -> Result<(), ErrorCode> {
        let mut picture = Buffer::open(0)?;
        let (go, at_it) = (Event::open(0)?, Event::open(1)?);
        let at = picture.map(PAGE)?;
        // SAFETY: looked at by volatile accesses; what happens where nothing is mapped is what the test is about.
        let out_of_turn = unsafe { Registers::of_memory(at, picture.len()) };
        for frame in 1.. {
            go.wait(LONG)?;
            if what == 3 && frame == when {
                at_it.raise()?;
                continue;
            }
            let mut access = picture.begin(READ | WRITE, LONG)?;
            at_it.raise()?;
            access.bytes_mut().fill(frame as u8);
            match what {
                0 if frame == when => loop {
                    core::hint::spin_loop();
                },
                2 if frame == when => exit(0),
                _ => access.end()?,
            }
            if what == 1 && frame == when {
                out_of_turn.write8(0, 1);
            }
        }
        Ok(())
    }
}
