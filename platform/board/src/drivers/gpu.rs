//! virtio-gpu as a screen, and as a device that strays.

use super::{LIFECYCLE_MILLIS, Signal, Wiring, virtio};
use crate::{Error, Master};
use ::virtio::gpu::{Backing, Gpu, Options, Presenting, Resource};
use ::virtio::queue::Loans;
use ::virtio::spec::gpu::Format;
use ::virtio::transport::PciTransport;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use base::{Deadline, Instant, block_on};
use dma::{Device, Job, Lent};
use iommu::Iova;
use kernel::class::{Begun, Frame, PixelOrder, Screen, Stray};

/// Side of the square picture that is claimed to be where nothing was lent, in pixels: 16 KiB.
const STRAY_SIDE: u32 = 64;

/// A started GPU.
pub struct GpuScreen {
    // In the order of dropping: the driver resets the device, then its vectors go.
    gpu: Gpu,
    wiring: Wiring,
    master: Master,
}

impl GpuScreen {
    /// Starts the GPU of `master`.
    ///
    /// # Errors
    ///
    /// [`Error::Virtio`], [`Error::Pci`]; the device is off the bus then.
    pub fn start(master: Master) -> Result<Self, Error> {
        master.release()?;
        match Self::try_start(&master) {
            Ok((gpu, wiring)) => Ok(Self { gpu, wiring, master }),
            Err(error) => {
                // The first error says why; that the device could not even be stopped is for the log.
                if let Err(second) = master.arrest() {
                    log::error!("{second}");
                }
                Err(error)
            }
        }
    }

    fn try_start(master: &Master) -> Result<(Gpu, Wiring), Error> {
        let failed = |error| virtio(master, error);
        let transport = Arc::new(PciTransport::new(master.function().clone()).map_err(failed)?);
        let mut wiring = Wiring::new(master)?;
        let options = Options { vectors: wiring.vectors };
        let deadline = Deadline::after_millis(LIFECYCLE_MILLIS);
        let gpu = Gpu::new(transport.clone(), master.device().clone(), &options, deadline).map_err(failed)?;
        wiring.connect(master, &transport, gpu.config_handler().map_err(failed)?, gpu.queue_handler())?;
        Ok((gpu, wiring))
    }

    /// The driver itself.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// How it interrupts.
    pub fn signal(&self) -> Signal {
        self.wiring.signal()
    }

    /// The bus master.
    pub fn master(&self) -> &Master {
        &self.master
    }

    /// Resets the GPU and takes it off the bus: all its memory comes back.
    ///
    /// # Errors
    ///
    /// [`Error::Virtio`] where it does not finish the reset, [`Error::Pci`], [`Error::Dma`].
    pub fn stop(self) -> Result<(), Error> {
        let Self { gpu, wiring, master } = self;
        let reset = gpu.shut_down(Deadline::after_millis(LIFECYCLE_MILLIS)).map_err(|error| virtio(&master, error));
        drop(wiring);
        master.arrest()?;
        reset
    }
}

/// The first connected display is the screen.
async fn first_display(gpu: &Gpu) -> Result<(u32, u32, u32), ::virtio::Error> {
    let info = gpu.display_info().await?;
    let (index, rect) = info.displays().next().ok_or(::virtio::Error::NoSuchScanout(0))?;
    Ok((index, rect.width, rect.height))
}

/// Has the device read all of a picture and show it. The queue has the job until the device has read, however long that takes.
fn present<L: Lent>(resource: &Resource, job: Option<Arc<Job<L>>>) -> Result<Presenting, ::virtio::Error> {
    let Some(job) = job else { return resource.begin_present(resource.rect(), Loans::none()) };
    let presenting = resource.begin_present(resource.rect(), Loans::one(job.clone()))?;
    if let Some(watch) = presenting.watch().and_then(|watch| base::fallible::arc(watch).ok()) {
        job.watch(watch);
    }
    // (Without memory to look by, others wait until the queue has let go of the job.)
    Ok(presenting)
}

fn in_time<T>(result: Result<Result<T, ::virtio::Error>, base::TimedOut>) -> Result<T, ::virtio::Error> {
    result.unwrap_or(Err(::virtio::Error::TimedOut))
}

impl Screen for GpuScreen {
    type Error = ::virtio::Error;
    type Shown = Resource;
    type Refresh = Presenting;

    fn device(&self) -> &Device {
        self.gpu.device()
    }

    fn size(&self, deadline: Deadline) -> Result<(u32, u32), ::virtio::Error> {
        let (_, width, height) = in_time(block_on(deadline, first_display(&self.gpu)))?;
        Ok((width, height))
    }

    fn show<L: Lent>(&self, frame: &Frame<'_, L>, deadline: Deadline) -> Result<Resource, ::virtio::Error> {
        let format = match frame.order {
            PixelOrder::Bgrx => Format::B8G8R8X8,
            PixelOrder::Rgbx => Format::R8G8B8X8,
        };
        let mut backing = Backing::new();
        for row in frame.rows {
            backing.push(frame.loan, row.clone())?;
        }
        // Whoever still writes the picture is waited for, and nobody changes it before it has been read.
        let job = Job::begin(frame.loan, deadline)?;
        in_time(block_on(deadline, async {
            let (scanout, _, _) = first_display(&self.gpu).await?;
            let resource = self.gpu.create_resource(frame.width, frame.height, format, backing).await?;
            self.gpu.set_scanout(scanout, &resource, resource.rect()).await?;
            present(&resource, job)?.await?;
            Ok(resource)
        }))
    }

    fn refresh<L: Lent>(
        &self,
        shown: &Resource,
        loan: &Arc<L>,
        deadline: Deadline,
    ) -> Result<Begun<Presenting>, ::virtio::Error> {
        let since = Instant::now();
        let (job, waited) = match Job::begin(loan, Deadline::at(since)) {
            Err(dma::Error::Busy { .. }) => (Job::begin(loan, deadline)?, Some(since.elapsed())),
            begun => (begun?, None),
        };
        Ok(Begun { work: present(shown, job)?, waited })
    }

    fn hide(&self, shown: Resource, deadline: Deadline) -> Result<(), ::virtio::Error> {
        in_time(block_on(deadline, shown.destroy()))
    }
}

impl Stray for GpuScreen {
    fn device(&self) -> &Device {
        self.gpu.device()
    }

    fn stray(&self, target: Iova, deadline: Deadline) -> Result<(), String> {
        let len = u64::from(STRAY_SIDE * STRAY_SIDE * 4);
        let loan = dma::Stray::new(self.gpu.device(), target, len).map_err(|error| error.to_string())?;
        let backing = Backing::whole(&Arc::new(loan)).map_err(|error| error.to_string())?;
        let attempt = async {
            let resource = self.gpu.create_resource(STRAY_SIDE, STRAY_SIDE, Format::B8G8R8X8, backing).await?;
            resource.transfer(resource.rect()).await?;
            resource.destroy().await
        };
        // A device that was stopped refuses, or believes that it read something: whichever it is does not matter here.
        if let Err(error) = in_time(block_on(deadline, attempt)) {
            log::debug!("{}: {error}", self.gpu.device().name());
        }
        Ok(())
    }
}
