#![allow(missing_docs)]
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use iommu::contract::*;
use iommu::iova::IovaAllocator;
use iommu::*;
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DomainKind {
    Dma,
    Owned,
}
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachmentState {
    Blocked,
    Default,
    Owned,
}
pub struct Domain {
    space: Arc<dyn AddressSpace>,
    iova: IovaAllocator,
}
impl Domain {
    pub fn new(_kind: DomainKind, space: Arc<dyn AddressSpace>, window: IovaRange) -> Result<Self, IovaError> {
        Ok(Self { space, iova: IovaAllocator::new(window, 4096)? })
    }
    pub fn space(&self) -> &Arc<dyn AddressSpace> {
        &self.space
    }
    pub fn iova(&self) -> &IovaAllocator {
        &self.iova
    }
}
pub struct Group {
    iommu: Arc<dyn Iommu>,
    streams: Vec<StreamId>,
    st: IrqMutex<(AttachmentState, Option<Arc<Domain>>)>,
}
impl Group {
    pub fn new(iommu: Arc<dyn Iommu>, streams: Vec<StreamId>) -> Self {
        Self { iommu, streams, st: IrqMutex::new((AttachmentState::Blocked, None)) }
    }
    fn go(&self, d: &Arc<Domain>) -> Result<(), AttachError> {
        for s in &self.streams {
            self.iommu.attach(*s, d.space())?;
        }
        Ok(())
    }
    pub fn attach_default(&self, d: Arc<Domain>) -> Result<(), AttachError> {
        self.go(&d)?;
        *self.st.lock() = (AttachmentState::Default, Some(d));
        Ok(())
    }
    pub fn attach_owned(&self, d: Arc<Domain>) -> Result<(), AttachError> {
        self.go(&d)?;
        self.st.lock().0 = AttachmentState::Owned;
        Ok(())
    }
    pub fn detach_owned(&self) -> Result<(), AttachError> {
        let d = self.st.lock().1.clone();
        self.go(&d.unwrap())?;
        self.st.lock().0 = AttachmentState::Default;
        Ok(())
    }
    pub fn block(&self) -> Result<(), AttachError> {
        for s in &self.streams {
            self.iommu.block(*s)?;
        }
        self.st.lock().0 = AttachmentState::Blocked;
        Ok(())
    }
    pub fn current(&self) -> AttachmentState {
        self.st.lock().0
    }
    pub fn domain(&self) -> Option<Arc<Domain>> {
        let s = self.st.lock();
        if s.0 == AttachmentState::Default { s.1.clone() } else { None }
    }
}
