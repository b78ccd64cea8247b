//! The main job on one machine, watched and judged as a person would who mistrusts it: by the screen that the machine shows, by
//! QEMU's own account of what was translated, and by the sentences of the report.

use crate::cli::TraceRequest;
use crate::console::{self, Message};
use crate::disk;
use crate::emulator::Emulator;
use crate::machine::{Iommu, Machine};
use crate::picture;
use crate::session::{Event, Session};
use anyhow::{Context, Result};
use image::RgbImage;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

/// The picture on the default disk: drawn once, as that takes a while.
static PICTURE: LazyLock<RgbImage> = LazyLock::new(|| picture::draw(disk::PICTURE_SIZE.0, disk::PICTURE_SIZE.1));

/// What a machine is to come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The picture, with every access of disk and display translated, and every device stopped that strays.
    Picture,
    /// Nothing: the kernel refuses, in one sentence with these words (lower case).
    Refusal(&'static str),
}

/// What a run came to.
#[derive(Debug)]
pub struct Ran {
    /// QEMU's exit status; `None` if it took too long, or died.
    pub code: Option<i32>,
    /// What the kernel said.
    pub console: String,
    /// What QEMU said.
    pub words: String,
    /// What the screen showed.
    pub screen: Option<RgbImage>,
    /// What QEMU's IOMMU translated.
    pub trace: String,
    /// From QEMU's start to its end.
    pub elapsed: Duration,
}

/// Runs the kernel `image` on a machine, with a look at its screen. What of QEMU's IOMMU is traced is what [`Ran::judge`] asks for.
///
/// # Errors
///
/// If it cannot be run at all.
pub fn run(emulator: &Emulator, machine: &Machine, image: &Path, patience: Duration) -> Result<Ran> {
    let directory = tempfile::tempdir().context("no temporary directory")?;
    let (screen, trace) = (directory.path().join("screen.png"), directory.path().join("trace"));
    let mut machine = machine.clone();
    machine.command_line.push("screen.wait=1".into());
    if machine.iommu != Iommu::Virtio {
        machine.trace.push(TraceRequest { pattern: "smmuv3_translate_*".into(), file: trace.clone() });
    }
    let mut session = Session::start(emulator, &machine, image, patience, false)?;
    let (mut console, mut shot, mut in_time) = (String::new(), None, true);
    loop {
        match session.next_event() {
            Event::Line(line) => {
                if let Some(Message::Screen { .. }) = console::parse(&line) {
                    shot = Some(session.screenshot(&screen));
                    session.type_line("");
                }
                console += &line;
                console.push('\n');
            }
            Event::Closed => break,
            Event::OutOfTime => {
                in_time = false;
                for line in session.kill() {
                    console += &line;
                    console.push('\n');
                }
                break;
            }
        }
    }
    let end = session.finish()?;
    let screen = match shot {
        Some(saved) => {
            saved?;
            Some(image::open(&screen).context("QEMU's picture of the screen cannot be read")?.to_rgb8())
        }
        None => None,
    };
    Ok(Ran {
        code: end.status.code().filter(|_| in_time),
        console,
        words: end.words,
        screen,
        trace: std::fs::read(trace).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default(),
        elapsed: end.elapsed,
    })
}

/// A line `device ...` of the report.
#[derive(Debug, PartialEq, Eq)]
struct Device<'a> {
    /// Its kind and place.
    name: &'a str,
    /// Its StreamIDs, as they are printed.
    streams: Vec<&'a str>,
}

impl<'a> Device<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (name, rest) = line.strip_prefix("device ")?.split_once(" stream ")?;
        let words = rest.split_whitespace().take_while(|word| word.starts_with("0x"));
        Some(Self { name: name.trim(), streams: words.map(|word| word.trim_end_matches(',')).collect() })
    }
}

impl Ran {
    /// Says what of the run is not as expected. `says` has lines of the report, by how they begin, and words that must be in them.
    ///
    /// # Errors
    ///
    /// One sentence, followed by all that was said.
    pub fn judge(&self, expect: Expect, says: &[(&str, &str)]) -> Result<(), String> {
        let verdict = match expect {
            Expect::Picture => self.picture(),
            Expect::Refusal(words) => self.refusal(words),
        };
        let verdict = verdict.and_then(|()| says.iter().try_for_each(|(label, words)| self.says(label, words)));
        verdict.map_err(|problem| {
            format!(
                "{problem}\nconsole:\n  {}\nQEMU: {}",
                self.console.trim_end().replace('\n', "\n  "),
                self.words.trim_end()
            )
        })
    }

