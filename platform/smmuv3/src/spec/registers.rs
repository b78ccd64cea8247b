//! The register map (IHI 0070, 6.1 to 6.3): offsets in bytes from the base of page 0, and fields.
//!
//! Registers are 32 bits wide unless noted. The event and PRI queue indexes live in page 1, 64 KiB further.

use super::Field;
use bitflags::bitflags;

/// Bytes that the register map takes: page 0 and page 1 (6.1).
pub const SIZE: usize = 0x2_0000;

/// Feature identification.
pub const IDR0: usize = 0x00;
/// Feature identification.
pub const IDR1: usize = 0x04;
/// Feature identification.
pub const IDR2: usize = 0x08;
/// Feature identification.
pub const IDR3: usize = 0x0c;
/// Implementation defined identification.
pub const IDR4: usize = 0x10;
/// Feature identification.
pub const IDR5: usize = 0x14;
/// Implementer, product, variant, revision.
pub const IIDR: usize = 0x18;
/// Architecture version.
pub const AIDR: usize = 0x1c;
/// Enables.
pub const CR0: usize = 0x20;
/// What of `CR0` has taken effect.
pub const CR0ACK: usize = 0x24;
/// Attributes of accesses to tables and queues.
pub const CR1: usize = 0x28;
/// Miscellaneous control.
pub const CR2: usize = 0x2c;
/// What becomes of transactions while the SMMU is off.
pub const GBPA: usize = 0x44;
/// Interrupt enables.
pub const IRQ_CTRL: usize = 0x50;
/// What of `IRQ_CTRL` has taken effect.
pub const IRQ_CTRLACK: usize = 0x54;
/// Global errors: a bit that differs from `GERRORN`'s is an active error.
pub const GERROR: usize = 0x60;
/// Acknowledgement of global errors.
pub const GERRORN: usize = 0x64;
/// MSI address for global errors, 64 bits.
pub const GERROR_IRQ_CFG0: usize = 0x68;
/// MSI data.
pub const GERROR_IRQ_CFG1: usize = 0x70;
/// MSI memory attributes.
pub const GERROR_IRQ_CFG2: usize = 0x74;
/// Where the stream table is, 64 bits.
pub const STRTAB_BASE: usize = 0x80;
/// Size and format of the stream table.
pub const STRTAB_BASE_CFG: usize = 0x88;
/// Where the command queue is, 64 bits.
pub const CMDQ_BASE: usize = 0x90;
/// The command queue's write index.
pub const CMDQ_PROD: usize = 0x98;
/// The command queue's read index and error.
pub const CMDQ_CONS: usize = 0x9c;
/// Where the event queue is, 64 bits.
pub const EVENTQ_BASE: usize = 0xa0;
/// MSI address for the event queue, 64 bits.
pub const EVENTQ_IRQ_CFG0: usize = 0xb0;
/// MSI data.
pub const EVENTQ_IRQ_CFG1: usize = 0xb8;
/// MSI memory attributes.
pub const EVENTQ_IRQ_CFG2: usize = 0xbc;
/// Where the PRI queue is, 64 bits.
pub const PRIQ_BASE: usize = 0xc0;
/// MSI address for the PRI queue, 64 bits.
pub const PRIQ_IRQ_CFG0: usize = 0xd0;
/// MSI data.
pub const PRIQ_IRQ_CFG1: usize = 0xd8;
/// MSI memory attributes.
pub const PRIQ_IRQ_CFG2: usize = 0xdc;
/// The offset of page 1.
pub const PAGE1: usize = 0x1_0000;
/// The event queue's write index, in page 1.
pub const EVENTQ_PROD: usize = PAGE1 + 0xa8;
/// The event queue's read index, in page 1.
pub const EVENTQ_CONS: usize = PAGE1 + 0xac;
/// The PRI queue's write index, in page 1.
pub const PRIQ_PROD: usize = PAGE1 + 0xc8;
/// The PRI queue's read index, in page 1.
pub const PRIQ_CONS: usize = PAGE1 + 0xcc;

