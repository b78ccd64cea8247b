//! What firmware uses through a device's address space, by device.
//!
//! A display that firmware has started scans its framebuffer out all the time. The tree says so with `iommu-addresses`: such
//! addresses are never given out, and where they name the region's own memory, one to one, they stay mapped for the device.

use super::Machine;
use super::memory::{IommuAddresses, ReservedMemory};
use iommu::{IovaRange, PhysRange};

/// Addresses of one device that are firmware's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirmwareRegion {
    /// The device addresses.
    pub iova: IovaRange,
    /// The memory that they have to reach: the same addresses. `None` if they are only to be left alone.
    pub memory: Option<PhysRange>,
}

impl Machine {
    /// Lists what firmware uses of the PCI function at the end of `way`: the device and function numbers of the bridges that
    /// lead to it from the root bus of host bridge number `host`, and its own. What the tree says of the host or of a bridge on
    /// the way is meant for all that is behind it.
    pub fn firmware_regions<'a>(
        &'a self,
        host: usize,
        way: &'a [(u8, u8)],
    ) -> impl Iterator<Item = FirmwareRegion> + 'a {
        let path = self.pcie.get(host).map(|host| host.path.as_str());
        self.reserved.iter().flat_map(move |region| {
            let meant = move |addresses: &&IommuAddresses| path.is_some_and(|path| leads(&addresses.device, path, way));
            region.iommu_addresses.iter().filter(meant).map(move |addresses| firmware_region(region, addresses.range))
        })
    }
}

fn firmware_region(region: &ReservedMemory, iova: IovaRange) -> FirmwareRegion {
    let same = |memory: &&PhysRange| memory.start().get() == iova.start().get() && memory.len() == iova.len();
    FirmwareRegion { iova, memory: region.ranges.iter().find(same).copied() }
}

/// Whether the node at `path` is the host bridge at `host`, or a node below it on `way`.
fn leads(path: &str, host: &str, way: &[(u8, u8)]) -> bool {
    let Some(rest) = path.strip_prefix(host) else { return false };
    if !rest.is_empty() && !rest.starts_with('/') {
        return false;
    }
    let mut way = way.iter();
    rest.split('/').skip(1).all(|name| way.next().is_some_and(|slot| slot_of(name) == Some(*slot)))
}

/// The device and function number in the name of a PCI node: `ethernet@1f,7`, or `ethernet@1f` for function 0.
fn slot_of(name: &str) -> Option<(u8, u8)> {
    let (_, unit) = name.split_once('@')?;
    let (device, function) = unit.split_once(',').unwrap_or((unit, "0"));
    Some((u8::from_str_radix(device, 16).ok()?, u8::from_str_radix(function, 16).ok()?))
}
