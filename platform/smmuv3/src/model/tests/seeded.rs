//! Every bug that the driver can be given is found by a fixed set of scenarios, and without a bug they find nothing.
//!
//! `cargo test -p smmuv3 every_seeded_bug_is_caught -- --nocapture` prints which scenario found which bug, and by what.

use super::super::rng::Rng;
use super::super::{Consumption, Overflow};
use super::crowd::{Meeting, post_meanwhile, refuse_meanwhile};
use super::world::{STREAMS, Step, World, clean, said, same};
use super::*;
use crate::bugs::{self, Bug};
use crate::spec::command::{Command, TlbiRange, opcode};
use crate::spec::registers::{self as reg, Gerror};
use crate::{Fleet, Registers, Request, Translation};
use alloc::format;
use alloc::string::{String, ToString};
use iommu::{AttachError, FaultReason, RevokeError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::println;

type Outcome = Result<(), String>;

/// What the driver is made to do, with a seed for the adversary and for what is drawn.
struct Scenario {
    name: &'static str,
    /// How many seeds are tried.
    seeds: u64,
    run: fn(u64, Config) -> Outcome,
}

const SCENARIOS: &[Scenario] = &[
    Scenario { name: "start", seeds: 4, run: start_up },
    Scenario { name: "sizes", seeds: 4, run: sizes },
    Scenario { name: "batches", seeds: 4, run: batches },
    Scenario { name: "streams", seeds: 4, run: streams },
    Scenario { name: "spaces", seeds: 2, run: spaces },
    Scenario { name: "overlap", seeds: 2, run: overlap },
    Scenario { name: "substreams", seeds: 8, run: substreams },
    Scenario { name: "nested", seeds: 40, run: nested },
    Scenario { name: "ATS", seeds: 4, run: ats },
    Scenario { name: "fleet", seeds: 2, run: fleet },
    Scenario { name: "small queue", seeds: 4, run: small_queue },
    Scenario { name: "refusals", seeds: 4, run: refusals },
    Scenario { name: "stuck", seeds: 2, run: stuck },
    Scenario { name: "meetings", seeds: 1, run: meetings },
    Scenario { name: "events", seeds: 2, run: events },
    Scenario { name: "floods", seeds: 2, run: floods },
    Scenario { name: "random", seeds: 24, run: random },
];

const ALL: [Traits; 4] = [Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL];

fn try_rig(traits: Traits, config: Config) -> Result<Rig, String> {
    let memory = ModelMemory::new();
    let model = Model::new(traits, memory);
    let (smmu, log) = start(memory, &model, config);
    Ok(Rig { memory, model, smmu: said(smmu, "start")?, log })
}

/// A rig with an adversary that is interested in these streams.
fn hunted(traits: Traits, config: Config, seed: u64, streams: &[u32]) -> Result<Rig, String> {
    let rig = try_rig(traits, config)?;
    rig.model.adversary(seed, streams.iter().copied());
    rig.model.behave(|b| b.consumption = Consumption::Random);
    Ok(rig)
}

fn attached(rig: &Rig, stream: u32) -> Result<Arc<dyn AddressSpace>, String> {
    let space = said(rig.smmu.create(), "create")?;
    said(rig.smmu.attach(id(stream), &space), "attach")?;
    Ok(space)
}

fn no_way(rig: &Rig, range: PhysRange) -> Outcome {
    match rig.model.paths_to(range, &[]).first() {
        Some(path) => Err(format!("a way to revoked memory: {path}")),
        None => Ok(()),
    }
}

/// From what firmware left on, with slow acknowledgements, to translation.
fn start_up(seed: u64, config: Config) -> Outcome {
    let memory = ModelMemory::new();
    let model = Model::new(Traits::NESTED, memory);
    model.behave(|b| b.slow_acknowledgements = true);
    model.adversary(seed, [8, 9]);
    let first = said(start(memory, &model, config.clone()).0, "the first start")?;
    let space = said(first.create(), "create")?;
    said(first.attach(id(8), &space), "attach")?;
    said(map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW), "map")?;
    same(model.device_read(id(8), Iova::new(0x1000), 4).is_ok(), true, "what was lent is reached")?;
    let (second, _) = start(memory, &model, config.clone());
    said(second, "the second start")?;
    for stream in [0, 8, 9, 0xffff] {
        same(model.device_read(id(stream), Iova::new(0x1000), 4).is_ok(), false, "everything is blocked")?;
    }
    // A start that fails leaves the door shut.
    let memory = ModelMemory::new();
    let other = Model::new(Traits::NESTED, memory);
    memory.allow(Some(0));
    same(start(memory, &other, config).0.err(), Some(Error::OutOfMemory), "a start without memory")?;
    same(other.device_read(id(8), Iova::new(0x1000), 4).is_ok(), false, "the door is shut")?;
    clean(&model)
}

