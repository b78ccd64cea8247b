//! What can be wrong.

use crate::ElfError;
use abi::ErrorCode;
use alloc::collections::TryReserveError;
use iommu::{IovaError, IovaRange, MapError, RevokeError};

/// Why something was not done for a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such call.
    #[error("there is no system call {0}")]
    NoSuchCall(u64),
    /// The range is not the process's, or not with these rights.
    #[error("the {len} bytes at {address:#x} are not the process's, or not with the rights that are needed")]
    BadAddress {
        /// Where.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// No such length here.
    #[error("a length of {0:#x} bytes")]
    BadLength(u64),
    /// Not the beginning of a page, or no alignment.
    #[error("{0:#x} is not aligned to a page, or no alignment")]
    Misaligned(u64),
    /// No such rights, or not for this.
    #[error("rights {0:#x}")]
    BadRights(u64),
    /// The process has no such handle.
    #[error("handle {0:#x} is not the process's")]
    BadHandle(u64),
    /// Something is there.
    #[error("something is at {0} already")]
    Overlap(IovaRange),
    /// Set aside for the device.
    #[error("{0} is set aside")]
    Reserved(IovaRange),
    /// The tables or the device cannot express it.
    #[error("{0} is out of reach")]
    OutOfReach(IovaRange),
    /// Nothing, or something else, is there.
    #[error("what is at {0} is not that")]
    NotMapped(IovaRange),
    /// Lent, or in use.
    #[error("it is in use")]
    Busy,
    /// The machine has no memory for it.
    #[error("out of memory")]
    OutOfMemory,
    /// The process has as much as it may have.
    #[error("the process has as many {0} as it may have")]
    Quota(&'static str),
    /// No such device, BAR or vector.
    #[error("there is no such {0}")]
    NoSuchDevice(&'static str),
    /// Nothing of this kind has this number.
    #[error("nothing was put by for the process under number {0}")]
    NotPutBy(u64),
    /// Registers that cannot be had without something else.
    #[error("BAR {bar} cannot be given to a process: {why}")]
    Window {
        /// Which.
        bar: u8,
        /// Why not.
        why: &'static str,
    },
    /// The device or the machine cannot do that.
    #[error("{0} is not possible here")]
    Unsupported(&'static str),
    /// The time is over.
    #[error("timed out")]
    TimedOut,
    /// A program that cannot be loaded.
    #[error("the program cannot be loaded: {0}")]
    Elf(#[from] ElfError),
    /// The tables did not take it.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The tables do not let go of it.
    #[error(transparent)]
    Revoke(RevokeError),
    /// The DMA-API refused.
    #[error(transparent)]
    Dma(dma::Error),
    /// The device did not do what it was told.
    #[error("the device did not do what it was told")]
    Device,
}

impl Error {
    /// What the process is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoSuchCall(_) => ErrorCode::NoSuchCall,
            Self::BadAddress { .. } => ErrorCode::BadAddress,
            Self::BadLength(_) => ErrorCode::BadLength,
            Self::Misaligned(_) => ErrorCode::Misaligned,
            Self::BadRights(_) => ErrorCode::BadRights,
            Self::BadHandle(_) => ErrorCode::BadHandle,
            Self::Overlap(_) => ErrorCode::Overlap,
            Self::Reserved(_) => ErrorCode::Reserved,
            Self::OutOfReach(_) => ErrorCode::OutOfReach,
            Self::NotMapped(_) => ErrorCode::NotMapped,
            Self::Busy => ErrorCode::Busy,
            Self::OutOfMemory => ErrorCode::OutOfMemory,
            Self::Quota(_) => ErrorCode::Quota,
            Self::NoSuchDevice(_) => ErrorCode::NoSuchDevice,
            Self::NotPutBy(_) => ErrorCode::NotPutBy,
            Self::Window { .. } | Self::Unsupported(_) => ErrorCode::Unsupported,
            Self::TimedOut => ErrorCode::TimedOut,
            Self::Elf(_) | Self::Device | Self::Revoke(_) => ErrorCode::Failed,
            Self::Map(error) => map_code(error),
            Self::Dma(error) => match error {
                dma::Error::OutOfMemory => ErrorCode::OutOfMemory,
                // It was waited for.
                dma::Error::Busy { .. } => ErrorCode::TimedOut,
                dma::Error::NotForCpu(_) => ErrorCode::Unsupported,
                dma::Error::Map(error) => map_code(error),
                _ => ErrorCode::Failed,
            },
        }
    }
}

fn map_code(error: &MapError) -> ErrorCode {
    match error {
        MapError::OutOfMemory => ErrorCode::OutOfMemory,
        MapError::AlreadyMapped(_) => ErrorCode::Overlap,
        _ => ErrorCode::OutOfReach,
    }
}

impl From<TryReserveError> for Error {
    fn from(_: TryReserveError) -> Self {
        Self::OutOfMemory
    }
}

impl From<dma::Error> for Error {
    fn from(error: dma::Error) -> Self {
        match error {
            dma::Error::OutOfMemory | dma::Error::Map(MapError::OutOfMemory) => Self::OutOfMemory,
            dma::Error::Iova(IovaError::InUse(range)) => Self::Overlap(range),
            dma::Error::Iova(IovaError::OutOfWindow(range)) => Self::OutOfReach(range),
            other => Self::Dma(other),
        }
    }
}
