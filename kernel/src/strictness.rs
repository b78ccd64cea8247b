//! `iommu.strict`: which devices' mappings end at once, and which may lapse.
//!
//! The value is a list of words, separated by commas: `1` (always strict) or `0` (relaxed), for all devices, or `1:NAME` or `0:NAME`
//! for those with NAME in their name (`virtio-blk`, or `0000:00:02.0`). Later words override earlier ones.

#![forbid(unsafe_code)]

use crate::cmdline::{CommandLine, Error};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use dma::Strictness;

const KEY: &str = "iommu.strict";
const CHOICES: &[&str] = &["0", "1", "0:NAME", "1:NAME"];

/// What the command line says of strictness.
#[derive(Clone, Debug, Default)]
pub struct Strict(Vec<(String, Strictness)>);

impl Strict {
    /// Reads the command line.
    ///
    /// # Errors
    ///
    /// Words that cannot be understood.
    pub fn parse(line: &CommandLine) -> Result<Self, Error> {
        let mut rules = Vec::new();
        for word in line.all(KEY).flat_map(|value| value.split(',')) {
            let (mode, name) = word.split_once(':').unwrap_or((word, ""));
            let strictness = match mode {
                "0" => Strictness::Relaxed,
                "1" => Strictness::Always,
                _ => {
                    return Err(Error::Choice { key: KEY.to_string(), value: word.to_string(), choices: CHOICES });
                }
            };
            rules.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
            rules.push((name.to_string(), strictness));
        }
        Ok(Self(rules))
    }

    /// What it says of the device of this name.
    pub fn of(&self, name: &str) -> Strictness {
        let says = |(of, strictness): &(String, Strictness)| name.contains(of.as_str()).then_some(*strictness);
        self.0.iter().rev().find_map(says).unwrap_or(Strictness::UnlessAsked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_that_names_a_device_counts() {
        let strict = |line: &str| Strict::parse(&CommandLine::parse(line).unwrap());
        let (disk, screen) = ("virtio-blk 0000:00:02.0", "virtio-gpu 0000:00:03.0");
        let of = |line| strict(line).map(|strict| (strict.of(disk), strict.of(screen)));
        assert_eq!(of(""), Ok((Strictness::UnlessAsked, Strictness::UnlessAsked)));
        assert_eq!(of("iommu.strict=1"), Ok((Strictness::Always, Strictness::Always)));
        assert_eq!(of("iommu.strict=1,0:virtio-blk"), Ok((Strictness::Relaxed, Strictness::Always)));
        assert_eq!(of("iommu.strict=0 iommu.strict=1:0000:00:03.0"), Ok((Strictness::Relaxed, Strictness::Always)));
        for wrong in ["iommu.strict", "iommu.strict=2", "iommu.strict=yes:edu", "iommu.strict=0,,1"] {
            assert!(strict(wrong).is_err(), "{wrong}");
        }
    }
}
