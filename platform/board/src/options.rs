//! What the command line says.

use crate::Error;
use crate::strictness::Strict;
use alloc::string::{String, ToString};
use kernel::cmdline::CommandLine;
use kernel::demo::DEFAULT_PICTURE;
use kernel::faults::DEFAULT_BUDGET;

/// The options of the main job.
#[derive(Clone, Debug)]
pub struct Options {
    /// The picture's path on the disk.
    pub picture: String,
    /// Wait for the operator while the picture is on the screen.
    pub wait: bool,
    /// Run devices that no IOMMU translates for.
    pub allow_unprotected: bool,
    /// Records of faults that a device may cause before it is contained; 0 for any number.
    pub fault_budget: u64,
    /// Which devices' mappings end at once, and which may lapse.
    pub strict: Strict,
}

/// Keys that something in the image reads.
const KNOWN: &[&str] = &["picture", "screen.wait", "iommu.off", "iommu.strict", "fault.budget", "exit", "log"];

impl Options {
    /// Reads the command line.
    ///
    /// # Errors
    ///
    /// Values that cannot be understood, by key. Unknown keys are a warning.
    pub fn parse(line: &str) -> Result<Self, Error> {
        let line = CommandLine::parse(line)?;
        for key in line.unknown(KNOWN) {
            log::warn!("command line: unknown key \"{key}\"");
        }
        Ok(Self {
            picture: line.text("picture").unwrap_or(DEFAULT_PICTURE).to_string(),
            wait: line.flag("screen.wait")?,
            allow_unprotected: line.choice("iommu.off", &["forbid", "allow"])? == Some(1),
            fault_budget: line.number("fault.budget", u64::MAX)?.unwrap_or(DEFAULT_BUDGET),
            strict: Strict::parse(&line)?,
        })
    }
}
