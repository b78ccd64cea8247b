//! System calls.

use abi::{Call, ErrorCode, LINE, Mode, Rights, WRITE};
use core::arch::asm;
use core::fmt;

/// Asks the kernel, with any number and any arguments. Returns the error's number, or 0, and the value.
///
/// # Safety
///
/// As the call: one that takes memory away, or lends it to a device, does so whatever the program has there.
pub unsafe fn raw(number: u64, arguments: [u64; 6]) -> (u64, u64) {
    let [a, b, c, d, e, f] = arguments;
    let (error, value);
    // SAFETY: the kernel changes x0 and x1 and what the call is about, nothing else.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") a => error, inlateout("x1") b => value, in("x2") c, in("x3") d,
             in("x4") e, in("x5") f, options(nostack));
    }
    (error, value)
}

/// Asks the kernel.
///
/// # Safety
///
/// As [`raw`].
unsafe fn call<const N: usize>(call: Call, arguments: [u64; N]) -> Result<u64, ErrorCode> {
    let mut all = [0; 6];
    all.iter_mut().zip(arguments).for_each(|(to, from)| *to = from);
    // SAFETY: the caller's promise.
    match unsafe { raw(call as u64, all) } {
        (0, value) => Ok(value),
        (error, _) => Err(ErrorCode::from_number(error).unwrap_or(ErrorCode::Failed)),
    }
}

/// Ends the program.
pub fn exit(code: u64) -> ! {
    // SAFETY: nothing runs after it.
    let _ = unsafe { call(Call::Exit, [code]) };
    // The kernel does not come back.
    loop {
        core::hint::spin_loop();
    }
}

/// Writes a line to the kernel's log.
///
/// # Errors
///
/// [`ErrorCode::BadLength`] for one that is too long.
pub fn write(text: &[u8]) -> Result<(), ErrorCode> {
    // SAFETY: the kernel reads the text.
    unsafe { call(Call::Write, [text.as_ptr().addr() as u64, text.len() as u64]) }.map(drop)
}

/// Asks for fresh, zeroed memory: whole pages.
///
/// # Errors
///
/// [`ErrorCode::BadLength`], [`ErrorCode::BadRights`], [`ErrorCode::OutOfMemory`], [`ErrorCode::Quota`].
pub fn map(len: u64, rights: Rights) -> Result<u64, ErrorCode> {
    // SAFETY: nothing was there.
    unsafe { call(Call::Map, [len, rights]) }
}

/// Gives memory back that [`map`] gave.
///
/// # Errors
///
/// [`ErrorCode::NotMapped`], [`ErrorCode::Busy`].
///
/// # Safety
///
/// Nothing uses it any more.
pub unsafe fn unmap(address: u64, len: u64) -> Result<(), ErrorCode> {
    // SAFETY: the caller's promise.
    unsafe { call(Call::Unmap, [address, len]) }.map(drop)
}

/// Nanoseconds of the kernel's clock.
pub fn time() -> u64 {
    // SAFETY: changes nothing.
    unsafe { call(Call::Time, []) }.unwrap_or_default()
}

/// Sleeps.
pub fn sleep(nanoseconds: u64) {
    // SAFETY: changes nothing.
    let _ = unsafe { call(Call::Sleep, [nanoseconds]) };
}

/// A device that was put by for the program. Given up when dropped.
pub struct Device(u64);

impl Device {
    /// Takes the device with this number.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoSuchDevice`], [`ErrorCode::Busy`], [`ErrorCode::Unsupported`].
    pub fn open(number: u64, mode: Mode) -> Result<Self, ErrorCode> {
        // SAFETY: a device reaches nothing that was not lent to it, or, in the shared mode, what the driver tells it to reach.
        unsafe { call(Call::Open, [number, mode as u64]) }.map(Self)
    }

    /// The handle.
    pub fn handle(&self) -> u64 {
        self.0
    }

    /// 32 bits of configuration space.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadAddress`].
    pub fn config(&self, offset: u64) -> Result<u32, ErrorCode> {
        // SAFETY: changes nothing.
        unsafe { call(Call::Config, [self.0, offset]) }.map(|value| value as u32)
    }

    /// 8 bits of configuration space.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadAddress`].
    pub fn config8(&self, offset: u64) -> Result<u8, ErrorCode> {
        Ok((self.config(offset & !3)? >> (8 * (offset & 3))) as u8)
    }

    /// The registers of a memory BAR.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoSuchDevice`], [`ErrorCode::Unsupported`] for a BAR that is the kernel's.
    pub fn registers(&self, bar: u64) -> Result<Registers, ErrorCode> {
        // SAFETY: changes nothing.
        let len = unsafe { call(Call::BarSize, [self.0, bar]) }?;
        // SAFETY: nothing was there.
        unsafe { call(Call::Registers, [self.0, bar]) }.map(|base| Registers { base, len })
    }

