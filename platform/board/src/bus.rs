//! PCIe hosts, as the device tree describes them.

use crate::signals::Signals;
use crate::{Error, interrupts};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use iommu::{PhysAddr, PhysRange};
use kernel::machine::{PcieHost, WindowKind};
use pci::{Host, HostConfig, PciEnv, PciError, Window};

/// A host that was enumerated.
pub(crate) struct Bus {
    /// Its place in the machine's list.
    pub index: usize,
    pub host: Host,
    pub signals: Arc<Signals>,
}

/// Maps BARs.
struct Environment;

impl PciEnv for Environment {
    fn map(&self, phys: PhysAddr, len: u64) -> Result<Mmio, PciError> {
        let range = PhysRange::new(phys, len).ok_or(PciError::MapFailed)?;
        interrupts::map("BAR", range).map_err(|error| {
            log::warn!("{error}");
            PciError::MapFailed
        })
    }
}

impl Bus {
    /// Enumerates a host: bus numbers and BARs are assigned, nothing masters the bus.
    pub fn enumerate(index: usize, description: &PcieHost) -> Result<Self, Error> {
        let windows: Vec<Window> = description
            .windows
            .iter()
            .map(|window| Window {
                kind: match window.kind {
                    WindowKind::Io => pci::WindowKind::Io,
                    _ => pci::WindowKind::Memory { prefetchable: window.prefetchable },
                },
                bus: window.pci,
                phys: window.cpu.start(),
                len: window.cpu.len(),
            })
            .collect();
        let (first, last) = description.buses;
        let config = HostConfig {
            segment: description.domain as u16,
            ecam: interrupts::map("ECAM", description.ecam)?,
            buses: first..=last,
            windows,
        };
        let host = Host::new(&config, Arc::new(Environment))
            .map_err(|error| Error::Pci { name: description.path.to_string(), error })?;
        Ok(Self { index, host, signals: Signals::new(description) })
    }
}
