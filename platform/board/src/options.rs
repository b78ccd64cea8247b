//! What the command line says.

use crate::{Error, Treatment};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use dma::TileView;
use kernel::cmdline::CommandLine;
use kernel::demo::{Act, DEFAULT_PICTURE};
use kernel::faults::DEFAULT_BUDGET;
use kernel::strictness::Strict;
use pci::Bdf;

/// The options of the main job.
#[derive(Clone, Debug)]
pub struct Options {
    /// The picture's path on the disk.
    pub picture: String,
    /// The picture lies in tiles, and the screen shows it in this view.
    pub tiles: Option<TileView>,
    /// What is shown, if it is more than the picture.
    pub show: Option<Act>,
    /// Wait for the operator while the picture is on the screen.
    pub wait: bool,
    /// Run devices that no IOMMU translates for.
    pub allow_unprotected: bool,
    /// Every mapping of every device is recorded: `dma::tracker`.
    pub track: bool,
    /// Records of faults that a device may cause before it is contained; 0 for any number.
    pub fault_budget: u64,
    /// Devices that their IOMMU lets through untranslated.
    pub passthrough: Selection,
    /// Devices that get copies of all their buffers.
    pub bounce: Selection,
    /// Devices that may see what shares a page with their buffers.
    pub trusted: Selection,
    /// Which devices' mappings end at once, and which may lapse.
    pub strict: Strict,
}

/// Devices by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Selection {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// Those with these kinds (`edu`, `virtio-blk`) or places (`0000:00:01.0`, `00:01.0`).
    Named(Vec<String>),
}

impl Selection {
    /// Reads `all`, or names between commas; `all_too` is another word for all.
    fn parse(line: &CommandLine, key: &str, all_too: &str) -> Self {
        let mut names = Vec::new();
        for name in line.all(key).flat_map(|value| value.split(',')).filter(|name| !name.is_empty()) {
            if name == "all" || name == all_too {
                return Self::All;
            }
            names.push(name.to_string());
        }
        if names.is_empty() { Self::None } else { Self::Named(names) }
    }

    /// Whether a device of this kind at this place is meant.
    pub fn has(&self, kind: &str, place: Bdf) -> bool {
        let place = place.to_string();
        match self {
            Self::None => false,
            Self::All => true,
            Self::Named(names) => {
                names.iter().any(|name| name == kind || name.strip_prefix("0000:").unwrap_or(name) == place)
            }
        }
    }
}

/// Ways to see a picture that lies in tiles, and their names.
const VIEWS: [TileView; 5] =
    [TileView::Upright, TileView::UpsideDown, TileView::Turned(1), TileView::Turned(2), TileView::Turned(3)];
const VIEW_NAMES: &[&str; 5] = &["upright", "upside-down", "quarter", "half", "three-quarters"];

/// The most frames of a show, and the most in a second.
const NUMBER_MAX: u64 = 1_000_000;

/// Keys that something in the image reads.
const KNOWN: &[&str] = &[
    "picture",
    "screen.wait",
    "show",
    "show.frames",
    "show.rate",
    "screen.tiles",
    "iommu.off",
    "iommu.strict",
    "iommu.passthrough",
    "iommu.bounce",
    "iommu.trusted",
    "fault.budget",
    "dma.track",
    "exit",
    "log",
    "cma",
];

impl Options {
    /// Reads the command line.
    ///
    /// # Errors
    ///
    /// Values that cannot be understood, by key. Unknown keys are a warning.
    pub fn parse(line: &str) -> Result<Self, Error> {
        let line = CommandLine::parse(line)?;
        for key in line.unknown(KNOWN) {
            log::warn!("command line: unknown key \"{key}\"");
        }
        Ok(Self {
            picture: line.text("picture").unwrap_or(DEFAULT_PICTURE).to_string(),
            tiles: line.choice("screen.tiles", VIEW_NAMES)?.and_then(|choice| VIEWS.get(choice).copied()),
            show: match line.choice("show", &["picture", "sharing"])? {
                Some(1) => Some(Self::act(&line)?),
                _ => None,
            },
            wait: line.flag("screen.wait")?,
            allow_unprotected: line.choice("iommu.off", &["forbid", "allow"])? == Some(1),
            track: line.choice("dma.track", &["off", "all"])?.map_or(dma::tracker::is_on(), |choice| choice == 1),
            passthrough: Selection::parse(&line, "iommu.passthrough", "all"),
            bounce: Selection::parse(&line, "iommu.bounce", "force"),
            trusted: Selection::parse(&line, "iommu.trusted", "all"),
            fault_budget: line.number("fault.budget", u64::MAX)?.unwrap_or(DEFAULT_BUDGET),
            strict: Strict::parse(&line)?,
        })
    }
}

impl Options {
    /// The show that the command line describes.
    fn act(line: &CommandLine) -> Result<Act, Error> {
        let number = |key| line.number(key, NUMBER_MAX).map(|number| number.and_then(|it| u32::try_from(it).ok()));
        let frames = number("show.frames")?.unwrap_or(Act::FRAMES);
        Ok(Act { frames, rate: number("show.rate")?.filter(|rate| *rate != 0), ..Act::default() })
    }

    /// How a device of this kind at this place is to be treated.
    pub fn treatment(&self, kind: &str, place: Bdf) -> Treatment {
        Treatment {
            allow_unprotected: self.allow_unprotected,
            passthrough: self.passthrough.has(kind, place),
            bounce: self.bounce.has(kind, place),
            trusted: self.trusted.has(kind, place),
            restricted: None,
        }
    }
}
