//! The kernel as a file for a boot loader: one position-independent Image, at whatever 2 MiB-aligned address it is put.
//!
//! Here a few instructions stand for the boot loader: they put the device tree's address into x0 and jump to the image, which, like
//! the tree and an initrd, was put into memory by QEMU's `loader` device. On the second board, whose memory begins at 1 TiB, the very
//! same file runs, too (`on_target.rs`, `sbsa::`).
//!
//! Seen to fail: the second with an identity mapping whose L1 index is a constant, that of memory's first GiB; both with the device
//! tree looked for in the image's block of 2 MiB.

use qemu::arm64_image::{ALIGNMENT, Header, KERNEL, check_linking};
use qemu::board::{Board, Places};
use qemu::disk;
use qemu::firmware::{self, Firmware};
use qemu::machine::{Disk, Machine};
use qemu::progress::Progress;
use qemu::trees;
use qemu::trial::{self, Expect};
use std::sync::OnceLock;
use std::time::Duration;
use tests::runner;

fn kernel() -> &'static Firmware {
    static BUILT: OnceLock<Firmware> = OnceLock::new();
    BUILT.get_or_init(|| firmware::build(KERNEL.0, KERNEL.1, &mut Progress::silent()).unwrap())
}

/// Runs the main job with everything at these places, in so much memory.
fn runs_at(places: Places, memory: &str) {
    let emulator = tests::emulator().unwrap();
    let disk = Disk::open(&disk::cached(kernel(), &mut Progress::silent()).unwrap()).unwrap();
    let machine = Machine { disk: Some(disk), memory: memory.into(), ..Machine::default() };
    let tree = trees::described(&machine, &emulator, &[]).unwrap().into();
    let machine = Machine { board: Board::Loaded { places, tree }, ..machine };
    let ran = trial::run(&emulator, &machine, &kernel().image, Duration::from_secs(60)).unwrap();
    if let Err(problem) = ran.judge(Expect::Picture, &[]) {
        panic!("{places:x?}: {problem}");
    }
}

/// Memory is from 1 GiB on. QEMU keeps the first MiB for its own tree.
#[test]
fn it_runs_at_the_start_in_the_middle_and_at_the_end_of_memory() {
    // What it takes, to the next 2 MiB.
    let size = Header::parse(&std::fs::read(&kernel().image).unwrap()).unwrap().image_size.next_multiple_of(ALIGNMENT);
    runs_at(Places { image: 0x4020_0000, tree: 0x4800_1000, initrd: None }, "512M");
    runs_at(Places { image: 0x5220_0000, tree: 0x4010_1008, initrd: Some(0x5000_3000) }, "512M");
    runs_at(Places { image: 0x6000_0000 - size, tree: 0x4fff_fff8, initrd: Some(0x4010_0000) }, "512M");
}

/// The image's last block before the boundary; and the tree's bytes on both sides of another.
#[test]
fn it_runs_at_boundaries_of_a_gibibyte_and_above_four_of_them() {
    runs_at(Places { image: 0x7fe0_0000, tree: 0xbfff_f000, initrd: Some(0xffff_f000) }, "6G");
    runs_at(Places { image: 0x1_0000_0000, tree: 0x4010_1000, initrd: Some(0x1_8000_0000) }, "6G");
    runs_at(Places { image: 0x4040_0000, tree: 0x1_7fff_f010, initrd: Some(0x1_4000_0000) }, "6G");
    runs_at(Places { image: 0x1_3fe0_0000, tree: 0x1_3000_1000, initrd: None }, "6G");
}

/// Nothing in the image knows a physical address: there is none that the linker could have put there.
#[test]
fn the_elf_knows_no_physical_address_and_the_header_says_so() {
    check_linking(&std::fs::read(&kernel().elf).unwrap()).unwrap();
    let image = std::fs::read(&kernel().image).unwrap();
    let header = Header::parse(&image).unwrap();
    header.check(image.len() as u64).unwrap();
    // Variables and stacks are the image's too.
    assert!(header.image_size > image.len() as u64 + 0x2_8000, "{header:?}");
}

#[test]
fn the_command_writes_the_image_and_says_how_to_start_it() {
    let directory = tempfile::tempdir().unwrap();
    let (file, flash) = (directory.path().join("sluice.Image"), directory.path().join("sluice.flash"));
    for board in ["virt", "sbsa"] {
        let ran = runner::run_bare(&["image", "--board", board, "-o", file.to_str().unwrap()]).unwrap();
        assert_eq!(ran.code, Some(0), "{ran:#?}");
        assert!(std::fs::read(&file).unwrap() == std::fs::read(&kernel().image).unwrap());
        std::fs::remove_file(&file).unwrap();
        assert!(ran.stdout.contains("2 MiB") && ran.stdout.contains("x0"), "{ran:#?}");
        assert_eq!(ran.stdout.contains("booti ${kernel_addr_r} - ${fdt_addr}"), board == "virt", "{ran:#?}");
        // Aligned: a label of up to nine letters, a space, words.
        assert!(ran.stdout.lines().all(|line| line.as_bytes()[9] == b' ' && line.len() <= 130), "{ran:#?}");
    }
    let ran = runner::run_bare(&[
        "image",
        "--board",
        "sbsa",
        "--flash",
        "--append",
        "exit=psci",
        "-o",
        flash.to_str().unwrap(),
    ]);
    let ran = ran.unwrap();
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    let content = std::fs::read(&flash).unwrap();
    let holds = |what: &[u8]| content.windows(what.len()).any(|window| window == what);
    assert!(holds(b"SLUICE\0") && holds(b"exit=psci\0") && holds(b"ARM\x64"));
    assert!(content.ends_with(&std::fs::read(&kernel().image).unwrap()));
}

#[test]
fn what_cannot_be_written_is_said_with_what_to_do() {
    for (arguments, words) in [
        (&["image"][..], "--output"),
        (&["image", "-o", "/"], "give a file name with -o FILE"),
        (&["image", "-o", "/nonexistent/sluice.Image"], "give another place with -o FILE"),
        (&["image", "--board", "mars", "-o", "x"], "virt, sbsa"),
        (&["image", "--flash", "-o", "x"], "give --board sbsa"),
        (&["image", "--append", "a=1", "-o", "x"], "bootargs"),
    ] {
        let ran = runner::run_bare(arguments).unwrap();
        assert_eq!(ran.code, Some(2), "{arguments:?}: {ran:#?}");
        assert!(ran.stderr.contains(words), "{arguments:?}: {ran:#?}");
    }
}
