//! Event records (IHI 0070, 7.3): four 64-bit words each, decoded into a typed value.
//!
//! The hardware is not believed further than the record's own bits: every bit pattern decodes to something, unknown numbers to
//! [`EventKind::Unknown`].

use super::Field;
use core::fmt;

/// 64-bit words of an event record.
pub const WORDS: usize = 4;
/// Bytes of an event record.
pub const SIZE: usize = WORDS * 8;

/// Word 0: event number.
pub const NUMBER: Field = Field::new(7, 0);
/// Word 0: the SubstreamID is valid.
pub const SSV: Field = Field::bit(11);
/// Word 0: SubstreamID.
pub const SSID: Field = Field::new(31, 12);
/// Word 0: StreamID.
pub const SID: Field = Field::new(63, 32);
/// Word 1: implementation defined reason, or the tag of a stalled transaction.
pub const REASON: Field = Field::new(15, 0);
/// Word 1: a granule protection check failed (fetch aborts).
pub const GPCF: Field = Field::bit(16);
/// Word 1: the transaction is stalled and waits for CMD_RESUME.
pub const STALL: Field = Field::bit(31);
/// Word 1: privileged.
pub const PNU: Field = Field::bit(33);
/// Word 1: instruction fetch.
pub const IND: Field = Field::bit(34);
/// Word 1: read.
pub const RNW: Field = Field::bit(35);
/// Word 1: stage 2.
pub const S2: Field = Field::bit(39);
/// Word 1: class of the access that faulted.
pub const CLASS: Field = Field::new(41, 40);
/// Word 3: IPA.
pub const IPA: Field = Field::new(55, 12);
/// Word 3: address of the structure whose fetch was aborted.
pub const FETCH_ADDR: Field = Field::new(55, 3);

/// Event numbers, with the architecture's names.
#[allow(missing_docs)]
pub mod number {
    pub const F_UUT: u8 = 0x01;
    pub const C_BAD_STREAMID: u8 = 0x02;
    pub const F_STE_FETCH: u8 = 0x03;
    pub const C_BAD_STE: u8 = 0x04;
    pub const F_BAD_ATS_TREQ: u8 = 0x05;
    pub const F_STREAM_DISABLED: u8 = 0x06;
    pub const F_TRANSL_FORBIDDEN: u8 = 0x07;
    pub const C_BAD_SUBSTREAMID: u8 = 0x08;
    pub const F_CD_FETCH: u8 = 0x09;
    pub const C_BAD_CD: u8 = 0x0a;
    pub const F_WALK_EABT: u8 = 0x0b;
    pub const F_TRANSLATION: u8 = 0x10;
    pub const F_ADDR_SIZE: u8 = 0x11;
    pub const F_ACCESS: u8 = 0x12;
    pub const F_PERMISSION: u8 = 0x13;
    pub const F_TLB_CONFLICT: u8 = 0x20;
    pub const F_CFG_CONFLICT: u8 = 0x21;
    pub const E_PAGE_REQUEST: u8 = 0x24;
    pub const F_VMS_FETCH: u8 = 0x25;
    pub const IMPDEF_FIRST: u8 = 0xe0;
    pub const IMPDEF_LAST: u8 = 0xef;
}

/// What the SMMU was doing for the transaction when it faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Fetching a CD.
    Cd,
    /// Fetching a stage 1 table descriptor.
    Ttd,
    /// Translating the transaction's own address.
    In,
    /// A reserved encoding.
    Reserved,
}

/// What a translation-related event says of the transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// The address that the device used.
    pub input_addr: u64,
    /// Whether it was a read.
    pub read: bool,
    /// Whether it was privileged.
    pub privileged: bool,
    /// Whether it was an instruction fetch.
    pub instruction: bool,
}

/// Where a translation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Whether stage 2 faulted.
    pub s2: bool,
    /// What was being accessed.
    pub class: Class,
    /// The intermediate address, for stage 2.
    pub ipa: u64,
    /// The tag of the transaction, if it is stalled.
    pub stalled: Option<u16>,
}

