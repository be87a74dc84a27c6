//! A load of a known size.

use std::{
    hint::black_box,
    io::{self, Write as _},
    thread,
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// The size of a page: one byte in each makes the kernel give it.
const PAGE: usize = 4096;

/// Takes memory and keeps it, works until this process has had so much of a CPU's time, and says `loaded`. Never ends.
pub fn run(cpu_milliseconds: &str, mebibytes: &str) -> io::Result<()> {
    let cpu = Duration::from_millis(cpu_milliseconds.parse().map_err(io::Error::other)?);
    let size = mebibytes.parse::<usize>().map_err(io::Error::other)? << 20;
    let mut memory = vec![0_u8; size];
    for page in memory.chunks_mut(PAGE) {
        page[0] = 1;
    }
    while cpu_time() < cpu {
        // Not one call of the kernel's after another: most of the time is the process's own.
        for number in 0..100_000 {
            black_box(number);
        }
    }
    println!("loaded");
    io::stdout().flush()?;
    loop {
        thread::park();
        black_box(&memory);
    }
}

/// The CPU time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}
