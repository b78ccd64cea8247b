//! The floors of the house: who may name whom, where unsafe code may live, and where assembly may.
//!
//! Arrows are read from `cargo metadata`; the rest from the sources.

use qemu::firmware::workspace;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whom each crate of the workspace may name. Every crate must stand here.
const ARROWS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("iommu", &["base"]),
    ("dma", &["base", "iommu"]),
    ("kernel", &["base", "dma", "iommu"]),
    ("abi", &[]),
    ("process", &["abi", "base", "dma", "iommu"]),
    // What runs at EL0 knows the system calls, what it is to draw, and nothing else of the kernel.
    ("user", &["abi", "painting"]),
    ("painting", &[]),
    ("programs", &[]),
    ("arch", &["base"]),
    ("gic", &["base", "arch", "iommu"]),
    ("pci", &["base", "arch", "iommu"]),
    ("smmuv3", &["base", "arch", "iommu"]),
    ("virtio", &["base", "arch", "dma", "iommu", "pci"]),
    ("testdev", &["base", "arch", "dma", "iommu", "pci"]),
    (
        "board",
        &[
            "abi", "base", "arch", "dma", "gic", "iommu", "kernel", "painting", "pci", "process", "smmuv3", "testdev",
            "virtio",
        ],
    ),
    (
        "virt",
        &["base", "arch", "board", "dma", "gic", "iommu", "kernel", "pci", "programs", "smmuv3", "testdev", "virtio"],
    ),
    ("ktest", &[]),
    (
        "test-image",
        &[
            "abi", "base", "arch", "board", "dma", "gic", "iommu", "kernel", "ktest", "pci", "process", "programs",
            "smmuv3", "testdev", "virt", "virtio",
        ],
    ),
    (
        "bench-image",
        &["base", "arch", "board", "dma", "iommu", "kernel", "ktest", "pci", "smmuv3", "testdev", "virt", "virtio"],
    ),
    ("sbsa", &[]),
    // The runner reads device trees as the kernel does (`describe`), knows what the second board's flash holds, and what the show draws.
    ("qemu", &["kernel", "painting", "sbsa"]),
    ("tests", &["qemu"]),
    // Written so that a crate that is added without a thought about its place is noticed.
    ("", &[]),
];

/// A crate of the workspace.
struct Member {
    name: String,
    folder: PathBuf,
    /// The workspace's crates it names, for building and for its own tests.
    names: BTreeSet<(String, bool)>,
}

fn members() -> Vec<Member> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(workspace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    packages
        .iter()
        .map(|package| Member {
            name: text(&package["name"]),
            folder: Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_path_buf(),
            names: package["dependencies"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|dependency| dependency["path"].is_string())
                .map(|dependency| (text(&dependency["name"]), dependency["kind"] == "dev"))
                .collect(),
        })
        .collect()
}

/// Returns the Rust files below a folder, with their contents, without those of crates nested in it.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if !path.join("Cargo.toml").exists() && path.file_name().unwrap() != "target" {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// Returns a source without its comments, so that a word in prose is not taken for code.
fn code(source: &str) -> String {
    source.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// Returns whether `word` stands in `text` as a word of its own.
fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|part| part == word)
}

/// Tells which arrow, if any, is not allowed.
fn forbidden_arrow(name: &str, named: &str, for_tests: bool, arrows: &BTreeMap<&str, &[&str]>, kernel: bool) -> bool {
    let Some(allowed) = arrows.get(name) else { return true };
    // For its own tests a crate of the platform may use any other; policy may not: its tests know no hardware either.
    let usable_in_tests =
        arrows.contains_key(named) && !["virt", "test-image", "bench-image", "tests"].contains(&named);
    let allowed_in_tests = for_tests && !kernel && usable_in_tests;
    // A crate's own tests may want it with other features.
    let itself = for_tests && name == named;
    !allowed.contains(&named) && !allowed_in_tests && !itself
}

