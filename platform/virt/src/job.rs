//! What the image does: the main job.

use base::Deadline;
use board::{Company, Hardware, Operator, Options};
use kernel::demo::Screenshot;
use kernel::println;
use virt::pl011::Pl011;
use virt::{Boot, cores};

/// Milliseconds that an operator may look at the picture. The program that started the machine has a limit of its own.
const LOOK_MILLIS: u64 = 24 * 60 * 60 * 1000;

/// Runs the main job. The result is the exit status.
pub(crate) fn main(boot: &'static Boot) -> u32 {
    match run(boot) {
        Ok(status) => status,
        Err(error) => {
            println!("error: {error}");
            println!("##end fail");
            1
        }
    }
}

fn run(boot: &'static Boot) -> Result<u32, board::Error> {
    let machine = &boot.machine;
    let options = Options::parse(&machine.chosen.bootargs)?;
    // Before there are devices.
    dma::tracker::enable(options.track);
    let hardware = Hardware::bring_up(machine)?;
    let cores = match cores::start_all(machine, board::init_core) {
        Ok(cores) => cores,
        Err(error) => {
            println!("error: {error}");
            return Ok(1);
        }
    };
    let mebibytes = machine.memory.iter().map(|range| range.len()).sum::<u64>() >> 20;
    let plural = if cores == 1 { "core" } else { "cores" };
    println!("sluice    {}, {cores} {plural}, {mebibytes} MiB, entered at EL{}", machine.model, boot.entered_at);
    let company = Company { program: programs::PAINTER, arguments: [0; 3], elsewhere: cores::run_anywhere };
    Ok(board::main_job(&hardware, &options, &company, &Watcher { console: boot.console, wait: options.wait }))
}

/// Whoever started the machine, at the other end of the console.
struct Watcher {
    console: Option<&'static Pl011>,
    wait: bool,
}

impl Screenshot for Watcher {
    fn ready(&self, width: u32, height: u32) {
        println!("##screen {width} {height}");
        if let (true, Some(console)) = (self.wait, self.console) {
            // The answer is a line, of which only the end matters. If nobody answers for a day: go on.
            let deadline = Deadline::after_millis(LOOK_MILLIS);
            while console.read(deadline).is_ok_and(|byte| !matches!(byte, b'\n' | b'\r')) {}
        }
    }
}

impl Operator for Watcher {
    fn end(&self, ok: bool) {
        println!("##end {}", if ok { "ok" } else { "fail" });
    }
}
