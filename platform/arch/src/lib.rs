//! The only assembly: MMU, exceptions, barriers, cache maintenance, timer, SMP, MMIO.
#![cfg_attr(not(test), no_std)]
