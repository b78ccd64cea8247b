//! The place of one device, and what its foreign driver does with it.
//!
//! # Invariants
//!
//! What is lent through a slot belongs to the device in it. The room of the lists is made when the device is put in, so that
//! nothing is allocated under the lock; what is taken out of them is revoked and freed after the lock was released.

#![expect(unsafe_code, reason = "copies borrowed memory that it gets by pointer")]

use super::account::{Account, Loan, Misuse, Occupant, Report, Ring, RingMemory, Share};
use crate::attributed::AttributedPages;
use crate::memory::Cacheability;
use crate::site::Site;
use crate::{Device, Error};
use alloc::vec::Vec;
use base::IrqMutex;
use core::num::NonZero;
use core::panic::Location;
use core::ptr::NonNull;
use iommu::{Iova, IovaError, IovaRange, PAGE_SIZE};
use virtio_drivers::BufferDirection;

/// Buffers that a driver can have shared at a time.
const SHARES: usize = 512;
/// Allocations that a driver can have at a time.
const RINGS: usize = 64;

/// Bytes of addresses that are set aside for shares that fail: the first size that there is room for.
const NOWHERE: [u64; 3] = [1 << 24, 1 << 20, 1 << 16];
/// What is handed out where there is not even a device: the last page of the 64-bit space, which is beyond every aperture.
const NO_DEVICE: u64 = u64::MAX - (PAGE_SIZE - 1);

/// The place of one device of a foreign driver. Made by [`foreign_driver!`](crate::foreign_driver).
pub struct Slot(IrqMutex<Account>);

