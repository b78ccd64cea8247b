//! The fence: devices that are told to access memory that they were not lent.
//!
//! The target is a page that the kernel owns and lends to nobody, at its physical address: what a device would reach if
//! nothing translated. It holds a pattern. The access counts as stopped if the IOMMU has recorded it, with the device and the
//! address, and the pattern is still there.

use super::Failure;
use crate::class::Stray;
use crate::faults::{FaultLog, Noted};
use alloc::string::{String, ToString};
use base::{Deadline, Instant, wait_until};
use core::hint::black_box;
use dma::Pages;
use iommu::{Fault, Iova, PAGE_SIZE, StreamId};

/// Milliseconds after which an access that nobody stopped counts as not stopped.
const PATIENCE: u64 = 2_000;
/// Bytes of memory that the devices are sent to.
const TARGET: u64 = 4 * PAGE_SIZE;

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The IOMMU stopped it.
    Stopped {
        /// Its record.
        fault: Fault,
        /// What the DMA-API knows of the address.
        explanation: String,
    },
    /// There is no record, although the memory is as it was.
    NotReported,
    /// The memory has changed.
    Breached,
    /// The device could not be made to try.
    NotTried(String),
}

impl Verdict {
    /// Whether the fence held, as far as could be seen.
    pub fn held(&self) -> bool {
        matches!(self, Self::Stopped { .. })
    }
}

/// What one device did and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The device.
    pub device: String,
    /// Where it was sent.
    pub target: Iova,
    /// How it went.
    pub verdict: Verdict,
}

/// Sends `stray`, whose streams are `streams`, outside the memory lent to it, and looks whether it was stopped.
///
/// # Errors
///
/// [`Failure::Dma`] if there is no memory to send it to.
pub fn prove(stray: &dyn Stray, streams: &[StreamId], faults: &FaultLog) -> Result<Proof, Failure> {
    let device = stray.device();
    let mut target = Pages::zeroed(device.memory(), TARGET).map_err(Failure::dma)?;
    fill(black_box(target.as_mut_slice()));
    let address = target.phys_runs().first().map_or(0, |run| run.start().get());
    let iova = Iova::new(address);
    let since = Instant::now();
    let verdict = match stray.stray(iova, Deadline::after_millis(PATIENCE)) {
        Err(error) => Verdict::NotTried(error),
        Ok(()) => {
            let mut stopped = None;
            // Out of time or not: what was found last is the answer. A fault elsewhere says nothing about this access.
            let _ = wait_until(Deadline::after_millis(PATIENCE), || {
                stopped = faults.iter().find_map(|Noted { fault, latest, .. }| {
                    let at = fault.iova.filter(|at| (address..address + TARGET).contains(&at.get()))?;
                    (streams.contains(&fault.stream) && latest >= since).then_some((fault, at))
                });
                stopped.is_some()
            });
            // The compiler knows of no other writer than this function; the question is whether there was one.
            if !is_intact(black_box(target.as_slice())) {
                Verdict::Breached
            } else if let Some((fault, at)) = stopped {
                Verdict::Stopped { fault, explanation: device.explain(at).to_string() }
            } else {
                Verdict::NotReported
            }
        }
    };
    Ok(Proof { device: device.name().to_string(), target: iova, verdict })
}

/// A byte that differs from its neighbours, and from what devices are likely to write.
fn pattern(index: usize) -> u8 {
    (index.wrapping_mul(167) >> 3) as u8 ^ 0xa5
}

fn fill(bytes: &mut [u8]) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = pattern(index);
    }
}

fn is_intact(bytes: &[u8]) -> bool {
    bytes.iter().enumerate().all(|(index, byte)| *byte == pattern(index))
}
