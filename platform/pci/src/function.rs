//! A function, as drivers hold it.
//!
//! # Locking
//!
//! [`Function`] may be used from several cores. Its Command register is read, changed and written under the function's own
//! lock (`control`); a bridge's lock is taken after that of what is behind it, never before. No lock is held across a wait.

use crate::bar::{Bar, Bars};
use crate::caps::{Capability, ExtendedCapability, PortType, id};
use crate::config::{Command, Config, Width, reg};
use crate::scan::Ids;
use crate::{Attached, Bdf, PciEnv, PciError, RequesterId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::{Deadline, IrqMutex};
use core::fmt;

/// How long transactions may stay pending after bus mastering was disabled. PCI Express bounds a completion timeout far below.
const PENDING_MILLIS: u64 = 200;

const DEVICE_STATUS: u16 = 0x0a;
const TRANSACTIONS_PENDING: u16 = 1 << 5;

/// The pin by which a function without messages interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptPin {
    /// INTA.
    A,
    /// INTB.
    B,
    /// INTC.
    C,
    /// INTD.
    D,
}

impl InterruptPin {
    /// As configuration space and device trees have it: INTA is 1.
    pub const fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
            Self::C => 3,
            Self::D => 4,
        }
    }
}

/// Who needs what of the function; guarded by one lock.
#[derive(Default)]
struct Control {
    /// The function itself is a bus master.
    master: bool,
    /// Functions behind this bridge that are bus masters.
    masters_behind: usize,
}

/// A PCI function: a device, or the bridge to others.
pub struct Function {
    pub(crate) config: Config,
    pub(crate) env: Arc<dyn PciEnv>,
    pub(crate) parent: Option<Arc<Function>>,
    pub(crate) ids: Ids,
    pub(crate) capabilities: Vec<Capability>,
    pub(crate) extended: Vec<ExtendedCapability>,
    pub(crate) port: Option<PortType>,
    pub(crate) bars: Bars,
    pub(crate) bridge: bool,
    pub(crate) alias: Option<RequesterId>,
    pub(crate) group: Bdf,
    pub(crate) failure: Option<PciError>,
    control: IrqMutex<Control>,
}

impl Function {
    pub(crate) fn new(node: crate::scan::Node, group: Bdf, env: Arc<dyn PciEnv>, parent: Option<Arc<Self>>) -> Self {
        Self {
            config: node.config,
            env,
            parent,
            ids: node.ids,
            capabilities: node.capabilities,
            extended: node.extended,
            port: node.port,
            bars: node.bars,
            bridge: node.bridge.is_some(),
            alias: node.alias,
            group,
            failure: node.failure,
            control: IrqMutex::default(),
        }
    }

    /// Bus, device and function number.
    pub fn bdf(&self) -> Bdf {
        self.config.bdf()
    }

    /// Vendor, device and class.
    pub fn ids(&self) -> Ids {
        self.ids
    }

    /// Whether this is a bridge to another bus.
    pub fn is_bridge(&self) -> bool {
        self.bridge
    }

    /// The bridge in front of the function, if it is not on the root bus.
    pub fn parent(&self) -> Option<&Arc<Self>> {
        self.parent.as_ref()
    }

    /// What kind of PCI Express port this is; `None` for conventional PCI.
    pub fn port(&self) -> Option<PortType> {
        self.port
    }

    /// Why the function cannot be used, if it cannot.
    ///
    /// # Errors
    ///
    /// What was wrong with it when it was found or given addresses.
    pub fn check(&self) -> Result<(), PciError> {
        self.failure.map_or(Ok(()), Err)
    }

    /// The requester ID under which the root complex sees the function's transactions: its own, or that of a bridge to
    /// conventional PCI in front of it.
    pub fn requester_id(&self) -> RequesterId {
        self.alias.unwrap_or_else(|| self.bdf().requester_id())
    }

