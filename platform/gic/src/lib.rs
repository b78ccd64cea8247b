//! GICv3 with ITS and LPIs.
#![cfg_attr(not(test), no_std)]
