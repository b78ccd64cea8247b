//! An IOMMU that writes down what it is told, for tests of domains and groups.

#![allow(unsafe_code)] // To implement the unsafe traits of `contract`.

use crate::contract::{AddressSpace, Aperture, Iommu};
use crate::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError, StreamId};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use std::sync::Mutex;

/// An address space without tables: it keeps mappings of whole ranges, for tests that only ask whether they are still there.
pub struct FakeSpace {
    name: u32,
    aperture: Aperture,
    mappings: Mutex<BTreeMap<u64, (IovaRange, PhysRange, Prot)>>,
}

impl FakeSpace {
    pub fn new(name: u32, input_bits: u32) -> Arc<Self> {
        let aperture = Aperture {
            range: IovaRange::new(Iova::new(0), 1 << input_bits).unwrap(),
            page_sizes: 0x4020_1000,
            output_max: PhysAddr::new((1 << 44) - 1),
        };
        Arc::new(Self { name, aperture, mappings: Mutex::default() })
    }
}

// SAFETY: no device exists that could reach anything.
unsafe impl AddressSpace for FakeSpace {
    fn aperture(&self) -> Aperture {
        self.aperture
    }

    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let [run] = runs else { return Err(MapError::BadProt) };
        self.mappings.lock().unwrap().insert(iova.start().get(), (iova, *run, prot));
        Ok(())
    }

    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // SAFETY: the caller's promise.
        unsafe { self.map(iova, runs, prot) }
    }

    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        let mut mappings = self.mappings.lock().unwrap();
        match ranges.iter().find(|range| mappings.remove(&range.start().get()).is_none()) {
            Some(range) => Err(RevokeError::NotMapped(range.start())),
            None => Ok(()),
        }
    }

    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        let mappings = self.mappings.lock().unwrap();
        let (range, run, prot) = mappings.range(..=iova.get()).next_back()?.1;
        let offset = iova.offset_from(range.start())?;
        range.contains(iova).then_some((run.start().checked_add(offset)?, *prot))
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "space {}", self.name)
    }
}

/// What was asked of the IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Attach(u32, String),
    Block(u32),
    Bypass(u32),
}

type Hook = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
pub struct FakeIommu {
    calls: Mutex<Vec<Call>>,
    /// What each stream has; blocked ones are not here.
    attached: Mutex<BTreeMap<u32, String>>,
    /// Which calls from now on fail, and how.
    failures: Mutex<BTreeMap<usize, AttachError>>,
    /// Called while a change is being made.
    meanwhile: Mutex<Option<Hook>>,
}

impl FakeIommu {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The calls since the last time.
    pub fn calls(&self) -> Vec<Call> {
        core::mem::take(&mut self.calls.lock().unwrap())
    }

    /// Lets calls fail, counted from 0 from here.
    pub fn fail(&self, failures: &[(usize, AttachError)]) {
        self.calls.lock().unwrap().clear();
        *self.failures.lock().unwrap() = failures.iter().copied().collect();
    }

    /// Calls `hook` whenever a stream is being changed.
    pub fn meanwhile(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(hook));
    }

    /// What `stream` has.
    pub fn space_of(&self, stream: u32) -> Option<String> {
        self.attached.lock().unwrap().get(&stream).cloned()
    }

    fn call(&self, call: Call) -> Result<(), AttachError> {
        let number = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(call);
            calls.len() - 1
        };
        if let Some(hook) = &*self.meanwhile.lock().unwrap() {
            hook();
        }
        self.failures.lock().unwrap().get(&number).map_or(Ok(()), |error| Err(*error))
    }
}

struct Describe<'a>(&'a dyn AddressSpace);

impl fmt::Display for Describe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.describe(f)
    }
}

// SAFETY: no device exists that could reach anything.
unsafe impl Iommu for FakeIommu {
    fn name(&self) -> &str {
        "fake"
    }

    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        Ok(FakeSpace::new(0, 48))
    }

    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        let space = alloc::format!("{}", Describe(&**space));
        let result = self.call(Call::Attach(stream.get(), space.clone()));
        let mut attached = self.attached.lock().unwrap();
        match result {
            Ok(()) => drop(attached.insert(stream.get(), space)),
            // As the contract of the error says.
            Err(AttachError::TimedOut) => drop(attached.remove(&stream.get())),
            Err(_) => {}
        }
        result
    }

    fn block(&self, stream: StreamId) -> Result<(), AttachError> {
        self.call(Call::Block(stream.get()))?;
        self.attached.lock().unwrap().remove(&stream.get());
        Ok(())
    }

    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError> {
        self.call(Call::Bypass(stream.get()))?;
        self.attached.lock().unwrap().insert(stream.get(), "bypass".into());
        Ok(())
    }
}
