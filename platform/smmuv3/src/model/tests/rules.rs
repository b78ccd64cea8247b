//! The rules that the model checks, each broken once by hand; and that what keeps them is not complained of.

use super::*;
use crate::Registers;
use crate::descriptors::{CdFields, cd, ste_abort, ste_bypass, ste_stage1};
use crate::entry::{Entry, WORDS};
use crate::spec::command::{ASID, Command, OPCODE, TlbiRange, VMID, opcode};
use crate::spec::registers as reg;
use crate::spec::{cd as cd_fields, ste};
use core::sync::atomic::Ordering::Relaxed;
use iommu::contract::{TableBlock, TableMemory};

/// An SMMU programmed by hand: a linear table of 64 streams, and a queue of eight commands.
struct Bare {
    model: Arc<Model>,
    memory: &'static ModelMemory,
    streams: TableBlock,
    queue: TableBlock,
    prod: std::cell::Cell<u32>,
}

const CMDQEN: u32 = 8;
const SMMUEN: u32 = 1;

fn bare(traits: Traits) -> Bare {
    let memory = ModelMemory::new();
    let model = Model::new(traits, memory);
    let (streams, queue) = (memory.allocate(64 * 64).unwrap(), memory.allocate(1024).unwrap());
    model.write64(reg::STRTAB_BASE, streams.phys().get());
    model.write32(reg::STRTAB_BASE_CFG, 6);
    model.write64(reg::CMDQ_BASE, queue.phys().get() | 3);
    model.write32(reg::CR0, CMDQEN);
    model.write32(reg::CR0, CMDQEN | SMMUEN);
    let bare = Bare { model, memory, streams, queue, prod: std::cell::Cell::new(0) };
    for stream in 0..64 {
        bare.ste(stream, &ste_abort());
    }
    bare
}

fn put(block: &TableBlock, from: usize, words: &[u64]) {
    for (cell, &word) in block[from..].iter().zip(words) {
        cell.store(word, Relaxed);
    }
    block.publish(from, from + words.len());
}

impl Bare {
    fn ste(&self, stream: usize, entry: &Entry) {
        put(&self.streams, stream * WORDS, entry);
    }

    fn raw(&self, words: [u64; 2]) {
        put(&self.queue, self.prod.get() as usize % 8 * 2, &words);
        self.prod.set((self.prod.get() + 1) % 16);
        self.model.write32(reg::CMDQ_PROD, self.prod.get());
    }

    fn command(&self, command: Command) {
        self.raw(command.encode());
    }

    fn page(&self) -> TableBlock {
        self.memory.allocate(4096).unwrap()
    }

    /// A CD for three levels of tables from `root`.
    fn context(&self, asid: u16, root: &TableBlock) -> TableBlock {
        let block = self.memory.allocate(64).unwrap();
        let fields = CdFields { asid, ttb0: root.phys().get(), t0sz: 25, ..CdFields::TEST };
        put(&block, 0, &cd(&fields));
        block
    }

    fn reads(&self, stream: u32, at: u64) -> Option<u64> {
        self.model.device_read(id(stream), Iova::new(at), 4).ok().map(|runs| runs[0].start().get())
    }

    #[track_caller]
    fn complains(&self, of: &str) {
        let violations = self.model.violations();
        assert!(violations.iter().any(|what| what.contains(of)), "{of:?} is not among {violations:#?}");
    }
}

fn link(to: &TableBlock) -> u64 {
    to.phys().get() | 0b11
}

/// A page or block that may be read and written, of memory type 0.
fn leaf(phys: u64, page: bool) -> u64 {
    phys | 1 << 11 | 1 << 10 | 1 << 6 | if page { 0b11 } else { 0b01 }
}

/// Stream 8 with tables of three levels: root, middle, and a table of pages at address 0.
fn translated(asid: u16, stream: usize, bare: &Bare) -> (TableBlock, TableBlock, TableBlock, TableBlock) {
    let (root, middle, pages) = (bare.page(), bare.page(), bare.page());
    put(&root, 0, &[link(&middle)]);
    put(&middle, 0, &[link(&pages)]);
    let context = bare.context(asid, &root);
    bare.ste(stream, &ste_stage1(context.phys().get(), true));
    (context, root, middle, pages)
}

const OUT: u64 = 0x8000_0000;

