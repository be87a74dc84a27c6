//! A file whose size is limited, for output that a guest can cause.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write},
};

use crate::memory::to_usize;

/// A file that never grows beyond its limit. When it is full, its older half is dropped.
pub struct BoundedFile {
    file: File,
    limit: u64,
    size: u64,
}

impl BoundedFile {
    /// Writes at the end of a file, which must be open for reading and writing. `limit` is in bytes.
    pub fn new(mut file: File, limit: u64) -> io::Result<Self> {
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, limit: limit.max(2), size })
    }

    fn drop_older_half(&mut self) -> io::Result<()> {
        let keep = self.limit / 2;
        let mut newest = Vec::new();
        self.file.seek(SeekFrom::Start(self.size.saturating_sub(keep)))?;
        (&self.file).take(keep).read_to_end(&mut newest)?;
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        let written = self.file.write_all(&newest);
        // On a disk that is full, only a part of it may have been written.
        self.size = self.file.stream_position()?;
        written
    }
}

impl Write for BoundedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not more than what is free once the older half has been dropped.
        let most = to_usize(self.limit / 2);
        let bytes = &bytes[..bytes.len().min(most)];
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
