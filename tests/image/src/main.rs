//! The on-target test image.
//!
//! Boots like the kernel and then, in place of the main job, runs the tests that the kernel's command line selects and
//! reports each; see the crate `ktest`. Tests stand in [`cases`], a module a subject.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod cases;

#[cfg(target_os = "none")]
ktest::registry!(virt::Boot);

#[cfg(target_os = "none")]
virt::entry!(main);

#[cfg(target_os = "none")]
fn main(boot: &'static virt::Boot) -> u32 {
    let selection = ktest::Selection::from_command_line(&boot.machine.chosen.bootargs);
    let passed = ktest::run(&TESTS, boot, selection, |line| kernel::println!("{line}"));
    u32::from(!passed)
}

#[cfg(not(target_os = "none"))]
fn main() {}
