//! The interrupt controller as the rest of the kernel sees it.

use crate::distributor::Distributor;
use crate::its::command::Target;
use crate::its::{Event, Its};
use crate::lpi::Lpis;
use crate::redistributor::{self, Redistributor};
use crate::regs::Registers;
use crate::table::{FIRST_LPI, FIRST_SPI, Table};
use crate::{GicError, IntId, Trigger, cpu as interface};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::IrqMutex;
use base::cpu::{self, MAX_CPUS};
use base::irq::Handler;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use iommu::PhysAddr;
use iommu::contract::TableMemory;

/// How urgent an interrupt is; smaller is more urgent. Handlers are not preempted, so this orders what is pending only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(u8);

impl Priority {
    /// For what must not wait behind devices: errors, the timer, other cores.
    pub const URGENT: Self = Self(0x80);
    /// For devices.
    pub const NORMAL: Self = Self(0xa0);
}

/// What one core can tell another by interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Sgi {
    /// Wake from a sleep and look again; needs no handler.
    Kick = 0,
    /// Stop for good; the handler does.
    Stop = 1,
}

/// A region of registers and where the CPU finds it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The registers.
    pub mmio: Mmio,
    /// Their physical address.
    pub phys: PhysAddr,
}

/// An interrupt of a device by message. Give it back with [`Gic::free_msi`]; a dropped one stays allocated.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Msi {
    device: u32,
    event: u32,
    lpi: u32,
    core: usize,
    doorbell: PhysAddr,
}

impl Msi {
    /// Where the device writes to: the doorbell's physical address. Behind an IOMMU it must be mapped for the device.
    pub fn doorbell(&self) -> PhysAddr {
        self.doorbell
    }

    /// What the device writes there: the EventID.
    pub fn data(&self) -> u32 {
        self.event
    }

    /// The DeviceID by which the ITS knows the device.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// The interrupt that it becomes.
    pub fn lpi(&self) -> u32 {
        self.lpi
    }

    /// The core that takes it.
    pub fn core(&self) -> usize {
        self.core
    }

    fn event(&self) -> Event {
        Event { device: self.device, event: self.event }
    }
}

/// How many interrupts found nobody to serve them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stray {
    /// Nothing was pending when an interrupt was acknowledged: it had been withdrawn.
    pub spurious: u64,
    /// The interrupt had no handler; it was disabled.
    pub unknown: u64,
}

/// What LPIs need.
struct Messages {
    lpis: Lpis,
    its: Its,
}

/// A GICv3: distributor, redistributors, and an ITS if there is one.
pub struct Gic {
    distributor: Distributor,
    redistributors: Vec<Redistributor>,
    messages: Option<Messages>,
    table: Table,
    /// By core: the index of its redistributor plus one, or 0 before `init_core`.
    cores: [AtomicUsize; MAX_CPUS],
    /// Trigger and priority of the private interrupts that are enabled. The lock also guards their registers.
    private: IrqMutex<[Option<(Trigger, Priority)>; FIRST_SPI as usize]>,
    spurious: AtomicU64,
    unknown: AtomicU64,
}

impl Gic {
    /// Resets the interrupt controller. `redistributors` are the regions of the device tree; `its` the ITS's registers, if the
    /// machine has one. Tables come from `memory`.
    ///
    /// # Errors
    ///
    /// What the hardware lacks or does not do. An ITS without physical LPIs counts as none.
    ///
    /// # Safety
    ///
    /// The windows are those of one GIC, and nothing else accesses them from here on.
    pub unsafe fn new(
        distributor: Mmio,
        redistributors: &[Region],
        its: Option<Region>,
        memory: &'static dyn TableMemory,
    ) -> Result<Self, GicError> {
        let mut found = Vec::new();
        for region in redistributors {
            redistributor::find(region.mmio, region.phys, &mut found)?;
        }
        if its.is_some_and(|its| its.mmio.len() < 0x1_0000) {
            return Err(GicError::WindowTooSmall("ITS"));
        }
        let its = its.map(|its| (Box::new(its.mmio) as Box<dyn Registers>, its.phys));
        // SAFETY: the window is a distributor's and ours alone (caller).
        unsafe { Self::from_parts(distributor, found, its, memory) }
    }

