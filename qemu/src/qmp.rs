//! QEMU's control socket, for screenshots.
//!
//! One JSON value a line: a greeting, then a reply for every command, with events in between, which are passed over.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest reply that is read, in bytes.
const LONGEST: u64 = 16 << 20;

/// A connection to a running QEMU.
#[derive(Debug)]
pub struct Qmp<S = UnixStream> {
    stream: BufReader<S>,
}

impl Qmp {
    /// Connects to the socket at `path`, which QEMU may be about to create, and gets ready for commands. No wait takes
    /// longer than `timeout`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error).context("QEMU's control socket cannot be reached"),
            }
        };
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Self::negotiate(stream)
    }
}

impl<S: Read + Write> Qmp<S> {
    /// Takes the greeting and leaves the negotiation mode.
    fn negotiate(stream: S) -> Result<Self> {
        let mut control = Self { stream: BufReader::new(stream) };
        let greeting = control.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("QEMU's control socket greets with {greeting}");
        }
        control.execute("qmp_capabilities", json!({}))?;
        Ok(control)
    }

    /// Executes a command and returns its value. Fails with QEMU's own words.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        let stream = self.stream.get_mut();
        stream.write_all(format!("{request}\n").as_bytes()).context("QEMU's control socket is closed")?;
        stream.flush()?;
        loop {
            let mut reply = self.receive()?;
            if let Some(error) = reply.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("it does not say why"));
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self.stream.by_ref().take(LONGEST).read_line(&mut line).context("QEMU does not answer")?;
        if count == 0 {
            bail!("QEMU closed its control socket");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU's control socket says {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    /// Plays QEMU: says each text, waiting for a line of input between them; returns what it heard.
    fn played(texts: &'static [&'static str]) -> (UnixStream, thread::JoinHandle<Vec<Value>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let mut heard = Vec::new();
            let mut reader = BufReader::new(theirs);
            for (number, text) in texts.iter().enumerate() {
                if number > 0 {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    heard.push(serde_json::from_str(&line).unwrap());
                }
                reader.get_mut().write_all(text.as_bytes()).unwrap();
            }
            heard
        });
        (ours, thread)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}}}\n";

    #[test]
    fn replies_are_found_among_events() {
        let (stream, thread) = played(&[
            GREETING,
            "{\"return\": {}}\n",
            "{\"event\": \"STOP\"}\n{\"event\": \"RESUME\"}\n{\"return\": 5}\n",
        ]);
        let mut control = Qmp::negotiate(stream).unwrap();
        assert_eq!(control.execute("query-x", json!({ "a": 1 })).unwrap(), json!(5));
        let heard = thread.join().unwrap();
        assert_eq!(heard[0]["execute"], "qmp_capabilities");
        assert_eq!(heard[1], json!({ "execute": "query-x", "arguments": { "a": 1 } }));
    }

    #[test]
    fn refusals_carry_the_words_of_qemu() {
        let (stream, _thread) = played(&[
            GREETING,
            "{\"return\": {}}\n",
            "{\"error\": {\"class\": \"X\", \"desc\": \"no such device\"}}\n",
        ]);
        let error = Qmp::negotiate(stream).unwrap().execute("screendump", json!({})).unwrap_err();
        assert!(error.to_string().contains("no such device"), "{error}");
    }

    #[test]
    fn a_closed_or_foreign_socket_is_an_error() {
        for texts in [&["hello\n"][..], &["{}\n"], &[], &[GREETING]] {
            let texts: &'static [&'static str] = texts.to_vec().leak();
            let (stream, _thread) = played(texts);
            assert!(Qmp::negotiate(stream).is_err(), "{texts:?}");
        }
    }
}
