//! What the driver counts, for reports and benchmarks.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The live counters. Relaxed: they order nothing.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
            /// Batches of invalidations by address that went the quick way: some of them with a CMD_SYNC, and no other counter
            /// is touched for it. (One with a CMD_SYNC touches none at all: see `CommandQueue::one_by_one`.)
            pub(crate) quick: Counter,
            /// Commands of such batches beyond the first.
            pub(crate) quick_more: Counter,
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Statistics {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The counters, where `one_by_one` commands went alone, each with a CMD_SYNC; and the queue's own count of accesses.
            pub(crate) fn snapshot(&self, one_by_one: u64, queue_accesses: u64) -> Statistics {
                let mut counted = Statistics { $($name: self.$name.get(),)* };
                let (quick, more) = (self.quick.get().wrapping_add(one_by_one), self.quick_more.get());
                let by_address = quick.wrapping_add(more);
                counted.syncs = counted.syncs.wrapping_add(quick);
                counted.address_invalidations = counted.address_invalidations.wrapping_add(by_address);
                counted.commands = counted.commands.wrapping_add(by_address).wrapping_add(quick);
                counted.queue_accesses = queue_accesses;
                counted
            }
        }

        impl Statistics {
            /// What was counted since `earlier`. (What others are just issuing may be in the earlier one, and not in the later.)
            #[must_use]
            pub const fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }
        }
    };
}

counters! {
    /// Commands issued, CMD_SYNC included.
    commands,
    /// CMD_CFGI_* issued.
    config_invalidations,
    /// CMD_TLBI_* by address issued.
    address_invalidations,
    /// CMD_TLBI_* by ASID, VMID or for everything issued.
    broad_invalidations,
    /// CMD_SYNCs issued.
    syncs,
    /// Writes of CMDQ_PROD and reads of CMDQ_CONS: two for each revocation, or fewer where cores meet.
    queue_accesses,
    /// CMD_SYNCs that were not consumed in time.
    sync_timeouts,
    /// Commands that the SMMU refused.
    refused_commands,
    /// Aborted reads of the command queue.
    command_fetch_aborts,
    /// CMD_SYNCs that found a CMD_ATC_INV unanswered.
    unanswered_atc_invalidations,
    /// Times that the SMMU went into Service Failure Mode.
    service_failures,
    /// Times that a queue index made no sense.
    bad_indexes,
    /// Event records read.
    events,
    /// Event records that repeated one of the same batch and were not reported again.
    coalesced_events,
    /// Event records that were thrown away unread because too many came at once.
    skipped_events,
    /// Times that the SMMU lost events because the queue was full or could not be written.
    event_overflows,
    /// Floods of events that outlasted their handler, which was then called by the clock.
    floods,
    /// PRI queue records read.
    page_requests,
    /// Times that the SMMU dropped page requests because the queue was full or could not be written.
    page_request_overflows,
    /// Page request groups that were left without an answer.
    unanswered_page_requests,
    /// Global errors other than those counted above.
    other_global_errors,
    /// Address spaces whose memory is kept for ever because their revocation failed.
    leaked_spaces,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} commands ({} config, {} by address, {} broad, {} syncs), {} events",
            self.commands,
            self.config_invalidations,
            self.address_invalidations,
            self.broad_invalidations,
            self.syncs,
            self.events
        )?;
        for (count, name) in [
            (self.coalesced_events, "repeated"),
            (self.skipped_events, "skipped"),
            (self.event_overflows, "event overflows"),
            (self.floods, "floods"),
            (self.page_requests, "page requests"),
            (self.page_request_overflows, "page request overflows"),
            (self.unanswered_page_requests, "unanswered page requests"),
            (self.sync_timeouts, "sync timeouts"),
            (self.refused_commands, "refused commands"),
            (self.command_fetch_aborts, "command fetch aborts"),
            (self.unanswered_atc_invalidations, "unanswered ATC invalidations"),
            (self.service_failures, "service failures"),
            (self.bad_indexes, "bad queue indexes"),
            (self.other_global_errors, "other global errors"),
            (self.leaked_spaces, "leaked address spaces"),
        ] {
            if count != 0 {
                write!(f, ", {count} {name}")?;
            }
        }
        Ok(())
    }
}