/// Fields of `IDR0`.
pub mod idr0 {
    use super::Field;
    /// Stage 2 translation.
    pub const S2P: Field = Field::bit(0);
    /// Stage 1 translation.
    pub const S1P: Field = Field::bit(1);
    /// Table formats: bit 0 VMSAv8-32 LPAE, bit 1 VMSAv8-64.
    pub const TTF: Field = Field::new(3, 2);
    /// The SMMU's own accesses are coherent with the processors' caches.
    pub const COHACC: Field = Field::bit(4);
    /// The SMMU takes part in broadcast TLB maintenance.
    pub const BTM: Field = Field::bit(5);
    /// Hardware update of access and dirty flags.
    pub const HTTU: Field = Field::new(7, 6);
    /// Dormant hint.
    pub const DORMHINT: Field = Field::bit(8);
    /// EL2 stream worlds.
    pub const HYP: Field = Field::bit(9);
    /// PCIe ATS.
    pub const ATS: Field = Field::bit(10);
    /// Stage-1-only ATS.
    pub const NS1ATS: Field = Field::bit(11);
    /// 16-bit ASIDs.
    pub const ASID16: Field = Field::bit(12);
    /// Interrupts by message.
    pub const MSI: Field = Field::bit(13);
    /// Completion by SEV.
    pub const SEV: Field = Field::bit(14);
    /// Address translation operations.
    pub const ATOS: Field = Field::bit(15);
    /// PCIe PRI.
    pub const PRI: Field = Field::bit(16);
    /// VMID wildcards.
    pub const VMW: Field = Field::bit(17);
    /// 16-bit VMIDs.
    pub const VMID16: Field = Field::bit(18);
    /// Two-level context descriptor tables.
    pub const CD2L: Field = Field::bit(19);
    /// Virtual ATOS page.
    pub const VATOS: Field = Field::bit(20);
    /// Byte order of translation tables: 0 both, 2 little, 3 big.
    pub const TTENDIAN: Field = Field::new(22, 21);
    /// Errors of ATS are recorded.
    pub const ATSRECERR: Field = Field::bit(23);
    /// 0: stall and terminate; 1: terminate only; 2: stall is forced.
    pub const STALL_MODEL: Field = Field::new(25, 24);
    /// Terminated transactions are always aborted: CD.A must be 1.
    pub const TERM_MODEL: Field = Field::bit(26);
    /// 0: linear stream tables; 1: two-level too.
    pub const ST_LEVEL: Field = Field::new(28, 27);
}

/// Fields of `IDR1`.
pub mod idr1 {
    use super::Field;
    /// Bits of a StreamID.
    pub const SIDSIZE: Field = Field::new(5, 0);
    /// Bits of a SubstreamID.
    pub const SSIDSIZE: Field = Field::new(10, 6);
    /// log2 of the largest PRI queue.
    pub const PRIQS: Field = Field::new(15, 11);
    /// log2 of the largest event queue.
    pub const EVENTQS: Field = Field::new(20, 16);
    /// log2 of the largest command queue.
    pub const CMDQS: Field = Field::new(25, 21);
    /// Incoming permission attributes can be overridden.
    pub const ATTR_PERMS_OVR: Field = Field::bit(26);
    /// Incoming memory attributes can be overridden.
    pub const ATTR_TYPES_OVR: Field = Field::bit(27);
    /// Preset bases are relative.
    pub const REL: Field = Field::bit(28);
    /// Queue bases are fixed by the implementation.
    pub const QUEUES_PRESET: Field = Field::bit(29);
    /// The stream table's base is fixed by the implementation.
    pub const TABLES_PRESET: Field = Field::bit(30);
    /// Enhanced command queues.
    pub const ECMDQ: Field = Field::bit(31);
}

/// Fields of `IDR3`.
pub mod idr3 {
    use super::Field;
    /// Hierarchical attributes can be disabled.
    pub const HAD: Field = Field::bit(2);
    /// Page-based hardware attributes.
    pub const PBHA: Field = Field::bit(3);
    /// Execute-never distinguished by privilege at stage 2.
    pub const XNX: Field = Field::bit(4);
    /// Page request with PASID.
    pub const PPS: Field = Field::bit(5);
    /// Memory partitioning.
    pub const MPAM: Field = Field::bit(7);
    /// Stage 2 forced write-back.
    pub const FWB: Field = Field::bit(8);
    /// Small translation tables.
    pub const STT: Field = Field::bit(9);
    /// Range-based invalidation and level hints.
    pub const RIL: Field = Field::bit(10);
    /// Break-before-make level.
    pub const BBML: Field = Field::new(12, 11);
    /// Prevention of unprivileged access.
    pub const E0PD: Field = Field::bit(13);
}

