//! Programs, well formed and not.

use crate::machine::World;
use abi::PAGE;
use iommu::Prot;
use process::{ElfError, Error, PROGRAM, Quota, STACK_TOP};
use proptest::prelude::*;

const BASE: u64 = 0x20_0000;

/// One segment: type, flags, address, contents, size in memory.
type Segment<'a> = (u32, u32, u64, &'a [u8], u64);

/// An ELF with these segments.
fn elf(entry: u64, segments: &[Segment<'_>]) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend(2_u16.to_le_bytes());
    file.extend(183_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64, 56, segments.len() as u16, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 64 + 56 * segments.len() as u64;
    for (kind, flags, address, contents, len) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for word in [offset, *address, *address, contents.len() as u64, *len, PAGE] {
            file.extend(word.to_le_bytes());
        }
        offset += contents.len() as u64;
    }
    segments.iter().for_each(|(.., contents, _)| file.extend(*contents));
    file
}

fn good() -> Vec<u8> {
    let data = [1, 2, 3, 4];
    elf(
        BASE + 8,
        &[
            (1, 5, BASE, &[0x1f; 100], 100),
            (1, 6, BASE + 2 * PAGE + 16, &data, 3 * PAGE),
            (1, 4, BASE + 6 * PAGE, &[7], 1),
        ],
    )
}

fn load(file: &[u8]) -> (World, Result<process::Start, Error>) {
    let mut world = World::new(Quota { pages: 64, ..Quota::default() });
    let result = world.process.load(file);
    (world, result)
}

#[test]
fn a_program_lies_where_it_says_with_the_rights_that_it_says() {
    let (world, start) = load(&good());
    let start = start.unwrap();
    assert_eq!((start.entry, start.stack), (BASE + 8, STACK_TOP));
    let mut bytes = [9; 6];
    world.process.space().copy_in(BASE + 2 * PAGE + 15, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 1, 2, 3, 4, 0]);
    let pages = world.tables.pages.lock().unwrap();
    let prot = |at| pages[&at].1;
    assert_eq!(prot(BASE), Prot::READ | Prot::EXECUTE);
    assert_eq!(prot(BASE + 4 * PAGE), Prot::READ | Prot::WRITE);
    assert_eq!(prot(BASE + 6 * PAGE), Prot::READ);
    assert_eq!(prot(STACK_TOP - PAGE), Prot::READ | Prot::WRITE);
    assert!(!pages.contains_key(&(STACK_TOP - abi::STACK - PAGE)), "nothing below the stack");
}

#[test]
fn what_is_wrong_with_a_program_is_said() {
    let code: Segment<'_> = (1, 5, BASE, &[0; 8], 8);
    type Judge = fn(&Error) -> bool;
    let wrong: [(Vec<u8>, Judge); 11] = [
        (vec![], |error| matches!(error, Error::Elf(ElfError::NotElf))),
        (good()[..80].to_vec(), |error| matches!(error, Error::Elf(ElfError::NotElf))),
        (elf(BASE, &[]), |error| matches!(error, Error::Elf(ElfError::Segments(0) | ElfError::NotElf))),
        (elf(BASE, &[code, (3, 4, BASE, &[0; 8], 8)]), |error| matches!(error, Error::Elf(ElfError::WrongKind))),
        (elf(BASE, &[(1, 7, BASE, &[0; 8], 8)]), |error| matches!(error, Error::Elf(ElfError::Flags(7)))),
        (elf(BASE, &[(1, 5, BASE, &[0; 8], 4)]), |error| matches!(error, Error::Elf(ElfError::Contents(_)))),
        (elf(BASE, &[(1, 5, 0x1000, &[0; 8], 8)]), |error| matches!(error, Error::Elf(ElfError::Place { .. }))),
        (elf(BASE, &[(1, 5, u64::MAX - 4, &[0; 8], 8)]), |error| matches!(error, Error::Elf(ElfError::Place { .. }))),
        (elf(BASE, &[code, (1, 6, BASE + 64, &[0; 8], 8)]), |error| matches!(error, Error::Overlap(_))),
        (elf(BASE + 8, &[code]), |error| matches!(error, Error::Elf(ElfError::Entry(_)))),
        (elf(BASE, &[code, (1, 6, BASE + PAGE, &[], 65 * PAGE)]), |error| matches!(error, Error::Quota(_))),
    ];
    for (case, (file, judge)) in wrong.iter().enumerate() {
        let error = load(file).1.unwrap_err();
        assert!(judge(&error), "case {case}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever is in a file: it is loaded where programs may lie, or refused, and everything comes back.
    #[test]
    fn a_file_with_changed_bytes_does_no_harm(changes in prop::collection::vec((0..400_usize, any::<u8>()), 1..6), cut in 0..600_usize) {
        let mut file = good();
        for (at, byte) in changes {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        file.truncate(cut.max(64));
        let (world, _) = load(&file);
        let memory = world.system.memory;
        for (at, (_, prot)) in world.tables.pages.lock().unwrap().iter() {
            prop_assert!(PROGRAM.contains(at) || (STACK_TOP - abi::STACK..STACK_TOP).contains(at));
            prop_assert!(!prot.contains(Prot::WRITE | Prot::EXECUTE));
        }
        let World { process, system, .. } = world;
        process.end();
        drop(system);
        prop_assert!(memory.violations().is_empty());
    }
}
