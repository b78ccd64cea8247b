//! From reset, or from whatever firmware left behind, to translation (IHI 0070, 3.11 and 6.3).
//!
//! The order is the point. First the door is shut (GBPA.ABORT), then the SMMU is stopped, and only then are tables and queues
//! changed; when translation is switched on every stream aborts. At no moment after the first step does any transaction pass.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::cmdq::{CommandQueue, Completion};
use crate::counters::Counters;
use crate::evtq::EventQueue;
use crate::features::Features;
use crate::ids::Ids;
use crate::priq::PriQueue;
use crate::registers::{Doorbell, Registers};
use crate::service::Service;
use crate::smmu::Shared;
use crate::spec::command::Command;
use crate::spec::registers::{self as reg, Cr0, IrqCtrl, cr1, cr2, gbpa};
use crate::streams::Streams;
use crate::strtab::StreamTable;
use alloc::string::String;
use alloc::sync::Arc;
use base::Deadline;
use base::time::Duration;
use iommu::FaultSink;
use iommu::contract::TableMemory;
use iommu::pgtable::Granule;

/// What a board can choose.
#[derive(Clone, Debug)]
pub struct Config {
    /// A name for reports.
    pub name: String,
    /// log2 of the commands that the command queue holds, at most what the SMMU has.
    pub cmdq_log2: u32,
    /// log2 of the records that the event queue holds. Generous: one stopped DMA of 4 KiB can make 1024 records.
    pub eventq_log2: u32,
    /// log2 of the records that the PRI queue holds, where there is one.
    pub priq_log2: u32,
    /// The most bits of StreamID for which there is a place in the stream table.
    pub stream_bits: u8,
    /// The translation granule; the smallest that the SMMU has if there is none given or the SMMU lacks it.
    pub granule: Option<Granule>,
    /// Bits of a device address; fewer can save a level of walk.
    pub input_bits: u8,
    /// The most bits of SubstreamID for which there is a place in a table of context descriptors.
    pub substream_bits: u8,
    /// How long commands may take.
    pub sync_timeout: Duration,
    /// How many looks at memory a core takes that waits for others to share its accesses to the registers of the command queue,
    /// where they have met before. 0: nobody waits. As many as take about as long as a write and a read of a register.
    pub linger: u32,
    /// How long a register may take to acknowledge a change.
    pub acknowledge_timeout: Duration,
    /// Called when a flood of events was left in the queue: has [`Smmu::serve_backlog`](crate::Smmu::serve_backlog) called in about
    /// a millisecond, from a timer. Called from handlers: it neither allocates nor waits. Without it the kernel looks for
    /// [`Smmu::has_backlog`](crate::Smmu::has_backlog) itself.
    pub defer: Option<fn()>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::from("smmuv3"),
            cmdq_log2: 8,
            eventq_log2: 13,
            priq_log2: 7,
            stream_bits: 24,
            granule: None,
            input_bits: 48,
            substream_bits: 16,
            sync_timeout: Duration::from_secs(1),
            linger: 16,
            acknowledge_timeout: Duration::from_secs(1),
            defer: None,
        }
    }
}

impl<R: Registers> Shared<R> {
    /// Brings the SMMU up with every stream blocked.
    ///
    /// # Errors
    ///
    /// See [`Error`]. The SMMU is then off and aborts everything as far as it could be made to.
    pub fn start(
        registers: R,
        memory: &'static dyn TableMemory,
        sink: Arc<dyn FaultSink>,
        config: Config,
    ) -> Result<Arc<Self>, Error> {
        if registers.size() < reg::SIZE {
            return Err(Error::WindowTooSmall { size: registers.size(), needed: reg::SIZE });
        }
        let window_closed = shut_the_door(&registers, &config)?;
        acknowledged(&registers, &config, reg::CR0, reg::CR0ACK, 0, "CR0")?;
        acknowledged(&registers, &config, reg::IRQ_CTRL, reg::IRQ_CTRLACK, 0, "IRQ_CTRL")?;
        let features = Features::read(&registers)?;
        let shared = Arc::new(Self {
            table: StreamTable::new(&features, config.stream_bits, memory)?,
            commands: CommandQueue::new(
                config.cmdq_log2.min(u32::from(features.cmdq_log2)),
                config.sync_timeout,
                config.linger,
                Completion::of(&features),
                memory,
            )?,
            doorbell: Doorbell::new(&registers),
            events: EventQueue::new(config.eventq_log2.min(u32::from(features.eventq_log2)), memory)?,
            page_requests: features
                .pri
                .then(|| PriQueue::new(config.priq_log2.min(u32::from(features.priq_log2)), memory))
                .transpose()?,
            service: Service::default(),
            asids: Ids::new(features.asid_bits)?,
            vmids: Ids::new(features.vmid_bits)?,
            streams: Streams::default(),
            counters: Counters::default(),
            features,
            window_closed,
            registers,
            memory,
            sink,
            config,
        });
        // From here on the hardware reads the tables, so they are never freed: an SMMU is never taken down, and one that failed
        // to start may still be reading.
        core::mem::forget(Arc::clone(&shared));
        shared.program();
        if let Err(error) = shared.enable() {
            shared.registers.write32(reg::CR0, 0);
            return Err(error);
        }
        Ok(shared)
    }