    fn line(&self, words: &str) -> Result<&str, String> {
        let found = self.console.lines().find(|line| line.starts_with(words));
        found.ok_or_else(|| format!("the report has no line {words:?}"))
    }

    fn says(&self, label: &str, words: &str) -> Result<(), String> {
        let line = self.line(label)?;
        if line.contains(words) { Ok(()) } else { Err(format!("{line:?} does not say {words:?}")) }
    }

    fn ended_with(&self, code: i32) -> Result<(), String> {
        if self.console.contains("panic") {
            return Err("the kernel panicked".into());
        }
        match self.code {
            Some(ended) if ended == code => Ok(()),
            Some(other) => Err(format!("it ended with {other}, not {code}")),
            None => Err("it did not end in time".into()),
        }
    }

    fn refusal(&self, words: &str) -> Result<(), String> {
        self.ended_with(1)?;
        let errors: Vec<&str> = self.console.lines().filter(|line| line.contains("error: ")).collect();
        match errors.as_slice() {
            [error] if error.to_lowercase().contains(words) => {}
            [error] => return Err(format!("{error:?} is not about {words:?}")),
            errors => return Err(format!("{} sentences instead of one", errors.len())),
        }
        if self.screen.is_some() {
            return Err("it refused, and yet showed something".into());
        }
        Ok(())
    }

    fn picture(&self) -> Result<(), String> {
        self.ended_with(0)?;
        self.screen()?;
        self.says("by CPU", " 0 bytes")?;
        self.says("faults", " 0 in the job")?;
        self.says("mappings", " 0 live")?;
        self.says("mappings", " 0 pages in quarantine")?;
        let devices: Vec<Device<'_>> = self.console.lines().filter_map(Device::parse).collect();
        for kind in ["virtio-blk", "virtio-gpu"] {
            let device = devices.iter().find(|device| device.name.starts_with(kind));
            let device = device.ok_or_else(|| format!("the report has no {kind}"))?;
            self.translated(device)?;
        }
        devices.iter().try_for_each(|device| self.stopped(device))?;
        let stray = ["smmuv3_translate_bypass", "smmuv3_translate_disable"]
            .into_iter()
            .find(|event| self.trace.contains(event));
        stray.map_or(Ok(()), |event| Err(format!("an access was not translated ({event})")))
    }

    fn screen(&self) -> Result<(), String> {
        let wanted = &*PICTURE;
        let Some(screen) = &self.screen else { return Err("it showed nothing".into()) };
        if screen.dimensions() != wanted.dimensions() {
            return Err(format!("the screen has {:?} pixels", screen.dimensions()));
        }
        let wrong = screen.pixels().zip(wanted.pixels()).filter(|(shown, wanted)| shown != wanted).count();
        if wrong == 0 { Ok(()) } else { Err(format!("{wrong} pixels differ from the picture")) }
    }

    /// QEMU says that an access of the device was translated.
    fn translated(&self, device: &Device<'_>) -> Result<(), String> {
        let of = |line: &str| {
            line.contains("smmuv3_translate_success")
                && device.streams.iter().any(|stream| line.contains(&format!("sid={stream} ")))
        };
        if self.trace.lines().any(of) { Ok(()) } else { Err(format!("no access of {} was translated", device.name)) }
    }