/// Mappings of all sizes: pages, contiguous groups, blocks and mixtures.
fn sizes(seed: u64, config: Config) -> Outcome {
    for traits in ALL {
        let rig = hunted(traits, config.clone(), seed, &[8, 9])?;
        let space = attached(&rig, 8)?;
        said(rig.smmu.attach(id(9), &space), "attach")?;
        for (pages, prot) in [(1, RW), (3, RW), (33, RW), (512, RW), (1029, RW), (70, RW | Prot::PAGEWISE)] {
            let len = pages * PAGE;
            said(map(&space, iova(0x20_0000, len), ram(0, len), prot), "map")?;
            for stream in [8, 9] {
                same(rig.reads(stream, 0x20_0000), Some(RAM), "the first bytes")?;
                same(rig.reads(stream, 0x20_0000 + len - 4), Some(RAM + len - 4), "the last bytes")?;
                same(rig.reads(stream, 0x20_0000 + len), None, "what is behind")?;
            }
            let ram_type = if rig.smmu.features().stage1 { 0xff } else { 0xf };
            same(rig.model.memory_type(id(8), Iova::new(0x20_0000)), Some(ram_type), "the memory type")?;
            said(space.revoke(&[iova(0x20_0000, len)]), "revoke")?;
            no_way(&rig, ram(0, len))?;
            same(rig.reads(8, 0x20_0000 + len - 4), None, "what was revoked")?;
        }
        clean(&rig.model)?;
    }
    Ok(())
}

/// Revocations of several ranges, and of more than are worth it one by one.
fn batches(seed: u64, config: Config) -> Outcome {
    for traits in ALL {
        for count in [2, 40, 300] {
            let rig = hunted(traits, config.clone(), seed, &[8])?;
            let space = attached(&rig, 8)?;
            let ranges: Vec<_> = (0..count).map(|n| iova(0x1_0000 + n * 4 * PAGE, PAGE)).collect();
            for (n, &range) in (0..).zip(&ranges) {
                said(map(&space, range, ram(n * PAGE, PAGE), RW), "map")?;
                same(rig.reads(8, range.start().get()), Some(RAM + n * PAGE), "what was mapped")?;
            }
            said(space.revoke(&ranges), "revoke")?;
            no_way(&rig, ram(0, count * PAGE))?;
            clean(&rig.model)?;
        }
    }
    Ok(())
}

/// Attaching, exchanging, bypassing and blocking, at the edges of the stream table too.
fn streams(seed: u64, config: Config) -> Outcome {
    for (traits, last) in [(Traits::NESTED, 0xffff), (Traits::STAGE2, 0xffff), (Traits::MINIMAL, 63)] {
        let rig = hunted(traits, config.clone(), seed, &[0, 8, 130, last])?;
        for stream in [0, 8, 130, last] {
            // The SMMU has looked, and knows that there is nothing.
            same(rig.reads(stream & last, 0x1000), None, "a stream that was never attached")?;
        }
        for stream in [0, 8, 130, last] {
            let stream = stream & last;
            let (one, other) = (said(rig.smmu.create(), "create")?, said(rig.smmu.create(), "create")?);
            said(map(&one, iova(0x1000, PAGE), ram(0, PAGE), RW), "map")?;
            said(map(&other, iova(0x1000, PAGE), ram(PAGE, PAGE), RW), "map")?;
            for _ in 0..4 {
                said(rig.smmu.attach(id(stream), &one), "attach")?;
                same(rig.reads(stream, 0x1000), Some(RAM), "the one space")?;
                said(rig.smmu.attach(id(stream), &other), "replace")?;
                same(rig.reads(stream, 0x1000), Some(RAM + PAGE), "the other space")?;
                #[allow(unsafe_code)]
                // SAFETY: the model's devices access no memory.
                said(unsafe { rig.smmu.bypass(id(stream)) }, "bypass")?;
                same(rig.reads(stream, 0x7000), Some(0x7000), "everything")?;
                said(rig.smmu.block(id(stream)), "block")?;
                same(rig.reads(stream, 0x1000), None, "a blocked stream")?;
            }
            let neighbour = rig.model.device_read(id(stream ^ 1), Iova::new(0x1000), 4);
            same(neighbour, Err(super::super::device::Stopped::Silently), "the neighbour")?;
        }
        clean(&rig.model)?;
    }
    Ok(())
}

