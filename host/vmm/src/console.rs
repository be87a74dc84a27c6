//! The console: an 8250 serial line whose output goes to a bounded log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt as _,
};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use crate::config::ConsoleConfig;

/// The guest's serial line. Output only: the kernel writes to it with polling, so it needs no
/// interrupt.
pub struct Console {
    line: Serial<NoInterrupt, NoEvents, BoundedLog>,
}

impl Console {
    /// Opens (and empties) the log.
    pub fn open(config: &ConsoleConfig) -> io::Result<Console> {
        let file =
            OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(&config.path)?;
        Ok(Console { line: Serial::new(NoInterrupt, BoundedLog { file, limit: config.limit_bytes.max(2), size: 0 }) })
    }

    /// The guest reads a register of the line.
    pub fn read(&mut self, register: u8) -> u8 {
        self.line.read(register)
    }

    /// The guest writes a register of the line. A log that cannot be written (a full disk) must not
    /// stop the guest, so the output is lost then.
    pub fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.line.write(register, value) {
            tracing::debug!(?error, "console output lost");
        }
    }
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that never grows beyond its limit: when it is full, its older half is dropped.
struct BoundedLog {
    file: File,
    limit: u64,
    size: u64,
}

impl BoundedLog {
    fn drop_older_half(&mut self) -> io::Result<()> {
        let keep = self.limit / 2;
        let mut newest = Vec::new();
        self.file.seek(SeekFrom::Start(self.size.saturating_sub(keep)))?;
        (&self.file).take(keep).read_to_end(&mut newest)?;
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.size = 0;
        self.file.write_all(&newest)?;
        self.size = newest.len() as u64;
        Ok(())
    }
}

impl Write for BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.size + bytes.len() as u64 > self.limit {
            self.drop_older_half()?;
        }
        let written = self.file.write(bytes)?;
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_newest_output_and_its_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut console = Console::open(&ConsoleConfig { path: path.clone(), limit_bytes: 100 }).unwrap();
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
        let mut console = Console::open(&ConsoleConfig { path, limit_bytes: 100 }).unwrap();
        assert_eq!(console.read(5) & 0x60, 0x60);
    }
}