impl Slot {
    /// A slot without a device.
    #[expect(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self(IrqMutex::new(Account::new()))
    }

    /// Puts `device` in. Its driver may be started then.
    ///
    /// # Errors
    ///
    /// [`Error::SlotTaken`]; [`Error::NotIsolated`] without an IOMMU, where nothing would stop a device from using the address of
    /// a share that failed; [`Error::Iova`] where no addresses are left to be set aside; [`Error::OutOfMemory`].
    pub fn install(&self, device: &Device) -> Result<(), Error> {
        let (mut shares, mut rings) = (Vec::new(), Vec::new());
        shares.try_reserve_exact(SHARES)?;
        rings.try_reserve_exact(RINGS)?;
        let nowhere = set_aside(device)?;
        let mut occupant = Some(Occupant { device: device.clone(), nowhere });
        let report = Report { device: Some(device.shared_name().clone()), ..Report::default() };
        let (taken, before) = {
            let mut account = self.0.lock();
            match &account.occupant {
                Some(other) => (Some(other.device.shared_name().clone()), None),
                None => {
                    account.occupant = occupant.take();
                    core::mem::swap(&mut account.shares, &mut shares);
                    core::mem::swap(&mut account.rings, &mut rings);
                    (None, Some(core::mem::replace(&mut account.report, report)))
                }
            }
        };
        drop(before);
        if let Some(occupant) = occupant {
            give_back(&occupant);
        }
        taken.map_or(Ok(()), |name| Err(Error::SlotTaken(name)))
    }

    /// Takes the device out: it loses all that its driver still had lent, and the report says how much that was. `None` if
    /// there was no device. The driver may outlive this; it gets no memory any more, and may give back its rings. (What it gives
    /// back on another core at this very moment may be taken for a misuse, and is leaked then.)
    #[track_caller]
    pub fn remove(&self) -> Option<Report> {
        let site = Location::caller();
        let (occupant, shares, mut rings, mut report) = {
            let mut account = self.0.lock();
            let occupant = account.occupant.take()?;
            let report = account.report();
            (occupant, core::mem::take(&mut account.shares), core::mem::take(&mut account.rings), report)
        };
        for share in shares {
            report.quarantined += u64::from(share.loan.take_back(site).is_err());
        }
        // In place: to keep what the driver still uses must not need memory.
        for ring in &mut rings {
            report.quarantined += u64::from(ring.revoke(site).is_err());
        }
        self.adopt(rings);
        give_back(&occupant);
        {
            let mut account = self.0.lock();
            if account.occupant.is_none() {
                account.report.quarantined = report.quarantined;
            }
        }
        if report.shares != 0 || report.rings != 0 {
            log::error!("dma: a driver had not given back everything when its device was removed: {report}");
        }
        Some(report)
    }

    /// Keeps rings whose device was removed until their driver gives them back.
    fn adopt(&self, mut kept: Vec<Ring>) {
        if kept.is_empty() {
            return;
        }
        // Those that are there already are moved into the new list, whose room is made outside the lock.
        loop {
            let others = core::mem::take(&mut self.0.lock().orphans);
            if kept.try_reserve(others.len()).is_ok() {
                kept.extend(others);
            } else {
                core::mem::forget(others);
            }
            let mut account = self.0.lock();
            if account.orphans.is_empty() {
                account.orphans = kept;
                return;
            }
        }
    }

    /// What the driver has at this moment.
    pub fn report(&self) -> Report {
        self.0.lock().report()
    }

    /// The addresses of all that is lent at this moment: rings first, then shares. What changes meanwhile may or may not be
    /// among them.
    pub fn lent(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let rings = (0..).map_while(|index| self.0.lock().rings.get(index).map(Ring::range)).flatten();
        rings.chain((0..).map_while(|index| self.0.lock().shares.get(index).map(|share| share.loan.range())))
    }

    fn device(&self) -> Result<Device, Error> {
        let account = self.0.lock();
        account.occupant.as_ref().map(|occupant| occupant.device.clone()).ok_or(Error::SlotEmpty)
    }

    /// See [`virtio_drivers::Hal::dma_alloc`].
    pub(super) fn allocate(&self, pages: usize, direction: BufferDirection, site: Site) -> (u64, NonNull<u8>) {
        // Aligned as a page would be: callers may compute with it before they look at the address.
        const NOTHING: NonNull<u8> = NonNull::without_provenance(NonZero::new(PAGE_SIZE as usize).unwrap());
        self.try_allocate(pages, direction, site).unwrap_or_else(|error| {
            self.fail(error);
            (0, NOTHING)
        })
    }

    fn try_allocate(&self, pages: usize, direction: BufferDirection, site: Site) -> Result<(u64, NonNull<u8>), Error> {
        let device = self.device()?;
        let bytes = (pages as u64).checked_mul(PAGE_SIZE).ok_or(Error::OutOfMemory)?;
        let cacheability = if device.is_coherent() { Cacheability::WriteBack } else { Cacheability::NonCacheable };
        let memory = AttributedPages::zeroed(device.memory(), device.coherent_request(bytes)?, cacheability)?;
        // A ring that the device writes it may read too: says `BufferDirection`.
        let direction = match direction {
            BufferDirection::DriverToDevice => direction,
            _ => BufferDirection::Both,
        };
        let loan = Loan::lend_ring(&device, memory, direction, site)?;
        let address = loan.range().start();
        let ring = Ring { address, pages, memory: RingMemory::Lent(loan) };
        // It has at least a page, and page 0 of an address space is never given out.
        let start = ring.start().filter(|_| address.get() != 0).ok_or(Error::OutOfMemory)?;
        // One that is not taken is revoked at the end, outside the lock.
        let mut ring = Some(ring);
        self.0.lock().add_ring(&device, &mut ring)?;
        Ok((address.get(), start))
    }

    /// See [`virtio_drivers::Hal::dma_dealloc`].
    pub(super) fn deallocate(&self, address: u64, start: NonNull<u8>, pages: usize, site: Site) {
        let taken = self.0.lock().take_ring(Iova::new(address), start, pages);
        match taken {
            Ok(mut ring) => {
                if ring.revoke(site).is_err() {
                    self.0.lock().report.quarantined += 1;
                }
                drop(ring);
            }
            Err(misuse) => self.blame(misuse),
        }
    }

    /// See [`virtio_drivers::Hal::share`].
    ///
    /// # Safety
    ///
    /// `buffer` is valid for reads of initialized bytes, and nobody writes it meanwhile.
    pub(super) unsafe fn share(&self, buffer: NonNull<[u8]>, direction: BufferDirection, site: Site) -> u64 {
        // SAFETY: the caller's promise.
        match unsafe { self.try_share(buffer, direction, site) } {
            Ok(address) => address,
            Err(error) => self.nowhere(buffer.len() as u64, error),
        }
    }

    /// # Safety
    ///
    /// As [`Slot::share`].
    unsafe fn try_share(&self, buffer: NonNull<[u8]>, direction: BufferDirection, site: Site) -> Result<u64, Error> {
        let device = self.device()?;
        let len = buffer.len();
        let mut pages = device.pages(len as u64)?;
        // In every direction: what the device does not write comes back as it was.
        if let Some(copy) = pages.as_mut_slice().get_mut(..len) {
            // SAFETY: the caller's promise for `buffer`; `copy` has the same length, and is part of a new allocation.
            unsafe { copy.as_mut_ptr().copy_from_nonoverlapping(buffer.as_ptr().cast(), len) };
        }
        let loan = Loan::lend(&device, pages, direction, site)?;
        let address = loan.range().start().get();
        let mut share = Some(Share { loan, buffer: buffer.addr(), len, direction });
        self.0.lock().add_share(&mut share)?;
        Ok(address)
    }

    /// See [`virtio_drivers::Hal::unshare`].
    ///
    /// # Safety
    ///
    /// `buffer` is valid for writes, and nobody accesses it meanwhile.
    pub(super) unsafe fn unshare(&self, address: u64, buffer: NonNull<[u8]>, direction: BufferDirection, site: Site) {
        let iova = Iova::new(address);
        let (taken, of_a_failure) = {
            let mut account = self.0.lock();
            let index = account.shares.iter().position(|share| share.loan.range().start() == iova);
            let taken = index.map(|index| account.shares.swap_remove(index));
            let nowhere = account.occupant.as_ref().map(|occupant| occupant.nowhere.start());
            (taken, address == NO_DEVICE || nowhere == Some(iova))
        };
        let Some(share) = taken else {
            // The end of a share that failed is as it should be, and leaves the buffer as it was.
            if !of_a_failure {
                self.blame(Misuse::NotShared(iova));
            }
            return;
        };
        let same = share.is_of(buffer, direction);
        match share.loan.take_back(site) {
            Ok(_) if !same => self.blame(Misuse::OtherBuffer(iova)),
            Ok(pages) if direction != BufferDirection::DriverToDevice => {
                if let Some(copy) = pages.as_slice().get(..buffer.len()) {
                    // SAFETY: the caller's promise for `buffer`; `copy` has the same length, and is no part of it: it was
                    // allocated here.
                    unsafe { buffer.as_ptr().cast::<u8>().copy_from_nonoverlapping(copy.as_ptr(), copy.len()) };
                }
            }
            Ok(_) => {}
            Err(_) => self.0.lock().report.quarantined += 1,
        }
    }

    /// Takes note of a failure, and finds an address at which `len` bytes are not mapped and never will be.
    #[cold]
    fn nowhere(&self, len: u64, error: Error) -> u64 {
        let occupant = {
            let account = self.0.lock();
            account.occupant.as_ref().map(|occupant| (occupant.device.clone(), occupant.nowhere))
        };
        self.fail(error);
        let Some((device, nowhere)) = occupant else { return NO_DEVICE };
        if len > nowhere.len() {
            // A device could run past what is set aside.
            log::error!("dma: {} is put out of use: {len:#x} bytes could not be shared with it", device.name());
            if let Err(error) = device.shut_down() {
                log::error!("dma: {}: {error}", device.name());
            }
        }
        nowhere.start().get()
    }

    #[cold]
    fn fail(&self, error: Error) {
        let name = self.name();
        log::error!("dma: the driver of {} gets no memory: {error}", name.as_deref().unwrap_or("no device"));
        let mut account = self.0.lock();
        account.report.failures += 1;
        let before = account.report.last_failure.replace(error);
        drop(account);
        drop(before);
    }

    #[cold]
    fn blame(&self, misuse: Misuse) {
        let name = self.name();
        log::error!("dma: the driver of {} is wrong: {misuse}", name.as_deref().unwrap_or("no device"));
        let mut account = self.0.lock();
        account.report.misuses += 1;
        account.report.last_misuse = Some(misuse);
    }

    fn name(&self) -> Option<alloc::sync::Arc<str>> {
        self.0.lock().report.device.clone()
    }
}

impl core::fmt::Debug for Slot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Slot({})", self.report())
    }
}

/// Sets addresses aside in the device's address space.
fn set_aside(device: &Device) -> Result<IovaRange, Error> {
    let translated = device.translated()?;
    let (iova, limit) = (translated.domain().iova(), Iova::new(device.limits().address_mask));
    let mut last = Err(IovaError::OutOfMemory);
    for len in NOWHERE {
        last = iova.allocate(len, translated.page_size(), limit);
        if last.is_ok() {
            break;
        }
    }
    Ok(last?)
}

/// Gives those addresses back.
fn give_back(occupant: &Occupant) {
    if let Ok(translated) = occupant.device.translated() {
        translated.release(occupant.nowhere);
    }
}
