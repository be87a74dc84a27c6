//! A request's data as the kernel reads and writes it: ranges of guest memory (`struct iovec`), from and to which it is
//! moved without a copy in between.

use std::{fs::File, io, marker::PhantomData, os::fd::AsRawFd as _};

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::memory::{GuestMemory, to_usize};

/// Most ranges of a request. preadv(2) takes 1024 at a time.
pub const IOVECS_MAX: usize = 256;

/// A request's buffers cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoVecError {
    #[error("a buffer lies outside guest memory")]
    OutsideMemory,
    #[error("there are more than {IOVECS_MAX} buffers")]
    TooMany,
}

/// Ranges of guest memory, in order. None of them is empty.
pub struct IoVecs<'a> {
    /// Each lies inside a mapping of the guest memory that is borrowed for `'a`.
    iovecs: Vec<libc::iovec>,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> IoVecs<'a> {
    /// No range of memory.
    pub fn new() -> Self {
        IoVecs { iovecs: Vec::new(), memory: PhantomData }
    }

    /// Adds a buffer of the guest at the end, after checking that all of it is in `memory`.
    pub fn add(
        &mut self,
        memory: &'a GuestMemory,
        address: GuestAddress,
        length: u32,
    ) -> Result<(), IoVecError> {
        if length == 0 {
            return Ok(());
        }
        if self.iovecs.len() == IOVECS_MAX {
            return Err(IoVecError::TooMany);
        }
        let length = length as usize;
        // Finds the range only if the whole of it lies in one mapping.
        let slice = memory.get_slice(address, length).map_err(|_| IoVecError::OutsideMemory)?;
        self.iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
        Ok(())
    }

    /// Bytes in all ranges.
    pub fn length(&self) -> u64 {
        self.iovecs.iter().map(|iovec| iovec.iov_len as u64).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.iovecs.is_empty()
    }

    /// Removes the first `length` bytes, or all if there are fewer, and returns them.
    pub fn take_first(&mut self, length: u64) -> Self {
        let mut left = to_usize(length);
        let mut taken = IoVecs::new();
        let mut whole = 0;
        for iovec in &mut self.iovecs {
            if left == 0 {
                break;
            }
            let part = iovec.iov_len.min(left);
            taken.iovecs.push(libc::iovec { iov_base: iovec.iov_base, iov_len: part });
            left -= part;
            if part == iovec.iov_len {
                whole += 1;
            } else {
                advance(iovec, part);
            }
        }
        self.iovecs.drain(..whole);
        taken
    }

    /// Removes the last byte, if there is one, and returns it.
    pub fn take_last_byte(&mut self) -> Option<Self> {
        let before = self.length().checked_sub(1)?;
        let first = self.take_first(before);
        Some(std::mem::replace(self, first))
    }

    /// Copies the data to `bytes`, as much as fits. Returns the number of bytes.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for iovec in &self.iovecs {
            let room = bytes.get_mut(copied..).unwrap_or_default();
            let length = iovec.iov_len.min(room.len());
            // SAFETY: the range lies in a mapping that outlives `'a`, and `room` is borrowed exclusively; they do
            // not overlap. The guest may change the bytes meanwhile: they are copied as they come, and
            // nothing holds a reference to them.
            unsafe { std::ptr::copy_nonoverlapping(iovec.iov_base.cast::<u8>(), room.as_mut_ptr(), length) };
            copied += length;
        }
        copied
    }

    /// Copies `bytes` into guest memory, as many as fit.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        for iovec in &self.iovecs {
            let (now, later) = bytes.split_at(iovec.iov_len.min(bytes.len()));
            // SAFETY: as in `copy_to`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), iovec.iov_base.cast::<u8>(), now.len()) };
            bytes = later;
        }
    }

    /// Fills guest memory with zeroes.
    pub fn fill_with_zeroes(&self) {
        for iovec in &self.iovecs {
            // SAFETY: the range lies in a mapping that outlives `'a`, of memory to which nothing holds a
            // reference.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, iovec.iov_len) };
        }
    }

    /// Fills guest memory from a file. Fails if the file ends before.
    pub fn read_exact_at(&mut self, file: &File, offset: u64) -> io::Result<()> {
        self.move_all(offset, |iovecs, count, offset| {
            // SAFETY: every range lies in a mapping that outlives `'a`. Guest memory may be written at
            // any time, because nothing holds a reference into it.
            unsafe { libc::preadv(file.as_raw_fd(), iovecs, count, offset) }
        })
    }

    /// Writes all data to a file.
    pub fn write_all_at(&mut self, file: &File, offset: u64) -> io::Result<()> {
        self.move_all(offset, |iovecs, count, offset| {
            // SAFETY: every range lies in a mapping that outlives `'a`. The guest may change what is in it meanwhile;
            // the kernel copes with that, as with any process whose threads share memory.
            unsafe { libc::pwritev(file.as_raw_fd(), iovecs, count, offset) }
        })
    }

    /// Calls `call` until it has moved all data, from `offset` of a file on.
    fn move_all(
        &mut self,
        mut offset: u64,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<()> {
        while !self.is_empty() {
            let Ok(count) = libc::c_int::try_from(self.iovecs.len()) else {
                unreachable!("a request has at most {IOVECS_MAX} ranges of memory")
            };
            // `Disk::open` has checked that all offsets of a disk are an `off_t`.
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            match u64::try_from(call(self.iovecs.as_ptr(), count, at)) {
                // The file has become shorter than it was when it was opened.
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

fn advance(iovec: &mut libc::iovec, by: usize) {
    iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(by).cast();
    iovec.iov_len -= by;
}
