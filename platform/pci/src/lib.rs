//! PCI Express: enumeration through bridges, addresses for BARs, capabilities, message signalled interrupts.
//!
//! [`Host::new`] takes a host bridge in plain values and returns its [`Function`]s. Firmware is expected to have done nothing:
//! bus numbers, bridge windows and BARs are ours, and whatever was enabled is disabled first.
//!
//! # Invariants
//!
//! - **Bus mastering is off** until [`Function::enable_bus_master`] is given proof that the function is [`Attached`].
//! - Memory decoding is off until a BAR is mapped; I/O decoding stays off; INTx is disabled.
//! - A function is not trusted: its lists are walked at most once around, its sizes are checked, and what is wrong with it is
//!   an error of that function ([`Function::check`]), not of its neighbours.
//!
//! # Locking
//!
//! One lock per function, for its Command register and capabilities; a bridge's after that of what is behind it. A single
//! configuration access takes none. One lock per wired interrupt, outside the functions' (see `intx`).

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "fakes"))]
extern crate std;

mod addr;
mod assign;
mod attach;
mod bar;
mod caps;
mod config;
mod error;
mod function;
mod groups;
mod host;
mod intx;
mod msi;
mod reset;
mod scan;
mod window;

#[cfg(any(test, feature = "fakes"))]
pub mod fake;
#[cfg(test)]
mod tests;

pub use addr::{Bdf, RequesterId};
pub use attach::Attached;
pub use bar::{Bar, BarKind};
pub use caps::{Capability, ExtendedCapability, PortType, id as capability};
pub use config::{CONFIG_SIZE, ConfigSpace, Ecam, Width};
pub use error::{MsiError, PciError};
pub use function::{Function, InterruptPin};
pub use host::{Host, HostConfig, PciEnv};
pub use intx::{Line, LineControl, PATIENCE, Wire};
pub use msi::{MessageGate, Msi, MsiController, MsiMessage, Msix, msix_bars};
pub use reset::RESET_MILLIS;
pub use scan::Ids;
pub use window::{Window, WindowKind};
