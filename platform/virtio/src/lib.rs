//! Modern virtio-pci: queue, transport, block, GPU.
#![cfg_attr(not(test), no_std)]
