//! The console: an 8250 serial line whose output goes to a log of limited size. There is no input.

use std::{fs::OpenOptions, io, os::unix::fs::OpenOptionsExt as _};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{bounded_file::BoundedFile, config::ConsoleConfig};

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
    line: Serial<InterruptTrigger, NoEvents, BoundedFile>,
}

impl Console {
    /// A line that writes to a log. `irqfd` is its interrupt: the kernel writes its own messages by polling, but what a
    /// program writes to `/dev/console` waits for the interrupt.
    pub fn new(log: BoundedFile, irqfd: EventFd) -> Self {
        Self { line: Serial::new(InterruptTrigger(irqfd), log) }
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

struct InterruptTrigger(EventFd);

impl Trigger for InterruptTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn open(path: &Path) -> (Console, EventFd) {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let config = ConsoleConfig { path: path.into(), limit_bytes: 100 };
        (Console::new(open_log(&config).unwrap(), irqfd.try_clone().unwrap()), irqfd)
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
}
