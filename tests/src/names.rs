//! The names of the on-target tests, read from the ELF without booting it.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::path::Path;

/// The section with the names; see the crate `ktest`.
const SECTION: &str = ".ktest_names";

/// A test of the image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OnTarget {
    /// Its name as reported: modules and function.
    pub name: String,
    /// The machine it needs.
    pub machine: String,
}

/// Reads the tests of the image from its ELF, sorted by name.
pub fn read(elf: &Path) -> Result<Vec<OnTarget>> {
    let bytes = std::fs::read(elf).with_context(|| format!("{} cannot be read", elf.display()))?;
    let file = object::File::parse(bytes.as_slice()).with_context(|| format!("{} is no ELF", elf.display()))?;
    let Some(section) = file.section_by_name(SECTION) else {
        bail!("{} has no section {SECTION}: it registers no test, or the linker script drops them", elf.display());
    };
    parse(section.data().context("the section with the names cannot be read")?)
}

/// Reads records of `crate::module::function`, a zero byte, a machine and a newline. Zero bytes between records are
/// padding.
fn parse(bytes: &[u8]) -> Result<Vec<OnTarget>> {
    let text = std::str::from_utf8(bytes).context("the names are not text")?;
    let mut tests = Vec::new();
    for record in text.split('\n').map(|record| record.trim_start_matches('\0')).filter(|record| !record.is_empty()) {
        let Some((name, machine)) = record.split_once('\0') else { bail!("the record {record:?} names no machine") };
        let Some((_, name)) = name.split_once("::") else { bail!("the name {name:?} has no crate") };
        tests.push(OnTarget { name: name.to_string(), machine: machine.to_string() });
    }
    tests.sort();
    if let Some(pair) = tests.windows(2).find(|pair| pair[0].name == pair[1].name) {
        bail!("two tests are named {}", pair[0].name);
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_and_sorted() {
        let tests = parse(b"image::b::two\0smp8\n\0\0image::a::one\0default\n\0").unwrap();
        let expected = [("a::one", "default"), ("b::two", "smp8")];
        assert!(tests.iter().map(|test| (test.name.as_str(), test.machine.as_str())).eq(expected), "{tests:?}");
        assert!(parse(b"").unwrap().is_empty());
    }

    #[test]
    fn records_that_make_no_sense_are_errors() {
        for bad in [&b"image::a\n"[..], b"a\0default\n", b"i::a\0x\ni::a\0y\n", b"\xff\0x\n"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_elf_without_names_is_an_error_that_says_so() {
        let error = read(&std::env::current_exe().unwrap()).unwrap_err();
        assert!(error.to_string().contains(SECTION), "{error}");
    }
}
