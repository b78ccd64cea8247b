//! The command line.
//!
//! `demo` is what runs when no command is named, so its options stand at the top level as well.

use crate::bench::Mode;
use crate::board;
use crate::machine::Iommu;
use crate::show;
use crate::topology::Topology;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

/// What follows the options in `--help`.
const AFTER_HELP: &str = "\
Exit codes:
  0    the kernel reported success
  1    the kernel reported failure, or panicked
  2    the command line or the environment is at fault
  124  out of time

Examples:
  cargo run
  cargo run -- --screenshot screen.png
  cargo run -- --disk card.img --picture '/DCIM/holiday photo.bmp' --gui
  cargo run -- --show sharing --gui
  cargo run -- --smp 8 --memory 16G --cpu max
  cargo run -- --iommu virtio
  cargo run -- --board sbsa --smp 4
  cargo run -- --topology pci-bridge --screenshot screen.png
  cargo run -- bench --svg chart.svg map4k
  cargo run -- describe board.dtb
  cargo run -- image -o sluice.Image
  cargo run -- --trace 'smmuv3_*=smmu.log'
  cargo run -- -- -device pcie-root-port,id=rp0 -device edu,bus=rp0";

/// Boots Sluice under QEMU: a picture on a disk becomes a picture on a screen, every byte moved by device DMA through
/// an IOMMU (an SMMUv3, or a virtio-iommu), and nothing else in memory reachable by either device.
#[derive(Debug, Parser)]
#[command(name = "cargo run --", bin_name = "cargo run --", version, after_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; the demo when nothing is named.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The demo's options, for when no command is named.
    #[command(flatten)]
    pub options: DemoOptions,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a picture from a disk on the screen (the default)
    #[command(after_help = AFTER_HELP)]
    Demo(DemoOptions),
    /// Measure what mapping and I/O cost, beside Linux on the same machine
    Bench(BenchOptions),
    /// Say what the kernel would find on the board of a device tree, and what it would miss there
    #[command(after_help = DESCRIBE_HELP)]
    Describe(DescribeOptions),
    /// List the machines by name that --topology starts
    Topologies(TopologiesOptions),
    /// Run the main job on every topology, with several QEMUs
    #[command(after_help = MATRIX_HELP)]
    Matrix(MatrixOptions),
    /// Write the kernel to a file, for a boot loader
    #[command(after_help = IMAGE_HELP)]
    Image(ImageOptions),
}

/// Options of the list of topologies.
#[derive(Debug, Clone, Args)]
pub struct TopologiesOptions {
    /// The qemu-system-aarch64 to ask instead of the one in PATH
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Install what is missing without asking, with sudo where needed
    #[arg(long)]
    pub yes: bool,
}

/// What follows the options in `matrix --help`.
const MATRIX_HELP: &str = "\
Exit codes:
  0    everything came out as it is to
  1    something did not
  2    the command line or the environment is at fault

Examples:
  cargo run -- matrix
  cargo run -- matrix --qemu qemu-7.2/qemu-system-aarch64 --qemu qemu-11.1/qemu-system-aarch64 --update";

/// Options of the matrix.
#[derive(Debug, Clone, Args)]
pub struct MatrixOptions {
    /// A qemu-system-aarch64 to run on (may be repeated: a column for each); the one in PATH if none is given
    #[arg(long, value_name = "PATH")]
    pub qemu: Vec<PathBuf>,
    /// Write the table into README.md
    #[arg(long)]
    pub update: bool,
    /// Give up a machine that takes longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Install what is missing without asking, with sudo where needed
    #[arg(long)]
    pub yes: bool,
}

/// What follows the options in `image --help`.
const IMAGE_HELP: &str = "\
The file is an arm64 Image, the same for every board: position-independent, to be loaded at any 2 MiB-aligned address
and entered with the device tree's address in x0, as U-Boot's booti does it.

Exit codes:
  0    the file was written
  2    the command line or the environment is at fault

Examples:
  cargo run -- image -o sluice.Image
  cargo run -- image --board sbsa --flash -o sluice.flash";

/// Options of the kernel as a file.
#[derive(Debug, Clone, Args)]
pub struct ImageOptions {
    /// The board that it is for
    #[arg(long, value_name = "NAME", value_enum, default_value_t = board::Name::Virt)]
    pub board: board::Name,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Write all that the board's flash has, from which it starts without a boot loader (sbsa)
    #[arg(long)]
    pub flash: bool,
    /// With --flash: add to the kernel's command line (may be repeated)
    #[arg(long, value_name = "key=value ...", allow_hyphen_values = true)]
    pub append: Vec<String>,
}

