//! What can go wrong in the driver.

use iommu::{AttachError, OutOfMemory, RevokeError};

/// Why the SMMU could not be started, or did not do what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The register window does not cover both pages.
    #[error("the SMMU's registers take {needed:#x} bytes, the window has {size:#x}")]
    WindowTooSmall {
        /// Bytes that the window has.
        size: usize,
        /// Bytes that are needed.
        needed: usize,
    },
    /// A feature that is missing, or that this driver does not drive.
    #[error("unsupported: {0}")]
    Unsupported(&'static str),
    /// A register did not take a value in time.
    #[error("the SMMU did not acknowledge {0} in time")]
    NoAcknowledge(&'static str),
    /// The command queue stayed full.
    #[error("the command queue did not drain in time")]
    QueueFull,
    /// CMD_SYNC was not consumed in time.
    #[error("CMD_SYNC did not complete in time")]
    SyncTimedOut,
    /// An earlier CMD_SYNC is still outstanding, or the SMMU has failed: it takes no more commands.
    #[error("the SMMU takes no more commands")]
    Dead,
    /// The SMMU refused one of the commands: what it should have done has not been done.
    #[error("the SMMU refused a command")]
    CommandRefused,
    /// Memory for a table or a queue could not be had.
    #[error("out of memory for the SMMU's tables")]
    OutOfMemory,
}

impl From<OutOfMemory> for Error {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl From<Error> for RevokeError {
    fn from(error: Error) -> Self {
        match error {
            Error::QueueFull | Error::SyncTimedOut | Error::NoAcknowledge(_) => Self::TimedOut,
            _ => Self::Dead,
        }
    }
}

impl From<Error> for AttachError {
    fn from(error: Error) -> Self {
        match error {
            Error::OutOfMemory => Self::OutOfMemory,
            Error::Unsupported(what) => Self::Unsupported(what),
            Error::QueueFull | Error::SyncTimedOut | Error::NoAcknowledge(_) => Self::TimedOut,
            _ => Self::Dead,
        }
    }
}
