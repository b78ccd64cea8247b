//! edu as a device that strays.

use crate::{Error, Master};
use alloc::string::{String, ToString};
use base::Deadline;
use dma::Device;
use iommu::Iova;
use kernel::class::Stray;
use testdev::edu::{Completion, Edu};

/// Bytes of the stray transfer.
const STRAY: u32 = 64;

/// A started edu.
pub struct EduStray {
    edu: Edu,
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
        match Edu::new(master.function().clone(), Some(master.messages())) {
            Ok(edu) => Ok(Self { edu, master }),
            Err(error) => {
                if let Err(second) = master.arrest() {
                    log::error!("{second}");
                }
                Err(Error::TestDevice { name: master.device().name().to_string(), error })
            }
        }
    }

    /// The driver itself.
    pub fn edu(&self) -> &Edu {
        &self.edu
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
        drop(self.edu);
        self.master.arrest()
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
