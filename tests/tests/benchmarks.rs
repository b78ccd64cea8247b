//! What operations cost in instructions may not get worse unnoticed. The figures are exact, whatever machine this is: no clock is
//! looked at.
//!
//! Seen to fail: the first with `figures.json` edited to 6 % less; the second with the count taken before the
//! devices were given up, six commands early.

use qemu::bench::boot::{Boot, Clock};
use qemu::bench::figures::Figures;
use qemu::bench::{IMAGE, Mode, Plan, measure};
use qemu::cli::TraceRequest;
use qemu::firmware::{self, Firmware};
use qemu::progress::Progress;
use qemu::trace::Trace;
use std::io::Write;
use tests::{emulator, test_timeout};

fn image() -> Firmware {
    firmware::build(IMAGE.0, IMAGE.1, &mut Progress::silent()).unwrap()
}

/// After a change that is worth its price, or one that was made for the better: `cargo run -- bench --update`.
#[test]
fn no_benchmark_costs_a_twentieth_more_than_the_checked_in_figure() {
    let emulator = emulator().unwrap();
    let modes = Mode::USUAL.to_vec();
    let plan = Plan { names: Vec::new(), modes, wall: false, patience: 3 * test_timeout().unwrap() };
    let results = measure(&emulator, &image(), &plan, &mut Progress::silent()).unwrap();
    assert_eq!(results.failed, Vec::<String>::new());
    let moved = Figures::read().unwrap().compare(&results.measured, &Mode::USUAL);
    for line in &moved.better {
        // Past the harness, which shows nothing of a test that passes.
        let _ = writeln!(std::io::stderr(), "better than checked in (cargo run -- bench --update): {line}");
    }
    assert!(
        moved.worse.is_empty(),
        "\n{}\n(cargo run -- bench --update, if that is the price)",
        moved.worse.join("\n")
    );
}

#[test]
fn the_drivers_count_of_commands_is_the_emulators() {
    let (emulator, directory) = (emulator().unwrap(), tempfile::tempdir().unwrap());
    let file = directory.path().join("trace");
    let names = ["map4k", "sg16x4k", "iommu2m"].map(String::from);
    let boot = Boot {
        emulator: &emulator,
        firmware: &image(),
        mode: Mode::Strict,
        clock: Clock::Instructions,
        names: &names,
        patience: test_timeout().unwrap(),
        trace: Some(TraceRequest { pattern: "smmuv3_cmdq_opcode".into(), file: file.clone() }),
    };
    let told = boot.run(&mut Progress::silent()).unwrap();
    assert_eq!(told.failed, Vec::<String>::new());
    assert!(told.commands > 10_000, "{told:?}");
    assert_eq!(told.commands, Trace::read(&file, "smmuv3_").unwrap().of("smmuv3_cmdq_opcode"));
}
