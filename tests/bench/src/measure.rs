//! Measuring: batches of one operation, in instructions where the processor counts them, else in nanoseconds.

use crate::stand::Stand;
use alloc::vec::Vec;
use base::Instant;
use core::fmt;
use kernel::println;
use ktest::{Outcome, TestResult};

/// How many batches are measured.
const ROUNDS: usize = 15;

/// The most batches before, which are not.
const WARM_UP: usize = 8;

/// A point on the scale: instructions of this core (wrapping at 32 bits), or nanoseconds.
#[derive(Clone, Copy)]
pub enum Point {
    Instructions(u32),
    Nanoseconds(u64),
}

impl Point {
    /// This moment.
    #[inline(always)]
    pub fn now() -> Self {
        match arch::pmu::read().1 {
            // A kernel that got here has retired many: the processor does not count them.
            0 => Self::Nanoseconds(Instant::now().as_nanos()),
            count => Self::Instructions(count),
        }
    }

    /// From `earlier` to this one. A batch has fewer than 2^32 instructions.
    #[inline]
    pub fn since(self, earlier: Self) -> u64 {
        match (self, earlier) {
            (Self::Instructions(now), Self::Instructions(then)) => u64::from(now.wrapping_sub(then)),
            (Self::Nanoseconds(now), Self::Nanoseconds(then)) => now.saturating_sub(then),
            _ => 0,
        }
    }

    /// The scale's name.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Instructions(_) => "instructions",
            Self::Nanoseconds(_) => "ns",
        }
    }
}

/// A fraction, written with three decimals.
pub struct Each {
    /// Of how much.
    pub total: u64,
    /// How many.
    pub count: u64,
}

impl fmt::Display for Each {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thousandths = self.total.saturating_mul(1000) / self.count.max(1);
        write!(f, "{}.{:03}", thousandths / 1000, thousandths % 1000)
    }
}

impl Stand {
    /// Commands that all SMMUs were given so far.
    pub fn commands(&self) -> u64 {
        self.hardware.smmus().iter().map(|smmu| smmu.statistics().commands).sum()
    }

    /// Runs `operation` in batches of `batch` and reports what one costs.
    #[inline(never)]
    pub fn measure(&self, name: &str, batch: u32, mut operation: impl FnMut() -> Result<(), Outcome>) -> TestResult {
        self.measure_batches(name, u64::from(batch), || {
            for _ in 0..batch {
                operation()?;
            }
            Ok(())
        })
    }

    /// Runs `batch`, which is `operations` operations, again and again, and reports what one operation costs.
    #[inline(never)]
    pub fn measure_batches(
        &self,
        name: &str,
        operations: u64,
        mut batch: impl FnMut() -> Result<(), Outcome>,
    ) -> TestResult {
        // Tables are made and caches filled first: until two batches cost the same, to a thousandth.
        let mut last = 0;
        for _ in 0..WARM_UP {
            let start = Point::now();
            batch()?;
            let cost = Point::now().since(start);
            if cost.abs_diff(last) <= cost / 1000 {
                break;
            }
            last = cost;
        }
        let mut costs = Vec::with_capacity(ROUNDS);
        let before = self.commands();
        let mut unit = "";
        for _ in 0..ROUNDS {
            let start = Point::now();
            batch()?;
            let end = Point::now();
            costs.push(end.since(start));
            unit = end.unit();
        }
        let commands = Each { total: self.commands() - before, count: operations * ROUNDS as u64 };
        costs.sort_unstable();
        let each = |index: usize| Each { total: costs.get(index).copied().unwrap_or(0), count: operations };
        println!("##bench result {name} {unit} {} {} {} {commands}", each(0), each(ROUNDS / 2), each(ROUNDS - 1));
        Ok(())
    }
}
