//! A GIC in memory for the tests: an ITS that runs commands and caches what the architecture lets it cache, redistributors,
//! and table memory.

#![allow(unsafe_code)] // Plays hardware: reads tables by their "physical" addresses, which are pointers here.

use crate::gic::Gic;
use crate::redistributor::Redistributor;
use crate::regs::Registers;
use crate::{GicError, cpu};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use iommu::contract::{TableBlock, TableMemory};
use iommu::{OutOfMemory, PhysAddr};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::{Arc, Mutex};

/// Table memory whose physical addresses are pointers.
#[derive(Default)]
pub struct FakeMemory {
    pub live: AtomicUsize,
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, bytes).unwrap()
}

// SAFETY: leaked allocations of the test's own, zeroed, at addresses that only the fakes understand.
unsafe impl TableMemory for FakeMemory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        assert!(bytes.is_power_of_two() && bytes >= 64);
        // SAFETY: the size is not zero.
        let pointer = unsafe { alloc_zeroed(layout(bytes)) }.cast::<AtomicU64>();
        let pointer = NonNull::new(pointer).ok_or(OutOfMemory)?;
        // SAFETY: zeroed, aligned, and ours until `free`.
        let words = unsafe { core::slice::from_raw_parts(pointer.as_ptr(), bytes / 8) };
        self.live.fetch_add(bytes, Ordering::SeqCst);
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(PhysAddr::new(pointer.as_ptr().expose_provenance() as u64), words, self) })
    }

    fn free(&self, _phys: PhysAddr, words: &'static [AtomicU64]) {
        let bytes = size_of_val(words);
        self.live.fetch_sub(bytes, Ordering::SeqCst);
        // SAFETY: allocated in `allocate` with this layout.
        unsafe { dealloc(words.as_ptr().cast_mut().cast(), layout(bytes)) };
    }

    fn publish(&self, _words: &[AtomicU64]) {}
}

fn load(phys: u64) -> u64 {
    let word = core::ptr::with_exposed_provenance::<AtomicU64>(phys as usize);
    // SAFETY: the driver pointed the hardware here; `FakeMemory` keeps it alive.
    unsafe { &*word }.load(Ordering::SeqCst)
}

/// How an ITS deviates from the friendliest one.
#[derive(Clone, Copy, Default)]
pub struct Quirks {
    /// Does not snoop: shareability reads as 0.
    pub no_snoop: bool,
    /// Has only this page size for its tables.
    pub page_size: Option<u64>,
    /// Names redistributors by address.
    pub by_address: bool,
    /// Stalls at this command.
    pub stall_at: Option<u64>,
    /// Consumes no command.
    pub mute: bool,
}

#[derive(Default)]
pub struct ItsState {
    regs: BTreeMap<usize, u64>,
    pub quirks: Quirks,
    /// Device, to the bits of its EventIDs.
    devices: BTreeMap<u32, u64>,
    /// Event, to LPI and collection.
    pub events: BTreeMap<(u32, u32), (u32, u16)>,
    pub collections: BTreeMap<u16, u64>,
    /// The configuration as cached by the redistributors.
    cache: BTreeMap<u32, u8>,
    /// The first byte of the LPI configuration table.
    pub properties: u64,
    pub log: Vec<[u64; 4]>,
}

#[derive(Clone, Default)]
pub struct FakeIts(pub Arc<Mutex<ItsState>>);

impl ItsState {
    fn execute(&mut self, command: [u64; 4]) {
        let [first, second, third, _] = command;
        let (device, event) = ((first >> 32) as u32, second as u32);
        let collection = third as u16;
        self.log.push(command);
        match first as u8 {
            0x08 => {
                assert_eq!(third & 0xff, 1 << 63 & 0xff);
                self.devices.insert(device, (second & 0x1f) + 1);
            }
            0x09 => {
                self.collections.insert(collection, third & 0x7fff_ffff_ffff_0000);
            }
            0x0a => {
                let bits = self.devices.get(&device).copied().unwrap_or(0);
                if u64::from(event) < 1 << bits {
                    self.events.insert((device, event), ((second >> 32) as u32, collection));
                }
            }
            0x01 => self.events.get_mut(&(device, event)).unwrap().1 = collection,
            0x0f => {
                self.events.remove(&(device, event));
            }
            0x0c => {
                if let Some((lpi, _)) = self.events.get(&(device, event)) {
                    self.cache.remove(lpi);
                }
            }
            0x0d => self.cache.clear(),
            0x05 => {}
            other => panic!("command {other:#x}"),
        }
    }

