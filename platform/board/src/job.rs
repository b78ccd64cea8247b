//! The main job on this machine's devices, and the report.

use crate::hardware::kind;
use crate::{BlockDisk, Company, EduStray, Error, GpuScreen, Hardware, Master, Options, ProcessPainter};
use alloc::format;
use alloc::string::{String, ToString};
use base::Instant;
use core::fmt;
use core::time::Duration;
use dma::Limits;
use iommu::StreamId;
use kernel::class::{Disk, Stray};
use kernel::demo::{self, Act, Bytes, Failure, Outcome, Played, Proof, Screenshot, Source, Verdict};
use kernel::disk::TableKind;
use kernel::println;

/// Address bits of an edu that was not told otherwise.
const EDU_BITS: u32 = 28;

/// Who watches the screen.
pub trait Operator: Screenshot {
    /// Does something at the end of the job with how it went.
    fn end(&self, ok: bool);
}

/// The devices of the main job.
struct Devices {
    disk: Option<BlockDisk>,
    screen: Option<GpuScreen>,
    edu: Option<EduStray>,
}

/// Runs the main job, for whose show the image has `company`, and prints the report. Returns the exit status.
pub fn main_job(hardware: &Hardware, options: &Options, company: &Company, operator: &impl Operator) -> u32 {
    let started = Instant::now();
    for smmu in hardware.smmus() {
        print_wrapped("smmu", &smmu.features().to_string());
    }
    for viommu in hardware.viommus() {
        print_wrapped("viommu", &viommu.driver().features().to_string());
    }
    let ok = match run(hardware, options, company, operator) {
        Ok(held) => held,
        Err(sentence) => {
            println!("error: {sentence}");
            false
        }
    };
    println!("time      {:.3} s in the kernel, {:.3} s of it the job", seconds(Instant::now().as_nanos()), {
        started.elapsed().as_secs_f64()
    });
    operator.end(ok);
    u32::from(!ok)
}

/// Columns of a line of the report.
const COLUMNS: usize = 110;

