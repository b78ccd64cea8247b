//! FAT12, FAT16 and FAT32, read-only, with long names.
//!
//! What boot sectors, table entries and directory slots mean is the `hadris-fat-raw` crate's business; this module walks.

use super::error::Error;
use super::reader::{Extent, ReadError, SectorRead, Window};
use super::table::{Partition, push};
use alloc::{string::String, vec::Vec};
use hadris_fat_raw::lfn::Assembler;
use hadris_fat_raw::name::{eq_folded, fold_unicode, utf16_chars};
use hadris_fat_raw::short_name::{self, DISPLAY_MAX};
use hadris_fat_raw::{BootError, ChainError, ChainGuard, Geometry, MAX_DIR_ENTRIES, RootLocation, ShortEntry, Slot};

pub use hadris_fat_raw::FatKind;

/// Most names in a path.
const MAX_PARTS: usize = 64;
/// Most pieces of a file or directory.
const MAX_EXTENTS: usize = 64 * 1024;

/// A FAT filesystem.
pub struct Fat {
    geometry: Geometry,
    /// Byte offset of the filesystem on the disk.
    base: u64,
    /// For the table and for directories: they are read in turns.
    table: Window,
    directory: Window,
}

/// A file, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its size in bytes.
    pub size: u64,
    /// Where its bytes are, in order: just enough sectors. Neighbouring clusters are one piece.
    pub extents: Vec<Extent>,
}

/// What a directory says about a file or directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The long name, or the short one where there is no long one.
    pub name: String,
    /// The size in bytes; 0 for directories.
    pub size: u32,
    /// Whether it is a directory.
    pub is_directory: bool,
}

/// Clusters one after the other.
#[derive(Clone, Copy)]
struct Run {
    first: u32,
    count: u32,
}

/// Where a directory's slots are.
enum Directory {
    /// Bytes on the disk: the root of FAT12 and FAT16.
    Fixed {
        start: u64,
        size: u64,
    },
    Chain(Vec<Run>),
}

/// Says whether a sector looks like the first of a FAT filesystem.
pub(super) fn is_fat(sector: &[u8; 512]) -> bool {
    let jump = matches!(sector, [0xeb, _, 0x90, ..] | [0xe9, ..]);
    jump && !matches!(hadris_fat_raw::parse_boot(sector), Err(BootError::NotFat(_) | BootError::Signature(_)))
}

impl Fat {
    /// Opens the filesystem in a partition; `None` if there is no FAT filesystem.
    ///
    /// # Errors
    ///
    /// If the disk cannot be read, or the boot sector is that of a FAT filesystem but contradicts itself or the partition.
    pub fn open(device: &mut dyn SectorRead, partition: &Partition) -> Result<Option<Self>, Error> {
        let damaged = |what| Error::BootSector { partition: partition.number, what };
        let sector_size = device.sector_size() as u64;
        let mut table = Window::new(device)?;
        let out_of_range = ReadError { lba: partition.first };
        let base = partition.first.checked_mul(sector_size).ok_or(out_of_range)?;
        let bytes = partition.sectors.checked_mul(sector_size).ok_or(out_of_range)?;
        let mut sector = [0; 512];
        table.read(device, base, &mut sector)?;
        if !is_fat(&sector) {
            return Ok(None);
        }
        let geometry = hadris_fat_raw::parse_boot(&sector).map_err(|error| {
            damaged(match error {
                BootError::NotFat(what) | BootError::Corrupt(what) => what,
                BootError::RootCluster { .. } => "the root directory's cluster does not exist",
                _ => "a signature is wrong",
            })
        })?;
        if geometry.data_end() > bytes {
            return Err(damaged("it is larger than the partition"));
        }
        if geometry.data_start() % sector_size != 0 || u64::from(geometry.cluster_size()) % sector_size != 0 {
            return Err(damaged("its clusters do not begin at the disk's sectors"));
        }
        Ok(Some(Self { geometry, base, table, directory: Window::new(device)? }))
    }

