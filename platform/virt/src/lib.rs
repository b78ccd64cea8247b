//! The QEMU virt board.
#![cfg_attr(not(test), no_std)]
