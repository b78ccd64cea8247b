//! `memcpy` and `memset`, by which the compiler copies and fills whatever is larger than a few words.

use core::arch::global_asm;

global_asm!(include_str!("asm/bytes.s"));
