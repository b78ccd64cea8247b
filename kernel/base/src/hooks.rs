//! The seam between this crate and the processor.
//!
//! On the target the hooks are `extern "Rust"` symbols, resolved when the image is linked and inlined by LTO: a lock costs
//! no indirect call. On a host they are implemented here.

use crate::words::Chunk;

/// What a processor must offer. Implemented once per image, by the `arch` crate of the target.
///
/// # Safety
///
/// - `irq_save` masks interrupts on the calling core before it returns, and orders no earlier access after itself;
///   `irq_restore` brings back exactly the state that the matching `irq_save` returned.
/// - `cpu_index` is stable for as long as the caller does not migrate, below [`crate::cpu::MAX_CPUS`], and different on
///   every core.
/// - The barriers order at least what their documentation in [`crate::barrier`] says.
/// - The `words` methods access each word they are given once, as a relaxed atomic load or store, and nothing else, and return
///   what their documentation says.
pub unsafe trait Hooks {
    /// Masks interrupts on this core and returns the earlier state.
    fn irq_save() -> usize;
    /// Restores the state returned by [`Hooks::irq_save`].
    fn irq_restore(state: usize);
    /// The logical index of this core, counted from 0 (the boot core).
    fn cpu_index() -> usize;
    /// Nanoseconds since some moment before the kernel's first instruction; never goes back, the same on all cores.
    fn now() -> u64;
    /// The clock's own count at about this moment: not ordered with what is around it, and for nothing but [`Hooks::stamped`].
    fn stamp() -> u64;
    /// [`Hooks::now`] at the moment of a [`Hooks::stamp`].
    fn stamped(stamp: u64) -> u64;
    /// Sleeps until an interrupt is pending for this core or `deadline` (in [`Hooks::now`]'s nanoseconds) has passed. Called
    /// with interrupts masked; must return for an interrupt that is pending although masked. May return early.
    fn sleep(deadline: u64);
    /// Interrupts every core whose bit is set in `cores`, so that [`Hooks::sleep`] returns there.
    fn kick(cores: u64);
    /// See [`crate::barrier::publish`].
    fn barrier_publish();
    /// See [`crate::barrier::device_write`].
    fn barrier_device_write();
    /// See [`crate::barrier::device_read`].
    fn barrier_device_read();
    /// The disjunction of all words of `chunks`: 0 of none.
    fn words_any(chunks: &[Chunk]) -> u64;
    /// The conjunction of all words of `chunks`: all ones of none.
    fn words_all(chunks: &[Chunk]) -> u64;
    /// Stores `first` to the first word of `chunks` and to each after it `step` more (wrapping).
    fn words_count_up(chunks: &[Chunk], first: u64, step: u64);
    /// Stores 0 to all words of `chunks`.
    fn words_clear(chunks: &[Chunk]);
}

/// Makes `$hooks`, a type that implements [`Hooks`], the processor of this image. Exactly one crate of an image does so.
#[macro_export]
macro_rules! provide_hooks {
    ($hooks:ty) => {
        $crate::provide_hooks!(@fn $hooks, __sluice_irq_save, irq_save, (), usize);
        $crate::provide_hooks!(@fn $hooks, __sluice_irq_restore, irq_restore, (state: usize), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_cpu_index, cpu_index, (), usize);
        $crate::provide_hooks!(@fn $hooks, __sluice_now, now, (), u64);
        $crate::provide_hooks!(@fn $hooks, __sluice_stamp, stamp, (), u64);
        $crate::provide_hooks!(@fn $hooks, __sluice_stamped, stamped, (stamp: u64), u64);
        $crate::provide_hooks!(@fn $hooks, __sluice_sleep, sleep, (deadline: u64), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_kick, kick, (cores: u64), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_barrier_publish, barrier_publish, (), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_barrier_device_write, barrier_device_write, (), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_barrier_device_read, barrier_device_read, (), ());
        $crate::provide_hooks!(@fn $hooks, __sluice_words_any, words_any, (chunks: &[$crate::words::Chunk]), u64);
        $crate::provide_hooks!(@fn $hooks, __sluice_words_all, words_all, (chunks: &[$crate::words::Chunk]), u64);
        $crate::provide_hooks!(
            @fn $hooks, __sluice_words_count_up, words_count_up,
            (chunks: &[$crate::words::Chunk], first: u64, step: u64), ()
        );
        $crate::provide_hooks!(@fn $hooks, __sluice_words_clear, words_clear, (chunks: &[$crate::words::Chunk]), ());
    };
    (@fn $hooks:ty, $symbol:ident, $method:ident, ($($arg:ident: $type:ty),*), $ret:ty) => {
        // SAFETY: the symbol is declared with this signature in `base::hooks` and defined only here.
        #[unsafe(no_mangle)]
        #[inline]
        fn $symbol($($arg: $type),*) -> $ret {
            <$hooks as $crate::Hooks>::$method($($arg),*)
        }
    };
}

