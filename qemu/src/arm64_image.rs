//! The kernel as a file for a boot loader: `cargo run -- image`.
//!
//! The image is position-independent. It is linked for one place in the upper half of the address space and knows no physical
//! address: the entry code forms all that it needs relative to the program counter, maps the image from wherever it lies to where
//! it was linked, and jumps there. So nothing is relocated, and a loader may put it at any 2 MiB-aligned address
//! (`linker/sections.ld`, `platform/arch/src/asm/entry.s`). [`Header::check`] keeps the header to that, [`check_linking`] the ELF.
//!
//! The header is that of Linux (Documentation/arch/arm64/booting), which U-Boot's `booti`, UEFI stubs and QEMU understand.

use crate::board::{Board, Name};
use crate::cli::ImageOptions;
use crate::firmware::{self, write_if_changed};
use crate::progress::Progress;
use crate::setup;
use anyhow::{Context, Result, bail, ensure};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, elf};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

/// The package with the kernel, and its binary: the same on every board.
pub const KERNEL: (&str, &str) = ("virt", "sluice");
/// What a load address must be a multiple of, in bytes.
pub const ALIGNMENT: u64 = 2 << 20;
/// The most that a device tree may measure, in MiB (`arch::layout::FDT_MAX`).
const TREE_MIB: u32 = 16;
/// The first physical address beyond all memory that the kernel can use, as a power of two (`arch::layout::LINEAR_LIMIT`).
const MEMORY_BITS: u32 = 47;

/// Bytes of the header.
const HEADER: usize = 64;
/// Flags: bit 0 is set for big-endian code.
const BIG_ENDIAN: u64 = 1;
/// Flags: the granule that the kernel needs, in bits 1 and 2; 1 is 4 KiB.
const GRANULE: u64 = 3 << 1;
/// Flags: the image may lie anywhere in memory.
const ANYWHERE: u64 = 1 << 3;

/// What an arm64 Image says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes from a 2 MiB-aligned address to the image.
    pub text_offset: u64,
    /// Bytes of memory from there that are the image's once it runs, variables and stacks included.
    pub image_size: u64,
    /// See the boot protocol.
    pub flags: u64,
}