/// Prints a list, broken at its commas where it is longer than a line.
fn print_wrapped(label: &str, list: &str) {
    let mut line = format!("{label:<10}");
    for (index, item) in list.split(", ").enumerate() {
        if index != 0 {
            line.push(',');
            if line.len() + 1 + item.len() > COLUMNS {
                println!("{line}");
                line = format!("{:10}", "");
            } else {
                line.push(' ');
            }
        }
        line.push_str(item);
    }
    println!("{line}");
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// Everything between the first device and the last; the devices are off the bus when it returns.
fn run(hardware: &Hardware, options: &Options, company: &Company, operator: &impl Operator) -> Result<bool, String> {
    // What IOMMUs have for themselves, and keep.
    let before = dma::live();
    hardware.faults().set_budget(options.fault_budget);
    let mut devices = Devices { disk: None, screen: None, edu: None };
    let result = with_devices(hardware, options, company, operator, &mut devices);
    // Before the devices go, and with them what they have counted.
    let made = dma::live().total_mappings.saturating_sub(before.total_mappings);
    let mut stopped = true;
    let ends =
        [devices.disk.map(BlockDisk::stop), devices.screen.map(GpuScreen::stop), devices.edu.map(EduStray::stop)];
    for end in ends.into_iter().flatten() {
        if let Err(error) = end {
            println!("error: {error}");
            stopped = false;
        }
    }
    let clean = close(made, before.live_mappings);
    result.map(|held| held && stopped && clean)
}

fn with_devices(
    hardware: &Hardware,
    options: &Options,
    company: &Company,
    operator: &impl Operator,
    devices: &mut Devices,
) -> Result<bool, String> {
    start(hardware, options, devices).map_err(|error| error.to_string())?;
    if options.show.is_some() && options.tiles.is_some() {
        return Err("show=sharing shows a picture as it lies: leave screen.tiles out".into());
    }
    let disk = devices.disk.as_ref().ok_or("the machine has no disk: add one with --disk or -device virtio-blk-pci")?;
    let screen = devices.screen.as_ref().ok_or("the machine has no screen: add one with -device virtio-gpu-pci")?;
    picture(disk, screen, options, company, operator).map_err(|failure| sentence(hardware, &failure))?;
    let faults = hardware.faults();
    let mut held = faults.total() == 0;
    println!("faults    {} in the job", faults.total());
    for noted in faults.iter() {
        println!("  {} ({} records)", noted.fault, noted.count);
        if let Some(explanation) = hardware.explain(&noted.fault) {
            println!("    {explanation}");
        }
    }
    let edu = devices.edu.as_ref().map(|edu| (edu as &dyn Stray, edu.master().streams()));
    let screen = (screen as &dyn Stray, screen.master().streams());
    // The disk last: a disk that strayed is broken.
    let disk = (disk as &dyn Stray, disk.master().streams());
    for (stray, streams) in edu.into_iter().chain([screen, disk]) {
        held &= fence(hardware, stray, streams)?;
    }
    Ok(held)
}

/// Says what went wrong. A device that neither answers nor faults may be one that the IOMMU does not translate for, whatever the
/// device tree says: QEMU 10.0 leaves `iommu-map` as it is when the root bus goes around the IOMMU.
fn sentence(hardware: &Hardware, failure: &Failure) -> String {
    let silent = virtio::Error::TimedOut.to_string();
    match failure {
        Failure::Disk(text) | Failure::Screen(text)
            if *text == silent && hardware.faults().total() == 0 && !hardware.iommus().is_empty() =>
        {
            format!(
                "{failure}, and nothing faulted: its DMA may go around the IOMMU, which a device tree of QEMU 10.0 does not tell; \
                 start the machine without default-bus-bypass-iommu=on"
            )
        }
        _ => failure.to_string(),
    }
}

/// Starts every device that there is a driver for; of each kind the first.
fn start(hardware: &Hardware, options: &Options, devices: &mut Devices) -> Result<(), Error> {
    for (host, function) in hardware.functions() {
        let Some(kind) = kind(function) else { continue };
        let limits = if kind == "edu" { Limits::address_bits(EDU_BITS) } else { Limits::NONE };
        let taken = match kind {
            "virtio-blk" => devices.disk.is_some(),
            "virtio-gpu" => devices.screen.is_some(),
            _ => devices.edu.is_some(),
        };
        if taken {
            continue;
        }
        let master = hardware.attach_as(host, function, kind, limits, &options.treatment(kind, function.bdf()))?;
        master.device().set_strictness(options.strict.of(master.device().name()));
        describe(hardware, &master);
        match kind {
            "virtio-blk" => devices.disk = Some(BlockDisk::start(master)?),
            "virtio-gpu" => devices.screen = Some(GpuScreen::start(master)?),
            _ => devices.edu = Some(EduStray::start(master)?),
        }
    }
    Ok(())
}

fn describe(hardware: &Hardware, master: &Master) {
    let name = master.device().name();
    let Some(domain) = master.group().and_then(|group| group.domain()) else {
        let why =
            if master.group().is_some() { "its IOMMU lets it through as it was told" } else { "no IOMMU translates" };
        println!("WARNING   {name} is NOT ISOLATED, {why}: it can reach all memory");
        return;
    };
    struct Space<'a>(&'a iommu::domain::Domain);
    impl fmt::Display for Space<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.space().describe(f)
        }
    }
    let streams: String = master.streams().iter().map(|stream| format!(" {stream}")).collect();
    let of = if hardware.iommus().len() > 1 {
        master.group().map(|group| format!(" of {}", group.iommu().name())).unwrap_or_default()
    } else {
        String::new()
    };
    println!("device    {name:<20} stream{streams}{of}, {} domain, {}", domain.kind(), Space(&domain));
}

/// A number and what it counts: for one, and for any other number.
struct Count(usize, &'static str, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, one, many) = *self;
        write!(f, "{count} {}", if count == 1 { one } else { many })
    }
}

/// Disk to screen.
fn picture(
    disk: &BlockDisk,
    screen: &GpuScreen,
    options: &Options,
    company: &Company,
    operator: &impl Operator,
) -> Result<(), Failure> {
    let began = Instant::now();
    let source = demo::find(disk, screen, &options.picture)?;
    let megabytes = disk.blocks() * u64::from(disk.block_size()) / 1_000_000;
    let table = match source.located.table {
        TableKind::Gpt => format!("GPT, partition {}", source.located.partition),
        TableKind::Mbr => format!("MBR, partition {}", source.located.partition),
        _ => String::from("not divided"),
    };
    let fat = format!("{:?}", source.located.fat).to_uppercase();
    println!("disk      {megabytes} MB, {table}, {fat}");
    println!(
        "picture   {}: {}, {} x {}, {}",
        source.path,
        source.picture.name(),
        source.picture.width(),
        source.picture.height(),
        Count(source.located.file.extents.len(), "extent", "extents")
    );
    match &options.show {
        Some(act) => sharing(disk, screen, &source, act, company, operator)?,
        None => shown(&demo::show(disk, screen, &source, options.tiles, operator)?, &source),
    }
    for device in [disk.master().device(), screen.master().device()] {
        if device.copies() != 0 {
            let count = Count(device.copies() as usize, "buffer", "buffers");
            println!("copies    {}: {count}, which it does not reach or is not to", device.name());
        }
    }
    log::debug!("disk to screen in {:?}", began.elapsed());
    Ok(())
}

/// The report of a picture.
fn shown(outcome: &Outcome, source: &Source) {
    on_screen(outcome.size, source, outcome.from_disk, outcome.runs, outcome.segments);
    by_dma(outcome.from_disk, outcome.transfers, outcome.to_screen, source);
    if outcome.pieces != 0 {
        println!("tiles     the screen was told {}", Count(outcome.pieces, "piece", "pieces"));
    }
    println!("by CPU    {} bytes of the picture copied", Bytes(outcome.copied));
}

