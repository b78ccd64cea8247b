//! FAT volumes, as bytes.

use anyhow::{Context, Result};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use std::io::{Cursor, Write};

/// Which FAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fat {
    /// 12-bit entries, for volumes of a few megabytes.
    Fat12,
    /// 16-bit entries, for volumes of some tens of megabytes.
    Fat16,
    /// 32-bit entries.
    Fat32,
}

/// A file to put on a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The path from the root, parts separated by `/`; directories are made as needed.
    pub path: String,
    /// What is in it.
    pub content: Vec<u8>,
}

impl Entry {
    /// Creates a file.
    pub fn new(path: &str, content: Vec<u8>) -> Self {
        Self { path: path.to_string(), content }
    }
}

/// How much of a file is written before it is another file's turn, in bytes: not the same each time, and no multiple of
/// a page, so that fragments begin and end anywhere.
const TURNS: [usize; 5] = [512, 27 * 512, 3 * 512, 64 * 1024, 9 * 512];

/// Builds a volume of `size` bytes that holds `files`.
///
/// The files are written in turns, so that with two or more of them each lies in fragments.
pub fn build(fat: Fat, size: usize, files: &[Entry]) -> Result<Vec<u8>> {
    let (kind, cluster) = match fat {
        Fat::Fat12 => (FatType::Fat12, 4096),
        Fat::Fat16 => (FatType::Fat16, 2048),
        Fat::Fat32 => (FatType::Fat32, 512),
    };
    let mut bytes = vec![0; size];
    let options = FormatVolumeOptions::new().fat_type(kind).bytes_per_cluster(cluster).volume_label(*b"SLUICE     ");
    fatfs::format_volume(Cursor::new(&mut bytes), options)
        .with_context(|| format!("a {fat:?} volume cannot have {size} bytes"))?;
    let volume = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).context("the new volume cannot be read")?;
    {
        let mut open = Vec::new();
        for entry in files {
            let mut directory = volume.root_dir();
            let mut parts: Vec<&str> = entry.path.split('/').filter(|part| !part.is_empty()).collect();
            let name = parts.pop().with_context(|| format!("{:?} names no file", entry.path))?;
            for part in parts {
                directory = directory.create_dir(part).with_context(|| format!("{} cannot be made", entry.path))?;
            }
            let file = directory.create_file(name).with_context(|| format!("{} cannot be made", entry.path))?;
            open.push((entry, file, entry.content.as_slice()));
        }
        let mut turns = TURNS.iter().cycle();
        while open.iter().any(|(.., rest)| !rest.is_empty()) {
            for (entry, file, rest) in &mut open {
                let (now, later) = rest.split_at(rest.len().min(*turns.next().unwrap_or(&512)));
                file.write_all(now).with_context(|| format!("{} does not fit", entry.path))?;
                *rest = later;
            }
        }
        for (entry, mut file, _) in open {
            file.flush().with_context(|| format!("{} does not fit", entry.path))?;
        }
    }
    volume.unmount().context("the new volume cannot be closed")?;
    Ok(bytes)
}

/// Makes the volume unreadable: its boot sector says that a sector has 0 bytes.
pub fn damage(volume: &mut [u8]) {
    volume[11..13].fill(0);
}

/// Bends the cluster chain that begins at `first_cluster`, `at` clusters on; FAT32 only.
pub fn bend_chain(volume: &mut [u8], first_cluster: u32, at: u32, bend: Bend) -> Result<()> {
    let reserved = usize::from(u16::from_le_bytes([volume[14], volume[15]])) * super::SECTOR;
    let entry_of = |cluster: u32| reserved + cluster as usize * 4;
    let mut cluster = first_cluster;
    for _ in 0..at {
        let entry =
            volume.get(entry_of(cluster)..).and_then(|rest| rest.first_chunk()).context("the chain leaves the FAT")?;
        cluster = u32::from_le_bytes(*entry) & 0x0fff_ffff;
    }
    let value = match bend {
        Bend::End => 0x0fff_ffff,
        Bend::Ring => first_cluster,
        Bend::Outside => 0x0fff_fff0,
    };
    let place = entry_of(cluster);
    volume.get_mut(place..place + 4).context("the chain leaves the FAT")?.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

/// What becomes of a cluster chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bend {
    /// It ends too early.
    End,
    /// It goes back to its beginning.
    Ring,
    /// It leads to a cluster that the volume does not have.
    Outside,
}

/// Finds the first cluster of the file whose content begins with `content`, on a FAT32 volume.
pub fn first_cluster(volume: &[u8], content: &[u8]) -> Option<u32> {
    let reserved = u32::from(u16::from_le_bytes([volume[14], volume[15]]));
    let fats = u32::from(volume[16]) * u32::from_le_bytes(volume.get(36..40)?.try_into().ok()?);
    let data = (reserved + fats) as usize * super::SECTOR;
    let cluster_size = usize::from(volume[13]) * super::SECTOR;
    let begin = content.get(..content.len().min(cluster_size))?;
    let number = volume.get(data..)?.chunks(cluster_size).position(|cluster| cluster.starts_with(begin))?;
    Some(u32::try_from(number).ok()? + 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn two_files() -> Vec<Entry> {
        let noise = |seed: u32, length: u32| (0..length).map(|i| (i.wrapping_mul(seed) >> 7) as u8).collect();
        vec![
            Entry::new("/a/A long name.bin", noise(0x9e37_79b1, 300_001)),
            Entry::new("/b.bin", noise(0x85eb_ca6b, 200_000)),
        ]
    }

    fn read_back(mut volume: Vec<u8>, path: &str) -> std::io::Result<Vec<u8>> {
        let volume = FileSystem::new(Cursor::new(&mut volume), FsOptions::new())?;
        let mut content = Vec::new();
        volume.root_dir().open_file(path.trim_start_matches('/'))?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn every_fat_holds_its_files() {
        for (fat, size) in [(Fat::Fat12, 4 << 20), (Fat::Fat16, 32 << 20), (Fat::Fat32, 40 << 20)] {
            let volume = build(fat, size, &two_files()).unwrap();
            for entry in two_files() {
                assert!(read_back(volume.clone(), &entry.path).unwrap() == entry.content, "{fat:?} {}", entry.path);
            }
        }
    }

    #[test]
    fn files_lie_in_fragments() {
        let files = two_files();
        let volume = build(Fat::Fat32, 40 << 20, &files).unwrap();
        let content = &files[0].content;
        assert!(
            !volume.windows(content.len()).step_by(512).any(|window| window == content),
            "the file is in one piece"
        );
    }

    #[test]
    fn files_that_do_not_fit_are_an_error_that_names_them() {
        let error = build(Fat::Fat12, 1 << 20, &[Entry::new("/big", vec![1; 2 << 20])]).unwrap_err();
        assert!(error.to_string().contains("/big"), "{error}");
        assert!(build(Fat::Fat32, 4096, &[]).is_err());
    }

    #[test]
    fn bent_chains_and_damaged_volumes_do_not_read_back() {
        let files = two_files();
        let whole = build(Fat::Fat32, 40 << 20, &files).unwrap();
        let first = first_cluster(&whole, &files[0].content).unwrap();
        for bend in [Bend::End, Bend::Ring, Bend::Outside] {
            let mut volume = whole.clone();
            bend_chain(&mut volume, first, 20, bend).unwrap();
            let read = read_back(volume, &files[0].path);
            assert!(read.map_or(true, |content| content != files[0].content), "{bend:?}");
        }
        let mut volume = whole;
        damage(&mut volume);
        assert!(read_back(volume, &files[0].path).is_err());
    }
}