#[test]
fn dependencies_point_down_only() {
    let arrows = ARROWS.iter().copied().collect::<BTreeMap<_, _>>();
    let mut wrong = Vec::new();
    for member in members() {
        if !arrows.contains_key(member.name.as_str()) {
            wrong.push(format!("{} has no place: add it to the arrows", member.name));
            continue;
        }
        let kernel = member.folder.starts_with(workspace().join("kernel"));
        for (named, for_tests) in &member.names {
            if forbidden_arrow(&member.name, named, *for_tests, &arrows, kernel) {
                wrong.push(format!("{} must not name {named}", member.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_arrows_themselves_have_no_cycle() {
    // With every arrow pointing to a crate that stands earlier when sorted by what it may name, there is none.
    let arrows = ARROWS.iter().copied().collect::<BTreeMap<_, _>>();
    let mut placed = BTreeSet::new();
    while placed.len() < arrows.len() {
        let ready: Vec<&str> = arrows
            .iter()
            .filter(|(name, below)| !placed.contains(*name) && below.iter().all(|other| placed.contains(other)))
            .map(|(name, _)| *name)
            .collect();
        assert!(!ready.is_empty(), "a cycle among the crates that are not in {placed:?}");
        placed.extend(ready);
    }
}

#[test]
fn a_wrong_arrow_is_seen() {
    let arrows = ARROWS.iter().copied().collect::<BTreeMap<_, _>>();
    for (name, named, for_tests, kernel) in [
        ("kernel", "smmuv3", false, true),
        ("kernel", "smmuv3", true, true),
        ("virtio", "kernel", false, false),
        ("base", "dma", false, true),
        ("board", "virt", true, false),
        ("newcomer", "base", false, false),
    ] {
        assert!(forbidden_arrow(name, named, for_tests, &arrows, kernel), "{name} -> {named}");
    }
    assert!(!forbidden_arrow("virtio", "dma", false, &arrows, false));
    assert!(!forbidden_arrow("virtio", "smmuv3", true, &arrows, false));
}

#[test]
fn the_kernel_reaches_for_nothing_of_the_platform() {
    let mut wrong = Vec::new();
    for member in members().iter().filter(|member| member.folder.starts_with(workspace().join("kernel"))) {
        for (path, text) in sources(&member.folder) {
            let code = code(&text);
            // Dependencies are looked at above; these are the ways around them.
            for way in ["extern crate arch", "platform/", "aarch64_cpu::", "tock_registers::", "arm_gic::"] {
                if code.contains(way) {
                    wrong.push(format!("{}: {way}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn assembly_is_written_in_arch_in_hand_overs_and_in_programs_only() {
    let mut wrong = Vec::new();
    // A hand-over runs where the kernel's code for the processor never does: at EL3; programs at EL0.
    for member in members().iter().filter(|member| !["arch", "sbsa", "tests", "user"].contains(&member.name.as_str())) {
        for (path, text) in sources(&member.folder) {
            let code = code(&text);
            if ["asm", "global_asm", "naked_asm"]
                .iter()
                .any(|word| has_word(&code, word) && code.contains(&format!("{word}!")))
            {
                wrong.push(path.display().to_string());
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Returns the root files of a crate's library and binary.
fn roots(folder: &Path) -> Vec<String> {
    ["src/lib.rs", "src/main.rs"].iter().filter_map(|root| fs::read_to_string(folder.join(root)).ok()).collect()
}

#[test]
fn crates_without_unsafe_code_forbid_it() {
    let mut wrong = Vec::new();
    // The crate `kernel` forbids it module by module, as few of its modules may have some; what `ktest!` expands to in the
    // test image places names in a section, which counts as unsafe.
    for member in members().into_iter().filter(|member| !["kernel", "test-image"].contains(&member.name.as_str())) {
        let sources = sources(&member.folder.join("src"));
        let code: String = sources.iter().map(|(_, text)| code(text)).collect();
        let without = code.replace("unsafe_code", "");
        // A crate without a function has nothing to forbid.
        if has_word(&without, "unsafe") || !has_word(&code, "fn") {
            continue;
        }
        if !roots(&member.folder)
            .iter()
            .all(|root| root.contains("#![forbid(unsafe_code)]") || !has_word(root, "fn") && !root.contains("mod "))
        {
            wrong.push(member.name);
        }
    }
    assert!(wrong.is_empty(), "these crates need no unsafe code and must forbid it: {wrong:#?}");
}

#[test]
fn the_iommu_crate_declares_unsafe_contracts_and_does_nothing_unsafe() {
    for (path, text) in sources(&workspace().join("kernel/iommu/src")) {
        let tests = path.components().any(|part| part.as_os_str() == "tests")
            || path.ends_with("tests.rs")
            || path.ends_with("testing.rs");
        let code = code(text.split("#[cfg(test)]").next().unwrap_or(""));
        for way in ["unsafe {", "unsafe impl", "unsafe extern"] {
            assert!(tests || !code.contains(way), "{}: {way}", path.display());
        }
    }
}

#[test]
fn every_crate_takes_part_in_the_lints() {
    for member in members() {
        let manifest = fs::read_to_string(member.folder.join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} has its own lints", member.name);
    }
}
