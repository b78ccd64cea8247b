//! QEMU's trace files.
//!
//! The `log` backend writes one event a line, `NAME key value ...`, on some builds after a `PID@SECONDS:` stamp. Other
//! output of QEMU may stand in the same file.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// How often each event occurred.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    counts: BTreeMap<String, u64>,
}

impl Trace {
    /// Reads a trace file and counts the events whose names begin with `prefix`, such as `smmuv3_`.
    pub fn read(file: &Path, prefix: &str) -> Result<Self> {
        let opened =
            std::fs::File::open(file).with_context(|| format!("the trace {} cannot be read", file.display()))?;
        Self::count(BufReader::new(opened), prefix)
            .with_context(|| format!("the trace {} cannot be read", file.display()))
    }

    fn count(mut lines: impl BufRead, prefix: &str) -> Result<Self> {
        let (mut trace, mut line) = (Self::default(), Vec::new());
        while lines.read_until(b'\n', &mut line)? > 0 {
            if let Some(name) = event_name(&String::from_utf8_lossy(&line)).filter(|name| name.starts_with(prefix)) {
                *trace.counts.entry(name.to_string()).or_default() += 1;
            }
            line.clear();
        }
        Ok(trace)
    }

    /// Returns how often the named event occurred.
    pub fn of(&self, event: &str) -> u64 {
        self.counts.get(event).copied().unwrap_or(0)
    }

    /// Returns every event with its count, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.counts.iter().map(|(name, count)| (name.as_str(), *count))
    }

    /// Returns how many events there were in all.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }
}

fn event_name(line: &str) -> Option<&str> {
    let line = match line.split_once(':') {
        Some((stamp, rest))
            if stamp.contains('@') && stamp.bytes().all(|b| b.is_ascii_digit() || b"@.".contains(&b)) =>
        {
            rest
        }
        _ => line,
    };
    let name = line.split_whitespace().next()?;
    name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_').then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "smmuv3_cmdq_opcode <--- SMMU_CMD_SYNC\n\
        4711@1700000000.000123:smmuv3_cmdq_opcode <--- SMMU_CMD_SYNC\n\
        smmuv3_translate_success smmuv3-iommu-memory-region-16-2 sid=0x10 iova=0x1000\n\
        smmu_iotlb_lookup_hit IOTLB cache HIT asid=1\n\
        Invalid read at addr 0x0\n\n";

    #[test]
    fn events_are_counted_by_name() {
        let trace = Trace::count(TEXT.as_bytes(), "smmuv3_").unwrap();
        assert_eq!(trace.of("smmuv3_cmdq_opcode"), 2);
        assert_eq!(trace.of("smmuv3_translate_success"), 1);
        assert_eq!(trace.of("smmu_iotlb_lookup_hit"), 0);
        assert_eq!(trace.total(), 3);
        assert_eq!(trace.iter().count(), 2);
    }

    #[test]
    fn a_missing_trace_is_an_error_that_names_it() {
        let error = Trace::read(Path::new("/nonexistent/trace"), "").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/trace"));
    }
}
