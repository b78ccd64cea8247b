//! Named tests that run on the target.
//!
//! A test image declares one registry with [`registry!`], writes tests with [`ktest!`] anywhere in its modules, and calls
//! [`run`] once the machine is up. A test returns a result: `Err` fails it or skips it, and a panic fails it too, as the
//! host sees the panic, boots again and goes on after it.
//!
//! Each test's name also stands in the section `.ktest_names` of the ELF, which is never loaded, so that the host can list
//! the tests without booting. A record there is `NAME`, a zero byte, `MACHINE`, a newline.
//!
//! What is said on the console, a line each: `##ktest registered N` (tests in the image), `##ktest plan N` (tests that
//! will run), and for each test `##ktest start NAME` and one of `##ktest ok NAME`, `##ktest fail NAME MESSAGE` and
//! `##ktest skip NAME REASON`. Line ends in messages are written as `\n`, backslashes as `\\`.
//!
//! Which tests run is said on the kernel's command line: `ktest=NAME,NAME,...`, or `ktest=@MACHINE` for all tests of a
//! machine, and `ktest.from=N` to leave out the first N of those. The order is that of the registry, the same at every boot.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

mod outcome;
mod run;

pub use outcome::{Outcome, TestResult};
pub use run::{Selection, run};

#[doc(hidden)]
pub use linkme;

/// The machine of a test that names none.
pub const DEFAULT_MACHINE: &str = "default";

/// A test. `C` is what the image hands to its tests.
#[derive(Debug)]
pub struct Test<C: ?Sized + 'static> {
    /// The full name: crate, modules and function.
    pub name: &'static str,
    /// The machine it needs.
    pub machine: &'static str,
    /// The test itself.
    pub run: fn(&C) -> TestResult,
}

impl<C: ?Sized> Test<C> {
    /// Returns the name as reported: without the crate, which is the same for all.
    pub fn short_name(&self) -> &'static str {
        self.name.split_once("::").map_or(self.name, |(_, rest)| rest)
    }
}

/// Declares the image's registry `TESTS` and the type of what tests are handed, in the image's root module.
///
/// ```text
/// ktest::registry!(Context);
/// ```
#[macro_export]
macro_rules! registry {
    ($context:ty) => {
        /// What every test is handed.
        pub type KtestContext = $context;

        /// Every test of this image.
        #[$crate::linkme::distributed_slice]
        #[linkme(crate = $crate::linkme)]
        pub static TESTS: [$crate::Test<KtestContext>];
    };
}

/// Writes and registers a test.
///
/// ```text
/// ktest! {
///     fn reads_what_was_written(ctx) {
///         expect_eq!(ctx.read()?, 5);
///         Ok(())
///     }
/// }
/// ktest! {
///     fn every_core_has_its_own_stack(ctx) -> TestResult { Ok(()) }
///     machine: smp8
/// }
/// ```
// The registry and its context are the image's own: `crate` is meant, not `$crate`.
#[allow(clippy::crate_in_macro_def)]
#[macro_export]
macro_rules! ktest {
    ($(#[$attribute:meta])* fn $name:ident($context:pat_param) $(-> $result:ty)? $body:block) => {
        $crate::ktest! { $(#[$attribute])* fn $name($context) $body machine: default }
    };
    ($(#[$attribute:meta])* fn $name:ident($context:pat_param) $(-> $result:ty)? $body:block machine: $machine:ident) => {
        $(#[$attribute])*
        fn $name($context: &crate::KtestContext) -> $crate::TestResult $body

        const _: () = {
            #[$crate::linkme::distributed_slice(crate::TESTS)]
            #[linkme(crate = $crate::linkme)]
            static TEST: $crate::Test<crate::KtestContext> = $crate::Test {
                name: concat!(module_path!(), "::", stringify!($name)),
                machine: stringify!($machine),
                run: $name,
            };

            const RECORD: &str =
                concat!(module_path!(), "::", stringify!($name), "\0", stringify!($machine), "\n");

            // SAFETY: a section of its own that the linker script keeps out of the loaded image; any bytes may stand there.
            #[cfg(target_os = "none")]
            #[used]
            #[unsafe(link_section = ".ktest_names")]
            static NAME: [u8; RECORD.len()] = $crate::bytes_of(RECORD);

            #[cfg(not(target_os = "none"))]
            const _: [u8; RECORD.len()] = $crate::bytes_of(RECORD);
        };
    };
}

/// Copies a string into an array of exactly its length.
#[doc(hidden)]
pub const fn bytes_of<const N: usize>(text: &str) -> [u8; N] {
    let (from, mut to, mut at) = (text.as_bytes(), [0; N], 0);
    while at < N {
        to[at] = from[at];
        at += 1;
    }
    to
}

/// Fails the test unless the condition holds. A message may follow.
#[macro_export]
macro_rules! expect {
    ($condition:expr $(,)?) => {
        if !$condition {
            return Err($crate::Outcome::failed(format_args!(
                "{}:{}: expected {}", file!(), line!(), stringify!($condition)
            )));
        }
    };
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::Outcome::failed(format_args!(
                "{}:{}: expected {}: {}", file!(), line!(), stringify!($condition), format_args!($($message)+)
            )));
        }
    };
}

/// Fails the test unless both values are equal. A message may follow.
#[macro_export]
macro_rules! expect_eq {
    ($left:expr, $right:expr $(,)?) => {
        $crate::expect_eq!($left, $right, "{}", stringify!($left))
    };
    ($left:expr, $right:expr, $($message:tt)+) => {
        match (&$left, &$right) {
            (left, right) => {
                if !(*left == *right) {
                    return Err($crate::Outcome::failed(format_args!(
                        "{}:{}: {}: {:?}, expected {:?}", file!(), line!(), format_args!($($message)+), left, right
                    )));
                }
            }
        }
    };
}

/// Ends the test as one that cannot run on this machine, with the reason.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {
        return Err($crate::Outcome::skipped(format_args!($($reason)+)))
    };
}

#[cfg(test)]
registry!(str);

#[cfg(test)]
mod tests;