    /// Gives the kind of the filesystem.
    pub fn kind(&self) -> FatKind {
        self.geometry.kind()
    }

    /// Gives the size of a cluster in bytes.
    pub fn cluster_size(&self) -> u32 {
        self.geometry.cluster_size()
    }

    /// Finds a file by its path from the root. Case does not matter; `/` separates.
    ///
    /// # Errors
    ///
    /// If there is no such file, or something on the way to its last cluster is damaged.
    pub fn find(&mut self, device: &mut dyn SectorRead, path: &str) -> Result<File, Error> {
        let parts = parts(path)?;
        let Some((name, directories)) = parts.split_last() else { return Err(Error::Path(owned(path)?)) };
        let mut walked = Vec::new();
        let directory = self.walk(device, path, directories, &mut walked)?;
        let Some(entry) = self.lookup(device, path, &directory, name)? else {
            return Err(Error::NotFound { path: owned(path)? });
        };
        if entry.is_dir() {
            return Err(Error::WrongKind { path: owned(path)?, wanted: "file" });
        }
        let runs = self.file_chain(device, path, &entry)?;
        for run in &runs {
            let shared = |other: &&Run| run.first < other.first + other.count && other.first < run.first + run.count;
            if let Some(other) = walked.iter().find(shared) {
                return Err(Error::CrossLinked { path: owned(path)?, cluster: run.first.max(other.first) });
            }
        }
        self.file(device, path, entry.size().into(), &runs)
    }

    /// Lists a directory: `""` or `/` is the root.
    ///
    /// # Errors
    ///
    /// If there is no such directory, or something on the way to its end is damaged.
    pub fn list(&mut self, device: &mut dyn SectorRead, path: &str) -> Result<Vec<Entry>, Error> {
        let directory = self.walk(device, path, &parts(path)?, &mut Vec::new())?;
        let mut entries = Vec::new();
        self.each(device, path, &directory, |entry, long| {
            let mut name = String::new();
            name.try_reserve(DISPLAY_MAX.max(3 * 255)).map_err(|_| Error::OutOfMemory)?;
            match long {
                Some(units) => name.extend(utf16_chars(units.iter().copied())),
                None => with_short_name(entry, |short| name.push_str(short)),
            }
            push(&mut entries, Entry { name, size: entry.size(), is_directory: entry.is_dir() })?;
            Ok(false)
        })?;
        Ok(entries)
    }

    /// Goes down the directories called `names`, and notes the clusters of each in `walked`.
    fn walk(
        &mut self,
        device: &mut dyn SectorRead,
        path: &str,
        names: &[&str],
        walked: &mut Vec<Run>,
    ) -> Result<Directory, Error> {
        let mut directory = match self.geometry.root() {
            RootLocation::Fixed { start, size } => Directory::Fixed { start: self.base + start, size },
            RootLocation::Cluster(cluster) => self.directory_chain(device, path, cluster, walked)?,
        };
        for name in names {
            let Some(entry) = self.lookup(device, path, &directory, name)? else {
                return Err(Error::NotFound { path: owned(path)? });
            };
            if !entry.is_dir() {
                return Err(Error::WrongKind { path: owned(name)?, wanted: "directory" });
            }
            let cluster = entry.first_cluster(self.kind());
            directory = self.directory_chain(device, name, cluster, walked)?;
        }
        Ok(directory)
    }

