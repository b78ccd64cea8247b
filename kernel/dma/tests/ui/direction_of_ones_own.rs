//! There are three directions, with the rights that they have.
use dma::Direction;

struct Anything;

impl Direction for Anything {
    const PROT: iommu::Prot = iommu::Prot::all();
}

fn main() {}
