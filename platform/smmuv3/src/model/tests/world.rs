//! A few streams, spaces and pages, so few that they collide, and a plain record of what is lent: it says what each stream must
//! reach, whatever the SMMU has cached.

use super::super::Consumption;
use super::super::rng::Rng;
use super::*;
use alloc::format;
use alloc::string::String;
use std::collections::BTreeMap;

pub const STREAMS: u32 = 3;
pub const SPACES: usize = 3;
pub const SLOTS: u64 = 6;
/// Pages of the mappings.
pub const SIZES: [u64; 8] = [1, 2, 5, 16, 17, 64, 512, 513];

#[derive(Clone, Debug)]
pub enum Step {
    Map {
        space: usize,
        slot: u64,
        pages: u64,
        write: bool,
        pagewise: bool,
    },
    Revoke {
        space: usize,
        slots: Vec<u64>,
    },
    Attach {
        stream: u32,
        space: usize,
    },
    Block {
        stream: u32,
    },
    Bypass {
        stream: u32,
    },
    /// Exchanges a space for a fresh one; those that are attached to the old one keep it.
    Replace {
        space: usize,
    },
    /// Exchanges the address space of a stream back and forth.
    Swap {
        stream: u32,
        one: usize,
        other: usize,
    },
    /// A device reaches for anything.
    Hostile {
        stream: u32,
        at: u64,
        write: bool,
    },
    Touch {
        stream: u32,
        slot: u64,
    },
}

impl Step {
    /// A step that `rng` likes.
    pub fn any(rng: &mut Rng) -> Self {
        let mut below = |end: usize| rng.below(end as u32).unwrap_or(0);
        let (space, stream) = (below(SPACES) as usize, below(STREAMS as usize));
        let slot = u64::from(below(SLOTS as usize));
        match below(16) {
            0..5 => Self::Map {
                space,
                slot,
                pages: SIZES[below(SIZES.len()) as usize],
                write: below(2) == 0,
                pagewise: below(4) == 0,
            },
            5..9 => Self::Revoke {
                space,
                slots: [slot, u64::from(below(SLOTS as usize))][..1 + below(2) as usize].to_vec(),
            },
            9..11 => Self::Attach { stream, space },
            11 => Self::Block { stream },
            12 => Self::Bypass { stream },
            13 => Self::Replace { space },
            14 => Self::Swap { stream, one: space, other: below(SPACES) as usize },
            _ => Self::Hostile { stream, at: rng.next() >> 8, write: rng.chance(2) },
        }
    }
}

/// What is lent: by space and slot, the physical offset, the pages and whether writing is allowed.
type Lent = BTreeMap<(u64, u64), (u64, u64, bool)>;

/// What a stream has.
enum Has {
    /// By name only: that the space lives on is the driver's business.
    Space(u64),
    Everything,
}

pub struct World {
    pub rig: Rig,
    spaces: Vec<(u64, Arc<dyn AddressSpace>)>,
    attached: BTreeMap<u32, Has>,
    lent: Lent,
    next_page: u64,
    next_space: u64,
}

fn slot_at(slot: u64) -> u64 {
    0x40_0000 + slot * 0x40_0000
}

/// An error in words, with what was done.
pub fn said<T, E: core::fmt::Debug>(result: Result<T, E>, what: &str) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error:?}"))
}

/// `Err` with what was found, unless it is what was expected.
pub fn same<T: PartialEq + core::fmt::Debug>(found: T, expected: T, what: &str) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what}: {found:x?}, expected {expected:x?}")) }
}

impl World {
    pub fn new(rig: Rig, consumption: Consumption) -> Result<Self, String> {
        rig.model.behave(|b| b.consumption = consumption);
        let spaces = (0..SPACES as u64).map(|n| said(rig.smmu.create(), "create").map(|space| (n, space)));
        let spaces = spaces.collect::<Result<_, _>>()?;
        Ok(Self { rig, spaces, attached: BTreeMap::new(), lent: Lent::new(), next_page: 0, next_space: SPACES as u64 })
    }