    /// Every requester ID that transactions of this function may bear. A bridge from PCI Express to PCI forwards some
    /// transactions (PCI-X) under the function's own name and all others under its alias.
    pub fn requester_ids(&self) -> impl Iterator<Item = RequesterId> + use<> {
        let own = self.bdf().requester_id();
        core::iter::once(own).chain(self.alias.filter(|alias| *alias != own))
    }

    /// The capabilities in the first 256 bytes, in the device's order.
    pub fn capabilities(&self) -> &[Capability] {
        &self.capabilities
    }

    /// The first capability with this ID.
    pub fn capability(&self, id: u8) -> Option<Capability> {
        self.capabilities.iter().find(|capability| capability.id == id).copied()
    }

    /// The capabilities of the extended space, in the device's order.
    pub fn extended_capabilities(&self) -> &[ExtendedCapability] {
        &self.extended
    }

    /// The name of the group of functions that an IOMMU cannot tell or keep apart: its topmost function. Functions with the same
    /// name are attached together or not at all.
    pub fn group(&self) -> Bdf {
        self.group
    }

    /// Reads 8 bits of configuration space; all ones outside it.
    pub fn read_config8(&self, offset: u16) -> u8 {
        self.config.read8(offset)
    }

    /// Reads 16 bits of configuration space; all ones outside it or across a boundary.
    pub fn read_config16(&self, offset: u16) -> u16 {
        self.config.read16(offset)
    }

    /// Reads 32 bits of configuration space; all ones outside it or across a boundary.
    pub fn read_config32(&self, offset: u16) -> u32 {
        self.config.read(offset, Width::Word)
    }

    /// The interrupt pin, if the function has one.
    pub fn interrupt_pin(&self) -> Option<InterruptPin> {
        match self.config.read8(reg::INTERRUPT_PIN) {
            1 => Some(InterruptPin::A),
            2 => Some(InterruptPin::B),
            3 => Some(InterruptPin::C),
            4 => Some(InterruptPin::D),
            _ => None,
        }
    }

    /// The BARs that the function has. An I/O BAR may have no address: I/O space is small, and nothing here needs it.
    pub fn bars(&self) -> impl Iterator<Item = &Bar> {
        self.bars.iter().flatten()
    }

    /// Describes memory BAR `index`.
    ///
    /// # Errors
    ///
    /// [`PciError::NoBar`], or what is wrong with the function.
    pub fn memory_bar(&self, index: u8) -> Result<Bar, PciError> {
        self.check()?;
        let bar = self.bars.get(usize::from(index)).copied().flatten();
        bar.filter(|bar| bar.is_memory() && bar.phys.is_some()).ok_or(PciError::NoBar(index))
    }

    /// Maps all of memory BAR `index` and lets the function decode memory.
    ///
    /// # Errors
    ///
    /// As [`Function::bar_part`].
    pub fn bar(&self, index: u8) -> Result<Mmio, PciError> {
        let size = self.memory_bar(index)?.size;
        self.bar_part(index, 0, size)
    }

