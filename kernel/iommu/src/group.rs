//! The bus masters that cannot be isolated from each other, and the address space that they have at present.
//!
//! A group is blocked until it is attached to its default domain, which the DMA-API fills. A driver that wants the address
//! space for itself attaches a domain of its own *in place of* the default one: there is no moment in which the streams have
//! neither or, per stream, both. The default domain and all that is mapped in it stay as they are; when the driver detaches,
//! the streams get it back. Meanwhile [`Group::domain`] is `None`, which is how the DMA-API knows that it must refuse.
//!
//! # Users
//!
//! Each bus master of a group that is in use counts as one of its users ([`Group::enter`], [`Group::leave`]). When the last one
//! leaves, the group is blocked, and not before: what one master's driver gives up, another's may still be using. A domain of a
//! driver's own, or identity, is for a group with one user: the others would be moved without being asked.
//!
//! # Failures
//!
//! All streams of a group are attached, or none is: when one cannot be, those that have moved are moved back. Where that is
//! impossible too, and where a stream cannot be blocked, all are blocked as far as possible, and the group stays in
//! [`AttachmentState::Stranded`] until [`Group::block`] succeeds.
//!
//! # Locking
//!
//! The state is under an `IrqMutex`, which is held neither while the IOMMU is at work (it may wait) nor while a domain is
//! dropped. Who changes the group marks it as changing; whoever comes in between is told so ([`AttachError::Busy`]).

use crate::contract::Iommu;
use crate::domain::{Domain, DomainKind};
use crate::identity::IdentityCapability;
use crate::{AttachError, StreamId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::fmt;
use core::sync::atomic::{AtomicU8, Ordering};

/// What the streams of a group can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttachmentState {
    /// Nothing.
    Blocked,
    /// What the DMA-API maps.
    Default,
    /// What the driver that owns the group maps.
    Owned,
    /// All of memory: the board vouches for them.
    Identity,
    /// What they could reach before, or what they will reach after a change that is being made.
    Changing,
    /// Nothing, as far as the IOMMU could be made to see to it.
    Stranded,
}

impl AttachmentState {
    /// All of them, in the order of their numbers.
    const ALL: [Self; 6] = [Self::Blocked, Self::Default, Self::Owned, Self::Identity, Self::Changing, Self::Stranded];
}

impl fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "blocked",
            Self::Default => "in its DMA domain",
            Self::Owned => "owned by its driver",
            Self::Identity => "untranslated",
            Self::Changing => "changing",
            Self::Stranded => "stranded",
        })
    }
}

/// Where a group is.
#[derive(Clone, Default)]
enum Place {
    #[default]
    Blocked,
    Default(Arc<Domain>),
    Owned(Arc<Domain>),
    /// What the board has said to vouch for the masters.
    Identity(IdentityCapability),
    /// Because of this stream.
    Stranded(StreamId),
}

impl Place {
    /// The domain that the streams are attached to.
    fn domain(&self) -> Option<&Arc<Domain>> {
        match self {
            Self::Default(domain) | Self::Owned(domain) => Some(domain),
            Self::Blocked | Self::Identity(_) | Self::Stranded(_) => None,
        }
    }
}

#[derive(Default)]
struct State {
    place: Place,
    /// The default domain while a driver owns the group.
    parked: Option<Arc<Domain>>,
    changing: bool,
    /// Bus masters that are in use.
    users: usize,
}

/// A change that has been decided on.
struct Change {
    place: Place,
    parked: Option<Arc<Domain>>,
}

/// The unit of attachment.
pub struct Group {
    iommu: Arc<dyn Iommu>,
    streams: Vec<StreamId>,
    state: IrqMutex<State>,
    /// What [`Group::current`] says: written under the lock whenever the state has changed.
    current: AtomicU8,
}

impl Group {
    /// Makes a group of `streams`, which `iommu` blocks (as it does all that it was not told to attach).
    pub fn new(iommu: Arc<dyn Iommu>, streams: Vec<StreamId>) -> Self {
        Self { iommu, streams, state: IrqMutex::default(), current: AtomicU8::new(AttachmentState::Blocked as u8) }
    }

    /// The IOMMU of the group.
    pub fn iommu(&self) -> &Arc<dyn Iommu> {
        &self.iommu
    }

    /// The StreamIDs that the bus masters use.
    pub fn streams(&self) -> &[StreamId] {
        &self.streams
    }

    /// What the streams can reach at present. Takes no lock: this is asked for every mapping.
    #[inline]
    pub fn current(&self) -> AttachmentState {
        let current = self.current.load(Ordering::Acquire);
        AttachmentState::ALL.get(usize::from(current)).copied().unwrap_or(AttachmentState::Changing)
    }

