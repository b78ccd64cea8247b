//! The image is played by a shell script that stands in for QEMU and is told the kernel's command line.

use super::*;
use qemu::emulator::Version;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

/// What every script begins with: `$from` is how many tests to leave out, `begin N` reports a plan of N tests.
const PROLOGUE: &str = r###"#!/bin/sh
case "$*" in *ktest.from=0*) from=0;; *ktest.from=1*) from=1;; *ktest.from=2*) from=2;; *) from=3;; esac
begin() { echo "##ktest registered 3"; echo "##ktest plan $1"; }
pass() { echo "##ktest start $1"; echo "##ktest ok $1"; }
"###;

fn play(script: &str, names: &[&str], patience: Duration) -> BTreeMap<String, Outcome> {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("qemu");
    std::fs::write(&program, format!("{PROLOGUE}{script}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let emulator = Emulator { program, version: Version(10, 0, 0), bounce_buffer_limit: true };
    let firmware = Firmware { elf: "elf".into(), image: "image".into() };
    let machine = Machine::default();
    let boots =
        Boots { emulator: &emulator, machine: &machine, machine_name: "default", firmware: &firmware, patience };
    // Another test's fork may hold the fresh script open for a moment, which the system calls "text file busy".
    loop {
        let mut outcomes = BTreeMap::new();
        boots.run(names, |name, outcome| {
            assert!(outcomes.insert(name.to_string(), outcome).is_none(), "{name} was reported twice");
        });
        if !outcomes.values().any(|outcome| matches!(outcome, Outcome::Failed(text) if text.contains("busy"))) {
            return outcomes;
        }
    }
}

const LONG: Duration = Duration::from_secs(60);

fn failed(outcomes: &BTreeMap<String, Outcome>, name: &str) -> String {
    match &outcomes[name] {
        Outcome::Failed(text) => text.clone(),
        other => panic!("{name} did not fail: {other:?}"),
    }
}

#[test]
fn each_result_goes_to_its_test() {
    let outcomes = play(
        "begin 3; pass a; echo '##ktest start b'; echo noise; echo '##ktest fail b one\\\\ntwo'
         echo '##ktest start c'; echo '##ktest skip c no device'",
        &["a", "b", "c"],
        LONG,
    );
    assert_eq!(outcomes["a"], Outcome::Passed);
    assert_eq!(failed(&outcomes, "b"), "one\ntwo\nconsole:\n  noise");
    assert_eq!(outcomes["c"], Outcome::Skipped("no device".into()));
}

#[test]
fn a_panic_fails_one_test_and_the_rest_still_run() {
    let outcomes = play(
        "case $from in
           0) begin 3; pass a; echo '##ktest start b'; echo 'panicked at x'; echo '##pc 0x1234'; exit 1;;
           2) begin 1; pass c;;
         esac",
        &["a", "b", "c"],
        LONG,
    );
    assert_eq!(outcomes["a"], Outcome::Passed);
    let text = failed(&outcomes, "b");
    assert!(text.contains("panicked at x") && text.contains("0x0000000000001234"), "{text}");
    assert_eq!(outcomes["c"], Outcome::Passed);
}

#[test]
fn a_hang_fails_one_test_and_the_rest_still_run() {
    let outcomes = play(
        "case $from in
           0) begin 2; echo '##ktest start a'; echo 'going to sleep'; exec sleep 1000;;
           1) begin 1; pass b;;
         esac",
        &["a", "b"],
        Duration::from_secs(2),
    );
    let text = failed(&outcomes, "a");
    assert!(text.contains("nothing more happened") && text.contains("going to sleep"), "{text}");
    assert_eq!(outcomes["b"], Outcome::Passed);
}

#[test]
fn a_test_that_is_never_reported_has_failed() {
    let outcomes = play("begin 1; pass a", &["a", "b"], LONG);
    assert_eq!(outcomes["a"], Outcome::Passed);
    assert!(failed(&outcomes, "b").contains("never reported"));
}

#[test]
fn an_image_that_does_not_begin_fails_every_test_with_its_last_words() {
    let outcomes = play("echo 'no memory'; exit 1", &["a", "b"], LONG);
    for name in ["a", "b"] {
        assert!(failed(&outcomes, name).contains("no memory"));
    }
}

#[test]
fn an_image_that_ends_in_good_order_but_early_is_booted_again() {
    let outcomes = play("case $from in 0) begin 2; pass a;; 1) begin 1; pass b;; esac", &["a", "b"], LONG);
    assert!(outcomes.values().all(|outcome| *outcome == Outcome::Passed), "{outcomes:?}");
}

#[test]
fn a_result_for_another_test_is_not_believed() {
    let outcomes = play("begin 2; echo '##ktest start a'; echo '##ktest ok b'; pass b", &["a", "b"], LONG);
    assert!(failed(&outcomes, "a").contains("in the middle"));
    let outcomes = play("begin 1; echo '##ktest ok a'; pass b", &["a", "b"], LONG);
    assert!(failed(&outcomes, "a").contains("never reported"));
}

#[test]
fn many_names_become_their_machine() {
    let names: Vec<String> = (0..200).map(|number| format!("module::a_test_with_number_{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let outcomes = play(
        "case \"$*\" in *ktest=@default*) ;; *) exit 1;; esac
         begin 201; pass unasked; for n in $(seq 0 199); do pass module::a_test_with_number_$n; done",
        &names,
        LONG,
    );
    assert_eq!(outcomes.len(), 200);
    assert!(outcomes.values().all(|outcome| *outcome == Outcome::Passed));
}
