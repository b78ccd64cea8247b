//! What the CPU may do through an alias of a shared buffer is what it has begun.
use dma::vcm::InCpu;
use dma::{CpuReads, Error, SharedBuffer};

fn draw(picture: &SharedBuffer, alias: &InCpu) -> Result<(), Error> {
    let mut access = picture.cpu_access::<CpuReads>()?;
    alias.write_at(&mut access, 0, b"pixels")
}

fn main() {}
