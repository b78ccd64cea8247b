//! Text for people: the console, and the `log` crate's backend on it.
//!
//! The terminal is the user interface: an `info` line is printed as it is; any other level carries the time and its name.
//!
//! # Locking
//!
//! One [`IrqMutex`] keeps lines whole. It is a leaf: nothing else is locked while it is held, but the console's own waiting for
//! room. A core that faults while it prints finds itself as the holder and prints on. After [`take_over`] only the core that
//! panics prints, and waits for nobody.

use base::{Deadline, Instant, IrqMutex, cpu};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicUsize, Ordering};
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Once;

/// Somewhere to print. Called from handlers and with locks held: it neither allocates nor sleeps.
pub trait Console: Sync {
    /// Prints `text`; a newline character ends a line.
    fn write(&self, text: &str);
}

static CONSOLE: Once<&'static dyn Console> = Once::new();
static EARLY: Once<&'static dyn Console> = Once::new();
static LINE: IrqMutex<()> = IrqMutex::new(());

const NOBODY: usize = usize::MAX;
/// The core that holds `LINE`.
static HOLDER: AtomicUsize = AtomicUsize::new(NOBODY);
/// The core that took over.
static OWNER: AtomicUsize = AtomicUsize::new(NOBODY);

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let name = match record.level() {
            Level::Info => return print(format_args!("{}\n", record.args())),
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Debug => "debug",
            Level::Trace => "trace",
        };
        let micros = Instant::now().as_nanos() / 1000;
        print(format_args!("[{:3}.{:06}] {name}: {}\n", micros / 1_000_000, micros % 1_000_000, record.args()));
    }

    fn flush(&self) {}
}

/// Makes `console` the place where everything is printed, with `log` lines up to `level`. Only the first call counts.
pub fn init(console: &'static dyn Console, level: LevelFilter) {
    CONSOLE.call_once(|| console);
    // Fails only where a logger is set already: by an earlier call.
    let _ = log::set_logger(&Logger);
    log::set_max_level(level);
}

/// Makes `console` the place where everything is printed until [`init`] names the real one: for a failure before the machine is
/// known.
pub fn init_early(console: &'static dyn Console) {
    EARLY.call_once(|| console);
}

struct Printer(&'static dyn Console);

impl Write for Printer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text);
        Ok(())
    }
}

/// Prints `text` in one piece. Before [`init_early`] and [`init`] it goes nowhere.
pub fn print(text: fmt::Arguments<'_>) {
    let Some(console) = CONSOLE.get().or_else(|| EARLY.get()) else {
        return;
    };
    let mut printer = Printer(*console);
    let me = cpu::index();
    // A console cannot fail, only a `Display` that says it did: its text is then cut short, and nobody is there to be told.
    match OWNER.load(Ordering::Acquire) {
        NOBODY if HOLDER.load(Ordering::Acquire) == me => _ = printer.write_fmt(text),
        NOBODY => {
            let _line = LINE.lock();
            HOLDER.store(me, Ordering::Release);
            _ = printer.write_fmt(text);
            HOLDER.store(NOBODY, Ordering::Release);
        }
        owner if owner == me => _ = printer.write_fmt(text),
        _ => {}
    }
}

/// Gives the console to this core alone: from now on its text is printed without waiting, and that of others is dropped. For the
/// last words of a kernel. Returns false if another core was first.
pub fn take_over() -> bool {
    let me = cpu::index();
    match OWNER.compare_exchange(NOBODY, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(owner) => return owner == me,
    }
    if HOLDER.load(Ordering::Acquire) != me {
        // Another core may be in the middle of a line: let it finish, if it still can.
        let deadline = Deadline::after_millis(20);
        while LINE.try_lock().is_none() && !deadline.has_passed() {
            core::hint::spin_loop();
        }
    }
    true
}

/// Prints to the console, without a newline at the end.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::log::print(core::format_args!($($text)*)) };
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($text:tt)*) => { $crate::log::print(core::format_args!("{}\n", core::format_args!($($text)*))) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::{String, ToString};
    use std::sync::Mutex;

    struct Paper(Mutex<String>);

    impl Console for Paper {
        fn write(&self, text: &str) {
            self.0.lock().unwrap().push_str(text);
        }
    }

    /// Prints while it is being printed: as a fault report in the middle of a line does.
    struct Nested;

    impl fmt::Display for Nested {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            print(format_args!("<inner>"));
            f.write_str("outer")
        }
    }

    #[test]
    fn levels_are_told_apart_and_a_core_may_print_while_it_prints() {
        static PAPER: Paper = Paper(Mutex::new(String::new()));
        print(format_args!("lost"));
        init(&PAPER, LevelFilter::Info);
        log::info!("memory    {} MiB", 128);
        log::debug!("not shown");
        log::warn!("odd");
        print(format_args!("{Nested}\n"));
        let text = PAPER.0.lock().unwrap().to_string();
        let lines: std::vec::Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "memory    128 MiB");
        assert!(lines[1].starts_with('[') && lines[1].ends_with("] warning: odd"), "{}", lines[1]);
        assert_eq!(lines[2], "<inner>outer");
        // After a take-over nobody else's text appears, and the owner's does although the line is held.
        let held = LINE.lock();
        assert!(take_over());
        print(format_args!("last words\n"));
        std::thread::spawn(|| print(format_args!("noise\n"))).join().unwrap();
        drop(held);
        assert!(PAPER.0.lock().unwrap().ends_with("<inner>outer\nlast words\n"));
    }
}
