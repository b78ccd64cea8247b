//! The kernel's address space.
//!
//! The entry code starts the MMU with tables that map the image, writable and executable, and the device tree. `init` replaces
//! them by the final ones: the image by section (code, constants, variables; guard pages below the stacks), all RAM in the linear
//! map, never executable, and nothing in the lower half. Device windows and stacks are added later, on demand.
//!
//! # Locking
//!
//! One `IrqMutex` guards the tables. Frames for tables are asked for while it is held, so the frame allocator must not map.

mod tables;

#[cfg(target_os = "none")]
mod kernel;

#[cfg(target_os = "none")]
pub use kernel::{Physical, image, init, map_device, set_table_source, translate};
#[cfg(target_os = "none")]
pub(crate) use kernel::{drop_identity, map_core_stacks, note_image};
pub use tables::{MapError, Tables, Use, first_mapped, map};
