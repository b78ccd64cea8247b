//! What the kernel would find on a board, read from the board's device tree: for people, or as JSON.
//!
//! The reading is the kernel's own ([`kernel::machine::survey`]); this module only finds words for it.

use crate::cli::DescribeOptions;
use anyhow::{Context, Result, bail};
use kernel::machine::survey::{DmaWindow, RidRow, Survey};
use kernel::machine::{MAX_SIZE, ReservedMemory};
use serde::Serialize;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{ErrorKind, Read, Write as _};

/// Lines of one kind shown to people; of more, only their number is said.
const SHOWN: usize = 8;

/// Reads the tree and prints what is in it.
///
/// # Errors
///
/// If the file cannot be read or is not a device tree.
pub fn run(options: &DescribeOptions) -> Result<()> {
    let file = options.file.display();
    let mut bytes = Vec::new();
    // What is longer than any tree is no tree: no need to read all of it.
    let opened = File::open(&options.file).and_then(|file| file.take(MAX_SIZE as u64 + 1).read_to_end(&mut bytes));
    opened.with_context(|| format!("cannot read {file}"))?;
    let survey = match Survey::from_fdt(&bytes) {
        Ok(survey) => survey,
        Err(fault) => bail!("{file} cannot be used: {fault}"),
    };
    let text = if options.json { json(&survey)? } else { lines(&survey) };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads may stop when they have seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to the standard output")
        }
        _ => Ok(()),
    }
}

/// What `--json` writes.
#[derive(Serialize)]
struct Board<'a> {
    compatible: &'a [String],
    memory: Vec<[u64; 2]>,
    smmus: Vec<Smmu<'a>>,
    pci: Vec<Host<'a>>,
    masters: Vec<Master<'a>>,
}

#[derive(Serialize)]
struct Smmu<'a> {
    path: &'a str,
    base: Option<u64>,
    size: Option<u64>,
    coherent: bool,
    msi: bool,
    interrupts: &'a [String],
}

