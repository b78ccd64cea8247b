//! Disks made with other crates are read; damaged ones end in errors that say what is wrong.

mod random;

use fatfs::{FatType, FormatVolumeOptions, FsOptions};
use kernel::disk::{Error, Extent, Fat, FatKind, GptFault, Partition, ReadError, SectorRead, Table, TableKind, locate};
use random::Random;
use std::io::{Cursor, Write};

struct Disk {
    bytes: Vec<u8>,
    sector: usize,
    reads: u64,
}

impl Disk {
    fn new(bytes: Vec<u8>, sector: usize) -> Self {
        Self { bytes, sector, reads: 0 }
    }

    /// Reads a file's bytes as the device would: extent by extent.
    fn contents(&self, extents: &[Extent], size: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &Extent { lba, sectors } in extents {
            let range = lba as usize * self.sector..(lba + sectors) as usize * self.sector;
            bytes.extend(&self.bytes[range]);
        }
        assert!(bytes.len() as u64 >= size && (bytes.len() as u64) < size + self.sector as u64);
        bytes.truncate(size as usize);
        bytes
    }
}

impl SectorRead for Disk {
    fn sector_size(&self) -> usize {
        self.sector
    }

    fn sectors(&self) -> u64 {
        (self.bytes.len() / self.sector) as u64
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        self.reads += 1;
        assert!(self.reads < 2_000_000, "does not end");
        assert!(!buf.is_empty() && buf.len().is_multiple_of(self.sector));
        let start = usize::try_from(lba).unwrap().checked_mul(self.sector).ok_or(ReadError { lba })?;
        let from = self.bytes.get(start..start + buf.len()).ok_or(ReadError { lba })?;
        buf.copy_from_slice(from);
        Ok(())
    }
}

const LONG: &str = "Pictures/Über lange Namen/a picture with structure in it.bmp";

fn picture() -> Vec<u8> {
    (0..70_001u32).map(|byte| ((byte * 31) >> 3) as u8).collect()
}

/// A FAT filesystem with a fragmented picture deep down, an empty file and a second copy in the root.
fn filesystem(kind: FatType, bytes: usize, sector: u16, cluster: u32) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; bytes]);
    let options = FormatVolumeOptions::new().fat_type(kind).bytes_per_sector(sector).bytes_per_cluster(cluster);
    fatfs::format_volume(&mut image, options).unwrap();
    let fs = fatfs::FileSystem::new(&mut image, FsOptions::new()).unwrap();
    let root = fs.root_dir();
    root.create_dir("Pictures").unwrap().create_dir("Über lange Namen").unwrap();
    {
        let (mut deep, mut other) = (root.create_file(LONG).unwrap(), root.create_file("OTHER.BIN").unwrap());
        // In turns, so that neither is in one piece.
        for piece in picture().chunks(3 * cluster as usize) {
            deep.write_all(piece).unwrap();
            other.write_all(&vec![0x5a; cluster as usize]).unwrap();
        }
    }
    root.create_file("empty.txt").unwrap();
    root.create_file("flat.bmp").unwrap().write_all(&picture()).unwrap();
    for number in 0..40 {
        root.create_file(&format!("filler file number {number}.txt")).unwrap();
    }
    drop(root);
    fs.unmount().unwrap();
    image.into_inner()
}

fn small() -> Vec<u8> {
    filesystem(FatType::Fat16, 6 << 20, 512, 1024)
}

/// A disk with a GPT: a partition of another kind, then the filesystem.
fn with_gpt(filesystem: &[u8], sector: usize) -> Vec<u8> {
    let total = filesystem.len() + (4 << 20);
    let mut device = Cursor::new(vec![0; total]);
    let size = if sector == 512 { gpt::disk::LogicalBlockSize::Lb512 } else { gpt::disk::LogicalBlockSize::Lb4096 };
    let blocks = u32::try_from(total / sector - 1).unwrap();
    gpt::mbr::ProtectiveMBR::with_lb_size(blocks).overwrite_lba0(&mut device).unwrap();
    let mut disk =
        gpt::GptConfig::new().writable(true).logical_block_size(size).create_from_device(device, None).unwrap();
    disk.add_partition("first", 1 << 20, gpt::partition_types::LINUX_FS, 0, None).unwrap();
    let id = disk.add_partition("Bilder", filesystem.len() as u64, gpt::partition_types::BASIC, 0, None).unwrap();
    let start = disk.partitions()[&id].first_lba as usize * sector;
    let mut bytes = disk.write().unwrap().into_inner();
    bytes[start..start + filesystem.len()].copy_from_slice(filesystem);
    bytes
}

