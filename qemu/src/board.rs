//! The boards that QEMU plays, and how the kernel gets into each.

use crate::emulator::Version;
use crate::firmware;
use crate::progress::Progress;
use anyhow::{Context, Result};
use sbsa::payload::Payload;
use std::path::{Path, PathBuf};
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
            // Before, there was no ITS, and PCIe functions had no MSI-X, which the drivers want.
            Self::Sbsa => Version(8, 1, 0),
        }
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
}

impl Board {
    /// Makes the file from which the board starts the kernel `image`, in `directory` if it is a new one.
    pub fn start_file(&self, image: &Path, command_line: &str, directory: &Path) -> Result<PathBuf> {
        match self {
            Self::Virt => Ok(image.to_path_buf()),
            Self::Sbsa { hand_over } => {
                let image = std::fs::read(image).with_context(|| format!("{} cannot be read", image.display()))?;
                let flash = Payload { image: &image, command_line }.flash(hand_over)?;
                let file = directory.join("flash");
                std::fs::write(&file, flash).with_context(|| format!("{} cannot be written", file.display()))?;
                Ok(file)
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
        assert_eq!(Board::Virt.start_file(&image, "a=1", directory.path()).unwrap(), image);
        let board = Board::Sbsa { hand_over: b"first".as_slice().into() };
        let flash = std::fs::read(board.start_file(&image, "a=1", directory.path()).unwrap()).unwrap();
        assert!(flash.starts_with(b"first"));
        let payload = Payload::find(&flash[sbsa::payload::HEADER..]).unwrap();
        assert_eq!((payload.image, payload.command_line), (content.as_slice(), "a=1"));
    }
}
