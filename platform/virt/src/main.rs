//! The kernel image for QEMU's virt board.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
virt::entry!(main);

#[cfg(target_os = "none")]
fn main(boot: &'static virt::Boot) -> u32 {
    let mebibytes = boot.machine.memory.iter().map(|range| range.len()).sum::<u64>() >> 20;
    match virt::cores::start_all(&boot.machine, |_| {}) {
        Ok(cores) => log::info!("machine   {cores} cores, {mebibytes} MiB, entered at EL{}", boot.entered_at),
        Err(error) => {
            log::error!("{error}");
            return 1;
        }
    }
    0
}
