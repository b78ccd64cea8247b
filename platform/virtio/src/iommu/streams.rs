//! Which endpoint has what.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the list, taken by the handler of the event queue as well (and under it that of an address space, to
//! look an address up). Nothing is dropped under it.

use super::domains::DomainId;
use super::space::Space;
use ::iommu::contract::AddressSpace;
use ::iommu::{AttachError, Iova, Prot, StreamId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::any::Any;

/// What becomes of an endpoint's accesses.
#[derive(Clone, Default)]
pub(super) enum Place {
    /// They are stopped.
    #[default]
    Blocked,
    /// They are translated by an address space of this driver's.
    Translated(Arc<dyn AddressSpace>),
    /// They pass untranslated, by this domain.
    Bypass(Arc<DomainId>),
}

impl Place {
    /// The address space.
    pub fn space(&self) -> Option<&Space> {
        match self {
            Self::Translated(space) => own(&**space),
            _ => None,
        }
    }
}

/// The driver's own type behind an address space, if it is one.
pub(super) fn own(space: &dyn AddressSpace) -> Option<&Space> {
    (space as &dyn Any).downcast_ref()
}

/// What the records know of a stopped access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// The endpoint is attached to nothing.
    Blocked,
    /// It is attached, and this is mapped there.
    Attached(Option<Prot>),
}

/// All endpoints that were ever attached.
#[derive(Default)]
pub(super) struct Streams {
    list: IrqMutex<Vec<(StreamId, Place)>>,
}

impl Streams {
    /// Makes room for `stream`, and returns where it is.
    pub fn enter(&self, stream: StreamId) -> Result<Place, AttachError> {
        let mut list = self.list.lock();
        if let Some((_, place)) = list.iter().find(|(own, _)| *own == stream) {
            return Ok(place.clone());
        }
        list.try_reserve(1).map_err(|_| AttachError::OutOfMemory)?;
        list.push((stream, Place::Blocked));
        Ok(Place::Blocked)
    }

    /// Notes where `stream`, for which there is room, is now. Returns where it was.
    pub fn set(&self, stream: StreamId, place: Place) -> Place {
        let mut list = self.list.lock();
        match list.iter_mut().find(|(own, _)| *own == stream) {
            Some((_, old)) => core::mem::replace(old, place),
            None => place,
        }
    }

    /// Says what is known of `iova` for `stream`.
    pub fn look(&self, stream: StreamId, iova: Option<Iova>) -> Known {
        let list = self.list.lock();
        match list.iter().find(|(own, _)| *own == stream) {
            None | Some((_, Place::Blocked)) => Known::Blocked,
            Some((_, place)) => Known::Attached(iova.and_then(|iova| Some(place.space()?.translate(iova)?.1))),
        }
    }
}
