//! A configuration space in memory for host tests: functions with BARs and capabilities, bridges that route by the bus numbers
//! written to them, and devices that lie.

#![allow(unsafe_code)] // Lays MMIO windows over leaked memory.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::{Bdf, ConfigSpace, MsiController, MsiError, MsiMessage, PciEnv, PciError, RequesterId, Width, capability};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::irq::Handler;
use core::ptr::NonNull;
use iommu::PhysAddr;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// How a function-level reset goes, of a function that has one.
#[derive(Clone, Copy, Debug, Default)]
pub struct FakeReset {
    /// How many looks at Device Status say that transactions are pending.
    pub pending: u32,
    /// How many reads are not answered after the reset.
    pub unready: u32,
    /// What the vendor ID reads as meanwhile, if not all ones.
    pub vendor_while_unready: u16,
    /// Another device ID than before.
    pub device_after: Option<u16>,
    /// The BARs do not take addresses any more.
    pub bars_stuck: bool,
}

/// What has come of resets.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetStory {
    /// How many there were.
    pub count: u32,
    /// The Command register when it was told to reset.
    pub command: u16,
    /// Whether transactions were pending then.
    pub pending: bool,
}

/// One function; a bridge with all that is behind it.
#[derive(Clone, Debug)]
pub struct FakeFunction {
    device: u8,
    function: u8,
    regs: Vec<u8>,
    writable: Vec<u8>,
    children: Vec<FakeFunction>,
    last_capability: usize,
    next_capability: usize,
    /// Where its PCI Express capability is, for one that can be reset; how that goes, and has gone.
    reset: Option<(usize, FakeReset, ResetStory)>,
}

impl FakeFunction {
    fn new(device: u8, function: u8, vendor: u16, id: u16, class: u32, header: u8) -> Self {
        let mut this = Self {
            device,
            function,
            regs: vec![0; 4096],
            writable: vec![0; 4096],
            children: Vec::new(),
            last_capability: 0x33,
            next_capability: 0x40,
            reset: None,
        };
        this.set(0, &vendor.to_le_bytes());
        this.set(2, &id.to_le_bytes());
        this.set(8, &(class << 8).to_le_bytes());
        this.regs[0xe] = header;
        this.writable[4..6].copy_from_slice(&0x0547_u16.to_le_bytes());
        this
    }

    /// A device.
    pub fn endpoint(device: u8, function: u8, vendor: u16, id: u16) -> Self {
        Self::new(device, function, vendor, id, 0x00ff_0000, 0)
    }

    /// A PCI-PCI bridge with all three windows. `port` is the device/port type of its PCI Express capability.
    pub fn bridge(device: u8, function: u8, port: Option<u8>) -> Self {
        let mut this = Self::new(device, function, 0x1b36, 0x000c, 0x0006_0400, 1);
        this.writable[0x18..0x1b].fill(0xff);
        this.writable[0x1c..0x1e].fill(0xf0);
        this.set(0x1c, &[1, 1]);
        this.writable[0x30..0x34].fill(0xff);
        for offset in [0x20, 0x22, 0x24, 0x26] {
            this.writable[offset..offset + 2].copy_from_slice(&[0xf0, 0xff]);
        }
        this.set(0x24, &[1, 0, 1, 0]);
        this.writable[0x28..0x30].fill(0xff);
        match port {
            Some(port) => this.express(port),
            None => this,
        }
    }

    /// Takes away a bridge's prefetchable window.
    pub fn without_prefetch(mut self) -> Self {
        self.set(0x24, &[0; 12]);
        self.writable[0x24..0x30].fill(0);
        self
    }

    /// Adds a PCI Express capability of this device/port type.
    pub fn express(self, port: u8) -> Self {
        self.capability(capability::EXPRESS, &{
            let mut body = [0_u8; 0x3a];
            body[0] = 2 | port << 4;
            body
        })
    }

    /// Adds a PCI Express capability of an endpoint with a function-level reset, and this in its Device Control register.
    pub fn express_with_reset(self, control: u16, reset: FakeReset) -> Self {
        let at = self.next_capability;
        let mut this = self.express(0);
        this.reset = Some((at, reset, ResetStory::default()));
        this.set(at + 4, &(1_u32 << 28).to_le_bytes());
        this.set(at + 8, &control.to_le_bytes());
        this.with_writable(at + 8, &[0xff, 0x7f])
    }

    /// What has come of its resets.
    pub fn reset_story(&self) -> ResetStory {
        self.reset.map_or_else(ResetStory::default, |(_, _, story)| story)
    }

    /// Puts a function behind this bridge.
    pub fn child(mut self, child: FakeFunction) -> Self {
        self.children.push(child);
        self
    }

    /// Says that the device has several functions.
    pub fn multi_function(mut self) -> Self {
        self.regs[0xe] |= 0x80;
        self
    }

    /// Sets bytes that the device reports.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.regs[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// As [`FakeFunction::set`], for builders.
    pub fn with(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.set(offset, bytes);
        self
    }

