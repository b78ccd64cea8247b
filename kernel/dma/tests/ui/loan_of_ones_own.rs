//! Only this crate says what a device has.
use dma::{Device, Lent, Segment};

struct Made(Device, [Segment; 1]);

impl Lent for Made {
    fn device(&self) -> &Device {
        &self.0
    }
    fn len(&self) -> u64 {
        u64::MAX
    }
    fn segments(&self) -> &[Segment] {
        &self.1
    }
    fn device_reads(&self) -> bool {
        true
    }
    fn device_writes(&self) -> bool {
        true
    }
}

fn main() {}