impl Header {
    /// Reads the header at the start of an Image. Fails if there is none.
    pub fn parse(image: &[u8]) -> Result<Self> {
        let header = image.get(..HEADER).context("it is shorter than the header of an arm64 Image")?;
        ensure!(header[0x38..0x3c] == *b"ARM\x64", "it does not begin with the header of an arm64 Image");
        let word = |at: usize| header[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        Ok(Self { text_offset: word(8), image_size: word(16), flags: word(24) })
    }

    /// Fails, with the reason, if a loader that goes by this header might put the image where it cannot run, or lend its memory to
    /// something else. `file` is the file's length in bytes.
    pub fn check(self, file: u64) -> Result<()> {
        let wrong = "the Image header (platform/arch/src/asm/entry.s) is wrong";
        ensure!(self.text_offset == 0, "{wrong}: text_offset is {:#x}, and must be 0", self.text_offset);
        ensure!(self.flags & BIG_ENDIAN == 0, "{wrong}: it claims to be big-endian");
        ensure!(self.flags & GRANULE == 1 << 1, "{wrong}: it does not claim pages of 4 KiB");
        ensure!(self.flags & ANYWHERE != 0, "{wrong}: it does not say that the image may lie anywhere in memory");
        ensure!(self.flags >> 4 == 0, "{wrong}: it has flags that are not defined ({:#x})", self.flags);
        ensure!(
            self.image_size >= file,
            "{wrong}: it claims {} bytes of memory for a file of {file}: __image_size must cover all sections",
            self.image_size
        );
        Ok(())
    }
}

/// Fails if something in a kernel's ELF could depend on where it is loaded: relocations that nobody applies, or segments that do not
/// lie in memory as they do in the address space. Load addresses (LMA) must count from 0, so that there is no physical address that
/// the linker could have put anywhere.
pub fn check_linking(elf: &[u8]) -> Result<()> {
    let file = ElfFile64::<Endianness>::parse(elf).context("no 64-bit ELF")?;
    let endian = file.endian();
    let mut distance = None;
    for segment in file.elf_program_headers() {
        let kind = segment.p_type(endian);
        ensure!(
            kind != elf::PT_DYNAMIC && kind != elf::PT_INTERP,
            "it is linked dynamically, and nobody would relocate it"
        );
        if kind != elf::PT_LOAD {
            continue;
        }
        let (place, address) = (segment.p_paddr(endian), segment.p_vaddr(endian));
        let here = address.wrapping_sub(place);
        match distance {
            None => ensure!(place == 0, "its first segment is loaded at {place:#x}: load addresses must count from 0"),
            Some(first) => ensure!(
                here == first,
                "the segment at {address:#x} is moved against the others: give its sections AT(ADDR(..) - IMAGE_VA)"
            ),
        }
        distance.get_or_insert(here);
    }
    ensure!(distance.is_some(), "there is nothing to load");
    for section in file.sections() {
        let name = section.name().unwrap_or_default();
        ensure!(!name.starts_with(".rela") && !name.starts_with(".relr"), "it has relocations ({name})");
    }
    Ok(())
}

/// Builds the kernel and writes it. Prints what it is and how to start it.
pub fn run(options: &ImageOptions) -> Result<()> {
    let mut progress = Progress::new();
    // A mistyped name should not cost a build.
    check_output(&options.output)?;
    if !options.flash && !options.append.is_empty() {
        bail!(
            "an Image has no command line: give it to the boot loader (bootargs), or write a flash with --board sbsa --flash"
        );
    }
    if options.flash && options.board == Name::Virt {
        bail!("the board virt starts an Image and needs no flash: leave --flash out, or give --board sbsa");
    }
    setup::rust_target(firmware::workspace(), &mut progress)?;
    let firmware = firmware::build(KERNEL.0, KERNEL.1, &mut progress)?;
    let read = |file: &Path| std::fs::read(file).with_context(|| format!("{} cannot be read", file.display()));
    let image = read(&firmware.image)?;
    let header = Header::parse(&image)?;
    header.check(image.len() as u64)?;
    check_linking(&read(&firmware.elf)?).context("the kernel is not position-independent")?;
    let content = if options.flash {
        match options.board.prepare(&mut progress)? {
            Board::Sbsa { hand_over } => {
                let command_line = options.append.join(" ");
                sbsa::payload::Payload { image: &image, command_line: &command_line }.flash(&hand_over)?
            }
            _ => bail!("the board {:?} has no flash", options.board),
        }
    } else {
        image.clone()
    };
    write_if_changed(&options.output, &content)
        .with_context(|| format!("give another place with -o FILE in place of {}", options.output.display()))?;
    progress.clear();
    let text = lines(options, header, image.len(), content.len());
    // Nobody reading is no failure.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

/// Fails if the file could not be written there.
fn check_output(file: &Path) -> Result<()> {
    if file.is_dir() {
        bail!("{} is a directory; give a file name with -o FILE", file.display());
    }
    let directory = match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    tempfile::tempfile_in(directory)
        .with_context(|| format!("{} cannot be written to; give another place with -o FILE", directory.display()))?;
    Ok(())
}

/// What is printed of an image that was written.
fn lines(options: &ImageOptions, header: Header, image: usize, file: usize) -> String {
    let mut text = String::new();
    let mut line = |label: &str, words: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{label:<9} {words}");
    };
    let path = options.output.display();
    let name = options.output.file_name().unwrap_or_default().to_string_lossy();
    if options.flash {
        line("flash", &format!("{path}: {file} bytes: the hand-over from EL3, the command line, the kernel"));
        line("start", &format!("qemu-system-aarch64 -M sbsa-ref -cpu cortex-a72 -m 512M -bios {path} \\"));
        line("", "    -global pci-device.romfile= -device virtio-gpu-pci,iommu_platform=on ... -serial stdio");
        return text;
    }
    line("image", &format!("{path}: {image} bytes, the same for every board"));
    line("format", "arm64 Image, little-endian, 4 KiB pages, text_offset 0, anywhere in memory");
    line(
        "load",
        &format!("at any multiple of {} MiB below 2^{MEMORY_BITS}, as it is: nothing is relocated", ALIGNMENT >> 20),
    );
    line(
        "memory",
        &format!("{} bytes from there on ({:.1} MiB)", header.image_size, header.image_size as f64 / 1_048_576.0),
    );
    line(
        "tree",
        &format!("the device tree: anywhere else, aligned to 8 bytes, at most {TREE_MIB} MiB; its address in x0"),
    );
    line("initrd", "not used; one that the tree names is left alone, wherever it lies");
    line("enter", "at EL2 or EL1 (or EL3, on one core), MMU off, interrupts masked, caches clean of the image");
    if options.board == Name::Sbsa {
        line("start", "sbsa-ref starts from flash: cargo run -- image --board sbsa --flash -o sluice.flash");
        return text;
    }
    line("u-boot", &format!("load virtio 0:1 ${{kernel_addr_r}} {name}"));
    line("", "booti ${kernel_addr_r} - ${fdt_addr}");
    line(
        "qemu",
        &format!("qemu-system-aarch64 -M virt,iommu=smmuv3,gic-version=3 -cpu cortex-a72 -m 512M -kernel {path} ..."),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firmware::tests::elf_of;

    fn image(text_offset: u64, size: u64, flags: u64) -> Vec<u8> {
        let mut image = vec![0; 100];
        for (at, word) in [(8, text_offset), (16, size), (24, flags)] {
            image[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        image
    }

    #[test]
    fn a_header_is_read_and_one_that_misleads_a_loader_is_refused() {
        let check = |text_offset, size, flags| Header::parse(&image(text_offset, size, flags)).unwrap().check(100);
        check(0, 100, 0xa).unwrap();
        for (text_offset, size, flags, reason) in [
            (0x8_0000, 100, 0xa, "text_offset"),
            (0, 99, 0xa, "99 bytes"),
            (0, 0, 0xa, "__image_size"),
            (0, 100, 0xb, "big-endian"),
            (0, 100, 0x2, "anywhere"),
            (0, 100, 0x8, "4 KiB"),
            (0, 100, 0xe, "4 KiB"),
            (0, 100, 0x1a, "0x1a"),
        ] {
            let error = check(text_offset, size, flags).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(Header::parse(&[0; 100]).is_err());
        assert!(Header::parse(&image(0, 100, 0xa)[..63]).is_err());
    }

    /// The segments of a kernel, with one of them elsewhere.
    #[test]
    fn an_elf_whose_segments_would_not_lie_as_they_are_linked_is_refused() {
        check_linking(&elf_of(&[(0, b"text", 4), (0x1000, b"data", 0x5000)])).unwrap();
        let error = |elf: &[u8]| check_linking(elf).unwrap_err().to_string();
        assert!(error(&elf_of(&[(0x4020_0000, b"text", 4)])).contains("count from 0"));
        let mut moved = elf_of(&[(0, b"text", 4), (0x1000, b"data", 4)]);
        // p_paddr of the second program header.
        moved[64 + 56 + 24 + 1] = 0x20;
        assert!(error(&moved).contains("moved"));
        let mut dynamic = elf_of(&[(0, b"text", 4), (0x1000, b"data", 4)]);
        dynamic[64 + 56] = 2;
        assert!(error(&dynamic).contains("dynamically"));
        assert!(error(&elf_of(&[])).contains("nothing to load"));
    }

    #[test]
    fn what_is_printed_says_how_to_start_it_in_lines_that_fit() {
        let options =
            |board, flash| ImageOptions { board, output: "out/sluice.Image".into(), flash, append: Vec::new() };
        let header = Header { text_offset: 0, image_size: 3 << 20, flags: 0xa };
        let text = lines(&options(Name::Virt, false), header, 1000, 1000);
        assert!(
            text.contains("booti ${kernel_addr_r} - ${fdt_addr}")
                && text.contains("virtio 0:1 ${kernel_addr_r} sluice.Image"),
            "{text}"
        );
        assert!(text.contains("2 MiB") && text.contains("3145728 bytes") && text.contains("x0"), "{text}");
        let flash = lines(&options(Name::Sbsa, true), header, 1000, 9000);
        assert!(flash.contains("-bios out/sluice.Image") && flash.contains("9000 bytes"), "{flash}");
        assert!(lines(&options(Name::Sbsa, false), header, 1, 1).contains("--flash"));
        for line in text.lines().chain(flash.lines()) {
            assert!(line.len() <= 120, "{line}");
        }
    }
}
