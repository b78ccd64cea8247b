//! Links that follow one another, as one loan.

use super::link::{Linkable, Linked};
use crate::lent::{Lent, Segment, sealed};
use crate::{Device, Direction};
use alloc::vec::Vec;
use core::fmt;

/// Links that follow one another without a gap, as one loan: for descriptors that name more than one of them.
#[must_use = "dropping it ends the links"]
pub struct Assembled<D: Direction, M: Linkable> {
    /// At least one.
    links: Vec<Linked<D, M>>,
    device: Device,
    segment: Segment,
}

impl<D: Direction, M: Linkable> Assembled<D, M> {
    /// Joins `links`, in their order.
    ///
    /// # Errors
    ///
    /// The links, if there is none, or if one does not begin where the one before ends, for the same device.
    pub fn new(links: Vec<Linked<D, M>>) -> Result<Self, Vec<Linked<D, M>>> {
        let Some(first) = links.first() else { return Err(links) };
        let (device, start) = (first.device().clone(), first.iova());
        let mut end = start;
        for link in &links {
            let range = link.range();
            if range.start() != end || *link.device() != device {
                return Err(links);
            }
            end = range.end();
        }
        let len = end.offset_from(start).unwrap_or(0);
        Ok(Self { links, device, segment: Segment { iova: start, len } })
    }

    /// The links.
    pub fn links(&self) -> &[Linked<D, M>] {
        &self.links
    }

    /// The links, each for itself again.
    pub fn into_links(self) -> Vec<Linked<D, M>> {
        self.links
    }
}

impl<D: Direction, M: Linkable> sealed::Sealed for Assembled<D, M> {}

impl<D: Direction, M: Linkable> Lent for Assembled<D, M> {
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
        D::DEVICE_READS
    }
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
}

impl<D: Direction, M: Linkable> fmt::Debug for Assembled<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Assembled({} links at {}, {:?})", self.links.len(), self.segment.iova, D::PROT)
    }
}