#[test]
fn a_descriptor_that_changes_without_break_before_make_is_noticed() {
    let bare = bare(Traits::NESTED);
    let (_context, _root, _middle, pages) = translated(7, 8, &bare);
    put(&pages, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    // With a break: fine.
    put(&pages, 1, &[0]);
    bare.command(Command::TlbiNhVa { vmid: 0, asid: 7, addr: 0x1000, range: TlbiRange::SINGLE, leaf: true });
    bare.command(Command::Sync);
    put(&pages, 1, &[leaf(OUT + PAGE, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT + PAGE));
    bare.model.assert_clean();
    // Without: the TLB goes on with the old one, and the next walk that sees the descriptor complains.
    put(&pages, 1, &[leaf(OUT + 2 * PAGE, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT + PAGE));
    bare.model.adversary(1, [8]);
    for _ in 0..200 {
        // Time passes, and the adversary does what it likes.
        let _ = bare.model.read32(reg::CR0);
    }
    bare.complains("no break before make");
}

#[test]
fn a_tag_that_two_sets_of_tables_share_is_noticed() {
    let bare = bare(Traits::NESTED);
    let (_c1, _r1, _m1, one) = translated(7, 8, &bare);
    let (_c2, _r2, _m2, _) = translated(7, 9, &bare);
    put(&one, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    assert_eq!(bare.reads(9, 0x1000), Some(OUT), "as hardware would");
    bare.complains("is used by the tables at");
}

#[test]
fn a_table_that_is_freed_while_it_is_linked_in_a_cache_is_noticed() {
    let bare = bare(Traits::NESTED);
    let (_context, _root, middle, pages) = translated(7, 8, &bare);
    put(&pages, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    put(&middle, 0, &[0]);
    drop(pages);
    bare.complains("was freed while a link");
}

#[test]
fn a_table_that_is_freed_after_an_invalidation_of_all_of_it_is_not_complained_of() {
    let bare = bare(Traits::NESTED);
    let (_context, _root, middle, pages) = translated(7, 8, &bare);
    put(&pages, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    put(&middle, 0, &[0]);
    // Leaf set: the link stays cached.
    bare.command(Command::TlbiNhVa { vmid: 0, asid: 7, addr: 0x1000, range: TlbiRange::SINGLE, leaf: true });
    bare.command(Command::Sync);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT), "through the link that is still cached");
    bare.command(Command::TlbiNhVa { vmid: 0, asid: 7, addr: 0x1000, range: TlbiRange::SINGLE, leaf: false });
    bare.command(Command::Sync);
    drop(pages);
    assert_eq!(bare.reads(8, 0x1000), None);
    bare.model.assert_clean();
}

#[test]
fn a_context_that_is_freed_while_an_ste_leads_to_it_is_noticed() {
    let bare = bare(Traits::NESTED);
    let (context, _root, _middle, pages) = translated(7, 8, &bare);
    put(&pages, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    bare.ste(8, &ste_abort());
    drop(context);
    bare.complains("was freed while an STE");
}

#[test]
fn a_group_that_is_not_of_one_piece_is_noticed_and_one_that_is_being_made_is_not() {
    let bare = bare(Traits::NESTED);
    let (_context, _root, _middle, pages) = translated(7, 8, &bare);
    let member = |index: u64| leaf(OUT + index * PAGE, true) | 1 << 52;
    for index in 0..16 {
        put(&pages, index as usize, &[member(index)]);
        assert_eq!(bare.reads(8, 0), Some(OUT));
    }
    bare.model.assert_clean();
    // One goes elsewhere.
    put(&pages, 16, &core::array::from_fn::<_, 16, _>(|i| member(16 + i as u64)));
    put(&pages, 20, &[member(90)]);
    assert!(bare.reads(8, 16 * PAGE).is_some());
    bare.complains("is not of one piece");
}

#[test]
fn translations_that_disagree_are_a_conflict() {
    let bare = bare(Traits::NESTED);
    let (_context, _root, middle, pages) = translated(7, 8, &bare);
    put(&pages, 1, &[leaf(OUT, true)]);
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    // A block in place of the table, while the table's page is cached; and then the page again.
    put(&middle, 0, &[leaf(OUT + (1 << 21), false)]);
    bare.command(Command::TlbiNhVa { vmid: 0, asid: 7, addr: 1 << 30, range: TlbiRange::SINGLE, leaf: false });
    bare.model.state.lock().caches.walks.clear();
    assert_eq!(bare.reads(8, 0x2000), Some(OUT + (1 << 21) + 0x2000));
    assert_eq!(bare.reads(8, 0x1000), Some(OUT));
    bare.complains("a TLB conflict at 0x1000");
}

#[test]
fn memory_types_that_do_not_exist_are_noticed() {
    let bare = bare(Traits::NESTED);
    let (context, _root, _middle, pages) = translated(7, 8, &bare);
    // AttrIndx 0 is write-back, 1 a device, and 2 nothing that exists.
    put(&context, 3, &[0x000d_04ff]);
    put(&pages, 1, &[leaf(OUT, true), leaf(OUT, true) | 2 << 2]);
    assert_eq!(bare.model.memory_type(id(8), Iova::new(0x1000)), Some(0xff));
    bare.model.assert_clean();
    assert_eq!(bare.model.memory_type(id(8), Iova::new(0x2000)), Some(0x0d));
    bare.complains("a memory type that does not exist");
}

#[test]
fn commands_that_the_smmu_does_not_have_or_that_have_stray_bits_are_noticed() {
    let op = |code: u64| OPCODE.put(code);
    let plain = TlbiRange::SINGLE;
    let at = |range| Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0x1000, range, leaf: true }.encode();
    let minimal = Traits::MINIMAL;
    for (traits, words, what) in [
        (Traits::OLD, Command::TlbiS12Vmall { vmid: 0 }.encode(), "an illegal CMD_TLBI_S12_VMALL"),
        (Traits::STAGE2, Command::TlbiNhAll { vmid: 1 }.encode(), "an illegal CMD_TLBI_NH_ALL"),
        (Traits::NESTED, [op(opcode::ATC_INV), 0], "an illegal CMD_ATC_INV"),
        (Traits::NESTED, [op(opcode::TLBI_EL2_ALL), 0], "an illegal CMD_TLBI_EL2_ALL"),
        (Traits::NESTED, [op(0xff), 0], "an illegal"),
        (Traits::NESTED, [op(opcode::SYNC) | 1 << 12, 0x1000], "an illegal CMD_SYNC"),
        (Traits::NESTED, [op(opcode::TLBI_NH_ASID) | 1 << 20, 0], "reserved bits in a CMD_TLBI_NH_ASID"),
        (Traits::NESTED, [op(opcode::CFGI_STE), 2], "reserved bits in a CMD_CFGI_STE"),
        (Traits::NESTED, at(TlbiRange { num: 0, scale: 0, tg: 1, ttl: 0 }), "an illegal CMD_TLBI_NH_VA"),
        (Traits::NESTED, at(TlbiRange { num: 1, scale: 0, tg: 1, ttl: 2 }), "level hint 2 makes unpredictable"),
        (minimal, at(TlbiRange { num: 1, scale: 0, tg: 1, ttl: 3 }), "range fields in an invalidation without"),
        (minimal, [op(opcode::TLBI_NH_ASID) | ASID.put(0x100), 0], "an ASID of 16 bits"),
        (minimal, [op(opcode::TLBI_NH_ASID) | VMID.put(1), 0], "a VMID where there is no stage 2"),
        (Traits::NESTED, Command::CfgiCd { sid: 8, ssid: 1, leaf: true }.encode(), "SubstreamID 0x1, which cannot be"),
    ] {
        let bare = bare(traits);
        bare.raw(if traits == Traits::STAGE2 { Command::Sync.encode() } else { at(plain) });
        bare.model.assert_clean();
        bare.raw(words);
        bare.complains(what);
    }
}

#[test]
fn an_error_that_is_acknowledged_with_the_command_still_there_is_noticed() {
    let bare = bare(Traits::NESTED);
    bare.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
    bare.command(Command::CfgiSte { sid: 8, leaf: false });
    bare.model.assert_clean();
    bare.model.write32(reg::GERRORN, bare.model.read32(reg::GERROR));
    bare.complains("was acknowledged, and the command is still there");
}

#[test]
fn registers_written_at_the_wrong_time_are_noticed() {
    type Write = fn(&Bare);
    let cases: [(Write, &str); 12] = [
        (|b| b.model.write64(reg::CMDQ_BASE, b.queue.phys().get() | 3), "CMDQ_BASE written while"),
        (|b| b.model.write64(reg::STRTAB_BASE, b.streams.phys().get()), "STRTAB_BASE written while"),
        (|b| b.model.write32(reg::STRTAB_BASE_CFG, 6), "STRTAB_BASE_CFG written while"),
        (|b| b.model.write32(reg::CR1, 0), "CR1 written while"),
        (|b| b.model.write32(reg::CR2, 0), "CR2 written while"),
        (|b| b.model.write32(reg::CMDQ_CONS, 0), "CMDQ_CONS written while"),
        (|b| b.model.write32(reg::CMDQ_PROD, 9), "passes CMDQ_CONS"),
        (|b| b.model.write32(reg::GERRORN, 1), "which is not active"),
        (|b| b.model.write32(reg::CR0, CMDQEN | SMMUEN | 1 << 20), "reserved bits in CR0"),
        (|b| b.model.write32(reg::IRQ_CTRL, 1 << 9), "reserved bits in IRQ_CTRL"),
        (|b| assert_eq!(b.model.read32(0x3c), 0), "read of offset 0x3c"),
        (
            |b| {
                b.model.behave(|behaviour| behaviour.gbpa_updates = false);
                b.model.write32(reg::GBPA, 1 << 31);
                b.model.write32(reg::GBPA, 1 << 31);
            },
            "GBPA written during an update",
        ),
    ];
    for (write, what) in cases {
        let bare = bare(Traits::NESTED);
        bare.model.assert_clean();
        write(&bare);
        bare.complains(what);
    }
}

#[test]
fn entries_that_the_architecture_forbids_are_noticed() {
    let valid = ste_stage1(0x1_0000_0000, true);
    let with = |word: usize, bits: u64| {
        let mut entry = valid;
        entry[word] |= bits;
        entry
    };
    let s2 = |bits: u64| [ste::V.mask() | ste::CONFIG.put(ste::CONFIG_S2), 0, bits, 0, 0, 0, 0, 0];
    for (traits, entry, what) in [
        (Traits::NESTED, [0b0101, 0, 0, 0, 0, 0, 0, 0], "STE.Config is reserved"),
        (Traits::NESTED, with(5, 1), "STE words 4 to 7"),
        (Traits::NESTED, with(2, 1 << 20), "STE has reserved bits set"),
        (Traits::NESTED, with(1, ste::EATS.put(1)), "STE.EATS without ATS"),
        (Traits::NESTED, with(0, ste::S1CDMAX.put(4)), "STE.S1CDMax is larger"),
        (Traits::NESTED, with(0, 1 << 50), "STE.S1ContextPtr is beyond"),
        (FULL, with(0, ste::S1CDMAX.put(4) | ste::S1CONTEXTPTR.address(64)), "STE.S1ContextPtr is not aligned"),
        (FULL, with(0, ste::S1CDMAX.put(4) | ste::S1FMT.put(3)), "STE.S1Fmt is reserved"),
        (Traits::OLD, s2(0), "a stage 2 that is not there"),
        (Traits::NESTED, s2(ste::S2T0SZ.put(24)), "STE.S2AA64 is clear"),
        (Traits::NESTED, s2(ste::S2AA64.mask() | ste::S2T0SZ.put(16) | ste::S2PS.put(4)), "STE.S2PS or S2T0SZ"),
        (Traits::NESTED, s2(ste::S2AA64.mask() | ste::S2T0SZ.put(24) | ste::S2PS.put(4)), "STE.S2SL0 does not fit"),
    ] {
        let bare = bare(traits);
        bare.ste(8, &ste_bypass(false));
        bare.ste(9, &entry);
        assert_eq!(bare.reads(8, 0x1000), Some(0x1000));
        bare.model.assert_clean();
        assert_eq!(bare.reads(9, 0x1000), None);
        bare.complains(what);
    }
}

#[test]
fn contexts_that_the_architecture_forbids_are_noticed() {
    for (word, set, clear, what) in [
        (0, 0, cd_fields::AA64.mask(), "CD.AA64"),
        (0, cd_fields::S.mask(), 0, "CD.S is set"),
        (0, cd_fields::HA.mask(), 0, "CD.HA"),
        (0, 0, cd_fields::EPD1.mask(), "CD.EPD1"),
        (0, cd_fields::IPS.put(5), 0, "CD.IPS is larger"),
        (0, 0, cd_fields::T0SZ.mask(), "CD.T0SZ is out of range"),
        (0, cd_fields::TG0.put(3), 0, "CD.TG0"),
        (1, 0x800, 0, "CD.TTB0 is not aligned"),
        (1, 1 << 50, 0, "CD.TTB0 is beyond"),
        (6, 1, 0, "CD words 4 to 7"),
    ] {
        let bare = bare(Traits::NESTED);
        let (context, _root, _middle, pages) = translated(7, 8, &bare);
        put(&pages, 1, &[leaf(OUT, true)]);
        let now = context[word].load(Relaxed);
        put(&context, word, &[now & !clear | set]);
        assert_eq!(bare.reads(8, 0x1000), None);
        bare.complains(what);
    }
}

#[test]
fn an_adversary_repeats_itself_for_the_same_seed() {
    let run = |seed| {
        let rig = rig(Traits::NESTED);
        rig.model.adversary(seed, [8]);
        rig.model.behave(|b| b.consumption = super::super::Consumption::Random);
        let space = rig.attached(8);
        for round in 0..20 {
            map(&space, iova(0x1000 + round * PAGE, PAGE), ram(round * PAGE, PAGE), RW).unwrap();
        }
        let state = rig.model.state.lock();
        (state.caches.tlb.clone(), state.caches.walks.clone())
    };
    assert_eq!(run(5), run(5));
    assert!((6..20).any(|seed| run(seed) != run(5)));
}
