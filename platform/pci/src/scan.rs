//! Finding the functions behind a host bridge and giving the buses their numbers.
//!
//! The result is an arena in depth-first order: a bridge stands before all that is behind it, so that a walk backwards meets
//! children before parents. Nothing that a function says is believed further than it can do harm to itself: depth, bus
//! numbers and lists are bounded, and what a function gets wrong is noted at that function.

use crate::bar::{self, Bars};
use crate::caps::{self, Capability, ExtendedCapability, PortType, id};
use crate::config::{Command, Config, ConfigSpace, reg};
use crate::{Bdf, PciError, RequesterId, groups};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Bridges nested deeper than this are not followed; each level costs a little of the kernel's stack.
const MAX_DEPTH: usize = 16;

const HEADER_MULTI_FUNCTION: u8 = 0x80;
/// Base class and subclass.
const HOST_BRIDGE: u32 = 0x0600;
const HEADER_DEVICE: u8 = 0;
const HEADER_BRIDGE: u8 = 1;

/// What a PCI-PCI bridge can forward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bridge {
    /// Has an I/O window.
    pub io: bool,
    /// Has a prefetchable window with 64-bit addresses.
    pub prefetch64: bool,
}

/// Vendor, device and class of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID; 0 for bridges.
    pub subsystem_vendor: u16,
    /// Subsystem ID; 0 for bridges.
    pub subsystem: u16,
    /// Base class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// One function as found.
pub(crate) struct Node {
    pub config: Config,
    /// Index of the bridge in front of it.
    pub parent: Option<usize>,
    pub ids: Ids,
    pub capabilities: Vec<Capability>,
    pub extended: Vec<ExtendedCapability>,
    pub port: Option<PortType>,
    pub bars: Bars,
    /// One bit for each I/O BAR that gets no address, because the windows have no room for it.
    pub unassigned: u8,
    pub bridge: Option<Bridge>,
    /// The bus addresses and sizes that the bridge forwards: I/O, memory, prefetchable memory.
    pub windows: [Option<(u64, u64)>; 3],
    /// The requester ID under which a bridge forwards this function's transactions, where it is not the function's own.
    pub alias: Option<RequesterId>,
    /// Access Control Services are enabled as far as it takes to keep the function's traffic apart.
    pub access_control: bool,
    /// Why the function cannot be used.
    pub failure: Option<PciError>,
}

/// Where the scan stands.
struct Scan {
    space: Arc<dyn ConfigSpace>,
    nodes: Vec<Node>,
    /// The next bus number to give, or `None` when all are given.
    next_bus: Option<u8>,
    last_bus: u8,
}

/// What is known of a bus before it is scanned.
#[derive(Clone, Copy)]
struct Bus {
    number: u8,
    parent: Option<usize>,
    depth: usize,
    alias: Option<RequesterId>,
    only_device_0: bool,
}

/// Finds all functions from bus `first` on, and disables what firmware may have left enabled in them.
///
/// # Errors
///
/// [`PciError::OutOfMemory`]. What is wrong with a single function is in its [`Node::failure`].
pub(crate) fn scan(space: Arc<dyn ConfigSpace>, first: u8, last: u8) -> Result<Vec<Node>, PciError> {
    let roots = roots(&space, first, last)?;
    let mut scan = Scan { space, nodes: Vec::new(), next_bus: None, last_bus: last };
    for (index, root) in roots.iter().enumerate() {
        // The number of a root is its own; the numbers up to the next one are for what is behind its bridges.
        scan.last_bus = roots.get(index + 1).map_or(last, |next| next - 1);
        scan.next_bus = root.checked_add(1).filter(|next| *next <= scan.last_bus);
        scan.bus(Bus { number: *root, parent: None, depth: 0, alias: None, only_device_0: false })?;
    }
    Ok(scan.nodes)
}

