//! How a device is treated beyond what it can put on the bus: whether it is trusted, and where copies for it are kept.

use crate::pool::{Pool, PoolRef};
use crate::{Device, Error};
use alloc::sync::Arc;
use base::{IrqMutex, fallible};
use iommu::MapError;

/// Bytes of a pool that a device gets when it first needs one.
const OWN: u64 = 8 << 20;

/// How a device is treated.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Whether a buffer that shares its page with other memory is lent as it is. The device then reaches all of the page:
    /// what is given up is the fence, for what lies beside such buffers. Behind no IOMMU it makes no difference.
    pub trusted: bool,
    /// When the device gets a copy, and of which pool.
    pub bounce: Bounce,
}

/// When a device gets a copy in place of a buffer.
#[derive(Clone, Debug)]
pub enum Bounce {
    /// Never: what it cannot reach is an error.
    Never,
    /// Where it cannot reach the buffer.
    Needed(PoolSource),
    /// Always, but for coherent memory.
    Always(PoolSource),
    /// Always, and all other memory of the device comes from the pool too: it has no other. Buffers that are the pool's already
    /// are lent as they are. The pool's memory is cached: a device that does not snoop has no coherent memory then, but
    /// [`Error::Attributes`], and does with [`Device::non_coherent`].
    Restricted(&'static Pool),
}

impl Default for Bounce {
    fn default() -> Self {
        Self::Needed(PoolSource::default())
    }
}

/// Whose pool it is.
#[derive(Clone, Debug)]
pub enum PoolSource {
    /// The device's own, of so many bytes, made of memory that it reaches when it first needs it.
    Own(u64),
    /// One that several devices share.
    Shared(Arc<Pool>),
}

impl Default for PoolSource {
    fn default() -> Self {
        Self::Own(OWN)
    }
}

/// The pool of one device.
pub(crate) enum Source {
    None,
    /// The lock is a leaf: the pool is made before it is taken.
    Own {
        bytes: u64,
        pool: IrqMutex<Option<Arc<Pool>>>,
    },
    Given(PoolRef),
}

impl Source {
    /// The pool for the copies of a policy.
    pub(crate) fn new(bounce: &Bounce) -> Self {
        match bounce {
            Bounce::Never => Self::None,
            Bounce::Needed(PoolSource::Own(bytes)) | Bounce::Always(PoolSource::Own(bytes)) => {
                Self::Own { bytes: *bytes, pool: IrqMutex::new(None) }
            }
            Bounce::Needed(PoolSource::Shared(pool)) | Bounce::Always(PoolSource::Shared(pool)) => {
                Self::Given(PoolRef::Shared(pool.clone()))
            }
            Bounce::Restricted(pool) => Self::Given(PoolRef::Static(pool)),
        }
    }

    /// The pool, which is made if it has to be.
    pub(crate) fn get(&self, device: &Device) -> Result<PoolRef, Error> {
        let (bytes, own) = match self {
            Self::None => return Err(Error::OutOfMemory),
            Self::Given(pool) => return Ok(pool.clone()),
            Self::Own { bytes, pool } => (*bytes, pool),
        };
        if let Some(pool) = &*own.lock() {
            return Ok(PoolRef::Shared(pool.clone()));
        }
        let made = fallible::arc(device.make_pool(bytes)?).map_err(|_| Error::OutOfMemory)?;
        let mut own = own.lock();
        let kept = own.get_or_insert_with(|| made.clone()).clone();
        drop(own);
        // Another core may have been faster.
        drop(made);
        Ok(PoolRef::Shared(kept))
    }

    /// The most that is copied at one time; 0 without a pool.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Own { bytes, .. } => *bytes,
            Self::Given(pool) => pool.len(),
        }
    }
}

/// Whether a copy can be lent where the memory itself was refused with `error`.
pub(crate) fn helps(error: &Error) -> bool {
    matches!(
        error,
        Error::Unreachable { .. }
            | Error::Misaligned { .. }
            | Error::Map(MapError::OutputTooLarge(_) | MapError::Misaligned(_))
    )
}
