//! What all boards share.
#![cfg_attr(not(test), no_std)]