    /// Makes bits of a byte writable, or not.
    pub fn with_writable(mut self, offset: usize, mask: &[u8]) -> Self {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
        self
    }

    /// Adds a BAR with these type bits whose writable bits are `mask`.
    pub fn bar_raw(mut self, index: usize, kind: u32, mask: u32) -> Self {
        let at = 0x10 + 4 * index;
        self.set(at, &kind.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&mask.to_le_bytes());
        self
    }

    /// Adds a 32-bit memory BAR.
    pub fn bar32(self, index: usize, size: u64, prefetchable: bool) -> Self {
        let mask = !(size - 1) as u32 & !0xf;
        self.bar_raw(index, u32::from(prefetchable) << 3, mask)
    }

    /// Adds a 64-bit memory BAR.
    pub fn bar64(self, index: usize, size: u64, prefetchable: bool) -> Self {
        let mask = !(size - 1) & !0xf;
        self.bar_raw(index, 4 | u32::from(prefetchable) << 3, mask as u32).bar_raw(index + 1, 0, (mask >> 32) as u32)
    }

    /// Adds an I/O BAR.
    pub fn io(self, index: usize, size: u32) -> Self {
        self.bar_raw(index, 1, !(size - 1) & !3)
    }

    /// Adds a capability whose `body` follows its ID and next pointer; all of the body can be written.
    pub fn capability(mut self, id: u8, body: &[u8]) -> Self {
        let at = self.next_capability;
        self.regs[0x06] |= 1 << 4;
        let link = if self.last_capability == 0x33 { 0x34 } else { self.last_capability + 1 };
        self.regs[link] = at as u8;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.last_capability = at;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        self
    }

    /// Adds an MSI-X capability with its table at byte 0 and its pending bits at byte `pending` of BAR `bar`.
    pub fn msix(mut self, count: u16, bar: u8, table: u32, pending: u32) -> Self {
        let at = self.next_capability;
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(count - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        self = self.capability(capability::MSIX, &body);
        self.writable[at + 3] = 0xc0;
        self
    }

    /// Adds an MSI capability with one vector and a 64-bit address.
    pub fn msi64(mut self) -> Self {
        let at = self.next_capability;
        let mut body = [0; 12];
        body[0] = 1 << 7;
        self = self.capability(capability::MSI, &body);
        self.writable[at + 2] = 0x71;
        self.writable[at + 4..at + 14].fill(0xff);
        self
    }

    /// The functions behind this bridge.
    pub fn children(&self) -> &[FakeFunction] {
        &self.children
    }

    /// Device and function number.
    pub fn place(&self) -> (u8, u8) {
        (self.device, self.function)
    }

    /// Reads a register as configuration software would.
    pub fn register(&self, offset: usize, width: Width) -> u32 {
        let mut value = 0;
        for byte in 0..usize::from(width.bytes()) {
            value |= u32::from(self.regs[offset + byte]) << (8 * byte);
        }
        value
    }

    /// As [`FakeFunction::register`], and notes that it was read.
    fn read(&mut self, offset: usize, width: Width) -> u32 {
        if let Some((express, reset, story)) = &mut self.reset {
            if story.count != 0 && reset.unready != 0 {
                reset.unready -= u32::from(reset.unready != u32::MAX);
                return match reset.vendor_while_unready {
                    vendor if vendor != 0 && offset == 0 => vendor.into(),
                    _ => width.ones(),
                };
            }
            if offset == *express + 10 {
                let pending = reset.pending != 0;
                reset.pending -= u32::from(pending && reset.pending != u32::MAX);
                return u32::from(pending) << 5;
            }
        }
        self.register(offset, width)
    }

    /// Does what a function does that is told to reset.
    fn forget(&mut self) {
        let Some((express, reset, mut story)) = self.reset else { return };
        story.count += 1;
        story.command = u16::from_le_bytes([self.regs[4], self.regs[5]]);
        story.pending = reset.pending != 0;
        self.reset = Some((express, reset, story));
        for (byte, writable) in self.regs.iter_mut().zip(&self.writable) {
            *byte &= !writable;
        }
        if let Some(device) = reset.device_after {
            self.set(2, &device.to_le_bytes());
        }
        if reset.bars_stuck {
            self.writable[0x10..0x28].fill(0);
        }
    }

    fn write(&mut self, offset: usize, width: Width, value: u32) {
        if self.reset.is_some_and(|(express, ..)| offset == express + 8 && value & 1 << 15 != 0) {
            return self.forget();
        }
        for byte in 0..usize::from(width.bytes()) {
            let mask = self.writable[offset + byte];
            let old = self.regs[offset + byte];
            self.regs[offset + byte] = old & !mask | (value >> (8 * byte)) as u8 & mask;
        }
    }
}

/// A segment made of [`FakeFunction`]s.
pub struct FakeSpace {
    /// The functions on each root bus.
    roots: Mutex<BTreeMap<u8, Vec<FakeFunction>>>,
}

impl FakeSpace {
    /// A segment with these functions on its root bus.
    pub fn new(root_bus: u8, root: Vec<FakeFunction>) -> Arc<Self> {
        Self::with_roots(vec![(root_bus, root)])
    }

