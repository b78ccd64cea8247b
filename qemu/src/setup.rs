//! Finds or installs what is missing: the Rust target and QEMU.
//!
//! Nothing is installed silently. As root, or with `--yes`, the system's package manager is run and its command is shown;
//! otherwise the one command to type is printed.

use crate::emulator::{Emulator, PROGRAM};
use crate::progress::Progress;
use anyhow::{Context, Result, anyhow, bail};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target the kernel is built for.
pub const TARGET: &str = "aarch64-unknown-none";

/// How a system installs QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackageManager {
    /// The program that shows which system this is.
    program: &'static str,
    /// Brings the package lists up to date, where that is a step of its own.
    refresh: Option<&'static [&'static str]>,
    install: &'static [&'static str],
    /// What else `--gui` needs.
    window: &'static [&'static str],
}

const PACKAGE_MANAGERS: [PackageManager; 4] = [
    PackageManager {
        program: "apt-get",
        refresh: Some(&["apt-get", "update"]),
        install: &["apt-get", "install", "-y", "--no-install-recommends", "qemu-system-arm"],
        window: &["qemu-system-gui"],
    },
    PackageManager {
        program: "dnf",
        refresh: None,
        install: &["dnf", "install", "-y", "qemu-system-aarch64-core", "qemu-device-display-virtio-gpu-pci"],
        window: &["qemu-ui-gtk"],
    },
    PackageManager {
        program: "pacman",
        refresh: None,
        install: &["pacman", "-Sy", "--noconfirm", "qemu-system-aarch64", "qemu-hw-display-virtio-gpu-pci"],
        window: &["qemu-ui-gtk"],
    },
    PackageManager {
        program: "zypper",
        refresh: None,
        install: &["zypper", "--non-interactive", "install", "qemu-arm", "qemu-hw-display-virtio-gpu-pci"],
        window: &["qemu-ui-gtk"],
    },
];

impl PackageManager {
    /// Returns the one line that installs QEMU by hand, for `root` or for somebody who needs sudo.
    pub fn command_line(&self, root: bool, window: bool) -> String {
        let sudo = if root { "" } else { "sudo " };
        let mut line = match self.refresh {
            Some(refresh) => format!("{sudo}{} && {sudo}{}", refresh.join(" "), self.install.join(" ")),
            None => format!("{sudo}{}", self.install.join(" ")),
        };
        if window {
            line = format!("{line} {}", self.window.join(" "));
        }
        line
    }
}

/// Finds QEMU, or installs it where that is allowed.
///
/// `explicit` is a path the user gave: then that one is used and nothing is installed. `window` asks for the packages that
/// open a window too. Fails with the command to type.
pub fn emulator(explicit: Option<&Path>, yes: bool, window: bool, progress: &mut Progress) -> Result<Emulator> {
    if let Some(program) = explicit {
        return Emulator::inspect(program);
    }
    if let Some(program) = find_in_path(PROGRAM) {
        return Emulator::inspect(&program);
    }
    let Some(manager) = PACKAGE_MANAGERS.iter().find(|manager| find_in_path(manager.program).is_some()) else {
        bail!(
            "{PROGRAM} is missing, and no known package manager was found; install QEMU 7.2 or newer, or give --qemu PATH"
        );
    };
    let prefix: &[&str] = match (is_root(), yes, find_in_path("sudo").is_some()) {
        (true, _, _) => &[],
        (false, true, true) => &["sudo"],
        _ => bail!("{PROGRAM} is missing; install it with:\n  {}", manager.command_line(is_root(), window)),
    };
    progress.clear();
    eprintln!("{PROGRAM} is missing; installing it with {}", manager.program);
    if let Some(refresh) = manager.refresh {
        progress.step("updating the package lists");
        run_quietly(&[prefix, refresh].concat()).map_err(|error| by_hand(&error, manager, window))?;
    }
    progress.step("installing QEMU");
    let packages: &[&str] = if window { manager.window } else { &[] };
    run_quietly(&[prefix, manager.install, packages].concat()).map_err(|error| by_hand(&error, manager, window))?;
    match find_in_path(PROGRAM) {
        Some(program) => Emulator::inspect(&program),
        None => bail!("the package manager succeeded, yet {PROGRAM} is not in PATH; give it with --qemu PATH"),
    }
}

fn by_hand(error: &anyhow::Error, manager: &PackageManager, window: bool) -> anyhow::Error {
    anyhow!("{error:#}\ninstalling {PROGRAM} failed; try by hand:\n  {}", manager.command_line(is_root(), window))
}

/// Adds the kernel's target to the active toolchain if its libraries are missing.
pub fn rust_target(workspace: &Path, progress: &mut Progress) -> Result<()> {
    let libraries = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", TARGET])
        .current_dir(workspace)
        .stdin(Stdio::null())
        .output()
        .context("rustc cannot be started; install Rust with rustup")?;
    let directory = PathBuf::from(String::from_utf8_lossy(&libraries.stdout).trim());
    if libraries.status.success() && directory.is_dir() {
        return Ok(());
    }
    progress.step(&format!("adding the Rust target {TARGET}"));
    let added = Command::new("rustup")
        .args(["target", "add", TARGET])
        .current_dir(workspace)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("the Rust target {TARGET} is missing and there is no rustup to add it"))?;
    if !added.status.success() {
        let reason = String::from_utf8_lossy(&added.stderr);
        bail!("the Rust target is missing, and `rustup target add {TARGET}` failed:\n{}", reason.trim_end());
    }
    Ok(())
}

/// Runs a command and shows its output only if it fails.
fn run_quietly(command: &[&str]) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else { bail!("no command to run") };
    let mut child = Command::new(program);
    // sudo asks on the terminal itself, so standard input stays.
    child.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let output = child.output().with_context(|| format!("{program} cannot be started"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed:\n{}", command.join(" "), text.trim_end());
    }
    Ok(())
}

/// Finds a program in `PATH`.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| {
        candidate.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

/// Returns whether this process runs as root; `false` where that cannot be told.
fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_to_type_is_one_line() {
        for manager in PACKAGE_MANAGERS {
            let line = manager.command_line(false, true);
            assert!(line.starts_with("sudo ") && !line.contains('\n'), "{line}");
            assert!(manager.install.contains(&manager.install[0]) && line.contains(manager.window[0]), "{line}");
        }
        assert_eq!(
            PACKAGE_MANAGERS[0].command_line(false, false),
            "sudo apt-get update && sudo apt-get install -y --no-install-recommends qemu-system-arm"
        );
        assert!(!PACKAGE_MANAGERS[0].command_line(true, false).contains("sudo"));
    }

    #[test]
    fn programs_are_found_only_where_they_can_be_run() {
        assert!(find_in_path("sh").is_some());
        assert!(find_in_path("no-such-program-anywhere").is_none());
    }

    #[test]
    fn a_failing_command_shows_its_output() {
        let error = run_quietly(&["sh", "-c", "echo because; exit 3"]).unwrap_err();
        assert!(format!("{error:#}").contains("because"), "{error:#}");
        assert!(run_quietly(&["no-such-program-anywhere"]).is_err());
        assert!(run_quietly(&["true"]).is_ok());
    }
}
