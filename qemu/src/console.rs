//! The console's lines: what is for the reader, and what is for the runner.
//!
//! A line that begins with `##` is a message to the runner and is not shown. The kernel says:
//!
//! | line | means |
//! |---|---|
//! | `##screen WIDTH HEIGHT` | the picture is on the screen; with `screen.wait=1` the kernel now waits for a line |
//! | `##pc 0xADDRESS` | one frame of a backtrace, innermost first: the faulting or the calling instruction |
//! | `##end ok` or `##end fail` | its verdict; the exit status follows |
//! | `##ktest registered N` | the test image has N tests |
//! | `##ktest plan N` | the test image will run N tests |
//! | `##ktest start NAME` | one begins |
//! | `##ktest ok NAME`, `##ktest fail NAME MESSAGE`, `##ktest skip NAME REASON` | one ended |
//! | `##bench has NAME` | there is such a benchmark |
//! | `##bench plan N`, `##bench start NAME` | the benchmarks have N to run; one begins |
//! | `##bench result NAME UNIT MIN MEDIAN MAX COMMANDS` | what one operation of it costs |
//! | `##bench fail NAME MESSAGE`, `##bench skip NAME REASON` | there is no result |
//! | `##bench commands N` | the SMMUs were given N commands in all |
//!
//! A line that begins with `##` and is none of these is shown as it is: a message nobody understands must not vanish.

use crate::bench::boot::Figure;

/// A console line that is meant for the runner.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// The picture is on the screen, with this size in pixels.
    Screen {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// A frame of a backtrace.
    ProgramCounter(u64),
    /// The kernel's verdict: whether it succeeded.
    End(bool),
    /// A message of the test image.
    Test(TestMessage),
    /// A message of the benchmarks.
    Bench(BenchMessage),
}

/// What the benchmarks report.
#[derive(Debug, Clone, PartialEq)]
pub enum BenchMessage {
    /// There is one with this name.
    Has(String),
    /// So many will run.
    Plan(usize),
    /// The named one begins.
    Start(String),
    /// One has a result.
    Result(Figure),
    /// The named one failed, with a message.
    Fail(String, String),
    /// The named one makes no sense on this machine, with the reason.
    Skip(String, String),
    /// Commands that the SMMUs were given since the machine started.
    Commands(u64),
}

/// What the test image reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TestMessage {
    /// The image has so many tests.
    Registered(usize),
    /// So many tests will run.
    Plan(usize),
    /// The named test begins.
    Start(String),
    /// The named test passed.
    Ok(String),
    /// The named test failed, with a message.
    Fail(String, String),
    /// The named test cannot run on this machine, with the reason.
    Skip(String, String),
}

/// Reads a console line; `None` if it is for the reader of the console.
pub fn parse(line: &str) -> Option<Message> {
    let mut words = line.trim_end().strip_prefix("##")?.splitn(2, ' ');
    let (kind, rest) = (words.next()?, words.next().unwrap_or("").trim());
    match kind {
        "screen" => {
            let (width, height) = rest.split_once(' ')?;
            Some(Message::Screen { width: width.parse().ok()?, height: height.trim().parse().ok()? })
        }
        "pc" => Some(Message::ProgramCounter(u64::from_str_radix(rest.strip_prefix("0x")?, 16).ok()?)),
        "end" => match rest {
            "ok" => Some(Message::End(true)),
            "fail" => Some(Message::End(false)),
            _ => None,
        },
        "ktest" => parse_test(rest).map(Message::Test),
        "bench" => parse_bench(rest).map(Message::Bench),
        _ => None,
    }
}

fn parse_test(text: &str) -> Option<TestMessage> {
    let (kind, rest) = text.split_once(' ')?;
    let (name, message) = match rest.split_once(' ') {
        Some((name, message)) => (name.to_string(), message.trim().to_string()),
        None => (rest.to_string(), String::new()),
    };
    match kind {
        "registered" => Some(TestMessage::Registered(rest.parse().ok()?)),
        "plan" => Some(TestMessage::Plan(rest.parse().ok()?)),
        "start" => Some(TestMessage::Start(name)),
        "ok" => Some(TestMessage::Ok(name)),
        "fail" => Some(TestMessage::Fail(name, message)),
        "skip" => Some(TestMessage::Skip(name, message)),
        _ => None,
    }
}

