//! The contents of a disk: files and block devices of the host, one after the other.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::FileTypeExt as _,
    },
};

use pericarp_protos::descriptors;
use thiserror::Error;

use super::{SERIAL_SIZE, iovecs::IoVecs};

/// Bytes of a sector, the unit in which virtio-blk counts, whatever the size of the disk's blocks is.
pub const SECTOR: u64 = 512;
/// Each segment starts at a multiple of this many bytes, because file systems want their blocks aligned.
const ALIGNMENT: u64 = 4096;
/// Most segments of a disk. overlayfs takes no more layers.
pub const SEGMENTS_MAX: usize = descriptors::SET_MAX;

/// A disk cannot be made of its segments, which are counted from 1.
#[derive(Debug, Error)]
pub enum DiskError {
    #[error("a disk needs 1 to {SEGMENTS_MAX} segments; {0} are asked for")]
    Segments(usize),
    #[error("a disk's serial number has at most {SERIAL_SIZE} bytes; {0:?} is longer")]
    Serial(String),
    #[error("cannot look at segment {number}: {source}")]
    Look { number: usize, source: io::Error },
    #[error("segment {number} is neither a regular file nor a block device")]
    Kind { number: usize },
    #[error("segment {number} is empty")]
    Empty { number: usize },
    #[error("the segments up to {number} are larger than a disk can be")]
    TooLarge { number: usize },
}

/// Where a segment is on its disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// A disk: its segments, in order and without overlaps, and zeroes between them.
pub struct Disk {
    segments: Vec<Segment>,
    read_only: bool,
    block_size: u32,
}

struct Segment {
    file: File,
    extent: Extent,
}

/// A range of a disk that belongs to one segment, or to none.
enum DiskRange<'a> {
    Data { file: &'a File, offset: u64, length: u64 },
    Padding { length: u64 },
}

impl Disk {
    /// Makes a disk of open files and block devices, its segments. They must be open for writing unless it is
    /// read-only.
    pub fn new(files: Vec<OwnedFd>, read_only: bool) -> Result<Self, DiskError> {
        let count = files.len();
        if count == 0 || count > SEGMENTS_MAX {
            return Err(DiskError::Segments(count));
        }
        let mut segments = Vec::with_capacity(count);
        let mut end = 0u64;
        let mut block_size = 512;
        for (number, file) in (1..).zip(files) {
            let mut file = File::from(file);
            let length = length(&mut file, number)?;
            if let (1, Some(size)) = (count, logical_block_size(&file)) {
                block_size = size;
            }
            let too_large = || DiskError::TooLarge { number };
            let offset = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
            end = offset
                .checked_add(length)
                .filter(|end| i64::try_from(end.saturating_add(ALIGNMENT)).is_ok())
                .ok_or_else(too_large)?;
            segments.push(Segment { file, extent: Extent { offset, length } });
        }
        Ok(Self { segments, read_only, block_size })
    }

    /// Where the segments are on the disk.
    pub fn extents(&self) -> Vec<Extent> {
        self.segments.iter().map(|segment| segment.extent).collect()
    }

    /// Whether nothing can be written to the disk.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The disk's logical block size in bytes: that of its block device, if it is a single one, and 512 otherwise.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// The disk's size in bytes: the end of the last segment, in whole sectors.
    pub fn size(&self) -> u64 {
        let end = self.segments.last().map_or(0, |segment| segment.extent.offset + segment.extent.length);
        end.next_multiple_of(SECTOR)
    }

    /// Fills `target` with the disk's contents from `offset` on. Fails if they end before.
    pub fn read(&self, mut offset: u64, mut target: IoVecs<'_>) -> io::Result<()> {
        while !target.is_empty() {
            match self.range_at(offset, target.length())? {
                DiskRange::Data { file, offset: from, length } => {
                    let mut part = target.take_first(length);
                    part.read_exact_at(file, from)?;
                    offset += length;
                }
                DiskRange::Padding { length } => {
                    target.take_first(length).fill_with_zeroes();
                    offset += length;
                }
            }
        }
        Ok(())
    }

    /// Writes `data` to the disk from `offset` on. Fails if a part of that belongs to no segment.
    pub fn write(&self, mut offset: u64, mut data: IoVecs<'_>) -> io::Result<()> {
        while !data.is_empty() {
            match self.range_at(offset, data.length())? {
                DiskRange::Data { file, offset: to, length } => {
                    let mut part = data.take_first(length);
                    part.write_all_at(file, to)?;
                    offset += length;
                }
                DiskRange::Padding { .. } => return Err(io::ErrorKind::InvalidInput.into()),
            }
        }
        Ok(())
    }

    /// Returns once everything that was written before is on the host's disks.
    pub fn flush(&self) -> io::Result<()> {
        self.segments.iter().try_for_each(|segment| segment.file.sync_data())
    }

    /// The longest range from `offset` on, of at most `length` bytes, that belongs to one segment or to none.
    fn range_at(&self, offset: u64, length: u64) -> io::Result<DiskRange<'_>> {
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
            return Ok(DiskRange::Data { file: &segment.file, offset: inside, length });
        }
        let end = self.segments.get(next).map_or(self.size(), |next| next.extent.offset);
        Ok(DiskRange::Padding { length: length.min(end - offset) })
    }
}

/// The length of a segment in bytes.
fn length(file: &mut File, number: usize) -> Result<u64, DiskError> {
    let failed = |source| DiskError::Look { number, source };
    let kind = file.metadata().map_err(failed)?.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        return Err(DiskError::Kind { number });
    }
    // The end is found by seeking, because a block device's metadata has no size.
    match file.seek(SeekFrom::End(0)).map_err(failed)? {
        0 => Err(DiskError::Empty { number }),
        length => Ok(length),
    }
}

/// The logical block size of a block device in bytes; `None` for any other file.
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
