//! Addresses that nobody lent: for proving that the fence holds.

use crate::lent::{Lent, Segment, sealed};
use crate::{Device, Error};
use core::fmt;
use iommu::Iova;

/// A loan of nothing: `len` bytes of a device's address space that a driver can name to its device like those of a real loan,
/// although no memory was lent there.
///
/// That is safe: where nothing is mapped the IOMMU stops the access, and what else may be mapped there was lent to this very
/// device, and is owned by loans that expect it to be accessed at any moment.
#[derive(Debug)]
pub struct Stray {
    device: Device,
    segment: Segment,
}

impl Stray {
    /// Makes a loan of nothing at `iova`.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`]: without an IOMMU the device would reach whatever is there.
    pub fn new(device: &Device, iova: Iova, len: u64) -> Result<Self, Error> {
        if !device.is_isolated() {
            return Err(Error::NotIsolated(device.shared_name().clone()));
        }
        if len == 0 || iova.checked_add(len).is_none() {
            return Err(Error::BadSize(len));
        }
        Ok(Self { device: device.clone(), segment: Segment { iova, len } })
    }
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {} that were not lent to {}", self.segment.len, self.segment.iova, self.device.name())
    }
}

impl sealed::Sealed for Stray {}

impl Lent for Stray {
    fn device(&self) -> &Device {
        &self.device
    }
    fn len(&self) -> u64 {
        self.segment.len
    }
    fn segments(&self) -> &[Segment] {
        core::slice::from_ref(&self.segment)
    }
    fn device_reads(&self) -> bool {
        true
    }
    fn device_writes(&self) -> bool {
        true
    }
}