/// Fields of `IDR5`.
pub mod idr5 {
    use super::Field;
    /// Output address size, encoded as [`super::OAS_BITS`].
    pub const OAS: Field = Field::new(2, 0);
    /// 4 KiB granule.
    pub const GRAN4K: Field = Field::bit(4);
    /// 16 KiB granule.
    pub const GRAN16K: Field = Field::bit(5);
    /// 64 KiB granule.
    pub const GRAN64K: Field = Field::bit(6);
    /// 52-bit addresses with the 4 and 16 KiB granules.
    pub const DS: Field = Field::bit(7);
    /// Virtual address size: 0 is 48 bits, 1 is 52.
    pub const VAX: Field = Field::new(11, 10);
    /// The most transactions that can be stalled.
    pub const STALL_MAX: Field = Field::new(31, 16);
}

/// Bits of address for each encoding of OAS and IPS (0 to 6; 7 is reserved).
pub const OAS_BITS: [u8; 7] = [32, 36, 40, 42, 44, 48, 52];

bitflags! {
    /// Bits of `CR0` and `CR0ACK`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u32 {
        /// Transactions are translated.
        const SMMUEN = 1;
        /// The PRI queue is on.
        const PRIQEN = 1 << 1;
        /// The event queue is on.
        const EVENTQEN = 1 << 2;
        /// The command queue is on.
        const CMDQEN = 1 << 3;
        /// ATS traffic is checked.
        const ATSCHK = 1 << 4;
        /// VMID wildcard size.
        const VMW = 7 << 6;
    }

    /// Bits of `IRQ_CTRL` and `IRQ_CTRLACK`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqCtrl: u32 {
        /// Global errors interrupt.
        const GERROR_IRQEN = 1;
        /// The PRI queue interrupts.
        const PRIQ_IRQEN = 1 << 1;
        /// The event queue interrupts.
        const EVENTQ_IRQEN = 1 << 2;
    }

    /// Bits of `GERROR` and `GERRORN`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Gerror: u32 {
        /// A command could not be executed; `CMDQ_CONS.ERR` says why.
        const CMDQ_ERR = 1;
        /// A write to the event queue was aborted: events were lost.
        const EVENTQ_ABT_ERR = 1 << 2;
        /// A write to the PRI queue was aborted.
        const PRIQ_ABT_ERR = 1 << 3;
        /// A CMD_SYNC's message was aborted.
        const MSI_CMDQ_ABT_ERR = 1 << 4;
        /// An event queue message was aborted.
        const MSI_EVENTQ_ABT_ERR = 1 << 5;
        /// A PRI queue message was aborted.
        const MSI_PRIQ_ABT_ERR = 1 << 6;
        /// A global error message was aborted.
        const MSI_GERROR_ABT_ERR = 1 << 7;
        /// The SMMU has entered Service Failure Mode: it serves nothing any more.
        const SFM_ERR = 1 << 8;
        /// An enhanced command queue has an error.
        const CMDQP_ERR = 1 << 9;
    }
}

/// Fields of `CR1`.
pub mod cr1 {
    use super::Field;
    /// Queues: inner cacheability.
    pub const QUEUE_IC: Field = Field::new(1, 0);
    /// Queues: outer cacheability.
    pub const QUEUE_OC: Field = Field::new(3, 2);
    /// Queues: shareability.
    pub const QUEUE_SH: Field = Field::new(5, 4);
    /// Tables: inner cacheability.
    pub const TABLE_IC: Field = Field::new(7, 6);
    /// Tables: outer cacheability.
    pub const TABLE_OC: Field = Field::new(9, 8);
    /// Tables: shareability.
    pub const TABLE_SH: Field = Field::new(11, 10);
    /// Non-cacheable.
    pub const CACHE_NC: u64 = 0;
    /// Write-back cacheable.
    pub const CACHE_WB: u64 = 1;
    /// Non-shareable.
    pub const SH_NSH: u64 = 0;
    /// Outer shareable.
    pub const SH_OSH: u64 = 2;
    /// Inner shareable.
    pub const SH_ISH: u64 = 3;
}

