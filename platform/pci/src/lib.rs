//! PCIe: ECAM enumeration, BAR and bus assignment, capabilities, MSI-X.
#![cfg_attr(not(test), no_std)]
