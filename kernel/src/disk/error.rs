//! What can be wrong with a disk.

use super::reader::ReadError;
use alloc::string::String;
use core::fmt;

/// Why a disk cannot be read, or a file on it not be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The device's sectors have a size that no disk has.
    #[error("the disk's sectors have {0} bytes; 512 to 65536, a power of two, are known")]
    SectorSize(usize),
    /// The device claims more bytes than can be counted.
    #[error("the disk claims to have {0} sectors, more than there can be")]
    Capacity(u64),
    /// The disk has no sectors.
    #[error("the disk is empty: it has no sectors")]
    NoSectors,
    /// There is neither a partition table nor a filesystem.
    #[error("the disk is blank or unknown: no GPT, no MBR and no FAT filesystem")]
    NoTable,
    /// Both headers of the GPT, or what they describe, are damaged.
    #[error("the disk's GPT is damaged: {primary} (primary); {backup} (backup)")]
    Gpt {
        /// What is wrong with the primary one.
        primary: GptFault,
        /// What is wrong with the backup.
        backup: GptFault,
    },
    /// A partition lies outside the disk, or is empty.
    #[error("partition {number} at sector {first}, {sectors} sectors, is not inside the disk")]
    PartitionRange {
        /// The partition's number, from 1.
        number: u32,
        /// First sector.
        first: u64,
        /// Number of sectors.
        sectors: u64,
    },
    /// Two partitions share sectors.
    #[error("partitions {0} and {1} overlap")]
    PartitionOverlap(u32, u32),
    /// The chain of extended boot records goes in circles, leaves the extended partition, or is far too long.
    #[error("the chain of extended boot records is broken at sector {0}")]
    ExtendedChain(u64),
    /// No partition has a FAT filesystem.
    #[error("{}", NoneOf(*partitions))]
    NoFilesystem {
        /// How many partitions there are.
        partitions: usize,
    },
    /// The boot sector of a FAT filesystem contradicts itself.
    #[error("the FAT filesystem{} is damaged: {what}", Of(*partition))]
    BootSector {
        /// The partition's number; 0 if the disk is not divided.
        partition: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// The path is empty, too long, or goes up.
    #[error("\"{0}\" is not a path to a file")]
    Path(String),
    /// There is no such file.
    #[error("there is no file {path} on the disk")]
    NotFound {
        /// The path looked for.
        path: String,
    },
    /// A directory where a file was expected, or the other way round.
    #[error("{path} is not a {wanted}")]
    WrongKind {
        /// The path.
        path: String,
        /// `file` or `directory`.
        wanted: &'static str,
    },
    /// A chain comes back to a cluster it has passed.
    #[error("the cluster chain of {path} goes in circles at cluster {cluster}")]
    ChainCycle {
        /// What the chain belongs to.
        path: String,
        /// A cluster in the circle.
        cluster: u32,
    },
    /// A chain leads to a cluster that does not exist, is free, or is marked bad.
    #[error("the cluster chain of {path} leads to {value:#x} at cluster {cluster}, which is no cluster of a file")]
    ChainBroken {
        /// What the chain belongs to.
        path: String,
        /// The cluster whose entry is wrong (0: the directory entry).
        cluster: u32,
        /// What it says.
        value: u32,
    },
    /// A chain ends before the file does.
    #[error("the cluster chain of {path} ends after {have} bytes, the file has {size}")]
    ChainShort {
        /// What the chain belongs to.
        path: String,
        /// Bytes in the chain.
        have: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// A cluster of the file also belongs to a directory on the way to it.
    #[error("cluster {cluster} of {path} also belongs to a directory on the way to it")]
    CrossLinked {
        /// The file.
        path: String,
        /// The cluster.
        cluster: u32,
    },
    /// A directory contains itself, or has more entries than FAT allows.
    #[error("the directory {path} contains itself, or has no end")]
    DirectoryLoop {
        /// The directory.
        path: String,
    },
    /// The file is in more pieces than this kernel keeps.
    #[error("{path} is in more than {limit} pieces")]
    Fragments {
        /// The file.
        path: String,
        /// The most pieces.
        limit: usize,
    },
    /// The heap has no room.
    #[error("no heap left for the contents of a disk's tables")]
    OutOfMemory,
}

/// What is wrong with a GPT header or what it describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GptFault {
    /// Not a GPT header.
    #[error("no signature")]
    Signature,
    /// The header's size is impossible.
    #[error("header of {0} bytes")]
    HeaderSize(u32),
    /// The header's checksum is wrong.
    #[error("header checksum {found:#010x} instead of {expected:#010x}")]
    HeaderChecksum {
        /// What the header's bytes add up to.
        expected: u32,
        /// What the header says.
        found: u32,
    },
    /// The header says it is somewhere else.
    #[error("header says it is at sector {0}")]
    Place(u64),
    /// The usable sectors are not inside the disk.
    #[error("usable sectors {0} to {1} are not inside the disk")]
    Usable(u64, u64),
    /// The array of entries is impossible.
    #[error("{count} entries of {size} bytes at sector {first} cannot be")]
    Array {
        /// First sector.
        first: u64,
        /// Number of entries.
        count: u32,
        /// Bytes of an entry.
        size: u32,
    },
    /// The array's checksum is wrong.
    #[error("entries' checksum {found:#010x} instead of {expected:#010x}")]
    ArrayChecksum {
        /// What the array's bytes add up to.
        expected: u32,
        /// What the header says.
        found: u32,
    },
    /// The disk has too few sectors for a GPT.
    #[error("the disk is too small")]
    TooSmall,
}

/// Says that no partition has a filesystem that can be read.
struct NoneOf(usize);

impl fmt::Display for NoneOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("the disk has no partitions, and no FAT filesystem without them"),
            1 => f.write_str("the disk's one partition has no FAT filesystem"),
            many => write!(f, "none of the disk's {many} partitions has a FAT filesystem"),
        }
    }
}

/// Says which partition is meant, where there are any.
struct Of(u32);

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " of partition {}", self.0) }
    }
}
