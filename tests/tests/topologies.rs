//! The main job on machines of every shape, each under its own name: `qemu::topology` has the list, `cargo run -- --topology NAME` starts
//! one by hand. On each the screen is read back, every device must have been stopped where it strayed, and QEMU's own trace must show
//! that disk and display were translated, and nothing was not. What this QEMU does not have is ignored, with what is missing.

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use qemu::arm64_image::KERNEL;
use qemu::disk;
use qemu::firmware::{self, Firmware};
use qemu::machine::Disk;
use qemu::matrix::{self, Outcome};
use qemu::progress::Progress;
use qemu::topology::{TOPOLOGIES, Topology};
use std::process::ExitCode;
use std::sync::OnceLock;
use tests::{emulator, test_timeout};

/// How many machines run at a time: each has several threads of its own.
const AT_ONCE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(AT_ONCE).min(AT_ONCE));
    let trials = TOPOLOGIES.iter().map(|topology| Trial::ignorable_test(topology.name, || outcome(topology))).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The kernel and the disk, made once.
fn made() -> Result<&'static (Firmware, Disk), String> {
    static MADE: OnceLock<Result<(Firmware, Disk), String>> = OnceLock::new();
    let make = || -> anyhow::Result<_> {
        let firmware = firmware::build(KERNEL.0, KERNEL.1, &mut Progress::silent())?;
        let disk = Disk::open(&disk::cached(&firmware, &mut Progress::silent())?)?;
        Ok((firmware, disk))
    };
    MADE.get_or_init(|| make().map_err(|error| format!("{error:#}"))).as_ref().map_err(Clone::clone)
}

fn outcome(topology: &Topology) -> Result<Completion, Failed> {
    let (firmware, disk) = made()?;
    let patience = test_timeout().map_err(|error| format!("{error:#}"))?;
    match matrix::outcome(topology, &emulator()?, &firmware.image, disk, patience) {
        Outcome::Held(_) => Ok(Completion::Completed),
        Outcome::Absent(missing) => Ok(Completion::ignored_with(missing)),
        Outcome::Failed(problem) => Err(problem.into()),
    }
}