/// Finds the root buses, in ascending order: `first`, and those of further host bridges that answer in the same configuration space,
/// as QEMU's `pxb-pcie` do. Such a one also shows as a function on the first bus, and only then are the others looked for, as that
/// takes some thousand reads.
fn roots(space: &Arc<dyn ConfigSpace>, first: u8, last: u8) -> Result<Vec<u8>, PciError> {
    let mut roots = Vec::new();
    roots.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
    roots.push(first);
    let present = |bus, device| {
        let config = Config::new(space.clone(), Bdf::new(bus, device, 0)?);
        let vendor = config.read16(reg::VENDOR);
        (vendor != 0xffff && vendor != 0).then_some(config)
    };
    let is_host = |device| present(first, device).is_some_and(|found| found.read32(reg::REVISION) >> 16 == HOST_BRIDGE);
    if !(1..32).any(is_host) {
        return Ok(roots);
    }
    let mut bus = first;
    loop {
        // With its bridges forwarding nothing, whatever firmware left there, only other roots answer on other buses.
        for config in (0..32).filter_map(|device| present(bus, device)) {
            let functions = if config.read8(reg::HEADER_TYPE) & HEADER_MULTI_FUNCTION != 0 { 8 } else { 1 };
            for bdf in (0..functions).filter_map(|function| Bdf::new(bus, config.bdf().device(), function)) {
                let config = Config::new(space.clone(), bdf);
                if config.read8(reg::HEADER_TYPE) & !HEADER_MULTI_FUNCTION == HEADER_BRIDGE {
                    config.write8(reg::SECONDARY_BUS, 0);
                    config.write8(reg::SUBORDINATE_BUS, 0);
                }
            }
        }
        let answers = |bus: &u8| (0..32).any(|device| present(*bus, device).is_some());
        let Some(next) = bus.checked_add(1).and_then(|next| (next..=last).find(answers)) else { break };
        roots.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
        roots.push(next);
        bus = next;
    }
    Ok(roots)
}

impl Scan {
    fn bus(&mut self, bus: Bus) -> Result<(), PciError> {
        let devices = if bus.only_device_0 { 1 } else { 32 };
        for device in 0..devices {
            if !self.function(bus, device, 0)? {
                continue;
            }
            let Some(bdf) = Bdf::new(bus.number, device, 0) else { continue };
            let header = Config::new(self.space.clone(), bdf).read8(reg::HEADER_TYPE);
            if header & HEADER_MULTI_FUNCTION != 0 {
                for function in 1..8 {
                    self.function(bus, device, function)?;
                }
            }
        }
        Ok(())
    }

    /// Looks at one function and, if it is a bridge, behind it. Returns whether there is one.
    fn function(&mut self, bus: Bus, device: u8, function: u8) -> Result<bool, PciError> {
        let Some(bdf) = Bdf::new(bus.number, device, function) else { return Ok(false) };
        let config = Config::new(self.space.clone(), bdf);
        let vendor = config.read16(reg::VENDOR);
        if vendor == 0xffff || vendor == 0 {
            return Ok(false);
        }
        quiesce(&config);
        let class = config.read32(reg::REVISION);
        let mut node = Node {
            ids: Ids {
                vendor,
                device: config.read16(reg::DEVICE),
                subsystem_vendor: 0,
                subsystem: 0,
                class: class >> 8,
                revision: class as u8,
            },
            config: config.clone(),
            parent: bus.parent,
            capabilities: Vec::new(),
            extended: Vec::new(),
            port: None,
            bars: Bars::default(),
            unassigned: 0,
            bridge: None,
            windows: [None; 3],
            alias: bus.alias,
            access_control: false,
            failure: None,
        };
        let header = config.read8(reg::HEADER_TYPE) & !HEADER_MULTI_FUNCTION;
        if let Err(error) = describe(&mut node, header) {
            node.failure = Some(error);
        }
        self.nodes.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
        let index = self.nodes.len();
        let follow = node.failure.is_none() && header == HEADER_BRIDGE;
        let port = node.port;
        self.nodes.push(node);
        if follow && let Err(error) = self.behind(bus, index, &config, port) {
            if error == PciError::OutOfMemory {
                return Err(error);
            }
            if let Some(node) = self.nodes.get_mut(index) {
                node.failure = Some(error);
            }
        }
        Ok(true)
    }

