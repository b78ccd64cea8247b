//! Work begins on a loan: a buffer that no device has been lent has no device whose work it could be.
use base::Deadline;
use dma::{Error, Job, SharedBuffer};
use std::sync::Arc;

fn driver(picture: Arc<SharedBuffer>) -> Result<(), Error> {
    Job::begin(&picture, Deadline::after_millis(0))?;
    Ok(())
}

fn main() {}
