//! The on-target benchmarks: the kernel and the board as they are, with measurements in place of the main job.
//!
//! What is measured is the public API that drivers use, on devices that are attached and master the bus; nothing here has a way
//! of its own to anything.
//!
//! The kernel's command line says what runs: `bench=NAME,NAME,...` (all without it; `bench=?` says `##bench has NAME` of each),
//! `bench.mode=strict`, `lazy` or `direct`, and `bench.clock=instructions`, `work` (instructions where a device in host time has its part)
//! or `wall`. What is said on the console, a line each: `##bench plan N`; and for each benchmark `##bench start NAME`, then one of
//! `##bench result NAME UNIT MIN MEDIAN MAX COMMANDS`, `##bench skip NAME REASON`, `##bench fail NAME MESSAGE`. The unit is
//! `instructions` or `ns`, for one operation; commands are those to all SMMUs for one operation. Fractions are decimal. At the end
//! `##bench commands N` says how many commands all SMMUs were given since the machine started, by their drivers' own count.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
extern crate alloc;
#[cfg(target_os = "none")]
mod blk;
#[cfg(target_os = "none")]
mod maps;
#[cfg(target_os = "none")]
mod measure;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod owned;
#[cfg(target_os = "none")]
mod run;
#[cfg(target_os = "none")]
mod stand;
#[cfg(target_os = "none")]
mod time;

#[cfg(target_os = "none")]
virt::entry!(run::main);