/// More spaces than there are identifiers, one after another, and some at once.
fn spaces(seed: u64, config: Config) -> Outcome {
    for traits in [Traits::MINIMAL, Traits { idr0: Traits::STAGE2.idr0 & !(1 << 18), ..Traits::STAGE2 }] {
        let rig = hunted(traits, config.clone(), seed, &[8, 9])?;
        let kept = attached(&rig, 9)?;
        said(map(&kept, iova(0x1000, PAGE), ram(0x1000 * PAGE, PAGE), RW), "map")?;
        for round in 0..300 {
            let space = attached(&rig, 8)?;
            same(rig.reads(8, 0x1000), None, "another round's memory")?;
            said(map(&space, iova(0x1000, PAGE), ram(round * PAGE, PAGE), RW), "map")?;
            same(rig.reads(8, 0x1000), Some(RAM + round * PAGE), "this round's memory")?;
            same(rig.reads(9, 0x1000), Some(RAM + 0x1000 * PAGE), "the other stream's memory")?;
            said(rig.smmu.block(id(8)), "block")?;
        }
        clean(&rig.model)?;
    }
    Ok(())
}

/// Two revocations of the same memory at once: what the second one calls gone is gone, although the first one has cleared the
/// leaf and not yet got as far as invalidating it.
fn overlap(seed: u64, config: Config) -> Outcome {
    for traits in ALL {
        let rig = hunted(traits, config.clone(), seed, &[])?;
        let space = attached(&rig, 8)?;
        let (page, block) = (iova(0x1f_f000, PAGE), iova(0x20_0000, 0x20_0000));
        said(map(&space, page, ram(0x100_0000, PAGE), RW), "map")?;
        said(map(&space, block, ram(0, 0x20_0000), RW), "map")?;
        same((rig.reads(8, 0x1f_f000), rig.reads(8, 0x20_0000)), (Some(RAM + 0x100_0000), Some(RAM)), "both")?;
        let seen = Arc::new(Mutex::new(None));
        let (second, model, found) = (Arc::clone(&space), Arc::clone(&rig.model), Arc::clone(&seen));
        rig.memory.meanwhile(move || {
            let verdict = second.revoke(&[iova(0x1f_f000, 0x20_1000)]);
            *found.lock().unwrap() = Some((verdict, model.paths_to(ram(0, 0x200_0000), &[])));
        });
        said(space.revoke(&[block]), "revoke")?;
        let (verdict, paths) = seen.lock().unwrap().take().ok_or("the second revocation did not run")?;
        same(verdict, Err(RevokeError::NotMapped(Iova::new(0x20_0000))), "the second revocation")?;
        same(paths, Vec::new(), "ways to what the second revocation calls gone")?;
        clean(&rig.model)?;
    }
    Ok(())
}

