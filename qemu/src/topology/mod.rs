//! Machines by name: the shapes that the kernel is promised to run on.
//!
//! There is one list, [`TOPOLOGIES`]. `cargo run -- --topology NAME` starts one of it, `cargo run -- topologies` says what there is,
//! `cargo test -p tests --test topologies` runs each under its name, and `cargo run -- matrix` runs all of them on several QEMUs and
//! writes the table in README.md. What a QEMU does not have is found by asking it.

mod list;
pub mod two_smmus;

pub use list::TOPOLOGIES;

use crate::emulator::Emulator;
use crate::machine::Machine;
use crate::trial::{Expect, Ran};
use anyhow::{Result, bail};

/// A machine by name.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// Its name.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    /// What the main job comes to on it.
    pub expect: Expect,
    /// Lines of the report, by how they begin, and what they must say: that the machine is what it is meant to be.
    says: &'static [(&'static str, &'static str)],
    needs: &'static [Need],
    change: fn(&mut Machine, &Emulator) -> Result<()>,
}

/// Something that not every QEMU has.
#[derive(Clone, Copy, Debug)]
enum Need {
    /// An option of the machine `virt`.
    Option(&'static str),
    /// An option of the machine `virt` with this value.
    Value(&'static str),
    /// A type of machine.
    Type(&'static str),
    /// A device, with options, that can be added.
    Device(&'static str),
    /// Any of these.
    Any(&'static [Self]),
    /// U-Boot for QEMU's machine.
    UBoot,
}

impl Need {
    fn is_met(self, emulator: &Emulator) -> Result<bool> {
        match self {
            Self::Option(name) => emulator.has_machine_option(name),
            Self::Value(option) => emulator.can_be(&format!("virt,{option}")),
            Self::Type(name) => emulator.can_be(name),
            Self::Device(device) => emulator.can_have("virt", device),
            Self::Any(needs) => needs.iter().try_fold(false, |met, need| Ok(met || need.is_met(emulator)?)),
            Self::UBoot => Ok(list::u_boot().is_file()),
        }
    }

    /// Says what is missing.
    fn unmet(self, emulator: &Emulator) -> String {
        match self {
            Self::UBoot => format!("there is no {} (Debian's u-boot-qemu has it)", list::u_boot().display()),
            _ => format!("QEMU {} has no {}", emulator.version, self.name()),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Option(name) => format!("machine option {name}"),
            Self::Value(option) => format!("machine option {option}"),
            Self::Type(name) => format!("machine {name}"),
            Self::Device(device) => format!("-device {}", device.split(',').next().unwrap_or(device)),
            Self::Any(needs) => needs.iter().map(|need| need.name()).collect::<Vec<_>>().join(" or "),
            Self::UBoot => "U-Boot".into(),
        }
    }
}

impl Topology {
    /// Finds one by name.
    ///
    /// # Errors
    ///
    /// A sentence that says where the names are.
    pub fn find(name: &str) -> Result<&'static Self, String> {
        let found = TOPOLOGIES.iter().find(|topology| topology.name == name);
        found.ok_or_else(|| "there is no such topology; `cargo run -- topologies` lists them".into())
    }

    /// Says what of the machine is not to be had with this QEMU; `None` if it has all.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be asked.
    pub fn missing(&self, emulator: &Emulator) -> Result<Option<String>> {
        for need in self.needs {
            if !need.is_met(emulator)? {
                return Ok(Some(need.unmet(emulator)));
            }
        }
        Ok(None)
    }

    /// Fails, with a sentence, if this QEMU does not have it.
    ///
    /// # Errors
    ///
    /// As said.
    pub fn check(&self, emulator: &Emulator) -> Result<()> {
        match self.missing(emulator)? {
            None => Ok(()),
            Some(missing) => {
                bail!("the topology {} cannot be had: {missing}; `cargo run -- topologies` lists what can", self.name)
            }
        }
    }

    /// Makes the machine `base` one of this shape. Whatever else `base` is, it stays; what the topology is about, it decides.
    ///
    /// # Errors
    ///
    /// If QEMU does not describe the machine, where a device tree of its own is to be completed.
    pub fn machine(&self, base: Machine, emulator: &Emulator) -> Result<Machine> {
        let mut machine = base;
        (self.change)(&mut machine, emulator)?;
        Ok(machine)
    }

    /// Says what of a run on this machine is not as it is to be.
    ///
    /// # Errors
    ///
    /// One sentence, followed by all that was said.
    pub fn judge(&self, ran: &Ran) -> Result<(), String> {
        ran.judge(self.expect, self.says)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_words_for_a_shell_and_no_two_are_the_same() {
        let names: BTreeSet<&str> = TOPOLOGIES.iter().map(|topology| topology.name).collect();
        assert_eq!(names.len(), TOPOLOGIES.len());
        for topology in TOPOLOGIES {
            let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(!topology.name.is_empty() && topology.name.chars().all(word), "{}", topology.name);
            assert!(!topology.about.is_empty() && !topology.about.contains('|'), "{}", topology.name);
            assert_eq!(Topology::find(topology.name).unwrap().name, topology.name);
        }
        assert!(Topology::find("gicv9").unwrap_err().contains("topologies"));
    }
}
