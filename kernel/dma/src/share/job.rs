//! What a device is doing with a shared buffer, and who waits for it: fences.
//!
//! A [`Job`] is begun before a request is handed to a queue, and goes with it as its loan: the queue has it until the device has
//! returned the request, whatever becomes of who asked for it. It is over when the queue's completion says so ([`Watch`]), or
//! at the latest when the queue lets go of it. What begins later and conflicts waits; what one device does is its driver's to order,
//! and does not wait for itself.
//!
//! # How it ends
//!
//! A watched job has gone well when its watch says so, at the latest when it is asked for the last time, before the loan goes. In every
//! other case it has failed, and who waits for it is told. A failed job whose loan the queue still has stays in everybody's way: the
//! device may still be at it, as one that broke the rules may be until it is reset. And a failed writer of which nobody was told,
//! neither who asked for it nor who waited, is remembered after its end, for the first who comes.
//!
//! # Several buffers
//!
//! Two jobs that each have a buffer and wait for the other's would wait for ever. [`Turn::take`] begins work on all of several buffers
//! or on none, in the order of their addresses, and holds none while it waits.

use super::{Conflict, Inner, State, Users, never};
use crate::error::BusyWith;
use crate::lent::{Lent, Segment, SharedLoan, sealed};
use crate::{Device, Error};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{Deadline, fallible, wait_until};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use core::{fmt, ptr};
use spin::Once;

/// Looks whether a device has done something.
pub trait Watch: Send + Sync {
    /// Whether it went well; `None` while the device is at it, and when it can no longer be seen. Up to the moment at which the queue
    /// begins to let go of the loan it can be seen, in that moment too. Called with interrupts masked: looks, and neither waits nor
    /// allocates nor frees.
    fn outcome(&self) -> Option<bool>;
}

/// A loan of a shared buffer, as jobs see it.
pub trait Synced {
    fn buffer(&self) -> &Arc<Inner>;
    /// Takes what the device has written where everybody sees it.
    fn fetch(&self) -> Result<(), Error>;
    /// Lets the device see what everybody sees.
    fn supply(&self) -> Result<(), Error>;
}

const PENDING: u8 = 0;
/// Somebody takes over what the device has written.
const FETCHING: u8 = 1;
const DONE: u8 = 2;
const FAILED: u8 = 3;

pub(crate) struct FenceState {
    state: AtomicU8,
    watch: Once<Arc<dyn Watch>>,
    loan: Weak<dyn Lent>,
    buffer: Weak<Inner>,
    /// Somebody has been told that it failed.
    told: AtomicBool,
}

impl FenceState {
    /// Whether all went well, when it is over.
    pub(super) fn outcome(&self) -> Option<bool> {
        match self.state.load(Ordering::Acquire) {
            DONE => Some(true),
            FAILED => Some(false),
            PENDING => self.watch.get()?.outcome(),
            _ => None,
        }
    }

    fn is(&self, state: u8) -> bool {
        self.state.load(Ordering::Acquire) == state
    }

    /// Whether nobody has to take anything over any more.
    fn is_settled(&self) -> bool {
        self.state.load(Ordering::Acquire) >= DONE
    }

    /// Whether it has failed, for who passes that on.
    pub(super) fn tell(&self) -> bool {
        let failed = self.outcome() == Some(false);
        if failed {
            self.told.store(true, Ordering::Relaxed);
            self.put_away();
        }
        failed
    }

    /// Takes out of the buffer's books what is of no concern any more.
    fn put_away(&self) {
        if let Some(buffer) = self.buffer.upgrade() {
            let removed = buffer.state.lock().jobs.put_away(self);
            drop(removed);
        }
    }

    /// Waits until it is over, and what the device has written is where everybody sees it, or `given_up`. `None` if that did not come
    /// to be.
    pub(super) fn wait(&self, deadline: Deadline, given_up: &dyn Fn() -> bool) -> Option<bool> {
        // What was seen counts: a moment later somebody else may be taking over what was written, and then there is nothing to be seen.
        let mut seen = None;
        let look = || {
            seen = self.outcome();
            seen.is_some() || given_up()
        };
        wait_until(deadline, look).ok()?;
        let mut well = seen?;
        if well {
            self.settle(true, None);
            wait_until(deadline, || self.is_settled()).ok()?;
            well = self.is(DONE);
        }
        self.told.fetch_or(!well, Ordering::Relaxed);
        // The loan may have gone meanwhile.
        self.put_away();
        Some(well)
    }