fn mbr_entry(kind: u8, first: u32, sectors: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&first.to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    entry
}

fn set_mbr(sector: &mut [u8], entries: &[[u8; 16]]) {
    for (index, entry) in entries.iter().enumerate() {
        sector[446 + 16 * index..][..16].copy_from_slice(entry);
    }
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// A disk with an MBR: a primary partition, and two logical ones, the filesystem in the second.
fn with_mbr(filesystem: &[u8]) -> Vec<u8> {
    let sectors = (filesystem.len() / 512) as u32;
    let mut bytes = vec![0; 512 * 256 + filesystem.len()];
    set_mbr(&mut bytes, &[mbr_entry(0x83, 1, 63), mbr_entry(0x0f, 64, 192 + sectors)]);
    set_mbr(&mut bytes[64 * 512..], &[mbr_entry(0x83, 8, 8), mbr_entry(0x05, 64, 128 + sectors)]);
    set_mbr(&mut bytes[128 * 512..], &[mbr_entry(0x0c, 128, sectors)]);
    bytes[256 * 512..].copy_from_slice(filesystem);
    bytes
}

/// Looks for the deep file and compares its contents.
#[track_caller]
fn check(bytes: Vec<u8>, sector: usize, table: TableKind, partition: u32, fat: FatKind) {
    let mut disk = Disk::new(bytes, sector);
    let found = locate(&mut disk, LONG).unwrap();
    assert_eq!((found.table, found.partition, found.fat), (table, partition, fat));
    assert!(found.file.extents.len() > 3, "not in pieces: {:?}", found.file.extents);
    assert_eq!(disk.contents(&found.file.extents, found.file.size), picture());
    let flat = locate(&mut disk, "/FLAT.BMP").unwrap().file;
    assert_eq!(flat.extents.len(), 1);
    assert_eq!(disk.contents(&flat.extents, flat.size), picture());
    let empty = locate(&mut disk, "/empty.txt").unwrap().file;
    assert_eq!((empty.size, empty.extents.len()), (0, 0));
    assert_eq!(locate(&mut disk, "/nothing").unwrap_err(), Error::NotFound { path: "/nothing".into() });
}

#[test]
fn files_are_found_on_every_kind_of_disk() {
    let fat12 = filesystem(FatType::Fat12, 2 << 20, 512, 1024);
    let fat32 = filesystem(FatType::Fat32, 40 << 20, 512, 512);
    check(fat12.clone(), 512, TableKind::Whole, 0, FatKind::Fat12);
    check(with_gpt(&fat12, 512), 512, TableKind::Gpt, 2, FatKind::Fat12);
    check(small(), 512, TableKind::Whole, 0, FatKind::Fat16);
    check(with_mbr(&small()), 512, TableKind::Mbr, 6, FatKind::Fat16);
    check(with_gpt(&fat32, 512), 512, TableKind::Gpt, 2, FatKind::Fat32);
    check(with_mbr(&fat32), 512, TableKind::Mbr, 6, FatKind::Fat32);
}

#[test]
fn files_are_found_on_disks_with_large_sectors() {
    let fat12 = filesystem(FatType::Fat12, 4 << 20, 4096, 4096);
    check(fat12.clone(), 4096, TableKind::Whole, 0, FatKind::Fat12);
    check(with_gpt(&fat12, 4096), 4096, TableKind::Gpt, 2, FatKind::Fat12);
    // Small sectors in the filesystem, large ones on the disk: cannot be read piece by piece.
    let odd = with_gpt(&small(), 4096);
    let error = locate(&mut Disk::new(odd, 4096), LONG).unwrap_err();
    assert!(matches!(error, Error::BootSector { partition: 2, .. }), "{error}");
}

#[test]
fn paths_are_compared_as_people_expect() {
    let mut disk = Disk::new(small(), 512);
    for path in [
        "pictures/ÜBER LANGE NAMEN/A Picture With Structure In It.BMP",
        "//Pictures/./Über lange Namen/a picture with structure in it.bmp",
    ] {
        assert!(locate(&mut disk, path).is_ok(), "{path}");
    }
    let wrong_kind = |path: &str, wanted| Error::WrongKind { path: path.into(), wanted };
    assert_eq!(locate(&mut disk, "/Pictures"), Err(wrong_kind("/Pictures", "file")));
    assert_eq!(locate(&mut disk, "/OTHER.BIN/x"), Err(wrong_kind("OTHER.BIN", "directory")));
    for path in ["", "/", "..", "Pictures/../OTHER.BIN"] {
        assert_eq!(locate(&mut disk, path), Err(Error::Path(path.into())));
    }
    let table = Table::read(&mut disk).unwrap();
    let mut fat = Fat::open(&mut disk, &table.partitions[0]).unwrap().unwrap();
    let names: Vec<String> = fat.list(&mut disk, "/").unwrap().into_iter().map(|entry| entry.name).collect();
    assert!(names.len() == 44 && names[0] == "Pictures" && names.contains(&"OTHER.BIN".into()), "{names:?}");
    let below = fat.list(&mut disk, "Pictures").unwrap();
    assert!(below.len() == 1 && below[0].is_directory && below[0].name == "Über lange Namen");
}

#[test]
fn a_damaged_gpt_falls_back_to_the_backup_and_says_so() {
    let good = with_gpt(&small(), 512);
    let last = good.len() - 512;
    let with = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        damage(&mut bytes);
        Table::read(&mut Disk::new(bytes, 512))
    };
    let table = with(&|_| ()).unwrap();
    assert_eq!((table.kind, table.partitions.len(), table.partitions[1].name.as_str()), (TableKind::Gpt, 2, "Bilder"));
    // Header checksum, signature, and an entry: each of the primary copy.
    for offset in [512 + 60, 512, 1024 + 130] {
        let backup = with(&|bytes| bytes[offset] ^= 1).unwrap();
        assert_eq!((backup.kind, &backup.partitions), (TableKind::GptBackup, &table.partitions));
    }
    let both = with(&|bytes| {
        bytes[512 + 60] ^= 1;
        bytes[last] ^= 1;
    });
    assert!(matches!(both, Err(Error::Gpt { primary: GptFault::HeaderChecksum { .. }, backup: GptFault::Signature })));
    let entries = with(&|bytes| {
        bytes[1024 + 130] ^= 1;
        let array = last - 32 * 512;
        bytes[array + 130] ^= 1;
    });
    let array = |fault| matches!(fault, GptFault::ArrayChecksum { .. });
    assert!(matches!(entries, Err(Error::Gpt { primary, backup }) if array(primary) && array(backup)));
}

