//! Running the selected tests and reporting them.

use crate::{DEFAULT_MACHINE, Outcome, Test};
use core::fmt::{self, Write};

/// Which tests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection<'a> {
    which: Which<'a>,
    from: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which<'a> {
    Machine(&'a str),
    Names(&'a str),
}

impl<'a> Selection<'a> {
    /// Reads the selection from the kernel's command line. Without one, all tests of the default machine run.
    pub fn from_command_line(line: &'a str) -> Self {
        let mut selection = Self { which: Which::Machine(DEFAULT_MACHINE), from: 0 };
        for word in line.split_ascii_whitespace() {
            if let Some(value) = word.strip_prefix("ktest=") {
                selection.which = value.strip_prefix('@').map_or(Which::Names(value), Which::Machine);
            } else if let Some(value) = word.strip_prefix("ktest.from=") {
                // A number that is none leaves nothing out: the host sees tests it did not ask for.
                selection.from = value.parse().unwrap_or(0);
            }
        }
        selection
    }

    fn includes<C: ?Sized>(&self, test: &Test<C>) -> bool {
        match self.which {
            Which::Machine(machine) => test.machine == machine,
            Which::Names(names) => names.split(',').any(|name| name == test.short_name()),
        }
    }
}

/// Runs the selected tests with `context` and reports each to `say`, which writes one line to the console. Returns whether
/// none failed.
pub fn run<C: ?Sized>(
    tests: &[Test<C>],
    context: &C,
    selection: Selection<'_>,
    mut say: impl FnMut(fmt::Arguments<'_>),
) -> bool {
    let selected = || tests.iter().filter(|test| selection.includes(test)).skip(selection.from);
    say(format_args!("##ktest registered {}", tests.len()));
    say(format_args!("##ktest plan {}", selected().count()));
    let mut passed = true;
    for test in selected() {
        let name = test.short_name();
        say(format_args!("##ktest start {name}"));
        match (test.run)(context) {
            Ok(()) => say(format_args!("##ktest ok {name}")),
            Err(Outcome::Failed(message)) => {
                passed = false;
                say(format_args!("##ktest fail {name} {}", OneLine(&message)));
            }
            Err(Outcome::Skipped(reason)) => say(format_args!("##ktest skip {name} {}", OneLine(&reason))),
        }
    }
    passed
}

/// A text written in one line.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\\' => f.write_str("\\\\")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}
