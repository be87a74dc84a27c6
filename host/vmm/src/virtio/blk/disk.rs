//! What a disk is made of: files and block devices of the host, one after the other.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek as _, SeekFrom},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{SERIAL_SIZE, pieces::Pieces};

/// Bytes of a sector, in which virtio-blk counts whatever the disk's blocks are.
pub const SECTOR: u64 = 512;
/// Every segment starts on a multiple of this: file systems want their blocks aligned.
const ALIGNMENT: u64 = 4096;
/// Most segments of a disk: overlayfs takes no more layers.
pub const SEGMENTS_MAX: usize = 500;

/// A disk cannot be made.
#[derive(Debug, Error)]
pub enum DiskError {
    #[error("a disk needs 1 to {SEGMENTS_MAX} segments; {0} are asked for")]
    Segments(usize),
    #[error("a disk's serial number has at most {SERIAL_SIZE} bytes; {0:?} is longer")]
    Serial(String),
    #[error("cannot open {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is neither a regular file nor a block device")]
    Kind { path: PathBuf },
    #[error("{path} is empty")]
    Empty { path: PathBuf },
    #[error("the segments up to {path} are larger than a disk can be")]
    TooLarge { path: PathBuf },
}

/// Where a segment is on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// Segments, in order and without overlaps.
pub struct Disk {
    segments: Vec<Segment>,
    read_only: bool,
    block_size: u32,
}

struct Segment {
    file: File,
    extent: Extent,
}

/// A stretch of a request that one segment has, or none.
enum Stretch<'a> {
    Data { file: &'a File, offset: u64, length: u64 },
    Padding { length: u64 },
}

impl Disk {
    /// Opens all segments.
    pub fn open(paths: &[PathBuf], read_only: bool) -> Result<Disk, DiskError> {
        if paths.is_empty() || paths.len() > SEGMENTS_MAX {
            return Err(DiskError::Segments(paths.len()));
        }
        let mut segments = Vec::with_capacity(paths.len());
        let mut end = 0u64;
        let mut block_size = 512;
        for path in paths {
            let (file, length) = open(path, read_only)?;
            if let ([_], Some(size)) = (paths, logical_block_size(&file)) {
                block_size = size;
            }
            let too_large = || DiskError::TooLarge { path: path.clone() };
            let offset = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
            end = offset
                .checked_add(length)
                .filter(|end| i64::try_from(end.saturating_add(ALIGNMENT)).is_ok())
                .ok_or_else(too_large)?;
            segments.push(Segment { file, extent: Extent { offset, length } });
        }
        Ok(Disk { segments, read_only, block_size })
    }

    /// Where the segments are.
    pub fn extents(&self) -> Vec<Extent> {
        self.segments.iter().map(|segment| segment.extent).collect()
    }

    /// Whether nothing can be written to it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Its size in bytes: the end of the last segment, in whole sectors.
    pub fn size(&self) -> u64 {
        let end = self.segments.last().map_or(0, |segment| segment.extent.offset + segment.extent.length);
        end.next_multiple_of(SECTOR)
    }

    /// Fills `pieces` with what the disk has from `offset` on, which must not reach beyond its end.
    pub fn read(&self, mut offset: u64, mut pieces: Pieces<'_>) -> io::Result<()> {
        while !pieces.is_empty() {
            match self.stretch(offset, pieces.length())? {
                Stretch::Data { file, offset: from, length } => {
                    let mut part = pieces.take_first(length);
                    part.read_exact_at(file, from)?;
                    offset += length;
                }
                Stretch::Padding { length } => {
                    pieces.take_first(length).fill_with_zeroes();
                    offset += length;
                }
            }
        }
        Ok(())
    }

    /// Writes `pieces` to the disk from `offset` on.
    pub fn write(&self, mut offset: u64, mut pieces: Pieces<'_>) -> io::Result<()> {
        while !pieces.is_empty() {
            match self.stretch(offset, pieces.length())? {
                Stretch::Data { file, offset: to, length } => {
                    let mut part = pieces.take_first(length);
                    part.write_all_at(file, to)?;
                    offset += length;
                }
                Stretch::Padding { .. } => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(())
    }

    /// Returns when everything written before is on the host's disks.
    pub fn flush(&self) -> io::Result<()> {
        self.segments.iter().try_for_each(|segment| segment.file.sync_data())
    }

    /// The longest stretch from `offset` on, at most `length` long, that is all of one kind.
    fn stretch(&self, offset: u64, length: u64) -> io::Result<Stretch<'_>> {
        if offset.checked_add(length).is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let next = self.segments.partition_point(|segment| segment.extent.offset <= offset);
        // The first segment starts at 0, so that there is one before `next`.
        let segment =
            next.checked_sub(1).and_then(|index| self.segments.get(index)).ok_or(io::ErrorKind::NotFound)?;
        let inside = offset - segment.extent.offset;
        if inside < segment.extent.length {
            let length = length.min(segment.extent.length - inside);
            return Ok(Stretch::Data { file: &segment.file, offset: inside, length });
        }
        let end = self.segments.get(next).map_or(self.size(), |next| next.extent.offset);
        Ok(Stretch::Padding { length: length.min(end - offset) })
    }
}

/// Opens one segment; answers with its length too.
fn open(path: &Path, read_only: bool) -> Result<(File, u64), DiskError> {
    let failed = |source| DiskError::Open { path: path.into(), source };
    let is_disk = |kind: std::fs::FileType| kind.is_file() || kind.is_block_device();
    // Before it is opened, which might wait (a FIFO) or have an effect (a device).
    if !is_disk(path.metadata().map_err(failed)?.file_type()) {
        return Err(DiskError::Kind { path: path.into() });
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    if !is_disk(file.metadata().map_err(failed)?.file_type()) {
        return Err(DiskError::Kind { path: path.into() });
    }
    // Tells a block device's size as well.
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if length == 0 {
        return Err(DiskError::Empty { path: path.into() });
    }
    Ok((file, length))
}

/// `None` for anything but a block device.
fn logical_block_size(file: &File) -> Option<u32> {
    /// `_IO(0x12, 104)` in `linux/fs.h`.
    const BLKSSZGET: libc::Ioctl = 0x1268;
    if !file.metadata().ok()?.file_type().is_block_device() {
        return None;
    }
    let mut size: libc::c_int = 0;
    // SAFETY: the kernel writes one int, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut size) };
    let size = u32::try_from(size).ok()?;
    (result == 0 && size.is_power_of_two() && size >= 512).then_some(size)
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
