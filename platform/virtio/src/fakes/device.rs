//! The device: registers, queues, and how it behaves.

use super::{Bus, Chain, DeviceQueue, Model};
use crate::Error;
use crate::spec::pci::isr;
use crate::spec::{feature, status};
use crate::transport::{QueueSetup, Transport};
use base::irq::Handler;
use core::ops::{Deref, DerefMut};
use dma::fakes::Hardware;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

/// What a device does with the next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Carries it out and returns it.
    Honest,
    /// Carries it out and keeps it, until [`FakeDevice::release`].
    Keep,
    /// Takes it and never answers.
    Swallow,
    /// Carries it out and returns it under this id.
    WrongId(u32),
    /// Carries it out and returns it twice.
    Twice,
    /// Carries it out and claims to have written this many bytes.
    Length(u32),
    /// Carries it out and moves the used index on by this much more.
    Jump(u16),
    /// Does not carry it out, but returns it with this many bytes written.
    Ignore(u32),
    /// Says that it needs a reset, with a configuration interrupt.
    NeedReset,
    /// Resets itself without a word.
    ResetItself,
    /// Carries it out, returns it, and then scribbles over the descriptors and the available ring.
    Scribble,
}

/// How the registers behave.
#[derive(Clone, Debug)]
pub struct Registers {
    /// Type of the device.
    pub device_type: u16,
    /// Features on offer.
    pub features: u64,
    /// Features that it must have been given, or else it refuses `FEATURES_OK`.
    pub insists_on: u64,
    /// Largest size of each queue.
    pub queues: Vec<u16>,
    /// The configuration.
    pub config: Vec<u8>,
    /// Whether the generation changes with every look at it.
    pub restless: bool,
    /// Reads of the generation after which it changes once.
    pub changes_once_after: Option<u32>,
    /// Whether a reset ever ends.
    pub resets: bool,
    /// MSI-X vectors that it takes.
    pub vectors: u16,
    /// Whether it ignores writes of single bytes to its configuration.
    pub read_only: bool,
    /// A status that it claims whatever was written.
    pub claims_status: Option<u8>,
}

struct State {
    registers: Registers,
    status: u8,
    accepted: u64,
    queues: Vec<Option<DeviceQueue>>,
    config_vector: Option<u16>,
    /// Why it would interrupt by wire.
    isr: u8,
    generation: u8,
    generation_reads: u32,
    plan: VecDeque<Behaviour>,
    kept: Vec<(u16, Chain, u32)>,
    model: std::boxed::Box<dyn Model>,
    notified: u64,
    resets: u64,
    eager: bool,
    status_log: Vec<u8>,
    handlers: Vec<(u16, Arc<dyn Handler>)>,
}

/// A device in software. See the [module](super).
pub struct FakeDevice {
    bus: Arc<dyn Bus>,
    state: Mutex<State>,
}

/// The state, and a word that what is allocated meanwhile is the fake's own.
struct Locked<'a> {
    state: MutexGuard<'a, State>,
    _hardware: Hardware,
}

impl Deref for Locked<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl FakeDevice {
    /// Makes a device that carries out requests with `model` whenever it is notified.
    pub fn new(registers: Registers, model: impl Model + 'static, bus: Arc<dyn Bus>) -> Arc<Self> {
        let queues = registers.queues.iter().map(|_| None).collect();
        let state = State {
            registers,
            status: 0,
            accepted: 0,
            queues,
            config_vector: None,
            isr: 0,
            generation: 0,
            generation_reads: 0,
            plan: VecDeque::new(),
            kept: Vec::new(),
            model: std::boxed::Box::new(model),
            notified: 0,
            resets: 0,
            eager: true,
            status_log: Vec::new(),
            handlers: Vec::new(),
        };
        Arc::new(Self { bus, state: Mutex::new(state) })
    }

