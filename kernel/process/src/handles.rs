//! What a process names by numbers.
//!
//! A handle is a place in the process's own table and how often the place was used before, so that a number that was given up does
//! not name what comes after it. Numbers of other processes mean nothing here.

use crate::Error;
use crate::device::Held;
use alloc::vec::Vec;

/// Bits of a handle that tell the place; above them is the generation.
const PLACE_BITS: u32 = 16;

#[derive(Default)]
struct Place {
    generation: u32,
    held: Option<Held>,
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
        let index = match self.places.iter().position(|place| place.held.is_none()) {
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

    /// Puts `held` where [`Handles::next`] has said.
    pub fn fill(&mut self, handle: u64, held: Held) {
        if let Some(place) = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize) {
            place.held = Some(held);
        }
    }

    /// What `handle` names.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn get(&mut self, handle: u64) -> Result<&mut Held, Error> {
        let place = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize);
        let place = place.filter(|place| u64::from(place.generation) == handle >> PLACE_BITS);
        place.and_then(|place| place.held.as_mut()).ok_or(Error::BadHandle(handle))
    }

    /// Takes what `handle` names out of the table: the number means nothing any more.
    ///
    /// # Errors
    ///
    /// [`Error::BadHandle`].
    pub fn take(&mut self, handle: u64) -> Result<Held, Error> {
        self.get(handle)?;
        let place = self.places.get_mut((handle & ((1 << PLACE_BITS) - 1)) as usize);
        let place = place.ok_or(Error::BadHandle(handle))?;
        place.generation = place.generation.wrapping_add(1);
        place.held.take().ok_or(Error::BadHandle(handle))
    }

    /// Any handle that names something.
    pub fn any(&self) -> Option<u64> {
        let named = self.places.iter().zip(0_u64..).find(|(place, _)| place.held.is_some());
        named.map(|(place, index)| u64::from(place.generation) << PLACE_BITS | index)
    }
}