/// Fields of `CR2`.
pub mod cr2 {
    use super::Field;
    /// The EL2 stream world has ASIDs.
    pub const E2H: Field = Field::bit(0);
    /// Record C_BAD_STREAMID.
    pub const RECINVSID: Field = Field::bit(1);
    /// Take no part in broadcast TLB maintenance.
    pub const PTM: Field = Field::bit(2);
}

/// Fields of `GBPA`.
pub mod gbpa {
    use super::Field;
    /// Abort all transactions while the SMMU is off.
    pub const ABORT: Field = Field::bit(20);
    /// Written 1 with a change; reads 1 until the change has taken effect.
    pub const UPDATE: Field = Field::bit(31);
}

/// Fields of `STRTAB_BASE`.
pub mod strtab_base {
    use super::Field;
    /// The table's address.
    pub const ADDR: Field = Field::new(51, 6);
    /// Read-allocate hint.
    pub const RA: Field = Field::bit(62);
}

/// Fields of `STRTAB_BASE_CFG`.
pub mod strtab_base_cfg {
    use super::Field;
    /// log2 of the number of STEs (of both levels together).
    pub const LOG2SIZE: Field = Field::new(5, 0);
    /// Bits of StreamID that the second level resolves: 6, 8 or 10.
    pub const SPLIT: Field = Field::new(10, 6);
    /// 0 linear, 1 two-level.
    pub const FMT: Field = Field::new(17, 16);
}

/// Fields of `CMDQ_BASE` and `EVENTQ_BASE`.
pub mod queue_base {
    use super::Field;
    /// log2 of the number of entries.
    pub const LOG2SIZE: Field = Field::new(4, 0);
    /// The queue's address.
    pub const ADDR: Field = Field::new(51, 5);
    /// Read-allocate hint (command queue) or write-allocate hint (event queue).
    pub const ALLOC: Field = Field::bit(62);
}

/// Fields of the `*_IRQ_CFG0`s and `*_IRQ_CFG2`s.
pub mod irq_cfg2 {
    use super::Field;
    /// In `*_IRQ_CFG0`: where the message is written to; 0 for no message.
    pub const ADDRESS: Field = Field::new(51, 2);
    /// Memory type of the message.
    pub const MEMATTR: Field = Field::new(3, 0);
    /// Shareability of the message.
    pub const SH: Field = Field::new(5, 4);
    /// `PRIQ_IRQ_CFG2` only: interrupt for the last request of a group alone.
    pub const LO: Field = Field::bit(31);
    /// `MEMATTR`: Device-nGnRE.
    pub const DEVICE_NGNRE: u64 = 1;
}

/// Fields of `CMDQ_CONS`.
pub mod cmdq_cons {
    use super::Field;
    /// Read index with its wrap bit.
    pub const RD: Field = Field::new(19, 0);
    /// Why processing stopped; valid while `GERROR.CMDQ_ERR` is active. Stays after it was acknowledged.
    pub const ERR: Field = Field::new(30, 24);
}

/// Overflow flag of `EVENTQ_PROD`, and its acknowledgement in `EVENTQ_CONS`: an overflow is unacknowledged while they differ.
pub const OVFLG: Field = Field::bit(31);

/// `CMDQ_CONS.ERR`: the command is illegal (7.1).
pub const CERROR_ILL: u64 = 1;
/// `CMDQ_CONS.ERR`: reading the command was aborted.
pub const CERROR_ABT: u64 = 2;
/// `CMDQ_CONS.ERR`: a CMD_SYNC found that an ATC_INV was not answered.
pub const CERROR_ATC_INV_SYNC: u64 = 3;

const _: () = {
    assert!(EVENTQ_PROD == 0x100a8 && EVENTQ_CONS == 0x100ac);
    assert!(PRIQ_CONS < SIZE && STRTAB_BASE.is_multiple_of(8) && CMDQ_BASE.is_multiple_of(8));
    assert!(cmdq_cons::RD.mask() == 0xf_ffff);
};
