//! Loans that have lapsed: what is kept of many, for one flush.

use super::loan::{Kind, as_range};
use super::{Device, Loan};
use crate::lent::Segment;
use crate::record::Slot;
use crate::site::Site;
use iommu::{Iova, IovaRange};

impl Loan {
    /// Whether it can lapse: something translates, and there is nothing special about it. (A copy is read back right after its
    /// revocation, by who ends the loan.)
    #[inline(always)]
    pub(crate) fn can_lapse(&self) -> bool {
        self.special.is_none() && !matches!(self.kind, Kind::Direct | Kind::Passed)
    }

    /// Takes the handle of the device apart from the rest. Only of a loan that [can lapse](Loan::can_lapse).
    #[inline(always)]
    pub(crate) fn into_lapsed(self) -> (Device, Lapsed) {
        let Self { device, whole, site, slot, kind, special } = self;
        debug_assert!(special.is_none(), "a special loan lapses");
        // There is none: nothing to drop, and nobody has to look.
        core::mem::forget(special);
        (Device::clone(&device), Lapsed { whole, site, slot, kind })
    }
}

/// A [`Loan`] of a device that somebody else keeps. Ends by [`Device::settle`] only; dropping it leaks.
pub(crate) struct Lapsed {
    whole: Segment,
    site: Site,
    slot: Slot,
    kind: Kind,
}

impl Lapsed {
    #[inline(always)]
    pub(crate) fn range(&self) -> IovaRange {
        as_range(self.whole)
    }

    #[inline]
    pub(crate) fn start(&self) -> Iova {
        self.whole.iova
    }

    pub(crate) fn site(&self) -> Site {
        self.site
    }
}

impl Device {
    /// Takes note of the end of `loans`, which are its own, and gives their address ranges back, after a successful revocation of all of
    /// them. Called once for each of them. `sorted`: they are by address; otherwise this sorts them. The first of them will be had
    /// first again, so that what lapses together next time is in order too.
    pub(crate) fn settle(&self, loans: &mut [Lapsed], sorted: bool) {
        // What lapses is translated.
        let Some(translated) = self.translated_way() else { return };
        if !sorted {
            loans.sort_unstable_by_key(Lapsed::start);
        }
        let mut others = loans.len();
        if let Some(berths) = translated.berths() {
            let mut ending = berths.end_many();
            for loan in loans.iter().rev().filter(|loan| loan.kind.has_berth()) {
                ending.add(berths.berth(loan.slot.number()), loan.whole.iova, loan.site);
                others -= 1;
            }
        }
        if others == 0 {
            return;
        }
        for loan in loans.iter().filter(|loan| !loan.kind.has_berth()) {
            self.0.records.end(loan.slot, loan.range(), loan.site, loan.site);
        }
        let given_up = |loan: &&Lapsed| loan.kind == Kind::Plain && !translated.keep(loan.range());
        translated.release_all(loans.iter().rev().filter(given_up).map(Lapsed::range));
        for loan in loans.iter().filter(|loan| loan.kind == Kind::Fixed) {
            translated.release_fixed(loan.range());
        }
        for loan in loans.iter().filter(|loan| !loan.kind.has_berth()) {
            // SAFETY: interim
            unsafe { self.leave(loan.whole.len) };
        }
    }

    /// Counts `loan`, which is its own and could not be revoked: the device may reach the memory for ever. The address range is never
    /// used again, and the address space stays.
    #[cold]
    pub(crate) fn lose_lapsed(&self, loan: &Lapsed) {
        self.lose(loan.whole);
    }
}
