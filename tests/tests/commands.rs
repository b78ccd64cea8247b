//! The command line, as a user meets it. Nothing here boots.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use tests::runner::{self, Ran};

/// Runs the runner with nothing but these arguments.
fn run(arguments: &[&str]) -> Ran {
    Command::new(runner::program().unwrap()).args(arguments).stdin(Stdio::null()).output().unwrap().into()
}

#[test]
fn help_explains_every_option() {
    for arguments in [&["--help"][..], &["demo", "--help"]] {
        let ran = run(arguments);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        for option in [
            "--topology",
            "--disk",
            "--picture",
            "--screenshot",
            "--gui",
            "--smp",
            "--memory",
            "--cpu",
            "--qemu",
            "--icount",
            "--trace",
            "--append",
            "--timeout",
            "--yes",
            "QEMU ARGUMENTS",
            "Exit codes",
            "124",
        ] {
            assert!(ran.stdout.contains(option), "{arguments:?} does not explain {option}:\n{}", ran.stdout);
        }
    }
}

#[test]
fn usage_errors_exit_with_2_and_name_the_fault() {
    for (arguments, fault) in [
        (&["--no-such-option"][..], "--no-such-option"),
        (&["--smp", "0"], "0"),
        (&["--smp", "many"], "many"),
        (&["--memory", "0M"], "memory"),
        (&["--memory", "plenty"], "plenty"),
        (&["--trace", "smmuv3_*"], "PATTERN=FILE"),
        (&["--timeout", "0"], "0"),
        (&["--timeout", "soon"], "soon"),
        (&["demon"], "demon"),
        (&["--topology", "gicv9"], "cargo run -- topologies"),
        (&["matrix", "--qemu", "/nonexistent/qemu"], "--qemu PATH"),
        (&["--disk"], "--disk"),
        (&["--disk", "/nonexistent/disk.img"], "/nonexistent/disk.img"),
        (&["--disk", "/"], "directory"),
        (&["--screenshot", "/nonexistent/screen.png"], "/nonexistent"),
        (&["--screenshot", "/"], "directory"),
        (&["--qemu", "/nonexistent/qemu"], "--qemu PATH"),
        (&["--qemu", "/bin/true"], "does not say it is QEMU"),
    ] {
        let ran = run(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {ran:?}");
        assert!(ran.stderr.contains(fault), "{arguments:?} does not name {fault}:\n{}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{ran:?}");
    }
}

/// A directory with nothing in it but stand-ins: each named program, which does what `text` says.
fn path_of(programs: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in programs {
        let program = directory.path().join(name);
        std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    directory
}

/// Runs the runner with only `path` to find programs in, as a user who is not root; `None` where that cannot be arranged.
fn run_as_user(path: &Path, arguments: &[&str]) -> Option<Ran> {
    use std::os::unix::fs::MetadataExt;
    let root = std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0);
    let program = runner::program().unwrap();
    let mut command = if root {
        // An ordinary user may not enter root's folders: run a copy.
        let copy = path.join("runner");
        std::fs::copy(&program, &copy).unwrap();
        // Stand-ins that install something write into it.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        let setpriv = qemu::setup::find_in_path("setpriv")?;
        let mut command = Command::new(setpriv);
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(copy);
        command
    } else {
        Command::new(program)
    };
    Some(command.args(arguments).env("PATH", path).current_dir("/").stdin(Stdio::null()).output().unwrap().into())
}

#[test]
fn without_qemu_an_ordinary_user_gets_the_one_command_to_type() {
    for (manager, command) in [
        ("apt-get", "sudo apt-get update && sudo apt-get install -y --no-install-recommends qemu-system-arm"),
        ("dnf", "sudo dnf install -y qemu-system-aarch64-core"),
        ("pacman", "sudo pacman -Sy --noconfirm qemu-system-aarch64"),
        ("zypper", "sudo zypper --non-interactive install qemu-arm"),
    ] {
        let path = path_of(&[(manager, "echo 'the package manager was run' >&2; exit 1")]);
        let Some(ran) = run_as_user(path.path(), &[]) else { return };
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.contains("qemu-system-aarch64 is missing"), "{ran:?}");
        assert!(ran.stderr.contains(command), "{ran:?}");
        assert!(!ran.stderr.contains("was run"), "{ran:?}");
    }
}

#[test]
fn without_qemu_and_package_manager_the_way_out_is_said() {
    let Some(ran) = run_as_user(path_of(&[]).path(), &[]) else { return };
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("--qemu PATH"), "{ran:?}");
}

#[test]
fn with_yes_the_package_manager_is_run_and_qemu_is_then_used() {
    // The stand-in for sudo runs what it is told; that for apt-get "installs" a program that is no QEMU.
    let path = path_of(&[
        ("sudo", "exec \"$@\""),
        ("apt-get", "case $1 in install) ln -s /bin/true \"${0%/*}/qemu-system-aarch64\";; esac"),
    ]);
    symlink("/bin/ln", path.path().join("ln")).unwrap();
    let Some(ran) = run_as_user(path.path(), &["--yes"]) else { return };
    assert!(ran.stderr.contains("installing it with apt-get"), "{ran:?}");
    assert!(ran.stderr.contains("qemu-system-aarch64 does not say it is QEMU"), "{ran:?}");
    assert_eq!(ran.code, Some(2), "{ran:?}");
}

#[test]
fn a_failed_installation_shows_why_and_what_to_type() {
    let path = path_of(&[("sudo", "exec \"$@\""), ("apt-get", "echo 'no network' >&2; exit 100")]);
    let Some(ran) = run_as_user(path.path(), &["--yes"]) else { return };
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("no network") && ran.stderr.contains("sudo apt-get install"), "{ran:?}");
}
