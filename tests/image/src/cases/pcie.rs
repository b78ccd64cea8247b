//! What is on the bus, and what it may do there.

use alloc::vec::Vec;

use crate::bench::soon;
use iommu::Iova;
use ktest::{expect, expect_eq, ktest};
use testdev::edu::Completion;

ktest! {
    fn nothing_masters_the_bus_before_it_has_an_address_space(bench) {
        let masters = bench.hardware.functions().filter(|(_, function)| function.is_bus_master() && !function.is_bridge());
        expect_eq!(masters.count(), 0);
        let edu = bench.edu()?;
        expect!(edu.master().function().is_bus_master());
        let function = edu.master().function().clone();
        edu.stop()?;
        expect!(!function.is_bus_master());
        Ok(())
    }
}

ktest! {
    fn bars_do_not_overlap_and_lie_in_the_hosts_windows(bench) {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for (host, function) in bench.hardware.functions() {
            for bar in function.bars().filter(|bar| bar.is_memory()) {
                let Some(phys) = bar.phys else {
                    return Err(ktest::Outcome::failed(format_args!("{bar:?} of {function:?} has no place")));
                };
                let (start, end) = (phys.get(), phys.get() + bar.size);
                expect!(phys.is_aligned(bar.size), "{bar:?}");
                let windows = &bench.boot.machine.pcie[host].windows;
                expect!(windows.iter().any(|window| window.cpu.start().get() <= start && end <= window.cpu.end().get()));
                expect!(taken.iter().all(|(from, to)| end <= *from || *to <= start), "{bar:?}");
                taken.push((start, end));
            }
        }
        expect!(taken.len() >= 4);
        Ok(())
    }
}

ktest! {
    fn a_device_behind_a_root_port_has_a_stream_of_its_own(bench) {
        let (first, second) = (bench.edu_master(1)?, bench.edu_master(2)?);
        expect!(first.function().bdf().bus() != 0 && second.function().bdf().bus() != 0);
        expect!(first.streams() != second.streams());
        let first = board::EduStray::start(first)?;
        let since = bench.watch();
        first.edu().dma_from_device(Iova::new(0x1234_5000), 64, Completion::Interrupt, soon())?;
        let noted = bench.fault(first.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
        expect_eq!(noted.fault.iova, Some(Iova::new(0x1234_5000)));
        expect!(!bench.has_faulted(second.streams(), since));
        first.stop()?;
        second.arrest()?;
        Ok(())
    }
    machine: bridge
}
