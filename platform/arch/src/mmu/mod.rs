//! The kernel's address space.
//!
//! The entry code starts the MMU with tables that map the image, writable and executable, and the device tree. `init` replaces
//! them by the final ones: the image by section (code, constants, variables; guard pages below the stacks), all RAM in the linear
//! map, never executable, and nothing in the lower half. Device windows and stacks are added later, on demand.
//!
//! Memory that is not to be cached, or not to be reached at all, leaves the linear map (`leave_linear`) in whole blocks of 2 MiB
//! that nobody uses, and its pages are mapped one by one elsewhere (`map_alias`). So there are never two aliases that differ, and
//! never a block that is split while cores run.
//!
//! Scattered memory that is wanted in one piece gets a range of its own (`map_virtual`), as a second alias that differs in nothing but
//! its address.
//!
//! The lower half is empty but while a process runs (`user`).
//!
//! # Locking
//!
//! One `IrqMutex` guards the tables. Frames for tables are asked for while it is held, so the frame allocator must not map.

mod runs;
mod tables;

#[cfg(target_os = "none")]
mod kernel;

#[cfg(target_os = "none")]
pub use kernel::{
    Physical, enter_linear, image, init, leave_linear, map_alias, map_device, map_virtual, set_table_source, translate,
    unmap_alias, unmap_virtual, virtual_leaves,
};
#[cfg(target_os = "none")]
pub(crate) use kernel::{drop_identity, leave_user, map_core_stacks, note_image};
pub use runs::{for_each_leaf, map_runs};
pub use tables::{MAIR, MapError, Tables, Use, first_mapped, map, map_with, unmap};
