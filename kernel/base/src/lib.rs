//! What every floor of the house stands on: interrupt-masking locks, time, sleeping, barriers and the interrupt handler
//! trait.
//!
//! This crate knows no hardware. What it needs of a processor it asks for through [`Hooks`], which one crate of the final
//! image supplies with [`provide_hooks!`] (on a host build the hooks are threads and the host's clock, so everything above
//! can be tested there).
//!
//! # Locking rules
//!
//! - [`IrqMutex`] masks interrupts on this core while it is held, so that a handler may take it too.
//! - No lock is held across a wait: [`wait_until`] must be called with no [`IrqMutex`] held.
//! - Handlers neither allocate nor wait; what they cannot do, cores that wait do for them ([`deferred`]).

#![no_std]

extern crate alloc;

#[cfg(not(target_os = "none"))]
extern crate std;

pub mod barrier;
pub mod cpu;
pub mod deferred;
#[cfg(not(target_os = "none"))]
pub mod failing;
pub mod fallible;
mod hooks;
pub mod irq;
mod lock;
pub mod time;
mod turn;
mod wait;
pub mod words;

#[doc(hidden)]
pub use hooks::__private;
pub use hooks::Hooks;
pub use lock::{IrqMutex, IrqMutexGuard};
pub use time::{Deadline, Instant};
pub use turn::Turn;
pub use wait::{TimedOut, block_on, notify, wait_until};
