//! A memory, an IOMMU and bus masters on the host's heap, for tests of this crate and of drivers.
//!
//! The fakes are devices, not stubs: a [`FakeBusMaster`] reads and writes through the translations that are in force, checks
//! permissions, remembers what it has translated until it is told to forget, and sees only what has reached memory. Memory
//! that is freed while somebody reaches it, or reached after it was freed, is a recorded violation.

mod hardware;
mod iommu;
mod memory;
mod system;
mod tables;

pub use self::iommu::{FakeBusMaster, FakeIommu, FakeSpace};
pub use hardware::Hardware;
pub use memory::{FakeMemory, FakeMemoryConfig};
pub use system::{FakeDevice, FakeSystem};
