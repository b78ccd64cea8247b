//! A machine as a value, and as QEMU's arguments.

use crate::board::{self, Board};
use crate::cli::TraceRequest;
use crate::emulator::{Emulator, Version};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The id of the display device, by which its screen is read back.
pub const DISPLAY: &str = "gpu0";

/// How a disk image is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte for byte.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

/// A disk of the machine. The image file is never written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image file.
    pub file: PathBuf,
    /// How it is coded.
    pub format: DiskFormat,
    /// Whether the guest may write; what it writes is lost at the end.
    pub writable: bool,
}

impl Disk {
    /// Opens an image file to see that it is there and how it is coded. The guest may only read it.
    pub fn open(file: &Path) -> Result<Self> {
        let advice = || format!("the disk image {} cannot be read; check the path given with --disk", file.display());
        let mut opened = File::open(file).with_context(advice)?;
        if opened.metadata().with_context(advice)?.is_dir() {
            bail!("the disk image {} is a directory; give a raw or qcow2 file with --disk", file.display());
        }
        let mut magic = Vec::new();
        opened.by_ref().take(4).read_to_end(&mut magic).with_context(advice)?;
        let format = if magic == b"QFI\xfb" { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        Ok(Self { file: file.to_path_buf(), format, writable: false })
    }

    /// Lets the guest write, to a copy that is lost at the end.
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }
}

/// What translates for the devices on the PCIe bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Iommu {
    /// An SMMUv3
    #[default]
    SmmuV3,
    /// A virtio-iommu, at slot 6
    Virtio,
    /// Nothing: the kernel refuses to run devices then, unless it is told --append iommu.off=allow
    None,
}

/// Where the devices are, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// The edu.
    pub edu: String,
    /// The virtio-blk disk.
    pub disk: String,
    /// The virtio-gpu.
    pub display: String,
}

impl Slots {
    /// Slots 1, 2 and 3 of the root bus; slot 1 of an sbsa-ref has the board's own display, its edu is in slot 16.
    fn of(board: &Board) -> Self {
        let edu = if matches!(board, Board::Sbsa { .. }) { "10" } else { "1" };
        let slot = |number: &str| format!("bus=pcie.0,addr={number}");
        Self { edu: slot(edu), disk: slot("2"), display: slot("3") }
    }
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The board.
    pub board: Board,
    /// Further options of the board, in QEMU's words.
    pub options: Vec<String>,
    /// Bridges and the like, which come before all other devices.
    pub bridges: Vec<String>,
    /// Where the devices are, if not in slots 1 to 3 of the root bus.
    pub slots: Option<Slots>,
    /// Number of cores.
    pub smp: u32,
    /// Main memory, in QEMU's notation.
    pub memory: String,
    /// Processor model.
    pub cpu: String,
    /// What translates for the devices on the PCIe bus.
    pub iommu: Iommu,
    /// Whether there is a virtio-gpu.
    pub gpu: bool,
    /// Whether there is an edu device.
    pub edu: bool,
    /// The virtio-blk disk.
    pub disk: Option<Disk>,
    /// Further disks with the same content, from slot 4 of the root bus on. What the guest writes to one is that one's.
    pub more_disks: u32,
    /// Count instructions instead of time.
    pub icount: bool,
    /// The display backend that opens a window.
    pub window: Option<&'static str>,
    /// Trace events to record, all in one file.
    pub trace: Vec<TraceRequest>,
    /// The kernel's command line, in parts.
    pub command_line: Vec<String>,
    /// Passed to QEMU unchanged, after everything else.
    pub extra: Vec<OsString>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            board: Board::Virt,
            options: Vec::new(),
            bridges: Vec::new(),
            slots: None,
            smp: 2,
            memory: "512M".into(),
            cpu: "cortex-a72".into(),
            iommu: Iommu::SmmuV3,
            gpu: true,
            edu: true,
            disk: None,
            more_disks: 0,
            icount: false,
            window: None,
            trace: Vec::new(),
            command_line: Vec::new(),
            extra: Vec::new(),
        }
    }
}

