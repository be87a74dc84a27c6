//! The console: an 8250 serial line whose output goes to a log of limited size. There is no input.
//!
//! Output beyond the rate limit, if there is one, is dropped: the vCPU that prints it would otherwise have to wait, and
//! all that runs on it too. The log says where output is missing.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    time::Instant,
};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    bounded_file::BoundedFile,
    config::{ConsoleConfig, RateLimit},
    counter::Counter,
    rate_limiter::RateLimiter,
};

/// What the log has in place of output that was dropped.
const DROPPED: &[u8] = b"\n[more than the console's rate limit was printed, and something is missing here]\n";

/// Opens the log and empties it.
pub fn open_log(config: &ConsoleConfig) -> io::Result<BoundedFile> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&config.path)?;
    BoundedFile::new(file, config.limit_bytes)
}

/// The guest's serial line.
pub struct Console {
    line: Serial<InterruptTrigger, NoEvents, RateLimitedLog>,
    throttled: Counter,
    dropped_bytes: Counter,
}

impl Console {
    /// A line that writes to a log, no more than the limit allows. `irqfd` is its interrupt: the kernel writes its own
    /// messages by polling, but what a program writes to `/dev/console` waits for the interrupt.
    pub fn new(log: BoundedFile, limit: &RateLimit, irqfd: EventFd) -> Self {
        let (throttled, dropped_bytes) = (Counter::default(), Counter::default());
        let log = RateLimitedLog {
            log,
            limiter: RateLimiter::new(limit, Instant::now()),
            is_dropping: false,
            throttled: throttled.clone(),
            dropped_bytes: dropped_bytes.clone(),
        };
        Self { line: Serial::new(InterruptTrigger(irqfd), log), throttled, dropped_bytes }
    }

    /// The console's counters by name, as a device has them.
    pub fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("throttled", self.throttled.clone()), ("dropped_bytes", self.dropped_bytes.clone())]
    }

    /// Handles the guest's read of a register of the line.
    pub fn read(&mut self, register: u8) -> u8 {
        self.line.read(register)
    }

    /// Handles the guest's write to a register of the line. If the log cannot be written (on a full disk, for example),
    /// the output is lost: that must not stop the guest.
    pub fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.line.write(register, value) {
            tracing::debug!(?error, "console output lost");
        }
    }
}

/// A log that drops what is beyond a rate limit.
struct RateLimitedLog {
    log: BoundedFile,
    limiter: Option<RateLimiter>,
    is_dropping: bool,
    /// How often it has begun to drop output.
    throttled: Counter,
    dropped_bytes: Counter,
}

impl RateLimitedLog {
    /// Writes output of the time `now`, or drops it.
    fn write_at(&mut self, now: Instant, bytes: &[u8]) -> io::Result<usize> {
        let Some(limiter) = &mut self.limiter else { return self.log.write(bytes) };
        // Once something is missing, so is all until the limit is far away again: there would otherwise be a character
        // now and then, and each time that line.
        let is_dropping =
            if self.is_dropping { !limiter.is_full(now) } else { limiter.not_before(now).is_some() };
        let is_first_dropped = is_dropping && !self.is_dropping;
        self.is_dropping = is_dropping;
        if !is_dropping {
            let written = self.log.write(bytes)?;
            limiter.charge(written as u64);
            return Ok(written);
        }
        self.dropped_bytes.add(bytes.len() as u64);
        if is_first_dropped {
            self.throttled.add(1);
            limiter.charge(DROPPED.len() as u64);
            self.log.write_all(DROPPED)?;
        }
        Ok(bytes.len())
    }
}

impl Write for RateLimitedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_at(Instant::now(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.log.flush()
    }
}

struct InterruptTrigger(EventFd);

impl Trigger for InterruptTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[cfg(test)]
mod tests {
    use std::{num::NonZeroU64, path::Path, time::Duration};

    use super::*;

    fn open(path: &Path) -> (Console, EventFd) {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let config = ConsoleConfig { path: path.into(), limit_bytes: 100 };
        let log = open_log(&config).unwrap();
        (Console::new(log, &RateLimit::default(), irqfd.try_clone().unwrap()), irqfd)
    }

    #[test]
    fn the_log_keeps_the_newest_output_and_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut console = open(&path).0;
        for number in 0..1000 {
            for byte in format!("line {number}\n").bytes() {
                console.write(0, byte);
            }
            assert!(std::fs::metadata(&path).unwrap().len() <= 100);
        }
        let log = std::fs::read_to_string(&path).unwrap();
        assert!(log.ends_with("line 998\nline 999\n"), "{log}");
    }

    #[test]
    fn the_transmitter_is_always_ready() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut console = open(&path).0;
        assert_eq!(console.read(5) & 0x60, 0x60);
    }

    #[test]
    fn a_guest_that_asks_for_the_interrupt_gets_it_when_it_may_write() {
        let directory = tempfile::tempdir().unwrap();
        let (mut console, irqfd) = open(&directory.path().join("console.log"));
        console.write(1, 0x02);
        console.write(0, b'x');
        assert!(irqfd.read().unwrap() > 0);
    }

    #[test]
    fn nobody_but_the_owner_may_read_the_log() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        open(&path);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn output_beyond_the_limit_is_missing_and_the_log_says_so_once_for_each_gap() {
        let start = Instant::now();
        let limit = RateLimit { bytes_per_second: NonZeroU64::new(1000), ..RateLimit::default() };
        let mut file = tempfile::tempfile().unwrap();
        let mut log = RateLimitedLog {
            log: BoundedFile::new(file.try_clone().unwrap(), 1 << 20).unwrap(),
            limiter: RateLimiter::new(&limit, start),
            is_dropping: false,
            throttled: Counter::default(),
            dropped_bytes: Counter::default(),
        };
        // 10 s of output of which only a tenth is allowed, byte by byte as it comes from the line.
        for step in 0..100_000 {
            log.write_at(start + step * Duration::from_micros(100), b"x").unwrap();
        }
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        io::Read::read_to_string(&mut file, &mut text).unwrap();
        let gaps = text.matches(std::str::from_utf8(DROPPED).unwrap()).count();
        let written = text.matches('x').count();
        // What the bucket holds at first, and the last line, which may overdraw it, are beyond ten times the rate.
        let most = 10_000 + 100 + DROPPED.len();
        assert!((5000..=most).contains(&text.len()), "{} bytes", text.len());
        assert!(gaps > 0 && gaps as u64 == log.throttled.get(), "{gaps} gaps");
        assert_eq!(written as u64 + log.dropped_bytes.get(), 100_000);
    }

    #[test]
    fn a_guest_that_prints_more_than_it_may_is_not_held_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let config = ConsoleConfig { path: path.clone(), limit_bytes: 1 << 20 };
        let limit = RateLimit { bytes_per_second: NonZeroU64::new(10), ..RateLimit::default() };
        let mut console = Console::new(open_log(&config).unwrap(), &limit, irqfd);
        let start = Instant::now();
        for _ in 0..10_000 {
            console.write(0, b'x');
            // The transmitter is ready for the next.
            assert_eq!(console.read(5) & 0x60, 0x60);
        }
        let log = std::fs::read_to_string(&path).unwrap();
        let allowed = usize::try_from(1 + start.elapsed().as_secs() * 10 + 10).unwrap();
        assert!(log.matches('x').count() <= allowed, "{log}");
        assert!(log.contains("something is missing here"), "{log}");
        let counters: Vec<_> = console.counters().iter().map(|(_, counter)| counter.get()).collect();
        assert!(counters[0] >= 1 && counters[1] > 5000, "{counters:?}");
    }
}
