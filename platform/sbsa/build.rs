//! Links the hand-over with its script.

use std::path::PathBuf;

fn main() {
    let start = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let script = start.ancestors().map(|dir| dir.join("linker/sbsa.ld")).find(|script| script.is_file());
    let script = script.expect("no linker/sbsa.ld above the package");
    let script = script.display();
    println!("cargo:rerun-if-changed={script}");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        println!("cargo:rustc-link-arg-bins=-T{script}");
    }
}
