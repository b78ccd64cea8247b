//! What is the fakes' and what is the code's under test: for tests in which the n-th allocation fails.

use base::cpu;
use core::sync::atomic::{AtomicU32, Ordering};
use spin::Once;

static DEPTH: [AtomicU32; cpu::MAX_CPUS] = [const { AtomicU32::new(0) }; cpu::MAX_CPUS];
static FAILS: Once<fn() -> bool> = Once::new();

/// While it lives, what this thread allocates is for the fakes' own books, which hardware would not have.
pub struct Hardware(usize);

impl Hardware {
    /// Begins.
    pub fn enter() -> Self {
        let core = cpu::index();
        if let Some(depth) = DEPTH.get(core) {
            depth.fetch_add(1, Ordering::Relaxed);
        }
        Self(core)
    }

    /// Whether this thread is in the fakes.
    pub fn is_entered() -> bool {
        DEPTH.get(cpu::index()).is_some_and(|depth| depth.load(Ordering::Relaxed) != 0)
    }

    /// Has every allocation of DMA memory, of tables and of address spaces ask `fails` whether it fails. Once in a process.
    pub fn fail_when(fails: fn() -> bool) {
        FAILS.call_once(|| fails);
    }

    pub(super) fn fails() -> bool {
        FAILS.get().is_some_and(|fails| fails())
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        if let Some(depth) = DEPTH.get(self.0) {
            depth.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
