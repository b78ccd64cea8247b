//! The runner as a program: what `cargo run` runs.

use anyhow::{Context, Result, bail};
use qemu::firmware::workspace;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Returns the path of the runner, built if it is not up to date.
pub fn program() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}"))).clone()
}

fn build() -> Result<PathBuf> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--package", "qemu", "--bin", "qemu", "--message-format", "json-render-diagnostics"])
        .current_dir(workspace())
        .stdin(Stdio::null())
        .output()
        .context("cargo cannot be started")?;
    if !output.status.success() {
        bail!("the runner does not build:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut executables = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "qemu").then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executables.next_back().context("cargo built no runner")
}

/// What a run of the runner came to.
#[derive(Debug)]
pub struct Ran {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output: the kernel's console.
    pub stdout: String,
    /// Its standard error: the runner's own words.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs the runner with these arguments and nothing on its standard input. The QEMU is that of [`crate::emulator`] unless
/// the arguments name another.
pub fn run(arguments: &[&str]) -> Result<Ran, String> {
    let mut command = Command::new(program()?);
    if let Ok(emulator) = crate::emulator()
        && !arguments.contains(&"--qemu")
    {
        command.arg("--qemu").arg(emulator.program);
    }
    finish(command.args(arguments))
}

/// Runs the runner with nothing but these arguments, which start no machine.
pub fn run_bare(arguments: &[&str]) -> Result<Ran, String> {
    finish(Command::new(program()?).args(arguments))
}

fn finish(command: &mut Command) -> Result<Ran, String> {
    command.current_dir(workspace()).stdin(Stdio::null());
    Ok(command.output().map_err(|error| error.to_string())?.into())
}
