//! Bugs that a test can switch on in the driver, to show that each would be found.
//!
//! A hook is one expression in the code that it breaks: `if seeded(Bug::NoTlbi) { ... }`. Outside this crate's own tests
//! [`seeded`] is a constant `false` and nothing of the hooks is left. The switch is the thread's, so that a broken driver in one
//! test does not disturb another.
//!
//! `model/tests/seeded.rs` walks through all of them and shows, in its output, which scenario found which bug; `seeded-bugs.md`
//! has the table.

use crate::spec::command::TlbiRange;
use iommu::IovaRange;

macro_rules! bugs {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A bug.
        // Some are hooked into the model's memory only, which is not part of every build.
        #[cfg_attr(not(test), allow(dead_code))]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Bug {
            $($(#[$doc])* $name,)*
        }

        #[cfg(test)]
        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

bugs! {
    /// Revocation invalidates nothing by address.
    NoTlbi,
    /// Nor as a whole, where that stands for many addresses.
    NoBroadTlbi,
    /// Invalidations name the ASID of another space.
    WrongAsid,
    /// Invalidations name the VMID of another space.
    WrongVmid,
    /// Invalidations end one page before the range does.
    RangeOnePageShort,
    /// The level hint is that of the next larger leaf.
    WrongTtl,
    /// Level hints are given although part of the range was not mapped, and may have been left over by a failure.
    HintsAlways,
    /// Of several ranges only the first is invalidated.
    SecondRangeForgotten,
    /// A CMD_SYNC that was not consumed in time counts as one that was.
    TimeoutIsSuccess,
    /// A command that the SMMU refused counts as executed.
    RefusalIsSuccess,
    /// After a failed revocation the next one does not invalidate the whole space.
    FailureForgotten,
    /// A space is freed without an invalidation of everything tagged with it.
    NoTlbiBeforeFree,
    /// An ASID or VMID is given out again without one.
    AsidReusedEarly,
    /// Two spaces have the same ASID or VMID.
    AsidShared,
    /// The memory types in CD.MAIR are in another order than in the tables.
    MairWrong,
    /// CD.IPS is the tables' size, not what the SMMU puts out.
    IpsUnclamped,
    /// STE.S2SL0 is one level off.
    S2StartWrong,
    /// A CD of a nested space is written into a table whose STE has no stage 2 yet.
    CdWithoutStage2,
    /// CDs are not published.
    CdNotPublished,
    /// The first word of an STE is not published.
    SteNotPublished,
    /// A new second level of the stream table is linked but not published.
    StesNotPublished,
    /// The link to it is not published.
    L1NotPublished,
    /// Leaves of translation tables are not published.
    LeafNotPublished,
    /// Links of translation tables are not published.
    LinkNotPublished,
    /// Cleared leaves are not published.
    ClearNotPublished,
    /// L1STD.Span is one less than the second level has.
    SpanTooShort,
    /// An STE is changed without CMD_CFGI_STE.
    NoCfgiSte,
    /// CMD_CFGI_STE names the neighbouring stream.
    CfgiWrongStream,
    /// A CD is changed without CMD_CFGI_CD.
    NoCfgiCd,
    /// CMD_CFGI_CD has Leaf set although the L1CD changed.
    CfgiCdLeafOnly,
    /// The link to a second level of CDs is not published.
    L1CdNotPublished,
    /// What is cached of both stages combined is not invalidated when stage 2 is unmapped.
    NoTlbiAbove,
    /// It is, but before the invalidation of stage 2 has completed.
    NoSyncBetweenStages,
    /// Revocation does not reach the devices' own caches.
    NoAtcInvalidation,
    /// Nor does taking a space away from a stream.
    AtcKept,
    /// Of several SMMUs only the first invalidates.
    OtherSmmuForgotten,
    /// CMD_CFGI_STE has Leaf set although the L1STD changed.
    CfgiLeafOnly,
    /// The word that switches an STE over is stored before those that it needs.
    StoresSwapped,
    /// There is no sync point between the two.
    NoSyncWhenStaged,
    /// The old space is let go before the SMMU has let go of it.
    SpaceFreedEarly,
    /// A space is freed although the change away from it failed.
    FailedSpaceFreed,
    /// After a failed change the STE in memory is taken for what the SMMU has.
    StaleForgotten,
    /// GBPA.ABORT is not set before the SMMU is reconfigured.
    DoorLeftOpen,
    /// Nothing is invalidated before translation is switched on.
    NoBootInvalidation,
    /// CR0ACK is not awaited.
    Cr0NotAwaited,
    /// Batches end without a CMD_SYNC.
    NoSync,
    /// The CMD_SYNC is issued but its consumption not awaited: pages are given back early.
    SyncNotAwaited,
    /// Commands are not published.
    CommandNotPublished,
    /// CMDQ_PROD is written before the commands are.
    ProdBeforeCommands,
    /// A full queue is overwritten.
    QueueOverfilled,
    /// The wrap bit is missing in CMDQ_PROD.
    WrapDropped,
    /// A command error is acknowledged and the command left where it is.
    ErrorAckedWithoutRepair,
    /// The command that replaces it is not published.
    RepairNotPublished,
    /// A refusal is noted at the place before that of the command.
    RefusalMisplaced,
    /// A queue that was given up is opened again although the SMMU has failed.
    FailureOpened,
    /// The SMMU is not told of what those had written whom somebody else gave up.
    NoBellOnRevival,
    /// Whoever leaves the registers does not look for commands that came meanwhile and that nobody waits for.
    PostedForgotten,
    /// Who goes the short way is not told that a command was refused.
    RefusalUnseen,
    /// What one core sees of CMDQ_CONS the others take for the end of what they wait for.
    OthersTakenForOwn,
    /// EVENTQ_CONS is not written.
    EventsNotTakenOut,
    /// Event records are read before they are observed.
    EventsNotObserved,
    /// EVENTQ_PROD.OVFLG is not acknowledged.
    OverflowNotAcknowledged,
    /// After a flood the queue is not looked at when its interrupt is on again.
    NoLookAfterFlood,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn seeded(_: Bug) -> bool {
    false
}

#[cfg(test)]
std::thread_local! {
    static SEEDED: core::cell::Cell<Option<Bug>> = const { core::cell::Cell::new(None) };
}

/// Whether this thread's driver has this bug.
#[cfg(test)]
pub(crate) fn seeded(bug: Bug) -> bool {
    SEEDED.get() == Some(bug)
}

/// Runs `f` with a driver that has `bug`.
#[cfg(test)]
pub(crate) fn with<T>(bug: Option<Bug>, f: impl FnOnce() -> T) -> T {
    SEEDED.set(bug);
    let result = f();
    SEEDED.set(None);
    result
}

/// What of a range is invalidated.
#[inline(always)]
pub(crate) fn covered(range: IovaRange, page: u64) -> IovaRange {
    let short = seeded(Bug::RangeOnePageShort) && range.len() > page;
    if short { IovaRange::new(range.start(), range.len() - page).unwrap_or(range) } else { range }
}

/// How a command by address is hinted.
#[inline(always)]
pub(crate) fn hinted(range: TlbiRange) -> TlbiRange {
    let wrong = seeded(Bug::WrongTtl) && range.ttl > 1;
    if wrong { TlbiRange { ttl: range.ttl - 1, ..range } } else { range }
}

/// Whether an error is taken for success.
#[inline(always)]
pub(crate) fn forgiven(error: crate::Error) -> bool {
    use crate::Error;
    seeded(Bug::TimeoutIsSuccess) && matches!(error, Error::SyncTimedOut | Error::QueueFull)
        || seeded(Bug::RefusalIsSuccess) && error == Error::CommandRefused
}