    /// As [`Gic::new`], with redistributors and ITS behind any kind of registers.
    ///
    /// # Safety
    ///
    /// As [`Gic::new`], for the distributor.
    pub(crate) unsafe fn from_parts(
        distributor: Mmio,
        redistributors: Vec<Redistributor>,
        its: Option<(Box<dyn Registers>, PhysAddr)>,
        memory: &'static dyn TableMemory,
    ) -> Result<Self, GicError> {
        // SAFETY: the caller's promise.
        let distributor = unsafe { Distributor::new(distributor) }?;
        let messages = match (distributor.lpi_id_bits(), its) {
            (Some(id_bits), Some((regs, phys))) => match Its::new(regs, phys, memory, MAX_CPUS as u64) {
                Ok(its) => Some(Messages { lpis: Lpis::new(memory, id_bits, Priority::NORMAL.0)?, its }),
                Err(GicError::NoMsi) => None,
                Err(error) => return Err(error),
            },
            _ => None,
        };
        let lpis = messages.as_ref().map_or(0, |messages| messages.lpis.count());
        Ok(Self {
            table: Table::new(distributor.limit(), lpis)?,
            distributor,
            redistributors,
            messages,
            cores: [const { AtomicUsize::new(0) }; MAX_CPUS],
            private: IrqMutex::new([None; FIRST_SPI as usize]),
            spurious: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }

    /// Lets the calling core take interrupts. Every core calls it once, with interrupts masked.
    ///
    /// # Errors
    ///
    /// [`GicError::NoRedistributor`], or what its redistributor or the ITS did not do.
    pub fn init_core(&self) -> Result<(), GicError> {
        let affinity = interface::affinity();
        let core = cpu::index();
        let found = self.redistributors.iter().enumerate().find(|(_, each)| each.affinity() == affinity);
        let (index, redistributor) = found.ok_or(GicError::NoRedistributor(affinity))?;
        if affinity & 0xff >= 16 {
            // A software generated interrupt names 16 cores at once; more need a range selector, which is optional.
            return Err(GicError::Unsupported("software generated interrupts to this core's affinity"));
        }
        redistributor.init(Priority::URGENT.0)?;
        if let Some(Messages { lpis, its }) = &self.messages {
            let pending = lpis.new_pending_table()?;
            if !redistributor.enable_lpis(lpis.properties(), pending, lpis.id_bits())? {
                log::warn!("core {core}: the redistributor does not snoop the caches");
            }
            its.map_collection(core as u16, its.target(redistributor.phys(), redistributor.number()))?;
        }
        interface::enable();
        {
            let private = self.private.lock();
            for sgi in [Sgi::Kick, Sgi::Stop] {
                redistributor.enable(sgi as u32, Trigger::Edge, Priority::URGENT.0);
            }
            for (id, wanted) in (0..FIRST_SPI).zip(private.iter()) {
                if let Some((trigger, priority)) = wanted {
                    redistributor.enable(id, *trigger, priority.0);
                }
            }
            // Under the lock: a private interrupt that is enabled later finds this core.
            if let Some(slot) = self.cores.get(core) {
                slot.store(index + 1, Ordering::Release);
            }
        }
        Ok(())
    }

    fn redistributor(&self, core: usize) -> Result<&Redistributor, GicError> {
        let index = self.cores.get(core).map_or(0, |slot| slot.load(Ordering::Acquire));
        let found = index.checked_sub(1).and_then(|index| self.redistributors.get(index));
        found.ok_or(GicError::CoreOffline(core))
    }

    /// Gives an SPI or a private interrupt a handler, and enables it. An SPI goes to the calling core; a private interrupt is
    /// enabled on every core that is up or comes up.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`], [`GicError::InUse`], [`GicError::CoreOffline`].
    pub fn enable(
        &self,
        id: IntId,
        trigger: Trigger,
        priority: Priority,
        handler: Arc<dyn Handler>,
    ) -> Result<(), GicError> {
        let id = id.raw_value();
        if id >= self.distributor.limit() {
            return Err(GicError::NoSuchInterrupt(id));
        }
        let affinity = self.redistributor(cpu::index())?.affinity();
        self.table.set(id, handler)?;
        if id >= FIRST_SPI {
            return self.distributor.enable(id, trigger, priority.0, affinity).inspect_err(|_| {
                // It was never enabled, so that nothing runs the handler.
                if let Err(error) = self.table.clear(id) {
                    log::error!("interrupt {id}: {error}");
                }
            });
        }
        let mut private = self.private.lock();
        if let Some(slot) = private.get_mut(id as usize) {
            *slot = Some((trigger, priority));
        }
        for core in 0..MAX_CPUS {
            if let Ok(redistributor) = self.redistributor(core) {
                redistributor.enable(id, trigger, priority.0);
            }
        }
        Ok(())
    }

    /// Disables an SPI or a private interrupt and drops its handler. On `Ok` the handler does not run and will not run again.
    /// Not to be called from a handler.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`]; [`GicError::TimedOut`] if the handler does not return.
    pub fn disable(&self, id: IntId) -> Result<(), GicError> {
        let id = id.raw_value();
        if id >= FIRST_LPI {
            return Err(GicError::NoSuchInterrupt(id));
        }
        self.silence(id);
        if let Some(slot) = self.private.lock().get_mut(id as usize) {
            *slot = None;
        }
        self.table.clear(id)
    }

    /// Routes an SPI to another core.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`], [`GicError::CoreOffline`].
    pub fn route(&self, id: IntId, core: usize) -> Result<(), GicError> {
        self.distributor.route(id.raw_value(), self.redistributor(core)?.affinity())
    }

    /// Stops an interrupt at its source in the interrupt controller. May be called from a handler.
    fn silence(&self, id: u32) {
        if id < FIRST_SPI {
            for core in 0..MAX_CPUS {
                if let Ok(redistributor) = self.redistributor(core) {
                    redistributor.disable(id);
                }
            }
        } else if id < FIRST_LPI {
            // Only an ID that the distributor does not have is refused, and such a one is silent already.
            let _ = self.distributor.disable(id);
        } else if let Some(Messages { lpis, its }) = &self.messages {
            lpis.set_enabled(id, false);
            its.invalidate_soon(cpu::index() as u16);
        }
    }

    /// Serves one interrupt. For the IRQ exception, with interrupts masked; one that is pending after it is taken next.
    pub fn irq_entry(&self) {
        let id = interface::acknowledge();
        if (1020..=1023).contains(&id) {
            self.spurious.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if !self.table.dispatch(id) && id != Sgi::Kick as u32 {
            self.unknown.fetch_add(1, Ordering::Relaxed);
            self.silence(id);
        }
        interface::end(id);
    }

    /// How many interrupts found nobody to serve them.
    pub fn stray(&self) -> Stray {
        Stray { spurious: self.spurious.load(Ordering::Relaxed), unknown: self.unknown.load(Ordering::Relaxed) }
    }

    /// Interrupts every core whose bit is set in `cores` and that is up. May be called from a handler.
    pub fn send(&self, sgi: Sgi, cores: u64) {
        for core in (0..MAX_CPUS).filter(|core| cores & 1 << core != 0) {
            if let Ok(redistributor) = self.redistributor(core) {
                interface::send_sgi(sgi as u32, redistributor.affinity());
            }
        }
    }

    /// Wakes cores from their sleep: [`Sgi::Kick`].
    pub fn kick(&self, cores: u64) {
        self.send(Sgi::Kick, cores);
    }

    /// Sets what a core does when another sends it `sgi`.
    ///
    /// # Errors
    ///
    /// [`GicError::InUse`].
    pub fn set_sgi_handler(&self, sgi: Sgi, handler: Arc<dyn Handler>) -> Result<(), GicError> {
        self.table.set(sgi as u32, handler)
    }

    /// Whether devices can interrupt by message.
    pub fn has_msi(&self) -> bool {
        self.messages.is_some()
    }

    /// The page of registers that a device writes its messages to: what must be mapped for it behind an IOMMU.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`].
    pub fn doorbell(&self) -> Result<PhysAddr, GicError> {
        Ok(self.messages()?.its.doorbell())
    }

    fn messages(&self) -> Result<&Messages, GicError> {
        self.messages.as_ref().ok_or(GicError::NoMsi)
    }

    fn target(&self, its: &Its, core: usize) -> Result<Target, GicError> {
        let redistributor = self.redistributor(core)?;
        Ok(its.target(redistributor.phys(), redistributor.number()))
    }

    /// Allocates `count` interrupts for the device that the ITS knows as `device`, taken by `core`. Their data are consecutive,
    /// the first aligned to `count` rounded up to a power of two. They are disabled until [`Gic::enable_msi`].
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::NoSuchDevice`], [`GicError::NoEvent`], [`GicError::NoLpi`],
    /// [`GicError::CoreOffline`], [`GicError::OutOfMemory`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails, after
    /// which the numbers concerned are not used again.
    pub fn allocate_msi(&self, device: u32, count: usize, core: usize) -> Result<Vec<Msi>, GicError> {
        let Messages { lpis, its } = self.messages()?;
        let target = self.target(its, core)?;
        let (mut numbers, mut messages) = (Vec::new(), Vec::new());
        numbers.try_reserve_exact(count).map_err(|_| GicError::OutOfMemory)?;
        messages.try_reserve_exact(count).map_err(|_| GicError::OutOfMemory)?;
        let give_back = |numbers: &[u32]| numbers.iter().for_each(|lpi| lpis.give_back(*lpi));
        for _ in 0..count {
            match lpis.take() {
                Ok(lpi) => numbers.push(lpi),
                Err(error) => {
                    give_back(&numbers);
                    return Err(error);
                }
            }
        }
        let first = its.map(device, &numbers, core as u16, target).map_err(|failed| {
            if failed.clean {
                give_back(&numbers);
            }
            failed.error
        })?;
        let doorbell = its.doorbell();
        messages.extend((first..).zip(&numbers).map(|(event, lpi)| Msi { device, event, lpi: *lpi, core, doorbell }));
        Ok(messages)
    }

    /// Gives a message its handler and enables it.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::InUse`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails, the message being
    /// without a handler then.
    pub fn enable_msi(&self, msi: &Msi, handler: Arc<dyn Handler>) -> Result<(), GicError> {
        let Messages { lpis, its } = self.messages()?;
        let target = self.target(its, msi.core)?;
        self.table.set(msi.lpi, handler)?;
        lpis.set_enabled(msi.lpi, true);
        its.invalidate(msi.event(), target).inspect_err(|_| {
            lpis.set_enabled(msi.lpi, false);
            if let Err(error) = self.table.clear(msi.lpi) {
                log::error!("LPI {}: {error}", msi.lpi);
            }
        })
    }

    /// Has another core take a message.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::CoreOffline`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails.
    pub fn route_msi(&self, msi: &mut Msi, core: usize) -> Result<(), GicError> {
        let Messages { its, .. } = self.messages()?;
        let (from, to) = (self.target(its, msi.core)?, self.target(its, core)?);
        its.move_to(msi.event(), from, core as u16, to)?;
        msi.core = core;
        Ok(())
    }

    /// Takes a message back. On `Ok` its handler does not run and will not run again, and its EventID and LPI can be given out
    /// again. Not to be called from a handler.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS or a handler does not answer: neither number
    /// is used again.
    pub fn free_msi(&self, msi: Msi) -> Result<(), GicError> {
        let Messages { lpis, its } = self.messages()?;
        let target = self.target(its, msi.core)?;
        lpis.set_enabled(msi.lpi, false);
        its.unmap(msi.event(), target)?;
        self.table.clear(msi.lpi)?;
        lpis.give_back(msi.lpi);
        Ok(())
    }
}
