//! What a process names by numbers.
//!
//! A handle is a place in the process's own table and how often the place was used before, so that a number that was given up does
//! not name what comes after it. Numbers of other processes mean nothing here, and a handle of one kind of thing nothing to the calls
//! for another kind.

use crate::Error;
use crate::device::Held;
use crate::event::Event;
use crate::shared::Opened;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Bits of a handle that tell the place; above them is the generation.
const PLACE_BITS: u32 = 16;

/// What a handle names.
#[derive(Debug)]
pub(crate) enum Named {
    /// A device.
    Device(Held),
    /// A shared buffer.
    Buffer(Opened),
    /// An event that is no device's.
    Event(Arc<Event>),
}

#[derive(Default)]
struct Place {
    generation: u32,
    named: Option<Named>,
}

/// The handles of one process.
pub(crate) struct Handles {
    places: Vec<Place>,
    max: usize,
}

impl Handles {
    /// Makes a table of at most `max` (below 2^16) handles.
    pub fn new(max: usize) -> Self {
        Self { places: Vec::new(), max }
    }

    /// The number that [`Handles::fill`] will give next.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`].
    pub fn next(&mut self) -> Result<u64, Error> {
        let index = match self.places.iter().position(|place| place.named.is_none()) {
            Some(index) => index,
            None if self.places.len() >= self.max => return Err(Error::Quota("handles")),
            None => {
                self.places.try_reserve(1)?;
                self.places.push(Place::default());
                self.places.len() - 1
            }
        };
        let generation = self.places.get(index).map_or(0, |place| place.generation);
        Ok(u64::from(generation) << PLACE_BITS | index as u64)
    }

    /// Puts `named` where [`Handles::next`] has said.
    pub fn fill(&mut self, handle: u64, named: Named) {
        if let Some(place) = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize) {
            place.named = Some(named);
        }
    }

    fn get(&mut self, handle: u64) -> Result<&mut Named, Error> {
        let place = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize);
        let place = place.filter(|place| u64::from(place.generation) == handle >> PLACE_BITS);
        place.and_then(|place| place.named.as_mut()).ok_or(Error::BadHandle(handle))
    }

    /// The device that `handle` names.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn device(&mut self, handle: u64) -> Result<&mut Held, Error> {
        match self.get(handle)? {
            Named::Device(held) => Ok(held),
            _ => Err(Error::BadHandle(handle)),
        }
    }

    /// The buffer that `handle` names.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn buffer(&mut self, handle: u64) -> Result<&mut Opened, Error> {
        match self.get(handle)? {
            Named::Buffer(opened) => Ok(opened),
            _ => Err(Error::BadHandle(handle)),
        }
    }

    /// The event that `handle` names, or that of the device that it names.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn awaited(&mut self, handle: u64) -> Result<Arc<Event>, Error> {
        match self.get(handle)? {
            Named::Device(held) => Ok(held.device().event().clone()),
            Named::Event(event) => Ok(event.clone()),
            Named::Buffer(_) => Err(Error::BadHandle(handle)),
        }
    }

    /// The event that `handle` names, and whoever has it may raise.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn event(&mut self, handle: u64) -> Result<&Event, Error> {
        match self.get(handle)? {
            Named::Event(event) => Ok(event),
            _ => Err(Error::BadHandle(handle)),
        }
    }

    /// Takes what `handle` names out of the table: the number means nothing any more.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn take(&mut self, handle: u64) -> Result<Named, Error> {
        self.get(handle)?;
        let place = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize);
        let place = place.ok_or(Error::BadHandle(handle))?;
        place.generation = place.generation.wrapping_add(1);
        place.named.take().ok_or(Error::BadHandle(handle))
    }

    /// Any handle that names something: a device, as long as there is one.
    pub fn any(&self) -> Option<u64> {
        let all = || self.places.iter().zip(0_u64..);
        let device = all().find(|(place, _)| matches!(place.named, Some(Named::Device(_))));
        let (place, index) = device.or_else(|| all().find(|(place, _)| place.named.is_some()))?;
        Some(u64::from(place.generation) << PLACE_BITS | index)
    }
}