    /// Numbers and scans the bus behind the bridge `index`.
    fn behind(&mut self, bus: Bus, index: usize, config: &Config, port: Option<PortType>) -> Result<(), PciError> {
        // Until it is known to work, the bridge forwards nothing: an empty range of buses.
        config.write8(reg::SECONDARY_BUS, 0);
        config.write8(reg::SUBORDINATE_BUS, 0);
        if bus.depth >= MAX_DEPTH {
            return Err(PciError::TooDeep);
        }
        let secondary = self.next_bus.ok_or(PciError::NoBusNumber)?;
        config.write8(reg::PRIMARY_BUS, bus.number);
        config.write8(reg::SECONDARY_BUS, secondary);
        config.write8(reg::SUBORDINATE_BUS, self.last_bus);
        let kept = (config.read8(reg::SECONDARY_BUS), config.read8(reg::SUBORDINATE_BUS));
        if kept != (secondary, self.last_bus) || config.read8(reg::PRIMARY_BUS) != bus.number {
            config.write8(reg::SECONDARY_BUS, 0);
            config.write8(reg::SUBORDINATE_BUS, 0);
            return Err(PciError::BridgeNotWritable);
        }
        self.next_bus = secondary.checked_add(1).filter(|next| *next <= self.last_bus);
        let bridge = Bridge { io: has_io(config), prefetch64: has_prefetch64(config) };
        if let Some(node) = self.nodes.get_mut(index) {
            node.bridge = Some(bridge);
        }
        // The bridge nearest to the root that takes transactions over decides what the root sees.
        let alias = bus.alias.or(match port {
            Some(PortType::ToPci) => Bdf::new(secondary, 0, 0).map(Bdf::requester_id),
            None => Some(config.bdf().requester_id()),
            Some(_) => None,
        });
        let only_device_0 = port.is_some_and(PortType::has_link_below);
        self.bus(Bus { number: secondary, parent: Some(index), depth: bus.depth + 1, alias, only_device_0 })?;
        let subordinate = self.next_bus.map_or(self.last_bus, |next| next - 1);
        config.write8(reg::SUBORDINATE_BUS, subordinate);
        Ok(())
    }
}

/// Disables decoding, bus mastering and interrupts, whatever the function was doing before.
fn quiesce(config: &Config) {
    config.write16(reg::COMMAND, Command::INTX_DISABLE.bits());
}

/// Fills in what the function says about itself.
fn describe(node: &mut Node, header: u8) -> Result<(), PciError> {
    let config = &node.config;
    let bars = match header {
        HEADER_DEVICE => {
            node.ids.subsystem_vendor = config.read16(reg::SUBSYSTEM_VENDOR);
            node.ids.subsystem = config.read16(reg::SUBSYSTEM);
            config.write32(reg::ROM, 0);
            6
        }
        HEADER_BRIDGE => {
            config.write32(reg::BRIDGE_ROM, 0);
            2
        }
        other => return Err(PciError::HeaderType(other)),
    };
    node.capabilities = caps::walk(config)?;
    let find = |wanted| node.capabilities.iter().find(|capability| capability.id == wanted).map(|found| found.offset);
    for (id, control) in [(id::MSI, 2), (id::MSIX, 2)] {
        if let Some(offset) = find(id) {
            // The enable bit is bit 0 for MSI and bit 15 for MSI-X; the other writable bits may as well be cleared.
            config.write16(offset + control, 0);
        }
    }
    if let Some(express) = find(id::EXPRESS) {
        node.port = Some(PortType::read(config, express));
        node.extended = caps::walk_extended(config)?;
        let acs = node.extended.iter().find(|capability| capability.id == id::EXTENDED_ACS);
        node.access_control = acs.is_some_and(|acs| groups::enable_access_control(config, acs.offset, node.port));
    }
    node.bars = bar::discover(config, bars)?;
    Ok(())
}

/// Tells whether a bridge has an I/O window: the register is read-only zero where it has not.
fn has_io(config: &Config) -> bool {
    config.write8(reg::IO_BASE, 0xf0);
    config.read8(reg::IO_BASE) & 0xf0 != 0
}

/// Tells whether a bridge has a prefetchable window, and one with 64-bit addresses.
fn has_prefetch64(config: &Config) -> bool {
    config.write16(reg::PREFETCH_BASE, 0xfff0);
    let base = config.read16(reg::PREFETCH_BASE);
    base & 0xfff0 != 0 && base & 0xf == 1
}
