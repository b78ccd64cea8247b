//! QEMU's `edu`: copies up to a page between its own buffer and any address, on command.
//!
//! The device's DMA takes 100 ms of virtual time and its result is not reported: a read that an IOMMU stops fills the buffer
//! with zeroes, a write that is stopped is dropped. Addresses are raw on purpose, so that a test can point the device where it
//! must not reach; what it reaches is decided by the function's attachment alone. A safe driver over owned mappings is a thin
//! layer on top of [`Edu::transfer`].
//!
//! # Locking
//!
//! `busy` lets one caller at a time use the device; it is not waited for. The interrupt handler touches atomics and one
//! register of its own.

use crate::TestdevError;
use alloc::sync::Arc;
use arch::mmio::Registers;
use base::irq::Handler;
use base::{Deadline, Turn, wait_until};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use iommu::Iova;
use pci::{Function, Msi, MsiController};

/// PCI vendor and device ID.
pub const ID: (u16, u16) = (0x1234, 0x11e8);

const REG_ID: usize = 0x00;
const REG_LIVENESS: usize = 0x04;
const REG_FACTORIAL: usize = 0x08;
const REG_STATUS: usize = 0x20;
const REG_IRQ_STATUS: usize = 0x24;
const REG_IRQ_RAISE: usize = 0x60;
const REG_IRQ_ACK: usize = 0x64;
const REG_DMA_SOURCE: usize = 0x80;
const REG_DMA_DESTINATION: usize = 0x88;
const REG_DMA_COUNT: usize = 0x90;
const REG_DMA_COMMAND: usize = 0x98;
const REGISTERS: u64 = 0x100;

const ID_MASK: u32 = 0x0000_ffff;
const ID_VALUE: u32 = 0x0000_00ed;
const STATUS_COMPUTING: u32 = 1;
const STATUS_FACTORIAL_IRQ: u32 = 0x80;
const COMMAND_RUN: u64 = 1;
const COMMAND_TO_MEMORY: u64 = 2;
const COMMAND_IRQ: u64 = 4;
/// The bit that the device reports when a transfer with [`COMMAND_IRQ`] is done.
const IRQ_DMA: u32 = 0x100;

/// Where the device's buffer lies in its own address space.
const BUFFER: u64 = 0x4_0000;

/// Bytes of the device's buffer that may be used. It has 4096, but QEMU before 9.1 ends when a transfer reaches its last byte.
pub const BUFFER_SIZE: u32 = 4092;

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads memory into its buffer.
    ToDevice,
    /// The device writes its buffer to memory.
    FromDevice,
}

/// How to learn that the device is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// By interrupt, sleeping.
    Interrupt,
    /// By reading a register over and over.
    Polling,
}

/// What the handler and the waiters share.
struct Shared {
    regs: Arc<dyn Registers>,
    /// The interrupt status bits seen and not yet consumed.
    raised: AtomicU32,
    /// Interrupts taken, for reports.
    count: AtomicU32,
}

impl Handler for Shared {
    fn handle(&self) {
        let status = self.regs.read32(REG_IRQ_STATUS);
        self.regs.write32(REG_IRQ_ACK, status);
        self.raised.fetch_or(status, Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::SeqCst);
        base::notify();
    }
}

/// An edu device.
pub struct Edu {
    function: Arc<Function>,
    regs: Arc<dyn Registers>,
    shared: Arc<Shared>,
    busy: AtomicBool,
    msi: Option<Msi>,
}

/// Waits until the device has no transfer under way. It has no reset: who takes it away from a driver takes it off the bus, and
/// waits for what was begun to come to nothing.
///
/// # Errors
///
/// [`TestdevError::WrongDevice`], [`TestdevError::TimedOut`], [`TestdevError::Pci`].
pub fn drain(function: &Function, deadline: Deadline) -> Result<(), TestdevError> {
    if !Edu::matches(function) {
        return Err(TestdevError::WrongDevice);
    }
    let regs = function.bar_part(0, 0, REGISTERS)?;
    loop {
        let expired = deadline.has_passed();
        if regs.read64(REG_DMA_COMMAND) & COMMAND_RUN == 0 {
            // Nor does an interrupt wait to be acknowledged by somebody who is gone.
            regs.write32(REG_STATUS, 0);
            regs.write32(REG_IRQ_ACK, regs.read32(REG_IRQ_STATUS));
            return Ok(());
        }
        if expired {
            return Err(TestdevError::TimedOut);
        }
        // It ends by its deadline, which is not an error here.
        let _ = wait_until(Deadline::after_millis(1).min(deadline), || false);
    }
}