/// What follows the options in `describe --help`.
const DESCRIBE_HELP: &str = "\
Nothing is built and nothing runs: the tree is only read. Disabled nodes are left out, addresses are those that
processors use, and a node that cannot be read is listed under what is missing.

Exit codes:
  0    the tree was read, whatever is missing on the board
  2    the file cannot be read, or is not a device tree

Examples:
  cargo run -- describe rk3588-rock-5b.dtb
  cargo run -- describe --json fvp-base-revc.dtb | jq '.smmus[].path'";

/// Options of the look at a device tree.
#[derive(Debug, Clone, Args)]
pub struct DescribeOptions {
    /// The flattened device tree (.dtb)
    #[arg(value_name = "FILE.dtb")]
    pub file: PathBuf,
    /// Write JSON: memory, SMMUs, PCIe hosts and their maps, bus masters; numbers are decimal
    #[arg(long)]
    pub json: bool,
}

/// Options of the benchmarks.
#[derive(Debug, Clone, Args)]
pub struct BenchOptions {
    /// The benchmarks to run; all if none is named
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Only with this protection (may be repeated)
    #[arg(long, value_name = "MODE", value_enum)]
    pub mode: Vec<Mode>,
    /// Measure time as well as instructions
    #[arg(long)]
    pub wall: bool,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the figures as a bar chart
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Make these the checked-in figures, which `cargo test` compares with
    #[arg(long)]
    pub update: bool,
    /// The qemu-system-aarch64 to use instead of the one in PATH
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Give up when one benchmark takes longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Install what is missing without asking, with sudo where needed
    #[arg(long)]
    pub yes: bool,
}

/// Options of the demo.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// The board
    #[arg(long, value_name = "NAME", value_enum, default_value_t = board::Name::Virt)]
    pub board: board::Name,
    /// A machine of another shape, by name; `cargo run -- topologies` lists them
    #[arg(long, value_name = "NAME", value_parser = Topology::find)]
    pub topology: Option<&'static Topology>,
    /// Disk image with the picture, raw or qcow2, partitioned (GPT, MBR) or bare FAT; it is only read.
    /// Without this option a disk is made
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// The picture's path on the disk: BMP (32-bit is shown without a copy, 24-bit is converted) or PNG
    #[arg(long, value_name = "PATH")]
    pub picture: Option<String>,
    /// Play a show around the picture, and compare the last frame pixel by pixel; with --gui at 60 frames a second, else as fast as
    /// it goes
    #[arg(long, value_name = "NAME", value_enum)]
    pub show: Option<show::Name>,
    /// Save what the screen shows as a PNG file; of a show the last frame
    #[arg(long, value_name = "FILE.png")]
    pub screenshot: Option<PathBuf>,
    /// Open a window; the picture stays until the window is closed or Enter is pressed in the terminal
    #[arg(long)]
    pub gui: bool,
    /// Number of processor cores
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub smp: u32,
    /// Main memory, with a suffix M or G
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: MemorySize,
    /// Processor model, such as cortex-a57, cortex-a72, neoverse-n1 or max
    #[arg(long, value_name = "NAME", default_value = "cortex-a72")]
    pub cpu: String,
    /// What translates for the devices
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Iommu::SmmuV3)]
    pub iommu: Iommu,
    /// The qemu-system-aarch64 to use instead of the one in PATH
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Count instructions instead of time: one instruction is one nanosecond, on a single host thread
    #[arg(long)]
    pub icount: bool,
    /// Write QEMU's trace events that match PATTERN to FILE (may be repeated with the same FILE)
    #[arg(long, value_name = "PATTERN=FILE")]
    pub trace: Vec<TraceRequest>,
    /// Add to the kernel's command line (may be repeated)
    #[arg(long, value_name = "key=value ...", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// Give up after this many seconds from QEMU's start; with --gui, only until the picture is shown
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Install what is missing without asking, with sudo where needed
    #[arg(long)]
    pub yes: bool,
    /// Passed to QEMU unchanged, after everything else
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    pub qemu_arguments: Vec<OsString>,
}

/// An amount of memory in QEMU's notation, checked for form only: what is too little or too much is for the kernel and
/// for QEMU to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemorySize(String);

impl MemorySize {
    /// Returns the size in the notation QEMU reads.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, suffix) = match text.char_indices().last() {
            Some((at, last)) if last.is_ascii_alphabetic() => (&text[..at], &text[at..]),
            _ => (text, "M"),
        };
        let suffix = suffix.to_ascii_uppercase();
        let count: u64 =
            digits.parse().map_err(|_| "expected a number with a suffix M or G, such as 512M".to_string())?;
        if !matches!(suffix.as_str(), "K" | "M" | "G" | "T") {
            return Err(format!("unknown suffix {suffix}: use M or G, such as 512M"));
        }
        if count == 0 {
            return Err("a machine needs some memory, such as 512M".to_string());
        }
        Ok(Self(format!("{count}{suffix}")))
    }
}

