//! Proof that a bus master may be let loose.

#![allow(unsafe_code)] // A declaration: what is promised here is what `enable_bus_master` relies on.

use crate::RequesterId;

/// Proof that a bus master's transactions are confined: its stream is attached to an address space of an IOMMU (or the board
/// has decided, by a capability that only board code can make, that it may go untranslated).
///
/// [`crate::Function::enable_bus_master`] takes nothing else. The trait is implemented in one place, by the board's DMA
/// attachment.
///
/// # Safety
///
/// - `covers` returns true only for requester IDs whose transactions are confined as said, under every name by which an IOMMU
///   may see them;
/// - that stays so until bus mastering is disabled again, whatever becomes of the value.
pub unsafe trait Attached {
    /// Whether this proof is about `requester`.
    fn covers(&self, requester: RequesterId) -> bool;
}
