//! The boards that QEMU plays, and how the kernel gets into each.

use crate::emulator::Version;
use crate::machine::{escaped, joined};
use crate::progress::Progress;
use crate::{firmware, trees};
use anyhow::{Context, Result};
use sbsa::payload::Payload;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

/// A board by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Name {
    /// QEMU's virt machine
    #[default]
    Virt,
    /// QEMU's sbsa-ref machine: a server that starts at EL3, from flash
    Sbsa,
}

impl Name {
    /// The first QEMU on whose version of the board the kernel runs.
    pub fn since(self) -> Version {
        match self {
            Self::Virt => Version(7, 2, 0),
            Self::Sbsa => Version(7, 2, 0),
        }
    }

    /// Whether this QEMU's version of the board has something that takes messages. Where there is nothing, QEMU makes no edu.
    pub fn takes_messages(self, emulator: Version) -> bool {
        self == Self::Virt || emulator >= Version(8, 1, 0)
    }

    /// Makes what the board needs besides the kernel.
    pub fn prepare(self, progress: &mut Progress) -> Result<Board> {
        Ok(match self {
            Self::Virt => Board::Virt,
            Self::Sbsa => {
                let hand_over = firmware::build_hand_over("sbsa", "sbsa-hand-over", progress)?;
                Board::Sbsa { hand_over: hand_over.into() }
            }
        })
    }
}

/// A board with what it needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Board {
    /// QEMU's `virt`: QEMU itself is the boot loader.
    #[default]
    Virt,
    /// QEMU's `sbsa-ref`.
    Sbsa {
        /// What runs from reset to the kernel.
        hand_over: Arc<[u8]>,
    },
    /// QEMU's `virt`, with everything where a boot loader has put it. It starts in the highest exception level that it has, and
    /// with its own PSCI only if that is neither 3 nor, without EL3, 2.
    Loaded {
        /// Where everything is.
        places: Places,
        /// The machine's tree, as by [`trees::described`].
        tree: Arc<[u8]>,
    },
}

/// Where a boot loader has put things, by physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// The image: a multiple of 2 MiB.
    pub image: u64,
    /// The device tree: a multiple of 8. The page before it holds the few instructions that stand for the boot loader.
    pub tree: u64,
    /// An initrd of one page, if there is to be one.
    pub initrd: Option<u64>,
}

/// Bytes of the initrd of [`Places`].
const INITRD: u64 = 0x1000;

/// A boot loader's last steps, 64 bits each: `ldr x0, tree; ldr x16, image; br x16; b .`, and the two addresses.
fn last_steps(places: Places) -> [u64; 4] {
    [0x5800_00b0_5800_0080, 0x1400_0000_d61f_0200, places.tree, places.image]
}

impl Board {
    /// Returns QEMU's arguments by which the board starts the kernel `image`. Files that this takes are made in `directory`.
    pub fn start(&self, image: &Path, command_line: &str, directory: &Path) -> Result<Vec<OsString>> {
        match self {
            Self::Virt => {
                let mut arguments = vec!["-kernel".into(), image.into()];
                if !command_line.is_empty() {
                    arguments.extend(["-append".into(), command_line.into()]);
                }
                Ok(arguments)
            }
            Self::Sbsa { hand_over } => {
                let image = std::fs::read(image).with_context(|| format!("{} cannot be read", image.display()))?;
                let flash = Payload { image: &image, command_line }.flash(hand_over)?;
                let file = directory.join("flash");
                std::fs::write(&file, flash).with_context(|| format!("{} cannot be written", file.display()))?;
                // The first flash. The command line is in it.
                Ok(vec!["-bios".into(), file.into()])
            }
            Self::Loaded { places, tree } => {
                let initrd = places.initrd.map(|start| start..start + INITRD);
                let tree = trees::with_chosen(tree, command_line, initrd)?;
                let mut arguments = Vec::new();
                let mut load = |options: OsString| arguments.extend(["-device".into(), options]);
                let mut load_file = |file: &Path, at: u64| {
                    load(joined(["loader,file=".into(), escaped(file), format!(",addr={at:#x},force-raw=on").into()]));
                };
                load_file(image, places.image);
                let mut made = |name: &str, content: &[u8], at: u64| -> Result<()> {
                    let file = directory.join(name);
                    std::fs::write(&file, content).with_context(|| format!("{} cannot be written", file.display()))?;
                    load_file(&file, at);
                    Ok(())
                };
                made("tree", &tree, places.tree)?;
                if let Some(at) = places.initrd {
                    made("initrd", &[0x5a; INITRD as usize], at)?;
                }
                let steps = places.tree - 0x1000;
                for (at, data) in (steps..).step_by(8).zip(last_steps(*places)) {
                    load(format!("loader,addr={at:#x},data={data:#x},data-len=8").into());
                }
                load(format!("loader,addr={steps:#x},cpu-num=0").into());
                Ok(arguments)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virt_starts_the_image_itself_and_sbsa_a_flash_with_everything_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("Image");
        let mut content = vec![7; 100];
        content[0x38..0x3c].copy_from_slice(b"ARM\x64");
        std::fs::write(&image, &content).unwrap();
        let start = |board: &Board, line: &str| board.start(&image, line, directory.path()).unwrap();
        assert_eq!(
            start(&Board::Virt, "a=1"),
            ["-kernel".as_ref(), image.as_os_str(), "-append".as_ref(), "a=1".as_ref()]
        );
        assert_eq!(start(&Board::Virt, ""), ["-kernel".as_ref(), image.as_os_str()]);
        let board = Board::Sbsa { hand_over: b"first".as_slice().into() };
        let arguments = start(&board, "a=1");
        assert_eq!((arguments.len(), arguments[0].to_str()), (2, Some("-bios")));
        let flash = std::fs::read(&arguments[1]).unwrap();
        assert!(flash.starts_with(b"first"));
        let payload = Payload::find(&flash[sbsa::payload::HEADER..]).unwrap();
        assert_eq!((payload.image, payload.command_line), (content.as_slice(), "a=1"));
    }

    #[test]
    fn what_is_loaded_lies_where_it_was_said_and_the_processor_starts_before_the_tree() {
        let directory = tempfile::tempdir().unwrap();
        let tree = dtoolkit::model::DeviceTree::new().to_dtb().into();
        let places = Places { image: 0x8020_0000, tree: 0x4800_1008, initrd: Some(0x4900_0000) };
        let board = Board::Loaded { places, tree };
        let arguments = board.start(Path::new("an,Image"), "a=1", directory.path()).unwrap();
        let text: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        let has = |wanted: &str| text.iter().any(|argument| argument.contains(wanted));
        assert!(has("file=an,,Image,addr=0x80200000,force-raw=on"), "{text:?}");
        assert!(has("tree,addr=0x48001008,") && has("initrd,addr=0x49000000,"), "{text:?}");
        assert!(has("addr=0x48000020,data=0x80200000,data-len=8"), "{text:?}");
        assert_eq!(text.last().unwrap(), "loader,addr=0x48000008,cpu-num=0");
    }
}
