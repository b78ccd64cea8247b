//! A spin lock that masks interrupts on this core while it is held.

use crate::hooks::__private as hooks;
use core::fmt;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use spin::mutex::{SpinMutex, SpinMutexGuard};

/// Mutual exclusion between cores and with this core's interrupt handlers.
///
/// Hold it briefly, and never across [`crate::wait_until`].
pub struct IrqMutex<T: ?Sized> {
    inner: SpinMutex<T>,
}

impl<T> IrqMutex<T> {
    /// Wraps `value`.
    pub const fn new(value: T) -> Self {
        Self { inner: SpinMutex::new(value) }
    }

    /// Unwraps the value.
    pub fn into_inner(self) -> T {
        self.inner.into_inner()
    }
}

impl<T: ?Sized> IrqMutex<T> {
    /// Masks interrupts and takes the lock, spinning while another core has it.
    #[inline]
    pub fn lock(&self) -> IrqMutexGuard<'_, T> {
        let state = hooks::irq_save();
        IrqMutexGuard { inner: ManuallyDrop::new(self.inner.lock()), state }
    }

    /// Takes the lock if it is free. For panics and fault reports, which must not wait for a lock that their own core holds.
    #[inline]
    pub fn try_lock(&self) -> Option<IrqMutexGuard<'_, T>> {
        let state = hooks::irq_save();
        match self.inner.try_lock() {
            Some(guard) => Some(IrqMutexGuard { inner: ManuallyDrop::new(guard), state }),
            None => {
                hooks::irq_restore(state);
                None
            }
        }
    }

    /// The value, without locking: the exclusive borrow is proof that nobody else has it.
    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut()
    }
}

impl<T: Default> Default for IrqMutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for IrqMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.try_lock() {
            Some(guard) => f.debug_tuple("IrqMutex").field(&&*guard).finish(),
            None => f.write_str("IrqMutex(<locked>)"),
        }
    }
}

/// Access to what an [`IrqMutex`] guards; unlocks, then restores the interrupt mask, when dropped.
#[must_use]
pub struct IrqMutexGuard<'a, T: ?Sized> {
    inner: ManuallyDrop<SpinMutexGuard<'a, T>>,
    state: usize,
}

impl<T: ?Sized> Deref for IrqMutexGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for IrqMutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T: ?Sized> Drop for IrqMutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: `inner` is dropped here and nowhere else, and not used afterwards. It must go before the mask is restored:
        // an interrupt taken in between would spin for ever on a lock that its own core holds.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
        hooks::irq_restore(self.state);
    }
}
