//! ITS commands as the architecture lays them out: four 64-bit words each (IHI 0069, "ITS commands").

use iommu::PhysAddr;

/// 64-bit words in a command.
pub(crate) const WORDS: usize = 4;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command(pub [u64; WORDS]);

/// The redistributor that a collection or a SYNC names, as `GITS_TYPER.PTA` wants it spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target(pub u64);

const VALID: u64 = 1 << 63;

impl Command {
    fn device(opcode: u64, device: u32, word1: u64, word2: u64) -> Self {
        Self([opcode | u64::from(device) << 32, word1, word2, 0])
    }

    /// Maps a DeviceID to an interrupt translation table for `event_bits` bits of EventID.
    pub fn mapd(device: u32, table: PhysAddr, event_bits: u32) -> Self {
        Self::device(0x08, device, u64::from(event_bits - 1), VALID | table.get() & 0x000f_ffff_ffff_ff00)
    }

    /// Maps a collection to a redistributor.
    pub fn mapc(collection: u16, target: Target) -> Self {
        Self([0x09, 0, VALID | target.0 | u64::from(collection), 0])
    }

    /// Maps an EventID of a device to an LPI in a collection.
    pub fn mapti(device: u32, event: u32, lpi: u32, collection: u16) -> Self {
        Self::device(0x0a, device, u64::from(event) | u64::from(lpi) << 32, collection.into())
    }

    /// Moves an event to another collection.
    pub fn movi(device: u32, event: u32, collection: u16) -> Self {
        Self::device(0x01, device, event.into(), collection.into())
    }

    /// Unmaps an event, and takes back what of it is pending.
    pub fn discard(device: u32, event: u32) -> Self {
        Self::device(0x0f, device, event.into(), 0)
    }

    /// Lets the redistributor forget what it cached of an event's LPI configuration.
    pub fn inv(device: u32, event: u32) -> Self {
        Self::device(0x0c, device, event.into(), 0)
    }

    /// The same for all LPIs of a collection.
    pub fn invall(collection: u16) -> Self {
        Self([0x0d, 0, collection.into(), 0])
    }

    /// Completes when everything before it has taken effect at a redistributor.
    pub fn sync(target: Target) -> Self {
        Self([0x05, 0, target.0, 0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_layout_of_the_architecture() {
        let target = Target(0x5 << 16);
        let table = PhysAddr::new(0x4123_4500);
        assert_eq!(Command::mapd(0x10, table, 5).0, [0x10_0000_0008, 4, 0x8000_0000_4123_4500, 0]);
        assert_eq!(Command::mapc(3, target).0, [0x9, 0, 0x8000_0000_0005_0003, 0]);
        assert_eq!(Command::mapti(0x10, 7, 8195, 3).0, [0x10_0000_000a, 0x2003_0000_0007, 3, 0]);
        assert_eq!(Command::movi(0x10, 7, 2).0, [0x10_0000_0001, 7, 2, 0]);
        assert_eq!(Command::discard(0x10, 7).0, [0x10_0000_000f, 7, 0, 0]);
        assert_eq!(Command::inv(0x10, 7).0, [0x10_0000_000c, 7, 0, 0]);
        assert_eq!(Command::invall(3).0, [0xd, 0, 3, 0]);
        assert_eq!(Command::sync(target).0, [0x5, 0, 0x5_0000, 0]);
    }
}
