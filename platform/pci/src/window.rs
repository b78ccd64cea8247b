//! The host bridge's windows: where the bus addresses of BARs come from.

use crate::PciError;
use alloc::vec::Vec;
use iommu::PhysAddr;

/// What a window of the host bridge forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowKind {
    /// I/O ports.
    Io,
    /// Memory.
    Memory {
        /// Reads may be merged and repeated: not for registers whose reads have side effects.
        prefetchable: bool,
    },
}

/// A window of the host bridge: one of the device tree's `ranges`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// What it forwards.
    pub kind: WindowKind,
    /// Its first address on the PCI bus.
    pub bus: u64,
    /// Its first address on the CPU's physical bus.
    pub phys: PhysAddr,
    /// Bytes.
    pub len: u64,
}

impl Window {
    /// The bus address after the window.
    pub(crate) const fn end(&self) -> u64 {
        self.bus + self.len
    }
}

/// The first bus address that does not fit into 32 bits.
pub(crate) const FOUR_GIB: u64 = 1 << 32;

/// Where an item may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// I/O.
    Io,
    /// Memory below 4 GiB.
    Low,
    /// Memory anywhere.
    High,
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Io, Self::Low, Self::High];
}

/// Hands out addresses from the windows, from low to high.
pub(crate) struct Space {
    windows: Vec<(Window, u64)>,
}

/// Checks windows and leaves out the empty ones.
///
/// # Errors
///
/// [`PciError::BadWindow`] for one that passes the end of an address space.
pub(crate) fn check(windows: &[Window]) -> Result<(), PciError> {
    for window in windows {
        let fits = window.bus.checked_add(window.len).is_some() && window.phys.checked_add(window.len).is_some();
        if !fits {
            return Err(PciError::BadWindow(window.bus));
        }
    }
    Ok(())
}

impl Space {
    /// Takes windows that [`check`] has passed.
    pub fn new(windows: &[Window]) -> Self {
        // Address 0 counts as "not assigned" for some functions: leave it out.
        let start = |window: &Window| if window.bus == 0 { 0x1000 } else { window.bus };
        Self { windows: windows.iter().map(|window| (*window, start(window))).collect() }
    }

    /// Takes `size` bytes aligned to `align`, and returns their bus address. What is at home above 4 GiB goes there first, to
    /// leave room for what is not.
    pub fn take(&mut self, class: Class, prefetchable: bool, size: u64, align: u64) -> Option<u64> {
        let passes: &[bool] = if class == Class::High { &[true, false] } else { &[false] };
        for high in passes {
            for (window, next) in &mut self.windows {
                let kind_fits = match window.kind {
                    WindowKind::Io => class == Class::Io,
                    WindowKind::Memory { prefetchable: window } => class != Class::Io && (prefetchable || !window),
                };
                if !kind_fits {
                    continue;
                }
                let (start, limit) =
                    if *high { ((*next).max(FOUR_GIB), window.end()) } else { (*next, window.end().min(FOUR_GIB)) };
                let Some(address) = start.checked_next_multiple_of(align) else { continue };
                if address.checked_add(size).is_some_and(|end| end <= limit) {
                    *next = address + size;
                    return Some(address);
                }
            }
        }
        None
    }
}

/// Translates a bus address to the CPU's address for it.
pub(crate) fn translate(windows: &[Window], io: bool, bus: u64) -> Option<PhysAddr> {
    windows
        .iter()
        .filter(|window| (window.kind == WindowKind::Io) == io)
        .find(|window| window.bus <= bus && bus < window.end())
        .and_then(|window| window.phys.checked_add(bus - window.bus))
}
