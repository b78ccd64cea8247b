//! Several cores at the command queue at once: who goes to the registers, how often, and for whom.
//!
//! The registers are watched: their accesses are counted, and something can be made to happen in the middle of one, so that cores
//! meet there whatever the host's scheduler does. Who waits for others waits for as long as it takes.
//!
//! Seen red: nobody waits for others; a claim that does not say that somebody is here; the bell given back as if nobody had come, and
//! what was posted meanwhile forgotten; a second core at the registers for what the first has seen to; the short way that stays shut;
//! a refusal that the short way does not hear of, one that counts for those before it, and one that counts for those behind it; no
//! look at the refusals; what the others come for taken as the end of one's own, and CMDQ_CONS not compared.

use super::super::Consumption;
use super::*;
use crate::registers::Offset;
use crate::spec::command::{Command, TlbiRange, opcode};
use crate::spec::registers::{self as reg, cmdq_cons};
use crate::{Registers, Smmu};
use std::boxed::Box;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;

type Then = Mutex<Option<Box<dyn FnOnce() + Send>>>;

/// A model whose registers are watched.
pub(super) struct Watched {
    pub model: Arc<Model>,
    /// Accesses to CMDQ_PROD and CMDQ_CONS.
    accesses: AtomicU32,
    /// Done after the next write of CMDQ_PROD, and before the next read of CMDQ_CONS.
    pub at_write: Then,
    pub at_read: Then,
    /// CMDQ_CONS.ERR is gone once the error has been acknowledged, as it may be.
    pub forgets: AtomicBool,
}

fn run(then: &Then) {
    let f = then.lock().unwrap().take();
    if let Some(f) = f {
        f();
    }
}

impl Registers for Arc<Watched> {
    type Register = Offset<Self>;

    fn register(&self, offset: usize) -> Offset<Self> {
        Offset { registers: self.clone(), offset }
    }
    fn read32(&self, offset: usize) -> u32 {
        if offset != reg::CMDQ_CONS {
            return self.model.read32(offset);
        }
        self.accesses.fetch_add(1, Relaxed);
        run(&self.at_read);
        let cons = self.model.read32(offset);
        let stopped = self.model.read32(reg::GERROR) != self.model.read32(reg::GERRORN);
        if self.forgets.load(Relaxed) && !stopped { cons & cmdq_cons::RD.mask() as u32 } else { cons }
    }
    fn write32(&self, offset: usize, value: u32) {
        self.model.write32(offset, value);
        if offset == reg::CMDQ_PROD {
            self.accesses.fetch_add(1, Relaxed);
            run(&self.at_write);
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        self.model.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.model.write64(offset, value);
    }
    fn size(&self) -> usize {
        self.model.size()
    }
}

/// An SMMU whose registers are watched.
pub(super) struct Meeting {
    pub registers: Arc<Watched>,
    pub smmu: Smmu<Arc<Watched>>,
}

impl Meeting {
    pub fn new(traits: Traits, config: Config) -> Self {
        let memory = ModelMemory::new();
        let registers = Arc::new(Watched {
            model: Model::new(traits, memory),
            accesses: AtomicU32::new(0),
            at_write: Then::default(),
            at_read: Then::default(),
            forgets: AtomicBool::new(false),
        });
        let smmu = Smmu::new(Arc::clone(&registers), memory, Arc::new(Log::default()), config).unwrap();
        registers.model.take_log();
        Self { registers, smmu }
    }

    /// Accesses since the last call. The driver counts the same.
    fn accesses(&self) -> u32 {
        self.registers.accesses.swap(0, Relaxed)
    }

    /// One command, completed.
    fn complete(&self, command: Command) -> Result<(), Error> {
        let mut batch = self.smmu.shared().batch();
        batch.push(command)?;
        batch.complete()
    }

    /// One invalidation, completed.
    pub fn invalidate(&self) -> Result<(), Error> {
        self.complete(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true })
    }