    /// Maps `len` bytes at byte `offset` of memory BAR `index` and lets the function decode memory.
    ///
    /// # Errors
    ///
    /// [`PciError::NoBar`], [`PciError::OutsideBar`], [`PciError::MapFailed`], or what is wrong with the function.
    pub fn bar_part(&self, index: u8, offset: u64, len: u64) -> Result<Mmio, PciError> {
        let bar = self.memory_bar(index)?;
        let outside = PciError::OutsideBar { bar: index, offset, len };
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > bar.size) {
            return Err(outside);
        }
        let phys = bar.phys.and_then(|phys| phys.checked_add(offset)).ok_or(outside)?;
        let mmio = self.env.map(phys, len)?;
        self.update_command(|command| command.insert(Command::MEMORY));
        Ok(mmio)
    }

    /// Stops decoding memory: the function's registers answer no more. For a driver that lets go of its device.
    pub fn disable_memory(&self) {
        if !self.bridge {
            self.update_command(|command| command.remove(Command::MEMORY));
        }
    }

    /// Lets the function (and the bridges in front of it) issue transactions: DMA and interrupt messages.
    ///
    /// # Errors
    ///
    /// [`PciError::NotAttached`] if `attached` is not about every name of this function, or what is wrong with the function.
    pub fn enable_bus_master(&self, attached: &impl Attached) -> Result<(), PciError> {
        self.check()?;
        if self.bridge || !self.requester_ids().all(|id| attached.covers(id)) {
            return Err(PciError::NotAttached(self.bdf()));
        }
        let mut control = self.control.lock();
        if !control.master {
            control.master = true;
            if let Some(parent) = &self.parent {
                parent.add_master_behind();
            }
            self.write_master(true);
        }
        Ok(())
    }

    /// Stops the function from issuing transactions, and waits until none is pending.
    ///
    /// # Errors
    ///
    /// [`PciError::TransactionsPending`] if some still are: whether they will complete is unknown. Bus mastering is disabled
    /// nevertheless.
    pub fn disable_bus_master(&self) -> Result<(), PciError> {
        {
            let mut control = self.control.lock();
            self.write_master(false);
            if control.master {
                control.master = false;
                if let Some(parent) = &self.parent {
                    parent.remove_master_behind();
                }
            }
        }
        let Some(express) = self.capability(id::EXPRESS) else { return Ok(()) };
        let deadline = Deadline::after_millis(PENDING_MILLIS);
        while self.config.read16(express.offset + DEVICE_STATUS) & TRANSACTIONS_PENDING != 0 {
            if deadline.has_passed() {
                return Err(PciError::TransactionsPending);
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    /// Lets the function use its wired interrupt ([`Function::interrupt_pin`]), or not, as at first. For functions without MSI-X.
    pub fn set_wired_interrupt(&self, enabled: bool) {
        self.update_command(|command| command.set(Command::INTX_DISABLE, !enabled));
    }

    /// Whether the function may issue transactions, from its Command register.
    pub fn is_bus_master(&self) -> bool {
        Command::from_bits_retain(self.config.read16(reg::COMMAND)).contains(Command::BUS_MASTER)
    }

    fn add_master_behind(&self) {
        let mut control = self.control.lock();
        control.masters_behind += 1;
        if control.masters_behind == 1 {
            if let Some(parent) = &self.parent {
                parent.add_master_behind();
            }
            self.write_master(true);
        }
    }

    fn remove_master_behind(&self) {
        let mut control = self.control.lock();
        control.masters_behind = control.masters_behind.saturating_sub(1);
        if control.masters_behind == 0 {
            self.write_master(false);
            if let Some(parent) = &self.parent {
                parent.remove_master_behind();
            }
        }
    }

    /// Sets or clears Bus Master Enable and reads it back, which pushes the write ahead of all that follows. The caller holds
    /// `control`.
    fn write_master(&self, enable: bool) {
        let Some(mut command) = self.command() else { return };
        command.set(Command::BUS_MASTER, enable);
        self.config.write16(reg::COMMAND, command.bits());
        let _pushed = self.config.read16(reg::COMMAND);
    }

    /// The Command register; none where the function does not answer, so that not all of it is set when it does again.
    fn command(&self) -> Option<Command> {
        Some(self.config.read16(reg::COMMAND)).filter(|command| *command != u16::MAX).map(Command::from_bits_retain)
    }

    fn update_command(&self, change: impl FnOnce(&mut Command)) {
        let _control = self.control.lock();
        let Some(mut command) = self.command() else { return };
        change(&mut command);
        self.config.write16(reg::COMMAND, command.bits());
    }

    /// Changes 16 bits of a capability under the function's lock.
    pub(crate) fn update16(&self, offset: u16, change: impl FnOnce(u16) -> u16) {
        let _control = self.control.lock();
        let value = self.config.read16(offset);
        self.config.write16(offset, change(value));
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ids { vendor, device, class, .. } = self.ids;
        write!(f, "{} {vendor:04x}:{device:04x} class {class:06x}", self.bdf())
    }
}
