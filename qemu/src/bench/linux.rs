//! What the same operations cost Linux on the same emulated machine, and what this kernel is to reach.

use super::Mode;
use serde::Deserialize;
use std::collections::BTreeMap;

/// The kernels that were measured, the first of which ratios refer to.
pub const KERNELS: [&str; 2] = ["6.12", "7.2"];

/// The table.
#[derive(Debug, Deserialize)]
pub struct Table {
    /// How it was measured, in one sentence.
    pub how: String,
    rows: Vec<Row>,
}

/// One operation.
#[derive(Debug, Deserialize)]
pub struct Row {
    name: String,
    unit: String,
    #[serde(rename = "6.12")]
    v6_12: BTreeMap<Mode, f64>,
    #[serde(rename = "7.2")]
    v7_2: BTreeMap<Mode, f64>,
    #[serde(default)]
    target: BTreeMap<Mode, f64>,
}

impl Table {
    /// The table that is part of this program.
    pub fn read() -> Self {
        // Part of the source: a test reads it, too.
        serde_json::from_str(include_str!("linux.json")).expect("linux.json is well-formed")
    }

    /// The row of a benchmark, counted in `unit`.
    pub fn row(&self, name: &str, unit: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name && row.unit == unit)
    }

    /// Where a benchmark stands in the table: reports are in this order.
    pub fn place(&self, name: &str) -> usize {
        self.rows.iter().position(|row| row.name == name).unwrap_or(self.rows.len())
    }
}

impl Row {
    /// The figures of both kernels.
    pub fn linux(&self, mode: Mode) -> [Option<f64>; 2] {
        [self.v6_12.get(&mode).copied(), self.v7_2.get(&mode).copied()]
    }

    /// What is to be reached.
    pub fn target(&self, mode: Mode) -> Option<f64> {
        self.target.get(&mode).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_well_formed_and_has_every_row_once() {
        let table = Table::read();
        assert!(table.rows.len() > 20);
        for (index, row) in table.rows.iter().enumerate() {
            assert!(!table.rows[..index].iter().any(|one| one.name == row.name && one.unit == row.unit), "{row:?}");
        }
        let map4k = table.row("map4k", "instructions").unwrap();
        assert_eq!(map4k.linux(Mode::Strict), [Some(3004.0), Some(3993.0)]);
        assert_eq!(map4k.target(Mode::Direct), Some(40.0));
    }
}