    /// Takes over what the device has written, once.
    fn settle(&self, well: bool, loan: Option<&dyn Lent>) {
        if self.state.compare_exchange(PENDING, FETCHING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let upgraded = if loan.is_none() { self.loan.upgrade() } else { None };
        let fetched = match loan.or(upgraded.as_deref()).and_then(Lent::shared) {
            Some(SharedLoan(loan)) => loan.fetch().is_ok(),
            // It has been revoked, which takes over as well.
            None => true,
        };
        self.state.store(if well && fetched { DONE } else { FAILED }, Ordering::Release);
        base::notify();
    }
}

/// What devices do with a buffer at this moment.
#[derive(Default)]
pub(crate) struct Jobs(Vec<Entry>);

struct Entry {
    /// Whose it is: compared, not looked at.
    device: usize,
    writes: bool,
    work: Work,
}

enum Work {
    /// The device may be at it.
    Begun(Arc<FenceState>),
    /// The loan has gone, while somebody takes over what the device wrote.
    Ended(Arc<FenceState>),
    /// It has failed, which nobody knows.
    Failed(Weak<FenceState>),
}

impl Entry {
    fn is_of(&self, fence: &FenceState) -> bool {
        match &self.work {
            Work::Begun(own) | Work::Ended(own) => ptr::eq(&**own, fence),
            Work::Failed(own) => ptr::eq(own.as_ptr(), fence),
        }
    }
}

impl Jobs {
    /// Finds what conflicts with work of `device`, or of the CPU, that reads or `writes`.
    pub(super) fn check(&mut self, writes: bool, device: Option<usize>) -> Result<(), Conflict> {
        if self.0.is_empty() {
            return Ok(());
        }
        // What has failed stays, as long as a device may be at it. (Who holds the loan, or takes over, has the fence too: it is not
        // freed here.)
        self.0.retain(|entry| match &entry.work {
            Work::Begun(fence) | Work::Ended(fence) => !fence.is(DONE),
            Work::Failed(_) => true,
        });
        let conflicts = |entry: &Entry| (writes || entry.writes) && Some(entry.device) != device;
        let Some(place) = self.0.iter().position(conflicts) else { return Ok(()) };
        match self.0.get(place).map(|entry| &entry.work) {
            Some(Work::Begun(fence) | Work::Ended(fence)) => Err(Conflict::Job(fence.clone())),
            // Who comes is told, and so the others need not be.
            _ => {
                self.0.swap_remove(place);
                Err(Conflict::Failed)
            }
        }
    }

    /// Takes note that the loan of a job goes. Returns its fence, to be dropped without the lock.
    fn end(&mut self, fence: &FenceState) -> Option<Arc<FenceState>> {
        let entry = self.0.iter_mut().find(|entry| entry.is_of(fence))?;
        if let Work::Begun(own) = &entry.work {
            entry.work = Work::Ended(own.clone());
        }
        self.put_away(fence)
    }