#[test]
fn partitions_that_lie_are_refused() {
    let sectors = (small().len() / 512) as u32;
    let with = |entries: &[[u8; 16]]| {
        let mut bytes = with_mbr(&small());
        bytes[446..510].fill(0);
        set_mbr(&mut bytes, entries);
        Table::read(&mut Disk::new(bytes, 512))
    };
    let outside = with(&[mbr_entry(0x0c, 256, sectors + 1)]);
    assert!(matches!(outside, Err(Error::PartitionRange { number: 1, .. })), "{outside:?}");
    let overlapping = with(&[mbr_entry(0x0c, 1, 100), mbr_entry(0x0c, 100, 100)]);
    assert_eq!(overlapping, Err(Error::PartitionOverlap(1, 2)));
    assert!(matches!(with(&[mbr_entry(0x0c, 5, 0)]), Err(Error::PartitionRange { .. })));
    // An extended boot record that links to itself, backwards, or away.
    for link in [0, 64, 100_000] {
        let mut bytes = with_mbr(&small());
        set_mbr(&mut bytes[128 * 512..], &[mbr_entry(0x0c, 128, sectors), mbr_entry(0x05, link, 1)]);
        let result = Table::read(&mut Disk::new(bytes, 512));
        assert_eq!(result, Err(Error::ExtendedChain(128)), "{link}");
    }
}

