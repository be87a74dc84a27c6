//! The guest's buffers as the kernel reads and writes them (`struct iovec`): frames move between guest memory and the
//! tap without a copy in between.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use vm_memory::GuestMemory as _;

use super::FRAME_MAX;
use crate::{memory::GuestMemory, virtio::Chain};

/// Most ranges of memory at a time: what one readv(2) takes (`UIO_MAXIOV`), less one for what does not fit the guest's
/// buffers.
const IOVECS_MAX: usize = 1023;

/// A chain cannot be used. The queue itself is not broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoVecError {
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    #[error("there are too many buffers to move at once")]
    TooMany,
}

/// What one chain has added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedIoVecs {
    /// Number of ranges of memory.
    pub iovecs: usize,
    /// Bytes in them.
    pub length: usize,
}

/// A part of a chain.
#[derive(Clone, Copy)]
pub enum ChainPart {
    /// What the device may read.
    Readable,
    /// What the device may write.
    Writable,
}

/// Ranges of guest memory, in order.
///
/// Each descriptor is read from guest memory and checked exactly once: what the guest does to its descriptors
/// afterwards has no effect here.
pub struct FrameIoVecs {
    memory: GuestMemory,
    /// Each lies inside a mapping of `memory`.
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the ranges point into mappings that `memory` keeps alive and that no thread owns: the guest itself writes to
// them at any time, and nothing here makes a reference to what is in them.
unsafe impl Send for FrameIoVecs {}

impl FrameIoVecs {
    /// No range of memory.
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory, iovecs: Vec::with_capacity(64) }
    }

    /// Removes all ranges.
    pub fn clear(&mut self) {
        self.iovecs.clear();
    }

    /// Removes the first `count` ranges.
    pub fn remove_first(&mut self, count: usize) {
        self.iovecs.drain(..count);
    }

    /// Removes the last `count` ranges.
    pub fn remove_last(&mut self, count: usize) {
        self.iovecs.truncate(self.iovecs.len() - count);
    }

    /// Adds buffers of a chain, until there is room for the largest frame. After an error nothing is added.
    pub fn add(&mut self, chain: Chain<'_>, part: ChainPart) -> Result<AddedIoVecs, IoVecError> {
        let before = self.iovecs.len();
        let added = match part {
            ChainPart::Readable => self.add_descriptors(chain.readable()),
            ChainPart::Writable => self.add_descriptors(chain.writable()),
        };
        added.inspect_err(|_| self.iovecs.truncate(before))
    }

    fn add_descriptors(
        &mut self,
        descriptors: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
    ) -> Result<AddedIoVecs, IoVecError> {
        let mut added = AddedIoVecs { iovecs: 0, length: 0 };
        for descriptor in descriptors.filter(|descriptor| descriptor.len() > 0) {
            if self.iovecs.len() == IOVECS_MAX {
                return Err(IoVecError::TooMany);
            }
            let length = descriptor.len() as usize;
            // Finds the range only if the whole of it lies in one mapping.
            let slice =
                self.memory.get_slice(descriptor.addr(), length).map_err(|_| IoVecError::OutsideMemory)?;
            self.iovecs
                .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
            added.iovecs += 1;
            added.length += length;
            if added.length > FRAME_MAX {
                break;
            }
        }
        Ok(added)
    }

    /// Reads one frame into the guest's buffers, and into `spill` what does not fit. Returns the frame's length.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let spill = libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
        self.iovecs.push(spill);
        // SAFETY: the last range is `spill`, exclusively borrowed until the return and removed below; all others lie
        // inside mappings that `self.memory` keeps. Guest memory may be written at any time, by the guest too, because
        // nothing holds a reference into it.
        let result =
            retry(|| unsafe { libc::readv(fd.as_raw_fd(), self.iovecs.as_ptr(), self.count_for_kernel()) });
        self.iovecs.pop();
        result
    }

    /// Writes all ranges as one frame.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: every range lies inside a mapping that `self.memory` keeps. The guest may change what is in it
        // meanwhile; the kernel copes with that, as with any process whose threads share memory.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), self.iovecs.as_ptr(), self.count_for_kernel()) })
    }

    fn count_for_kernel(&self) -> libc::c_int {
        let Ok(count) = libc::c_int::try_from(self.iovecs.len()) else {
            unreachable!("there are at most {IOVECS_MAX} ranges and the spill")
        };
        count
    }

    /// Overwrites bytes at an offset into the frame. Those beyond its end are left out.
    pub fn overwrite(&self, mut offset: usize, bytes: &[u8]) {
        let mut bytes = bytes.iter();
        for iovec in &self.iovecs {
            while offset < iovec.iov_len {
                let Some(byte) = bytes.next() else { return };
                // SAFETY: the offset is inside the range, and the range inside a mapping that
                // `self.memory` keeps; bytes need no alignment.
                unsafe { iovec.iov_base.cast::<u8>().add(offset).write_volatile(*byte) };
                offset += 1;
            }
            offset -= iovec.iov_len;
        }
    }
}

/// Repeats a system call for as long as signals interrupt it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(length) => return Ok(length),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
