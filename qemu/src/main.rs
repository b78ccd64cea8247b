//! `cargo run`: builds the kernel, boots it under QEMU and reads its verdict.

fn main() {}
