//! Devices that are not translated, because somebody vouches for them.

#![allow(unsafe_code)] // Hands the board's promise on to the IOMMU.

use crate::contract::Iommu;
use crate::{AttachError, StreamId};

/// The board's word that the bus masters of one group may reach all of memory. Only code that may say `unsafe` can make one, and
/// only a group takes one.
#[derive(Clone, Debug)]
pub struct IdentityCapability(());

impl IdentityCapability {
    /// Vouches for the bus masters of the group that it will be given to.
    ///
    /// # Safety
    ///
    /// The masters of that group access no memory but what their driver tells them to, and that driver hands them only memory
    /// that may be accessed so, for as long as the group stays attached by this capability.
    pub const unsafe fn vouch() -> Self {
        Self(())
    }
}

/// Lets `stream` reach all of memory.
pub(crate) fn bypass(iommu: &dyn Iommu, stream: StreamId, _: &IdentityCapability) -> Result<(), AttachError> {
    // SAFETY: whoever made the capability vouches for the device (`IdentityCapability::vouch`).
    unsafe { iommu.bypass(stream) }
}
