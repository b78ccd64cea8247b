//! Everything between a shell prompt and a running kernel.
//!
//! The binary of this crate (`cargo run`) builds the kernel, boots it under QEMU and reads its verdict; the `tests` crate
//! uses the same pieces to boot the test image and to read the screen back. One idea each:
//!
//! | module | does |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`setup`] | finds or installs what is missing: the Rust target, QEMU |
//! | [`emulator`] | which QEMU this is and what it can do |
//! | [`firmware`] | builds an image crate for the target and flattens it to an arm64 Image |
//! | [`arm64_image`] | the kernel as a file for a boot loader |
//! | [`board`] | the boards, and how the kernel gets into each |
//! | [`machine`] | a machine as a value, and as QEMU's arguments |
//! | [`trees`] | machines whose device tree is QEMU's own, with something changed |
//! | [`session`] | one running QEMU: console in and out, deadline, end |
//! | [`console`] | the lines of the console that are meant for us |
//! | [`qmp`] | QEMU's control socket, for screenshots |
//! | [`symbols`] | addresses to functions and lines |
//! | [`trace`] | QEMU's trace files |
//! | [`picture`], [`disk`] | the picture, and disks of every shape around it |
//! | [`progress`] | one line that says what is going on |
//! | [`topology`] | machines by name, and what the kernel comes to on each |
//! | [`matrix`] | all of them on several QEMUs, and the table in README.md |
//! | [`trial`] | the main job on one machine, watched and judged |
//! | [`show`] | what must be on the screen after the show |
//! | [`demo`] | the main job, from the command line to the exit code |
//! | [`describe`] | what the kernel would find on the board of a device tree |
//! | [`mod@bench`] | the benchmarks, beside Linux's figures |
//!
//! No `unsafe`, and no global state: several sessions may run at once from one process.
#![forbid(unsafe_code)]

pub mod arm64_image;
pub mod bench;
pub mod board;
pub mod cli;
pub mod console;
pub mod demo;
pub mod describe;
pub mod disk;
pub mod emulator;
pub mod firmware;
pub mod machine;
pub mod matrix;
pub mod picture;
pub mod progress;
pub mod qmp;
pub mod session;
pub mod setup;
pub mod show;
pub mod symbols;
pub mod topology;
pub mod trace;
pub mod trees;
pub mod trial;
