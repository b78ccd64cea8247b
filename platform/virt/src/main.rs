//! The kernel image for QEMU's virt board.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
virt::entry!(main);

#[cfg(target_os = "none")]
fn main(boot: &virt::Boot) -> u32 {
    let mebibytes = (boot.memory.end - boot.memory.start) >> 20;
    log::info!("Sluice  entered at EL{}, {mebibytes} MiB of memory", boot.entered_at);
    0
}