/// Trace events to enable and the file they go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRequest {
    /// Event names, with `*` as a wildcard.
    pub pattern: String,
    /// Where the events are written.
    pub file: PathBuf,
}

impl FromStr for TraceRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((pattern, file)) if !pattern.is_empty() && !file.is_empty() => {
                Ok(Self { pattern: pattern.to_string(), file: file.into() })
            }
            _ => Err("expected PATTERN=FILE, such as 'smmuv3_*=smmu.log'".to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_work_with_and_without_the_command_name() {
        let bare = Cli::try_parse_from(["x", "--smp", "4"]).unwrap();
        assert!(bare.command.is_none());
        assert_eq!(bare.options.smp, 4);
        let named = Cli::try_parse_from(["x", "demo", "--smp", "4"]).unwrap();
        let Some(Command::Demo(options)) = named.command else { panic!("demo was not recognised") };
        assert_eq!(options.smp, 4);
    }

    #[test]
    fn a_show_is_asked_for_by_name() {
        for arguments in [&["x", "--show", "sharing"][..], &["x", "demo", "--show", "sharing"]] {
            let cli = Cli::try_parse_from(arguments).unwrap();
            let options = match cli.command {
                Some(Command::Demo(options)) => options,
                _ => cli.options,
            };
            assert_eq!(options.show, Some(show::Name::Sharing));
        }
        assert_eq!(Cli::try_parse_from(["x"]).unwrap().options.show, None);
        assert!(Cli::try_parse_from(["x", "--show", "fireworks"]).is_err());
    }

    #[test]
    fn what_follows_two_dashes_goes_to_qemu_unchanged() {
        let cli = Cli::try_parse_from(["x", "--icount", "--", "-device", "edu,id=a=b", "--smp"]).unwrap();
        assert_eq!(cli.options.qemu_arguments, ["-device", "edu,id=a=b", "--smp"]);
        assert_eq!(cli.options.smp, 2);
        let cli = Cli::try_parse_from(["x", "demo", "--", "-S"]).unwrap();
        let Some(Command::Demo(options)) = cli.command else { panic!("demo was not recognised") };
        assert_eq!(options.qemu_arguments, ["-S"]);
    }

    #[test]
    fn the_iommu_is_an_smmuv3_unless_another_is_asked_for() {
        let iommu = |arguments: &[&str]| Cli::try_parse_from([&["x"], arguments].concat()).map(|cli| cli.options.iommu);
        assert_eq!(iommu(&[]).unwrap(), Iommu::SmmuV3);
        for (word, kind) in [("smmuv3", Iommu::SmmuV3), ("virtio", Iommu::Virtio), ("none", Iommu::None)] {
            assert_eq!(iommu(&["--iommu", word]).unwrap(), kind);
        }
        assert!(iommu(&["--iommu", "smmu"]).is_err());
    }

    #[test]
    fn benchmarks_are_named_and_modes_chosen() {
        let cli = Cli::try_parse_from(["x", "bench", "--wall", "--mode", "lazy", "map4k", "share"]).unwrap();
        let Some(Command::Bench(options)) = cli.command else { panic!("bench was not recognised") };
        assert_eq!(
            (options.names.join(" ").as_str(), options.mode.as_slice()),
            ("map4k share", [Mode::Lazy].as_slice())
        );
        assert!(options.wall && !options.update);
        assert!(Cli::try_parse_from(["x", "bench", "--mode", "loose"]).is_err());
    }

    #[test]
    fn memory_sizes_are_normalised_and_checked() {
        assert_eq!("512".parse::<MemorySize>().unwrap().as_str(), "512M");
        assert_eq!("16g".parse::<MemorySize>().unwrap().as_str(), "16G");
        for bad in ["", "0M", "M", "12X", "-1G", "1.5G", "é"] {
            assert!(bad.parse::<MemorySize>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn trace_requests_need_both_halves() {
        let request: TraceRequest = "smmuv3_*=a=b.log".parse().unwrap();
        assert_eq!(request, TraceRequest { pattern: "smmuv3_*".into(), file: "a=b.log".into() });
        for bad in ["smmuv3_*", "=file", "pattern="] {
            assert!(bad.parse::<TraceRequest>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn append_may_be_repeated_and_start_with_a_dash() {
        let cli = Cli::try_parse_from(["x", "--append", "a=1 b=2", "--append", "-c"]).unwrap();
        assert_eq!(cli.options.append, ["a=1 b=2", "-c"]);
    }
}