impl Machine {
    /// Returns QEMU's arguments for this machine, which is started by the arguments `start` (see [`Board::start`]), its control
    /// socket at `control`.
    ///
    /// Fails if the traces ask for more than one file: QEMU writes one; and if the board cannot be had with this IOMMU, or from this
    /// QEMU.
    pub fn arguments(&self, emulator: &Emulator, start: Vec<OsString>, control: &Path) -> Result<Vec<OsString>> {
        let mut arguments = Arguments::default();
        match self.board {
            Board::Virt | Board::Loaded { .. } => {
                let iommu = if self.iommu == Iommu::SmmuV3 { "smmuv3" } else { "none" };
                // The tree's random seeds would make two runs of one machine differ.
                let options = self.options.iter().fold(String::new(), |all, option| all + "," + option);
                arguments.two("-M", format!("virt,iommu={iommu},gic-version=3,dtb-randomness=off{options}"));
            }
            Board::Sbsa { .. } if self.iommu != Iommu::SmmuV3 => {
                bail!("the board sbsa has an SMMUv3, always; leave --iommu out");
            }
            Board::Sbsa { .. } if emulator.version < board::Name::Sbsa.since() => {
                bail!("the board sbsa needs QEMU {} or newer", board::Name::Sbsa.since());
            }
            // The display that the board always has comes with a program for PCs, which need not be installed.
            Board::Sbsa { .. } => drop(arguments.two("-M", "sbsa-ref").two("-global", "pci-device.romfile=")),
        }
        arguments.two("-cpu", &self.cpu).two("-smp", self.smp.to_string()).two("-m", &self.memory);
        arguments.one("-nodefaults").one("-no-reboot");
        arguments.two("-semihosting-config", "enable=on,target=native,chardev=console");
        arguments.two("-display", self.window.unwrap_or("none"));
        // One console for the serial line and for what is said by semihosting, which is all there is before a UART is known.
        arguments.two("-chardev", "stdio,id=console,signal=off,mux=on").two("-serial", "chardev:console");
        arguments.two("-qmp", joined(["unix:".into(), escaped(control), ",server=on,wait=off".into()]));
        if emulator.version >= Version(11, 0, 0) {
            arguments.two("-run-with", "exit-with-parent=on");
        }
        if self.icount {
            // Idle time must pass at its real pace: a disk answers in host time, and a deadline must not jump ahead of it.
            arguments.two("-icount", "shift=0,sleep=on");
        }
        self.add_devices(emulator, &mut arguments);
        self.add_trace(&mut arguments)?;
        let mut list = arguments.0;
        list.extend(start);
        list.extend(self.extra.iter().cloned());
        Ok(list)
    }

    fn add_devices(&self, emulator: &Emulator, arguments: &mut Arguments) {
        let virtio = virtio_options(emulator);
        let of_board = Slots::of(&self.board);
        let Slots { edu, disk: disk_slot, display } = self.slots.as_ref().unwrap_or(&of_board);
        for bridge in &self.bridges {
            arguments.two("-device", bridge);
        }
        if self.iommu == Iommu::Virtio {
            // Before the devices that it translates for. It starts as machines do, letting everything through.
            arguments.two("-device", "virtio-iommu-pci,bus=pcie.0,addr=6");
        }
        let takes_messages = match self.board {
            Board::Sbsa { .. } => board::Name::Sbsa.takes_messages(emulator.version),
            Board::Virt | Board::Loaded { .. } => true,
        };
        if self.edu && takes_messages {
            arguments.two("-device", format!("edu,{edu},dma_mask=0xffffffffffffffff"));
        }
        if let Some(disk) = &self.disk {
            let format = match disk.format {
                DiskFormat::Raw => "raw",
                DiskFormat::Qcow2 => "qcow2",
            };
            let access = if disk.writable { "snapshot=on" } else { "readonly=on" };
            for number in 0..=self.more_disks {
                let options = format!(",format={format},{access}").into();
                let name = format!("if=none,id=disk{number},file=").into();
                arguments.two("-drive", joined([name, escaped(&disk.file), options]));
                let slot = if number == 0 { disk_slot.clone() } else { format!("bus=pcie.0,addr={:x}", number + 3) };
                arguments.two("-device", format!("virtio-blk-pci,{slot},drive=disk{number},{virtio}"));
            }
        }
        if self.gpu {
            arguments.two("-device", format!("virtio-gpu-pci,{display},id={DISPLAY},{virtio}"));
        }
    }