#[derive(Serialize)]
struct Host<'a> {
    path: &'a str,
    compatible: &'a [String],
    ecam: Option<[u64; 2]>,
    bus_range: [u8; 2],
    coherent: bool,
    /// Requester ID, SMMU, StreamID, number of them.
    iommu_map: Vec<(u32, &'a str, u32, u32)>,
    /// Requester ID, controller, DeviceID, number of them.
    msi_map: Vec<(u32, &'a str, u32, u32)>,
    /// DMA address, CPU address, size.
    dma_ranges: Vec<[u64; 3]>,
}

#[derive(Serialize)]
struct Master<'a> {
    path: &'a str,
    iommus: Vec<(&'a str, u32)>,
    coherent: bool,
}

/// Writes a survey as JSON.
///
/// # Errors
///
/// None that is known: everything in a survey can be written.
pub fn json(survey: &Survey) -> Result<String> {
    let board = Board {
        compatible: &survey.compatible,
        memory: survey.memory.iter().map(|range| [range.start().get(), range.len()]).collect(),
        smmus: survey
            .smmus
            .iter()
            .map(|smmu| Smmu {
                path: &smmu.path,
                base: smmu.registers.map(|range| range.start().get()),
                size: smmu.registers.map(|range| range.len()),
                coherent: smmu.coherent,
                msi: smmu.msi,
                interrupts: &smmu.interrupts,
            })
            .collect(),
        pci: survey
            .pci
            .iter()
            .map(|host| Host {
                path: &host.path,
                compatible: &host.compatible,
                ecam: host.ecam.map(|range| [range.start().get(), range.len()]),
                bus_range: [host.buses.0, host.buses.1],
                coherent: host.coherent,
                iommu_map: map(&host.iommu_map),
                msi_map: map(&host.msi_map),
                dma_ranges: host.dma_ranges.iter().map(|window| [window.dma, window.cpu, window.size]).collect(),
            })
            .collect(),
        masters: survey
            .masters
            .iter()
            .map(|master| Master {
                path: &master.path,
                iommus: master.streams.iter().map(|stream| (stream.iommu.as_str(), stream.id)).collect(),
                coherent: master.coherent,
            })
            .collect(),
    };
    Ok(serde_json::to_string(&board)? + "\n")
}

fn map(rows: &[RidRow]) -> Vec<(u32, &str, u32, u32)> {
    rows.iter().map(|row| (row.rid, row.target.as_str(), row.output, row.count)).collect()
}

/// Lines that begin with a word in a column of its own.
struct Lines(String);

impl Lines {
    fn add(&mut self, word: &str, text: &str) {
        // Nothing that a tree says may steer a terminal.
        let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{word:<9} {text}");
    }

    /// Adds the first lines of a list, and the number of the rest.
    fn some(&mut self, word: &str, list: impl ExactSizeIterator<Item = String>) {
        let rest = list.len().saturating_sub(SHOWN);
        for text in list.take(SHOWN) {
            self.add(word, &text);
        }
        if rest > 0 {
            self.add("", &format!("... and {rest} more"));
        }
    }
}

/// Writes a survey as lines for people.
pub fn lines(survey: &Survey) -> String {
    let mut out = Lines(String::new());
    let names = survey.compatible.join(", ");
    match survey.model.is_empty() {
        true => out.add("board", &names),
        false => out.add("board", &format!("{} ({names})", survey.model)),
    }
    for range in &survey.memory {
        out.add("memory", &format!("{:#x}, {}", range.start().get(), bytes(range.len())));
    }
    for range in &survey.memreserve {
        out.add("reserved", &format!("{:#x}, {}, by the reservation map", range.start().get(), bytes(range.len())));
    }
    for region in &survey.reserved {
        out.add("reserved", &reserved(region));
    }
    smmus(&mut out, survey);
    for host in &survey.pci {
        let config = host.ecam.map_or_else(
            || "no ECAM".to_string(),
            |ecam| format!("ECAM {:#x}, {}", ecam.start().get(), bytes(ecam.len())),
        );
        let compatible = host.compatible.first().map_or("?", String::as_str);
        out.add("pcie", &format!("{} {compatible}", host.path));
        let (first, last) = host.buses;
        out.add("", &format!("buses {first:#04x} to {last:#04x}, {config}, {}", coherence(host.coherent)));
        if host.iommu_map.is_empty() {
            out.add("", "no IOMMU");
        }
        let rows = folded(&host.iommu_map);
        out.some("", rows.iter().map(|row| rid_row(row, "stream")));
        if host.msi_map.is_empty() {
            out.add("", "no MSI controller");
        }
        let rows = folded(&host.msi_map);
        out.some("", rows.iter().map(|row| rid_row(row, "device")));
        windows(&mut out, &host.dma_ranges);
    }
    for master in &survey.masters {
        out.add("master", &format!("{}, {}", master.path, coherence(master.coherent)));
        if master.streams.is_empty() {
            out.add("", "its IOMMU is disabled");
        }
        let streams = master.streams.iter().map(|stream| match stream.mask {
            None | Some(0) => format!("stream {:#x} of {}", stream.id, stream.iommu),
            Some(mask) => format!("stream {:#x}, whatever the bits {mask:#x}, of {}", stream.id, stream.iommu),
        });
        out.some("", streams);
        windows(&mut out, &master.dma_ranges);
    }
    if survey.missing.is_empty() {
        out.add("missing", "nothing");
    }
    for missing in &survey.missing {
        out.add("missing", &missing.to_string());
    }
    out.0
}

fn smmus(out: &mut Lines, survey: &Survey) {
    for smmu in &survey.smmus {
        let place = smmu.registers.map_or_else(
            || "out of reach".to_string(),
            |range| format!("{:#x}, {}", range.start().get(), bytes(range.len())),
        );
        let msi = if smmu.msi { ", can send messages" } else { "" };
        out.add("smmu", &format!("{} SMMUv3, enabled", smmu.path));
        out.add("", &format!("{place}, {}{msi}", coherence(smmu.coherent)));
        // Names and interrupts pair up where there are as many of the ones as of the others.
        let paired = smmu.wired.len() == smmu.interrupts.len();
        let interrupts: Vec<String> = smmu
            .interrupts
            .iter()
            .enumerate()
            .map(|(index, name)| match smmu.wired.get(index).filter(|_| paired) {
                Some(wired) => format!("{name} {}", wired.intid),
                None => name.clone(),
            })
            .collect();
        if !interrupts.is_empty() {
            out.add("", &format!("interrupts {}", interrupts.join(", ")));
        }
    }
    for path in &survey.disabled_smmus {
        out.add("smmu", &format!("{path} SMMUv3, disabled"));
    }
    for iommu in &survey.other_iommus {
        let compatible = iommu.compatible.first().map_or("?", String::as_str);
        out.add("iommu", &format!("{} {compatible}", iommu.path));
    }
}

fn coherence(coherent: bool) -> &'static str {
    if coherent { "coherent" } else { "not coherent" }
}

