//! The interrupt controller as the rest of the kernel sees it.

use crate::distributor::Distributor;
use crate::frame::{Frame, FrameConfig};
use crate::its::command::Target;
use crate::its::{Event, Its};
use crate::lpi::Lpis;
use crate::redistributor::{self, Redistributor};
use crate::regs::Registers;
use crate::table::{FIRST_LPI, FIRST_SPI, Table};
use crate::v2::{self, GicV2};
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

/// What turns a device's messages into interrupts, and the name by which it knows the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The ITS.
    Its {
        /// The DeviceID.
        device: u32,
    },
    /// The message frame of this number, in the order in which they were given to the driver. It knows no devices.
    Frame(usize),
}

/// An interrupt of a device by message. Give it back with [`Gic::free_msi`]; a dropped one stays allocated.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Msi {
    source: Source,
    data: u32,
    interrupt: u32,
    core: usize,
    doorbell: PhysAddr,
}

impl Msi {
    /// Where the device writes to: the doorbell's physical address. Behind an IOMMU it must be mapped for the device.
    pub fn doorbell(&self) -> PhysAddr {
        self.doorbell
    }

    /// What the device writes there: the EventID for an ITS, the interrupt ID for a frame.
    pub fn data(&self) -> u32 {
        self.data
    }

    /// Who turns it into an interrupt.
    pub fn source(&self) -> Source {
        self.source
    }

    /// The interrupt that it becomes: an LPI or an SPI.
    pub fn interrupt(&self) -> u32 {
        self.interrupt
    }