    pub fn run(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Map { space, slot, pages, write, pagewise } => {
                let (name, space) = &self.spaces[*space];
                let mut prot = if *write { RW } else { Prot::READ };
                prot.set(Prot::PAGEWISE, *pagewise);
                let offset = self.next_page.next_multiple_of(512);
                let run = ram(offset * PAGE, pages * PAGE);
                let result = map(space, iova(slot_at(*slot), pages * PAGE), run, prot);
                same(result.is_ok(), !self.lent.contains_key(&(*name, *slot)), "a mapping is made once")?;
                if result.is_ok() {
                    self.next_page = offset + pages;
                    self.lent.insert((*name, *slot), (offset, *pages, *write));
                }
            }
            Step::Revoke { space, slots } => {
                let (name, space) = &self.spaces[*space];
                let mut slots = slots.clone();
                slots.sort_unstable();
                slots.dedup();
                let taken: Vec<_> =
                    slots.iter().filter_map(|&slot| Some((slot, self.lent.remove(&(*name, slot))?))).collect();
                let ranges: Vec<_> =
                    taken.iter().map(|(slot, (_, pages, _))| iova(slot_at(*slot), pages * PAGE)).collect();
                said(space.revoke(&ranges), "revoke")?;
                let bypassed = self.attached.values().any(|has| matches!(has, Has::Everything));
                for (_, (offset, pages, _)) in taken {
                    let mut paths = self.rig.model.paths_to(ram(offset * PAGE, pages * PAGE), &[]);
                    // Who may reach everything was not lent this.
                    paths.retain(|path| !(bypassed && path.ends_with("bypasses")));
                    if !paths.is_empty() {
                        return Err(format!("a way to revoked memory: {paths:#?}"));
                    }
                }
            }
            Step::Attach { stream, space } => {
                let (name, space) = &self.spaces[*space];
                said(self.rig.smmu.attach(id(*stream), space), "attach")?;
                self.attached.insert(*stream, Has::Space(*name));
            }
            Step::Swap { stream, one, other } => {
                for which in [one, other, one, other] {
                    let (name, space) = &self.spaces[*which];
                    said(self.rig.smmu.attach(id(*stream), space), "swap")?;
                    self.attached.insert(*stream, Has::Space(*name));
                    self.check(*stream, 0)?;
                }
            }
            Step::Block { stream } => {
                said(self.rig.smmu.block(id(*stream)), "block")?;
                self.attached.remove(stream);
            }
            Step::Bypass { stream } => {
                #[allow(unsafe_code)]
                // SAFETY: the model's devices access no memory.
                said(unsafe { self.rig.smmu.bypass(id(*stream)) }, "bypass")?;
                self.attached.insert(*stream, Has::Everything);
            }
            Step::Replace { space } => {
                // The old one lives on as long as a stream has it; nothing can be mapped in it any more.
                let fresh = said(self.rig.smmu.create(), "create")?;
                self.spaces[*space] = (self.next_space, fresh);
                self.next_space += 1;
            }
            Step::Hostile { stream, at, write } => {
                // Near what is mapped half of the time.
                let at = if at & 1 == 0 { *at } else { at % (slot_at(SLOTS) + 0x40_0000) };
                let result = if *write {
                    self.rig.model.device_write(id(*stream), Iova::new(at & !7), 8)
                } else {
                    self.rig.model.device_read(id(*stream), Iova::new(at & !7), 8)
                };
                let reached = result.ok().and_then(|runs| runs.first().map(|run| run.start().get()));
                let expected = self.expected(*stream, at & !7, *write);
                same(reached, expected, &format!("stream {stream} at {at:#x}"))?;
                self.rig.interrupt();
                self.rig.log.take();
            }
            Step::Touch { .. } => {}
        }
        Ok(())
    }

    /// What `stream` may reach at `at`.
    fn expected(&self, stream: u32, at: u64, write: bool) -> Option<u64> {
        let name = match self.attached.get(&stream)? {
            Has::Everything => return Some(at),
            Has::Space(name) => *name,
        };
        let lent = self.lent.range((name, 0)..(name + 1, 0));
        let lent =
            lent.map(|(&(_, slot), &(offset, pages, write))| (at.wrapping_sub(slot_at(slot)), offset, pages, write));
        let mut hit = lent.filter(|&(into, _, pages, may)| into < pages * PAGE && (may || !write));
        hit.next().map(|(into, offset, ..)| RAM + offset * PAGE + into)
    }

    pub fn check(&self, stream: u32, slot: u64) -> Result<(), String> {
        let at = slot_at(slot);
        let reads = |at| self.rig.reads(stream, at);
        same(reads(at), self.expected(stream, at, false), &format!("stream {stream} reads slot {slot}"))?;
        let written = self.rig.model.device_write(id(stream), Iova::new(at), 4);
        let written = written.ok().and_then(|runs| runs.first().map(|run| run.start().get()));
        same(written, self.expected(stream, at, true), &format!("stream {stream} writes slot {slot}"))?;
        if let Some(Has::Space(name)) = self.attached.get(&stream)
            && let Some((_, pages, _)) = self.lent.get(&(*name, slot))
        {
            let end = at + pages * PAGE;
            same(reads(end - 4), self.expected(stream, end - 4, false), &format!("the last bytes of slot {slot}"))?;
            same(reads(end), None, &format!("what is behind slot {slot}"))?;
            same(self.rig.model.memory_type(id(stream), Iova::new(at)), Some(self.ram_type()), "the memory type")?;
        }
        Ok(())
    }

    /// Write-back memory, in the encoding of the stage.
    fn ram_type(&self) -> u8 {
        if self.rig.smmu.features().stage1 { 0xff } else { 0xf }
    }

    /// Plays `steps`, and checks everything at the end.
    pub fn play<'a>(&mut self, steps: impl IntoIterator<Item = &'a Step>) -> Result<(), String> {
        for step in steps {
            self.run(step)?;
            match step {
                Step::Touch { stream, slot } => self.check(*stream, *slot)?,
                _ => (0..STREAMS).try_for_each(|stream| self.check(stream, 0))?,
            }
        }
        for stream in 0..STREAMS {
            (0..SLOTS).try_for_each(|slot| self.check(stream, slot))?;
        }
        self.clean()
    }

    /// Whether no rule was broken.
    pub fn clean(&self) -> Result<(), String> {
        clean(&self.rig.model)
    }
}

/// Whether no rule was broken.
pub fn clean(model: &Model) -> Result<(), String> {
    match model.violations().first() {
        Some(first) => Err(first.clone()),
        None => Ok(()),
    }
}
