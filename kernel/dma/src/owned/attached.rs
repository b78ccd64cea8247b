//! Devices that are not in their DMA domain: in an owned one, or not translated.

#![expect(unsafe_code, reason = "says what is vouched for")]

use super::{OwnedDomain, taken};
use crate::{Device, Error};
use alloc::sync::Arc;
use base::{Deadline, wait_until};
use core::fmt;
use iommu::contract::Iommu;
use iommu::group::{AttachmentState, Group};
use iommu::{AttachError, IdentityCapability, StreamId};

/// Milliseconds that another core may take for a change of the same group.
const BUSY_MILLIS: u64 = 2_000;

/// A device that is not in its DMA domain. Puts it back when dropped.
pub(super) struct Away {
    pub(super) device: Device,
}

impl Away {
    fn group(&self) -> Result<&Arc<Group>, Error> {
        Ok(self.device.translated()?.group())
    }

    /// Waits while another core changes the group, which can only be to block it.
    fn settled<R>(&self, change: impl Fn(&Group) -> Result<R, AttachError>) -> Result<R, Error> {
        let group = self.group()?;
        let deadline = Deadline::after_millis(BUSY_MILLIS);
        loop {
            match change(group) {
                Err(AttachError::Busy) if !deadline.has_passed() => {
                    let _ = wait_until(deadline, || group.current() != AttachmentState::Changing);
                }
                result => return Ok(result?),
            }
        }
    }

    fn end(&self) -> Result<(), Error> {
        match self.settled(Group::detach_owned) {
            // It was blocked meanwhile: there is nothing to go back from.
            Err(Error::Attach(AttachError::NotOwned)) => Ok(()),
            result => result,
        }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let Err(error) = self.end() else { return };
        log::error!("{} is blocked: it could not be put back into its DMA domain: {error}", self.device.name());
        if let Err(error) = self.settled(Group::block) {
            log::error!("{}: {error}", self.device.name());
        }
    }
}

/// A device in an owned domain. Dropping it puts the device back into its DMA domain, with all that is mapped there.
#[must_use = "dropping an attachment ends it"]
pub struct OwnedAttachment {
    pub(super) away: Away,
    pub(super) domain: OwnedDomain,
}

impl OwnedAttachment {
    /// The device.
    pub fn device(&self) -> &Device {
        &self.away.device
    }

    /// The domain that it is attached to.
    pub fn domain(&self) -> &OwnedDomain {
        &self.domain
    }

    /// Exchanges the domain for `to` while the device may be at work: each of its accesses sees the old domain or the new one,
    /// and from the return on the new one only.
    ///
    /// # Errors
    ///
    /// As [`OwnedDomain::attach`]; the device is where it was then.
    pub fn swap(&mut self, to: &OwnedDomain) -> Result<(), Error> {
        to.check(&self.away.device)?;
        let from = &self.domain.0.domain;
        self.away.settled(|group| group.swap_owned(from, to.0.domain.clone()))?;
        self.domain = to.clone();
        Ok(())
    }

    /// Puts the device back into its DMA domain.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]; the device is blocked then.
    pub fn detach(self) -> Result<(), Error> {
        // If it fails, the drop tries again, and blocks.
        self.away.end()
    }
}

impl fmt::Debug for OwnedAttachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedAttachment({} to {})", self.away.device.name(), self.domain.0.name)
    }
}

/// Vouches for one device, for [`IdentityAttachment::new`].
///
/// # Safety
///
/// As [`IdentityCapability::vouch`], for the group of the device that the capability will be used for.
pub unsafe fn vouch() -> IdentityCapability {
    fn let_through(iommu: &dyn Iommu, stream: StreamId) -> Result<(), AttachError> {
        // SAFETY: called by a group that was given the capability below, whose maker has promised what this needs.
        unsafe { iommu.bypass(stream) }
    }
    // SAFETY: the caller's promise.
    unsafe { IdentityCapability::vouch(let_through) }
}

/// A device that is not translated. Dropping it puts the device back into its DMA domain.
#[must_use = "dropping an attachment ends it"]
pub struct IdentityAttachment {
    away: Away,
}

impl IdentityAttachment {
    /// Lets `device` reach all of memory untranslated, in place of its DMA domain.
    ///
    /// # Errors
    ///
    /// As [`OwnedDomain::attach`].
    pub fn new(device: &Device, capability: IdentityCapability) -> Result<Self, Error> {
        let group = device.translated()?.group();
        group.attach_identity(capability).map_err(|error| taken(error, device))?;
        Ok(Self { away: Away { device: device.clone() } })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.away.device
    }

    /// Puts the device back into its DMA domain.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]; the device is blocked then.
    pub fn detach(self) -> Result<(), Error> {
        self.away.end()
    }
}

impl fmt::Debug for IdentityAttachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IdentityAttachment({})", self.away.device.name())
    }
}
