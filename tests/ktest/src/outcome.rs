//! What a test comes to.

use alloc::format;
use alloc::string::String;
use core::fmt;

/// What a test returns.
pub type TestResult = Result<(), Outcome>;

/// Why a test did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It failed, with a message.
    Failed(String),
    /// It cannot run on this machine, with the reason.
    Skipped(String),
}

impl Outcome {
    /// Creates a failure.
    pub fn failed(message: fmt::Arguments<'_>) -> Self {
        Self::Failed(format!("{message}"))
    }

    /// Creates a skip.
    pub fn skipped(reason: fmt::Arguments<'_>) -> Self {
        Self::Skipped(format!("{reason}"))
    }
}

/// Any error fails a test, so that `?` serves. (`Outcome` itself is no `Error`, or this would not be possible.)
impl<E: core::error::Error> From<E> for Outcome {
    fn from(error: E) -> Self {
        let mut text = format!("{error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        Self::Failed(text)
    }
}
