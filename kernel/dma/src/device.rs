//! One bus master: who it is, what it can reach, and the way from its memory to its addresses.
//!
//! # Locking
//!
//! None on the way of a mapping at a range that is kept for the device ([`crate::berth`]); on the general way those of the group, the
//! address allocator and the page table below, which are taken one after the other.
//!
//! Nor do cores that map for the same device write to the same memory: what keeps it alive is counted by its owners, and for its loans
//! by each core ([`body`]).

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space")]

mod body;
mod how;
mod lending;
mod loan;
#[cfg(all(test, feature = "fakes"))]
mod tests;

pub(crate) use body::Body;
use body::Handle;
pub(crate) use how::Kind;
pub use loan::Loan;
pub(crate) use loan::Refused;
use loan::Special;

use crate::berth::Berths;
use crate::coherent::{Coherent, DeviceShared, Unpublished};
use crate::combined::WriteCombined;
use crate::direct::{BusWindow, Direct};
use crate::explain::Explanation;
use crate::hidden::HiddenPages;
use crate::lazy::{self, Strictness};
use crate::lent::Lent;
use crate::memory::{DmaMemory, PageRequest};
use crate::pages::round_up;
use crate::policy::{self, Source};
use crate::pool::PoolRef;
use crate::record::Records;
use crate::scoped::{self, Scoped};
use crate::stats::{self, DeviceStats};
use crate::tracker::{self, Report};
use crate::translated::{self, Translated};
use crate::{
    Bidirectional, Bounce, Buffer, Bytes, Direction, Error, Ladder, Limits, Mapped, MappedBytes, MappedPeer, PageSet,
    Pages, PeerRange, Policy, Pool, Rejected,
};
use alloc::sync::Arc;
use base::{Deadline, fallible};
use core::fmt;
use core::panic::Location;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};
use iommu::group::{AttachmentState, Group};
use iommu::{Iova, PAGE_SIZE, Prot};

/// Mappings that are named one by one on the console when a device is removed.
const LOGGED: usize = 8;

/// What a device behind an IOMMU is made of.
pub struct DeviceConfig<'a> {
    /// Its name in reports, such as `virtio-blk 0000:00:02.0`.
    pub name: &'a str,
    /// Its group, attached to its default DMA domain.
    pub group: Arc<Group>,
    /// What it can put on the bus.
    pub limits: Limits,
    /// Whether it snoops the CPU's caches.
    pub coherent: bool,
    /// Where its coherent and bounce memory comes from.
    pub memory: &'static dyn DmaMemory,
}

/// What a device without an IOMMU is made of.
pub struct DirectConfig<'a> {
    /// Its name in reports.
    pub name: &'a str,
    /// The physical memory that it reaches, and where; [`BusWindow::identity`] if nothing is said of it.
    pub windows: &'a [BusWindow],
    /// What it can put on the bus.
    pub limits: Limits,
    /// Whether it snoops the CPU's caches.
    pub coherent: bool,
    /// Where its coherent and bounce memory comes from.
    pub memory: &'static dyn DmaMemory,
}

/// One bus master. Clones are the same device; its mappings keep it, and with it the address space, alive.
#[derive(Clone)]
pub struct Device(Handle);

/// Cores that do not count their loans in one place. (Those of further cores are counted with the loans of these.)
pub(crate) const SHARDS: usize = 16;

struct Inner {
    name: Arc<str>,
    limits: Limits,
    coherent: bool,
    memory: &'static dyn DmaMemory,
    backend: Backend,
    records: Arc<Records>,
    trusted: bool,
    pool: Source,
    /// Copies that were lent.
    copies: AtomicU64,
    /// Those of the way, once more: found without asking which way that is.
    berths: Option<Arc<Berths>>,
    /// The same, if mappings may end lazily; otherwise null.
    lapsing: AtomicPtr<Berths>,
    /// [`Strictness`].
    strictness: AtomicU8,
}

impl Inner {
    fn set_strictness(&self, strictness: Strictness) {
        self.strictness.store(strictness as u8, Ordering::Relaxed);
        let lapsing = self.berths.as_ref().filter(|_| strictness != Strictness::Always);
        // INVARIANT: null, or the berths that are kept here.
        self.lapsing.store(lapsing.map_or(null_mut(), |berths| Arc::as_ptr(berths).cast_mut()), Ordering::Relaxed);
    }