    /// A segment with several root buses, whose numbers are their own.
    pub fn with_roots(roots: Vec<(u8, Vec<FakeFunction>)>) -> Arc<Self> {
        Arc::new(Self { roots: Mutex::new(roots.into_iter().collect()) })
    }

    /// Sets 16 bits that a function reports, whether software could write them or not.
    pub fn poke(&self, bdf: Bdf, offset: u16, value: u16) {
        self.with(bdf, &mut |function| function.set(usize::from(offset), &value.to_le_bytes()));
    }

    /// The functions as they stand; those on the first root bus, with what is behind them.
    pub fn snapshot(&self) -> Vec<FakeFunction> {
        self.roots.lock().unwrap().values().next().cloned().unwrap_or_default()
    }

    fn with<R>(&self, bdf: Bdf, action: &mut dyn FnMut(&mut FakeFunction) -> R) -> Option<R> {
        let mut roots = self.roots.lock().unwrap();
        if let Some(root) = roots.get_mut(&bdf.bus()) {
            return Self::behind(root, bdf.bus(), bdf, action);
        }
        roots.iter_mut().find_map(|(bus, root)| Self::behind(root, *bus, bdf, action))
    }

    fn behind<R>(
        functions: &mut [FakeFunction],
        bus: u8,
        bdf: Bdf,
        action: &mut dyn FnMut(&mut FakeFunction) -> R,
    ) -> Option<R> {
        for function in functions {
            if bus == bdf.bus() {
                if (function.device, function.function) == (bdf.device(), bdf.function()) {
                    return Some(action(function));
                }
            } else if function.regs[0xe] & 0x7f == 1 {
                let (secondary, subordinate) = (function.regs[0x19], function.regs[0x1a]);
                if secondary != 0 && (secondary..=subordinate).contains(&bdf.bus()) {
                    return Self::behind(&mut function.children, secondary, bdf, action);
                }
            }
        }
        None
    }
}

impl ConfigSpace for FakeSpace {
    fn read(&self, bdf: Bdf, offset: u16, width: Width) -> u32 {
        self.with(bdf, &mut |function| function.read(usize::from(offset), width)).unwrap_or(width.ones())
    }

    fn write(&self, bdf: Bdf, offset: u16, width: Width, value: u32) {
        self.with(bdf, &mut |function| function.write(usize::from(offset), width, value));
    }
}

/// Maps "physical" addresses to memory that is made on first use; the same address gives the same memory again.
#[derive(Default)]
pub struct FakeEnv {
    regions: Mutex<BTreeMap<u64, Mmio>>,
}

impl PciEnv for FakeEnv {
    fn map(&self, phys: PhysAddr, len: u64) -> Result<Mmio, PciError> {
        let mut regions = self.regions.lock().unwrap();
        if let Some((start, region)) = regions.range(..=phys.get()).next_back()
            && let Some(part) = region.part((phys.get() - start) as usize, len as usize)
        {
            return Ok(part);
        }
        if len > 1 << 24 {
            return Err(PciError::MapFailed);
        }
        let words = vec![0_u64; (len as usize).div_ceil(8)].leak();
        // SAFETY: the memory is leaked, and the only reference to it was given up in favour of the pointer.
        let mmio = unsafe { Mmio::new(NonNull::from(words).cast(), len as usize) };
        regions.insert(phys.get(), mmio);
        Ok(mmio)
    }
}

/// An MSI controller that remembers what it gave out.
#[derive(Default)]
pub struct FakeMsi {
    next: Mutex<u32>,
    live: Mutex<BTreeMap<(u16, u32), Arc<dyn Handler>>>,
}

impl FakeMsi {
    /// The doorbell's address.
    pub const DOORBELL: u64 = 0x0809_0040;

    /// How many interrupts are given out.
    pub fn live(&self) -> usize {
        self.live.lock().unwrap().len()
    }

    /// Plays a device's store to the doorbell. Returns whether a handler was called.
    pub fn raise(&self, requester: RequesterId, data: u32) -> bool {
        let handler = self.live.lock().unwrap().get(&(requester.get(), data)).cloned();
        handler.as_ref().inspect(|handler| handler.handle()).is_some()
    }
}

impl MsiController for FakeMsi {
    fn has(&self, _: RequesterId, _: usize) -> bool {
        true
    }

    fn allocate(&self, requester: RequesterId, handler: Arc<dyn Handler>) -> Result<MsiMessage, MsiError> {
        let mut next = self.next.lock().unwrap();
        let data = *next;
        *next += 1;
        self.live.lock().unwrap().insert((requester.get(), data), handler);
        Ok(MsiMessage { address: Self::DOORBELL, data })
    }

    fn free(&self, requester: RequesterId, message: MsiMessage) -> Result<(), MsiError> {
        self.live.lock().unwrap().remove(&(requester.get(), message.data)).map(drop).ok_or(MsiError::Unknown)
    }
}