    /// Whether the streams are in the default domain at present: [`Group::current`] in one comparison. (It may change right afterwards, so
    /// that nothing follows from it for what is in memory.)
    #[inline(always)]
    pub fn is_in_default(&self) -> bool {
        self.current.load(Ordering::Relaxed) == AttachmentState::Default as u8
    }

    /// Notes what [`Group::current`] says from now on.
    fn show(&self, state: &State) {
        let current = match state.place {
            _ if state.changing => AttachmentState::Changing,
            Place::Blocked => AttachmentState::Blocked,
            Place::Default(_) => AttachmentState::Default,
            Place::Owned(_) => AttachmentState::Owned,
            Place::Identity(_) => AttachmentState::Identity,
            Place::Stranded(_) => AttachmentState::Stranded,
        };
        self.current.store(current as u8, Ordering::Release);
    }

    /// How many of its bus masters are in use.
    pub fn users(&self) -> usize {
        self.state.lock().users
    }

    /// Counts one more bus master in use. Changes nothing for the streams.
    pub fn enter(&self) {
        self.state.lock().users += 1;
    }

    /// Counts one bus master less; after the last one the group is blocked, wherever it was. Says whether it was the last.
    ///
    /// # Errors
    ///
    /// As [`Group::block`]; the master does not count any more all the same.
    pub fn leave(&self) -> Result<bool, AttachError> {
        let last = {
            let mut state = self.state.lock();
            state.users = state.users.saturating_sub(1);
            state.users == 0
        };
        if last {
            self.block()?;
        }
        Ok(last)
    }

    /// The domain that the streams are attached to now, whatever its kind.
    pub fn attached(&self) -> Option<Arc<Domain>> {
        let state = self.state.lock();
        if state.changing { None } else { state.place.domain().cloned() }
    }

    /// The default domain, if the group is attached to it now: otherwise the DMA-API must refuse.
    pub fn domain(&self) -> Option<Arc<Domain>> {
        let state = self.state.lock();
        match &state.place {
            Place::Default(domain) if !state.changing => Some(domain.clone()),
            _ => None,
        }
    }

    /// Attaches the group to `domain`, of kind [`DomainKind::Dma`], in place of nothing or of another such domain.
    ///
    /// # Errors
    ///
    /// [`AttachError::WrongKind`], [`AttachError::Owned`], [`AttachError::Busy`], [`AttachError::Stranded`], and what the
    /// IOMMU says.
    pub fn attach_default(&self, domain: Arc<Domain>) -> Result<(), AttachError> {
        if domain.kind() != DomainKind::Dma {
            return Err(AttachError::WrongKind(domain.kind()));
        }
        self.change(|state| match state.place {
            Place::Blocked | Place::Default(_) => Ok(Change { place: Place::Default(domain), parked: None }),
            Place::Owned(_) | Place::Identity(_) => Err(AttachError::Owned),
            Place::Stranded(stream) => Err(AttachError::Stranded(stream)),
        })
    }

    /// Makes the caller the owner: attaches the group to `domain`, of kind [`DomainKind::Owned`], in place of the default
    /// domain, which it gets back with [`Group::detach_owned`].
    ///
    /// # Errors
    ///
    /// As [`Group::attach_default`]; [`AttachError::Shared`] while several of the group's masters are in use.
    pub fn attach_owned(&self, domain: Arc<Domain>) -> Result<(), AttachError> {
        if domain.kind() != DomainKind::Owned {
            return Err(AttachError::WrongKind(domain.kind()));
        }
        self.change(|state| Self::take(state, Place::Owned(domain)))
    }

    /// Lets the streams reach all of memory untranslated, in place of the default domain, until [`Group::detach_owned`].
    ///
    /// # Errors
    ///
    /// As [`Group::attach_owned`].
    pub fn attach_identity(&self, capability: IdentityCapability) -> Result<(), AttachError> {
        self.change(|state| Self::take(state, Place::Identity(capability)))
    }

    /// Decides on taking the group away from the DMA-API.
    fn take(state: &State, place: Place) -> Result<Change, AttachError> {
        if state.users > 1 {
            return Err(AttachError::Shared(state.users));
        }
        match &state.place {
            Place::Blocked => Ok(Change { place, parked: None }),
            Place::Default(default) => Ok(Change { place, parked: Some(default.clone()) }),
            Place::Owned(_) | Place::Identity(_) => Err(AttachError::Owned),
            Place::Stranded(stream) => Err(AttachError::Stranded(*stream)),
        }
    }

