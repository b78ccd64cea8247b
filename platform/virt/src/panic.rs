//! Last words: panics, exceptions that nothing expected, and memory that ran out.
//!
//! After the message comes one line `##pc 0xADDRESS` for each frame of the backtrace, innermost first, for the program that
//! started the machine to put names to. The exit status is 1.

use arch::exception::Unexpected;
use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::println;

/// One bit for each core that has begun its last words.
static ENDING: AtomicU64 = AtomicU64::new(0);

/// Makes exceptions that nothing expected end in last words.
pub(crate) fn init() {
    arch::exception::set_reporter(unexpected);
}

fn unexpected(exception: &Unexpected<'_>) -> ! {
    begin(exception);
    exception.backtrace(frame);
    arch::exit::exit(1)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    begin(&format_args!("panic on core {}: {info}", base::cpu::index()));
    arch::backtrace::here(frame);
    arch::exit::exit(1)
}

fn begin(message: &dyn fmt::Display) {
    let bit = 1 << base::cpu::index();
    if ENDING.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
        // A panic or a fault within the last words themselves: what was printed has to do.
        arch::exit::exit(1);
    }
    if !kernel::log::take_over() {
        // Another core ends the kernel, with the reason that came first.
        arch::exit::park();
    }
    arch::smp::stop_others();
    println!("\n{message}");
}

fn frame(address: u64) {
    println!("##pc {address:#x}");
}
