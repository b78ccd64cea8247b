//! What processes and the kernel agree on.
//!
//! # A system call
//!
//! `SVC #0` with the number of the [`Call`] in x8 and arguments in x0 to x5. It comes back with 0 or an [`ErrorCode`] in x0 and a
//! value in x1; all other registers are as they were. Lengths and offsets are bytes; what is called a range is whole pages.
//!
//! # What is put by for a process
//!
//! Whoever starts a process may put things by for it, which the process then asks for by number: devices ([`Call::Open`]), shared
//! buffers ([`Call::OpenBuffer`]), events ([`Call::OpenEvent`]) and memory ([`Call::MapMemory`]). Each kind is numbered from 0 on.
//!
//! # Shared buffers
//!
//! A buffer has addresses in the process from [`Call::MapBuffer`] to [`Call::Close`], and its memory is there from [`Call::BeginAccess`] to
//! [`Call::EndAccess`] only. An access waits until devices that write it, or are at work on it, are done; what they begin
//! meanwhile waits for its end. Whoever touches the addresses out of turn finds nothing there.
//!
//! # The start of a program
//!
//! At the ELF's entry, with three arguments that whoever started it has chosen in x0 to x2, the stack pointer at the end of
//! [`STACK`] bytes, and every other register zero.

#![no_std]
#![forbid(unsafe_code)]

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of the stack with which a program starts.
pub const STACK: u64 = 64 * 1024;
/// The most bytes that one [`Call::Write`] takes.
pub const LINE: u64 = 512;
/// The largest alignment of addresses that can be asked for.
pub const ALIGNMENT_MAX: u64 = 1 << 30;
/// The exit code of a program that panicked.
pub const PANICKED: u64 = 101;

/// Rights to memory, and what a device may do with what is lent to it: [`READ`] and [`WRITE`].
pub type Rights = u64;
/// May be read.
pub const READ: Rights = 1;
/// May be written.
pub const WRITE: Rights = 2;

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u64)]
        pub enum $name {
            $($(#[$doc])* $variant = $number,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The one with this number.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// What can be asked of the kernel. Each says its arguments, and its value if it has one.
    Call {
        /// `(code)`: ends the process.
        Exit = 0,
        /// `(address, length)`: a line of text for the log.
        Write = 1,
        /// `(length, rights)`: fresh memory, zeroed. Its address.
        Map = 2,
        /// `(address, length)`: takes away what one [`Call::Map`], [`Call::Registers`] or [`Call::MapMemory`] has mapped, all of it.
        Unmap = 3,
        /// `()`: nanoseconds of the kernel's clock.
        Time = 4,
        /// `(nanoseconds)`: sleeps so long.
        Sleep = 5,
        /// `(number, mode)`: takes the device that was put by for this process under this number; how its addresses are
        /// translated is a [`Mode`]. A handle.
        Open = 6,
        /// `(handle)`: gives up what the handle names. A device is stopped, and what it was lent comes back; a buffer's access ends, and
        /// its addresses are free again.
        Close = 7,
        /// `(handle, offset)`: 32 bits of the device's PCI configuration space. Their value.
        Config = 8,
        /// `(handle, bar)`: maps the registers of a memory BAR. Their address. [`Call::BarSize`] tells how many.
        Registers = 9,
        /// `(handle, bar)`: bytes of a memory BAR.
        BarSize = 10,
        /// `(handle, iova, address, length, rights)`: lends a range of the process's memory to the device, at an address of the
        /// device that the process chooses. The range is a part of one mapping, or all of it (no two mappings touch), and may be lent
        /// as often as there are addresses for it; what is lent cannot be unmapped.
        Lend = 11,
        /// `(handle, iova, length)`: takes back what one [`Call::Lend`] has lent, all of it: who wants parts back lends parts.
        TakeBack = 12,
        /// `(handle, vector)`: connects an interrupt of the device to the handle's event. How it comes, a [`Signal`].
        Connect = 13,
        /// `(handle, nanoseconds)`: waits until the device has interrupted, or the event was raised, at most so long. How often it has
        /// since the last time. A device's interrupt is then masked until [`Call::Acknowledge`].
        Wait = 14,
        /// `(handle)`: lets the device interrupt again.
        Acknowledge = 15,
        /// `(number)`: opens the shared buffer that was put by under this number. A handle.
        OpenBuffer = 16,
        /// `(handle)`: bytes of a buffer.
        BufferSize = 17,
        /// `(handle, alignment)`: sets addresses aside for all of a buffer, a multiple of `alignment`: a power of two, from [`PAGE`] to
        /// [`ALIGNMENT_MAX`]. Once for a handle; nothing is there yet. The first address.
        MapBuffer = 18,
        /// `(handle, rights, nanoseconds)`: begins an access, when those in the way are done, at most so long from now: the memory is at the
        /// buffer's addresses then. How many nanoseconds that took.
        BeginAccess = 19,
        /// `(handle)`: ends the access: the memory is gone from there, and whoever waits for its end goes on.
        EndAccess = 20,
        /// `(number)`: opens the event that was put by under this number. A handle.
        OpenEvent = 21,
        /// `(handle)`: raises an event.
        Raise = 22,
        /// `(number, rights)`: maps the memory that was put by under this number, until [`Call::Unmap`]. Its address.
        MapMemory = 23,
        /// `(number)`: bytes of the memory that was put by under this number.
        MemorySize = 24,
    }
}

numbered! {
    /// How the addresses that a device uses are translated.
    Mode {
        /// By an address space of the device's own, in which nothing is but what [`Call::Lend`] puts there.
        Own = 0,
        /// By the process's own tables: an address means the same to both. Nothing is lent then: what the process maps the device
        /// reaches, with the rights that the process has, and what it unmaps is out of the device's reach when the call comes back.
        Shared = 1,
    }
}

numbered! {
    /// How a device interrupts.
    Signal {
        /// By a message of its own.
        Message = 0,
        /// By its wire: it interrupts for as long as it has something, and the driver has to make it take that back before
        /// [`Call::Acknowledge`]. Only vector 0.
        Wire = 1,
    }
}

numbered! {
    /// Why a call failed. Nothing has changed then, unless the call says otherwise.
    ErrorCode {
        /// There is no such call.
        NoSuchCall = 1,
        /// The address is not the process's, or not with the rights that are needed.
        BadAddress = 2,
        /// The length is 0, not whole pages where it must be, or too large.
        BadLength = 3,
        /// An address is not at the beginning of a page, or an alignment is none.
        Misaligned = 4,
        /// Rights that do not exist, or not here.
        BadRights = 5,
        /// The process has no such handle.
        BadHandle = 6,
        /// Something is there already.
        Overlap = 7,
        /// The addresses are set aside: they are not memory to the device.
        Reserved = 8,
        /// Addresses that the tables or the device cannot express.
        OutOfReach = 9,
        /// Nothing, or something else, is mapped or lent there.
        NotMapped = 10,
        /// The memory is lent to a device, the device is in use, or an access has begun already.
        Busy = 11,
        /// The machine has no memory for it.
        OutOfMemory = 12,
        /// The process has as much as it may have.
        Quota = 13,
        /// There is no such device, BAR or vector, or it was stopped.
        NoSuchDevice = 14,
        /// The device or the machine cannot do that.
        Unsupported = 15,
        /// The time is over.
        TimedOut = 16,
        /// The hardware did not do what it was told: the reason is in the kernel's log.
        Failed = 17,
        /// Nothing of this kind was put by for the process under this number.
        NotPutBy = 18,
    }
}