    /// `cores` cores issue `rounds` commands each: this one CMD_CFGI_STEs, the others invalidations. And this one issues one
    /// invalidation before: it is at the registers with it, alone, when the others come. Returns how many of the others' commands
    /// failed, and how many of this core's.
    fn meet(self: &Arc<Self>, cores: u64, rounds: u32) -> (u32, u32) {
        let failures = Arc::new(AtomicU32::new(0));
        let start = self.smmu.shared().commands.written();
        let mut threads = Vec::new();
        for _ in 1..cores {
            let (meeting, failures) = (Arc::clone(self), Arc::clone(&failures));
            threads.push(move || {
                thread::spawn(move || {
                    for _ in 0..rounds {
                        failures.fetch_add(u32::from(meeting.invalidate().is_err()), Relaxed);
                    }
                })
            });
        }
        let (started, meeting) = (Arc::new(Mutex::new(Vec::new())), Arc::clone(self));
        let others = Arc::clone(&started);
        *self.registers.at_write.lock().unwrap() = Some(Box::new(move || {
            others.lock().unwrap().extend(threads.into_iter().map(|spawn| spawn()));
            // All of them have written their commands, and found the bell taken.
            while meeting.smmu.shared().commands.written() < start + 2 * cores {
                thread::yield_now();
            }
        }));
        let mut failed = u32::from(self.invalidate().is_err());
        for _ in 0..rounds {
            failed += u32::from(self.complete(Command::CfgiSte { sid: 8, leaf: true }).is_err());
        }
        for thread in started.lock().unwrap().drain(..) {
            thread.join().unwrap();
        }
        (failures.load(Relaxed), failed)
    }
}

/// Who waits for others does so until they come.
fn patient_cores() -> Config {
    Config { linger: u32::MAX, ..patient() }
}

#[test]
fn cores_that_met_share_one_write_and_one_read_of_a_register_from_then_on() {
    for cores in [2, 3, 8] {
        let meeting = Arc::new(Meeting::new(Traits::NESTED, patient_cores()));
        let before = meeting.smmu.statistics();
        meeting.accesses();
        assert_eq!(meeting.meet(cores, 100), (0, 0));
        // The one that was there first, and then all of them together: two accesses for `cores` revocations.
        assert_eq!(meeting.accesses(), 2 + 2 * 100, "{cores} cores");
        let counted = meeting.smmu.statistics().since(&before);
        assert_eq!((counted.queue_accesses, counted.syncs), (2 + 2 * 100, 1 + 100 * cores));
        meeting.registers.model.assert_clean();
    }
}

#[test]
fn a_core_that_is_alone_again_waits_for_the_others_once() {
    let meeting = Arc::new(Meeting::new(Traits::NESTED, patient()));
    meeting.meet(3, 4);
    meeting.invalidate().unwrap();
    let space = meeting.smmu.shared();
    for round in 0..20 {
        meeting.accesses();
        meeting.invalidate().unwrap();
        assert_eq!(meeting.accesses(), 2, "round {round}");
        assert!(!space.commands.is_crowded());
    }
}

#[test]
fn a_refused_command_fails_who_issued_it_and_not_those_who_were_told_of_with_it() {
    for consumption in [Consumption::Immediate, Consumption::PerLook(1)] {
        let meeting = Arc::new(Meeting::new(Traits::NESTED, patient()));
        meeting.registers.model.behave(|b| b.consumption = consumption);
        for round in 0..20 {
            // The first of this core's commands in company; somewhere among the others' commands.
            meeting.registers.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
            assert_eq!(meeting.meet(4, 5), (0, 1), "round {round}");
            meeting.registers.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
            let (others, own) = meeting.meet(4, 5);
            assert_eq!(others + own, 1, "round {round}");
        }
        assert_eq!(meeting.smmu.statistics().refused_commands, 40);
        meeting.registers.model.assert_clean();
    }
}

/// Refusals before, in and behind what one waits for.
#[test]
fn only_a_refusal_in_its_own_place_fails_a_batch() {
    let meeting = Meeting::new(Traits::NESTED, patient());
    let refuse = |opcode| meeting.registers.model.behave(|b| b.refuse = Some(opcode));
    let config = || meeting.complete(Command::CfgiSte { sid: 8, leaf: true });
    refuse(opcode::CFGI_STE as u8);
    assert_eq!(config(), Err(Error::CommandRefused));
    let shared = meeting.smmu.shared();
    let mut open = shared.batch();
    for _ in 0..9 {
        open.push(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true }).unwrap();
    }
    assert_eq!(meeting.invalidate(), Ok(()));
    let written = shared.commands.written();
    // The end of the batch is consumed, and before that is known a command behind it is refused.
    let behind = Arc::clone(shared);
    *meeting.registers.at_write.lock().unwrap() = Some(Box::new(move || {
        assert!(behind.commands.post(&behind.registers, Command::CfgiSte { sid: 8, leaf: true }));
        assert!(behind.commands.written() > written + 2);
    }));
    refuse(opcode::CFGI_STE as u8);
    assert_eq!(open.complete(), Ok(()), "refused before it and behind it");
    meeting.smmu.service();
    assert_eq!(meeting.smmu.statistics().refused_commands, 2);
    // More refusals than are remembered one by one.
    for _ in 0..200 {
        refuse(opcode::CFGI_STE as u8);
        assert_eq!(config(), Err(Error::CommandRefused));
        assert_eq!(meeting.invalidate(), Ok(()));
    }
    let mut open = shared.batch();
    for _ in 0..9 {
        open.push(Command::CfgiSte { sid: 8, leaf: true }).unwrap();
    }
    for _ in 0..200 {
        refuse(opcode::TLBI_NH_VA as u8);
        assert_eq!(meeting.invalidate(), Err(Error::CommandRefused));
    }
    assert_eq!(open.complete(), Err(Error::CommandRefused), "some of what lies between its commands was");
}

