//! A disk that writes through an IOMMU, read by the filesystem layer.

use base::Deadline;
use dma::fakes::{FakeDevice, FakeSystem};
use dma::{Attachment, CpuReads, FromDevice, Ladder, Lent, SharedBuffer};
use kernel::class::{BlockDevice, Failure, Metadata, Piece, pieces};
use kernel::disk::{Extent, ReadError, SectorRead};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const BLOCK: u32 = 512;

struct Disk {
    device: FakeDevice,
    bytes: Vec<u8>,
    /// A driver that forgets to let go.
    keeps: Option<Mutex<Vec<Arc<Attachment<FromDevice>>>>>,
}

impl BlockDevice for Disk {
    fn device(&self) -> &dma::Device {
        &self.device.device
    }
    fn block_size(&self) -> u32 {
        BLOCK
    }
    fn blocks(&self) -> u64 {
        self.bytes.len() as u64 / u64::from(BLOCK)
    }
    fn max_transfer(&self) -> u64 {
        4096
    }
    fn read(&self, pieces: &[Piece], into: &Arc<Attachment<FromDevice>>, _: Deadline) -> Result<(), Failure> {
        for &Piece { first, blocks, offset } in pieces {
            let (start, len) = ((first * u64::from(BLOCK)) as usize, (blocks * u64::from(BLOCK)) as usize);
            let from = self.bytes.get(start..start + len).ok_or("outside the disk")?;
            let to = into.segments()[0].iova.checked_add(offset).ok_or("outside the memory")?;
            self.device.master.write(to, from).map_err(|_| "the device was stopped")?;
        }
        if let Some(keeps) = &self.keeps {
            keeps.lock().unwrap().push(into.clone());
        }
        Ok(())
    }
}

fn disk(system: &FakeSystem) -> Disk {
    let bytes = (0..64 * BLOCK).map(|byte| ((byte * 7) >> 3) as u8).collect();
    Disk { device: system.device("disk").unwrap(), bytes, keeps: None }
}

#[test]
fn metadata_is_copied_out_and_nothing_stays_lent() {
    let system = FakeSystem::new();
    let disk = disk(&system);
    let mut metadata = Metadata::new(&disk, Duration::from_secs(1)).unwrap();
    let mut bytes = vec![0; 20 * BLOCK as usize];
    metadata.read(3, &mut bytes).unwrap();
    assert_eq!(bytes, disk.bytes[3 * BLOCK as usize..23 * BLOCK as usize]);
    assert_eq!(metadata.copied(), 20 * u64::from(BLOCK));
    assert!(disk.device.master.write(iommu::Iova::new(0x1000), b"late").is_err());
    assert_eq!(disk.device().stats().live_mappings, 0);
}

#[test]
fn a_failed_read_says_which_block_and_why() {
    let system = FakeSystem::new();
    let mut disk = disk(&system);
    let mut metadata = Metadata::new(&disk, Duration::from_secs(1)).unwrap();
    assert_eq!(metadata.read(60, &mut [0; 16 * 512]), Err(ReadError { lba: 60 }));
    assert_eq!(metadata.take_failure().unwrap().to_string(), "outside the disk");
    assert!(metadata.take_failure().is_none());
    assert_eq!(metadata.read(0, &mut [0; 100]), Err(ReadError { lba: 0 }));
    disk.keeps = Some(Mutex::default());
    let mut metadata = Metadata::new(&disk, Duration::from_secs(1)).unwrap();
    assert_eq!(metadata.read(0, &mut [0; 512]), Err(ReadError { lba: 0 }));
    assert!(metadata.take_failure().unwrap().to_string().contains("still has the buffer"));
}

#[test]
fn a_file_in_pieces_arrives_in_one_scattered_buffer() {
    let system = FakeSystem::new();
    let disk = disk(&system);
    let extents = [Extent { lba: 40, sectors: 9 }, Extent { lba: 2, sectors: 5 }, Extent { lba: 60, sectors: 1 }];
    let (pieces, size) = pieces(&extents, BLOCK).unwrap();
    let pages = disk.device().page_set(size, Ladder::SINGLE_PAGES).unwrap();
    let buffer = SharedBuffer::new("picture", pages);
    let attachment = Arc::new(buffer.attach::<FromDevice>(disk.device()).unwrap());
    disk.read(&pieces, &attachment, Deadline::after(Duration::from_secs(1))).unwrap();
    Arc::into_inner(attachment).unwrap().detach().unwrap();
    let expected: Vec<u8> = extents
        .iter()
        .flat_map(|extent| &disk.bytes[extent.lba as usize * 512..(extent.lba + extent.sectors) as usize * 512])
        .copied()
        .collect();
    let mut bytes = vec![0; size as usize];
    buffer.cpu_access::<CpuReads>().unwrap().read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, expected);
}