/// CDs of several substreams, in tables of one and of two levels.
fn substreams(seed: u64, config: Config) -> Outcome {
    for (traits, numbers) in [(FULL, [1, 65, 255]), (Traits { idr0: FULL.idr0 & !(1 << 19), ..FULL }, [1, 2, 255])] {
        let rig = hunted(traits, config.clone(), seed, &[8])?;
        let _default = attached(&rig, 8)?;
        for round in 0..3 {
            for (number, page) in numbers.into_iter().zip(1..) {
                let space = said(rig.smmu.create(), "create")?;
                said(map(&space, iova(0x1000, PAGE), ram(page * PAGE, PAGE), RW), "map")?;
                same(rig.reads_as(8, number, 0x1000), None, "a substream that is not attached")?;
                said(rig.smmu.attach_substream(id(8), number, &space), "attach a substream")?;
                same(rig.reads_as(8, number, 0x1000), Some(RAM + page * PAGE), "the substream's memory")?;
                same(rig.reads(8, 0x1000), None, "the memory of no substream")?;
                if round == 1 {
                    let other = said(rig.smmu.create(), "create")?;
                    said(map(&other, iova(0x1000, PAGE), ram(9 * PAGE, PAGE), RW), "map")?;
                    said(rig.smmu.attach_substream(id(8), number, &other), "replace a substream's space")?;
                    same(rig.reads_as(8, number, 0x1000), Some(RAM + 9 * PAGE), "the other memory")?;
                }
                said(rig.smmu.detach_substream(id(8), number), "detach")?;
                same(rig.reads_as(8, number, 0x1000), None, "a substream that was detached")?;
            }
        }
        clean(&rig.model)?;
    }
    Ok(())
}

/// A stage 2 with two stage 1s on top, of which it takes memory away; and one whose CD comes late.
fn nested(seed: u64, config: Config) -> Outcome {
    let rig = hunted(FULL, config, seed, &[8, 16])?;
    rig.model.behave(|b| b.acts = 16);
    let request = Request { translation: Translation::Stage2, input_bits: Some(40), ..Request::default() };
    let parent = said(rig.smmu.create_with(&request), "create")?;
    // The memory of the tables, to itself, and read-only.
    let tables = said(PhysRange::new(PhysAddr::new(1 << 32), 1 << 32).ok_or("range"), "tables")?;
    said(map(&parent, iova(1 << 32, 1 << 32), tables, Prot::READ), "map")?;
    said(map(&parent, iova(0x4000_0000, 4 * PAGE), ram(0, 4 * PAGE), RW | Prot::PAGEWISE), "map")?;
    let translation = Translation::Nested(Arc::clone(&parent));
    for stream in [8, 16] {
        let space =
            said(rig.smmu.create_with(&Request { translation: translation.clone(), ..Request::default() }), "create")?;
        said(rig.smmu.attach(id(stream), &space), "attach")?;
        let intermediate = said(PhysRange::new(PhysAddr::new(0x4000_0000), 4 * PAGE).ok_or("range"), "range")?;
        said(map(&space, iova(0x1000, 4 * PAGE), intermediate, RW), "map")?;
    }
    for page in 0..4 {
        let at = 0x1000 + page * PAGE;
        same((rig.reads(8, at), rig.reads(16, at)), (Some(RAM + page * PAGE), Some(RAM + page * PAGE)), "both")?;
        said(parent.revoke(&[iova(0x4000_0000 + page * PAGE, PAGE)]), "revoke")?;
        no_way(&rig, ram(page * PAGE, PAGE))?;
        same((rig.reads(8, at), rig.reads(16, at)), (None, None), "what was revoked below")?;
    }
    // A substream comes into a table that nobody is in.
    let space = said(rig.smmu.create_with(&Request { translation, ..Request::default() }), "create")?;
    let intermediate = said(PhysRange::new(PhysAddr::new(0x4000_0000), PAGE).ok_or("range"), "range")?;
    said(map(&space, iova(0x1000, PAGE), intermediate, RW), "map")?;
    said(rig.smmu.block(id(8)), "block")?;
    for _ in 0..2 {
        said(rig.smmu.attach_substream(id(8), 1, &space), "attach a substream")?;
        said(rig.smmu.detach_substream(id(8), 1), "detach")?;
    }
    no_way(&rig, intermediate)?;
    clean(&rig.model)
}