    /// Takes out what is of no concern any more, or remembers only that it has failed. Returns its fence, to be dropped without the
    /// lock.
    fn put_away(&mut self, fence: &FenceState) -> Option<Arc<FenceState>> {
        let place = self.0.iter().position(|entry| entry.is_of(fence))?;
        let Entry { device, writes, work } = self.0.get_mut(place)?;
        let told = fence.told.load(Ordering::Relaxed);
        match work {
            Work::Begun(_) => None,
            Work::Ended(_) if !fence.is_settled() => None,
            Work::Ended(own) if *writes && fence.is(FAILED) && !told => {
                let (own, device) = (own.clone(), *device);
                *work = Work::Failed(Arc::downgrade(&own));
                // One is enough of each device: where nobody comes they would become more and more.
                let old = |entry: &Entry| matches!(entry.work, Work::Failed(_)) && entry.device == device;
                self.0.retain(|entry| entry.is_of(fence) || !old(entry));
                Some(own)
            }
            Work::Failed(_) if !told => None,
            _ => match self.0.swap_remove(place).work {
                Work::Begun(own) | Work::Ended(own) => Some(own),
                Work::Failed(_) => None,
            },
        }
    }
}

/// The beginning of a job, or what keeps it from beginning, when the users were those.
enum Begun {
    Ticket(Ticket),
    Not(Conflict, Users),
}

/// One job in one buffer's books.
struct Ticket {
    fence: Arc<FenceState>,
    loan: Arc<dyn Lent>,
}

impl Ticket {
    /// Begins work on what was lent, if nothing conflicts. `None` where it is not of a shared buffer.
    fn begin(loan: &Arc<dyn Lent>) -> Result<Option<Begun>, Error> {
        let Some(SharedLoan(shared)) = loan.shared() else { return Ok(None) };
        let (state, told) = (AtomicU8::new(PENDING), AtomicBool::new(false));
        let buffer = Arc::downgrade(shared.buffer());
        let fence = FenceState { state, watch: Once::new(), loan: Arc::downgrade(loan), buffer, told };
        let fence = fallible::arc(fence).map_err(|_| Error::OutOfMemory)?;
        let device = Arc::as_ptr(loan.device().shared_name()).addr();
        let writes = loan.device_writes();
        let admit = |state: &mut State| {
            let users = &state.users;
            if users.cpu_writers != 0 {
                return Err(BusyWith::CpuWrites.into());
            }
            if writes && users.cpu_readers != 0 {
                return Err(BusyWith::CpuReads.into());
            }
            state.jobs.check(writes, Some(device))?;
            state.jobs.0.try_reserve(1).map_err(|_| Conflict::OutOfMemory)?;
            state.jobs.0.push(Entry { device, writes, work: Work::Begun(fence.clone()) });
            Ok(())
        };
        let admitted = {
            let mut state = shared.buffer().state.lock();
            admit(&mut state).map_err(|conflict| (conflict, state.users))
        };
        match admitted {
            Ok(()) => Ok(Some(Begun::Ticket(Self { fence, loan: loan.clone() }))),
            Err((Conflict::OutOfMemory, _)) => Err(Error::OutOfMemory),
            Err((conflict, users)) => Ok(Some(Begun::Not(conflict, users))),
        }
    }

    /// As [`Ticket::begin`], and waits for what conflicts.
    fn begin_by(loan: &Arc<dyn Lent>, deadline: Deadline) -> Result<Option<Self>, Error> {
        loop {
            match Self::begin(loan)? {
                None => return Ok(None),
                Some(Begun::Ticket(ticket)) => {
                    ticket.supply()?;
                    return Ok(Some(ticket));
                }
                Some(Begun::Not(conflict, users)) => {
                    let Some(SharedLoan(shared)) = loan.shared() else { return Ok(None) };
                    shared.buffer().wait_for(conflict, users, deadline, &never)?;
                }
            }
        }
    }

    /// Lets the device see what has been written up to its turn.
    fn supply(&self) -> Result<(), Error> {
        self.loan.shared().map_or(Ok(()), |SharedLoan(shared)| shared.supply())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.fence.is_settled() {
            // The last look: while the loan is here, what watches it sees it.
            let well = self.fence.watch.get().is_none_or(|watch| watch.outcome() == Some(true));
            self.fence.settle(well, Some(&*self.loan));
        }
        if let Some(SharedLoan(shared)) = self.loan.shared() {
            let removed = shared.buffer().state.lock().jobs.end(&self.fence);
            drop(removed);
        }
        base::notify();
    }
}

/// Work of a device on a loan of a shared buffer: itself the loan, to be given to the queue. What conflicts with it waits until the
/// device is done.
pub struct Job<L: Lent> {
    ticket: Ticket,
    loan: Arc<L>,
}

impl<L: Lent> Job<L> {
    /// Begins work of its device on `loan`, when what conflicts with it is over. `None` where it is not a loan of a shared buffer:
    /// nothing can conflict then.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] with who stood in the way when `deadline` passed; [`Error::JobFailed`] where a device has not done what was to
    /// be awaited; [`Error::OutOfMemory`].
    pub fn begin(loan: &Arc<L>, deadline: Deadline) -> Result<Option<Arc<Self>>, Error> {
        if loan.shared().is_none() {
            return Ok(None);
        }
        let any: Arc<dyn Lent> = loan.clone();
        let Some(ticket) = Ticket::begin_by(&any, deadline)? else { return Ok(None) };
        let job = Self { ticket, loan: loan.clone() };
        fallible::arc(job).map(Some).map_err(|_| Error::OutOfMemory)
    }

