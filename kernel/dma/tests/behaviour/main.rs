//! What the DMA-API promises, seen from the outside: each rule against a device that tries to break it.
//!
//! Every test that guards a safety property says which change to the code it was seen to catch.

mod allocations;
mod backends;
mod berths;
mod borrowed;
mod bouncing;
mod coherent;
mod concurrency;
mod directions;
mod exhaustion;
mod foreign;
mod gather;
mod jobs;
mod kinds;
#[cfg(not(feature = "track"))] // Beside the tracker everything ends at once.
mod lazy;
mod limits;
mod links;
mod lists;
mod misuse;
mod model;
mod moving;
mod owned;
mod ownership;
mod parts;
mod placing;
mod remap;
mod reports;
mod reserve;
mod sharing;
mod spaces;
mod syncing;
mod vcm;