/// The architecture's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Each is named by the architecture and explained by `EventKind::meaning`.
#[non_exhaustive]
pub enum EventKind {
    FUut { transaction: Transaction, reason: u16 },
    CBadStreamId,
    FSteFetch { fetch_addr: u64, reason: u16 },
    CBadSte,
    FBadAtsTreq { input_addr: u64 },
    FStreamDisabled,
    FTranslForbidden { input_addr: u64, read: bool },
    CBadSubstreamId,
    FCdFetch { fetch_addr: u64, reason: u16 },
    CBadCd,
    FWalkEabt { transaction: Transaction, stage: Stage, fetch_addr: u64, reason: u16 },
    FTranslation { transaction: Transaction, stage: Stage },
    FAddrSize { transaction: Transaction, stage: Stage },
    FAccess { transaction: Transaction, stage: Stage },
    FPermission { transaction: Transaction, stage: Stage },
    FTlbConflict { transaction: Transaction, stage: Stage, reason: u16 },
    FCfgConflict { reason: u16 },
    EPageRequest { input_addr: u64 },
    FVmsFetch { fetch_addr: u64, reason: u16 },
    ImpDef { number: u8 },
    Unknown { number: u8 },
}

/// One event record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The StreamID of the transaction.
    pub stream: u32,
    /// The SubstreamID, if there was one.
    pub substream: Option<u32>,
    /// What happened.
    pub kind: EventKind,
}

impl Event {
    /// Decodes a record. Every bit pattern is something.
    pub fn decode(words: [u64; WORDS]) -> Self {
        use number::*;
        let [w0, w1, w2, w3] = words;
        #[allow(clippy::cast_possible_truncation)] // Fields of 8, 16, 20 and 32 bits.
        let (number, reason, ssid, stream) =
            (NUMBER.get(w0) as u8, REASON.get(w1) as u16, SSID.get(w0) as u32, SID.get(w0) as u32);
        let fetch_addr = FETCH_ADDR.address(w3);
        let transaction = Transaction {
            input_addr: w2,
            read: RNW.is_set(w1),
            privileged: PNU.is_set(w1),
            instruction: IND.is_set(w1),
        };
        let stage = Stage {
            s2: S2.is_set(w1),
            class: match CLASS.get(w1) {
                0 => Class::Cd,
                1 => Class::Ttd,
                2 => Class::In,
                _ => Class::Reserved,
            },
            ipa: IPA.address(w3),
            stalled: STALL.is_set(w1).then_some(reason),
        };
        let kind = match number {
            F_UUT => EventKind::FUut { transaction, reason },
            C_BAD_STREAMID => EventKind::CBadStreamId,
            F_STE_FETCH => EventKind::FSteFetch { fetch_addr, reason },
            C_BAD_STE => EventKind::CBadSte,
            F_BAD_ATS_TREQ => EventKind::FBadAtsTreq { input_addr: w2 },
            F_STREAM_DISABLED => EventKind::FStreamDisabled,
            F_TRANSL_FORBIDDEN => EventKind::FTranslForbidden { input_addr: w2, read: transaction.read },
            C_BAD_SUBSTREAMID => EventKind::CBadSubstreamId,
            F_CD_FETCH => EventKind::FCdFetch { fetch_addr, reason },
            C_BAD_CD => EventKind::CBadCd,
            F_WALK_EABT => EventKind::FWalkEabt { transaction, stage, fetch_addr, reason },
            F_TRANSLATION => EventKind::FTranslation { transaction, stage },
            F_ADDR_SIZE => EventKind::FAddrSize { transaction, stage },
            F_ACCESS => EventKind::FAccess { transaction, stage },
            F_PERMISSION => EventKind::FPermission { transaction, stage },
            F_TLB_CONFLICT => EventKind::FTlbConflict { transaction, stage, reason },
            F_CFG_CONFLICT => EventKind::FCfgConflict { reason },
            E_PAGE_REQUEST => EventKind::EPageRequest { input_addr: w2 },
            F_VMS_FETCH => EventKind::FVmsFetch { fetch_addr, reason },
            IMPDEF_FIRST..=IMPDEF_LAST => EventKind::ImpDef { number },
            _ => EventKind::Unknown { number },
        };
        // C_BAD_SUBSTREAMID has no SSV: its SubstreamID is always valid (7.3.9).
        let substream = (SSV.is_set(w0) || matches!(kind, EventKind::CBadSubstreamId)).then_some(ssid);
        Self { stream, substream, kind }
    }
}

