//! The kinds of addresses, as types that cannot be mixed.
//!
//! A physical address, a CPU virtual address and a device's address are all 64-bit numbers and all different things; there is
//! no conversion between them but translation. Arithmetic is checked: an address calculation that overflows is an error, not
//! somebody else's memory.

use core::fmt;

/// Bytes in the smallest page that is ever lent to a device. Larger translation granules map several at once.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a number that is known to be an address of this kind.
            #[inline]
            pub const fn new(address: u64) -> Self {
                Self(address)
            }

            /// The number.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `bytes` further on, or `None` past the end of the 64-bit space.
            #[inline]
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Bytes from `start` to here, or `None` if `start` lies behind.
            #[inline]
            #[must_use]
            pub const fn offset_from(self, start: Self) -> Option<u64> {
                self.0.checked_sub(start.0)
            }

            /// Whether the address is a multiple of `alignment` (a power of two).
            #[inline]
            pub const fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }

            /// The next lower multiple of `alignment` (a power of two).
            #[inline]
            #[must_use]
            pub const fn align_down(self, alignment: u64) -> Self {
                Self(self.0 & !(alignment - 1))
            }

            /// The next higher multiple of `alignment` (a power of two), or `None` past the end.
            #[inline]
            #[must_use]
            pub const fn align_up(self, alignment: u64) -> Option<Self> {
                match self.0.checked_add(alignment - 1) {
                    Some(sum) => Some(Self(sum & !(alignment - 1))),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// An address on the CPU's physical bus.
    PhysAddr
}
address! {
    /// An address that the CPU's MMU translates.
    VirtAddr
}
address! {
    /// An I/O virtual address: what one device puts on its bus. Meaningful for the domains of that device only.
    Iova
}

macro_rules! range {
    ($(#[$meta:meta])* $name:ident, $address:ident) => {
        $(#[$meta])*
        ///
        /// # Invariants
        ///
        /// `start + len` does not overflow.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name {
            start: $address,
            len: u64,
        }

        impl $name {
            /// The `len` bytes from `start`, or `None` if they pass the end of the 64-bit space.
            #[inline]
            pub const fn new(start: $address, len: u64) -> Option<Self> {
                match start.checked_add(len) {
                    Some(_) => Some(Self { start, len }),
                    None => None,
                }
            }

            /// The bytes from `start` up to but not including `end`, or `None` if `end` lies before `start`.
            #[inline]
            pub const fn between(start: $address, end: $address) -> Option<Self> {
                match end.offset_from(start) {
                    Some(len) => Some(Self { start, len }),
                    None => None,
                }
            }

            /// The first address.
            #[inline]
            pub const fn start(self) -> $address {
                self.start
            }

            /// The address after the last byte.
            #[inline]
            pub const fn end(self) -> $address {
                // INVARIANT: the sum does not overflow. (Said so, it is not checked again on every path that maps or unmaps.)
                $address::new(self.start.get().wrapping_add(self.len))
            }

            /// The size in bytes.
            #[inline]
            pub const fn len(self) -> u64 {
                self.len
            }

            /// Whether the range has no byte.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.len == 0
            }

            /// Whether `address` lies in the range.
            #[inline]
            pub const fn contains(self, address: $address) -> bool {
                match address.offset_from(self.start) {
                    Some(offset) => offset < self.len,
                    None => false,
                }
            }

            /// Whether all of `other` lies in the range.
            #[inline]
            pub const fn covers(self, other: Self) -> bool {
                (self.start.get() <= other.start.get()) & (other.end().get() <= self.end().get())
            }

            /// Whether the two have a byte in common.
            #[inline]
            pub const fn overlaps(self, other: Self) -> bool {
                self.start.get() < other.end().get()
                    && other.start.get() < self.end().get()
                    && self.len != 0
                    && other.len != 0
            }

            /// The `len` bytes at byte `offset` of the range, or `None` where that is not inside it.
            #[inline]
            pub const fn part(self, offset: u64, len: u64) -> Option<Self> {
                match offset.checked_add(len) {
                    Some(end) if end <= self.len => Some(Self { start: $address::new(self.start.get() + offset), len }),
                    _ => None,
                }
            }

            /// Whether start and length are multiples of `alignment` (a power of two).
            #[inline]
            pub const fn is_aligned(self, alignment: u64) -> bool {
                (self.start.get() | self.len) & (alignment - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x}..{:#x})"), self.start.get(), self.end().get())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}..{:#x}", self.start.get(), self.end().get())
            }
        }
    };
}

range! {
    /// A run of physical memory.
    PhysRange, PhysAddr
}
range! {
    /// A run of one device's address space.
    IovaRange, Iova
}

/// The name under which the IOMMU knows a bus master. For PCI behind an identity `iommu-map` it is the requester ID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct StreamId(u32);

impl StreamId {
    /// Wraps a StreamID.
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamId({:#x})", self.0)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_passes_the_end_of_the_space_does_not_exist() {
        assert_eq!(IovaRange::new(Iova::new(u64::MAX), 1), None);
        assert!(IovaRange::new(Iova::new(u64::MAX), 0).is_some());
        assert_eq!(PhysRange::between(PhysAddr::new(2), PhysAddr::new(1)), None);
    }

    #[test]
    fn a_part_lies_inside_its_range() {
        let range = IovaRange::new(Iova::new(0x1000), 0x2000).unwrap();
        assert_eq!(range.part(0x1000, 0x1000).map(IovaRange::start), Some(Iova::new(0x2000)));
        assert_eq!(range.part(0x1000, 0x1001), None);
        assert_eq!(range.part(u64::MAX, 2), None);
    }

    #[test]
    fn touching_ranges_do_not_overlap_and_empty_ranges_overlap_nothing() {
        let a = IovaRange::new(Iova::new(0x1000), 0x1000).unwrap();
        let b = IovaRange::new(Iova::new(0x2000), 0x1000).unwrap();
        let empty = IovaRange::new(Iova::new(0x1800), 0).unwrap();
        assert!(!a.overlaps(b) && a.overlaps(a) && !a.overlaps(empty) && !empty.overlaps(a));
    }
}
