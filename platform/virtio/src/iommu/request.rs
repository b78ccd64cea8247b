//! Requests as the device reads them \[5.13.6\].

use super::records::Piece;
use crate::spec::iommu::{ATTACH_F_BYPASS, map_flag, request, size};
use ::iommu::{IovaRange, Prot, StreamId};

/// A request without its tail.
pub(super) struct Encoded {
    bytes: [u8; size::LARGEST],
    len: usize,
}

impl Encoded {
    fn new(kind: u8, len: usize) -> Self {
        let mut bytes = [0; size::LARGEST];
        bytes[0] = kind;
        Self { bytes, len }
    }

    fn put32(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn put64(mut self, at: usize, value: u64) -> Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// What the device reads.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub fn attach(domain: u32, endpoint: StreamId, bypass: bool) -> Self {
        let flags = if bypass { ATTACH_F_BYPASS } else { 0 };
        Self::new(request::ATTACH, size::ATTACH).put32(4, domain).put32(8, endpoint.get()).put32(12, flags)
    }

    pub fn detach(domain: u32, endpoint: StreamId) -> Self {
        Self::new(request::DETACH, size::DETACH).put32(4, domain).put32(8, endpoint.get())
    }

    /// `mmio`: whether the device knows the flag.
    pub fn map(domain: u32, piece: Piece, prot: Prot, mmio: bool) -> Self {
        let mut flags = 0;
        for (part, flag) in [(Prot::READ, map_flag::READ), (Prot::WRITE, map_flag::WRITE)] {
            if prot.contains(part) {
                flags |= flag;
            }
        }
        if mmio && prot.contains(Prot::MMIO) {
            flags |= map_flag::MMIO;
        }
        let last = piece.iova + (piece.len - 1);
        let request = Self::new(request::MAP, size::MAP).put32(4, domain).put64(8, piece.iova).put64(16, last);
        request.put64(24, piece.phys).put32(32, flags)
    }

    /// `range` is not empty.
    pub fn unmap(domain: u32, range: IovaRange) -> Self {
        let (first, last) = (range.start().get(), range.start().get() + (range.len() - 1));
        Self::new(request::UNMAP, size::UNMAP).put32(4, domain).put64(8, first).put64(16, last)
    }

    pub fn probe(endpoint: StreamId) -> Self {
        Self::new(request::PROBE, size::PROBE).put32(4, endpoint.get())
    }
}
