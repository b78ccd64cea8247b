//! Builds the crate `user` for the target and puts its programs where `lib.rs` includes them from.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn main() {
    let variable = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}")));
    let (here, out) = (variable("CARGO_MANIFEST_DIR"), variable("OUT_DIR"));
    let workspace = here.ancestors().nth(2).expect("platform/programs lies in the workspace");
    for watched in ["platform/user", "platform/painting", "kernel/abi", "Cargo.lock", ".cargo/config.toml"] {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("none") {
        return;
    }
    let target = std::env::var("TARGET").expect("cargo sets TARGET");
    // In a folder of its own: the outer cargo has the lock of the other.
    let folder = out.join("user");
    let mut command = Command::new(variable("CARGO"));
    command
        .args(["build", "--quiet", "--release", "--package", "user", "--bins", "--target", &target, "--target-dir"])
        .arg(&folder)
        // The file is what the kernel carries: no debugging information.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        // Cargo asks rustc things by its standard input, and leaves it what it has itself, which may be anything.
        .stdin(Stdio::null())
        .current_dir(workspace);
    // What the outer cargo has set for this script is not meant for others; a wrapper (clippy's) would not link.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CFG_", "CARGO_FEATURE_", "DEP_"];
        if own.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    for name in
        ["RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "TARGET", "RUSTDOCFLAGS"]
    {
        command.env_remove(name);
    }
    let status = command.status().expect("cargo can be started");
    assert!(status.success(), "the programs cannot be built");
    let built = folder.join(&target).join("release");
    for name in programs(workspace) {
        std::fs::copy(built.join(&name), out.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// The names of the programs: those of their sources.
fn programs(workspace: &Path) -> Vec<String> {
    let sources = std::fs::read_dir(workspace.join("platform/user/src/bin")).expect("the programs' sources");
    let stems = sources.filter_map(|entry| entry.ok()?.path().file_stem()?.to_str().map(String::from));
    stems.collect()
}
