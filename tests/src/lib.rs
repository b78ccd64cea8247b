//! Every test by name.
//!
//! Host suites are ordinary tests in `tests/`. The on-target suite, `tests/on_target.rs`, is a harness of its own: it lists
//! the tests of the test image from the ELF ([`names`]), boots the image once for each [machine](profile) whose tests are
//! selected, and turns what the image reports into one result for each test ([`boot`]).
//!
//! Environment: `SLUICE_QEMU` names the `qemu-system-aarch64` to use instead of the one in `PATH`; `SLUICE_TEST_TIMEOUT`
//! is how many seconds one on-target test may take (60); `SLUICE_UBOOT` names the U-Boot of the topology `u-boot`, if not Debian's.
#![forbid(unsafe_code)]

pub mod boot;
mod carried;
mod firmware_regions;
pub mod misuse;
pub mod names;
mod pools;
pub mod profile;
pub mod restricted;
pub mod runner;

use anyhow::{Context, Result};
use qemu::emulator::Emulator;
use qemu::progress::Progress;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// Returns the QEMU to test with; it is installed if it is missing and this process may. An error says what to type.
pub fn emulator() -> Result<Emulator, String> {
    static FOUND: OnceLock<Result<Emulator, String>> = OnceLock::new();
    let find = || {
        let given = std::env::var_os("SLUICE_QEMU").filter(|path| !path.is_empty()).map(PathBuf::from);
        qemu::setup::emulator(given.as_deref(), false, false, &mut Progress::silent())
            .map_err(|error| format!("{error:#}"))
    };
    FOUND.get_or_init(find).clone()
}

/// Returns how long one on-target test may take.
pub fn test_timeout() -> Result<Duration> {
    match std::env::var("SLUICE_TEST_TIMEOUT") {
        Ok(text) => Ok(Duration::from_secs(text.parse().context("SLUICE_TEST_TIMEOUT must be a number of seconds")?)),
        Err(_) => Ok(Duration::from_secs(60)),
    }
}