/// Devices that keep translations for themselves.
fn ats(seed: u64, config: Config) -> Outcome {
    let rig = hunted(FULL, config, seed, &[8])?;
    let (one, other) = (attached(&rig, 8)?, said(rig.smmu.create(), "create")?);
    said(rig.smmu.enable_ats(id(8)), "ATS")?;
    said(map(&one, iova(0x7000, 4 * PAGE), ram(0, 4 * PAGE), RW | Prot::PAGEWISE), "map")?;
    for page in 0..4 {
        same(rig.model.ats_request(id(8), None, Iova::new(0x7000 + page * PAGE)), true, "a translation request")?;
    }
    said(one.revoke(&[iova(0x7000, 3 * PAGE)]), "revoke")?;
    no_way(&rig, ram(0, 3 * PAGE))?;
    same((rig.reads(8, 0x7000), rig.reads(8, 0xa000)), (None, Some(RAM + 3 * PAGE)), "what is left")?;
    said(rig.smmu.attach(id(8), &other), "replace")?;
    same(rig.reads(8, 0xa000), None, "the old space")?;
    drop(one);
    no_way(&rig, ram(0, 4 * PAGE))?;
    clean(&rig.model)
}

/// One space behind two SMMUs.
fn fleet(seed: u64, config: Config) -> Outcome {
    let memory = ModelMemory::new();
    let mut rigs = Vec::new();
    for stream in [8, 9] {
        let model = Model::new(FULL, memory);
        let (smmu, log) = start(memory, &model, config.clone());
        model.adversary(seed, [stream]);
        model.behave(|b| b.consumption = Consumption::Random);
        rigs.push(Rig { memory, model, smmu: said(smmu, "start")?, log });
    }
    let fleet = Fleet::new(rigs.iter().map(|rig| rig.smmu.clone()));
    let space = said(fleet.create(&Request::default()), "create")?;
    for (rig, stream) in rigs.iter().zip([8, 9]) {
        said(rig.smmu.attach(id(stream), &space), "attach")?;
    }
    for count in [1, 20, 300] {
        let ranges: Vec<_> = (0..count).map(|n| iova(0x10_0000 + 2 * n * PAGE, PAGE)).collect();
        for (n, &range) in (0..).zip(&ranges) {
            said(map(&space, range, ram(n * PAGE, PAGE), RW), "map")?;
            for (rig, stream) in rigs.iter().zip([8, 9]) {
                same(rig.reads(stream, range.start().get()), Some(RAM + n * PAGE), "what was mapped")?;
            }
        }
        said(space.revoke(&ranges), "revoke")?;
        rigs.iter().try_for_each(|rig| no_way(rig, ram(0, count * PAGE)))?;
    }
    rigs.iter().try_for_each(|rig| clean(&rig.model))
}

/// A queue of eight commands that is full most of the time, and for a while.
fn small_queue(seed: u64, config: Config) -> Outcome {
    let rig = hunted(Traits::MINIMAL, config, seed, &[8])?;
    let space = attached(&rig, 8)?;
    for round in 0..20 {
        let len = (1 + round * 5) * PAGE;
        said(map(&space, iova(0x20_0000, len), ram(0, len), RW | Prot::PAGEWISE), "map")?;
        same(rig.reads(8, 0x20_0000 + len - 4), Some(RAM + len - 4), "what was mapped")?;
        rig.model.behave(|b| b.stall = 10);
        said(space.revoke(&[iova(0x20_0000, len)]), "revoke")?;
        no_way(&rig, ram(0, len))?;
    }
    clean(&rig.model)
}

