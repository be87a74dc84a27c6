//! The guest's buffers as the kernel reads and writes them: frames move between guest memory and the
//! tap without a copy in between.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use vm_memory::GuestMemory as _;

use super::FRAME_MAX;
use crate::{memory::GuestMemory, virtio::Chain};

/// Most pieces at a time: what one `readv(2)` takes (`UIO_MAXIOV`), less one for what does not fit.
const PIECES_MAX: usize = 1023;

/// Why a chain cannot be used. The queue itself is in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    #[error("there are too many buffers to move at once")]
    TooManyPieces,
}

/// How much one chain has added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Number of pieces.
    pub pieces: usize,
    /// Bytes in them.
    pub length: usize,
}

/// Which part of a chain is meant.
#[derive(Clone, Copy)]
pub enum Part {
    /// What the guest has written.
    Readable,
    /// What the device may write.
    Writable,
}

/// Pieces of guest memory, in order.
///
/// Each descriptor is read from guest memory and checked exactly once; what the guest does to its
/// descriptors afterwards changes nothing here.
pub struct Buffers {
    memory: GuestMemory,
    /// Every one lies inside a mapping of `memory`.
    pieces: Vec<libc::iovec>,
}

// SAFETY: the pieces point into mappings that `memory` keeps alive and that no thread owns: the guest
// itself writes to them at any time, and nothing here makes a reference to what they hold.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Without any piece.
    pub fn new(memory: GuestMemory) -> Buffers {
        Buffers { memory, pieces: Vec::with_capacity(64) }
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }

    /// Forgets the first `count` pieces.
    pub fn remove_first(&mut self, count: usize) {
        self.pieces.drain(..count.min(self.pieces.len()));
    }

    /// Forgets the last `count` pieces.
    pub fn remove_last(&mut self, count: usize) {
        self.pieces.truncate(self.pieces.len().saturating_sub(count));
    }

    /// Adds a chain's buffers, until there is room for the largest frame. Adds nothing on an error.
    pub fn add(&mut self, chain: Chain<'_>, part: Part) -> Result<Added, BadChain> {
        let before = self.pieces.len();
        let added = match part {
            Part::Readable => self.add_pieces(chain.readable()),
            Part::Writable => self.add_pieces(chain.writable()),
        };
        added.inspect_err(|_| self.pieces.truncate(before))
    }

    fn add_pieces(
        &mut self,
        descriptors: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
    ) -> Result<Added, BadChain> {
        let mut added = Added { pieces: 0, length: 0 };
        for descriptor in descriptors.filter(|descriptor| descriptor.len() > 0) {
            if self.pieces.len() == PIECES_MAX {
                return Err(BadChain::TooManyPieces);
            }
            let length = descriptor.len() as usize;
            // Finds the range only if the whole of it lies in one mapping.
            let slice =
                self.memory.get_slice(descriptor.addr(), length).map_err(|_| BadChain::OutsideMemory)?;
            self.pieces
                .push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
            added.pieces += 1;
            added.length += length;
            if added.length > FRAME_MAX {
                break;
            }
        }
        Ok(added)
    }

    /// Reads one frame into the pieces, and into `spill` what does not fit. Answers with the frame's
    /// length.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let spill = libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
        self.pieces.push(spill);
        // SAFETY: the last piece is `spill`, exclusively borrowed until the return and removed below;
        // all others lie inside mappings that `self.memory` keeps. Guest memory may be written at any
        // time, by the guest too, because nothing holds a reference into it.
        let result =
            retry(|| unsafe { libc::readv(fd.as_raw_fd(), self.pieces.as_ptr(), self.count_for_kernel()) });
        self.pieces.pop();
        result
    }

    /// Writes the pieces as one frame.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: every piece lies inside a mapping that `self.memory` keeps. That the guest may change
        // what is in it meanwhile is for the kernel to cope with, as it does for any process's memory.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), self.pieces.as_ptr(), self.count_for_kernel()) })
    }

    /// At most `PIECES_MAX` + 1.
    fn count_for_kernel(&self) -> libc::c_int {
        libc::c_int::try_from(self.pieces.len()).unwrap_or(libc::c_int::MAX)
    }

    /// Overwrites bytes at an offset into all pieces; what lies beyond their end is left out.
    pub fn overwrite(&self, mut offset: usize, bytes: &[u8]) {
        let mut bytes = bytes.iter();
        for piece in &self.pieces {
            while offset < piece.iov_len {
                let Some(byte) = bytes.next() else { return };
                // SAFETY: the offset is inside the piece, and the piece inside a mapping that
                // `self.memory` keeps; bytes need no alignment.
                unsafe { piece.iov_base.cast::<u8>().add(offset).write_volatile(*byte) };
                offset += 1;
            }
            offset -= piece.iov_len;
        }
    }
}

/// Calls again what a signal has interrupted.
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