impl Edu {
    /// Whether `function` is an edu.
    pub fn matches(function: &Function) -> bool {
        let ids = function.ids();
        (ids.vendor, ids.device) == ID
    }

    /// Takes the device and checks that it is alive. With `controller` it interrupts by message; without, only
    /// [`Completion::Polling`] works until [`Edu::wired_handler`] serves its wire. Bus mastering is the caller's to enable, and both DMA
    /// and messages need it.
    ///
    /// # Errors
    ///
    /// [`TestdevError::WrongDevice`], [`TestdevError::NotAlive`], [`TestdevError::Pci`].
    pub fn new(function: Arc<Function>, controller: Option<Arc<dyn MsiController>>) -> Result<Self, TestdevError> {
        if !Self::matches(&function) {
            return Err(TestdevError::WrongDevice);
        }
        let regs = Arc::new(function.bar_part(0, 0, REGISTERS)?);
        Self::with_registers(function, regs, controller)
    }

    pub(crate) fn with_registers(
        function: Arc<Function>,
        regs: Arc<dyn Registers>,
        controller: Option<Arc<dyn MsiController>>,
    ) -> Result<Self, TestdevError> {
        let id = regs.read32(REG_ID);
        if id & ID_MASK != ID_VALUE {
            return Err(TestdevError::NotAlive(id));
        }
        regs.write32(REG_LIVENESS, 0x5a5a_a5a5);
        let inverted = regs.read32(REG_LIVENESS);
        if inverted != !0x5a5a_a5a5 {
            return Err(TestdevError::NotAlive(inverted));
        }
        regs.write32(REG_STATUS, 0);
        regs.write32(REG_IRQ_ACK, regs.read32(REG_IRQ_STATUS));
        let shared = Arc::new(Shared { regs: regs.clone(), raised: AtomicU32::new(0), count: AtomicU32::new(0) });
        let msi = controller.map(|controller| Msi::new(function.clone(), controller, shared.clone())).transpose()?;
        Ok(Self { function, regs, shared, busy: AtomicBool::new(false), msi })
    }

    /// The PCI function.
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// How many interrupts the device has raised.
    pub fn interrupts(&self) -> u32 {
        self.shared.count.load(Ordering::SeqCst)
    }

