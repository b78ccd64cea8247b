//! The interrupt controller of the machine.

use crate::Error;
use crate::memory::NON_COHERENT;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::el3::SecureWords;
use arch::mmio::Mmio;
use base::irq::Handler;
use gic::security::{self, Secure};
use gic::{FrameConfig, Gic, IntId, Priority, Region, Trigger};
use iommu::{PhysAddr, PhysRange};
use kernel::machine::{self, Interrupt, Machine};
use spin::Once;

static GIC: Once<Gic> = Once::new();

/// The interrupt controller, once it is up.
pub fn gic() -> Option<&'static Gic> {
    GIC.get()
}

/// Maps a window of registers.
pub(crate) fn map(what: &str, range: PhysRange) -> Result<Mmio, Error> {
    let len = usize::try_from(range.len()).map_err(|_| Error::OutOfMemory)?;
    arch::mmu::map_device(range.start().get(), len).map_err(|error| Error::Map { what: String::from(what), error })
}

/// The interrupt as the controller knows it.
pub(crate) fn id(interrupt: Interrupt) -> Result<(IntId, Trigger), Error> {
    let id = match interrupt.intid {
        ppi @ 16..32 => gic::ppi(ppi - 16)?,
        spi @ 32..1020 => gic::spi(spi - 32)?,
        other => return Err(gic::GicError::NoSuchInterrupt(other).into()),
    };
    Ok((id, if interrupt.trigger.is_edge() { Trigger::Edge } else { Trigger::Level }))
}

/// Has `handler` serve `interrupt`.
pub(crate) fn connect(interrupt: Interrupt, priority: Priority, handler: Arc<dyn Handler>) -> Result<(), Error> {
    let (id, trigger) = id(interrupt)?;
    Ok(gic().ok_or(Error::Missing("interrupt controller"))?.enable(id, trigger, priority, handler)?)
}

/// The secure state's accesses, where the image was entered at EL3.
struct Firmware(SecureWords);

impl Secure for Firmware {
    fn read(&self, address: PhysAddr) -> u32 {
        // SAFETY: `gic::security` asks for registers of the GIC only, which are where the device tree says.
        unsafe { self.0.read(address.get()) }
    }

    fn write(&self, address: PhysAddr, value: u32) {
        // SAFETY: as above; the driver has not begun.
        unsafe { self.0.write(address.get(), value) };
    }
}

/// Resets the controller.
fn start(machine: &Machine) -> Result<Gic, Error> {
    if let Some(secure) = SecureWords::take() {
        let secure = Firmware(secure);
        match &machine.gic {
            Some(machine::Gic::V3(v3)) => {
                security::give_away_v3(&secure, v3.distributor, v3.redistributors.iter().copied())?;
            }
            Some(machine::Gic::V2(v2)) => security::give_away_v2(&secure, v2.distributor, v2.cpu_interface),
            None => {}
        }
    }
    let region = |what: &str, range: PhysRange| -> Result<Region, Error> {
        Ok(Region { mmio: map(what, range)?, phys: range.start() })
    };
    let mut frames = Vec::new();
    for frame in &machine.v2m {
        frames.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        let region = region("MSI frame", frame.registers)?;
        frames.push(FrameConfig { region, first: frame.first_spi, count: frame.spis });
    }
    let started = match machine.gic.as_ref().ok_or(Error::Missing("interrupt controller"))? {
        machine::Gic::V3(v3) => {
            let distributor = map("GIC distributor", v3.distributor)?;
            let mut redistributors = Vec::new();
            for range in &v3.redistributors {
                redistributors.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                redistributors.push(region("GIC redistributors", *range)?);
            }
            let its = machine.its.first().map(|its| region("ITS", its.registers)).transpose()?;
            // SAFETY:
            // - the windows are where the device tree says the GIC's are, mapped as device registers for good, and this is the only
            //   driver of them (the static is set once, by the first core);
            // - the tables come from memory that lives as long as they do. They are cleaned to memory at every change, which is
            //   rare: the device tree does not say whether a GIC snoops.
            unsafe { Gic::new(distributor, &redistributors, its, &frames, &NON_COHERENT) }
        }
        machine::Gic::V2(v2) => {
            let distributor = map("GIC distributor", v2.distributor)?;
            let interface = map("GIC CPU interface", v2.cpu_interface)?;
            // SAFETY: the windows, as above; there are no tables.
            unsafe { Gic::new_v2(distributor, interface, &frames) }
        }
    };
    Ok(started?)
}

/// Sets the controller up, and this core's part of it, and lets interrupts in.
pub(crate) fn init(machine: &Machine) -> Result<&'static Gic, Error> {
    let gic = start(machine)?;
    let gic = GIC.call_once(|| gic);
    arch::exception::set_irq_entry(|| {
        if let Some(gic) = GIC.get() {
            gic.irq_entry();
        }
    });
    gic.init_core()?;
    arch::set_kick(|cores| {
        if let Some(gic) = GIC.get() {
            gic.kick(cores);
        }
    });
    let timer = machine.timer.and_then(|timer| timer.virtual_).ok_or(Error::Missing("virtual timer interrupt"))?;
    connect(timer, Priority::URGENT, Arc::new(arch::timer::expired))?;
    arch::allow_wfi();
    arch::irq::enable();
    Ok(gic)
}

/// Sets up another core's part of the controller. Called on that core, with interrupts masked.
pub fn init_core(core: usize) {
    let Some(gic) = gic() else { return };
    match gic.init_core() {
        Ok(()) => arch::allow_wfi(),
        Err(error) => log::error!("core {core}: {error}"),
    }
}
