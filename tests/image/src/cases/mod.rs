//! The tests, a module a subject.

mod machine;