    /// Writes everything that may only be written while the SMMU is off.
    fn program(&self) {
        let registers = &self.registers;
        let (cache, share) =
            if self.features.coherent { (cr1::CACHE_WB, cr1::SH_ISH) } else { (cr1::CACHE_NC, cr1::SH_OSH) };
        let attributes = cr1::QUEUE_IC.put(cache)
            | cr1::QUEUE_OC.put(cache)
            | cr1::QUEUE_SH.put(share)
            | cr1::TABLE_IC.put(cache)
            | cr1::TABLE_OC.put(cache)
            | cr1::TABLE_SH.put(share);
        // The processors' broadcast invalidations are none of this driver's business, and unknown StreamIDs are to be heard of.
        let control = cr2::PTM.mask() | cr2::RECINVSID.mask();
        #[allow(clippy::cast_possible_truncation)] // 32-bit registers.
        {
            registers.write32(reg::CR1, attributes as u32);
            registers.write32(reg::CR2, control as u32);
        }
        self.table.program(registers);
        self.commands.program(registers);
        self.events.program(registers);
        if let Some(queue) = &self.page_requests {
            queue.program(registers);
        }
        if self.features.msi {
            // Address 0 is "no message": the wired interrupts are used.
            registers.write64(reg::GERROR_IRQ_CFG0, 0);
            registers.write64(reg::EVENTQ_IRQ_CFG0, 0);
            if self.features.pri {
                registers.write64(reg::PRIQ_IRQ_CFG0, 0);
                // An interrupt for every request, not for the last of a group alone.
                registers.write32(reg::PRIQ_IRQ_CFG2, 0);
            }
        }
        // Errors of before are not ours.
        registers.write32(reg::GERRORN, registers.read32(reg::GERROR));
    }

    /// Switches on: commands, then (with nothing cached of what was there before) events and interrupts, then translation.
    fn enable(&self) -> Result<(), Error> {
        // Translated accesses of a device are let through only where its STE allows ATS.
        let mut on = if self.features.ats { Cr0::CMDQEN | Cr0::ATSCHK } else { Cr0::CMDQEN };
        self.set_cr0(on)?;
        let mut batch = self.batch();
        if !seeded(Bug::NoBootInvalidation) {
            // Configuration before translations, or the TLB could be filled again through what is left of the former.
            batch.push(Command::CfgiAll)?;
            if self.features.hyp {
                batch.push(Command::TlbiEl2All)?;
            }
            batch.push(Command::TlbiNsnhAll)?;
        }
        batch.complete()?;
        on |= Cr0::EVENTQEN;
        self.set_cr0(on)?;
        if self.page_requests.is_some() {
            on |= Cr0::PRIQEN;
            self.set_cr0(on)?;
        }
        self.control(self.interrupts())?;
        self.set_cr0(on | Cr0::SMMUEN)
    }

    /// Writes IRQ_CTRL and waits until it has taken effect.
    pub fn control(&self, interrupts: IrqCtrl) -> Result<(), Error> {
        acknowledged(&self.registers, &self.config, reg::IRQ_CTRL, reg::IRQ_CTRLACK, interrupts.bits(), "IRQ_CTRL")
    }

    fn set_cr0(&self, value: Cr0) -> Result<(), Error> {
        acknowledged(&self.registers, &self.config, reg::CR0, reg::CR0ACK, value.bits(), "CR0")
    }
}

/// Sets GBPA.ABORT and says whether it took. Where GBPA is not implemented (it then reads as zero) the SMMU lets everything
/// pass until it is enabled, and nothing can be done about it.
fn shut_the_door(registers: &impl Registers, config: &Config) -> Result<bool, Error> {
    let updated = |registers: &_| -> Result<u64, Error> {
        let deadline = Deadline::after(config.acknowledge_timeout);
        loop {
            let expired = deadline.has_passed();
            let value = u64::from(Registers::read32(registers, reg::GBPA));
            if !gbpa::UPDATE.is_set(value) {
                return Ok(value);
            }
            if expired {
                return Err(Error::NoAcknowledge("GBPA"));
            }
            core::hint::spin_loop();
        }
    };
    let value = updated(registers)?;
    if seeded(Bug::DoorLeftOpen) {
        return Ok(true);
    }
    #[allow(clippy::cast_possible_truncation)] // A 32-bit register.
    registers.write32(reg::GBPA, (value | gbpa::ABORT.mask() | gbpa::UPDATE.mask()) as u32);
    Ok(gbpa::ABORT.is_set(updated(registers)?))
}

/// Writes a control register and waits until its acknowledgement register says the same.
fn acknowledged(
    registers: &impl Registers,
    config: &Config,
    register: usize,
    acknowledgement: usize,
    value: u32,
    name: &'static str,
) -> Result<(), Error> {
    registers.write32(register, value);
    let deadline = Deadline::after(config.acknowledge_timeout);
    loop {
        let expired = deadline.has_passed();
        if registers.read32(acknowledgement) == value || seeded(Bug::Cr0NotAwaited) {
            return Ok(());
        }
        if expired {
            return Err(Error::NoAcknowledge(name));
        }
        core::hint::spin_loop();
    }
}