impl EventKind {
    /// The architecture's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FUut { .. } => "F_UUT",
            Self::CBadStreamId => "C_BAD_STREAMID",
            Self::FSteFetch { .. } => "F_STE_FETCH",
            Self::CBadSte => "C_BAD_STE",
            Self::FBadAtsTreq { .. } => "F_BAD_ATS_TREQ",
            Self::FStreamDisabled => "F_STREAM_DISABLED",
            Self::FTranslForbidden { .. } => "F_TRANSL_FORBIDDEN",
            Self::CBadSubstreamId => "C_BAD_SUBSTREAMID",
            Self::FCdFetch { .. } => "F_CD_FETCH",
            Self::CBadCd => "C_BAD_CD",
            Self::FWalkEabt { .. } => "F_WALK_EABT",
            Self::FTranslation { .. } => "F_TRANSLATION",
            Self::FAddrSize { .. } => "F_ADDR_SIZE",
            Self::FAccess { .. } => "F_ACCESS",
            Self::FPermission { .. } => "F_PERMISSION",
            Self::FTlbConflict { .. } => "F_TLB_CONFLICT",
            Self::FCfgConflict { .. } => "F_CFG_CONFLICT",
            Self::EPageRequest { .. } => "E_PAGE_REQUEST",
            Self::FVmsFetch { .. } => "F_VMS_FETCH",
            Self::ImpDef { .. } => "IMPDEF_EVENT",
            Self::Unknown { .. } => "unknown event",
        }
    }

    /// What it means, in a line.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::FUut { .. } => "the bus sent a transaction that the SMMU does not support",
            Self::CBadStreamId => "the StreamID has no stream table entry",
            Self::FSteFetch { .. } => "reading the stream table was aborted by the bus",
            Self::CBadSte => "the stream table entry is invalid",
            Self::FBadAtsTreq { .. } => "the device asked for an ATS translation that it is not allowed",
            Self::FStreamDisabled => "the stream may not send transactions with this SubstreamID, or without one",
            Self::FTranslForbidden { .. } => "the device claims an address to be translated already, without leave",
            Self::CBadSubstreamId => "the SubstreamID has no context descriptor",
            Self::FCdFetch { .. } => "reading the context descriptor was aborted by the bus",
            Self::CBadCd => "the context descriptor is invalid",
            Self::FWalkEabt { .. } => "reading a translation table was aborted by the bus",
            Self::FTranslation { .. } => "the address is not mapped",
            Self::FAddrSize { .. } => "an address is larger than the sizes in force",
            Self::FAccess { .. } => "the mapping's access flag is clear",
            Self::FPermission { .. } => "the mapping does not permit the access",
            Self::FTlbConflict { .. } => "the TLB holds conflicting translations",
            Self::FCfgConflict { .. } => "the configuration cache holds conflicting entries",
            Self::EPageRequest { .. } => "the device hints that it will want this page",
            Self::FVmsFetch { .. } => "reading the virtual machine structure was aborted by the bus",
            Self::ImpDef { .. } => "an event of this implementation's own",
            Self::Unknown { .. } => "an event number that the architecture did not define when this was written",
        }
    }

    /// The transaction, for the events that describe it.
    pub const fn transaction(self) -> Option<Transaction> {
        match self {
            Self::FUut { transaction, .. }
            | Self::FWalkEabt { transaction, .. }
            | Self::FTranslation { transaction, .. }
            | Self::FAddrSize { transaction, .. }
            | Self::FAccess { transaction, .. }
            | Self::FPermission { transaction, .. }
            | Self::FTlbConflict { transaction, .. } => Some(transaction),
            _ => None,
        }
    }

    /// Where the translation failed, for the events that say so.
    pub const fn stage(self) -> Option<Stage> {
        match self {
            Self::FWalkEabt { stage, .. }
            | Self::FTranslation { stage, .. }
            | Self::FAddrSize { stage, .. }
            | Self::FAccess { stage, .. }
            | Self::FPermission { stage, .. }
            | Self::FTlbConflict { stage, .. } => Some(stage),
            _ => None,
        }
    }

    /// The address that the device used, for the events that record one.
    pub const fn input_addr(self) -> Option<u64> {
        match self {
            Self::FBadAtsTreq { input_addr }
            | Self::FTranslForbidden { input_addr, .. }
            | Self::EPageRequest { input_addr } => Some(input_addr),
            _ => match self.transaction() {
                Some(transaction) => Some(transaction.input_addr),
                None => None,
            },
        }
    }

    /// The address of the structure that could not be read, for the events that record one.
    pub const fn fetch_addr(self) -> Option<u64> {
        match self {
            Self::FSteFetch { fetch_addr, .. }
            | Self::FCdFetch { fetch_addr, .. }
            | Self::FWalkEabt { fetch_addr, .. }
            | Self::FVmsFetch { fetch_addr, .. } => Some(fetch_addr),
            _ => None,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: stream {:#x}", self.kind.name(), self.stream)?;
        if let Some(substream) = self.substream {
            write!(f, " substream {substream:#x}")?;
        }
        if let Some(transaction) = self.kind.transaction() {
            let mode = if transaction.privileged { "privileged " } else { "" };
            let what = match (transaction.read, transaction.instruction) {
                (true, true) => "instruction fetch",
                (true, false) => "read",
                (false, _) => "write",
            };
            write!(f, " {mode}{what}")?;
        }
        if let Some(address) = self.kind.input_addr() {
            write!(f, " at {address:#x}")?;
        }
        if let Some(stage) = self.kind.stage() {
            write!(f, ", stage {}", if stage.s2 { 2 } else { 1 })?;
            match stage.class {
                Class::Cd => f.write_str(" while fetching the CD")?,
                Class::Ttd => f.write_str(" while walking stage 1")?,
                Class::In | Class::Reserved => {}
            }
            if stage.s2 {
                write!(f, " (IPA {:#x})", stage.ipa)?;
            }
            if stage.stalled.is_some() {
                f.write_str(", stalled")?;
            }
        }
        if let Some(address) = self.kind.fetch_addr() {
            write!(f, ", fetching {address:#x}")?;
        }
        if let EventKind::ImpDef { number } | EventKind::Unknown { number } = self.kind {
            write!(f, " (number {number:#x})")?;
        }
        write!(f, ": {}", self.kind.meaning())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn a_translation_fault_says_who_where_what_and_why() {
        let words = [0x18_0000_0010, RNW.mask() | CLASS.put(2), 0xdead_b000, 0];
        let event = Event::decode(words);
        assert_eq!(event.stream, 0x18);
        assert_eq!(event.kind.input_addr(), Some(0xdead_b000));
        assert_eq!(
            event.to_string(),
            "F_TRANSLATION: stream 0x18 read at 0xdeadb000, stage 1: the address is not mapped"
        );
    }

    #[test]
    fn a_fetch_abort_names_the_structure() {
        let event = Event::decode([0x8_0000_0003, 0, 0, 0x4000_1238]);
        assert_eq!(event.kind.fetch_addr(), Some(0x4000_1238));
        assert_eq!(event.kind.transaction(), None);
    }

    #[test]
    fn every_number_of_the_architecture_has_its_name() {
        for (number, name) in [
            (0x01, "F_UUT"),
            (0x02, "C_BAD_STREAMID"),
            (0x03, "F_STE_FETCH"),
            (0x04, "C_BAD_STE"),
            (0x05, "F_BAD_ATS_TREQ"),
            (0x06, "F_STREAM_DISABLED"),
            (0x07, "F_TRANSL_FORBIDDEN"),
            (0x08, "C_BAD_SUBSTREAMID"),
            (0x09, "F_CD_FETCH"),
            (0x0a, "C_BAD_CD"),
            (0x0b, "F_WALK_EABT"),
            (0x10, "F_TRANSLATION"),
            (0x11, "F_ADDR_SIZE"),
            (0x12, "F_ACCESS"),
            (0x13, "F_PERMISSION"),
            (0x20, "F_TLB_CONFLICT"),
            (0x21, "F_CFG_CONFLICT"),
            (0x24, "E_PAGE_REQUEST"),
            (0x25, "F_VMS_FETCH"),
            (0xe3, "IMPDEF_EVENT"),
            (0x77, "unknown event"),
        ] {
            assert_eq!(Event::decode([number, 0, 0, 0]).kind.name(), name);
        }
    }

    proptest! {
        #[test]
        fn every_bit_pattern_decodes_and_prints(words: [u64; 4]) {
            let event = Event::decode(words);
            prop_assert!(!event.to_string().is_empty());
            prop_assert_eq!(u64::from(event.stream), words[0] >> 32);
        }
    }
}
