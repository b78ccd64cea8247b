//! edu as a device that strays.

use super::Signal;
use crate::{Error, Master};
use alloc::string::{String, ToString};
use base::Deadline;
use dma::Device;
use iommu::Iova;
use kernel::class::Stray;
use pci::{Wire, capability};
use testdev::edu::{Completion, Edu};

/// Bytes of the stray transfer.
const STRAY: u32 = 64;

/// A started edu.
pub struct EduStray {
    // In the order of dropping: a message, or the wire.
    edu: Edu,
    wire: Option<Wire>,
    master: Master,
}

impl EduStray {
    /// Starts the device of `master`.
    ///
    /// # Errors
    ///
    /// [`Error::TestDevice`], [`Error::Pci`].
    pub fn start(master: Master) -> Result<Self, Error> {
        master.release()?;
        match Self::try_start(&master) {
            Ok((edu, wire)) => Ok(Self { edu, wire, master }),
            Err(error) => {
                if let Err(second) = master.arrest() {
                    log::error!("{second}");
                }
                Err(error)
            }
        }
    }

    fn try_start(master: &Master) -> Result<(Edu, Option<Wire>), Error> {
        let (function, messages) = (master.function(), master.messages());
        let by_message = function.capability(capability::MSI).is_some() && messages.has(function.requester_id(), 1);
        let edu = Edu::new(function.clone(), by_message.then_some(messages))
            .map_err(|error| Error::TestDevice { name: master.device().name().to_string(), error })?;
        let wire = if by_message { None } else { Some(master.connect_wire(edu.wired_handler())?) };
        Ok((edu, wire))
    }

    /// The driver itself.
    pub fn edu(&self) -> &Edu {
        &self.edu
    }

    /// How it interrupts.
    pub fn signal(&self) -> Signal {
        if self.wire.is_some() { Signal::Wire } else { Signal::Message }
    }

    /// The bus master.
    pub fn master(&self) -> &Master {
        &self.master
    }

    /// Takes the device off the bus.
    ///
    /// # Errors
    ///
    /// [`Error::Pci`], [`Error::Dma`].
    pub fn stop(self) -> Result<(), Error> {
        let Self { edu, wire, master } = self;
        drop((edu, wire));
        master.arrest()
    }
}

impl Stray for EduStray {
    fn device(&self) -> &Device {
        self.master.device()
    }

    fn stray(&self, target: Iova, deadline: Deadline) -> Result<(), String> {
        self.edu.dma_from_device(target, STRAY, Completion::Interrupt, deadline).map_err(|error| error.to_string())
    }
}
