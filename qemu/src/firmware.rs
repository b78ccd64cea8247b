//! Builds an image crate for the target and flattens it to an arm64 Image.
//!
//! QEMU hands the device tree over in x0 only if the kernel is a flat Image that follows the Linux boot protocol; for an
//! ELF x0 is undefined. The ELF stays beside the Image: symbols are read from it.

use crate::progress::Progress;
use crate::setup::TARGET;
use anyhow::{Context, Result, bail};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, elf};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The largest Image that is written, in bytes. A kernel is some megabytes; more means that two segments lie far apart.
const LARGEST: u64 = 256 << 20;

/// An image crate, built and flattened.
#[derive(Debug, Clone)]
pub struct Firmware {
    /// The ELF with symbols and line tables.
    pub elf: PathBuf,
    /// The flat Image beside it.
    pub image: PathBuf,
}

/// Returns the root of the workspace.
pub fn workspace() -> &'static Path {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_root.parent().unwrap_or(crate_root)
}

/// Builds package `package`, whose binary is named `binary`, in release for the target, and flattens it.
///
/// Fails with the compiler's own words.
pub fn build(package: &str, binary: &str, progress: &mut Progress) -> Result<Firmware> {
    let elf = compile(package, binary, progress)?;
    let image = elf.with_extension("Image");
    let bytes = std::fs::read(&elf).with_context(|| format!("{} cannot be read", elf.display()))?;
    let flat = flatten(&bytes).with_context(|| format!("{} cannot be flattened", elf.display()))?;
    write_if_changed(&image, &flat)?;
    Ok(Firmware { elf, image })
}

/// Builds code that a board runs before the kernel: as [`build`], but flat, and without the header of an Image.
pub fn build_hand_over(package: &str, binary: &str, progress: &mut Progress) -> Result<Vec<u8>> {
    let elf = compile(package, binary, progress)?;
    let bytes = std::fs::read(&elf).with_context(|| format!("{} cannot be read", elf.display()))?;
    flat(&bytes).with_context(|| format!("{} cannot be flattened", elf.display()))
}

/// Builds a binary for the target and returns its file.
fn compile(package: &str, binary: &str, progress: &mut Progress) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--release", "--target", TARGET, "--package", package, "--bin", binary])
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(workspace());
    // What cargo tells the program it runs about the package `qemu` must not reach the build of another package: a
    // build script that watches such a variable would run again and again.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text.starts_with("CARGO_BIN_") {
            command.env_remove(&name);
        }
    }
    // Flags for the host's compiler (a processor model, say) are wrong for the target, and would hide those of
    // .cargo/config.toml.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("CARGO_BUILD_RUSTFLAGS");
    progress.step(&format!("building {binary}"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cargo cannot be started")?;
    let (stdout, mut stderr) = match (child.stdout.take(), child.stderr.take()) {
        (Some(stdout), Some(stderr)) => (stdout, stderr),
        _ => bail!("cargo was started without pipes"),
    };
    // Both pipes are drained at once: a full one would stop cargo.
    let diagnostics = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut executable = None;
    for line in BufReader::new(stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(&line.context("cargo's output ended early")?) else { continue };
        if message["reason"] != "compiler-artifact" {
            continue;
        }
        if let Some(name) = message["target"]["name"].as_str() {
            progress.detail(&format!("building {binary}: {name}"));
            if name == binary && message["executable"].is_string() {
                executable = message["executable"].as_str().map(PathBuf::from);
            }
        }
    }
    let status = child.wait()?;
    let diagnostics = diagnostics.join().unwrap_or_default();
    if !status.success() {
        bail!("building {package} failed:\n{}", diagnostics.trim_end());
    }
    let Some(elf) = executable else { bail!("cargo built {package} but named no executable {binary}") };
    Ok(elf)
}

/// Flattens a kernel's ELF. Memory that is only zeroed (bss) after the last byte of content is left out, as the Image header
/// states the size in memory.
///
/// Fails as `flat`, and if the result does not begin with an arm64 Image header.
pub fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let flat = flat(elf)?;
    if flat.get(0x38..0x3c) != Some(b"ARM\x64".as_slice()) {
        bail!("it does not begin with an arm64 Image header; the linker script must place the header first");
    }
    Ok(flat)
}