    fn add_trace(&self, arguments: &mut Arguments) -> Result<()> {
        let Some(first) = self.trace.first() else { return Ok(()) };
        for request in &self.trace {
            if request.file != first.file {
                bail!("QEMU writes one trace file: give all --trace patterns the same FILE");
            }
            arguments.two("-trace", format!("enable={}", request.pattern.replace(',', ",,")));
        }
        arguments.two("-D", &first.file);
        Ok(())
    }
}

/// What makes a virtio device one whose accesses the IOMMU translates, and that fails where it may not reach.
pub fn virtio_options(emulator: &Emulator) -> &'static str {
    if emulator.bounce_buffer_limit {
        "disable-legacy=on,iommu_platform=on,x-max-bounce-buffer-size=0"
    } else {
        "disable-legacy=on,iommu_platform=on"
    }
}

/// A list of arguments under construction.
#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn one(&mut self, argument: impl Into<OsString>) -> &mut Self {
        self.0.push(argument.into());
        self
    }

    fn two(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.one(option).one(value)
    }
}

/// Doubles the commas of a file name, as QEMU's option syntax wants them.
pub(crate) fn escaped(file: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = file.as_os_str().as_bytes();
    let doubled = bytes.iter().flat_map(|&byte| std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }));
    OsString::from_vec(doubled.collect())
}

pub(crate) fn joined<const N: usize>(parts: [OsString; N]) -> OsString {
    parts.into_iter().collect()
}

