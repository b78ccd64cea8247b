//! The SMMUv3 driver and an executable model of the SMMU.
#![cfg_attr(not(test), no_std)]
