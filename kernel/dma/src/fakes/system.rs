//! All fakes together: a machine in which drivers can be tested.

#![expect(unsafe_code, reason = "makes devices, of whose bus masters it knows all there is to know")]

use super::{FakeBusMaster, FakeIommu, FakeMemory, FakeMemoryConfig};
use crate::{Device, DeviceConfig, Error, Limits, Policy};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use iommu::contract::Iommu;
use iommu::domain::{Domain, DomainKind};
use iommu::group::Group;
use iommu::{Iova, IovaRange, StreamId};

/// A machine: memory, an IOMMU, and as many devices as a test wants.
pub struct FakeSystem {
    /// The memory.
    pub memory: &'static FakeMemory,
    /// The IOMMU.
    pub iommu: Arc<FakeIommu>,
    next_stream: AtomicU32,
}

/// A device of a [`FakeSystem`], and the hands that move it.
pub struct FakeDevice {
    /// What its driver gets.
    pub device: Device,
    /// What it does.
    pub master: FakeBusMaster,
    /// Its group, attached to its default domain.
    pub group: Arc<Group>,
    /// Its default domain.
    pub domain: Arc<Domain>,
}

impl Default for FakeSystem {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeSystem {
    /// Makes a machine whose devices snoop the caches.
    pub fn new() -> Self {
        Self::with_memory(FakeMemoryConfig::default())
    }

    /// Makes a machine whose devices see only what reached memory.
    pub fn non_coherent() -> Self {
        Self::with_memory(FakeMemoryConfig { snooped: false, ..FakeMemoryConfig::default() })
    }

    /// Makes a machine with this memory.
    pub fn with_memory(config: FakeMemoryConfig) -> Self {
        Self::with_iommu(config, FakeIommu::new("fake-iommu"))
    }

    /// Makes a machine whose devices snoop the caches, and whose address spaces are real tables ([`FakeIommu::with_tables`]).
    pub fn with_tables() -> Self {
        Self::with_iommu(FakeMemoryConfig::default(), FakeIommu::with_tables("fake-iommu"))
    }

    fn with_iommu(config: FakeMemoryConfig, iommu: Arc<FakeIommu>) -> Self {
        Self { memory: FakeMemory::new(config), iommu, next_stream: AtomicU32::new(1) }
    }

    /// Adds a device without limits, in a domain of its own.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    pub fn device(&self, name: &str) -> Result<FakeDevice, Error> {
        self.device_with(name, Limits::NONE)
    }

    /// Adds a device with limits, in a domain of its own.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    pub fn device_with(&self, name: &str, limits: Limits) -> Result<FakeDevice, Error> {
        self.device_with_policy(name, limits, Policy::default())
    }

    /// Adds a device with limits, in a domain of its own, that is treated as `policy` says.
    ///
    /// # Errors
    ///
    /// As [`Device::with_policy`].
    pub fn device_with_policy(&self, name: &str, limits: Limits, policy: Policy) -> Result<FakeDevice, Error> {
        self.make(name, limits, policy, self.memory.is_snooped())
    }

    /// Adds a device without limits, in a domain of its own, that snoops the caches whether others do or not.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    pub fn snooping_device(&self, name: &str) -> Result<FakeDevice, Error> {
        let made = self.make(name, Limits::NONE, Policy::default(), true)?;
        Ok(FakeDevice { master: made.master.snooping(), ..made })
    }

    fn make(&self, name: &str, limits: Limits, policy: Policy, coherent: bool) -> Result<FakeDevice, Error> {
        let stream = StreamId::new(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let iommu: Arc<dyn Iommu> = self.iommu.clone();
        let space = iommu.create()?;
        let window = IovaRange::new(Iova::new(0), 1 << 48).unwrap_or_default();
        let domain = Arc::new(Domain::new(DomainKind::Dma, space, window)?);
        let group = Arc::new(Group::new(iommu, alloc::vec![stream]));
        group.attach_default(domain.clone())?;
        let config = DeviceConfig { name, group: group.clone(), limits, coherent, memory: self.memory };
        // SAFETY: the one bus master is the stream of the group, which the fake translates, and it snoops if the memory's bus
        // does, or it is made to; it does what a test lets it do.
        let device = unsafe { Device::with_policy(config, policy) }?;
        let master = FakeBusMaster::new(self.iommu.clone(), self.memory, stream);
        Ok(FakeDevice { device, master, group, domain })
    }
}
