//! `cargo run`: builds the kernel, boots it under QEMU and reads its verdict; or looks at a device tree, or
//! writes the kernel to a file.
#![forbid(unsafe_code)]

use clap::Parser;
use qemu::cli::{Cli, Command};
use qemu::{arm64_image, bench, demo, describe, matrix};
use std::process::ExitCode;

fn main() -> ExitCode {
    // clap prints usage errors itself and exits with 2, as a usage error must.
    let cli = Cli::parse();
    let verdict = match cli.command {
        Some(Command::Describe(options)) => return ended(describe::run(&options).map(|()| ExitCode::SUCCESS)),
        Some(Command::Image(options)) => return ended(arm64_image::run(&options).map(|()| ExitCode::SUCCESS)),
        Some(Command::Topologies(options)) => return ended(matrix::list(&options).map(|()| ExitCode::SUCCESS)),
        Some(Command::Matrix(options)) => matrix::run(&options),
        Some(Command::Bench(options)) => bench::run(&options),
        Some(Command::Demo(options)) => demo::run(&options),
        None => demo::run(&cli.options),
    };
    ended(verdict.map(|verdict| ExitCode::from(verdict.exit_code())))
}

/// Says what went wrong on the way, if anything did.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}
