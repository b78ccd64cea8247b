//! The ways in which a DMA-API can be misused, and what happens here: one row each, with the test that shows it.
//!
//! The first 19 are those that a checker at run time can find, if it is switched on; the last three it cannot see.

use std::fmt::Write as _;

/// What becomes of a misuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The program does not compile: a file of `kernel/dma/tests/ui`, without its ending.
    DoesNotCompile(&'static str),
    /// The caller gets an error that says what was wrong: a test of `kernel/dma/tests/behaviour/misuse.rs`.
    TypedError(&'static str),
    /// The device is stopped, and a report names it and the loan: a test on target, in `tests/image/src/cases`, by real DMA.
    Contained(&'static str),
}

/// One misuse.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its number.
    pub number: u32,
    /// What a driver does.
    pub misuse: &'static str,
    /// What happens.
    pub answer: Answer,
    /// Why.
    pub sentence: &'static str,
}

const fn row(number: u32, misuse: &'static str, answer: Answer, sentence: &'static str) -> Row {
    Row { number, misuse, answer, sentence }
}

use Answer::{Contained, DoesNotCompile, TypedError};

/// All of them.
pub const ROWS: &[Row] = &[
    row(
        1,
        "unmap of what was never mapped",
        DoesNotCompile("unmap_of_what_was_never_mapped"),
        "only a mapping has `unmap`, and only `map` makes one",
    ),
    row(2, "unmap with another size", DoesNotCompile("unmap_with_another_size"), "a mapping knows its size"),
    row(
        3,
        "unmap through another function",
        DoesNotCompile("unmap_through_another_function"),
        "each kind of mapping has one end of its own",
    ),
    row(
        4,
        "coherent memory freed by another address",
        DoesNotCompile("coherent_freed_by_another_address"),
        "it is freed as the object that it is",
    ),
    row(
        5,
        "scatter list unmapped with another count",
        DoesNotCompile("scatter_list_unmapped_with_another_count"),
        "scattered memory comes back whole",
    ),
    row(
        6,
        "unmap with another direction",
        DoesNotCompile("unmap_with_another_direction"),
        "the direction is part of the type",
    ),
    row(
        7,
        "result of mapping not checked",
        DoesNotCompile("mapping_result_not_checked"),
        "a `Result` has no address; an error gives the memory back",
    ),
    row(8, "sync of what is not mapped", DoesNotCompile("sync_of_unmapped"), "only a mapping has `sync_for_*`"),
    row(
        9,
        "sync outside the mapping",
        TypedError("a_sync_outside_the_mapping_is_refused"),
        "`OutOfRange`, with the mapping's size",
    ),
    row(
        10,
        "sync with another direction",
        DoesNotCompile("sync_with_another_direction"),
        "a sync has the mapping's direction",
    ),
    row(
        11,
        "sync for the side that has no use for it",
        DoesNotCompile("sync_for_the_side_that_has_no_use_for_it"),
        "`sync_for_cpu` needs a device that writes, `sync_for_device` one that reads",
    ),
    row(
        12,
        "scatter list synced with another count",
        DoesNotCompile("scatter_list_synced_with_another_count"),
        "a sync names bytes, not segments",
    ),
    row(13, "map of stack memory", DoesNotCompile("stack_memory"), "only owned pages can be lent"),
    row(14, "map of kernel text or rodata", DoesNotCompile("kernel_text_and_rodata"), "only owned pages can be lent"),
    row(15, "map of an invalid address", DoesNotCompile("invalid_address"), "an address is not memory"),
    row(
        16,
        "segment longer than the device takes",
        TypedError("a_segment_longer_than_the_device_takes_is_refused"),
        "`SegmentTooLong`; `slice` cuts none",
    ),
    row(
        17,
        "segment across the device's boundary",
        TypedError("a_segment_across_the_devices_boundary_is_refused"),
        "`AcrossBoundary`; `slice` cuts none",
    ),
    row(
        18,
        "mappings pending when the driver goes",
        Contained("mappings_that_outlive_their_driver_are_blocked_and_named"),
        "the device is off the bus and blocked, each mapping named with size and call site",
    ),
    row(
        19,
        "overlapping active mappings",
        DoesNotCompile("pages_mapped_twice"),
        "what is lent is gone; sharing is a type, `SharedBuffer`",
    ),
    row(
        20,
        "CPU touches what the device has",
        DoesNotCompile("slice_of_mapped_memory"),
        "no reference exists; a `View` copies, atomically",
    ),
    row(
        21,
        "device still running at unmap",
        Contained("a_device_that_still_runs_at_unmap_is_stopped_and_the_loan_named"),
        "stopped from the moment that `unmap` returns; the report names the loan and who ended it",
    ),
    row(
        22,
        "use of a stale DMA address",
        Contained("a_stale_address_is_stopped_and_its_history_named"),
        "stopped; the report says when, where and by whom it was unmapped",
    ),
];

/// Where the table begins and ends in `ARCHITECTURE.md`.
pub const MARKERS: (&str, &str) =
    ("<!-- misuse: begin, generated by tests/tests/misuse.rs -->\n", "<!-- misuse: end -->");

/// The table.
pub fn table() -> String {
    let mut text = String::from("| | misuse | here | because | test |\n|---|---|---|---|---|\n");
    for Row { number, misuse, answer, sentence } in ROWS {
        let (kind, test) = match answer {
            DoesNotCompile(test) => ("does not compile", test),
            TypedError(test) => ("typed error", test),
            Contained(test) => ("contained, reported", test),
        };
        let _ = writeln!(text, "| {number} | {misuse} | {kind} | {sentence} | `{test}` |");
    }
    text
}