    /// The report says that the device was stopped, with a record that has one of its streams and the address it was sent to.
    fn stopped(&self, device: &Device<'_>) -> Result<(), String> {
        let lines: Vec<&str> = self.console.lines().collect();
        let stopped = lines.windows(2).any(|pair| {
            let [verdict, record] = pair else { return false };
            let Some((who, rest)) = verdict.split_once(" sent to ") else { return false };
            let Some((target, rest)) = rest.split_once(": ") else { return false };
            who.starts_with("fence")
                && who.ends_with(device.name)
                && rest == "stopped, memory unchanged"
                && device.streams.iter().any(|stream| record.contains(&format!("stream {stream} ")))
                && record.contains(&format!(" at {target}:"))
        });
        if stopped { Ok(()) } else { Err(format!("{} was not shown to be stopped", device.name)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
device    virtio-blk 01:00.0   stream 0x100, DMA domain
device    virtio-gpu 02:01.0   stream 0x200 0x208 of smmu, DMA domain
by CPU    0 bytes of the picture copied
faults    0 in the job
fence     virtio-gpu 02:01.0 sent to 0x5000: stopped, memory unchanged
          stream 0x208 read at 0x5000: not mapped
fence     virtio-blk 01:00.0 sent to 0x6000: stopped, memory unchanged
          stream 0x100 write at 0x6000: not mapped
mappings  0 live at the end of 13 made, 0 pages in quarantine
";
    const TRACE: &str = "smmuv3_translate_success x sid=0x100 iova=0\nsmmuv3_translate_success x sid=0x200 iova=0\n";

    fn good() -> Ran {
        Ran {
            code: Some(0),
            console: CONSOLE.into(),
            words: String::new(),
            screen: Some(PICTURE.clone()),
            trace: TRACE.into(),
            elapsed: Duration::ZERO,
        }
    }

    fn problem(change: impl FnOnce(&mut Ran), expect: Expect) -> String {
        let mut ran = good();
        change(&mut ran);
        ran.judge(expect, &[]).expect_err("this was found good")
    }

    /// Each line of the judgement has something here that only it finds.
    #[test]
    fn a_good_run_is_good_and_whatever_is_wrong_is_found() {
        good().judge(Expect::Picture, &[("mappings", "of 13 made")]).unwrap();
        for (label, words) in [("mappings", "of 14 made"), ("device    edu", "0x8")] {
            assert!(good().judge(Expect::Picture, &[(label, words)]).unwrap_err().contains(label));
        }
        type Change = fn(&mut Ran);
        let changes: [(&str, Change); 14] = [
            ("ended with 1", |ran| ran.code = Some(1)),
            ("in time", |ran| ran.code = None),
            ("panicked", |ran| ran.console += "panic\n"),
            ("showed nothing", |ran| ran.screen = None),
            ("1 pixels differ", |ran| ran.screen.as_mut().unwrap().get_pixel_mut(9, 9).0[1] ^= 1),
            ("pixels", |ran| ran.screen = Some(RgbImage::new(640, 400))),
            ("by CPU", |ran| ran.console = ran.console.replace("0 bytes of", "12 bytes of")),
            ("faults", |ran| ran.console = ran.console.replace("0 in the job", "1 in the job")),
            ("0 live", |ran| ran.console = ran.console.replace(" 0 live", " 1 live")),
            ("quarantine", |ran| ran.console = ran.console.replace(" 0 pages", " 2 pages")),
            ("no virtio-blk", |ran| ran.console = ran.console.replace("device    virtio-blk", "device    virtio-net")),
            ("access of virtio-gpu", |ran| ran.trace = ran.trace.replace("0x200 ", "0x2000 ")),
            ("virtio-gpu 02:01.0 was not shown", |ran| ran.console = ran.console.replace("0x208 read", "0x210 read")),
            ("not translated", |ran| ran.trace += "smmuv3_translate_bypass x sid=0x8\n"),
        ];
        for (words, change) in changes {
            let said = problem(change, Expect::Picture);
            assert!(said.lines().next().unwrap().contains(words), "{words:?}: {said}");
        }
    }

    #[test]
    fn a_refusal_is_one_sentence_about_the_matter_and_no_picture() {
        let refused = |console: &str| Ran { code: Some(1), console: console.into(), screen: None, ..good() };
        let expect = Expect::Refusal("no iommu");
        refused("error: it has No IOMMU\n").judge(expect, &[]).unwrap();
        for (words, ran) in [
            ("ended with 0", Ran { code: Some(0), ..refused("error: no iommu\n") }),
            ("0 sentences", refused("fine\n")),
            ("2 sentences", refused("error: no iommu\nerror: no iommu\n")),
            ("not about", refused("error: no disk\n")),
            ("showed", Ran { screen: good().screen, ..refused("error: no iommu\n") }),
        ] {
            let said = ran.judge(expect, &[]).unwrap_err();
            assert!(said.lines().next().unwrap().contains(words), "{words:?}: {said}");
        }
    }
}