#[test]
fn blank_empty_and_foreign_disks_say_what_they_lack() {
    assert_eq!(locate(&mut Disk::new(vec![], 512), "/a"), Err(Error::NoSectors));
    assert_eq!(locate(&mut Disk::new(vec![0; 1 << 20], 512), "/a"), Err(Error::NoTable));
    assert_eq!(locate(&mut Disk::new(vec![0; 1 << 20], 500), "/a"), Err(Error::SectorSize(500)));
    let foreign = with_mbr(&vec![0; 1 << 20]);
    assert_eq!(locate(&mut Disk::new(foreign, 512), "/a"), Err(Error::NoFilesystem { partitions: 3 }));
    struct Broken;
    impl SectorRead for Broken {
        fn sector_size(&self) -> usize {
            512
        }
        fn sectors(&self) -> u64 {
            1000
        }
        fn read(&mut self, lba: u64, _: &mut [u8]) -> Result<(), ReadError> {
            Err(ReadError { lba })
        }
    }
    assert_eq!(locate(&mut Broken, "/a"), Err(Error::Read(ReadError { lba: 0 })));
}

/// A FAT16 filesystem whose table can be edited.
struct Edit {
    bytes: Vec<u8>,
    fat: usize,
    root: usize,
    data: usize,
}

impl Edit {
    fn new() -> Self {
        let bytes = small();
        let word = |offset: usize| usize::from(u16::from_le_bytes([bytes[offset], bytes[offset + 1]]));
        let fat = word(14) * 512;
        let root = fat + usize::from(bytes[16]) * word(22) * 512;
        let data = root + word(17) * 32;
        Self { bytes, fat, root, data }
    }

    /// Where in the root the short entry beginning with these letters is.
    fn entry(&self, name: &[u8]) -> usize {
        (self.root..self.data).step_by(32).find(|&at| self.bytes[at..].starts_with(name)).unwrap()
    }

