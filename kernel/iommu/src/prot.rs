//! What a device may do with a page, and what kind of memory the page is.

use bitflags::bitflags;

bitflags! {
    /// Permissions and attributes of a mapping. Neither `READ` nor `WRITE` is no mapping at all and is refused.
    ///
    /// Stage 1 formats cannot deny reads of a valid page: there a write-only mapping is readable too. Stage 2 formats can.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Prot: u8 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 1 << 1;
        /// Registers, not memory: Device-nGnRE, never cached. For MSI doorbells and peer-to-peer windows.
        const MMIO = 1 << 2;
        /// Only for privileged transactions, where the format can say so.
        const PRIVILEGED = 1 << 3;
        /// The device does not snoop the CPU's caches: normal non-cacheable memory.
        const NON_COHERENT = 1 << 4;
        /// Unprivileged instructions, where a processor walks the table too. Never together with `WRITE`. A translation does not
        /// report it: it says nothing to a device.
        const EXECUTE = 1 << 5;
        /// Single pages only, no blocks and no contiguous runs, so that any page of the mapping can be revoked by itself. Says
        /// how to map, not what is allowed: a translation does not report it.
        const PAGEWISE = 1 << 6;
    }
}