/// Puts rows together in which one requester after the other goes to the same place, as a mask makes them. The second of a pair
/// is how many requesters there are.
fn folded(rows: &[RidRow]) -> Vec<(&RidRow, u32)> {
    let mut folded: Vec<(&RidRow, u32)> = Vec::new();
    for row in rows {
        match folded.last_mut() {
            Some((first, requesters))
                if (first.count, row.count) == (1, 1)
                    && first.rid.checked_add(*requesters) == Some(row.rid)
                    && (&first.target, first.output) == (&row.target, row.output) =>
            {
                *requesters += 1;
            }
            _ => folded.push((row, row.count)),
        }
    }
    folded
}

fn rid_row((row, requesters): &(&RidRow, u32), kind: &str) -> String {
    let RidRow { rid, target, output, count } = row;
    // What a tree says may pass the end of the numbers.
    let last = |first: u32, count: u32| u64::from(first) + u64::from(count) - 1;
    let to = match count {
        1 => format!("{kind} {output:#x} of {target}"),
        _ => format!("{kind} {output:#x} to {:#x} of {target}", last(*output, *count)),
    };
    match requesters {
        1 => format!("requester {rid:#x}: {to}"),
        _ => format!("requester {rid:#x} to {:#x}: {to}", last(*rid, *requesters)),
    }
}

fn windows(out: &mut Lines, windows: &[DmaWindow]) {
    let lines = windows.iter().map(|window| match window.cpu == window.dma {
        true => format!("DMA {:#x}, {}, where processors have it", window.dma, bytes(window.size)),
        false => format!("DMA {:#x} is {:#x}, {}", window.dma, window.cpu, bytes(window.size)),
    });
    out.some("", lines);
}

fn reserved(region: &ReservedMemory) -> String {
    let mut text = String::new();
    for range in &region.ranges {
        let _ = write!(text, "{:#x}, {}, ", range.start().get(), bytes(range.len()));
    }
    if let Some(dynamic) = &region.dynamic {
        let _ = write!(text, "anywhere, {}, ", bytes(dynamic.size));
    }
    for addresses in &region.iommu_addresses {
        let range = addresses.range;
        let _ = write!(
            text,
            "device addresses {:#x}, {} of {}, ",
            range.start().get(),
            bytes(range.len()),
            addresses.device
        );
    }
    text += &region.path;
    for word in &region.compatible {
        text += " ";
        text += word;
    }
    for (is, word) in [(region.no_map, "no-map"), (region.reusable, "reusable"), (region.default, "default")] {
        if is {
            text += ", ";
            text += word;
        }
    }
    text
}

/// A size in the largest unit that it is a whole number of.
fn bytes(size: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| size != 0 && size.trailing_zeros() >= *shift) {
        Some((shift, unit)) => format!("{} {unit}", size >> shift),
        None => format!("{size} bytes"),
    }
}