    /// The berths, if mappings may end lazily.
    #[inline(always)]
    fn lapsing(&self) -> Option<&Berths> {
        // SAFETY: null, or those that are kept here (invariant), as long as this is.
        unsafe { self.lapsing.load(Ordering::Relaxed).as_ref() }
    }

    #[inline]
    fn way(&self) -> Way<'_> {
        match &self.backend {
            Backend::Translated(translated) | Backend::SpecialTranslated(translated, _) => Way::Translated(translated),
            Backend::Direct(direct) | Backend::SpecialDirect(direct, _) => Way::Direct(direct),
        }
    }

    #[inline(always)]
    fn translated_way(&self) -> Option<&Translated> {
        match self.way() {
            Way::Translated(translated) => Some(translated),
            Way::Direct(_) => None,
        }
    }
}

/// The way of a device's memory to its addresses. What is special about a device is another variant, so that the others do not
/// ask for it: that caches are maintained for it, that a tracker records what nothing translates, that buffers are copied first. (With
/// a tag of its own: one that is folded into a field takes more instructions to read.)
#[repr(u8)]
enum Backend {
    Translated(Translated),
    /// Buffers are copied first, if that is said; the rest, and the copies, go the way of the one above. Likewise below.
    SpecialTranslated(Translated, Option<Copying>),
    Direct(Direct),
    SpecialDirect(Direct, Option<Copying>),
}

