//! Making mappings: claim every entry, then write every leaf.

use super::descriptor::{CLAIMED, EMPTY, Template, is_table};
use super::geometry::LAST;
use super::node::{LinkError, Node};
use super::walk::{Cursor, Dirty, Place};
use super::{PageTable, near};
use crate::{Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot};
use base::words;
use core::sync::atomic::Ordering::Relaxed;

/// Part of a mapping: `len` bytes from `iova` to `phys`.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub iova: u64,
    pub phys: u64,
    pub len: u64,
}

impl Part {
    /// What is left after the first `bytes`.
    #[inline]
    pub fn after(self, bytes: u64) -> Self {
        Self { iova: self.iova + bytes, phys: self.phys + bytes, len: self.len - bytes }
    }
}

/// Why not all of a mapping could be claimed, and where the claims end.
struct Stopped {
    at: u64,
    why: MapError,
}

impl PageTable {
    /// Maps `iova` to the `runs`, one after another: all of it or nothing. The leaves are visible to the walker when this
    /// returns, and nothing needs to be invalidated. An empty range is mapped by doing nothing.
    ///
    /// # Errors
    ///
    /// See [`MapError`]; nothing is mapped after an error, and hardware has seen nothing of it.
    #[inline]
    pub fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let template = self.templates.get(prot)?;
        self.map_runs(iova, runs, template, !prot.contains(Prot::PAGEWISE), false)
    }

    /// Like [`PageTable::map`], for a caller who has the range for itself: nobody else maps in it at this time. That something is
    /// mapped there already is an error all the same. `BARRIER`: the tables are in memory that a barrier publishes
    /// ([`TableMemory::publishes_by_barrier`](crate::contract::TableMemory::publishes_by_barrier)).
    ///
    /// # Errors
    ///
    /// As [`PageTable::map`].
    #[inline(always)] // Into the few places that call it.
    pub fn map_exclusively<const BARRIER: bool>(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
    ) -> Result<(), MapError> {
        match self.map_leaf::<BARRIER>(iova, runs, prot) {
            Some(result) => result,
            None => self.map_buffer::<BARRIER>(iova, runs, prot),
        }
    }

    /// [`Self::map_exclusively`] of one page, one contiguous group or one block, where that is a look at tables that are near. `None`
    /// for all else, and mostly where something is mapped: nothing has been done then.
    #[inline(always)]
    pub fn map_leaf<const BARRIER: bool>(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
    ) -> Option<Result<(), MapError>> {
        let [run] = runs else { return None };
        let (start, phys, len) = (iova.start().get(), run.start().get(), iova.len());
        if run.len() != len || phys >= self.shape.output_end {
            return None;
        }
        if len == near::PAGE {
            if (start | phys) & (near::PAGE - 1) != 0 {
                return None;
            }
            let entries = self.near.find(start)?;
            let template = self.templates.get(prot).ok()?;
            let index = near::index(start);
            let entry = &entries[index];
            if entry.load(Relaxed) != EMPTY {
                return Some(Err(MapError::AlreadyMapped(iova.start())));
            }
            entry.store(template.leaf(LAST, phys, false), Relaxed);
            self.publish::<BARRIER>(start, index, index + 1);
            return Some(Ok(()));
        }
        if prot.contains(Prot::PAGEWISE) {
            return None;
        }
        if len == near::GROUP {
            if (start | phys) & (near::GROUP - 1) != 0 {
                return None;
            }
            let (index, group) = near::group(self.near.find(start)?, start);
            let template = self.templates.get(prot).ok()?;
            if words::any(group) != EMPTY {
                return None;
            }
            words::count_up(group, template.leaf(LAST, phys, true), near::PAGE);
            self.publish::<BARRIER>(start, index, index + group.len());
            return Some(Ok(()));
        }
        self.map_block::<BARRIER>(iova, phys, prot).map(Ok)
    }

    /// [`Self::map_exclusively`] of whatever [`Self::map_leaf`] does not take.
    ///
    /// # Errors
    ///
    /// As [`PageTable::map`].
    #[inline(never)] // Keeps the way of one page short.
    pub fn map_buffer<const BARRIER: bool>(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
    ) -> Result<(), MapError> {
        let template = self.templates.get(prot)?;
        let large = !prot.contains(Prot::PAGEWISE);
        let mapped = match runs {
            [run] => self.map_run::<BARRIER>(iova, *run, template, large),
            _ => self.map_list::<BARRIER>(iova, runs, template),
        };
        if mapped.is_some() {
            return Ok(());
        }
        self.map_runs(iova, runs, template, large, true)
    }

    /// Checks sizes, alignment and limits.
    fn check(&self, iova: IovaRange, runs: &[PhysRange]) -> Result<(), MapError> {
        if iova.end().get() > self.geometry.input_end() {
            return Err(MapError::OutOfAperture(iova));
        }
        let page = self.geometry.level(LAST).size();
        let mut bits = iova.start().get() | iova.len();
        let mut physical = 0_u64;
        for run in runs {
            bits |= run.start().get() | run.len();
            physical = physical.saturating_add(run.len());
            if run.end().get() > self.geometry.output_end() {
                return Err(MapError::OutputTooLarge(run.end().get() - 1));
            }
        }
        if bits & (page - 1) != 0 {
            return Err(MapError::Misaligned(page));
        }
        if physical != iova.len() {
            return Err(MapError::LengthMismatch { iova: iova.len(), physical });
        }
        Ok(())
    }

    #[inline(never)] // Keeps the way of one page short.
    fn map_runs(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        template: Template,
        large: bool,
        exclusive: bool,
    ) -> Result<(), MapError> {
        self.check(iova, runs)?;
        if exclusive && let Some(result) = self.map_in_table(iova, runs, template, large) {
            return result;
        }
        let start = iova.start().get();
        if let Err(stopped) = self.claim(start, runs, large) {
            self.disclaim(start, stopped.at);
            return Err(stopped.why);
        }
        let mut cursor = Cursor::new(self);
        let mut dirty = Dirty::default();
        for mut part in parts(start, runs) {
            while part.len != 0 {
                let written = self.write_some(&mut cursor, &mut dirty, part, template, large);
                part = part.after(written);
            }
        }
        Ok(())
    }

    /// Claims the entries of all leaves.
    fn claim(&self, start: u64, runs: &[PhysRange], large: bool) -> Result<(), Stopped> {
        let mut cursor = Cursor::new(self);
        for mut part in parts(start, runs) {
            while part.len != 0 {
                let claimed = self.claim_some(&mut cursor, part, large)?;
                part = part.after(claimed);
            }
        }
        Ok(())
    }

    /// Claims the first block of `part`, or those of its pages that lie in one table. Returns the bytes claimed.
    fn claim_some(&self, cursor: &mut Cursor<'_>, part: Part, large: bool) -> Result<u64, Stopped> {
        if let Some(node) = cursor.leaf_table(part.iova) {
            return self.claim_pages(node, part);
        }
        let stopped = |why| Stopped { at: part.iova, why };
        loop {
            let Place { node, level, index } = self.place(part.iova);
            if level == LAST {
                return self.claim_pages(node, part);
            }
            let shape = self.geometry.level(level);
            if large && shape.leaf && part.len >= shape.size() && (part.iova | part.phys) & (shape.size() - 1) == 0 {
                match node.entry(index).compare_exchange(EMPTY, CLAIMED, Relaxed, Relaxed) {
                    Ok(_) => return Ok(shape.size()),
                    // Another core is linking a table here at this moment: go below it.
                    Err(entry) if is_table(entry) => {}
                    Err(_) => return Err(stopped(MapError::AlreadyMapped(Iova::new(part.iova)))),
                }
            }
            self.link(node, level, index, part.iova).map_err(|error| {
                stopped(match error {
                    LinkError::Taken => MapError::AlreadyMapped(Iova::new(part.iova)),
                    LinkError::OutOfMemory => MapError::OutOfMemory,
                })
            })?;
        }
    }

    fn claim_pages(&self, node: &Node, part: Part) -> Result<u64, Stopped> {
        let (index, count) = self.pages_here(part);
        for i in 0..count {
            if node.entry(index + i).compare_exchange(EMPTY, CLAIMED, Relaxed, Relaxed).is_err() {
                let at = part.iova + i as u64 * self.geometry.level(LAST).size();
                return Err(Stopped { at, why: MapError::AlreadyMapped(Iova::new(at)) });
            }
        }
        Ok(count as u64 * self.geometry.level(LAST).size())
    }

    /// Where the pages of `part` begin in their table, and how many of them lie in it.
    #[inline]
    fn pages_here(&self, part: Part) -> (usize, usize) {
        let last = self.geometry.level(LAST);
        let index = self.geometry.index(LAST, part.iova);
        (index, ((part.len >> last.shift) as usize).min(last.mask + 1 - index))
    }

    /// Gives up the claims on `start..end`. Every entry there was claimed by this caller.
    fn disclaim(&self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            let Place { node, level, index } = self.place(at);
            let _ = node.entry(index).compare_exchange(CLAIMED, EMPTY, Relaxed, Relaxed);
            at += self.geometry.level(level).size();
        }
    }

    /// Writes the leaves of `part` that lie in one table; their entries are claimed. Returns the bytes mapped.
    fn write_some<'a>(
        &'a self,
        cursor: &mut Cursor<'a>,
        dirty: &mut Dirty<'a>,
        part: Part,
        template: Template,
        large: bool,
    ) -> u64 {
        let (place, count) = match cursor.leaf_table(part.iova) {
            Some(node) => {
                let (index, count) = self.pages_here(part);
                (Place { node, level: LAST, index }, count)
            }
            None => {
                let place = self.place(part.iova);
                let shape = self.geometry.level(place.level);
                let most = ((part.len >> shape.shift) as usize).min(shape.mask + 1 - place.index);
                // Blocks up to the next linked table, below which this mapping goes on with smaller leaves.
                let claimed = |i: &usize| place.node.entry(place.index + i).load(Relaxed) == CLAIMED;
                let count = (0..most).take_while(claimed).count().max(1);
                (place, count)
            }
        };
        let Place { node, level, index } = place;
        let shape = self.geometry.level(level);
        let group = shape.contiguous;
        let span = group as u64 * shape.size();
        let mut phys = part.phys;
        let mut leaf = template.leaf(level, 0, false);
        for i in 0..count {
            if (index + i) & (group - 1) == 0 {
                let contiguous = large && count - i >= group && phys & (span - 1) == 0;
                leaf = template.leaf(level, 0, contiguous);
            }
            node.entry(index + i).store(leaf | phys, Relaxed);
            phys += shape.size();
        }
        dirty.touch(node.table(), index, index + count);
        count as u64 * shape.size()
    }
}

/// The runs as parts of the mapping, physically adjacent ones merged.
pub(super) fn parts(start: u64, runs: &[PhysRange]) -> impl Iterator<Item = Part> {
    let mut runs = runs.iter().copied().filter(|run| !run.is_empty()).peekable();
    let mut iova = start;
    core::iter::from_fn(move || {
        let first = runs.next()?;
        let mut len = first.len();
        let end = |len| PhysAddr::new(first.start().get() + len);
        while let Some(next) = runs.next_if(|run| run.start() == end(len)) {
            len += next.len();
        }
        let part = Part { iova, phys: first.start().get(), len };
        iova += len;
        Some(part)
    })
}