    /// The sole use of the device for a while.
    fn turn(&self) -> Result<Turn<'_>, TestdevError> {
        Turn::try_take(&self.busy).ok_or(TestdevError::Busy)
    }

    /// Waits for interrupt status bits and consumes them.
    fn wait_raised(&self, bits: u32, deadline: Deadline) -> Result<(), TestdevError> {
        let raised = || self.shared.raised.load(Ordering::SeqCst) & bits != 0;
        wait_until(deadline, raised).map_err(|_| TestdevError::TimedOut)?;
        self.shared.raised.fetch_and(!bits, Ordering::SeqCst);
        Ok(())
    }

    /// Has the device raise its interrupt with the status `bits`, at once, and waits for it.
    ///
    /// # Errors
    ///
    /// [`TestdevError::Busy`], [`TestdevError::TimedOut`].
    pub fn raise_interrupt(&self, bits: u32, deadline: Deadline) -> Result<(), TestdevError> {
        let _turn = self.turn()?;
        self.shared.raised.fetch_and(!bits, Ordering::SeqCst);
        self.regs.write32(REG_IRQ_RAISE, bits);
        self.wait_raised(bits, deadline)
    }

    /// Has the device compute `n!` modulo 2^32, which it does without DMA.
    ///
    /// # Errors
    ///
    /// [`TestdevError::Busy`], [`TestdevError::TimedOut`].
    pub fn factorial(&self, n: u32, deadline: Deadline) -> Result<u32, TestdevError> {
        let _turn = self.turn()?;
        self.regs.write32(REG_STATUS, self.regs.read32(REG_STATUS) & !STATUS_FACTORIAL_IRQ);
        self.regs.write32(REG_FACTORIAL, n);
        self.poll(deadline, || self.regs.read32(REG_STATUS) & STATUS_COMPUTING == 0)?;
        Ok(self.regs.read32(REG_FACTORIAL))
    }

    /// Sleeps in short turns until `done`, which no interrupt announces.
    fn poll(&self, deadline: Deadline, done: impl Fn() -> bool) -> Result<(), TestdevError> {
        loop {
            let expired = deadline.has_passed();
            if done() {
                return Ok(());
            }
            if expired {
                return Err(TestdevError::TimedOut);
            }
            // It ends by its deadline as a rule, which is not an error here.
            let nap = Deadline::after_millis(1).min(deadline);
            let _ = wait_until(nap, &done);
        }
    }

    /// Has the device read `len` bytes at `iova` into its buffer.
    ///
    /// # Errors
    ///
    /// As [`Edu::transfer`].
    pub fn dma_to_device(&self, iova: Iova, len: u32, by: Completion, deadline: Deadline) -> Result<(), TestdevError> {
        self.transfer(Direction::ToDevice, iova, 0, len, by, deadline)
    }

    /// Has the device write the first `len` bytes of its buffer to `iova`.
    ///
    /// # Errors
    ///
    /// As [`Edu::transfer`].
    pub fn dma_from_device(
        &self,
        iova: Iova,
        len: u32,
        by: Completion,
        deadline: Deadline,
    ) -> Result<(), TestdevError> {
        self.transfer(Direction::FromDevice, iova, 0, len, by, deadline)
    }

    /// Copies `len` bytes between `iova` and byte `offset` of the device's buffer, and waits until the device says that it is
    /// done. It says so whether or not the bytes arrived.
    ///
    /// # Errors
    ///
    /// [`TestdevError::OutsideBuffer`]; [`TestdevError::Busy`] also while an earlier transfer, whose wait timed out, is under
    /// way; [`TestdevError::TimedOut`].
    pub fn transfer(
        &self,
        direction: Direction,
        iova: Iova,
        offset: u32,
        len: u32,
        by: Completion,
        deadline: Deadline,
    ) -> Result<(), TestdevError> {
        let _turn = self.turn()?;
        match by {
            Completion::Interrupt => {
                self.begin(direction, iova, offset, len, COMMAND_IRQ)?;
                self.wait_raised(IRQ_DMA, deadline)?;
            }
            Completion::Polling => {
                self.begin(direction, iova, offset, len, 0)?;
                self.poll(deadline, || !self.is_running())?;
            }
        }
        // What the device wrote is read after it said that it is done.
        base::barrier::device_read();
        Ok(())
    }

    /// As [`Edu::transfer`] by polling, and calls `meanwhile` over and over until the device is done: for changes under a device
    /// at work.
    ///
    /// # Errors
    ///
    /// As [`Edu::transfer`], and whatever `meanwhile` fails with; the transfer may be under way then.
    pub fn transfer_while<E: From<TestdevError>>(
        &self,
        direction: Direction,
        iova: Iova,
        len: u32,
        deadline: Deadline,
        mut meanwhile: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let _turn = self.turn()?;
        self.begin(direction, iova, 0, len, 0)?;
        while self.is_running() {
            if deadline.has_passed() {
                return Err(TestdevError::TimedOut.into());
            }
            meanwhile()?;
        }
        base::barrier::device_read();
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.regs.read64(REG_DMA_COMMAND) & COMMAND_RUN != 0
    }

    /// Starts a transfer. The caller has the turn.
    fn begin(&self, direction: Direction, iova: Iova, offset: u32, len: u32, flags: u64) -> Result<(), TestdevError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= BUFFER_SIZE);
        if len == 0 || !inside {
            return Err(TestdevError::OutsideBuffer { offset, len, size: BUFFER_SIZE });
        }
        if self.is_running() {
            return Err(TestdevError::Busy);
        }
        let buffer = BUFFER + u64::from(offset);
        let (source, destination, command) = match direction {
            Direction::ToDevice => (iova.get(), buffer, COMMAND_RUN),
            Direction::FromDevice => (buffer, iova.get(), COMMAND_RUN | COMMAND_TO_MEMORY),
        };
        self.shared.raised.fetch_and(!IRQ_DMA, Ordering::SeqCst);
        self.regs.write64(REG_DMA_SOURCE, source);
        self.regs.write64(REG_DMA_DESTINATION, destination);
        self.regs.write64(REG_DMA_COUNT, len.into());
        // What the CPU wrote for the device is in memory before the device is told to look.
        base::barrier::publish();
        self.regs.write64(REG_DMA_COMMAND, command | flags);
        Ok(())
    }

    /// Whether the device interrupts by message.
    pub fn has_message(&self) -> bool {
        self.msi.is_some()
    }

    /// What serves the device's wired interrupt, where it does not interrupt by message.
    pub fn wired_handler(&self) -> Arc<dyn Handler> {
        self.shared.clone()
    }
}