    /// Follows the chain of a directory that begins at `cluster`, and adds it to those walked through so far.
    fn directory_chain(
        &mut self,
        device: &mut dyn SectorRead,
        name: &str,
        cluster: u32,
        walked: &mut Vec<Run>,
    ) -> Result<Directory, Error> {
        let most = u64::from(MAX_DIR_ENTRIES) * 32;
        let (runs, _) = self.chain(device, name, cluster, Some(most.div_ceil(self.cluster_size().into())))?;
        for run in &runs {
            let shared = |other: &&Run| run.first < other.first + other.count && other.first < run.first + run.count;
            if walked.iter().any(|other| shared(&other)) {
                return Err(Error::DirectoryLoop { path: owned(name)? });
            }
        }
        for &run in &runs {
            push(walked, run)?;
        }
        Ok(Directory::Chain(runs))
    }

    /// Finds the entry called `name`.
    fn lookup(
        &mut self,
        device: &mut dyn SectorRead,
        path: &str,
        directory: &Directory,
        name: &str,
    ) -> Result<Option<ShortEntry>, Error> {
        let mut found = None;
        self.each(device, path, directory, |entry, long| {
            let same = |units: &[u16]| eq_folded(units.iter().copied(), name.encode_utf16(), fold_unicode);
            let mut hit = long.is_some_and(same);
            with_short_name(entry, |short| hit |= eq_folded(short.encode_utf16(), name.encode_utf16(), fold_unicode));
            if hit {
                found = Some(*entry);
            }
            Ok(hit)
        })?;
        Ok(found)
    }