/// Which buffers are copied.
enum Copying {
    All,
    /// All that are not this pool's.
    Foreign(&'static Pool),
}

/// Through the IOMMU or past it.
enum Way<'a> {
    Translated(&'a Translated),
    Direct(&'a Direct),
}

impl Device {
    /// Makes the device of a group that is attached to its default DMA domain. The device keeps to that domain: what is mapped
    /// while the group is elsewhere would not be reached, and is refused.
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] or [`Error::OwnedDomain`] where the group is attached to nothing or to another domain,
    /// [`Error::BadLimits`], [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// - All bus masters that the device stands for are streams of `group` and are translated by the group's IOMMU, so that
    ///   the contract of [`iommu::contract`] speaks of them.
    /// - `coherent` is true only if the device's accesses snoop the CPU's caches.
    pub unsafe fn new(config: DeviceConfig<'_>) -> Result<Self, Error> {
        // SAFETY: the caller's promise; nothing is trusted.
        unsafe { Self::with_policy(config, Policy::default()) }
    }

    /// As [`Device::new`], with a say in how it is treated. Where its only memory is a restricted pool, that is its memory instead
    /// of what `config` says.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    ///
    /// # Safety
    ///
    /// As [`Device::new`], and where the policy says that it is trusted: the board vouches for the device, as for
    /// [`Device::direct`].
    pub unsafe fn with_policy(config: DeviceConfig<'_>, policy: Policy) -> Result<Self, Error> {
        config.limits.check()?;
        let name = fallible::text(config.name).ok_or(Error::OutOfMemory)?;
        let copying = Copying::of(&policy);
        let plain = copying.is_none() && config.coherent;
        let translated = Translated::new(config.group, &name, plain)?;
        let backend = match copying {
            None if plain => Backend::Translated(translated),
            copying => Backend::SpecialTranslated(translated, copying),
        };
        Self::register(name, config.limits, config.coherent, config.memory, backend, &policy)
    }

    /// Makes a device that no IOMMU translates for. Nothing keeps it from any memory.
    ///
    /// # Errors
    ///
    /// [`Error::BadWindow`], [`Error::BadLimits`], [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// - The board vouches for the device: it accesses no memory but what its driver tells it to, and no longer than its driver
    ///   tells it to.
    /// - The windows say where the memory is for the device.
    /// - `coherent` is true only if the device's accesses snoop the CPU's caches.
    pub unsafe fn direct(config: DirectConfig<'_>) -> Result<Self, Error> {
        // SAFETY: the caller's promise.
        unsafe { Self::direct_with_policy(config, None, Policy::default()) }
    }

    /// As [`Device::direct`], with a say in how it is treated, and with the `group` that an IOMMU lets through
    /// ([`Group::attach_identity`]), if there is one. The device is then a user of the group.
    ///
    /// # Errors
    ///
    /// As [`Device::direct`]; [`Error::NotAttached`] where the group is not let through.
    ///
    /// # Safety
    ///
    /// As [`Device::direct`].
    pub unsafe fn direct_with_policy(
        config: DirectConfig<'_>,
        group: Option<Arc<Group>>,
        policy: Policy,
    ) -> Result<Self, Error> {
        config.limits.check()?;
        let name = fallible::text(config.name).ok_or(Error::OutOfMemory)?;
        let direct = Direct::new(config.windows, &config.limits, group, &name)?;
        let backend = match Copying::of(&policy) {
            None if config.coherent && !tracker::is_on() => Backend::Direct(direct),
            copying => Backend::SpecialDirect(direct, copying),
        };
        Self::register(name, config.limits, config.coherent, config.memory, backend, &policy)
    }

    fn register(
        name: Arc<str>,
        limits: Limits,
        coherent: bool,
        memory: &'static dyn DmaMemory,
        backend: Backend,
        policy: &Policy,
    ) -> Result<Self, Error> {
        let translated = match &backend {
            Backend::Translated(translated) | Backend::SpecialTranslated(translated, _) => Some(translated),
            Backend::Direct(_) | Backend::SpecialDirect(..) => None,
        };
        let berths = translated.and_then(Translated::berths).cloned();
        let records = fallible::arc(Records::new(name.clone(), translated.is_some(), berths.clone())?)
            .map_err(|_| Error::OutOfMemory)?;
        stats::register(&records)?;
        let memory = match policy.bounce {
            Bounce::Restricted(pool) => pool,
            _ => memory,
        };
        let (trusted, pool, copies) = (policy.trusted, Source::new(&policy.bounce), AtomicU64::new(0));
        let inner = Inner {
            name,
            limits,
            coherent,
            memory,
            backend,
            records,
            trusted,
            pool,
            copies,
            berths,
            lapsing: AtomicPtr::new(null_mut()),
            strictness: AtomicU8::new(Strictness::Always as u8),
        };
        inner.set_strictness(lazy::default_strictness());
        Handle::new(inner).map(Self)
    }

    /// Its name in reports.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// What it can put on the bus.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Whether an IOMMU keeps it from memory that it was not lent.
    pub fn is_isolated(&self) -> bool {
        matches!(self.way(), Way::Translated(_))
    }

    /// Whether a buffer that shares its page with other memory is lent to it as it is.
    pub fn is_trusted(&self) -> bool {
        self.0.trusted
    }

    /// How often it was lent a copy in place of a buffer.
    pub fn copies(&self) -> u64 {
        self.0.copies.load(Ordering::Relaxed)
    }

    /// The most bytes that can be mapped at one time, wherever the buffer is: bounded by the device's addresses, and where it may
    /// need a copy, by the pool. (A buffer that the device itself has allocated may be larger.)
    pub fn max_mapping_size(&self) -> u64 {
        let limits = &self.0.limits;
        let addresses = match self.way() {
            Way::Translated(translated) => translated.largest(limits.address_mask),
            Way::Direct(direct) => direct.windows.reach(limits.address_mask).get(),
        };
        let copied = match &self.0.backend {
            Backend::SpecialTranslated(_, Some(_)) | Backend::SpecialDirect(_, Some(_)) => true,
            Backend::Translated(_) | Backend::SpecialTranslated(_, None) => false,
            Backend::Direct(direct) | Backend::SpecialDirect(direct, None) => {
                let unlimited = limits.address_mask == u64::MAX && limits.min_align <= PAGE_SIZE;
                !(unlimited && direct.windows.is_all()) && self.0.pool.size() != 0
            }
        };
        if copied { addresses.min(self.0.pool.size()) } else { addresses }
    }

    /// The size of mappings, in bytes, beyond which larger ones gain nothing: what the device says, and what the allocator of
    /// addresses keeps ready.
    pub fn optimal_mapping_size(&self) -> u64 {
        let ready = match self.way() {
            Way::Translated(translated) => translated.page_size().saturating_mul(translated::READY_PAGES),
            Way::Direct(_) => u64::MAX,
        };
        self.0.limits.optimal_size.min(ready).min(self.max_mapping_size())
    }

    #[inline]
    fn way(&self) -> Way<'_> {
        self.0.way()
    }

