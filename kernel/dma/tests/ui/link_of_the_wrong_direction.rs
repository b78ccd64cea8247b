//! What a device only reads it is not told to write.
use dma::{DeviceWrites, Linked, Pages, Reservation, ToDevice};

fn receive<D: DeviceWrites>(_into: Linked<D, Pages>) {}

fn driver(reservation: Reservation, pages: Pages) {
    if let Ok(link) = reservation.link::<ToDevice, _>(0, pages) {
        receive(link);
    }
}

fn main() {}