    /// Calls `visit` with each file and directory, and its long name, until it says true.
    fn each(
        &mut self,
        device: &mut dyn SectorRead,
        path: &str,
        directory: &Directory,
        mut visit: impl FnMut(&ShortEntry, Option<&[u16]>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let fixed;
        let (runs, cluster_size) = match directory {
            Directory::Fixed { .. } => {
                fixed = [Run { first: 0, count: 1 }];
                (fixed.as_slice(), 0)
            }
            Directory::Chain(runs) => (runs.as_slice(), u64::from(self.cluster_size())),
        };
        let mut assembler = Assembler::new();
        let mut slots = 0;
        for run in runs {
            let (start, size) = match directory {
                Directory::Fixed { start, size } => (*start, *size),
                Directory::Chain(_) => (self.offset(path, run.first)?, u64::from(run.count) * cluster_size),
            };
            for offset in (start..start + size).step_by(32) {
                slots += 1;
                if slots > MAX_DIR_ENTRIES {
                    return Err(Error::DirectoryLoop { path: owned(path)? });
                }
                let mut raw = [0; 32];
                self.directory.read(device, offset, &mut raw)?;
                match Slot::parse(&raw) {
                    Slot::End => return Ok(()),
                    Slot::Free => assembler.reset(),
                    Slot::Long(entry) => assembler.push(&entry),
                    Slot::Short(entry) => {
                        let long = assembler.finish(entry.lfn_checksum());
                        if entry.is_visible() && visit(&entry, long)? {
                            return Ok(());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the byte offset of a cluster on the disk.
    fn offset(&self, path: &str, cluster: u32) -> Result<u64, Error> {
        match self.geometry.cluster_offset(cluster) {
            Some(offset) => Ok(self.base + offset),
            None => Err(Error::ChainBroken { path: owned(path)?, cluster: 0, value: cluster }),
        }
    }

    /// Follows the chain from `first` to its end: the clusters as runs, and how many there are. More than `limit` clusters
    /// are a directory without end.
    fn chain(
        &mut self,
        device: &mut dyn SectorRead,
        path: &str,
        first: u32,
        limit: Option<u64>,
    ) -> Result<(Vec<Run>, u64), Error> {
        let (mut runs, mut total): (Vec<Run>, u64) = (Vec::new(), 0);
        // The entry of a cluster that is not there cannot be read.
        self.offset(path, first)?;
        let (mut cluster, mut guard) = (first, ChainGuard::new(first));
        loop {
            let pieces = runs.len();
            match runs.last_mut().filter(|last| last.first + last.count == cluster) {
                Some(last) => last.count += 1,
                None if pieces >= MAX_EXTENTS => {
                    return Err(Error::Fragments { path: owned(path)?, limit: MAX_EXTENTS });
                }
                None => push(&mut runs, Run { first: cluster, count: 1 })?,
            }
            total += 1;
            if limit.is_some_and(|limit| total > limit) {
                return Err(Error::DirectoryLoop { path: owned(path)? });
            }
            let Some(next) = self.next(device, path, cluster)? else { return Ok((runs, total)) };
            if !guard.step(next) {
                return Err(Error::ChainCycle { path: owned(path)?, cluster: next });
            }
            cluster = next;
        }
    }

    /// Reads which cluster follows `cluster`; `None` at the end of the chain.
    fn next(&mut self, device: &mut dyn SectorRead, path: &str, cluster: u32) -> Result<Option<u32>, Error> {
        let (kind, number) = (self.kind(), u64::from(cluster));
        let at = self.base + self.geometry.fat_copy(self.geometry.active_fat()) + kind.entry_offset(number);
        let mut bytes = [0; 4];
        let (entry, _) = bytes.split_at_mut(kind.entry_len().min(4));
        self.table.read(device, at, entry)?;
        // `decode` wants `entry_len` bytes: there are 4, which is the most.
        kind.next(kind.decode(number, &bytes), self.geometry.max_cluster()).or_else(|error| {
            let value = match error {
                ChainError::Bad => kind.bad_cluster(),
                ChainError::OutOfBounds(value) => value,
            };
            Err(Error::ChainBroken { path: owned(path)?, cluster, value })
        })
    }

    /// Follows the chain of a file: empty for an empty one.
    fn file_chain(&mut self, device: &mut dyn SectorRead, path: &str, entry: &ShortEntry) -> Result<Vec<Run>, Error> {
        let (size, first) = (u64::from(entry.size()), entry.first_cluster(self.kind()));
        if size == 0 {
            return Ok(Vec::new());
        }
        let (runs, clusters) = self.chain(device, path, first, None)?;
        let have = clusters * u64::from(self.cluster_size());
        if have < size {
            return Err(Error::ChainShort { path: owned(path)?, have, size });
        }
        Ok(runs)
    }

    /// Turns runs of clusters into just enough sectors.
    fn file(&self, device: &dyn SectorRead, path: &str, size: u64, runs: &[Run]) -> Result<File, Error> {
        let sector_size = device.sector_size() as u64;
        let per_cluster = u64::from(self.cluster_size()) / sector_size;
        let (mut extents, mut left) = (Vec::new(), size.div_ceil(sector_size));
        for run in runs {
            let sectors = (u64::from(run.count) * per_cluster).min(left);
            if sectors == 0 {
                // The chain may be longer than the file.
                break;
            }
            let lba = self.offset(path, run.first)? / sector_size;
            push(&mut extents, Extent { lba, sectors })?;
            left -= sectors;
        }
        Ok(File { size, extents })
    }
}

/// Calls `with` with the short name as people write it. Letters outside ASCII are of a code page nobody knows.
fn with_short_name(entry: &ShortEntry, with: impl FnOnce(&str)) {
    let mut text = [0; DISPLAY_MAX];
    let length = short_name::display(&entry.name(), entry.nt_case(), |_| char::REPLACEMENT_CHARACTER, &mut text);
    if let Some(name) = text.get(..length).and_then(|name| core::str::from_utf8(name).ok()) {
        with(name);
    }
}

fn parts(path: &str) -> Result<Vec<&str>, Error> {
    let mut parts = Vec::new();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." || parts.len() >= MAX_PARTS {
            return Err(Error::Path(owned(path)?));
        }
        push(&mut parts, part)?;
    }
    Ok(parts)
}

fn owned(text: &str) -> Result<String, Error> {
    let mut copy = String::new();
    copy.try_reserve_exact(text.len()).map_err(|_| Error::OutOfMemory)?;
    copy.push_str(text);
    Ok(copy)
}
