//! The tests that run on the target, each under its own name.
//!
//! Listing builds the image and reads the names from it; it does not boot. Running boots once for each machine whose tests
//! are selected, and reports each test as soon as the image does. Tests of the machine `default` run on the second board as well,
//! under names that begin with `sbsa::`.

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use qemu::board;
use qemu::disk;
use qemu::firmware::{self, Firmware};
use qemu::machine::{Disk, Machine};
use qemu::progress::Progress;
use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use tests::boot::{Boots, Outcome};
use tests::names::{self, OnTarget};
use tests::{emulator, profile, test_timeout};

/// The package with the test image, and its binary.
const IMAGE: (&str, &str) = ("test-image", "test-image");
/// What a test says that looks for a device that is not there.
const NO_DEVICE: &str = "the machine has no device of the test";
/// What a test says that needs messages.
const NO_MESSAGES: &str = "the machine takes no messages";
/// The name of the test that compares the image's registry with the names in its ELF.
const REGISTRY: &str = "registry::every_registered_test_has_its_name_in_the_elf";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let trials = prepare(&arguments).unwrap_or_else(|(name, problem)| {
        // Whatever was asked for cannot be had: that must not look like "0 tests, all well".
        arguments.filter = None;
        arguments.skip.clear();
        arguments.ignored = false;
        vec![Trial::test(name, move || Err(Failed::from(problem)))]
    });
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Builds the image and makes a trial of each of its tests. An error is the one trial that fails instead.
fn prepare(arguments: &Arguments) -> Result<Vec<Trial>, (&'static str, String)> {
    let firmware = firmware::build(IMAGE.0, IMAGE.1, &mut Progress::silent())
        .map_err(|error| ("the_test_image_builds", format!("{error:#}")))?;
    let on_target =
        names::read(&firmware.elf).map_err(|error| ("the_test_image_names_its_tests", format!("{error:#}")))?;
    if !arguments.list {
        emulator().map_err(|error| ("qemu_is_there", error))?;
    }
    let firmware = Arc::new(firmware);
    let mut machines: BTreeMap<&str, Vec<&OnTarget>> = BTreeMap::new();
    for test in &on_target {
        machines.entry(&test.machine).or_default().push(test);
    }
    let mut trials = Vec::new();
    let on_virt = machines.iter().map(|(machine, tests)| (board::Name::Virt, *machine, tests));
    let on_sbsa = machines.get_key_value("default").map(|(machine, tests)| (board::Name::Sbsa, *machine, tests));
    for (board, machine, tests) in on_virt.chain(on_sbsa) {
        let bench = Arc::new(Bench::new(machine, board, Arc::clone(&firmware)));
        for test in tests {
            let (of_trial, name) = (Arc::clone(&bench), test.name.clone());
            let shown = if board == board::Name::Virt { name.clone() } else { format!("sbsa::{name}") };
            let trial = Trial::ignorable_test(shown, move || of_trial.outcome(&name));
            if !arguments.is_filtered_out(&trial) {
                bench.select(&test.name);
            }
            trials.push(trial);
        }
    }
    let count = on_target.len();
    trials.push(Trial::test(REGISTRY, move || {
        let registered = with_boots("default", board::Name::Virt, &firmware, |boots| boots.registered())??;
        if registered == count {
            return Ok(());
        }
        Err(format!("the image registers {registered} tests, its ELF names {count}: the linker dropped some").into())
    }));
    trials.sort_by(|one, other| one.name().cmp(other.name()));
    Ok(trials)
}

/// Calls `act` with what it takes to boot the image on the named machine.
fn with_boots<R>(
    machine_name: &str,
    board: board::Name,
    firmware: &Firmware,
    act: impl FnOnce(&Boots<'_>) -> R,
) -> Result<R, String> {
    let emulator = emulator()?;
    let prepare = || -> anyhow::Result<_> {
        let disk = Disk::open(&disk::cached(firmware, &mut Progress::silent())?)?;
        let machine = profile::machine(machine_name, disk, &emulator)?;
        Ok((Machine { board: board.prepare(&mut Progress::silent())?, ..machine }, test_timeout()?))
    };
    let (machine, patience) = prepare().map_err(|error| format!("{error:#}"))?;
    Ok(act(&Boots { emulator: &emulator, machine: &machine, machine_name, firmware, patience }))
}

/// A machine, its selected tests and their results. The first trial that wants a result starts the boots.
struct Bench {
    machine: String,
    board: board::Name,
    firmware: Arc<Firmware>,
    selected: Mutex<Vec<String>>,
    begun: Once,
    results: Mutex<HashMap<String, Outcome>>,
    changed: Condvar,
}

impl Bench {
    fn new(machine: &str, board: board::Name, firmware: Arc<Firmware>) -> Self {
        Self {
            machine: machine.to_string(),
            board,
            firmware,
            selected: Mutex::default(),
            begun: Once::new(),
            results: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn select(&self, name: &str) {
        self.selected.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_string());
    }

    /// Waits for the result of the named test.
    fn outcome(self: &Arc<Self>, name: &str) -> Result<Completion, Failed> {
        self.begun.call_once(|| {
            let bench = Arc::clone(self);
            // Not joined: it ends when every selected test has its result, and nobody waits for anything else.
            std::thread::spawn(move || bench.run());
        });
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match results.remove(name) {
                Some(Outcome::Passed) => return Ok(Completion::Completed),
                Some(Outcome::Skipped(reason)) => return Ok(Completion::ignored_with(reason)),
                Some(Outcome::Failed(text)) => return Err(Failed::from(text)),
                None => results = self.changed.wait(results).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Boots until every selected test has its result.
    fn run(&self) {
        let selected = self.selected.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let names: Vec<&str> = selected.iter().map(String::as_str).collect();
        let ran = with_boots(&self.machine, self.board, &self.firmware, |boots| {
            if boots.emulator.version < self.board.since() {
                let reason = format!("this QEMU's board cannot run it; {} and newer can", self.board.since());
                names.iter().for_each(|name| self.put(name, Outcome::Skipped(reason.clone())));
                return;
            }
            let has_edu = self.board.takes_messages(boots.emulator.version);
            boots.run(&names, |name, outcome| match outcome {
                Outcome::Failed(text) if !has_edu && text.contains(NO_DEVICE) => {
                    self.put(name, Outcome::Skipped("this QEMU's board takes no messages, and has no edu then".into()));
                }
                Outcome::Failed(text) if !has_edu && text.contains(NO_MESSAGES) => {
                    self.put(name, Outcome::Skipped("this QEMU's board takes no messages".into()));
                }
                outcome => self.put(name, outcome),
            });
        });
        if let Err(problem) = ran {
            names.iter().for_each(|name| self.put(name, Outcome::Failed(problem.clone())));
        }
    }

    fn put(&self, name: &str, outcome: Outcome) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), outcome);
        self.changed.notify_all();
    }
}
