//! What is the fakes' and what is the code's under test: for tests in which the n-th allocation fails ([`base::failing`]).

use base::failing::{self, Spared};

/// While it lives, what this thread allocates is for the fakes' own books, which hardware would not have.
pub struct Hardware {
    _spared: Spared,
}

impl Hardware {
    /// Begins.
    pub fn enter() -> Self {
        Self { _spared: Spared::enter() }
    }

    /// Whether the DMA memory, the table or the address space that is being asked for is the allocation that fails.
    pub(super) fn fails() -> bool {
        failing::fails()
    }
}
