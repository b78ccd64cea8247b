//! ESR_EL1 in words (DDI 0487, D24.2: ESR_EL1, Exception Syndrome Register).

use core::fmt;

/// The syndrome of an exception.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Esr(pub u64);

impl Esr {
    /// The exception class, ESR_EL1.EC.
    pub const fn class(self) -> u8 {
        (self.0 >> 26 & 0x3f) as u8
    }

    /// The instruction-specific syndrome, ESR_EL1.ISS.
    pub const fn iss(self) -> u32 {
        (self.0 & 0x1ff_ffff) as u32
    }

    /// Whether this is a data abort.
    pub const fn is_data_abort(self) -> bool {
        matches!(self.class(), 0x24 | 0x25)
    }

    /// Whether this is an instruction abort.
    pub const fn is_instruction_abort(self) -> bool {
        matches!(self.class(), 0x20 | 0x21)
    }

    /// Whether an abort was caused by a write.
    pub const fn is_write(self) -> bool {
        self.is_data_abort() && self.iss() & 1 << 6 != 0
    }

    /// Whether an abort found no valid translation.
    pub const fn is_translation_fault(self) -> bool {
        (self.is_data_abort() || self.is_instruction_abort()) && self.iss() & 0x3c == 0x04
    }

    /// Whether an abort found a translation that forbids the access.
    pub const fn is_permission_fault(self) -> bool {
        (self.is_data_abort() || self.is_instruction_abort()) && self.iss() & 0x3c == 0x0c
    }

    /// Whether FAR_EL1 holds the address of the access.
    pub const fn far_valid(self) -> bool {
        match self.class() {
            0x20 | 0x21 | 0x24 | 0x25 => self.iss() & 1 << 10 == 0,
            0x22 | 0x34 | 0x35 => true,
            _ => false,
        }
    }

    const fn class_name(self) -> &'static str {
        match self.class() {
            0x00 => "unknown or undefined instruction",
            0x01 => "trapped WFI or WFE",
            0x07 => "trapped FP or SIMD instruction",
            0x0e => "illegal execution state",
            0x11 | 0x15 => "SVC",
            0x12 | 0x16 => "HVC",
            0x13 | 0x17 => "SMC",
            0x18 => "trapped system register access",
            0x19 => "trapped SVE instruction",
            0x1c => "pointer authentication failure",
            0x20 | 0x21 => "instruction abort",
            0x22 => "misaligned program counter",
            0x24 | 0x25 => "data abort",
            0x26 => "misaligned stack pointer",
            0x2c => "floating-point exception",
            0x2f => "SError",
            0x30 | 0x31 => "breakpoint",
            0x32 | 0x33 => "software step",
            0x34 | 0x35 => "watchpoint",
            0x3c => "BRK instruction",
            _ => "exception of an unlisted class",
        }
    }

    const fn fault_name(status: u32) -> &'static str {
        match status {
            0x00..=0x03 => "address size fault",
            0x04..=0x07 => "translation fault",
            0x08..=0x0b => "access flag fault",
            0x0c..=0x0f => "permission fault",
            0x10 => "synchronous external abort",
            0x14..=0x17 => "synchronous external abort on a table walk",
            0x21 => "alignment fault",
            0x30 => "TLB conflict",
            _ => "fault of an unlisted kind",
        }
    }
}

impl fmt::Debug for Esr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Esr({:#x}: {self})", self.0)
    }
}

impl fmt::Display for Esr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.class_name())?;
        if self.is_data_abort() || self.is_instruction_abort() {
            if self.is_data_abort() {
                f.write_str(if self.is_write() { " on a write" } else { " on a read" })?;
            }
            let status = self.iss() & 0x3f;
            write!(f, ", {}", Self::fault_name(status))?;
            if status < 0x10 || (0x14..0x18).contains(&status) {
                write!(f, " at level {}", status & 3)?;
            }
        } else if self.class() == 0x3c {
            write!(f, " {:#x}", self.iss() & 0xffff)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn aborts_are_told_in_words() {
        assert_eq!(Esr(0x9600_0047).to_string(), "data abort on a write, translation fault at level 3");
        assert_eq!(Esr(0x9600_000f).to_string(), "data abort on a read, permission fault at level 3");
        assert_eq!(Esr(0x8600_000f).to_string(), "instruction abort, permission fault at level 3");
        assert_eq!(Esr(0x9600_0021).to_string(), "data abort on a read, alignment fault");
        assert_eq!(Esr(0xf200_03e8).to_string(), "BRK instruction 0x3e8");
    }

    #[test]
    fn the_fault_address_counts_only_where_the_architecture_says_so() {
        assert!(Esr(0x9600_0047).far_valid());
        assert!(!Esr(0x9600_0410).far_valid());
        assert!(!Esr(0xf200_0001).far_valid());
    }
}
