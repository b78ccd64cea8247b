//! Addresses, VMSAv8-64 page tables, IOVA allocation, domains and groups.
#![cfg_attr(not(test), no_std)]
