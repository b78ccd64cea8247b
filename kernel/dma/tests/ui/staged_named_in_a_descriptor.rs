//! What no sync has linked has no address that a driver could name to its device.
use dma::{Pages, Reservation, ToDevice};

fn driver(reservation: Reservation, pages: Pages) {
    if let Ok(staged) = reservation.stage::<ToDevice, _>(0, pages) {
        let _segments = dma::slice(&staged, 0, 512);
        let _address = staged.iova();
    }
}

fn main() {}