/// The hooks as plain functions. Not for use outside this crate.
#[doc(hidden)]
#[cfg(target_os = "none")]
pub mod __private {
    use super::Chunk;

    macro_rules! forward {
        ($($name:ident => $symbol:ident($($arg:ident: $type:ty),*) -> $ret:ty;)*) => {
            unsafe extern "Rust" {
                $(fn $symbol($($arg: $type),*) -> $ret;)*
            }
            $(
                #[inline(always)]
                #[allow(missing_docs)]
                pub fn $name($($arg: $type),*) -> $ret {
                    // SAFETY: `provide_hooks!` defines the symbol with this very signature, from an implementation of the
                    // unsafe trait `Hooks`; the functions have no precondition of their own.
                    unsafe { $symbol($($arg),*) }
                }
            )*
        };
    }
    forward! {
        irq_save => __sluice_irq_save() -> usize;
        irq_restore => __sluice_irq_restore(state: usize) -> ();
        cpu_index => __sluice_cpu_index() -> usize;
        now => __sluice_now() -> u64;
        stamp => __sluice_stamp() -> u64;
        stamped => __sluice_stamped(stamp: u64) -> u64;
        sleep => __sluice_sleep(deadline: u64) -> ();
        kick => __sluice_kick(cores: u64) -> ();
        barrier_publish => __sluice_barrier_publish() -> ();
        barrier_device_write => __sluice_barrier_device_write() -> ();
        barrier_device_read => __sluice_barrier_device_read() -> ();
        words_any => __sluice_words_any(chunks: &[Chunk]) -> u64;
        words_all => __sluice_words_all(chunks: &[Chunk]) -> u64;
        words_count_up => __sluice_words_count_up(chunks: &[Chunk], first: u64, step: u64) -> ();
        words_clear => __sluice_words_clear(chunks: &[Chunk]) -> ();
    }
}

/// The hooks of a host: threads for cores, the host's clock.
#[doc(hidden)]
#[cfg(not(target_os = "none"))]
#[allow(missing_docs)]
pub mod __private {
    use super::Chunk;
    use core::sync::atomic::{AtomicU64, Ordering, fence};
    use core::time::Duration;
    use std::sync::OnceLock;
    use std::time::Instant;

    /// One bit for each index that a living thread has.
    static TAKEN: AtomicU64 = AtomicU64::new(0);

    /// A thread's index, given back when the thread ends.
    struct Index(usize);

    impl Index {
        /// Takes the lowest free index. A waiting core is known by its index, so two threads with the same one may miss each
        /// other's wake-ups until their deadlines: that happens only among more than [`crate::cpu::MAX_CPUS`] threads at once.
        fn take() -> Self {
            let lowest = |taken: u64| Some(taken | taken.wrapping_add(1));
            let taken = TAKEN.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lowest).unwrap_or(u64::MAX);
            Self(taken.trailing_ones() as usize % crate::cpu::MAX_CPUS)
        }
    }

    impl Drop for Index {
        fn drop(&mut self) {
            TAKEN.fetch_and(!(1 << self.0), Ordering::SeqCst);
        }
    }

    std::thread_local! {
        static INDEX: Index = Index::take();
    }

    pub fn irq_save() -> usize {
        0
    }
    pub fn irq_restore(_state: usize) {}
    pub fn cpu_index() -> usize {
        // While a thread ends, it may be without one.
        INDEX.try_with(|index| index.0).unwrap_or(0)
    }
    pub fn now() -> u64 {
        static START: OnceLock<Instant> = OnceLock::new();
        u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
    pub fn stamp() -> u64 {
        now()
    }
    pub fn stamped(stamp: u64) -> u64 {
        stamp
    }
    pub fn sleep(deadline: u64) {
        let left = deadline.saturating_sub(now());
        std::thread::sleep(Duration::from_nanos(left.min(50_000)));
    }
    pub fn kick(_cores: u64) {}
    pub fn barrier_publish() {
        fence(Ordering::SeqCst);
    }
    pub fn barrier_device_write() {
        fence(Ordering::SeqCst);
    }
    pub fn barrier_device_read() {
        fence(Ordering::SeqCst);
    }
    pub fn words_any(chunks: &[Chunk]) -> u64 {
        chunks.as_flattened().iter().fold(0, |all, word| all | word.load(Ordering::Relaxed))
    }
    pub fn words_all(chunks: &[Chunk]) -> u64 {
        chunks.as_flattened().iter().fold(u64::MAX, |all, word| all & word.load(Ordering::Relaxed))
    }
    pub fn words_count_up(chunks: &[Chunk], first: u64, step: u64) {
        chunks.as_flattened().iter().fold(first, |value, word| {
            word.store(value, Ordering::Relaxed);
            value.wrapping_add(step)
        });
    }
    pub fn words_clear(chunks: &[Chunk]) {
        chunks.as_flattened().iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }
}