    /// The core that takes it.
    pub fn core(&self) -> usize {
        self.core
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

/// The controller itself.
enum Controller {
    V3 { distributor: Distributor, redistributors: Vec<Redistributor> },
    V2(GicV2),
}

impl Controller {
    /// The first interrupt ID after the SPIs.
    fn limit(&self) -> u32 {
        match self {
            Self::V3 { distributor, .. } => distributor.limit(),
            Self::V2(v2) => v2.limit(),
        }
    }
}

/// A GICv3 or GICv2 with what turns messages into interrupts, if there is anything.
pub struct Gic {
    controller: Controller,
    messages: Option<Messages>,
    frames: Vec<Frame>,
    table: Table,
    /// By core, 0 before `init_core`: the index of its redistributor plus one; of a GICv2, the core's bit in masks of targets.
    cores: [AtomicUsize; MAX_CPUS],
    /// Trigger and priority of the private interrupts that are enabled. Of a GICv3, the lock also guards their registers.
    private: IrqMutex<[Option<(Trigger, Priority)>; FIRST_SPI as usize]>,
    /// Of a GICv2, a bit for each core that has not yet heard that `private` has changed.
    behind: AtomicU64,
    spurious: AtomicU64,
    unknown: AtomicU64,
}

const _: () = assert!(MAX_CPUS <= 64);

impl Gic {
    /// Resets a GICv3. `redistributors` are the regions of the device tree; `its` the ITS's registers, if the machine has one;
    /// `frames` its message frames. Tables come from `memory`.
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
        frames: &[FrameConfig],
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
        unsafe { Self::from_parts(distributor, found, its, memory) }?.with_frames(frames)
    }

    /// Resets a GICv2, which has this CPU interface. `frames` are its message frames.
    ///
    /// # Errors
    ///
    /// What the hardware lacks or does not do.
    ///
    /// # Safety
    ///
    /// As for [`Gic::new`].
    pub unsafe fn new_v2(distributor: Mmio, interface: Mmio, frames: &[FrameConfig]) -> Result<Self, GicError> {
        if distributor.len() < v2::WINDOW {
            return Err(GicError::WindowTooSmall("distributor"));
        }
        if interface.len() < v2::WINDOW {
            return Err(GicError::WindowTooSmall("CPU interface"));
        }
        let v2 = GicV2::new(Box::new(distributor), Box::new(interface))?;
        Self::of_v2(v2)?.with_frames(frames)
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
        Self::with_controller(Controller::V3 { distributor, redistributors }, messages)
    }

    pub(crate) fn of_v2(v2: GicV2) -> Result<Self, GicError> {
        Self::with_controller(Controller::V2(v2), None)
    }

    fn with_controller(controller: Controller, messages: Option<Messages>) -> Result<Self, GicError> {
        let lpis = messages.as_ref().map_or(0, |messages| messages.lpis.count());
        Ok(Self {
            table: Table::new(controller.limit(), lpis)?,
            controller,
            messages,
            frames: Vec::new(),
            cores: [const { AtomicUsize::new(0) }; MAX_CPUS],
            private: IrqMutex::new([None; FIRST_SPI as usize]),
            behind: AtomicU64::new(0),
            spurious: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }

    fn with_frames(mut self, frames: &[FrameConfig]) -> Result<Self, GicError> {
        for FrameConfig { region, first, count } in frames {
            if region.mmio.len() < 0x1000 {
                return Err(GicError::WindowTooSmall("MSI frame"));
            }
            self.add_frame(&region.mmio, region.phys, *first, *count)?;
        }
        Ok(self)
    }

    pub(crate) fn add_frame(
        &mut self,
        regs: &dyn Registers,
        phys: PhysAddr,
        first: Option<u32>,
        count: Option<u32>,
    ) -> Result<(), GicError> {
        let frame = Frame::new(regs, phys, first, count, self.controller.limit())?;
        self.frames.try_reserve(1).map_err(|_| GicError::OutOfMemory)?;
        self.frames.push(frame);
        Ok(())
    }

    /// Lets the calling core take interrupts. Every core calls it once, with interrupts masked.
    ///
    /// # Errors
    ///
    /// [`GicError::NoRedistributor`], or what its redistributor or the ITS did not do.
    pub fn init_core(&self) -> Result<(), GicError> {
        match &self.controller {
            Controller::V3 { redistributors, .. } => self.init_core_v3(redistributors),
            Controller::V2(v2) => {
                let own = v2.init_core(Priority::URGENT.0)?;
                self.enter(usize::from(own), |id, trigger, priority| v2.enable_private(id, trigger, priority.0));
                Ok(())
            }
        }
    }

    fn init_core_v3(&self, redistributors: &[Redistributor]) -> Result<(), GicError> {
        let affinity = interface::affinity();
        let core = cpu::index();
        let found = redistributors.iter().enumerate().find(|(_, each)| each.affinity() == affinity);
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
        self.enter(index + 1, |id, trigger, priority| redistributor.enable(id, trigger, priority.0));
        Ok(())
    }

    /// Enables the calling core's private interrupts with `enable`, and makes it known under `name`.
    fn enter(&self, name: usize, enable: impl Fn(u32, Trigger, Priority)) {
        let private = self.private.lock();
        for sgi in [Sgi::Kick, Sgi::Stop] {
            enable(sgi as u32, Trigger::Edge, Priority::URGENT);
        }
        for (id, wanted) in (0..FIRST_SPI).zip(private.iter()) {
            if let Some((trigger, priority)) = wanted {
                enable(id, *trigger, *priority);
            }
        }
        // Under the lock: a private interrupt that is enabled later finds this core.
        if let Some(slot) = self.cores.get(cpu::index()) {
            slot.store(name, Ordering::Release);
        }
    }

    /// What [`Gic::enter`] has noted of a core that is up.
    fn core(&self, core: usize) -> Result<usize, GicError> {
        let name = self.cores.get(core).map_or(0, |slot| slot.load(Ordering::Acquire));
        if name == 0 { Err(GicError::CoreOffline(core)) } else { Ok(name) }
    }

    fn redistributor(&self, core: usize) -> Result<&Redistributor, GicError> {
        let Controller::V3 { redistributors, .. } = &self.controller else { return Err(GicError::CoreOffline(core)) };
        redistributors.get(self.core(core)? - 1).ok_or(GicError::CoreOffline(core))
    }

    /// The core's bit in a GICv2's masks of targets.
    fn target_bit(&self, core: usize) -> Result<u8, GicError> {
        Ok(self.core(core)? as u8)
    }

    /// Gives an SPI or a private interrupt a handler, and enables it. An SPI goes to the calling core; a private interrupt is
    /// enabled on every core that is up or comes up (on other cores of a GICv2 a moment after this returns).
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
        if id >= self.controller.limit() {
            return Err(GicError::NoSuchInterrupt(id));
        }
        self.core(cpu::index())?;
        if id >= FIRST_SPI {
            self.frames.iter().try_for_each(|frame| frame.withdraw(id))?;
        }
        self.table.set(id, handler)?;
        if id >= FIRST_SPI {
            return self.enable_spi(id, trigger, priority, cpu::index());
        }
        let mut private = self.private.lock();
        if let Some(slot) = private.get_mut(id as usize) {
            *slot = Some((trigger, priority));
        }
        match &self.controller {
            Controller::V3 { .. } => {
                for core in 0..MAX_CPUS {
                    if let Ok(redistributor) = self.redistributor(core) {
                        redistributor.enable(id, trigger, priority.0);
                    }
                }
            }
            Controller::V2(v2) => {
                v2.enable_private(id, trigger, priority.0);
                drop(private);
                self.tell_others();
            }
        }
        Ok(())
    }

    /// Enables an SPI that has a handler, which it loses where that fails.
    fn enable_spi(&self, id: u32, trigger: Trigger, priority: Priority, core: usize) -> Result<(), GicError> {
        let enabled = match &self.controller {
            Controller::V3 { distributor, .. } => self
                .redistributor(core)
                .and_then(|redistributor| distributor.enable(id, trigger, priority.0, redistributor.affinity())),
            Controller::V2(v2) => self.target_bit(core).and_then(|target| v2.enable(id, trigger, priority.0, target)),
        };
        enabled.inspect_err(|_| {
            // It was never enabled, so that nothing runs the handler.
            if let Err(error) = self.table.clear(id) {
                log::error!("interrupt {id}: {error}");
            }
        })
    }

    /// Has the other cores of a GICv2 look at `private` again.
    fn tell_others(&self) {
        let others = !(1 << cpu::index());
        self.behind.fetch_or(others, Ordering::SeqCst);
        self.kick(others);
    }

    /// Sets this core's private interrupts of a GICv2 as they are meant to be, if that has changed.
    fn catch_up(&self, v2: &GicV2) {
        let me = 1 << cpu::index();
        if self.behind.load(Ordering::SeqCst) & me == 0 {
            return;
        }
        self.behind.fetch_and(!me, Ordering::SeqCst);
        let private = self.private.lock();
        for (id, wanted) in (0..FIRST_SPI).zip(private.iter()).skip(16) {
            match wanted {
                Some((trigger, priority)) => v2.enable_private(id, *trigger, priority.0),
                None => v2.silence(id),
            }
        }
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
        if id < FIRST_SPI && matches!(self.controller, Controller::V2(_)) {
            self.tell_others();
        }
        self.table.clear(id)
    }

    /// Masks an SPI, which keeps its handler. May be called from a handler.
    pub fn mask(&self, id: IntId) {
        self.silence(id.raw_value());
    }

    /// Lets an SPI through again that was masked.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`].
    pub fn unmask(&self, id: IntId) -> Result<(), GicError> {
        match &self.controller {
            Controller::V3 { distributor, .. } => distributor.unmask(id.raw_value()),
            Controller::V2(v2) => v2.unmask(id.raw_value()),
        }
    }

    /// Routes an SPI to another core.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`], [`GicError::CoreOffline`].
    pub fn route(&self, id: IntId, core: usize) -> Result<(), GicError> {
        self.route_spi(id.raw_value(), core)
    }

    fn route_spi(&self, id: u32, core: usize) -> Result<(), GicError> {
        match &self.controller {
            Controller::V3 { distributor, .. } => distributor.route(id, self.redistributor(core)?.affinity()),
            Controller::V2(v2) => v2.route(id, self.target_bit(core)?),
        }
    }

    /// Stops an interrupt at its source in the interrupt controller. May be called from a handler.
    fn silence(&self, id: u32) {
        match &self.controller {
            // Only the calling core's, if it is a private one: others find out for themselves that nobody serves theirs.
            Controller::V2(v2) => v2.silence(id),
            Controller::V3 { distributor, .. } => {
                if id < FIRST_SPI {
                    for core in 0..MAX_CPUS {
                        if let Ok(redistributor) = self.redistributor(core) {
                            redistributor.disable(id);
                        }
                    }
                } else if id < FIRST_LPI {
                    // Only an ID that the distributor does not have is refused, and such a one is silent already.
                    let _ = distributor.disable(id);
                } else if let Some(Messages { lpis, its }) = &self.messages {
                    lpis.set_enabled(id, false);
                    its.invalidate_soon(cpu::index() as u16);
                }
            }
        }
    }

    /// Serves one interrupt. For the IRQ exception, with interrupts masked; one that is pending after it is taken next.
    pub fn irq_entry(&self) {
        match &self.controller {
            Controller::V3 { .. } => {
                let id = interface::acknowledge();
                if self.serve(id) {
                    interface::end(id);
                }
            }
            Controller::V2(v2) => {
                let taken = v2.acknowledge();
                let id = GicV2::id(taken);
                if id == Sgi::Kick as u32 {
                    self.catch_up(v2);
                }
                if self.serve(id) {
                    v2.end(taken);
                }
            }
        }
    }

    /// Calls the handler of an interrupt that was acknowledged. Says whether there was an interrupt, which has to be ended.
    #[inline]
    fn serve(&self, id: u32) -> bool {
        if (1020..=1023).contains(&id) {
            self.spurious.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        if !self.table.dispatch(id) && id != Sgi::Kick as u32 {
            self.unknown.fetch_add(1, Ordering::Relaxed);
            self.silence(id);
        }
        true
    }

    /// How many interrupts found nobody to serve them.
    pub fn stray(&self) -> Stray {
        Stray { spurious: self.spurious.load(Ordering::Relaxed), unknown: self.unknown.load(Ordering::Relaxed) }
    }

    /// Interrupts every core whose bit is set in `cores` and that is up. May be called from a handler.
    pub fn send(&self, sgi: Sgi, cores: u64) {
        let chosen = (0..MAX_CPUS).filter(|core| cores & 1 << core != 0);
        match &self.controller {
            Controller::V3 { .. } => {
                for core in chosen {
                    if let Ok(redistributor) = self.redistributor(core) {
                        interface::send_sgi(sgi as u32, redistributor.affinity());
                    }
                }
            }
            Controller::V2(v2) => {
                let targets = chosen.filter_map(|core| self.target_bit(core).ok()).fold(0, |all, one| all | one);
                if targets != 0 {
                    v2.send_sgi(sgi as u32, targets);
                }
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
        self.messages.is_some() || !self.frames.is_empty()
    }

    /// Whether `source` has `count` interrupts left to give, which it may lose to others.
    pub fn can_allocate(&self, source: Source, count: usize) -> bool {
        match source {
            Source::Its { .. } => self.messages.is_some(),
            Source::Frame(number) => self.frames.get(number).is_some_and(|frame| frame.free() >= count),
        }
    }

    /// The register that a device writes its messages for `source` to: its page is what must be mapped for the device behind an
    /// IOMMU.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`].
    pub fn doorbell(&self, source: Source) -> Result<PhysAddr, GicError> {
        match source {
            Source::Its { .. } => Ok(self.messages()?.its.doorbell()),
            Source::Frame(number) => Ok(self.frame(number)?.doorbell()),
        }
    }

    fn messages(&self) -> Result<&Messages, GicError> {
        self.messages.as_ref().ok_or(GicError::NoMsi)
    }

    fn frame(&self, number: usize) -> Result<&Frame, GicError> {
        self.frames.get(number).ok_or(GicError::NoMsi)
    }

    fn target(&self, its: &Its, core: usize) -> Result<Target, GicError> {
        let redistributor = self.redistributor(core)?;
        Ok(its.target(redistributor.phys(), redistributor.number()))
    }

    /// Allocates `count` interrupts from `source`, taken by `core`. Their data are consecutive, the first aligned to `count` rounded
    /// up to a power of two. They are disabled until [`Gic::enable_msi`].
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::NoSuchDevice`], [`GicError::NoEvent`], [`GicError::NoLpi`], [`GicError::NoSpi`],
    /// [`GicError::CoreOffline`], [`GicError::OutOfMemory`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails, after
    /// which the numbers concerned are not used again.
    pub fn allocate_msi(&self, source: Source, count: usize, core: usize) -> Result<Vec<Msi>, GicError> {
        match source {
            Source::Its { device } => self.allocate_event(device, count, core),
            Source::Frame(number) => {
                let frame = self.frame(number)?;
                self.core(core)?;
                let mut messages = Vec::new();
                messages.try_reserve_exact(count).map_err(|_| GicError::OutOfMemory)?;
                let doorbell = frame.doorbell();
                let spis = frame.take(count)?;
                messages.extend(spis.map(|spi| Msi { source, data: spi, interrupt: spi, core, doorbell }));
                Ok(messages)
            }
        }
    }

    fn allocate_event(&self, device: u32, count: usize, core: usize) -> Result<Vec<Msi>, GicError> {
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
        let (source, doorbell) = (Source::Its { device }, its.doorbell());
        let pairs = (first..).zip(&numbers);
        messages.extend(pairs.map(|(data, lpi)| Msi { source, data, interrupt: *lpi, core, doorbell }));
        Ok(messages)
    }

    /// Gives a message its handler and enables it.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::InUse`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails, the message being
    /// without a handler then.
    pub fn enable_msi(&self, msi: &Msi, handler: Arc<dyn Handler>) -> Result<(), GicError> {
        let Source::Its { device } = msi.source else {
            self.table.set(msi.interrupt, handler)?;
            // A frame's SPI is a pulse.
            return self.enable_spi(msi.interrupt, Trigger::Edge, Priority::NORMAL, msi.core);
        };
        let Messages { lpis, its } = self.messages()?;
        let target = self.target(its, msi.core)?;
        self.table.set(msi.interrupt, handler)?;
        lpis.set_enabled(msi.interrupt, true);
        its.invalidate(Event { device, event: msi.data }, target).inspect_err(|_| {
            lpis.set_enabled(msi.interrupt, false);
            if let Err(error) = self.table.clear(msi.interrupt) {
                log::error!("LPI {}: {error}", msi.interrupt);
            }
        })
    }

    /// Has another core take a message.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`], [`GicError::CoreOffline`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS fails.
    pub fn route_msi(&self, msi: &mut Msi, core: usize) -> Result<(), GicError> {
        if let Source::Its { device } = msi.source {
            let Messages { its, .. } = self.messages()?;
            let (from, to) = (self.target(its, msi.core)?, self.target(its, core)?);
            its.move_to(Event { device, event: msi.data }, from, core as u16, to)?;
        } else {
            self.route_spi(msi.interrupt, core)?;
        }
        msi.core = core;
        Ok(())
    }

    /// Takes a message back. On `Ok` its handler does not run and will not run again, and its numbers can be given out again. Not to
    /// be called from a handler.
    ///
    /// # Errors
    ///
    /// [`GicError::NoMsi`]; [`GicError::TimedOut`] or [`GicError::Dead`] if the ITS or a handler does not answer: the numbers are not
    /// used again.
    pub fn free_msi(&self, msi: Msi) -> Result<(), GicError> {
        match msi.source {
            Source::Its { device } => {
                let Messages { lpis, its } = self.messages()?;
                let target = self.target(its, msi.core)?;
                lpis.set_enabled(msi.interrupt, false);
                its.unmap(Event { device, event: msi.data }, target)?;
                self.table.clear(msi.interrupt)?;
                lpis.give_back(msi.interrupt);
            }
            Source::Frame(number) => {
                let frame = self.frame(number)?;
                self.silence(msi.interrupt);
                self.table.clear(msi.interrupt)?;
                // What came in after the handler had gone is not the next owner's.
                match &self.controller {
                    Controller::V3 { distributor, .. } => distributor.forget(msi.interrupt)?,
                    Controller::V2(v2) => v2.forget(msi.interrupt),
                }
                frame.give_back(msi.interrupt);
            }
        }
        Ok(())
    }
}
