//! PRI queue records (IHI 0070, chapter 8): two 64-bit words each, decoded into a typed value.

use super::Field;
use core::fmt;

/// 64-bit words of a record.
pub const WORDS: usize = 2;
/// Bytes of a record.
pub const SIZE: usize = WORDS * 8;

/// Word 0: StreamID.
pub const SID: Field = Field::new(31, 0);
/// Word 0: SubstreamID.
pub const SSID: Field = Field::new(51, 32);
/// Word 0: privileged.
pub const PRIV: Field = Field::bit(58);
/// Word 0: execute permission is asked for.
pub const X: Field = Field::bit(59);
/// Word 0: read permission is asked for.
pub const R: Field = Field::bit(60);
/// Word 0: write permission is asked for.
pub const W: Field = Field::bit(61);
/// Word 0: the last request of its group.
pub const LAST: Field = Field::bit(62);
/// Word 0: the SubstreamID is valid.
pub const SSV: Field = Field::bit(63);
/// Word 1: page request group index.
pub const PRG_INDEX: Field = Field::new(8, 0);
/// Word 1: the page's address.
pub const ADDR: Field = Field::new(63, 12);

/// One record: a device wants a page, or says that it has stopped using a PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // They are bits of the record.
pub struct PageRequest {
    /// Who.
    pub stream: u32,
    /// With which SubstreamID (PASID), if any.
    pub substream: Option<u32>,
    /// Which page.
    pub address: u64,
    /// To read it.
    pub read: bool,
    /// To write it.
    pub write: bool,
    /// To execute from it.
    pub execute: bool,
    /// With privilege.
    pub privileged: bool,
    /// The group to which the request belongs.
    pub group: u16,
    /// It is the group's last: the group is to be answered.
    pub last: bool,
}

impl PageRequest {
    /// Decodes a record. Every bit pattern is something.
    #[allow(clippy::cast_possible_truncation)] // Fields of 9, 20 and 32 bits.
    pub const fn decode(words: [u64; WORDS]) -> Self {
        let [w0, w1] = words;
        Self {
            stream: SID.get(w0) as u32,
            substream: if SSV.is_set(w0) { Some(SSID.get(w0) as u32) } else { None },
            address: ADDR.address(w1),
            read: R.is_set(w0),
            write: W.is_set(w0),
            execute: X.is_set(w0),
            privileged: PRIV.is_set(w0),
            group: PRG_INDEX.get(w1) as u16,
            last: LAST.is_set(w0),
        }
    }

    /// Whether this is no request but a Stop PASID marker, which is not answered.
    pub const fn is_stop_marker(&self) -> bool {
        self.substream.is_some() && self.last && !self.read && !self.write
    }
}

impl fmt::Display for PageRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_stop_marker() { "Stop PASID marker" } else { "page request" };
        write!(f, "{what}: stream {:#x}", self.stream)?;
        if let Some(substream) = self.substream {
            write!(f, " substream {substream:#x}")?;
        }
        write!(f, " at {:#x}, group {}", self.address, self.group)?;
        for (set, name) in [
            (self.read, ", read"),
            (self.write, ", write"),
            (self.execute, ", execute"),
            (self.privileged, ", privileged"),
            (self.last, ", last"),
        ] {
            if set {
                f.write_str(name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn a_request_says_who_wants_which_page_for_what() {
        let request = PageRequest::decode([0xe400_0005_0000_0018, 0x1234_5000 | 0x1ff]);
        assert_eq!(
            request.to_string(),
            "page request: stream 0x18 substream 0x5 at 0x12345000, group 511, write, privileged, last"
        );
        assert!(!request.is_stop_marker());
    }

    #[test]
    fn a_stop_marker_is_a_last_request_for_nothing_with_a_pasid() {
        let marker = LAST.mask() | SSV.mask();
        assert!(PageRequest::decode([marker, 0]).is_stop_marker());
        for not in [LAST.mask(), SSV.mask(), marker | R.mask(), marker | W.mask()] {
            assert!(!PageRequest::decode([not, 0]).is_stop_marker(), "{not:#x}");
        }
    }

    proptest! {
        #[test]
        fn every_bit_pattern_decodes_and_prints(words: [u64; 2]) {
            let request = PageRequest::decode(words);
            prop_assert!(!request.to_string().is_empty());
            prop_assert_eq!(request.substream.is_some(), words[0] >> 63 == 1);
        }
    }
}