    /// Runs what is in the queue.
    pub fn run(&mut self) {
        if self.quirks.mute {
            return;
        }
        let base = self.regs[&0x80] & 0x000f_ffff_ffff_f000;
        let size = ((self.regs[&0x80] & 0xff) + 1) * 4096;
        let (mut read, write) = (self.regs[&0x90], self.regs[&0x88]);
        while read != write {
            let command = [0, 8, 16, 24].map(|word| u64::from_le(load(base + read + word)));
            if self.quirks.stall_at == Some(command[0] & 0xff) {
                read |= 1;
                break;
            }
            self.execute(command);
            read = (read + 32) % size;
        }
        self.regs.insert(0x90, read);
    }

    /// Forgets a stall, as hardware should not.
    pub fn recover(&mut self) {
        self.quirks.stall_at = None;
        *self.regs.get_mut(&0x90).unwrap() &= !1;
    }

    /// Plays a device's message. Returns the collection and LPI that it becomes, if it does.
    pub fn raise(&mut self, device: u32, event: u32) -> Option<(u16, u32)> {
        let (lpi, collection) = *self.events.get(&(device, event))?;
        let at = u64::from(lpi - 8192);
        let properties = self.properties;
        let config = *self.cache.entry(lpi).or_insert_with(|| (load(properties + at / 8 * 8) >> (8 * (at % 8))) as u8);
        assert!(self.collections.contains_key(&collection));
        (config & 1 != 0).then_some((collection, lpi))
    }
}

impl Registers for FakeIts {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.0.lock().unwrap();
        let control = state.regs.get(&0).copied().unwrap_or(0);
        if offset == 0 { control as u32 | if control & 1 == 0 { 1 << 31 } else { 0 } } else { 0 }
    }
    fn write32(&self, offset: usize, value: u32) {
        self.0.lock().unwrap().regs.insert(offset, value.into());
    }
    fn read64(&self, offset: usize) -> u64 {
        let state = self.0.lock().unwrap();
        match offset {
            // Physical LPIs, 12-byte entries, 16 bits of EventID and DeviceID, 16 bits of collection, none held inside.
            0x8 => 0x1f_0001_efb1 | u64::from(state.quirks.by_address) << 19,
            0x100 | 0x108 => {
                let kind = if offset == 0x100 { 1 } else { 4 };
                let value = state.regs.get(&offset).copied().unwrap_or(0);
                value & !(7 << 56 | 0x1f << 48) | kind << 56 | 7 << 48
            }
            _ => state.regs.get(&offset).copied().unwrap_or(0),
        }
    }
    fn write64(&self, offset: usize, value: u64) {
        let mut state = self.0.lock().unwrap();
        let mut value = value;
        if state.quirks.no_snoop && matches!(offset, 0x80 | 0x100 | 0x108) {
            value &= !(3 << 10);
        }
        if let Some(size) = state.quirks.page_size
            && matches!(offset, 0x100 | 0x108)
        {
            value = value & !(3 << 8) | size << 8;
        }
        state.regs.insert(offset, value);
        match offset {
            0x80 => drop(state.regs.insert(0x90, 0)),
            0x88 => state.run(),
            _ => {}
        }
    }
}

#[derive(Default)]
pub struct RedistributorState {
    regs: BTreeMap<usize, u64>,
    pub affinity: u32,
    pub number: u16,
    pub no_snoop: bool,
    /// Firmware left LPIs enabled, and they cannot be disabled.
    pub stuck: bool,
    /// The private interrupts that are enabled.
    pub enabled: u32,
}

#[derive(Clone, Default)]
pub struct FakeRedistributor(pub Arc<Mutex<RedistributorState>>);

