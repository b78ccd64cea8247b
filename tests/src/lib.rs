//! Every test by name.