    /// Lends memory to the device, at its address `iova`.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadAddress`], [`ErrorCode::Overlap`], [`ErrorCode::Reserved`] and others.
    ///
    /// # Safety
    ///
    /// The program looks at the memory by volatile accesses only, until it has taken it back.
    pub unsafe fn lend(&self, iova: u64, address: u64, len: u64, rights: Rights) -> Result<(), ErrorCode> {
        // SAFETY: the caller's promise.
        unsafe { call(Call::Lend, [self.0, iova, address, len, rights]) }.map(drop)
    }

    /// Takes back what was lent.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotMapped`].
    pub fn take_back(&self, iova: u64, len: u64) -> Result<(), ErrorCode> {
        // SAFETY: the device loses it.
        unsafe { call(Call::TakeBack, [self.0, iova, len]) }.map(drop)
    }

    /// Connects an interrupt.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NoSuchDevice`], [`ErrorCode::Unsupported`].
    pub fn connect(&self, vector: u64) -> Result<(), ErrorCode> {
        // SAFETY: changes nothing that the program has.
        unsafe { call(Call::Connect, [self.0, vector]) }.map(drop)
    }

    /// Waits for an interrupt.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::TimedOut`].
    pub fn wait(&self, nanoseconds: u64) -> Result<u64, ErrorCode> {
        // SAFETY: changes nothing that the program has.
        unsafe { call(Call::Wait, [self.0, nanoseconds]) }
    }

    /// Lets the device interrupt again.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadHandle`].
    pub fn acknowledge(&self) -> Result<(), ErrorCode> {
        // SAFETY: changes nothing that the program has.
        unsafe { call(Call::Acknowledge, [self.0]) }.map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: registers that are still used afterwards fault, which ends the program.
        let _ = unsafe { call(Call::Close, [self.0]) };
    }
}

/// A shared buffer that was put by for the program. Given up when dropped.
pub struct Buffer {
    handle: u64,
    len: u64,
    at: Option<u64>,
}

impl Buffer {
    /// Opens the buffer with this number.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPutBy`], [`ErrorCode::Quota`].
    pub fn open(number: u64) -> Result<Self, ErrorCode> {
        // SAFETY: changes nothing that the program has.
        let handle = unsafe { call(Call::OpenBuffer, [number]) }?;
        let mut buffer = Self { handle, len: 0, at: None };
        // SAFETY: as above.
        buffer.len = unsafe { call(Call::BufferSize, [handle]) }?;
        Ok(buffer)
    }

    /// The handle.
    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sets addresses aside for it, a multiple of `alignment`: a power of two, at least a page. Returns the first; nothing is there yet.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Misaligned`] for what is no alignment; [`ErrorCode::Overlap`] the second time; [`ErrorCode::Quota`].
    pub fn map(&mut self, alignment: u64) -> Result<u64, ErrorCode> {
        // SAFETY: nothing was there.
        let at = unsafe { call(Call::MapBuffer, [self.handle, alignment]) }?;
        self.at = Some(at);
        Ok(at)
    }

    /// Begins an access, which ends when the result is dropped. Waits `nanoseconds` at most for those who are in the way.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotMapped`] before [`Buffer::map`]; [`ErrorCode::TimedOut`], [`ErrorCode::BadRights`], [`ErrorCode::Unsupported`] for
    /// memory that processors do not reach; [`ErrorCode::Failed`] where a device did not do what was to be awaited.
    pub fn begin(&mut self, rights: Rights, nanoseconds: u64) -> Result<Access<'_>, ErrorCode> {
        let at = self.at.ok_or(ErrorCode::NotMapped)?;
        // SAFETY: nothing was there: what borrows the memory borrows this object, as long as the access lasts.
        let waited = unsafe { call(Call::BeginAccess, [self.handle, rights, nanoseconds]) }?;
        let start = core::ptr::with_exposed_provenance_mut(at as usize);
        Ok(Access { buffer: self, start, writes: rights & WRITE != 0, waited })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: nothing borrows its memory any more.
        let _ = unsafe { call(Call::Close, [self.handle]) };
    }
}

/// An access to a shared buffer. While it lasts nobody writes what the program reads, and nobody else has what it writes.
pub struct Access<'a> {
    buffer: &'a mut Buffer,
    start: *mut u8,
    writes: bool,
    waited: u64,
}

