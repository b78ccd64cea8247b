//! The allocator of runs against brute force.
