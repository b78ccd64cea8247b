//! The sum over all devices, in a process of its own.

use dma::fakes::FakeSystem;
use dma::{FromDevice, ToDevice};

#[test]
fn the_live_sum_counts_what_all_devices_have_at_this_moment() {
    assert_eq!(dma::live(), dma::DeviceStats::default());
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let one = blk.device.map::<FromDevice, _>(blk.device.pages(8192).unwrap()).unwrap();
    let two = gpu.device.map::<ToDevice, _>(gpu.device.pages(4096).unwrap()).unwrap();
    assert_eq!((dma::live().live_mappings, dma::live().live_bytes), (2, 12288));
    drop(one);
    // A mapping counts even when its device has no other handle.
    drop((gpu.device, gpu.group));
    assert_eq!((dma::live().live_mappings, dma::live().live_bytes), (1, 4096));
    drop(two);
    assert_eq!((dma::live().live_mappings, dma::live().quarantined_pages), (0, 0));
}
