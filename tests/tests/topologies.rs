//! The main job on machines of every shape, each under its own name: `qemu::topology` has the list, `cargo run -- --topology NAME` starts
//! one by hand. On each the screen is read back, every device must have been stopped where it strayed, and QEMU's own trace must show
//! that disk and display were translated, and nothing was not. What this QEMU does not have is ignored, with what is missing.
//!
//! What the judgement finds is tested in `qemu::trial`. Seen to fail: `pci-bridge` with the bridge's requester ID left out of the
//! disk's streams.

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
use tests::{emulator, runner, test_timeout};

/// How many machines run at a time: each has several threads of its own.
const AT_ONCE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(AT_ONCE).min(AT_ONCE));
    let trials = TOPOLOGIES.iter().map(|topology| Trial::ignorable_test(topology.name, || outcome(topology)));
    let by_hand = Trial::test("by_hand::the_command_line_lists_them_and_starts_one", by_hand);
    libtest_mimic::run(&arguments, trials.chain([by_hand]).collect()).exit_code()
}

fn by_hand() -> Result<(), Failed> {
    let program = emulator()?.program;
    let listed = runner::run_bare(&["topologies", "--qemu", &program.to_string_lossy()])?;
    let names = listed.stdout.lines().filter_map(|line| line.split_whitespace().next());
    if listed.code != Some(0) || !names.eq(TOPOLOGIES.iter().map(|topology| topology.name)) {
        return Err(format!("{listed:#?}").into());
    }
    let ran = runner::run(&["--topology", "el2", "--smp", "3"])?;
    if ran.code == Some(0) && ran.stdout.contains(" 3 cores, 512 MiB, entered at EL2") {
        Ok(())
    } else {
        Err(format!("{ran:#?}").into())
    }
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
