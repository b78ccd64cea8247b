//! Disks of every shape around the picture.
//!
//! A disk is built in memory as bytes: a FAT [`volume`], wrapped in a [partition](table) table or bare, damaged where a
//! test wants it. The default disk is kept in the target directory under a name that says which code made it, so that a
//! warm run builds nothing and a changed builder never meets a stale disk.

pub mod table;
pub mod volume;

use crate::emulator::PROGRAM;
use crate::firmware::{Firmware, temporary_in};
use crate::picture::{self, Rows};
use crate::progress::Progress;
use crate::setup::{TARGET, find_in_path};
use anyhow::{Context, Result, bail};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use volume::{Entry, Fat};

/// Where the default disk has the picture as a 32-bit BMP, top row first.
pub const PICTURE: &str = "/pictures/Sluice at work.bmp";
/// The same picture as a 32-bit BMP, bottom row first.
pub const PICTURE_BOTTOM_UP: &str = "/pictures/Sluice at work, bottom row first.bmp";
/// The same picture as a 24-bit BMP.
pub const PICTURE_24: &str = "/pictures/Sluice at work, 24 bit.bmp";
/// The same picture as a PNG.
pub const PICTURE_PNG: &str = "/pictures/Sluice at work.png";

/// The size of a sector, in bytes.
pub const SECTOR: usize = 512;
/// The size of the default disk's picture, in pixels.
pub const PICTURE_SIZE: (u32, u32) = (640, 480);
/// The size of the default volume, in bytes: enough clusters of one sector for FAT32.
const VOLUME_SIZE: usize = 40 << 20;

/// Returns the files of the default disk.
pub fn default_files() -> Result<Vec<Entry>> {
    let picture = picture::draw(PICTURE_SIZE.0, PICTURE_SIZE.1);
    let log: String = (1..=9000).map(|number| format!("gate raised {number} times\n")).collect();
    Ok(vec![
        Entry::new("/README.TXT", b"A picture for Sluice, in the folder pictures.\r\n".to_vec()),
        Entry::new(PICTURE, picture::bmp32(&picture, Rows::TopDown)?),
        Entry::new("/logs/A log file whose clusters lie between those of the picture.log", log.into_bytes()),
        Entry::new(PICTURE_BOTTOM_UP, picture::bmp32(&picture, Rows::BottomUp)?),
        Entry::new(PICTURE_24, picture::bmp24(&picture)?),
        Entry::new(PICTURE_PNG, picture::png(&picture)?),
    ])
}

/// Builds the default disk: GPT, FAT32, the picture in four codings, every file in fragments.
pub fn default_disk() -> Result<Vec<u8>> {
    table::gpt(&volume::build(Fat::Fat32, VOLUME_SIZE, &default_files()?)?, false)
}

/// Builds a GPT and FAT32 disk with these files.
pub fn disk_with(files: &[Entry]) -> Result<Vec<u8>> {
    table::gpt(&volume::build(Fat::Fat32, VOLUME_SIZE, files)?, false)
}

/// Returns the default disk in the target directory that holds `firmware`, and builds it if it is not there yet.
pub fn cached(firmware: &Firmware, progress: &mut Progress) -> Result<PathBuf> {
    let target = firmware
        .elf
        .ancestors()
        .find(|directory| directory.file_name().is_some_and(|name| name == TARGET))
        .and_then(Path::parent)
        .or(firmware.elf.parent())
        .context("the kernel lies in no directory")?;
    let file = target.join("disks").join(format!("default-{:016x}.img", builder_hash()));
    if !file.is_file() {
        progress.step("making the disk");
        save(&default_disk()?, &file)?;
    }
    Ok(file)
}

/// Names the code that builds disks: any change to it gives another name.
fn builder_hash() -> u64 {
    let mut hasher = DefaultHasher::new();
    let sources =
        [include_str!("mod.rs"), include_str!("table.rs"), include_str!("volume.rs"), include_str!("../picture.rs")];
    sources.hash(&mut hasher);
    hasher.finish()
}

/// Writes a disk to a file, in one step for whoever looks at it; runs of zeros take no space.
pub fn save(disk: &[u8], file: &Path) -> Result<()> {
    let directory = file.parent().context("a disk needs a directory")?;
    let failed = || format!("the disk {} cannot be written", file.display());
    std::fs::create_dir_all(directory).with_context(failed)?;
    let mut temporary = temporary_in(directory).with_context(failed)?;
    temporary.as_file().set_len(disk.len() as u64).with_context(failed)?;
    for (number, block) in disk.chunks(64 * 1024).enumerate() {
        if block.iter().any(|&byte| byte != 0) {
            temporary.seek(SeekFrom::Start(number as u64 * 64 * 1024)).with_context(failed)?;
            temporary.write_all(block).with_context(failed)?;
        }
    }
    temporary.persist(file).with_context(failed)?;
    Ok(())
}

/// Converts a raw disk to qcow2 with the `qemu-img` in `PATH`; `None` if there is none.
pub fn to_qcow2(raw: &Path, qcow2: &Path) -> Result<Option<()>> {
    let Some(program) = find_in_path("qemu-img") else { return Ok(None) };
    let output = Command::new(program)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([raw, qcow2])
        .output()
        .with_context(|| format!("qemu-img, which came with {PROGRAM}, cannot be started"))?;
    if !output.status.success() {
        bail!("qemu-img failed:\n{}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(Some(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_code_builds_the_same_files() {
        let (one, two) = (default_files().unwrap(), default_files().unwrap());
        assert!(one.iter().zip(&two).all(|(one, two)| one.path == two.path && one.content == two.content));
    }

    #[test]
    fn saved_disks_read_back_with_their_holes() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("below").join("disk.img");
        let mut disk = vec![0; 300_000];
        disk[0] = 1;
        disk[200_000] = 2;
        save(&disk, &file).unwrap();
        assert!(std::fs::read(&file).unwrap() == disk);
    }

    #[test]
    fn a_cached_disk_is_built_once_and_lies_in_the_target_directory() {
        let directory = tempfile::tempdir().unwrap();
        let elf = directory.path().join(TARGET).join("release").join("sluice");
        let firmware = Firmware { image: elf.with_extension("Image"), elf };
        let file = cached(&firmware, &mut Progress::silent()).unwrap();
        assert!(file.starts_with(directory.path().join("disks")));
        std::fs::write(&file, "kept").unwrap();
        assert_eq!(cached(&firmware, &mut Progress::silent()).unwrap(), file);
        assert_eq!(std::fs::read(&file).unwrap(), b"kept");
    }
}
