//! Restricted pools of the device tree as pools of the DMA-API: made when the first device needs them, and kept for good.
//!
//! # Locking
//!
//! One [`IrqMutex`] for the list of pools; the heap's lock comes after it. A pool is made before the lock is taken.

use crate::{COHERENT, Error};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec::Vec;
use base::IrqMutex;
use core::ptr::NonNull;
use dma::Pool;
use kernel::machine::{self, Machine, PoolKind};
use kernel::mm;

/// By the number of their region.
static POOLS: IrqMutex<Vec<(usize, &'static Pool)>> = IrqMutex::new(Vec::new());

/// The pool that all transfers of a PCI function go through, if the device tree has one for it.
pub(crate) fn restricted(machine: &Machine, host: usize, way: &[(u8, u8)]) -> Result<Option<&'static Pool>, Error> {
    match machine.function_pools(host, way).restricted {
        Some(described) => pool(machine, &described).map(Some),
        None => Ok(None),
    }
}

fn made(region: usize) -> Option<&'static Pool> {
    POOLS.lock().iter().find(|(number, _)| *number == region).map(|(_, pool)| *pool)
}

fn pool(machine: &Machine, described: &machine::Pool<'_>) -> Result<&'static Pool, Error> {
    if let Some(pool) = made(described.region) {
        return Ok(pool);
    }
    let failed = |error| Error::Dma { name: described.path.to_string(), error };
    let mapped = machine.reserved.get(described.region).is_some_and(|region| !region.no_map);
    let (Some(range), true, PoolKind::Restricted) = (described.range, mapped, described.kind) else {
        return Err(Error::Missing("memory for a restricted pool of the device tree"));
    };
    let ptr = NonNull::new(mm::pointer(range.start())).ok_or(Error::OutOfMemory)?;
    // SAFETY:
    // - the device tree has set the range aside for this pool, and memory management gives it to nobody; it is in the linear map
    //   (not `no-map`), write-back, and no object lies there; each region becomes one pool, devices are attached by one core;
    // - the kernel's memory maintains caches by address in the linear map.
    let pool = unsafe { Pool::carve_out(described.path, range, ptr, &COHERENT) }.map_err(failed)?;
    let mut pools = POOLS.lock();
    pools.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
    drop(pools);
    let pool: &'static Pool = Box::leak(Box::new(pool));
    log::info!("{}: {:#x} bytes for the devices that have no other memory", pool.name(), pool.len());
    pools = POOLS.lock();
    pools.push((described.region, pool));
    Ok(pool)
}