#[test]
fn what_is_posted_while_somebody_is_at_the_registers_is_told_by_him() {
    for alone in [true, false] {
        let meeting = Arc::new(Meeting::new(Traits::NESTED, patient()));
        if !alone {
            meeting.smmu.shared().commands.disturb();
        }
        assert_eq!(post_meanwhile(&meeting), [opcode::CFGI_STE as u8]);
    }
}

/// Posts a command while another one's core is at the registers. Returns what the SMMU had consumed behind that when it left.
pub(super) fn post_meanwhile(meeting: &Arc<Meeting>) -> Vec<u8> {
    let space = mapped(meeting);
    let poster = Arc::clone(meeting);
    *meeting.registers.at_write.lock().unwrap() = Some(Box::new(move || {
        let shared = poster.smmu.shared();
        assert!(shared.commands.post(&shared.registers, Command::CfgiSte { sid: 8, leaf: true }));
    }));
    space.revoke(&[iova(0x1000, PAGE)]).unwrap();
    meeting.registers.model.take_log().split_off(2)
}

/// A space with a page, whose revocation takes the short way.
fn mapped(meeting: &Arc<Meeting>) -> Arc<dyn AddressSpace> {
    let space = meeting.smmu.create().unwrap();
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    space
}

#[test]
fn a_revocation_is_over_when_the_smmu_has_got_there_whoever_comes_meanwhile() {
    for consumption in [Consumption::Immediate, Consumption::PerLook(1)] {
        for others in [false, true] {
            let meeting = Arc::new(Meeting::new(Traits::NESTED, patient()));
            meeting.registers.model.behave(|b| b.consumption = consumption);
            if others {
                // Fails unless what was revoked has been consumed.
                post_meanwhile(&meeting);
            } else {
                let space = mapped(&meeting);
                space.revoke(&[iova(0x1000, PAGE)]).unwrap();
                assert_eq!(meeting.registers.model.take_log(), [opcode::TLBI_NH_VA as u8, opcode::SYNC as u8]);
            }
            meeting.registers.model.assert_clean();
        }
    }
}

/// A revocation on the short way, whose command is refused; by the time that it looks at CMDQ_CONS, the SMMU has been made to go on.
pub(super) fn refuse_meanwhile(meeting: &Arc<Meeting>) -> Result<(), iommu::RevokeError> {
    let (space, model) = (mapped(meeting), &meeting.registers.model);
    meeting.registers.forgets.store(true, Relaxed);
    model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
    let server = Arc::clone(meeting);
    *meeting.registers.at_read.lock().unwrap() = Some(Box::new(move || server.smmu.service()));
    space.revoke(&[iova(0x1000, PAGE)])
}

#[test]
fn who_is_on_the_short_way_learns_of_a_refusal_that_somebody_else_has_seen_to() {
    let meeting = Arc::new(Meeting::new(Traits::NESTED, patient()));
    assert_eq!(refuse_meanwhile(&meeting), Err(iommu::RevokeError::Dead));
    assert_eq!(meeting.smmu.statistics().refused_commands, 1);
}

#[test]
fn revocations_of_many_ranges_on_many_cores_go_around_a_queue_that_is_nearly_full() {
    for (log2, traits) in [(3, Traits::NESTED), (9, Traits::NESTED), (3, Traits::MINIMAL)] {
        let rig = rig_with(traits, Config { cmdq_log2: log2, ..patient() });
        thread::scope(|scope| {
            for stream in 0..3 {
                let rig = &rig;
                scope.spawn(move || {
                    let space = rig.attached(stream);
                    for count in [600, 1, 512, 100, 7] {
                        let ranges: Vec<_> = (0..count).map(|n| iova(0x10_0000 + 2 * n * PAGE, PAGE)).collect();
                        for (n, &range) in (0..).zip(&ranges) {
                            map(&space, range, ram(n * PAGE, PAGE), RW).unwrap();
                        }
                        assert_eq!(rig.reads(stream, 0x10_0000), Some(RAM));
                        space.revoke(&ranges).unwrap();
                        assert_eq!(rig.reads(stream, 0x10_0000), None);
                    }
                });
            }
        });
        rig.model.assert_clean();
    }
}
