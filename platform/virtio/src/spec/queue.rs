//! The split virtqueue \[2.7\].

/// The descriptor continues in the one named by `next`.
pub const DESC_F_NEXT: u16 = 1;
/// The device writes the buffer (otherwise it reads it).
pub const DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

/// Used ring flag: the device does not want to be notified.
pub const USED_F_NO_NOTIFY: u16 = 1;

/// Available ring flag: the driver does not want to be interrupted (without `EVENT_IDX`).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// The largest queue.
pub const MAX_SIZE: u16 = 32768;

/// Bytes of a descriptor: address (64 bits), length (32), flags (16), next (16).
pub const DESC_SIZE: usize = 16;

/// 64-bit words of the descriptor area.
#[must_use]
pub const fn descriptor_words(size: u16) -> usize {
    2 * size as usize
}

/// 16-bit words of the available ring: flags, index, entries, `used_event`.
#[must_use]
pub const fn available_halves(size: u16) -> usize {
    3 + size as usize
}

/// 32-bit words of the used ring: flags and index, entries of two words, `avail_event` (and two bytes of padding).
#[must_use]
pub const fn used_words(size: u16) -> usize {
    2 + 2 * size as usize
}

/// Whether the other side, which asked to be told about index `event`, is to be told when the index moves from `old` to `new`
/// \[2.7.10\].
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
