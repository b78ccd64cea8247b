//! What the device tells of its displays, within sane limits.

use super::exchange::field;
use super::resource::Rect;
use crate::Error;
use crate::spec::gpu::{CTRL_HDR_SIZE, EDID_MAX, MAX_SCANOUTS};

/// The largest width or height of a display or picture that is believed, in pixels.
pub const MAX_DIMENSION: u32 = 16384;

/// A size in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Pixels of a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// Where each scanout's display is and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DisplayInfo {
    scanouts: [Option<Rect>; MAX_SCANOUTS],
}

impl DisplayInfo {
    /// Reads `struct virtio_gpu_resp_display_info`. A display whose size cannot be counts as not there.
    pub(super) fn parse(answer: &[u8], count: u32) -> Self {
        let mut scanouts = [None; MAX_SCANOUTS];
        for (index, scanout) in scanouts.iter_mut().enumerate().take(count as usize) {
            let at = CTRL_HDR_SIZE + 24 * index;
            let read = |offset| field(answer, at + offset);
            let rect = Rect { x: read(0), y: read(4), width: read(8), height: read(12) };
            let sane = (1..=MAX_DIMENSION).contains(&rect.width) && (1..=MAX_DIMENSION).contains(&rect.height);
            if read(16) != 0 && sane {
                *scanout = Some(rect);
            }
        }
        Self { scanouts }
    }

    /// The display of a scanout, if it has one.
    #[must_use]
    pub fn scanout(&self, index: u32) -> Option<Rect> {
        self.scanouts.get(index as usize).copied().flatten()
    }

    /// The scanouts that have a display.
    pub fn displays(&self) -> impl Iterator<Item = (u32, Rect)> + '_ {
        (0_u32..).zip(&self.scanouts).filter_map(|(index, scanout)| Some((index, (*scanout)?)))
    }
}

/// What a display says of itself (VESA E-EDID), as the device hands it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edid {
    bytes: [u8; EDID_MAX],
    len: usize,
}

impl Edid {
    /// Reads `struct virtio_gpu_resp_edid`.
    pub(super) fn parse(answer: &[u8]) -> Result<Self, Error> {
        let size = field(answer, CTRL_HDR_SIZE);
        let text = usize::try_from(size).ok().and_then(|len| answer.get(CTRL_HDR_SIZE + 8..)?.get(..len));
        let text = text.ok_or(Error::BadConfig { field: "EDID size", value: size.into() })?;
        let mut bytes = [0; EDID_MAX];
        for (to, from) in bytes.iter_mut().zip(text) {
            *to = *from;
        }
        Ok(Self { bytes, len: text.len() })
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    /// Whether the first block has the right beginning and checksum.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let Some(block) = self.bytes().first_chunk::<128>() else { return false };
        block.starts_with(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0])
            && block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
    }

    /// The preferred size: that of the first detailed timing.
    #[must_use]
    pub fn preferred(&self) -> Option<Mode> {
        let timing: &[u8; 8] = self.bytes().get(54..)?.first_chunk()?;
        let [clock_low, clock_high, columns, _, columns_high, rows, _, rows_high] = *timing;
        // Without a pixel clock it is not a timing.
        if !self.is_valid() || (clock_low, clock_high) == (0, 0) {
            return None;
        }
        let width = u32::from(columns) | u32::from(columns_high & 0xf0) << 4;
        let height = u32::from(rows) | u32::from(rows_high & 0xf0) << 4;
        (width != 0 && height != 0).then_some(Mode { width, height })
    }
}