    /// Where to look whether it is over and how it went, besides at who has it. To be called once.
    pub fn watch(&self, watch: Arc<dyn Watch>) {
        self.ticket.fence.watch.call_once(|| watch);
        // It may be over already, and who waits has had nothing to look at.
        base::notify();
    }

    /// Something to wait for.
    pub fn fence(&self) -> Fence {
        Fence(self.ticket.fence.clone())
    }
}

/// The end of a [`Job`] or of a [`Turn`]'s work. Clones are of the same.
#[derive(Clone)]
pub struct Fence(Arc<FenceState>);

impl Fence {
    /// Whether all went well; `None` while it is not over.
    pub fn outcome(&self) -> Option<bool> {
        self.0.outcome()
    }

    /// Takes note that it went wrong, or that nobody will see how it goes, for those who wait or come. It is in the way of others until
    /// the queue has let go of the job, as the device may be at work until then.
    pub fn fail(&self) {
        self.0.settle(false, None);
    }

    /// Takes note that whoever asked for the work knows that it went wrong: nobody else needs to be told once the device has gone.
    pub fn known_to_have_failed(&self) {
        self.fail();
        self.0.tell();
    }

    /// Sleeps until it is over. Says whether all went well.
    ///
    /// # Errors
    ///
    /// [`base::TimedOut`].
    pub fn wait(&self, deadline: Deadline) -> Result<bool, base::TimedOut> {
        self.0.wait(deadline, &never).ok_or(base::TimedOut)
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fence({:?})", self.outcome())
    }
}

impl<L: Lent> sealed::Sealed for Job<L> {}

impl<L: Lent> Lent for Job<L> {
    fn device(&self) -> &Device {
        self.loan.device()
    }
    fn len(&self) -> u64 {
        self.loan.len()
    }
    fn segments(&self) -> &[Segment] {
        self.loan.segments()
    }
    fn device_reads(&self) -> bool {
        self.loan.device_reads()
    }
    fn device_writes(&self) -> bool {
        self.loan.device_writes()
    }
}

/// Work on several loans at once, begun together. Over when it is dropped.
pub struct Turn {
    tickets: Vec<Ticket>,
}

impl Turn {
    /// Begins work on all of `loans`, each by its device, when nothing conflicts with any. Those of no shared buffer are passed over.
    ///
    /// # Errors
    ///
    /// As [`Job::begin`]; [`Error::Busy`] too where two of the loans conflict with each other. Nothing is begun then.
    pub fn take(loans: &[Arc<dyn Lent>], deadline: Deadline) -> Result<Self, Error> {
        let mut order = Vec::new();
        order.try_reserve_exact(loans.len())?;
        let place = |loan: &Arc<dyn Lent>| loan.shared().map(|SharedLoan(shared)| Arc::as_ptr(shared.buffer()).addr());
        order.extend(loans.iter().filter_map(|loan| Some((place(loan)?, loan))));
        order.sort_unstable_by_key(|(place, _)| *place);
        let mut turn = Self { tickets: Vec::new() };
        turn.tickets.try_reserve_exact(order.len())?;
        'again: loop {
            for (_, loan) in &order {
                match Ticket::begin(loan)? {
                    None => {}
                    Some(Begun::Ticket(ticket)) => turn.tickets.push(ticket),
                    Some(Begun::Not(conflict, users)) => {
                        let Some(SharedLoan(shared)) = loan.shared() else { continue };
                        let own =
                            |fence: &Arc<FenceState>| turn.tickets.iter().any(|own| Arc::ptr_eq(&own.fence, fence));
                        if matches!(&conflict, Conflict::Job(fence) if own(fence)) {
                            return Err(shared.buffer().busy(BusyWith::AtWork));
                        }
                        // Whoever waits has nothing.
                        turn.tickets.clear();
                        shared.buffer().wait_for(conflict, users, deadline, &never)?;
                        continue 'again;
                    }
                }
            }
            break;
        }
        turn.tickets.iter().try_for_each(Ticket::supply)?;
        Ok(turn)
    }

    /// Something to wait for, for each of the loans of shared buffers, in no particular order.
    pub fn fences(&self) -> impl Iterator<Item = Fence> {
        self.tickets.iter().map(|ticket| Fence(ticket.fence.clone()))
    }
}
