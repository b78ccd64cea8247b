//! `cargo run`: builds the kernel, boots it under QEMU and reads its verdict.
#![forbid(unsafe_code)]

use clap::Parser;
use qemu::cli::{Cli, Command};
use qemu::{bench, demo};
use std::process::ExitCode;

fn main() -> ExitCode {
    // clap prints usage errors itself and exits with 2, as a usage error must.
    let cli = Cli::parse();
    let verdict = match cli.command {
        Some(Command::Bench(options)) => bench::run(&options),
        Some(Command::Demo(options)) => demo::run(&options),
        None => demo::run(&cli.options),
    };
    match verdict {
        Ok(verdict) => ExitCode::from(verdict.exit_code()),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
