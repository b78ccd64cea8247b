//! Addresses with something behind them are not given to something else.
use dma::vcm::{self, Area};
use dma::{Device, Error, SharedBuffer, ToDevice};

fn driver(area: Area<Device>, one: &SharedBuffer, other: &SharedBuffer) -> Result<(), Error> {
    let _one = area.back::<ToDevice>(one).map_err(|(_, error)| error)?;
    let _other = area.back::<ToDevice>(other).map_err(|(_, error)| error)?;
    let _ = vcm::reserve_at::<Device>;
    Ok(())
}

fn main() {}