/// Commands that the SMMU refuses: what they should have done has not been done, and nobody says that it has.
fn refusals(seed: u64, config: Config) -> Outcome {
    let rig = hunted(Traits::NESTED, config, seed, &[])?;
    let space = attached(&rig, 8)?;
    let block = iova(0x20_0000, 0x20_0000);
    for round in 0..4 {
        // A block is left over in the TLB by a refused invalidation; pages of the next mapping have another level.
        said(map(&space, block, ram(0, 0x20_0000), RW), "map")?;
        same(rig.reads(8, 0x20_0000), Some(RAM), "what was mapped")?;
        rig.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
        same(space.revoke(&[block]), Err(RevokeError::Dead), "a revocation that was refused")?;
        same(rig.smmu.statistics().refused_commands, 2 * round + 1, "refused commands")?;
        let next = iova(0x20_0000, PAGE);
        said(map(&space, next, ram(0x40_0000, PAGE), RW), "map")?;
        said(space.revoke(&[next]), "the next revocation")?;
        no_way(&rig, ram(0, 0x60_0000))?;
        // A stream that cannot be blocked is not said to be, however often it is asked for.
        #[allow(unsafe_code)]
        // SAFETY: the model's devices access no memory.
        said(unsafe { rig.smmu.bypass(id(9)) }, "bypass")?;
        same(rig.reads(9, 0x1000), Some(0x1000), "everything")?;
        rig.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
        same(rig.smmu.block(id(9)), Err(AttachError::Dead), "a change that was refused")?;
        said(rig.smmu.block(id(9)), "blocked again")?;
        same(rig.reads(9, 0x1000), None, "a blocked stream")?;
    }
    // The space of a stream whose change was refused stays in memory.
    let (old, new) = (attached(&rig, 10)?, said(rig.smmu.create(), "create")?);
    said(map(&old, iova(0x1000, PAGE), ram(0, PAGE), RW), "map")?;
    same(rig.reads(10, 0x1000), Some(RAM), "what was mapped")?;
    rig.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
    same(rig.smmu.attach(id(10), &new), Err(AttachError::Dead), "a change that was refused")?;
    drop((old, new));
    same(rig.reads(10, 0x5000), None, "what was never mapped")?;
    clean(&rig.model)
}

/// An SMMU that takes no commands: nothing is promised, nothing freed.
fn stuck(seed: u64, config: Config) -> Outcome {
    let rig = try_rig(Traits::NESTED, Config { sync_timeout: hasty().sync_timeout, ..config })?;
    rig.model.adversary(seed, []);
    let space = attached(&rig, 8)?;
    said(map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW | Prot::PAGEWISE), "map")?;
    same(rig.reads(8, 0x1000), Some(RAM), "what was mapped")?;
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    same(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut), "a revocation that was not completed")?;
    same(space.revoke(&[iova(0x2000, PAGE)]), Err(RevokeError::Dead), "another behind it")?;
    let live = rig.memory.live();
    same(rig.smmu.block(id(8)).is_err(), true, "a change that was not completed")?;
    drop(space);
    same(rig.memory.live(), live, "blocks in memory")?;
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    said(rig.smmu.block(id(8)), "blocked")?;
    same(rig.reads(8, 0x1000), None, "a blocked stream")?;
    // Commands that are written and not told of yet, when everything in the queue is given up.
    let mut batch = rig.smmu.shared().batch();
    for _ in 0..9 {
        let command = Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true };
        said(batch.push(command), "push")?;
    }
    rig.smmu.shared().commands.abandon();
    same(batch.complete(), Ok(()), "what was given up and came after all")?;
    // Given up, and then failed for good.
    let space = attached(&rig, 8)?;
    said(map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW | Prot::PAGEWISE), "map")?;
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    same(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut), "a revocation that was not completed")?;
    rig.model.raise(Gerror::SFM_ERR);
    rig.interrupt();
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    same(space.revoke(&[iova(0x2000, PAGE)]), Err(RevokeError::Dead), "one after the failure")?;
    clean(&rig.model)
}

/// Floods where the board comes back later, with a record at the worst moment.
fn floods(seed: u64, config: Config) -> Outcome {
    let rig = hunted(Traits::NESTED, Config { defer: Some(super::floods::later), ..config }, seed, &[8])?;
    let _space = attached(&rig, 8)?;
    for late in [0, 1] {
        rig.model.behave(|b| b.flood = 400);
        same(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err(), true, "a fault")?;
        rig.interrupt();
        rig.model.behave(|b| b.flood = 0);
        rig.smmu.serve_backlog();
        rig.model.take_interrupts();
        rig.model.behave(|b| b.late_records = late);
        rig.ticks();
        let [prod, cons] = [reg::EVENTQ_PROD, reg::EVENTQ_CONS].map(|offset| rig.model.read32(offset) & 0xff);
        same(prod, cons, "the queue is empty")?;
    }
    clean(&rig.model)
}