impl FakeRedistributor {
    pub fn new(affinity: u32, number: u16) -> Self {
        let state = RedistributorState { affinity, number, ..Default::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    pub fn register(&self, offset: usize) -> u64 {
        self.0.lock().unwrap().regs.get(&offset).copied().unwrap_or(0)
    }
}

impl Registers for FakeRedistributor {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.0.lock().unwrap();
        let value = state.regs.get(&offset).copied();
        match offset {
            0x0 => value.unwrap_or(0) as u32 | u32::from(state.stuck),
            // Children sleep as long as the processor does, which it does from reset.
            0x14 => value.map_or(6, |waker| if waker & 2 != 0 { 6 } else { 0 }),
            _ => value.unwrap_or(0) as u32,
        }
    }
    fn write32(&self, offset: usize, value: u32) {
        let mut state = self.0.lock().unwrap();
        match offset {
            0x1_0100 => state.enabled |= value,
            0x1_0180 => state.enabled &= !value,
            _ => drop(state.regs.insert(offset, value.into())),
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        let state = self.0.lock().unwrap();
        match offset {
            0x8 => u64::from(state.affinity) << 32 | u64::from(state.number) << 8 | 1,
            _ => state.regs.get(&offset).copied().unwrap_or(0),
        }
    }
    fn write64(&self, offset: usize, value: u64) {
        let mut state = self.0.lock().unwrap();
        let value = if state.no_snoop { value & !(3 << 10) } else { value };
        // Pending Table Zero reads as zero.
        state.regs.insert(offset, value & !(1 << 62));
    }
}

/// A machine of two cores with an ITS.
pub struct Machine {
    pub gic: Gic,
    pub its: FakeIts,
    pub redistributors: [FakeRedistributor; 2],
    pub distributor: Mmio,
    pub memory: &'static FakeMemory,
}

pub fn distributor(typer: u32) -> Mmio {
    let words = vec![0_u64; 0x1_0000 / 8 + 0x1_0000 / 8].leak();
    let start = words.as_ptr().addr().next_multiple_of(0x1_0000) - words.as_ptr().addr();
    // SAFETY: leaked, twice as large as needed, and not referenced elsewhere.
    let base = unsafe { NonNull::from(words).cast::<u8>().add(start) };
    // SAFETY: as above.
    let mmio = unsafe { Mmio::new(base, 0x1_0000) };
    mmio.write32(0x4, typer);
    mmio.write32(0xffe8, 0x30);
    mmio
}

/// 256 SPIs, LPIs, 16 bits of interrupt ID.
pub const TYPER: u32 = 8 | 1 << 17 | 15 << 19;

pub fn build(quirks: Quirks, with_its: bool) -> Result<Machine, GicError> {
    let its = FakeIts::default();
    its.0.lock().unwrap().quirks = quirks;
    let redistributors = [FakeRedistributor::new(0, 0), FakeRedistributor::new(1, 1)];
    let memory: &'static FakeMemory = Box::leak(Box::default());
    let distributor = distributor(TYPER);
    let found = redistributors
        .iter()
        .zip([0x80a_0000, 0x80c_0000])
        .map(|(regs, phys)| Redistributor::new(Box::new(regs.clone()), PhysAddr::new(phys)))
        .collect();
    let parts = with_its.then(|| (Box::new(its.clone()) as Box<dyn Registers>, PhysAddr::new(0x808_0000)));
    // SAFETY: the window is ours alone.
    let gic = unsafe { Gic::from_parts(distributor, found, parts, memory) }?;
    Ok(Machine { gic, its, redistributors, distributor, memory })
}

impl Machine {
    /// A machine whose first core, this thread, is up.
    pub fn new(quirks: Quirks) -> Self {
        let machine = build(quirks, true).unwrap();
        machine.start(0);
        machine
    }

    /// Brings up a core on this thread, and returns its index.
    pub fn start(&self, affinity: u32) -> usize {
        cpu::AFFINITY.set(affinity);
        self.gic.init_core().unwrap();
        self.its.0.lock().unwrap().properties = self.redistributors[0].register(0x70) & 0x000f_ffff_ffff_f000;
        base::cpu::index()
    }

    /// Makes an interrupt pending on this thread and takes it.
    pub fn take(&self, id: u32) {
        cpu::PENDING.with_borrow_mut(|pending| pending.push(id));
        self.gic.irq_entry();
    }
}
