//! DMA-on-command devices: edu and iommu-testdev.
#![cfg_attr(not(test), no_std)]