    fn first_cluster(&self, name: &[u8]) -> u16 {
        let at = self.entry(name) + 26;
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set(&mut self, cluster: u16, next: u16) {
        let at = self.fat + 2 * usize::from(cluster);
        self.bytes[at..at + 2].copy_from_slice(&next.to_le_bytes());
    }

    fn set_first_cluster(&mut self, name: &[u8], cluster: u16) {
        let at = self.entry(name) + 26;
        self.bytes[at..at + 2].copy_from_slice(&cluster.to_le_bytes());
    }

    #[track_caller]
    fn error(&self, path: &str) -> Error {
        locate(&mut Disk::new(self.bytes.clone(), 512), path).unwrap_err()
    }
}

#[test]
fn damaged_chains_are_named() {
    let path = "/flat.bmp";
    let first = Edit::new().first_cluster(b"FLAT    BMP");

    let mut edit = Edit::new();
    edit.set(first + 5, first + 2);
    assert!(matches!(edit.error(path), Error::ChainCycle { path: p, .. } if p == path));
    // A circle behind the file's last byte counts too.
    let mut edit = Edit::new();
    edit.set(first + 68, first + 68);
    assert!(matches!(edit.error(path), Error::ChainCycle { .. }));

    for (value, shown) in [(0, 0), (1, 1), (0xfff0, 0xfff0), (0xfff7, 0xfff7)] {
        let mut edit = Edit::new();
        edit.set(first + 3, value);
        let expected = Error::ChainBroken { path: path.into(), cluster: u32::from(first) + 3, value: shown };
        assert_eq!(edit.error(path), expected);
    }
    let mut edit = Edit::new();
    edit.set(first + 3, 0xffff);
    assert_eq!(edit.error(path), Error::ChainShort { path: path.into(), have: 4096, size: 70_001 });

    for value in [0, 1, 0xfff0] {
        let mut edit = Edit::new();
        edit.set_first_cluster(b"FLAT    BMP", value);
        let expected = Error::ChainBroken { path: path.into(), cluster: 0, value: value.into() };
        assert_eq!(edit.error(path), expected);
    }
}

#[test]
fn directories_that_contain_themselves_or_share_clusters_are_refused() {
    // "Pictures" has one entry, which is made to be "Pictures" itself.
    let mut edit = Edit::new();
    let pictures = edit.first_cluster(b"PICTURES");
    let start = edit.data + usize::from(pictures - 2) * 1024;
    let at =
        (start..start + 1024).step_by(32).find(|&at| edit.bytes[at] != b'.' && edit.bytes[at + 11] == 0x10).unwrap();
    edit.bytes[at + 26..at + 28].copy_from_slice(&pictures.to_le_bytes());
    assert!(matches!(edit.error(LONG), Error::DirectoryLoop { path } if path == "Über lange Namen"));

    // The file of a directory lies in that directory.
    let mut edit = Edit::new();
    let deep = u16::from_le_bytes([edit.bytes[at + 26], edit.bytes[at + 27]]);
    let start = edit.data + usize::from(deep - 2) * 1024;
    let at =
        (start..start + 1024).step_by(32).find(|&at| edit.bytes[at] != 0 && edit.bytes[at + 11] & 0x1f == 0).unwrap();
    edit.bytes[at + 26..at + 28].copy_from_slice(&pictures.to_le_bytes());
    edit.bytes[at + 28..at + 32].copy_from_slice(&1000u32.to_le_bytes());
    assert!(matches!(edit.error(LONG), Error::CrossLinked { cluster, .. } if cluster == u32::from(pictures)));

    // A directory whose chain goes in circles.
    let mut edit = Edit::new();
    edit.set(pictures, pictures);
    assert!(matches!(edit.error(LONG), Error::ChainCycle { path, .. } if path == "Pictures"));
}

#[test]
fn a_boot_sector_that_lies_is_refused() {
    let with = |offset: usize, value: &[u8]| {
        let mut bytes = small();
        bytes[offset..offset + value.len()].copy_from_slice(value);
        locate(&mut Disk::new(bytes, 512), "/flat.bmp").unwrap_err()
    };
    // More sectors than the disk has; no table; three tables; a table too small for the clusters.
    for (offset, value) in [(19, &[0xff, 0xff][..]), (14, &[0, 0]), (16, &[3]), (22, &[1, 0])] {
        let error = with(offset, value);
        assert!(matches!(error, Error::BootSector { partition: 0, .. }), "{offset}: {error}");
    }
}

#[test]
fn damaged_disks_end_in_errors_or_in_the_file() {
    let originals = [
        (filesystem(FatType::Fat12, 1 << 20, 512, 1024), 512),
        (small(), 512),
        (with_gpt(&filesystem(FatType::Fat12, 1 << 20, 512, 1024), 512), 512),
        (with_mbr(&filesystem(FatType::Fat12, 1 << 20, 512, 1024)), 512),
        (with_gpt(&filesystem(FatType::Fat12, 4 << 20, 4096, 4096), 4096), 4096),
    ];
    // What is not zero is where damage hurts.
    let used: Vec<Vec<usize>> = originals
        .iter()
        .map(|(bytes, _)| (0..bytes.len()).filter(|&at| bytes[at] != 0 && bytes[at] != 0x5a).collect())
        .collect();
    let mut random = Random(23);
    let (mut found, mut refused) = (0, 0);
    for round in 0..10_000 {
        let (original, sector) = &originals[round % originals.len()];
        let used = &used[round % originals.len()];
        let mut disk = Disk::new(Vec::new(), *sector);
        let mut undo = Vec::new();
        disk.bytes = original.clone();
        for _ in 0..1 + random.below(12) {
            // The tables and directories come first.
            let at = match random.below(3) {
                0 => used[random.below(used.len())],
                1 => used[random.below(used.len().min(2000))],
                _ => random.below(512),
            };
            undo.push(at);
            disk.bytes[at] = match random.below(3) {
                0 => disk.bytes[at] ^ 1 << random.below(8),
                1 => random.next() as u8,
                _ => [0, 0xff, 0x7f, 0x80, 0xf7, 0xf8][random.below(6)],
            };
        }
        if random.below(50) == 0 {
            let keep = random.below(disk.bytes.len());
            disk.bytes.truncate(keep);
        }
        match locate(&mut disk, LONG) {
            Ok(located) => {
                let sectors = disk.sectors();
                assert!(located.file.extents.iter().all(|extent| extent.lba + extent.sectors <= sectors));
                found += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    println!("{found} found, {refused} refused");
    assert!(found > 500 && refused > 500);
}

#[test]
fn only_the_named_partition_is_opened() {
    let mut disk = Disk::new(with_mbr(&small()), 512);
    let nothing = Partition { number: 1, first: 1, sectors: 63, name: String::new() };
    assert!(Fat::open(&mut disk, &nothing).unwrap().is_none());
}
