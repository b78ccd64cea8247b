//! The on-target test image: the kernel and the board as they are, with tests in place of the main job.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
extern crate alloc;
#[cfg(target_os = "none")]
mod bench;
#[cfg(target_os = "none")]
mod cases;

#[cfg(target_os = "none")]
pub use bench::Bench;

#[cfg(target_os = "none")]
ktest::registry!(Bench);

#[cfg(target_os = "none")]
virt::entry!(start);

#[cfg(target_os = "none")]
fn start(boot: &'static virt::Boot) -> u32 {
    let bench = match Bench::bring_up(boot) {
        Ok(bench) => bench,
        Err(error) => {
            kernel::println!("error: {error}");
            return 1;
        }
    };
    let selection = ktest::Selection::from_command_line(&boot.machine.chosen.bootargs);
    let passed = ktest::run(&TESTS, &bench, selection, |line| kernel::println!("{line}"));
    u32::from(!passed)
}
