//! Nobody makes a device without promising what it is.
use dma::{Device, DeviceConfig, DirectConfig, Error};

fn probe(config: DeviceConfig<'_>, direct: DirectConfig<'_>) -> Result<(Device, Device), Error> {
    Ok((Device::new(config)?, Device::direct(direct)?))
}

fn main() {}
