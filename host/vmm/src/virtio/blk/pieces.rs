//! A request's data as the kernel reads and writes it: pieces of guest memory, moved to and from files
//! without a copy in between.

use std::{fs::File, io, marker::PhantomData, os::fd::AsRawFd as _};

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::memory::GuestMemory;

/// Most pieces of a request. `preadv(2)` takes 1024 at a time.
pub const PIECES_MAX: usize = 256;

/// A request's buffers cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadBuffers {
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    #[error("there are more than {PIECES_MAX} buffers")]
    TooMany,
}

/// Pieces of guest memory, in order. None of them is empty.
pub struct Pieces<'a> {
    /// Every one lies inside a mapping of the guest memory that is borrowed for `'a`.
    pieces: Vec<libc::iovec>,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> Pieces<'a> {
    /// Without any piece.
    pub fn new() -> Pieces<'a> {
        Pieces { pieces: Vec::new(), memory: PhantomData }
    }

    /// Adds a buffer of the guest's, after checking that all of it is in `memory`.
    pub fn add(
        &mut self,
        memory: &'a GuestMemory,
        address: GuestAddress,
        length: u32,
    ) -> Result<(), BadBuffers> {
        if length == 0 {
            return Ok(());
        }
        if self.pieces.len() == PIECES_MAX {
            return Err(BadBuffers::TooMany);
        }
        let length = length as usize;
        // Finds the range only if the whole of it lies in one mapping.
        let slice = memory.get_slice(address, length).map_err(|_| BadBuffers::OutsideMemory)?;
        self.pieces.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
        Ok(())
    }

    /// Bytes in all pieces.
    pub fn length(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.iov_len as u64).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Takes the first `length` bytes away, or all if there are fewer.
    pub fn take_first(&mut self, length: u64) -> Pieces<'a> {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        let mut taken = Pieces::new();
        let mut whole = 0;
        for piece in &mut self.pieces {
            if left == 0 {
                break;
            }
            let part = piece.iov_len.min(left);
            taken.pieces.push(libc::iovec { iov_base: piece.iov_base, iov_len: part });
            left -= part;
            if part == piece.iov_len {
                whole += 1;
            } else {
                advance(piece, part);
            }
        }
        self.pieces.drain(..whole);
        taken
    }

    /// Takes the last byte away, if there is one.
    pub fn take_last_byte(&mut self) -> Option<Pieces<'a>> {
        let before = self.length().checked_sub(1)?;
        let first = self.take_first(before);
        Some(std::mem::replace(self, first))
    }

    /// Copies the pieces out, as far as there is room.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for piece in &self.pieces {
            let room = bytes.get_mut(copied..).unwrap_or_default();
            let length = piece.iov_len.min(room.len());
            // SAFETY: the piece lies in a mapping that outlives `'a`, and `room` is ours alone; they do
            // not overlap. The guest may change the bytes meanwhile: they are copied as they come, and
            // nothing holds a reference to them.
            unsafe { std::ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), room.as_mut_ptr(), length) };
            copied += length;
        }
        copied
    }

    /// Copies bytes into the pieces, as far as there is room.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        for piece in &self.pieces {
            let (now, later) = bytes.split_at(piece.iov_len.min(bytes.len()));
            // SAFETY: as in `copy_to`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.iov_base.cast::<u8>(), now.len()) };
            bytes = later;
        }
    }

    /// Fills all pieces with zeroes.
    pub fn fill_with_zeroes(&self) {
        for piece in &self.pieces {
            // SAFETY: the piece lies in a mapping that outlives `'a`, of memory to which nothing holds a
            // reference.
            unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
        }
    }

    /// Fills all pieces from a file.
    pub fn read_exact_at(&mut self, file: &File, offset: u64) -> io::Result<()> {
        self.move_all(offset, |pieces, count, offset| {
            // SAFETY: every piece lies in a mapping that outlives `'a`. Guest memory may be written at
            // any time, because nothing holds a reference into it.
            unsafe { libc::preadv(file.as_raw_fd(), pieces, count, offset) }
        })
    }

    /// Writes all pieces to a file.
    pub fn write_all_at(&mut self, file: &File, offset: u64) -> io::Result<()> {
        self.move_all(offset, |pieces, count, offset| {
            // SAFETY: every piece lies in a mapping that outlives `'a`. That the guest may change what is
            // in it meanwhile is for the kernel to cope with, as it does for any process's memory.
            unsafe { libc::pwritev(file.as_raw_fd(), pieces, count, offset) }
        })
    }

    fn move_all(
        &mut self,
        mut offset: u64,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<()> {
        while !self.is_empty() {
            // At most PIECES_MAX; a disk's offsets are checked to be off_t when it is made.
            let count = libc::c_int::try_from(self.pieces.len()).unwrap_or(libc::c_int::MAX);
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            match u64::try_from(call(self.pieces.as_ptr(), count, at)) {
                // The file has become shorter.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    self.take_first(moved);
                    offset += moved;
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }
}

fn advance(piece: &mut libc::iovec, by: usize) {
    piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(by).cast();
    piece.iov_len -= by;
}
