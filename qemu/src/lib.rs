//! Starts QEMU, makes disks, talks QMP, symbolizes backtraces.
