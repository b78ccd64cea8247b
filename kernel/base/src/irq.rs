//! Interrupt handlers.

/// Something that serves an interrupt.
///
/// Called with interrupts masked, on whichever core took the interrupt. It must not allocate, must not wait, and calls
/// [`crate::notify`] after it has changed what a sleeper is waiting for.
pub trait Handler: Send + Sync {
    /// Serves the interrupt.
    fn handle(&self);
}

impl<F: Fn() + Send + Sync> Handler for F {
    fn handle(&self) {
        self();
    }
}