/// Flattens an ELF: the contents of its loadable segments, placed by physical address from the lowest on.
///
/// Fails if this is no arm64 ELF, or if segments overlap or lie too far apart.
fn flat(elf: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<Endianness>::parse(elf).context("no 64-bit ELF")?;
    let endian = file.endian();
    if file.elf_header().e_machine(endian) != elf::EM_AARCH64 {
        bail!("this is not built for arm64");
    }
    let mut pieces = Vec::new();
    for segment in file.elf_program_headers() {
        if segment.p_type(endian) == elf::PT_LOAD && segment.p_filesz(endian) > 0 {
            let content = segment.data(endian, elf).ok().context("a segment lies outside the file")?;
            pieces.push((segment.p_paddr(endian), content));
        }
    }
    pieces.sort_by_key(|(address, _)| *address);
    let Some((base, _)) = pieces.first().copied() else { bail!("there is nothing to load") };
    let mut flat = Vec::new();
    for (address, content) in pieces {
        let offset = address - base;
        if offset > LARGEST {
            bail!("segments lie more than {} MiB apart (at {base:#x} and {address:#x})", LARGEST >> 20);
        }
        let offset = usize::try_from(offset)?;
        if offset < flat.len() {
            bail!("segments overlap at {address:#x}");
        }
        flat.resize(offset, 0);
        flat.extend_from_slice(content);
    }
    Ok(flat)
}

/// Writes a file unless it already has this content; a reader never sees half of it.
pub(crate) fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut temporary =
        temporary_in(directory).with_context(|| format!("{} cannot be written to", directory.display()))?;
    std::io::Write::write_all(&mut temporary, content)
        .with_context(|| format!("{} cannot be written", path.display()))?;
    temporary.persist(path).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(())
}

/// Creates a file that everyone may read once it has its name.
pub(crate) fn temporary_in(directory: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o644)).tempfile_in(directory)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Builds an arm64 ELF of segments (physical address, content, size in memory).
    pub(crate) fn elf_of(segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&2_u16.to_le_bytes());
        file.extend_from_slice(&183_u16.to_le_bytes());
        file.extend_from_slice(&1_u32.to_le_bytes());
        for word in [0_u64, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0_u32.to_le_bytes());
        for half in [64_u16, 56, u16::try_from(segments.len()).unwrap(), 64, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut offset = 64 + 56 * segments.len() as u64;
        for (address, content, size) in segments {
            file.extend_from_slice(&1_u32.to_le_bytes());
            file.extend_from_slice(&5_u32.to_le_bytes());
            let virtual_address = address | 0xffff_0000_0000_0000;
            for word in [offset, virtual_address, *address, content.len() as u64, *size, 1] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            offset += content.len() as u64;
        }
        for (_, content, _) in segments {
            file.extend_from_slice(content);
        }
        file
    }

    fn header() -> Vec<u8> {
        let mut header = vec![0; 64];
        header[0x38..0x3c].copy_from_slice(b"ARM\x64");
        header
    }

    #[test]
    fn segments_are_placed_by_physical_address_and_bss_is_left_out() {
        let header = header();
        let elf = elf_of(&[(0x4020_0100, b"data", 0x4000), (0x4020_0000, &header, 64), (0x4020_8000, b"", 0x1000)]);
        let flat = flatten(&elf).unwrap();
        assert_eq!(flat.len(), 0x104);
        assert_eq!(&flat[..64], header);
        assert!(flat[64..0x100].iter().all(|&byte| byte == 0));
        assert_eq!(&flat[0x100..], b"data");
    }

    #[test]
    fn unusable_files_are_refused_with_the_reason() {
        let header = header();
        let cases: [(Vec<u8>, &str); 5] = [
            (b"not an ELF".to_vec(), "no 64-bit ELF"),
            (elf_of(&[]), "nothing to load"),
            (elf_of(&[(0x1000, &[0; 64], 64)]), "arm64 Image header"),
            (elf_of(&[(0x1000, &header, 64), (0x1020, b"data", 4)]), "overlap"),
            (elf_of(&[(0x1000, &header, 64), (0x1_0000_0000, b"data", 4)]), "apart"),
        ];
        for (elf, reason) in cases {
            let error = format!("{:#}", flatten(&elf).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
        let mut elsewhere = elf_of(&[(0x1000, &header, 64)]);
        elsewhere[18] = 62;
        assert!(format!("{:#}", flatten(&elsewhere).unwrap_err()).contains("arm64"));
    }

    #[test]
    fn unchanged_files_are_not_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        write_if_changed(&path, b"one").unwrap();
        let before = path.metadata().unwrap().modified().unwrap();
        write_if_changed(&path, b"one").unwrap();
        assert_eq!(path.metadata().unwrap().modified().unwrap(), before);
        write_if_changed(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
    }
}
