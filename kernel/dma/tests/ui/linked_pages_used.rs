//! Linked memory belongs to the link until it is unlinked.
use dma::{Pages, Reservation, ToDevice};

fn driver(reservation: Reservation, pages: Pages) {
    let _link = reservation.link::<ToDevice, _>(0, pages);
    let _bytes = pages.as_slice();
}

fn main() {}
