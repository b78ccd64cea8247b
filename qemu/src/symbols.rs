//! Addresses to functions and lines.

use anyhow::{Result, anyhow};
use object::{Object, ObjectSection, SectionKind};
use std::ops::Range;
use std::path::Path;

/// The symbols and line tables of an ELF.
pub struct Symbols {
    loader: addr2line::Loader,
    /// Where there is code.
    text: Vec<Range<u64>>,
    root: String,
}

impl std::fmt::Debug for Symbols {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Symbols").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Symbols {
    /// Loads the symbols of the ELF at `path`. Source files below `root` are shown relative to it.
    pub fn load(path: &Path, root: &Path) -> Result<Self> {
        let problem = |error: &dyn std::fmt::Display| anyhow!("{} has no readable symbols: {error}", path.display());
        let loader = addr2line::Loader::new(path).map_err(|error| problem(&error))?;
        let file = std::fs::read(path).map_err(|error| problem(&error))?;
        let parsed = object::File::parse(file.as_slice()).map_err(|error| problem(&error))?;
        let text = parsed
            .sections()
            .filter(|section| section.kind() == SectionKind::Text)
            .map(|section| section.address()..section.address().saturating_add(section.size()))
            .collect();
        Ok(Self { loader, text, root: format!("{}/", root.display()) })
    }

    /// Describes the instruction at `address` as `function at file:line`: the innermost function first, then
    /// those it was inlined into. An address where there is no code gives one line that says so.
    pub fn frame(&self, address: u64) -> Vec<String> {
        // Functions that the linker dropped still have tables, for addresses from 0 on.
        if !self.text.iter().any(|range| range.contains(&address)) {
            return vec![format!("{address:#018x}, which is no code of this image")];
        }
        let mut lines = Vec::new();
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let Some(name) = frame.function.as_ref().and_then(|function| function.raw_name().ok()) else {
                    continue;
                };
                let name = format!("{:#}", rustc_demangle::demangle(&name));
                lines.push(match frame.location.and_then(|place| Some((place.file?, place.line?))) {
                    Some((file, line)) => format!("{name} at {}:{line}", self.shortened(file)),
                    None => name,
                });
            }
        }
        if lines.is_empty() {
            lines.push(match self.loader.find_symbol(address) {
                Some(name) => format!("{:#}", rustc_demangle::demangle(name)),
                None => format!("{address:#018x}, which is in no function"),
            });
        }
        lines
    }

    /// Cuts what every path of its kind begins with: the workspace, the compiler's build directory, the registry.
    fn shortened<'a>(&self, file: &'a str) -> &'a str {
        if let Some(rest) = file.strip_prefix(&self.root) {
            return rest;
        }
        if file.starts_with("/rustc/")
            && let Some(at) = file.find("/library/")
        {
            return &file[at + 1..];
        }
        if let Some((_, rest)) = file.split_once("/registry/src/") {
            return rest.split_once('/').map_or(rest, |(_, rest)| rest);
        }
        file
    }
}

/// A backtrace under construction: numbers the frames of one run of `##pc` lines.
#[derive(Debug, Default)]
pub struct Backtrace {
    frames: usize,
}

impl Backtrace {
    /// Describes the next frame in lines ready to print. Without symbols the address must do.
    pub fn frame(&mut self, symbols: Option<&Symbols>, address: u64) -> Vec<String> {
        let number = self.frames;
        self.frames += 1;
        let lines = symbols.map_or_else(|| vec![format!("{address:#018x}")], |symbols| symbols.frame(address));
        let numbered = |(place, line): (usize, String)| match place {
            0 => format!("{number:>3}: {line}"),
            _ => format!("     {line}"),
        };
        lines.into_iter().enumerate().map(numbered).collect()
    }

    /// Ends the backtrace; the next frame is number 0 again.
    pub fn end(&mut self) {
        self.frames = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::ObjectSymbol;

    #[test]
    fn functions_of_this_very_test_are_found() {
        let program = std::env::current_exe().unwrap();
        let symbols = Symbols::load(&program, crate::firmware::workspace()).unwrap();
        let file = std::fs::read(&program).unwrap();
        let parsed = object::File::parse(file.as_slice()).unwrap();
        let is_landmark =
            |symbol: &object::Symbol<'_, '_>| symbol.name().is_ok_and(|name| name.contains("7symbols5tests8landmark"));
        let address = parsed.symbols().find(is_landmark).expect("the landmark has a symbol").address();
        std::hint::black_box(landmark as fn(u64) -> u64);
        let lines = symbols.frame(address);
        let found = lines.iter().any(|line| line.starts_with("qemu::symbols::tests::landmark at qemu/src/symbols.rs:"));
        assert!(found, "{lines:?}");
        assert!(symbols.frame(1)[0].contains("no code of this image"));
    }

    #[inline(never)]
    fn landmark(value: u64) -> u64 {
        std::hint::black_box(value).rotate_left(5) ^ 0x5bd1
    }

    #[test]
    fn frames_are_numbered_from_zero_in_each_backtrace() {
        let mut backtrace = Backtrace::default();
        assert_eq!(backtrace.frame(None, 0x10), ["  0: 0x0000000000000010"]);
        assert_eq!(backtrace.frame(None, 0x20), ["  1: 0x0000000000000020"]);
        backtrace.end();
        assert_eq!(backtrace.frame(None, 0x30), ["  0: 0x0000000000000030"]);
    }

    #[test]
    fn an_unreadable_file_is_an_error_that_names_it() {
        let error = Symbols::load(Path::new("/nonexistent/elf"), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/elf"));
    }
}
