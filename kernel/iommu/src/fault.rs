//! What an IOMMU reports of an access that it stopped.

use crate::{Iova, StreamId};
use core::fmt;

/// What the device tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read of memory.
    Read,
    /// A write to memory (MSIs among them).
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// Why an access was stopped, in words that do not depend on the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultReason {
    /// The address is not mapped.
    NotMapped,
    /// The address is mapped, without the permission that the access needs.
    Permission,
    /// The address, or what it translates to, is beyond the sizes in force.
    AddressSize,
    /// The stream has no address space (or an unknown StreamID was used).
    Blocked,
    /// The IOMMU could not read its own tables, or found them malformed: a bug of the kernel's.
    Configuration,
    /// Anything else; the IOMMU's own record says what.
    Other,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotMapped => "not mapped",
            Self::Permission => "no permission",
            Self::AddressSize => "address too large",
            Self::Blocked => "stream is blocked",
            Self::Configuration => "bad IOMMU configuration",
            Self::Other => "other",
        })
    }
}

/// One stopped access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who.
    pub stream: StreamId,
    /// Where, if the record says.
    pub iova: Option<Iova>,
    /// What, if the record says.
    pub access: Option<Access>,
    /// Why.
    pub reason: FaultReason,
    /// The hardware's own name for it, such as `F_TRANSLATION`.
    pub event: &'static str,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {}", self.stream)?;
        if let Some(access) = self.access {
            write!(f, " {access}")?;
        }
        if let Some(iova) = self.iova {
            write!(f, " at {iova}")?;
        }
        write!(f, ": {} ({})", self.reason, self.event)
    }
}

/// Where an IOMMU driver delivers faults. Called from its interrupt handler: no allocation, no waiting.
pub trait FaultSink: Send + Sync {
    /// Takes note of one fault.
    fn fault(&self, fault: &Fault);
}
