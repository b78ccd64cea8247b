//! Links the image with the board's script. Scripts come from here and not from `rustflags`, because an exported `RUSTFLAGS`
//! would silently drop those. Another binary for this board uses the same file: `build = "../../platform/virt/build.rs"`.

use std::path::PathBuf;

fn main() {
    // `cargo` runs this in the folder of the package that is built, at some depth below the workspace.
    let start = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let linker = start.ancestors().map(|dir| dir.join("linker")).find(|dir| dir.join("virt.ld").is_file());
    let linker = linker.expect("no linker/virt.ld above the package");
    let linker = linker.display();
    println!("cargo:rerun-if-changed={linker}/virt.ld");
    println!("cargo:rerun-if-changed={linker}/sections.ld");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        println!("cargo:rustc-link-arg-bins=-L{linker}");
        println!("cargo:rustc-link-arg-bins=-T{linker}/virt.ld");
    }
}