fn parse_bench(text: &str) -> Option<BenchMessage> {
    let (kind, rest) = text.split_once(' ')?;
    let (name, message) = rest.split_once(' ').unwrap_or((rest, ""));
    let name = name.to_string();
    match kind {
        "plan" => Some(BenchMessage::Plan(rest.parse().ok()?)),
        "commands" => Some(BenchMessage::Commands(rest.parse().ok()?)),
        "has" => Some(BenchMessage::Has(name)),
        "start" => Some(BenchMessage::Start(name)),
        "fail" => Some(BenchMessage::Fail(name, message.trim().to_string())),
        "skip" => Some(BenchMessage::Skip(name, message.trim().to_string())),
        "result" => {
            let (unit, numbers) = message.split_once(' ')?;
            let numbers: Vec<f64> = numbers.split(' ').map(|word| word.trim().parse().ok()).collect::<Option<_>>()?;
            let &[min, median, max, commands] = numbers.as_slice() else { return None };
            Some(BenchMessage::Result(Figure { name, unit: unit.to_string(), min, median, max, commands }))
        }
        _ => None,
    }
}

/// Cuts a byte stream into lines.
///
/// A line longer than [`LineSplitter::LIMIT`] bytes is cut, so that a guest which never ends its line cannot fill the
/// host's memory.
#[derive(Debug, Default)]
pub struct LineSplitter {
    pending: Vec<u8>,
}

impl LineSplitter {
    /// The longest line that is kept whole, in bytes.
    pub const LIMIT: usize = 64 * 1024;

    /// Takes bytes and hands every completed line to `each`, without its line end.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(String)) {
        for &byte in bytes {
            if byte == b'\n' || self.pending.len() == Self::LIMIT {
                self.finish().into_iter().for_each(&mut each);
            }
            if byte == b'\n' {
                continue;
            }
            self.pending.push(byte);
        }
    }

    /// Returns the line that was begun, if any; an empty line counts only once it was ended.
    fn finish(&mut self) -> Option<String> {
        let mut bytes = std::mem::take(&mut self.pending);
        while bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Returns what was received after the last line end.
    pub fn remainder(&mut self) -> Option<String> {
        if self.pending.is_empty() { None } else { self.finish() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_for_the_runner_are_understood() {
        assert_eq!(parse("##screen 640 480"), Some(Message::Screen { width: 640, height: 480 }));
        assert_eq!(parse("##pc 0xffff000000081234"), Some(Message::ProgramCounter(0xffff_0000_0008_1234)));
        assert_eq!(parse("##end ok"), Some(Message::End(true)));
        assert_eq!(parse("##end fail\r"), Some(Message::End(false)));
        assert_eq!(parse("##ktest plan 12"), Some(Message::Test(TestMessage::Plan(12))));
        assert_eq!(parse("##ktest ok a::b"), Some(Message::Test(TestMessage::Ok("a::b".into()))));
        assert_eq!(
            parse("##ktest fail a::b expected 1, got 2"),
            Some(Message::Test(TestMessage::Fail("a::b".into(), "expected 1, got 2".into())))
        );
    }

    #[test]
    fn figures_of_benchmarks_are_understood_or_shown() {
        let figure = |name: &str| Figure {
            name: name.into(),
            unit: "instructions".into(),
            min: 1.5,
            median: 2.0,
            max: 2.25,
            commands: 0.5,
        };
        let expected = Some(Message::Bench(BenchMessage::Result(figure("map4k"))));
        assert_eq!(parse("##bench result map4k instructions 1.500 2.000 2.250 0.500\r"), expected);
        assert_eq!(parse("##bench plan 3"), Some(Message::Bench(BenchMessage::Plan(3))));
        assert_eq!(parse("##bench fail a b c"), Some(Message::Bench(BenchMessage::Fail("a".into(), "b c".into()))));
        for line in ["##bench", "##bench result a ns 1 2 3", "##bench result a ns 1 2 3 x", "##bench plan x"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn everything_else_is_for_the_reader() {
        for line in [
            "",
            "#",
            "# ##end ok",
            "##",
            "##screen",
            "##screen 1",
            "##screen x y",
            "##pc 12",
            "##end",
            "##ktest plan x",
            "##new thing",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn lines_survive_any_chunking() {
        let text = b"one\r\ntwo\n\nthree";
        for size in 1..text.len() {
            let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
            for chunk in text.chunks(size) {
                splitter.push(chunk, |line| lines.push(line));
            }
            lines.extend(splitter.remainder());
            assert_eq!(lines, ["one", "two", "", "three"], "chunks of {size}");
            assert_eq!(splitter.remainder(), None);
        }
    }

    #[test]
    fn endless_lines_are_cut() {
        let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
        splitter.push(&vec![b'x'; 2 * LineSplitter::LIMIT + 5], |line| lines.push(line.len()));
        assert_eq!(lines, [LineSplitter::LIMIT, LineSplitter::LIMIT]);
        assert_eq!(splitter.remainder().map(|line| line.len()), Some(5));
    }
}