/// Codes a value for the kernel's command line, which is cut at spaces: everything but printable ASCII, and `%` and `"`,
/// becomes `%XX`.
pub fn percent_encoded(value: &str) -> String {
    use std::fmt::Write;
    let mut coded = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'%' | b'"' => {}
            b'!'..=b'~' => {
                coded.push(char::from(byte));
                continue;
            }
            _ => {}
        }
        // Writing to a String cannot fail.
        let _ = write!(coded, "%{byte:02X}");
    }
    coded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emulator(version: Version, bounce_buffer_limit: bool) -> Emulator {
        Emulator { program: "qemu".into(), version, bounce_buffer_limit }
    }

    fn line(machine: &Machine, emulator: &Emulator) -> String {
        let start = vec!["-kernel".into(), "a.Image".into()];
        let arguments = machine.arguments(emulator, start, Path::new("/tmp/a,b")).unwrap();
        arguments.iter().map(|argument| argument.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_virtio_device_is_behind_the_smmu_and_modern() {
        let disk = Disk { file: "d,1".into(), format: DiskFormat::Raw, writable: false };
        let machine = Machine { disk: Some(disk), ..Machine::default() };
        for (version, limit) in [(Version(7, 2, 0), false), (Version(10, 0, 2), true)] {
            let line = line(&machine, &emulator(version, limit));
            assert_eq!(line.matches("disable-legacy=on,iommu_platform=on").count(), 2, "{line}");
            assert_eq!(line.matches("x-max-bounce-buffer-size=0").count(), if limit { 2 } else { 0 }, "{line}");
            assert!(line.contains("file=d,,1,format=raw,readonly=on"), "{line}");
            assert!(line.contains("unix:/tmp/a,,b,server=on"), "{line}");
        }
    }

    #[test]
    fn a_virtio_iommu_comes_before_what_it_translates_for_and_without_an_smmu() {
        let machine = Machine { iommu: Iommu::Virtio, ..Machine::default() };
        let line = line(&machine, &emulator(Version(10, 0, 2), true));
        assert!(line.contains("iommu=none"), "{line}");
        let place = |device: &str| line.find(device).unwrap_or_else(|| panic!("no {device} in {line}"));
        assert!(place("virtio-iommu-pci,") < place("edu,bus=pcie.0,addr=1,"), "{line}");
    }

    #[test]
    fn an_sbsa_starts_from_flash_with_its_own_smmu() {
        let board = Board::Sbsa { hand_over: b"".as_slice().into() };
        let machine = Machine { board, command_line: vec!["a=1".into()], ..Machine::default() };
        let line = line(&machine, &emulator(Version(10, 0, 2), true));
        assert!(line.contains("-M sbsa-ref"), "{line}");
        assert!(line.contains("edu,bus=pcie.0,addr=10,"), "{line}");
        let machine = Machine { iommu: Iommu::None, ..machine };
        let refused = machine.arguments(&emulator(Version(10, 0, 2), true), Vec::new(), Path::new("b"));
        assert!(refused.unwrap_err().to_string().contains("--iommu"));
        let machine = Machine { iommu: Iommu::SmmuV3, ..machine };
        let refused = machine.arguments(&emulator(Version(7, 1, 0), false), Vec::new(), Path::new("b"));
        assert!(refused.unwrap_err().to_string().contains("7.2"));
    }

    #[test]
    fn an_sbsa_on_which_nothing_takes_messages_has_no_edu() {
        let board = Board::Sbsa { hand_over: b"".as_slice().into() };
        let line = line(&Machine { board, ..Machine::default() }, &emulator(Version(7, 2, 0), false));
        assert!(!line.contains("edu") && line.contains("virtio-gpu-pci"), "{line}");
    }

    #[test]
    fn absent_devices_are_absent() {
        let machine = Machine { iommu: Iommu::None, gpu: false, edu: false, ..Machine::default() };
        let line = line(&machine, &emulator(Version(10, 0, 2), true));
        assert!(line.contains("iommu=none") && !line.contains("-device"), "{line}");
    }

    #[test]
    fn bridges_come_before_what_is_behind_them_and_options_after_those_of_every_machine() {
        let slots = Slots { edu: "bus=a".into(), disk: "bus=b".into(), display: "bus=a,addr=1".into() };
        let machine = Machine {
            options: vec!["gic-version=2".into(), "its=off".into()],
            bridges: vec!["bridge,id=a".into()],
            slots: Some(slots),
            ..Machine::default()
        };
        let line = line(&machine, &emulator(Version(10, 0, 2), true));
        assert!(line.contains("dtb-randomness=off,gic-version=2,its=off "), "{line}");
        let place = |device: &str| line.find(device).unwrap_or_else(|| panic!("no {device} in {line}"));
        assert!(place("-device bridge,id=a") < place("-device edu,bus=a"), "{line}");
        assert!(line.contains("virtio-gpu-pci,bus=a,addr=1,id=gpu0,"), "{line}");
    }

    #[test]
    fn further_disks_have_drives_and_slots_of_their_own() {
        let disk = Disk { file: "d".into(), format: DiskFormat::Raw, writable: true };
        let machine = Machine { disk: Some(disk), more_disks: 19, ..Machine::default() };
        let line = line(&machine, &emulator(Version(10, 0, 2), true));
        assert_eq!(line.matches("file=d,format=raw,snapshot=on").count(), 20, "{line}");
        assert!(line.contains("addr=2,drive=disk0,") && line.contains("addr=16,drive=disk19,"), "{line}");
    }

    #[test]
    fn user_arguments_come_last() {
        let machine = Machine { extra: vec!["-device".into(), "edu".into()], ..Machine::default() };
        assert!(line(&machine, &emulator(Version(10, 0, 2), true)).ends_with("-kernel a.Image -device edu"));
    }

    #[test]
    fn traces_share_one_file() {
        let request = |pattern: &str, file: &str| TraceRequest { pattern: pattern.into(), file: file.into() };
        let mut machine = Machine { trace: vec![request("a*", "f"), request("b*", "f")], ..Machine::default() };
        assert!(line(&machine, &emulator(Version(10, 0, 2), true)).contains("-trace enable=a* -trace enable=b* -D f"));
        machine.trace.push(request("c*", "g"));
        assert!(machine.arguments(&emulator(Version(10, 0, 2), true), Vec::new(), Path::new("b")).is_err());
    }

    #[test]
    fn disks_are_recognised_by_content() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("disk");
        for (content, format) in
            [(&b"QFI\xfb\0\0"[..], DiskFormat::Qcow2), (b"QFI", DiskFormat::Raw), (b"", DiskFormat::Raw)]
        {
            std::fs::write(&file, content).unwrap();
            assert_eq!(Disk::open(&file).unwrap().format, format);
        }
        assert!(Disk::open(directory.path()).unwrap_err().to_string().contains("directory"));
        assert!(Disk::open(&directory.path().join("absent")).unwrap_err().to_string().contains("--disk"));
    }

    #[test]
    fn command_line_values_hold_no_space_and_decode_back() {
        assert_eq!(percent_encoded("/a/b.bmp"), "/a/b.bmp");
        assert_eq!(percent_encoded("/100% of \"ä\""), "/100%25%20of%20%22%C3%A4%22");
    }
}