/// Faults are told, in words, before and after an overflow.
fn events(seed: u64, config: Config) -> Outcome {
    let rig = hunted(Traits::NESTED, config, seed, &[8])?;
    let _space = attached(&rig, 8)?;
    for overflow in [Overflow::Flag, Overflow::Abort] {
        for round in 0..3 {
            let at = 0x5000 + round * PAGE;
            rig.model.behave(|b| (b.records, b.overflow) = (if round == 1 { 300 } else { 1 }, overflow));
            same(rig.model.device_read(id(8), Iova::new(at), 4).is_err(), true, "a fault")?;
            rig.interrupt();
            let told: Vec<_> = rig.log.take().iter().map(|fault| (fault.iova, fault.reason)).collect();
            same(told, [(Some(Iova::new(at)), FaultReason::NotMapped)].to_vec(), "what was told")?;
            same(rig.model.read32(reg::EVENTQ_PROD), rig.model.read32(reg::EVENTQ_CONS), "the queue is empty")?;
        }
    }
    clean(&rig.model)
}

/// Anything.
fn random(seed: u64, config: Config) -> Outcome {
    let rig = hunted(ALL[seed as usize % ALL.len()], config, seed, &(0..STREAMS).collect::<Vec<_>>())?;
    let mut rng = Rng::new(seed);
    let steps: Vec<Step> = (0..60).map(|_| Step::any(&mut rng)).collect();
    World::new(rig, Consumption::Random)?.play(&steps)
}

/// Others come, and something goes wrong, while one core is at the registers.
fn meetings(_seed: u64, config: Config) -> Outcome {
    let meeting = Arc::new(Meeting::new(Traits::NESTED, config.clone()));
    same(post_meanwhile(&meeting), [opcode::CFGI_STE as u8].to_vec(), "what was posted meanwhile")?;
    let meeting = Arc::new(Meeting::new(Traits::NESTED, config));
    same(refuse_meanwhile(&meeting), Err(RevokeError::Dead), "a revocation that was refused")?;
    clean(&meeting.registers.model)
}

/// What a scenario finds with one of its seeds, if anything.
fn play(scenario: &Scenario, bug: Option<Bug>, config: &Config) -> Option<String> {
    (0..scenario.seeds).find_map(|seed| {
        let outcome = bugs::with(bug, || catch_unwind(AssertUnwindSafe(|| (scenario.run)(seed, config.clone()))));
        match outcome {
            Ok(Ok(())) => None,
            Ok(Err(what)) => Some(what),
            Err(_) => Some("a panic".to_string()),
        }
    })
}

#[test]
fn without_a_bug_no_scenario_finds_anything() {
    for scenario in SCENARIOS {
        assert_eq!(play(scenario, None, &patient()), None, "{}", scenario.name);
    }
}

#[test]
fn every_seeded_bug_is_caught() {
    // Long enough for an SMMU that moves, and short enough to wait for one that a bug has brought to a halt.
    let config = Config { sync_timeout: Duration::from_millis(250), ..patient() };
    let mut missed = Vec::new();
    println!("{:26} {:64} first by", "bug", "caught by");
    for &bug in Bug::ALL {
        let found: Vec<_> = SCENARIOS.iter().filter_map(|s| Some((s.name, play(s, Some(bug), &config)?))).collect();
        let names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
        let first = found.first().map_or("", |(_, what)| what.lines().next().unwrap_or_default());
        println!("{:26} {:64} {}", format!("{bug:?}"), names.join(", "), first.chars().take(160).collect::<String>());
        if found.is_empty() {
            missed.push(bug);
        }
    }
    println!("{} bugs, {} caught", Bug::ALL.len(), Bug::ALL.len() - missed.len());
    assert!(missed.is_empty(), "not caught: {missed:?}");
    let table = include_str!("../../../seeded-bugs.md");
    let listed = |bug: &Bug| table.contains(&format!("| `{bug:?}` |"));
    assert!(Bug::ALL.iter().all(listed), "seeded-bugs.md does not list every bug");
}
