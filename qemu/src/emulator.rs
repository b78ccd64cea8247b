//! Which QEMU this is, and what it can do.
//!
//! The version decides where a version's behaviour is known; where distributions differ, QEMU itself is asked.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program's name.
pub const PROGRAM: &str = "qemu-system-aarch64";

/// A QEMU release: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The oldest release that is supported.
    pub const OLDEST: Self = Self(7, 2, 0);

    /// Reads the first line of `--version`.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
        let mut parts = word.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
        Some(Self(parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A QEMU that can be started.
#[derive(Debug, Clone)]
pub struct Emulator {
    /// The program.
    pub program: PathBuf,
    /// Its version.
    pub version: Version,
    /// Whether virtio devices have `x-max-bounce-buffer-size`. Where it is 0, a device that touches memory it was not
    /// lent fails; otherwise QEMU quietly lends it a page of zeros first.
    pub bounce_buffer_limit: bool,
}

impl Emulator {
    /// Asks the program at `program` what it is. Fails if it cannot be started, is no QEMU, or is older than
    /// [`Version::OLDEST`].
    pub fn inspect(program: &Path) -> Result<Self> {
        let output = answer(program, ["--version"])
            .with_context(|| format!("{} cannot be started; give another with --qemu PATH", program.display()))?;
        let Some(version) = output.lines().find_map(Version::parse) else {
            bail!("{} does not say it is QEMU; give another with --qemu PATH", program.display());
        };
        if version < Version::OLDEST {
            bail!("{} is QEMU {version}; at least {} is needed", program.display(), Version::OLDEST);
        }
        let properties = answer(program, ["-M", "virt", "-device", "virtio-blk-pci,help"])?;
        let bounce_buffer_limit = properties.contains("x-max-bounce-buffer-size");
        Ok(Self { program: program.to_path_buf(), version, bounce_buffer_limit })
    }

    /// Returns whether this QEMU has a device model of that name. The list of all devices leaves some out, so the
    /// model itself is asked for its options; a model that does not exist is no error to QEMU, only an answer without them.
    pub fn has_device(&self, name: &str) -> Result<bool> {
        let answer = answer(&self.program, ["-M", "virt", "-device", &format!("{name},help")])?;
        Ok(answer.contains(&format!("{name} options:")))
    }

    /// Returns whether this QEMU's machine `virt` has an option of that name.
    pub fn has_machine_option(&self, name: &str) -> Result<bool> {
        let answer = answer(&self.program, ["-M", "virt,help"])?;
        Ok(answer.lines().any(|line| line.trim_start().strip_prefix(name).is_some_and(|rest| rest.starts_with('='))))
    }

    /// Returns whether this QEMU can make the machine `machine`, a type with options. It is made, and does not run.
    pub fn can_be(&self, machine: &str) -> Result<bool> {
        self.makes(machine, &[])
    }

    /// Returns whether this QEMU can add `device`, with options, to the machine `machine`. Some that it explains it does not add.
    pub fn can_have(&self, machine: &str, device: &str) -> Result<bool> {
        self.makes(machine, &["-device", device])
    }

    fn makes(&self, machine: &str, arguments: &[&str]) -> Result<bool> {
        // A file of our own: QEMU puts a new one in the place of whatever has the name, a device like /dev/null too.
        let directory = tempfile::tempdir()?;
        let tree = directory.path().join("tree.dtb");
        let mut command = Command::new(&self.program);
        command.args(["-M", &format!("{machine},dumpdtb={}", tree.display()), "-nodefaults", "-display", "none"]);
        let made = command.args(arguments).stdin(Stdio::null()).output();
        Ok(made.with_context(|| format!("{} cannot be started", self.program.display()))?.status.success())
    }

    /// Returns the name of a display backend that opens a window, if there is one.
    pub fn window(&self) -> Result<Option<&'static str>> {
        let list = answer(&self.program, ["-display", "help"])?;
        Ok(["gtk", "sdl", "cocoa"].into_iter().find(|name| list.lines().any(|line| line.trim() == *name)))
    }
}

/// Runs the program and returns what it printed, on either stream.
fn answer<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &Path, arguments: I) -> Result<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_distributions_are_read() {
        let read = |text: &str| Version::parse(&format!("QEMU emulator version {text}"));
        assert_eq!(read("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"), Some(Version(7, 2, 22)));
        assert_eq!(read("10.0.2"), Some(Version(10, 0, 2)));
        assert_eq!(read("11.0"), Some(Version(11, 0, 0)));
        assert_eq!(read("11.0.50-dirty"), Some(Version(11, 0, 50)));
        assert_eq!(read("unknown"), None);
        assert_eq!(Version::parse("qemu-img version 7.2.22"), None);
    }

    #[test]
    fn versions_order_by_number_and_not_by_text() {
        assert!(Version(7, 2, 22) < Version(10, 0, 2));
        assert!(Version(9, 2, 0) < Version(9, 10, 0));
    }

    #[test]
    fn a_program_that_is_not_qemu_is_refused() {
        let error = Emulator::inspect(Path::new("/bin/true")).unwrap_err();
        assert!(format!("{error:#}").contains("does not say it is QEMU"), "{error:#}");
        let error = Emulator::inspect(Path::new("/nonexistent/qemu")).unwrap_err();
        assert!(format!("{error:#}").contains("--qemu PATH"), "{error:#}");
    }
}
