//! What the DMA-API promises, seen from the outside: each rule against a device that tries to break it.
//!
//! Every test that guards a safety property says which change to the code it was seen to catch.

mod borrowed;
mod coherent;
mod concurrency;
mod directions;
mod exhaustion;
mod gather;
mod lazy;
mod limits;
mod lists;
mod model;
mod owned;
mod ownership;
mod reports;
mod reserve;
mod sharing;
mod spaces;
mod syncing;
