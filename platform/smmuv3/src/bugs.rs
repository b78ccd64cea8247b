//! Bugs that can be switched on, to show that the tests would find them.

#![allow(dead_code)]

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// x
    LeafNotPublished,
    /// x
    LinkNotPublished,
}

pub(crate) fn seeded(_: Bug) -> bool {
    false
}
