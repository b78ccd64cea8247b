//! As much of PSCI (Arm DEN 0022) as it takes to start cores and to switch the machine off, called by SMC.

use crate::last_words::{Power, power};
use crate::registers::{enter, wait, wake};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use sbsa::map::{self, MAX_CORES};

const VERSION: u32 = 0x8400_0000;
const CPU_ON: u32 = 0x8400_0003;
const CPU_ON_64: u32 = 0xc400_0003;
const AFFINITY_INFO: u32 = 0x8400_0004;
const AFFINITY_INFO_64: u32 = 0xc400_0004;
const SYSTEM_OFF: u32 = 0x8400_0008;
const SYSTEM_RESET: u32 = 0x8400_0009;
const FEATURES: u32 = 0x8400_000a;

const NOT_SUPPORTED: i64 = -1;
const INVALID_PARAMETERS: i64 = -2;
const ALREADY_ON: i64 = -4;
const ON_PENDING: i64 = -5;
const INVALID_ADDRESS: i64 = -9;

/// No such core.
const ABSENT: u8 = 0;
/// It waits.
const OFF: u8 = 1;
/// Somebody writes down what it is to run.
const CLAIMED: u8 = 2;
/// It is to run what is written down.
const STARTING: u8 = 3;
/// It runs.
const ON: u8 = 4;

struct Core {
    state: AtomicU8,
    entry: AtomicU64,
    context: AtomicU64,
}

static CORES: [Core; MAX_CORES] =
    [const { Core { state: AtomicU8::new(ABSENT), entry: AtomicU64::new(0), context: AtomicU64::new(0) } }; MAX_CORES];

/// Makes known that there are these cores, of which the calling one runs.
pub(crate) fn init(mpidrs: &[u64], own: usize) {
    for index in mpidrs.iter().filter_map(|&mpidr| map::core_index(mpidr)) {
        if let Some(core) = CORES.get(index) {
            core.state.store(if index == own { ON } else { OFF }, Ordering::Release);
        }
    }
}

/// What a core does that is off.
#[unsafe(no_mangle)]
extern "C" fn secondary(index: usize) -> ! {
    loop {
        if let Some(core) = CORES.get(index)
            && core.state.load(Ordering::Acquire) == STARTING
        {
            let (entry, context) = (core.entry.load(Ordering::Relaxed), core.context.load(Ordering::Relaxed));
            core.state.store(ON, Ordering::Release);
            enter(entry, context);
        }
        wait();
    }
}

fn cpu_on(mpidr: u64, entry: u64, context: u64) -> i64 {
    let Some(core) = map::core_index(mpidr).and_then(|index| CORES.get(index)) else {
        return INVALID_PARAMETERS;
    };
    if entry < map::RAM || !entry.is_multiple_of(4) {
        return INVALID_ADDRESS;
    }
    match core.state.compare_exchange(OFF, CLAIMED, Ordering::Acquire, Ordering::Relaxed) {
        Ok(_) => {}
        Err(ABSENT) => return INVALID_PARAMETERS,
        Err(ON) => return ALREADY_ON,
        Err(_) => return ON_PENDING,
    }
    core.entry.store(entry, Ordering::Relaxed);
    core.context.store(context, Ordering::Relaxed);
    core.state.store(STARTING, Ordering::Release);
    wake();
    0
}

fn affinity_info(mpidr: u64, level: u64) -> i64 {
    let core = map::core_index(mpidr).and_then(|index| CORES.get(index));
    match core.map_or(ABSENT, |core| core.state.load(Ordering::Acquire)) {
        _ if level != 0 => INVALID_PARAMETERS,
        ABSENT => INVALID_PARAMETERS,
        ON => 0,
        OFF => 1,
        _ => 2,
    }
}

/// Answers a call: x0 to x3 in, x0 out.
#[unsafe(no_mangle)]
extern "C" fn smc(function: u64, first: u64, second: u64, third: u64) -> i64 {
    match function as u32 {
        // 1.1
        VERSION => 0x1_0001,
        CPU_ON_64 => cpu_on(first, second, third),
        CPU_ON => cpu_on(first & 0xffff_ffff, second & 0xffff_ffff, third & 0xffff_ffff),
        AFFINITY_INFO | AFFINITY_INFO_64 => affinity_info(first, second),
        SYSTEM_OFF => power(Power::Off),
        SYSTEM_RESET => power(Power::Reset),
        FEATURES => match first as u32 {
            VERSION | CPU_ON | CPU_ON_64 | AFFINITY_INFO | AFFINITY_INFO_64 | SYSTEM_OFF | SYSTEM_RESET | FEATURES => 0,
            _ => NOT_SUPPORTED,
        },
        _ => NOT_SUPPORTED,
    }
}
