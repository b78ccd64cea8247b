//! Processes on a machine of fakes: tables that are a list of pages, and a device of `dma`'s.

mod calls;
mod hostile;
mod machine;
mod programs;
mod shared;
