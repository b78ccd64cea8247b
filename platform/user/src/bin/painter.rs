//! Draws into a picture that is on the screen, one frame each time that it is told to.
//!
//! Buffers: the picture, and a page with orders (`painting::Report`), in which it says at its end what it did. Events: the first is
//! raised for each frame; it raises the second when its access has begun. The exit code is 0 where everything was as it should be.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
user::entry!(program::main);

#[cfg(target_os = "none")]
mod program {
    use painting::{Account, KEPT, Painter, Report};
    use user::abi::{ErrorCode, PAGE, READ, WRITE};
    use user::say;
    use user::sys::{self, Buffer, Event};

    /// Nanoseconds for which it waits for others who have the picture.
    const PATIENCE: u64 = 30_000_000_000;
    /// Nanoseconds for which it waits to be told: a day. Who does not tell it any more ends it.
    const LONG: u64 = 24 * 60 * 60 * 1_000_000_000;

    /// What can be wrong, as an exit code.
    type Result<T> = core::result::Result<T, u64>;

    fn system(error: ErrorCode) -> u64 {
        say!("painter: {error:?}");
        1000 + error as u64
    }

    pub fn main(_: [u64; 3]) -> u64 {
        paint().map_or_else(|code| code, |()| 0)
    }

    fn paint() -> Result<()> {
        let mut picture = Buffer::open(0).map_err(system)?;
        let mut page = Buffer::open(1).map_err(system)?;
        let (go, at_it) = (Event::open(0).map_err(system)?, Event::open(1).map_err(system)?);
        picture.map(PAGE).map_err(system)?;
        page.map(PAGE).map_err(system)?;
        let orders = Report::orders(page.begin(READ, PATIENCE).map_err(system)?.bytes()).ok_or(2_u64)?;
        let mut painter = Painter::new(orders.layout, picture.len(), own()?).ok_or(3_u64)?;

        let mut account = Account::default();
        for number in 1..=orders.frames {
            go.wait(LONG).map_err(system)?;
            let mut patience = 0;
            let mut access = loop {
                match picture.begin(READ | WRITE, patience) {
                    Ok(access) => break access,
                    // Somebody has it: now it is worth counting.
                    Err(ErrorCode::TimedOut) if patience == 0 => patience = PATIENCE,
                    Err(error) => return Err(system(error)),
                }
            };
            if patience != 0 {
                account.waits += 1;
                account.waited += access.waited();
            }
            at_it.raise().map_err(system)?;
            account.bytes += painter.draw(access.bytes_mut(), number);
            access.end().map_err(system)?;
            account.frames += 1;
        }
        let mut access = page.begin(READ | WRITE, PATIENCE).map_err(system)?;
        Report::account(access.bytes_mut(), &account);
        access.end().map_err(system)
    }

    /// Memory of its own, for what it covers.
    fn own() -> Result<&'static mut [u8]> {
        let at = sys::map((KEPT as u64).next_multiple_of(PAGE), READ | WRITE).map_err(system)?;
        let start = core::ptr::with_exposed_provenance_mut(at as usize);
        // SAFETY: fresh memory, zeroed, of at least this length; it is never given back, and nobody else knows of it.
        Ok(unsafe { core::slice::from_raw_parts_mut(start, KEPT) })
    }
}
