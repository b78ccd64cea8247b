//! The framework's own tests: a registry of a few tests, on the host.

use crate::{Selection, TESTS, run};
use std::collections::BTreeSet;

crate::ktest! {
    fn passes(context) {
        expect_eq!(context.len(), 7);
        Ok(())
    }
}

crate::ktest! {
    fn fails(context) -> TestResult {
        expect!(context.is_empty(), "it is {context:?}\nand stays so\\");
        Ok(())
    }
}

crate::ktest! {
    fn fails_by_an_error(_) {
        "300".parse::<u8>()?;
        Ok(())
    }
}

crate::ktest! {
    fn skips(_) {
        skip!("no device of {} kind", "this");
    }
}

crate::ktest! {
    fn runs_elsewhere(_) { Ok(()) }
    machine: other
}

fn run_with(line: &str) -> (bool, Vec<String>) {
    let mut lines = Vec::new();
    let passed = run(&TESTS, "context", Selection::from_command_line(line), |line| lines.push(line.to_string()));
    (passed, lines)
}

#[test]
fn every_test_is_registered_once() {
    let names: BTreeSet<&str> = TESTS.iter().map(|test| test.name).collect();
    let all = ["fails", "fails_by_an_error", "passes", "runs_elsewhere", "skips"];
    assert!(names.iter().copied().eq(all.map(|name| format!("ktest::tests::{name}").leak() as &str)), "{names:?}");
    assert_eq!(TESTS.len(), all.len());
}

#[test]
fn without_a_selection_the_default_machine_is_meant() {
    let (passed, lines) = run_with("console=ttyAMA0");
    assert!(!passed);
    assert_eq!(lines[..2], ["##ktest registered 5", "##ktest plan 4"]);
    assert!(!lines.iter().any(|line| line.contains("runs_elsewhere")));
    assert_eq!(lines.iter().filter(|line| line.starts_with("##ktest start ")).count(), 4);
}

#[test]
fn names_and_machines_select() {
    let (passed, lines) = run_with("a ktest=tests::passes,tests::skips b");
    assert!(passed);
    assert_eq!(lines[1], "##ktest plan 2");
    assert!(lines.contains(&"##ktest ok tests::passes".to_string()));
    assert!(lines.contains(&"##ktest skip tests::skips no device of this kind".to_string()));
    assert_eq!(
        run_with("ktest=@other").1[1..],
        ["##ktest plan 1", "##ktest start tests::runs_elsewhere", "##ktest ok tests::runs_elsewhere"]
    );
    assert_eq!(run_with("ktest=tests::pass").1[1], "##ktest plan 0");
    assert_eq!(run_with("ktest=").1[1], "##ktest plan 0");
}

#[test]
fn the_rest_after_a_crash_is_the_rest() {
    let started = |line: &str| -> Vec<String> {
        run_with(line).1.into_iter().filter(|line| line.starts_with("##ktest start")).collect()
    };
    let all = started("ktest=@default");
    assert_eq!(started("ktest=@default ktest.from=2"), all[2..]);
    assert!(started("ktest=@default ktest.from=9").is_empty());
}

#[test]
fn failures_say_where_and_what_in_one_line() {
    let (passed, lines) = run_with("ktest=tests::fails,tests::fails_by_an_error");
    assert!(!passed);
    let fail = lines.iter().find(|line| line.starts_with("##ktest fail tests::fails ")).unwrap();
    assert!(fail.contains("tests.rs:"), "{fail}");
    assert!(fail.ends_with("expected context.is_empty(): it is \"context\"\\nand stays so\\\\"), "{fail}");
    let error = lines.iter().find(|line| line.starts_with("##ktest fail tests::fails_by_an_error ")).unwrap();
    assert!(error.contains("too large"), "{error}");
}
