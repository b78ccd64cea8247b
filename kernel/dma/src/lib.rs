//! The DMA-API: owned pages, streaming and coherent mappings, shared buffers.
#![cfg_attr(not(test), no_std)]