impl Access<'_> {
    /// Nanoseconds that its beginning took.
    pub fn waited(&self) -> u64 {
        self.waited
    }

    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for the length of the access, which this object is; nobody writes it meanwhile but through this object.
        unsafe { core::slice::from_raw_parts(self.start, self.buffer.len as usize) }
    }

    /// The memory, to be written. Empty in an access that only reads.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = if self.writes { self.buffer.len as usize } else { 0 };
        // SAFETY: as above, and writable where it is not empty; devices may read it meanwhile, and see what they see.
        unsafe { core::slice::from_raw_parts_mut(self.start, len) }
    }

    /// Ends it, as dropping it does, and says whether that went well.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Failed`].
    pub fn end(self) -> Result<(), ErrorCode> {
        let handle = core::mem::ManuallyDrop::new(self).buffer.handle;
        // SAFETY: what borrowed the memory borrowed the object that was given up.
        unsafe { call(Call::EndAccess, [handle]) }.map(drop)
    }
}

impl Drop for Access<'_> {
    fn drop(&mut self) {
        // SAFETY: what borrowed the memory borrowed this object.
        let _ = unsafe { call(Call::EndAccess, [self.buffer.handle]) };
    }
}

/// An event that was put by for the program. Given up when dropped.
pub struct Event(u64);

impl Event {
    /// Opens the event with this number.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::NotPutBy`], [`ErrorCode::Quota`].
    pub fn open(number: u64) -> Result<Self, ErrorCode> {
        // SAFETY: changes nothing that the program has.
        unsafe { call(Call::OpenEvent, [number]) }.map(Self)
    }

    /// The handle.
    pub fn handle(&self) -> u64 {
        self.0
    }

    /// Raises it.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::BadHandle`].
    pub fn raise(&self) -> Result<(), ErrorCode> {
        // SAFETY: as above.
        unsafe { call(Call::Raise, [self.0]) }.map(drop)
    }

    /// Waits until it was raised. Returns how often it was since the last time.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::TimedOut`].
    pub fn wait(&self, nanoseconds: u64) -> Result<u64, ErrorCode> {
        // SAFETY: as above.
        unsafe { call(Call::Wait, [self.0, nanoseconds]) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { call(Call::Close, [self.0]) };
    }
}

/// Maps memory that was put by for the program, and that others have too, all the time: it is looked at by volatile accesses.
///
/// # Errors
///
/// [`ErrorCode::NotPutBy`], [`ErrorCode::BadRights`], [`ErrorCode::Quota`].
pub fn map_memory(number: u64, rights: Rights) -> Result<Registers, ErrorCode> {
    // SAFETY: changes nothing.
    let len = unsafe { call(Call::MemorySize, [number]) }?;
    // SAFETY: nothing was there.
    unsafe { call(Call::MapMemory, [number, rights]) }.map(|base| Registers { base, len })
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads a register.
        ///
        /// # Panics
        ///
        /// Outside the window.
        pub fn $read(&self, offset: u64) -> $type {
            let at = self.at(offset, size_of::<$type>() as u64);
            // SAFETY: inside the window, which the kernel has mapped, and aligned.
            unsafe { core::ptr::with_exposed_provenance::<$type>(at).read_volatile() }
        }

        /// Writes a register.
        ///
        /// # Panics
        ///
        /// Outside the window.
        pub fn $write(&self, offset: u64, value: $type) {
            let at = self.at(offset, size_of::<$type>() as u64);
            // SAFETY: as above.
            unsafe { core::ptr::with_exposed_provenance_mut::<$type>(at).write_volatile(value) }
        }
    };
}

/// A device's registers, or memory that it looks at: volatile accesses, each checked.
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    base: u64,
    len: u64,
}

impl Registers {
    /// The `len` bytes of memory at `base`.
    ///
    /// # Safety
    ///
    /// They are mapped as long as this is used, and nothing refers to them.
    pub unsafe fn of_memory(base: u64, len: u64) -> Self {
        Self { base, len }
    }

    /// Where they lie.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// How many bytes they are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of them.
    pub fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(Self { base: self.base + offset, len })
    }

    fn at(&self, offset: u64, size: u64) -> usize {
        assert!(
            offset.is_multiple_of(size) && offset.checked_add(size).is_some_and(|end| end <= self.len),
            "{offset:#x}"
        );
        (self.base + offset) as usize
    }

    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);
    access!(read64, write64, u64);
}

/// Makes earlier stores visible to devices, and later loads see what they stored.
pub fn barrier() {
    // SAFETY: a barrier.
    unsafe { asm!("dmb osh", options(nostack, preserves_flags)) };
}

/// A line of text that is being put together.
pub struct Line {
    text: [u8; LINE as usize],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { text: [0; LINE as usize], len: 0 }
    }
}

impl Line {
    /// Writes it to the log.
    pub fn end(&self) {
        // What is too long was cut.
        let _ = write(self.text.get(..self.len).unwrap_or_default());
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..).unwrap_or_default();
        let bytes = room.len().min(text.len());
        for (to, from) in room.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        self.len += bytes;
        Ok(())
    }
}

/// Writes a formatted line to the log.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        let mut line = $crate::sys::Line::default();
        let _ = core::fmt::Write::write_fmt(&mut line, format_args!($($text)*));
        line.end();
    }};
}
