//! Privileged Access Never: the kernel cannot reach what EL0 can, even where its tables are in place.

use crate::bench::soon;
use arch::user::{self, Asid, Tables};
use board::{COHERENT, End, UserProcess};
use iommu::pgtable::{Geometry, Granule, PageTable, Stage};
use iommu::{Iova, IovaRange, PAGE_SIZE, Prot};
use ktest::{expect, expect_eq, ktest};
use process::Quota;
use programs::TRIAL;

const AT: u64 = 0x1234_5000;
const WORD: u64 = 0x5e_c4e7;

ktest! {
    /// Red where PAN is not set (`has_pan` says no). The same load succeeds with PAN lifted: the page is there.
    fn the_kernel_does_not_reach_what_a_process_can(_bench) {
        let process = UserProcess::new("trial", TRIAL, [0, 7, 0], Quota::default())?;
        expect_eq!(process.run(soon()), End::Exited(7));
        expect_eq!(user::never(), Some(true));
        let frame = kernel::mm::alloc_zeroed(1, kernel::mm::Zone::Any)?;
        let linear = kernel::mm::phys_to_virt(frame.start()).get();
        // SAFETY: a frame of ours.
        unsafe { arch::probe::write64(linear, WORD) }?;
        let geometry = Geometry::new(Granule::K4, Stage::One, 48, 48).map_err(|_| board::Error::Missing("geometry"))?;
        let table = PageTable::new(geometry, &COHERENT)?;
        let page = IovaRange::new(Iova::new(AT), PAGE_SIZE).unwrap_or_default();
        table.map(page, &[frame], Prot::READ | Prot::WRITE)?;
        let asid = Asid::allocate().ok_or(board::Error::Missing("ASID"))?;
        let tables = || Tables { root: table.root().get(), asid: &asid };
        // SAFETY: the table maps the frame alone, which nobody refers to, and stays.
        let refused = unsafe { user::read_from_kernel(tables(), AT + 8, false) };
        expect!(refused.is_err_and(|fault| fault.esr.is_permission_fault() && fault.far == AT + 8), "{refused:?}");
        // SAFETY: as above.
        expect_eq!(unsafe { user::read_from_kernel(tables(), AT, true) }, Ok(WORD));
        expect_eq!(user::never(), Some(true));
        drop(asid);
        // SAFETY: nothing uses the frame: the ASID is gone from TLBs, and nobody walks the table.
        unsafe { kernel::mm::free(frame) }?;
        Ok(())
    }
    machine: max
}
