//! The kernel's address space: what lies where in the upper half.
//!
//! | from | what |
//! |---|---|
//! | `0xffff_0000_0000_0000` | all RAM, linear: physical address plus [`LINEAR_BASE`] |
//! | `0xffff_8000_0000_0000` | device registers, in the order in which they were asked for |
//! | `0xffff_a000_0000_0000` | stacks of all cores but the first, each with an unmapped page below |
//! | `0xffff_c000_0000_0000` | pages that are not in the linear map: physical address plus [`ALIAS_BASE`] |
//! | `0xffff_e000_0000_0000` | scattered memory in one piece, where whoever asked for it wants it |
//! | `0xffff_ffff_8000_0000` | the image (`IMAGE_VA` in the linker script), with the first core's stacks |
//! | `0xffff_ffff_c000_0000` | the device tree, until the final tables are on |
//!
//! The lower half is empty once the final tables are on.

use core::ops::Range;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// What is added to a physical address to reach it in the linear map.
pub const LINEAR_BASE: u64 = 0xffff_0000_0000_0000;
/// The first physical address that the linear map cannot reach.
pub const LINEAR_LIMIT: u64 = 1 << 47;
/// Where device windows start.
pub const DEVICE_BASE: u64 = 0xffff_8000_0000_0000;
/// Where the part of the address space for device windows ends.
pub const DEVICE_END: u64 = 0xffff_a000_0000_0000;
/// Where the stacks of the other cores start.
pub const STACK_BASE: u64 = 0xffff_a000_0000_0000;
/// What is added to the physical address of a page that has left the linear map to reach it.
pub const ALIAS_BASE: u64 = 0xffff_c000_0000_0000;
/// The first physical address that cannot be reached so.
pub const ALIAS_LIMIT: u64 = 1 << 45;
/// Where scattered memory is mapped in one piece.
pub const VIRTUAL_BASE: u64 = 0xffff_e000_0000_0000;
/// Bytes of addresses for it.
pub const VIRTUAL_LEN: u64 = 1 << 44;
/// Where the early tables map the device tree.
pub const FDT_VA: u64 = 0xffff_ffff_c000_0000;
/// The most that a device tree may measure, in bytes. The boot protocol allows 2 MiB, but QEMU makes more of a large one given
/// with `-dtb`.
pub const FDT_MAX: usize = 16 << 20;

/// Bytes of a core's main stack.
pub const MAIN_STACK: usize = 0x2_0000;
/// Bytes of the stack on which a core's handlers run.
pub const EXCEPTION_STACK: usize = 0x8000;
/// Bytes of the stack on which a core reports a fault of a handler.
pub const EMERGENCY_STACK: usize = 0x4000;
/// Bytes of memory for the stacks of one core, guard pages not counted.
pub const CORE_STACKS: usize = MAIN_STACK + EXCEPTION_STACK + EMERGENCY_STACK;

macro_rules! symbols {
    ($($(#[$doc:meta])* $name:ident = $symbol:ident;)*) => {
        $(
            $(#[$doc])*
            #[inline]
            pub fn $name() -> u64 {
                unsafe extern "C" {
                    static $symbol: u8;
                }
                (&raw const $symbol).addr() as u64
            }
        )*
    };
}

symbols! {
    /// The image's first byte.
    image_start = __image_start;
    /// The end of the image's code, at a page boundary.
    text_end = __text_end;
    /// The end of the image's constants, at a page boundary.
    rodata_end = __rodata_end;
    /// The end of the image's variables that need no guard: the early tables' end.
    boot_tables_end = __boot_tables_end;
    /// The start of the early tables: the identity map's root.
    boot_tables = __boot_tables;
    /// The end of the image, stacks included.
    image_end = __image_end;
    /// The lowest byte of the first core's main stack.
    boot_main_bottom = __boot_main_stack_bottom;
    /// The end of the first core's main stack.
    boot_main_top = __boot_main_stack_top;
    /// The lowest byte of the first core's exception stack.
    boot_exception_bottom = __boot_exception_stack_bottom;
    /// The end of the first core's exception stack.
    boot_exception_top = __boot_exception_stack_top;
    /// The lowest byte of the first core's emergency stack.
    boot_emergency_bottom = __boot_emergency_stack_bottom;
    /// The end of the first core's emergency stack.
    boot_emergency_top = __boot_emergency_stack_top;
}

/// The image's code, by address in the upper half.
pub fn text() -> Range<u64> {
    image_start()..text_end()
}

/// The image's constants, by address in the upper half.
pub fn rodata() -> Range<u64> {
    text_end()..rodata_end()
}
