//! The machine's own log. It is on a tmpfs, in the host's memory, and a guest can cause some of its lines. So its size,
//! the length of its lines and their rate are limited.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use crate::bounded_file::BoundedFile;

/// The log message of a machine that has ended by itself, for which the controller looks.
pub const LAST_WORDS: &str = "the machine has ended";

/// Most bytes of the file.
const SIZE_MAX: u64 = 256 << 10;
/// Most bytes of one line. The rest is cut off.
const LINE_MAX: usize = 1024;
/// Most lines in each [`PERIOD`]. The others are dropped and counted.
const LINES_MAX: u32 = 50;
const PERIOD: Duration = Duration::from_secs(1);

/// Writes the machine's log. Each write must be one line.
pub struct Log {
    file: Box<dyn Write + Send>,
    period_start: Instant,
    /// Lines written in this period.
    lines: u32,
    /// Lines dropped since the last one that was written.
    dropped: u64,
}

impl Log {
    /// A log that goes to standard error. Its size is limited only if that is a file: a terminal or a pipe keeps
    /// nothing.
    pub fn to_stderr() -> io::Result<Self> {
        let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        if file.metadata()?.is_file() {
            Ok(Self::new(BoundedFile::new(file, SIZE_MAX)?))
        } else {
            Ok(Self::new(file))
        }
    }

    fn new(file: impl Write + Send + 'static) -> Self {
        Self { file: Box::new(file), period_start: Instant::now(), lines: 0, dropped: 0 }
    }

    fn write_line(&mut self, line: &[u8], now: Instant) -> io::Result<()> {
        if now.saturating_duration_since(self.period_start) >= PERIOD {
            (self.period_start, self.lines) = (now, 0);
        }
        // This line comes once, and the controller looks for it to know how the machine has ended.
        let is_last = line.windows(LAST_WORDS.len()).any(|words| words == LAST_WORDS.as_bytes());
        if self.lines >= LINES_MAX && !is_last {
            self.dropped += 1;
            return Ok(());
        }
        self.lines += 1;
        if self.dropped > 0 {
            let dropped = std::mem::take(&mut self.dropped);
            writeln!(self.file, "{dropped} lines left out: there were more than {LINES_MAX} a second")?;
        }
        match line.get(..LINE_MAX) {
            Some(start) => self.file.write_all(&[start, b"\n"].concat()),
            None => self.file.write_all(line),
        }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_line(line, Instant::now())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;

    /// A log in a file as the controller opens it.
    fn log() -> (Log, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let opened = OpenOptions::new().read(true).append(true).open(file.path()).unwrap();
        (Log::new(BoundedFile::new(opened, SIZE_MAX).unwrap()), file)
    }

    #[test]
    fn a_guest_that_causes_lines_for_hours_does_not_fill_the_host() {
        let (mut log, file) = log();
        let mut now = Instant::now();
        for number in 0..3000 {
            log.write_line(format!("{number} {}\n", "x".repeat(2000)).as_bytes(), now).unwrap();
            now += PERIOD / LINES_MAX;
            assert!(fs::metadata(file.path()).unwrap().len() <= SIZE_MAX);
        }
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.contains("\n2999 x"), "the newest lines are kept");
        assert!(text.lines().all(|line| line.len() <= LINE_MAX));
    }

    #[test]
    fn lines_that_come_too_fast_are_counted_and_the_last_words_are_not_among_them() {
        let (mut log, file) = log();
        let now = log.period_start;
        for _ in 0..1000 {
            log.write_line(b"again\n", now).unwrap();
        }
        assert_eq!(fs::read_to_string(file.path()).unwrap().lines().count(), 50);
        log.write_line(format!("{LAST_WORDS}\n").as_bytes(), now).unwrap();
        log.write_line(b"later\n", now + PERIOD).unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        let end: Vec<_> = text.lines().skip(50).collect();
        assert!(end[0].starts_with("950 lines left out"), "{end:?}");
        assert_eq!(end[1..], [LAST_WORDS, "later"]);
    }
}
