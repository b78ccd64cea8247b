//! Where the picture is, and what it is.

use super::reader::Reader;
use super::{Failure, STEP_MILLIS};
use crate::class::{Disk, Screen};
use crate::disk::{self, Extent, Located, SectorRead};
use crate::picture::{HEAD, Limits, Picture};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use base::Deadline;

/// A picture on a disk.
#[derive(Debug)]
pub struct Source {
    /// Its path.
    pub path: String,
    /// Where the file is.
    pub located: Located,
    /// What the file is.
    pub picture: Picture,
    /// The screen's width and height in pixels.
    pub screen: (u32, u32),
    /// Bytes of partition table, filesystem and file head that were read to find out.
    pub metadata: u64,
}

/// Finds the picture at `path` on `disk`, fit for `screen`.
///
/// # Errors
///
/// What is wrong with disk, file or screen.
pub fn find<D: Disk, S: Screen>(disk: &D, screen: &S, path: &str) -> Result<Source, Failure> {
    let (width, height) = screen.size(Deadline::after_millis(STEP_MILLIS)).map_err(Failure::screen)?;
    let mut reader = Reader::new(disk)?;
    let found = look(&mut reader, Limits { width, height }, path);
    // Whatever was found, the window comes back; if both fail, what was wrong with the disk matters more.
    let metadata = reader.finish();
    let (located, picture) = found?;
    Ok(Source { path: path.to_string(), located, picture, screen: (width, height), metadata: metadata? })
}

fn look<D: Disk>(reader: &mut Reader<'_, D>, limits: Limits, path: &str) -> Result<(Located, Picture), Failure> {
    let located = disk::locate(reader, path)?;
    let head = head(reader, &located.file.extents, located.file.size)?;
    let picture = Picture::recognise(&head, located.file.size, limits)
        .map_err(|error| Failure::Picture { path: path.to_string(), error })?;
    Ok((located, picture))
}

/// Reads the first bytes of a file.
fn head<D: Disk>(reader: &mut Reader<'_, D>, extents: &[Extent], size: u64) -> Result<Vec<u8>, Failure> {
    let wanted = usize::try_from(size).unwrap_or(usize::MAX).min(HEAD);
    let sector = reader.sector_size();
    let mut bytes = Vec::new();
    for extent in extents {
        for lba in extent.lba..extent.lba + extent.sectors {
            if bytes.len() >= wanted {
                break;
            }
            let start = bytes.len();
            bytes.try_reserve(sector).map_err(|_| Failure::OutOfMemory("the head of the picture"))?;
            bytes.resize(start + sector, 0);
            if let Some(room) = bytes.get_mut(start..) {
                reader.read(lba, room).map_err(Failure::disk)?;
            }
        }
    }
    bytes.truncate(wanted);
    Ok(bytes)
}
