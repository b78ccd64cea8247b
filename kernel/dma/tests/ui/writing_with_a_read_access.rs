//! An access of the CPU that was granted for reading does not write.
use dma::{CpuReads, Error, SharedBuffer};

fn draw(picture: &SharedBuffer) -> Result<(), Error> {
    picture.cpu_access::<CpuReads>()?.write_at(0, &[0])
}

fn main() {}
