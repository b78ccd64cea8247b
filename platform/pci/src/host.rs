//! A host bridge and all that was found behind it.

use crate::config::{ConfigSpace, Ecam};
use crate::window::{self, Window};
use crate::{Bdf, Function, PciError, assign, groups, scan};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use core::ops::RangeInclusive;
use iommu::PhysAddr;

/// What is known of a host bridge beforehand, in plain values.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// The segment (`linux,pci-domain`).
    pub segment: u16,
    /// The configuration window, beginning with the first bus.
    pub ecam: Mmio,
    /// The buses that it holds; the first is the root bus.
    pub buses: RangeInclusive<u8>,
    /// The windows through which the CPU reaches BARs.
    pub windows: Vec<Window>,
}

/// What enumeration needs of the kernel.
pub trait PciEnv: Send + Sync {
    /// Maps `len` bytes of device registers at `phys` for the rest of the kernel's life. Neither need be a multiple of a page.
    ///
    /// # Errors
    ///
    /// [`PciError::MapFailed`] or [`PciError::OutOfMemory`].
    fn map(&self, phys: PhysAddr, len: u64) -> Result<Mmio, PciError>;
}

/// A host bridge whose buses have been numbered and whose functions have addresses.
pub struct Host {
    segment: u16,
    functions: Vec<Arc<Function>>,
}

impl Host {
    /// Enumerates the host that `config` describes: numbers the buses, disables whatever firmware left enabled, and gives
    /// every BAR an address. Decoding and bus mastering stay off until a driver asks.
    ///
    /// # Errors
    ///
    /// [`PciError::BadEcam`], [`PciError::BadWindow`], [`PciError::OutOfMemory`]. What is wrong with one function is that
    /// function's [`Function::check`].
    pub fn new(config: &HostConfig, env: Arc<dyn PciEnv>) -> Result<Self, PciError> {
        let ecam = Arc::new(Ecam::new(config.ecam, config.buses.clone())?);
        Self::with_space(ecam, config.segment, config.buses.clone(), &config.windows, env)
    }

    /// Enumerates a host through any kind of configuration space. As [`Host::new`] otherwise.
    ///
    /// # Errors
    ///
    /// As [`Host::new`].
    pub fn with_space(
        space: Arc<dyn ConfigSpace>,
        segment: u16,
        buses: RangeInclusive<u8>,
        windows: &[Window],
        env: Arc<dyn PciEnv>,
    ) -> Result<Self, PciError> {
        window::check(windows)?;
        let mut nodes = scan::scan(space, *buses.start(), *buses.end())?;
        assign::assign(&mut nodes, windows);
        let mut functions: Vec<Arc<Function>> = Vec::new();
        functions.try_reserve_exact(nodes.len()).map_err(|_| PciError::OutOfMemory)?;
        let groups = groups::groups(&nodes);
        for (node, group) in nodes.into_iter().zip(groups) {
            // Parents come first in depth-first order.
            let parent = node.parent.and_then(|index| functions.get(index).cloned());
            let function = Arc::new(Function::new(node, group, env.clone(), parent));
            match function.check() {
                Ok(()) => log::debug!("{segment:04x}:{function:?}"),
                Err(error) => log::warn!("{segment:04x}:{function:?}: {error}"),
            }
            functions.push(function);
        }
        Ok(Self { segment, functions })
    }

    /// The segment.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// All functions, bridges included, those that cannot be used included (see [`Function::check`]). A bridge comes before
    /// what is behind it.
    pub fn functions(&self) -> &[Arc<Function>] {
        &self.functions
    }

    /// The function at `bdf`.
    pub fn find(&self, bdf: Bdf) -> Option<&Arc<Function>> {
        self.functions.iter().find(|function| function.bdf() == bdf)
    }
}
