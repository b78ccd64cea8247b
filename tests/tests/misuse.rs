//! No misuse of the DMA-API is silent: the table of `tests::misuse` agrees with the tests that it names, and with
//! `ARCHITECTURE.md`. `SLUICE_BLESS=1 cargo test -p tests --test misuse` writes the table there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use tests::misuse::{Answer, MARKERS, ROWS, table};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text of the function `name`, up to the next function's comment or attribute at the same depth.
fn function<'a>(source: &'a str, name: &str) -> Option<&'a str> {
    let start = source.find(&format!("fn {name}("))?;
    let rest = &source[start..];
    let end = rest.find("\nktest! {").or_else(|| rest.find("\n}\n")).unwrap_or(rest.len());
    Some(&rest[..end])
}

#[test]
fn every_misuse_has_one_answer_and_most_do_not_compile() {
    let numbers: Vec<u32> = ROWS.iter().map(|row| row.number).collect();
    assert_eq!(numbers, (1..=22).collect::<Vec<u32>>());
    let tests: BTreeSet<String> = ROWS.iter().map(|row| format!("{:?}", row.answer)).collect();
    assert_eq!(tests.len(), ROWS.len(), "a test stands for two misuses");
    let refused = ROWS.iter().filter(|row| matches!(row.answer, Answer::DoesNotCompile(_))).count();
    assert!(refused >= 15, "only {refused} do not compile");
}

/// A program that does not compile says so in a recorded error, which `cargo test -p dma --test ui` compares.
#[test]
fn every_program_that_must_not_compile_is_there_with_the_error_it_gets() {
    for row in ROWS {
        let Answer::DoesNotCompile(name) = row.answer else { continue };
        let program = read(format!("kernel/dma/tests/ui/{name}.rs"));
        assert!(
            program.starts_with(&format!("//! Misuse {}: ", row.number)),
            "{name} is not about misuse {}",
            row.number
        );
        let error = read(format!("kernel/dma/tests/ui/{name}.stderr"));
        assert!(error.starts_with("error[E"), "{name}: {error}");
        // The program is wrong because of what the API lacks or demands, not because of a typing error.
        for accident in ["E0432", "E0433", "E0425", "E0412", "expected one of"] {
            assert!(!error.contains(accident), "{name} fails by accident:\n{error}");
        }
    }
}

#[test]
fn every_typed_error_is_expected_by_a_test() {
    let source = read("kernel/dma/tests/behaviour/misuse.rs");
    assert!(read("kernel/dma/tests/behaviour/main.rs").contains("\nmod misuse;\n"));
    for row in ROWS {
        let Answer::TypedError(name) = row.answer else { continue };
        let about = format!("/// Misuse {}.", row.number);
        let before = source.split(&format!("fn {name}(")).next().unwrap_or_default();
        assert!(before.len() < source.len(), "there is no test {name}");
        let heading = before.rsplit_once("\n\n").map_or(before, |(_, heading)| heading);
        assert!(
            heading.starts_with(&about) && heading.contains("#[test]"),
            "{name} is not a test of misuse {}",
            row.number
        );
        assert!(function(&source, name).is_some_and(|text| text.contains("Err(Error::")), "{name} expects no error");
    }
}

#[test]
fn every_contained_fault_is_provoked_on_target_and_its_report_read() {
    let cases = read("tests/image/src/cases/mod.rs");
    for row in ROWS {
        let Answer::Contained(name) = row.answer else { continue };
        let found = ["misuse", "removal"].into_iter().find_map(|file| {
            let source = read(format!("tests/image/src/cases/{file}.rs"));
            let text = function(&source, name)?.to_owned();
            assert!(cases.contains(&format!("\nmod {file};\n")));
            Some(text)
        });
        let text = found.unwrap_or_else(|| panic!("there is no test {name}"));
        // By real DMA, judged by the record and by what the report says.
        assert!(text.contains("provoke(") && text.contains("expect!"), "{name} provokes nothing");
        assert!(text.contains("site(") || text.contains("still_lent("), "{name} does not look for the call site");
    }
}

#[test]
fn the_table_in_the_architecture_is_the_one_of_the_tests() {
    let path = root().join("ARCHITECTURE.md");
    let text = read("ARCHITECTURE.md");
    let (before, rest) = text.split_once(MARKERS.0).expect("ARCHITECTURE.md has lost the mark before the table");
    let (old, after) = rest.split_once(MARKERS.1).expect("ARCHITECTURE.md has lost the mark after the table");
    let new = table();
    if old == new {
        return;
    }
    if std::env::var_os("SLUICE_BLESS").is_some_and(|value| !value.is_empty()) {
        fs::write(&path, format!("{before}{}{new}{}{after}", MARKERS.0, MARKERS.1)).unwrap();
        return;
    }
    panic!("the table is out of date: SLUICE_BLESS=1 cargo test -p tests --test misuse\n{new}");
}
