//! What the first core does.

use crate::last_words::fatal;
use crate::registers::{clean, enter};
use crate::{interrupts, psci};
use sbsa::map::RAM;
use sbsa::payload::{FLASH, HEADER, Payload};
use sbsa::tree::{self, Survey};

/// Where the kernel image goes, from the start of memory; the tree is below.
const KERNEL: u64 = 2 << 20;
/// How much memory from the start on entry.s maps.
const REACH: u64 = 1 << 30;

/// From here on everything is Rust.
#[unsafe(no_mangle)]
extern "C" fn primary(index: usize) -> ! {
    if !interrupts::give_away() {
        fatal(&"the interrupt controller does not settle");
    }
    let payload = match Payload::find(flash()) {
        Ok(payload) => payload,
        Err(error) => fatal(&error),
    };
    let survey = match Survey::read(machine_tree()) {
        Ok(survey) => survey,
        Err(error) => fatal(&error),
    };
    let tree = match tree::describe(&survey, payload.command_line) {
        Ok(tree) => tree,
        Err(error) => fatal(&error),
    };
    let memory = survey.memory.first().map_or(0, |first| first.1).min(REACH);
    if tree.len() as u64 > KERNEL || payload.size_in_memory() > memory.saturating_sub(KERNEL) {
        fatal(&format_args!("{memory} bytes of memory are not enough for the kernel"));
    }
    place(0, &tree);
    place(KERNEL, payload.image);
    psci::init(&survey.cores, index);
    enter(RAM + KERNEL, RAM)
}

/// The first flash behind the hand-over.
fn flash() -> &'static [u8] {
    let start = core::ptr::with_exposed_provenance::<u8>(HEADER);
    // SAFETY: flash, mapped by entry.s, which nothing writes.
    unsafe { core::slice::from_raw_parts(start, FLASH - HEADER) }
}

/// The machine's own tree, as long as nothing is put in its place: what there is below the kernel.
fn machine_tree<'a>() -> &'a [u8] {
    let start = core::ptr::with_exposed_provenance::<u8>(RAM as usize);
    // SAFETY: memory, of which every machine has that much, mapped by entry.s; it is written only by `place`, when the tree has
    // been read.
    let whole = unsafe { core::slice::from_raw_parts(start, KERNEL as usize) };
    // A tree states its length in its second word. One that says too much is cut, and its reader will notice.
    let stated = whole.get(4..8).and_then(|word| Some(u32::from_be_bytes(word.try_into().ok()?)));
    stated.and_then(|stated| whole.get(..stated as usize)).unwrap_or(whole)
}

/// Copies `content` to memory, `offset` bytes from its start, and beyond the caches.
fn place(offset: u64, content: &[u8]) {
    assert!(content.len() as u64 <= REACH - offset);
    let start = RAM + offset;
    let target = core::ptr::with_exposed_provenance_mut::<u8>(start as usize);
    // SAFETY: memory that is mapped and that nothing else uses: the machine's tree has been read, the kernel does not run yet.
    unsafe { target.copy_from_nonoverlapping(content.as_ptr(), content.len()) };
    clean(start, start + content.len() as u64);
}
