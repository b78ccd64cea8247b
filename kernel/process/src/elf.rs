//! Programs: static ELF executables for AArch64.
//!
//! Every field of the file may be a lie. What is read is read through checks (`object`), and what it says is checked again: sizes
//! against the file and the process's quota, addresses against [`PROGRAM`], rights against what is allowed. Nothing may be both
//! writable and executable, and no two segments share a page.

use crate::contract::Extent;
use crate::space::{PROGRAM, STACK_TOP, Whose, pages};
use crate::{Error, Space};
use abi::PAGE;
use alloc::sync::Arc;
use base::fallible;
use dma::{DmaMemory, Ladder, OpenPages};
use iommu::{IovaRange, Prot};
use object::LittleEndian;
use object::elf::{EM_AARCH64, ET_EXEC, FileHeader64, PF_R, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_TLS};
use object::read::elf::{FileHeader, ProgramHeader};

/// The most segments that a program may have.
const SEGMENTS: usize = 16;

/// A program that cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// Not a 64-bit little-endian ELF, or its tables lie outside the file.
    #[error("it is no ELF of 64 bits")]
    NotElf,
    /// For another machine, or not a static executable.
    #[error("it is no static executable for AArch64")]
    WrongKind,
    /// Too many segments, or none.
    #[error("{0} segments")]
    Segments(usize),
    /// The contents of a segment lie outside the file, or are longer than it.
    #[error("the contents of the segment at {0:#x} are not in the file")]
    Contents(u64),
    /// A segment lies where no program may.
    #[error("a segment of {len:#x} bytes at {address:#x}")]
    Place {
        /// Where.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A segment that cannot be read, or could be both written and executed.
    #[error("a segment with flags {0:#x}")]
    Flags(u32),
    /// The entry is not in an executable segment.
    #[error("the entry {0:#x} is not in its code")]
    Entry(u64),
}

/// Where a program starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The first instruction.
    pub entry: u64,
    /// The first value of the stack pointer.
    pub stack: u64,
}

/// Loads `file` into `space`, and makes its stack.
///
/// # Errors
///
/// [`Error::Elf`], [`Error::Overlap`] for segments that share a page, [`Error::Quota`], [`Error::OutOfMemory`], [`Error::Map`].
/// Some of it may be mapped then.
pub(crate) fn load(file: &[u8], space: &mut Space, memory: &'static dyn DmaMemory) -> Result<Start, Error> {
    let header = FileHeader64::<LittleEndian>::parse(file).map_err(|_| ElfError::NotElf)?;
    let endian = header.endian().map_err(|_| ElfError::NotElf)?;
    if header.e_machine(endian) != EM_AARCH64 || header.e_type(endian) != ET_EXEC {
        return Err(ElfError::WrongKind.into());
    }
    let segments = header.program_headers(endian, file).map_err(|_| ElfError::NotElf)?;
    if segments.is_empty() || segments.len() > SEGMENTS {
        return Err(ElfError::Segments(segments.len()).into());
    }
    let entry = header.e_entry(endian);
    let mut entered = false;
    for segment in segments {
        let (address, len, flags) = (segment.p_vaddr(endian), segment.p_memsz(endian), segment.p_flags(endian));
        match segment.p_type(endian) {
            PT_LOAD if len != 0 => {}
            // What these ask for is not done, so that the program could not run.
            PT_INTERP | PT_DYNAMIC | PT_TLS => return Err(ElfError::WrongKind.into()),
            _ => continue,
        }
        let contents = segment.data(endian, file).map_err(|()| ElfError::Contents(address))?;
        if contents.len() as u64 > len {
            return Err(ElfError::Contents(address).into());
        }
        let prot = rights(flags.0)?;
        let place = ElfError::Place { address, len };
        let start = address & !(PAGE - 1);
        let end = address.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE)).ok_or(place)?;
        if start < PROGRAM.start || end > PROGRAM.end {
            return Err(place.into());
        }
        let range = pages(start, end - start)?;
        let memory = fresh(space, memory, range.len())?;
        memory.write(address - start, contents)?;
        if prot.contains(Prot::EXECUTE) {
            memory.clean();
            entered |= entry >= address && entry - address < len && entry.is_multiple_of(4);
        }
        space.map_at(range, shared(memory)?, prot, Whose::Own)?;
    }
    if !entered {
        return Err(ElfError::Entry(entry).into());
    }
    space.tables().code_changed();
    let stack = stack_range()?;
    let memory = fresh(space, memory, stack.len())?;
    space.map_at(stack, shared(memory)?, Prot::READ | Prot::WRITE, Whose::Own)?;
    Ok(Start { entry, stack: STACK_TOP })
}

fn stack_range() -> Result<IovaRange, Error> {
    pages(STACK_TOP - abi::STACK, abi::STACK)
}

/// Zeroed memory, if the process may have it.
pub(crate) fn fresh(space: &Space, memory: &'static dyn DmaMemory, bytes: u64) -> Result<OpenPages, Error> {
    space.afford(bytes)?;
    Ok(OpenPages::zeroed(memory, bytes, Ladder::DEFAULT)?)
}

/// Memory as something to be mapped.
pub(crate) fn shared(memory: OpenPages) -> Result<Arc<dyn Extent>, Error> {
    let memory = fallible::arc(memory).map_err(|_| Error::OutOfMemory)?;
    Ok(memory)
}

fn rights(flags: u32) -> Result<Prot, ElfError> {
    let known = |flag: u32| flags & flag != 0;
    match (known(PF_R.0), known(PF_W.0), known(PF_X.0)) {
        (true, false, false) => Ok(Prot::READ),
        (true, true, false) => Ok(Prot::READ | Prot::WRITE),
        (true, false, true) => Ok(Prot::READ | Prot::EXECUTE),
        _ => Err(ElfError::Flags(flags)),
    }
}