    /// Swaps the owner's domain `from` for `to` under the running device. That the caller has `from` is its claim to be the
    /// owner.
    ///
    /// # Errors
    ///
    /// [`AttachError::NotOwned`] if the group is not attached to `from`; else as [`Group::attach_owned`].
    pub fn swap_owned(&self, from: &Arc<Domain>, to: Arc<Domain>) -> Result<(), AttachError> {
        if to.kind() != DomainKind::Owned {
            return Err(AttachError::WrongKind(to.kind()));
        }
        self.change(|state| match &state.place {
            Place::Owned(domain) if Arc::ptr_eq(domain, from) => {
                Ok(Change { place: Place::Owned(to), parked: state.parked.clone() })
            }
            Place::Stranded(stream) => Err(AttachError::Stranded(*stream)),
            _ => Err(AttachError::NotOwned),
        })
    }

    /// Ends the ownership, or identity: the group is back in its default domain, or blocked if it had none.
    ///
    /// # Errors
    ///
    /// [`AttachError::NotOwned`], [`AttachError::Busy`], and what the IOMMU says of the default domain: the owner then still
    /// owns the group, unless it is [`AttachError::Stranded`].
    pub fn detach_owned(&self) -> Result<(), AttachError> {
        self.change(|state| match state.place {
            Place::Owned(_) | Place::Identity(_) => {
                let place = state.parked.clone().map_or(Place::Blocked, Place::Default);
                Ok(Change { place, parked: None })
            }
            Place::Stranded(stream) => Err(AttachError::Stranded(stream)),
            _ => Err(AttachError::NotOwned),
        })
    }

    /// Blocks the group, wherever it was. Ends an ownership, and forgets the default domain.
    ///
    /// # Errors
    ///
    /// [`AttachError::Busy`]; [`AttachError::Stranded`] if a stream could not be blocked. The others are.
    pub fn block(&self) -> Result<(), AttachError> {
        self.change(|_| Ok(Change { place: Place::Blocked, parked: None }))
    }

    /// Decides on a change under the lock, makes it without, and notes what became of it.
    fn change(&self, decide: impl FnOnce(&State) -> Result<Change, AttachError>) -> Result<(), AttachError> {
        let (from, to) = {
            let mut state = self.state.lock();
            if state.changing {
                return Err(AttachError::Busy);
            }
            let to = decide(&state)?;
            state.changing = true;
            self.show(&state);
            (state.place.clone(), to)
        };
        let result = match &to.place {
            Place::Blocked | Place::Stranded(_) => self.block_all(),
            place => self.move_all(&from, place),
        };
        let end = match result {
            Ok(()) => Some(to),
            Err(AttachError::Stranded(stream)) => Some(Change { place: Place::Stranded(stream), parked: None }),
            Err(_) => None,
        };
        let mut state = self.state.lock();
        state.changing = false;
        let past = end.map(|end| {
            let place = core::mem::replace(&mut state.place, end.place);
            (place, core::mem::replace(&mut state.parked, end.parked))
        });
        self.show(&state);
        drop(state);
        // Perhaps the last owners of their domains: dropping those may take a while.
        drop((past, from));
        result
    }

    /// Moves all streams to `place`, or moves those back that were moved.
    fn move_all(&self, from: &Place, place: &Place) -> Result<(), AttachError> {
        for (index, stream) in self.streams.iter().enumerate() {
            let Err(error) = self.move_one(*stream, place) else { continue };
            log::warn!("{}: stream {stream} was not attached: {error}", self.iommu.name());
            // A stream that was refused is where it was. One that the IOMMU has begun to change may be anywhere.
            let begun = matches!(error, AttachError::TimedOut | AttachError::Dead);
            for stream in self.streams.iter().take(index + usize::from(begun)) {
                if self.move_one(*stream, from).is_err() {
                    return Err(self.block_all().err().unwrap_or(AttachError::Stranded(*stream)));
                }
            }
            return Err(error);
        }
        Ok(())
    }

    fn move_one(&self, stream: StreamId, place: &Place) -> Result<(), AttachError> {
        match place {
            Place::Default(domain) | Place::Owned(domain) => self.iommu.attach(stream, domain.space()),
            Place::Identity(capability) => capability.bypass(&*self.iommu, stream),
            Place::Blocked | Place::Stranded(_) => self.iommu.block(stream),
        }
    }

    /// Blocks all streams, or as many as can be.
    fn block_all(&self) -> Result<(), AttachError> {
        let mut result = Ok(());
        for stream in &self.streams {
            if let Err(error) = self.iommu.block(*stream) {
                log::error!("{}: stream {stream} cannot be blocked: {error}", self.iommu.name());
                result = result.and(Err(AttachError::Stranded(*stream)));
            }
        }
        result
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !matches!(self.state.get_mut().place, Place::Blocked)
            && let Err(error) = self.block()
        {
            log::error!("{self:?} could not be blocked when it was given up: {error}");
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "group of streams {:?} of {}, {}", self.streams, self.iommu.name(), self.current())
    }
}

#[cfg(test)]
mod tests;