    fn state(&self) -> Locked<'_> {
        let hardware = Hardware::enter();
        Locked { state: self.state.lock().unwrap_or_else(PoisonError::into_inner), _hardware: hardware }
    }

    /// What it does with the next requests; afterwards it is honest.
    pub fn plan(&self, behaviours: &[Behaviour]) {
        self.state().plan.extend(behaviours);
    }

    /// Whether it works when it is notified (as at first), or only in [`FakeDevice::run`].
    pub fn set_eager(&self, eager: bool) {
        self.state().eager = eager;
    }

    /// Connects an MSI-X vector.
    pub fn connect(&self, vector: u16, handler: Arc<dyn Handler>) {
        self.state().handlers.push((vector, handler));
    }

    /// Disconnects all vectors.
    pub fn disconnect(&self) {
        self.state().handlers.clear();
    }

    /// Changes how the registers behave.
    pub fn change(&self, change: impl FnOnce(&mut Registers)) {
        change(&mut self.state().registers);
    }

    /// How often it was notified.
    pub fn notified(&self) -> u64 {
        self.state().notified
    }

    /// How often it was reset.
    pub fn resets(&self) -> u64 {
        self.state().resets
    }

    /// The features that the driver accepted.
    pub fn accepted(&self) -> u64 {
        self.state().accepted
    }

    /// Every status that was written.
    pub fn status_log(&self) -> Vec<u8> {
        self.state().status_log.clone()
    }

    /// How many requests it keeps.
    pub fn kept(&self) -> usize {
        self.state().kept.len()
    }

    /// Asks not to be notified before the available index passes `index`.
    pub fn ask(&self, queue: u16, index: u16) {
        let state = self.state();
        if let Some(Some(side)) = state.queues.get(usize::from(queue)) {
            side.ask(&*self.bus, index);
        }
    }

    /// Returns the kept request number `index` (modulo their number); `false` if there is none.
    pub fn release(&self, index: usize) -> bool {
        let vector = {
            let mut state = self.state();
            if state.kept.is_empty() {
                return false;
            }
            let index = index % state.kept.len();
            let (queue, chain, len) = state.kept.remove(index);
            state.give_back(&*self.bus, queue, u32::from(chain.head), len, 0)
        };
        self.interrupt(vector);
        true
    }

    /// Writes `bytes` into the oldest buffer of `queue` that it keeps and returns it with this length; `false` if it has none.
    pub fn deliver(&self, queue: u16, bytes: &[u8], len: u32) -> bool {
        let vector = {
            let mut state = self.state();
            let Some(index) = state.kept.iter().position(|(of, ..)| *of == queue) else { return false };
            let (_, chain, _) = state.kept.remove(index);
            // A test may well offer more than fits.
            let _ = chain.write_at(&*self.bus, 0, bytes);
            state.give_back(&*self.bus, queue, u32::from(chain.head), len, 0)
        };
        self.interrupt(vector);
        true
    }

    /// Takes and carries out what is available, at most `limit` requests. Returns how many it took.
    pub fn run(&self, limit: usize) -> usize {
        let mut count = 0;
        while count < limit {
            let (took, vectors) = self.state().step(&*self.bus);
            for vector in &vectors {
                self.interrupt(*vector);
            }
            let hardware = Hardware::enter();
            drop(vectors);
            drop(hardware);
            if !took {
                break;
            }
            count += 1;
        }
        count
    }

    /// Raises the configuration interrupt.
    pub fn interrupt_config(&self) {
        let vector = self.state().config_vector;
        self.interrupt(vector);
    }

    fn interrupt(&self, vector: Option<u16>) {
        let Some(vector) = vector else { return };
        let handlers: Vec<_> =
            self.state().handlers.iter().filter(|(at, _)| *at == vector).map(|(_, handler)| handler.clone()).collect();
        for handler in &handlers {
            handler.handle();
        }
        let _hardware = Hardware::enter();
        drop(handlers);
    }
}

impl State {
    /// Takes one request from any queue. Returns whether it did and which vectors to raise.
    fn step(&mut self, bus: &dyn Bus) -> (bool, Vec<Option<u16>>) {
        if self.status & status::DRIVER_OK == 0 || self.status & status::DEVICE_NEEDS_RESET != 0 {
            return (false, Vec::new());
        }
        for index in 0..self.queues.len() {
            let Some(queue) = &mut self.queues[index] else { continue };
            let Some(chain) = queue.pop(bus) else { continue };
            let taken = queue.taken;
            queue.ask(bus, taken);
            return (true, self.treat(bus, index as u16, chain));
        }
        (false, Vec::new())
    }

    fn treat(&mut self, bus: &dyn Bus, queue: u16, chain: Chain) -> Vec<Option<u16>> {
        let id = u32::from(chain.head);
        if self.model.holds(queue) {
            self.kept.push((queue, chain, 0));
            return Vec::new();
        }
        let behaviour = self.plan.pop_front().unwrap_or(Behaviour::Honest);
        let carry_out = !matches!(
            behaviour,
            Behaviour::Swallow | Behaviour::Ignore(_) | Behaviour::NeedReset | Behaviour::ResetItself
        );
        let len = if carry_out { self.model.execute(queue, &chain, bus) } else { 0 };
        let vector = match behaviour {
            Behaviour::Honest => self.give_back(bus, queue, id, len, 0),
            Behaviour::Keep => {
                self.kept.push((queue, chain, len));
                None
            }
            Behaviour::Swallow => None,
            Behaviour::WrongId(id) => self.give_back(bus, queue, id, len, 0),
            Behaviour::Twice => {
                if let Some(Some(queue)) = self.queues.get_mut(usize::from(queue)) {
                    queue.put_used(bus, id, len);
                }
                self.give_back(bus, queue, id, len, 0)
            }
            Behaviour::Length(len) | Behaviour::Ignore(len) => self.give_back(bus, queue, id, len, 0),
            Behaviour::Jump(by) => self.give_back(bus, queue, id, len, by),
            Behaviour::NeedReset => {
                self.status |= status::DEVICE_NEEDS_RESET;
                self.config_vector
            }
            Behaviour::ResetItself => {
                self.reset();
                None
            }
            Behaviour::Scribble => {
                if let Some(Some(side)) = self.queues.get_mut(usize::from(queue)) {
                    side.scribbled = true;
                    let size = usize::from(side.setup.size);
                    bus.write(side.setup.descriptors, &std::vec![0xff; 16 * size]);
                    // The entries, not the flags, the index or `used_event`: those would only stop this very device.
                    if let Some(ring) = side.setup.driver.checked_add(4) {
                        bus.write(ring, &std::vec![0xff; 2 * size]);
                    }
                }
                self.give_back(bus, queue, id, len, 0)
            }
        };
        std::vec![vector]
    }

