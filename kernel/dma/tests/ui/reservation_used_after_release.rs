//! Addresses that were given back are not linked to.
use dma::{Pages, Reservation, ToDevice};

fn driver(reservation: Reservation, pages: Pages) {
    let _released = reservation.release();
    let _link = reservation.link::<ToDevice, _>(0, pages);
}

fn main() {}
