//! A driver that lets its device write asks for a direction in which it may.
use dma::{DeviceWrites, Mapped, Pages, ToDevice};

fn read_sector<D: DeviceWrites>(_into: Mapped<D, Pages>) {}

fn driver(mapped: Mapped<ToDevice, Pages>) {
    read_sector(mapped);
}

fn main() {}
