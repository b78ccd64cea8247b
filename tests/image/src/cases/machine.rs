//! What the machine says it is agrees with what QEMU was asked for.

use ktest::{expect, expect_eq, ktest};

ktest! {
    fn memory_cores_and_smmu_are_those_of_the_default_machine(bench) {
        let machine = &bench.boot.machine;
        expect_eq!(machine.memory.iter().map(|range| range.len()).sum::<u64>(), 512 << 20);
        expect_eq!(machine.cpus.len(), 2);
        expect_eq!(machine.smmus.len(), 1);
        expect_eq!(machine.pcie.len(), 1);
        Ok(())
    }
}

ktest! {
    fn the_image_is_entered_at_el1(bench) {
        if bench.boot.machine.model != "linux,dummy-virt" {
            ktest::skip!("only QEMU's virt enters at EL1");
        }
        expect_eq!(bench.boot.entered_at, 1);
        Ok(())
    }
}

ktest! {
    fn the_image_is_entered_at_el2_where_there_is_one(bench) {
        expect_eq!(bench.boot.entered_at, 2);
        Ok(())
    }
    machine: el2
}

ktest! {
    fn eight_cores_are_found(bench) {
        expect_eq!(bench.boot.machine.cpus.len(), 8);
        Ok(())
    }
    machine: smp8
}

ktest! {
    fn one_core_is_found(bench) {
        expect_eq!(bench.boot.machine.cpus.len(), 1);
        Ok(())
    }
    machine: smp1
}

ktest! {
    fn a_machine_without_smmu_says_so(bench) {
        expect!(bench.boot.machine.smmus.is_empty());
        expect!(bench.boot.machine.masters.is_empty());
        Ok(())
    }
    machine: bare
}