/// Plays the show, and reports.
fn sharing(
    disk: &BlockDisk,
    screen: &GpuScreen,
    source: &Source,
    act: &Act,
    company: &Company,
    operator: &impl Operator,
) -> Result<(), Failure> {
    let device = screen.master().device();
    let mut elsewhere = false;
    let hire = |picture: &_, layout: &_, frames| {
        let painter = ProcessPainter::hire(company, device, picture, layout, frames)?;
        elsewhere = painter.is_elsewhere();
        Ok(painter)
    };
    let played = demo::sharing(disk, screen, source, act, hire, operator)?;
    let Played { frames, painted, .. } = &played;
    on_screen(played.size, source, played.from_disk, played.runs, played.segments);
    by_dma(played.from_disk, played.transfers, played.to_screen, source);
    let place = if elsewhere { "on another core" } else { "in turns on the same core" };
    println!(
        "painter   a process {place}, the picture mapped; it says: {} of {} x {}, {} bytes drawn and put back",
        Count(painted.frames as usize, "frame", "frames"),
        played.size.0,
        played.size.1,
        Bytes(painted.bytes)
    );
    let shown = f64::from(frames.count) / frames.all.as_secs_f64().max(f64::MIN_POSITIVE);
    println!("frames    {} in {:.3} s, {shown:.0} a second", frames.count, frames.all.as_secs_f64());
    println!(
        "          {:.3} ms each in the median, {:.3} ms the shortest, {:.3} ms the longest",
        millis(frames.median),
        millis(frames.shortest),
        millis(frames.longest)
    );
    println!(
        "fences    the painter waited for the screen in {} of {} frames, {:.3} ms in all",
        painted.waits,
        painted.frames,
        millis(painted.waited)
    );
    println!(
        "          the screen waited for the painter in {} of {} frames, {:.3} ms in all",
        played.waits,
        frames.count,
        millis(played.waited)
    );
    println!("by CPU    {} bytes of the picture copied by the kernel", Bytes(played.copied));
    Ok(())
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What the screen shows, and from where.
fn on_screen(size: (u32, u32), source: &Source, bytes: u64, runs: usize, addresses: usize) {
    println!(
        "screen    {} x {} of {} x {}, from {} in {}, {}",
        size.0,
        size.1,
        source.screen.0,
        source.screen.1,
        Count(bytes.div_ceil(iommu::PAGE_SIZE) as usize, "page", "pages"),
        Count(runs, "run", "runs"),
        Count(addresses, "device address", "device addresses")
    );
}

fn by_dma(from_disk: u64, transfers: usize, to_screen: u64, source: &Source) {
    println!(
        "by DMA    {} bytes disk -> memory in {}, {} bytes memory -> screen, {} bytes of metadata",
        Bytes(from_disk),
        Count(transfers, "transfer", "transfers"),
        Bytes(to_screen),
        Bytes(source.metadata)
    );
}

/// One proof of the fence.
fn fence(hardware: &Hardware, stray: &dyn Stray, streams: &[StreamId]) -> Result<bool, String> {
    if !stray.device().is_isolated() {
        println!("WARNING   {}: there is no fence to prove", stray.device().name());
        return Ok(true);
    }
    let Proof { device, target, verdict } =
        demo::prove(stray, streams, hardware.faults()).map_err(|failure| failure.to_string())?;
    match &verdict {
        Verdict::Stopped { fault, explanation } => {
            println!("fence     {device} sent to {target}: stopped, memory unchanged");
            println!("          {fault}");
            println!("          {explanation}");
        }
        Verdict::NotReported => println!("fence     {device} sent to {target}: memory unchanged, but NO REPORT of it"),
        Verdict::Breached => println!("fence     {device} sent to {target}: BREACHED, the memory has changed"),
        Verdict::NotTried(why) => println!("fence     {device} could not be sent to {target}: {why}"),
    }
    Ok(verdict.held())
}

/// What is left when all devices are off the bus, but for the `kept` mappings that were there before they came.
fn close(made: u64, kept: u64) -> bool {
    let live = dma::live().live_mappings.saturating_sub(kept);
    let quarantine = dma::quarantine::report();
    println!("mappings  {} live at the end of {} made, {} pages in quarantine", live, made, quarantine.pages);
    if live != 0 {
        // With those that were there before, which nothing tells from them: what IOMMUs have for themselves says so by name.
        match dma::tracker::report() {
            Ok(left) => left.to_string().lines().for_each(|line| println!("  lent    {line}")),
            Err(error) => println!("error: what is lent cannot be listed: {error}"),
        }
    }
    live == 0 && quarantine.pages == 0
}