    /// Returns a request, and moves the used index on by `jump` more. The answer is the vector to raise.
    fn give_back(&mut self, bus: &dyn Bus, queue: u16, id: u32, len: u32, jump: u16) -> Option<u16> {
        let queue = self.queues.get_mut(usize::from(queue))?.as_mut()?;
        let old = queue.used;
        queue.put_used(bus, id, len);
        queue.used = queue.used.wrapping_add(jump);
        if !queue.publish_used(bus, old) {
            return None;
        }
        self.isr |= isr::QUEUE;
        queue.setup.vector
    }

    fn reset(&mut self) {
        self.status = 0;
        self.accepted = 0;
        self.queues.iter_mut().for_each(|queue| *queue = None);
        self.config_vector = None;
        self.kept.clear();
        self.model.reset();
        self.resets += 1;
    }
}

impl Transport for FakeDevice {
    fn device_type(&self) -> u16 {
        self.state().registers.device_type
    }

    fn device_features(&self) -> u64 {
        self.state().registers.features
    }

    fn set_driver_features(&self, features: u64) {
        self.state().accepted = features;
    }

    fn status(&self) -> u8 {
        let state = self.state();
        state.registers.claims_status.unwrap_or(state.status)
    }

    fn set_status(&self, value: u8) {
        let mut state = self.state();
        state.status_log.push(value);
        if value == 0 {
            if state.registers.resets {
                state.reset();
            } else {
                state.status |= status::DEVICE_NEEDS_RESET;
            }
            return;
        }
        let insists_on = state.registers.insists_on;
        state.status = value;
        if state.accepted & insists_on != insists_on || state.accepted & !state.registers.features != 0 {
            state.status &= !status::FEATURES_OK;
        }
    }

    fn queue_size(&self, queue: u16) -> u16 {
        self.state().registers.queues.get(usize::from(queue)).copied().unwrap_or(0)
    }

    fn set_up_queue(&self, queue: u16, setup: &QueueSetup) -> Result<(), Error> {
        let mut state = self.state();
        if setup.vector.is_some_and(|vector| vector >= state.registers.vectors) {
            return Err(Error::NoVector(setup.vector.unwrap_or_default()));
        }
        assert!(setup.size.is_power_of_two(), "a queue's size is a power of two");
        assert!(setup.descriptors.is_aligned(16) && setup.driver.is_aligned(2) && setup.device.is_aligned(4));
        let event_idx = state.accepted & feature::EVENT_IDX != 0;
        let place = state.queues.get_mut(usize::from(queue)).ok_or(Error::NoSuchQueue(queue))?;
        *place = Some(DeviceQueue { setup: *setup, taken: 0, used: 0, event_idx, scribbled: false });
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        let eager = {
            let mut state = self.state();
            state.notified += 1;
            state.eager
        };
        if eager {
            self.run(usize::MAX);
        }
    }

    fn set_config_vector(&self, vector: Option<u16>) -> Result<(), Error> {
        let mut state = self.state();
        if vector.is_some_and(|vector| vector >= state.registers.vectors) {
            return Err(Error::NoVector(vector.unwrap_or_default()));
        }
        state.config_vector = vector;
        Ok(())
    }

    fn interrupt_status(&self) -> u8 {
        std::mem::take(&mut self.state().isr)
    }

    fn config_generation(&self) -> u8 {
        let mut state = self.state();
        state.generation_reads += 1;
        if state.registers.restless || state.registers.changes_once_after == Some(state.generation_reads) {
            state.generation = state.generation.wrapping_add(1);
        }
        state.generation
    }

    fn config_read(&self, offset: usize) -> Option<u32> {
        let state = self.state();
        let bytes = state.registers.config.get(offset..offset.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    fn config_write(&self, offset: usize, value: u32) {
        let mut state = self.state();
        let end = offset.saturating_add(4);
        if let Some(bytes) = state.registers.config.get_mut(offset..end) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn config_write8(&self, offset: usize, value: u8) {
        let mut state = self.state();
        let sticks = !state.registers.read_only;
        if let Some(byte) = state.registers.config.get_mut(offset).filter(|_| sticks) {
            *byte = value;
        }
    }
}
