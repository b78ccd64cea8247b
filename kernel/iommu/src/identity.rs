//! Devices that are not translated, because somebody vouches for them.

#![allow(unsafe_code)] // A declaration: what a group that is not translated relies on.

use crate::contract::Iommu;
use crate::{AttachError, StreamId};

/// Has an IOMMU let a stream through: [`Iommu::bypass`].
pub type Bypass = fn(&dyn Iommu, StreamId) -> Result<(), AttachError>;

/// The board's word that the bus masters of one group may reach all of memory. Only code that may say `unsafe` can make one, and
/// only a group takes one.
#[derive(Clone, Debug)]
pub struct IdentityCapability(Bypass);

impl IdentityCapability {
    /// Vouches for the bus masters of the group that the capability will be given to, and brings the call that needs the promise
    /// (this crate makes none).
    ///
    /// # Safety
    ///
    /// The masters of that group access no memory but what their driver tells them to, and that driver hands them only memory
    /// that may be accessed so, for as long as the group stays attached by this capability.
    pub const unsafe fn vouch(bypass: Bypass) -> Self {
        Self(bypass)
    }

    /// Lets `stream` reach all of memory.
    pub(crate) fn bypass(&self, iommu: &dyn Iommu, stream: StreamId) -> Result<(), AttachError> {
        (self.0)(iommu, stream)
    }
}
