//! Several SMMUs under one address space.
//!
//! A machine may have several SMMUs, each with masters of its own. A space made by a [`Fleet`] has one set of tables and on each
//! SMMU an identifier and a context descriptor that lead to it. A stream attaches to it through its own SMMU
//! ([`Iommu::attach`](iommu::contract::Iommu::attach)), as to any other space; a mapping is there for all of them at once, and
//! a revocation is complete when it is complete on all of them.

use crate::registers::Registers;
use crate::request::Request;
use crate::smmu::{Shared, Smmu};
use crate::space::Space;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use iommu::AttachError;
use iommu::contract::AddressSpace;

/// SMMUs that can share address spaces.
pub struct Fleet<R: Registers> {
    smmus: Vec<Smmu<R>>,
}

impl<R: Registers> Fleet<R> {
    /// Takes the SMMUs together. Each stays usable by itself.
    pub fn new(smmus: impl IntoIterator<Item = Smmu<R>>) -> Self {
        let mut all: Vec<Smmu<R>> = Vec::new();
        for smmu in smmus {
            if !all.iter().any(|other| Arc::ptr_eq(other.shared(), smmu.shared())) {
                all.push(smmu);
            }
        }
        Self { smmus: all }
    }

    /// Its SMMUs.
    pub fn smmus(&self) -> &[Smmu<R>] {
        &self.smmus
    }

    /// Makes an address space that streams of all the SMMUs can be attached to: what the least of them can do.
    ///
    /// # Errors
    ///
    /// As [`Smmu::create_with`]; [`AttachError::Unsupported`] if there is nothing that all of them can do.
    pub fn create(&self, request: &Request) -> Result<Arc<dyn AddressSpace>, AttachError> {
        let mut shared: Vec<&Arc<Shared<R>>> = Vec::new();
        shared.try_reserve_exact(self.smmus.len()).map_err(|_| AttachError::OutOfMemory)?;
        shared.extend(self.smmus.iter().map(Smmu::shared));
        let space = Space::new(&shared, request)?;
        Ok(base::fallible::arc(space).map_err(|_| AttachError::OutOfMemory)?)
    }
}

impl<R: Registers> fmt::Debug for Fleet<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.smmus).finish()
    }
}
