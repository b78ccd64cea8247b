//! One line that says what is going on.
//!
//! On a terminal the line is rewritten in place and wiped before anything else is printed; elsewhere each new text is a
//! plain line of its own. It goes to standard error, so that standard output carries the kernel's console and nothing
//! else.

use std::io::{IsTerminal, Write};

/// Where the progress line goes.
#[derive(Debug)]
pub struct Progress {
    style: Style,
    shown: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Style {
    Rewritten,
    Plain,
    Silent,
}

impl Progress {
    /// Creates a progress line on standard error.
    pub fn new() -> Self {
        let style = if std::io::stderr().is_terminal() { Style::Rewritten } else { Style::Plain };
        Self { style, shown: String::new() }
    }

    /// Creates a progress line that shows nothing, for test harnesses.
    pub fn silent() -> Self {
        Self { style: Style::Silent, shown: String::new() }
    }

    /// Shows a step of the work.
    pub fn step(&mut self, text: &str) {
        if text == self.shown {
            return;
        }
        match self.style {
            // Cut to 78 columns: a line that wraps cannot be rewritten.
            Style::Rewritten => eprint!("\r\x1b[K{}", text.chars().take(78).collect::<String>()),
            Style::Plain => eprintln!("{text}"),
            Style::Silent => {}
        }
        self.shown = text.to_string();
        // Progress is decoration: if standard error is gone there is nobody to tell.
        let _ = std::io::stderr().flush();
    }

    /// Shows a detail of the current step, where it can replace the line; elsewhere details would be a scroll of noise.
    pub fn detail(&mut self, text: &str) {
        if self.style == Style::Rewritten {
            self.step(text);
        }
    }

    /// Wipes the line, so that something else can be printed.
    pub fn clear(&mut self) {
        if self.style == Style::Rewritten && !self.shown.is_empty() {
            eprint!("\r\x1b[K");
            let _ = std::io::stderr().flush();
        }
        self.shown.clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