    #[inline(always)]
    fn translated_way(&self) -> Option<&Translated> {
        self.0.translated_way()
    }

    /// Whether it snoops the CPU's caches.
    #[inline]
    pub fn is_coherent(&self) -> bool {
        self.0.coherent
    }

    /// Where its memory comes from.
    pub fn memory(&self) -> &'static dyn DmaMemory {
        self.0.memory
    }

    /// The smallest unit that can be lent to it, in bytes: buffers are multiples of this.
    pub fn page_size(&self) -> u64 {
        match self.way() {
            Way::Translated(translated) => translated.page_size(),
            Way::Direct(_) => PAGE_SIZE,
        }
    }

    /// Checks that `lent` was lent to this device. Every driver does so before it names an address to its device.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignDevice`].
    #[inline]
    pub fn check_loan(&self, lent: &dyn Lent) -> Result<(), Error> {
        let owner = lent.device();
        if owner == self {
            return Ok(());
        }
        Err(Error::ForeignDevice { lent_to: owner.0.name.clone(), device: self.0.name.clone() })
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that the device reaches.
    ///
    /// # Errors
    ///
    /// As [`Pages::zeroed`].
    pub fn pages(&self, bytes: u64) -> Result<Pages, Error> {
        Pages::allocate(self.0.memory, self.request(bytes)?)
    }

    /// Allocates at least `bytes` of zeroed memory that the device reaches, in chunks of `ladder`.
    ///
    /// # Errors
    ///
    /// As [`PageSet::allocate`].
    pub fn page_set(&self, bytes: u64, ladder: Ladder) -> Result<PageSet, Error> {
        PageSet::allocate(self.0.memory, self.request(bytes)?, ladder)
    }

    /// A request for whole pages of the device's, where the device reaches them.
    pub(crate) fn request(&self, bytes: u64) -> Result<PageRequest, Error> {
        self.request_below(bytes, self.0.limits.address_mask)
    }

    /// A request for whole pages that are coherent memory of the device's.
    pub(crate) fn coherent_request(&self, bytes: u64) -> Result<PageRequest, Error> {
        self.request_below(bytes, self.0.limits.coherent_mask)
    }

    fn request_below(&self, bytes: u64, mask: u64) -> Result<PageRequest, Error> {
        let page_size = self.page_size();
        // A power of two.
        let Some(rounded) = round_up(bytes)?.checked_add(page_size - 1) else { return Err(Error::BadSize(bytes)) };
        let bytes = rounded & !(page_size - 1);
        let (align, below) = match self.way() {
            Way::Translated(translated) => (page_size, translated.output_max()),
            Way::Direct(direct) => (page_size.max(self.0.limits.min_align), direct.windows.reach(mask)),
        };
        Ok(PageRequest { bytes, align, below })
    }

    /// A pool for copies, of memory that the device reaches.
    pub(crate) fn make_pool(&self, bytes: u64) -> Result<Pool, Error> {
        let Inner { name, limits, memory, .. } = &*self.0;
        match self.way() {
            Way::Translated(translated) => Pool::new(name, *memory, bytes, translated.space().aperture().output_max),
            Way::Direct(Direct { windows, .. }) => {
                let fit = |run| windows.segments(&[run], limits.address_mask, 1, name).is_ok();
                Pool::reached(name, *memory, bytes, windows.reach(limits.address_mask), fit)
            }
        }
    }

    /// The pool for a copy of a buffer that was refused because of `why`.
    ///
    /// # Errors
    ///
    /// `why`, if a copy does not help, or there is no memory that the device reaches to make a pool of.
    #[cold]
    pub(crate) fn pool_for(&self, why: Error) -> Result<PoolRef, Error> {
        if !policy::helps(&why) {
            return Err(why);
        }
        self.0.pool.get(self).map_err(|_| why)
    }

    pub(crate) fn count_copy(&self) {
        self.0.copies.fetch_add(1, Ordering::Relaxed);
    }

    /// Lends `buffer` to the device. Until the mapping is unmapped or dropped nobody else has it.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the buffer back, with the reason: no free address, no memory for tables, the group is blocked or
    /// attached to a driver's own domain, the memory cannot be reached.
    #[inline]
    #[track_caller]
    pub fn map<D: Direction, B: Buffer>(&self, buffer: B) -> Result<Mapped<D, B>, Rejected<B>> {
        Mapped::new(self, buffer, Location::caller())
    }

    /// Lends `buffer` to the device at `iova`: for devices that insist on an address. From here on until the mapping ends, the
    /// DMA-API allocates only from what remains.
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::Iova`] where part of the range is reserved or lent already, or out of the device's reach;
    /// [`Error::NotIsolated`] where nothing translates.
    #[track_caller]
    pub fn map_at<D: Direction, B: Buffer>(&self, iova: Iova, buffer: B) -> Result<Mapped<D, B>, Rejected<B>> {
        Mapped::new_at(self, iova, buffer, Location::caller())
    }

    /// Lends bytes that are no whole pages. A device that is not trusted gets a copy: see [`Bytes`].
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::PoolExhausted`].
    #[track_caller]
    pub fn map_bytes<D: Direction>(&self, bytes: Bytes) -> Result<MappedBytes<D>, Rejected<Bytes>> {
        MappedBytes::new(self, bytes, Location::caller())
    }

    /// Lends what belongs to another device on the bus: see [`PeerRange`].
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::Unreachable`] where a restricted pool is all that the device may reach.
    #[track_caller]
    pub fn map_peer<D: Direction>(&self, range: PeerRange) -> Result<MappedPeer<D>, Rejected<PeerRange>> {
        MappedPeer::new(self, range, Location::caller())
    }

    /// Allocates a zeroed `T` that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::BadLayout`], and as [`Device::map`].
    #[track_caller]
    pub fn coherent<T: DeviceShared>(&self) -> Result<Coherent<T>, Error> {
        Coherent::new(self, Prot::empty(), Location::caller())
    }

    /// As [`Device::coherent`], for privileged transactions of the device only.
    ///
    /// # Errors
    ///
    /// As there; [`Error::Unsupported`] where nothing tells them from others.
    #[track_caller]
    pub fn coherent_privileged<T: DeviceShared>(&self) -> Result<Coherent<T>, Error> {
        Coherent::new(self, Prot::PRIVILEGED, Location::caller())
    }

    /// Allocates a zeroed `T` for sharing with the device, which does not reach it before [`Unpublished::publish`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::BadLayout`], [`Error::Attributes`].
    pub fn coherent_init<T: DeviceShared>(&self) -> Result<Unpublished<T>, Error> {
        Unpublished::new(self)
    }

    /// As [`Device::coherent_init`], for `count` of them one after another.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn coherent_init_slice<T: DeviceShared>(&self, count: usize) -> Result<Unpublished<[T]>, Error> {
        Unpublished::new_slice(self, count)
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that the CPU streams into and the device reads.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`]; [`Error::Attributes`] where the memory cannot be had uncached.
    #[track_caller]
    pub fn write_combined(&self, bytes: u64) -> Result<WriteCombined, Error> {
        WriteCombined::new(self, bytes, Location::caller())
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that only the device reaches.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`]; [`Error::Attributes`] where the memory cannot leave the kernel's address space.
    #[track_caller]
    pub fn hidden(&self, bytes: u64) -> Result<HiddenPages, Error> {
        HiddenPages::new(self, bytes, Location::caller())
    }

    /// Allocates at least `bytes` of zeroed, contiguous, cached memory and lends it in both directions: for long, with
    /// [`Mapped::sync_for_cpu`] and [`Mapped::sync_for_device`] between the two sides' turns.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`].
    #[track_caller]
    pub fn non_coherent(&self, bytes: u64) -> Result<Mapped<Bidirectional, Pages>, Error> {
        Ok(Mapped::new(self, self.pages(bytes)?, Location::caller())?)
    }

    /// Allocates `count` zeroed `T` one after another that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// As [`Device::coherent`].
    #[track_caller]
    pub fn coherent_slice<T: DeviceShared>(&self, count: usize) -> Result<Coherent<[T]>, Error> {
        Coherent::new_slice(self, count, Prot::empty(), Location::caller())
    }

    /// Lends a copy of borrowed `bytes` to the device while `f` runs; see [`Scoped`] for why it is always a copy.
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::StillLent`] or [`Error::Quarantined`] where the device could not be shown to have
    /// finished: `bytes` are then as they were.
    #[track_caller]
    pub fn with_mapped<D: Direction, R>(
        &self,
        bytes: &mut [u8],
        f: impl FnOnce(&Scoped<'_, D>) -> R,
    ) -> Result<R, Error> {
        scoped::run(self, bytes, f, Location::caller())
    }

    /// Says what the records know of a DMA address: for fault reports. Neither allocates nor waits; looks at the group's state
    /// under its lock.
    pub fn explain(&self, iova: Iova) -> Explanation<'_> {
        let translated = self.translated().ok();
        let translation = translated.and_then(|translated| translated.space().translate(iova));
        let elsewhere = translated.map(|translated| translated.group().current());
        let away = |state: &AttachmentState| matches!(state, AttachmentState::Owned | AttachmentState::Identity);
        let elsewhere = elsewhere.filter(away);
        Explanation::new(&self.0.name, &self.0.records, translation, elsewhere, iova)
    }

    /// The way through the IOMMU.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`] where there is none.
    pub(crate) fn translated(&self) -> Result<&Translated, Error> {
        match self.way() {
            Way::Translated(translated) => Ok(translated),
            Way::Direct(_) => Err(Error::NotIsolated(self.0.name.clone())),
        }
    }

    /// How its mappings end that may end lazily.
    #[inline(always)]
    pub fn strictness(&self) -> Strictness {
        Strictness::of(self.0.strictness.load(Ordering::Relaxed))
    }

    /// Sets how its mappings end that may end lazily. What has lapsed already is flushed in its time.
    pub fn set_strictness(&self, strictness: Strictness) {
        self.0.set_strictness(strictness);
    }

    /// Flushes what has lapsed before the call, on all cores.
    ///
    /// # Errors
    ///
    /// [`base::TimedOut`] if another core was at it, and did not finish before `deadline`. (How the revocation went, the tokens say.)
    pub fn flush(&self, deadline: Deadline) -> Result<(), base::TimedOut> {
        match &self.0.berths {
            Some(berths) => berths.flush_by(deadline),
            None => Ok(()),
        }
    }

    /// What is lent to the device, and what was.
    pub fn stats(&self) -> DeviceStats {
        DeviceStats::of(&self.0.records)
    }

    /// Lists what is lent to the device at this moment.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if there is no memory for the list.
    pub fn lendings(&self) -> Result<Report, Error> {
        let mut report = Report::default();
        report.add(&self.0.records)?;
        report.sort();
        Ok(report)
    }

    /// Takes the device out of use, as [`Device::shut_down`] does, and lists what its drivers have not taken back, the
    /// first on the console too: for the removal of a device whose drivers should be done with it.
    ///
    /// # Errors
    ///
    /// As [`Device::shut_down`]; [`Error::OutOfMemory`] if there is no memory for the list (the device is out of use then).
    pub fn remove(&self) -> Result<Report, Error> {
        self.shut_down()?;
        let left = self.lendings()?;
        if !left.is_empty() {
            log::warn!("{}: {} still lent at its removal", self.0.name, left.count());
            left.lendings.iter().take(LOGGED).for_each(|lending| log::warn!("  {lending}"));
        }
        Ok(left)
    }

    /// Takes the device out of use: nothing can be mapped for it any more, and if no other device of its group is in use, the
    /// group is blocked, so that it reaches nothing. For removal; mappings may outlive it harmlessly. (A device that shares its
    /// group with one in use cannot be told from it by the IOMMU: whoever removes it takes it off the bus first.)
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]. A device without an IOMMU cannot be blocked; that is no error. One that an IOMMU lets through is
    /// blocked too, but mapping for it is not refused.
    pub fn shut_down(&self) -> Result<(), Error> {
        match self.way() {
            Way::Translated(translated) => {
                translated.leave()?;
                if let Some(berths) = &self.0.berths {
                    berths.flush_all();
                }
                Ok(())
            }
            Way::Direct(direct) => Ok(direct.leave()?),
        }
    }
}

/// Two handles are equal when they are the same device.
impl PartialEq for Device {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.0.is(&other.0)
    }
}
impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.0.name)
    }
}
