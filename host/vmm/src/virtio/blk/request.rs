//! Requests of the guest (virtio 1.2, section 5.2.6). Each is a header of 16 bytes, data, and a byte for the status.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::{
    Counters, SERIAL_SIZE,
    disk::{Disk, SECTOR},
    iovecs::{IoVecError, IoVecs},
};
use crate::{memory::GuestMemory, virtio::Chain};

const HEADER_SIZE: usize = 16;
/// Most bytes that one request moves: what the limits in the configuration space allow.
pub const REQUEST_MAX: u64 = super::SEGMENTS_MAX as u64 * super::SEGMENT_SIZE_MAX as u64;

/// The status of a request, in its last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(clippy::cast_possible_truncation, reason = "the numbers are 0, 1 and 2")]
pub enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What has come of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Bytes that the device has written to the request's buffers.
    pub written: u32,
    /// Bytes of the disk that were to be read or written, if the request was one that can be executed.
    pub moved: u64,
}

/// Serves one request.
pub fn serve(
    memory: &GuestMemory,
    chain: Chain<'_>,
    disk: &Disk,
    serial: &[u8; SERIAL_SIZE],
    counters: &Counters,
) -> Served {
    let (readable, mut writable) = match buffers(memory, chain) {
        Ok(buffers) => buffers,
        Err(error) => {
            // It is not known either where the request's status belongs.
            tracing::debug!(%error, "blk: a request is dropped");
            counters.errors.add(1);
            return Served::default();
        }
    };
    let Some(status_byte) = writable.take_last_byte() else {
        tracing::debug!("blk: a request without room for its status is dropped");
        counters.errors.add(1);
        return Served::default();
    };
    let room = writable.length();
    let (status, moved) = execute(readable, writable, disk, serial, counters);
    if status != Status::Ok {
        counters.errors.add(1);
    }
    status_byte.copy_from(&[status as u8]);
    let written = if status == Status::Ok { room } else { 0 };
    // The guest decides how much room there is. A number that is too large for the used ring saturates.
    Served { written: u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX), moved }
}

/// The buffers that the device reads and those that it writes. Each descriptor is read once.
fn buffers<'a>(memory: &'a GuestMemory, chain: Chain<'a>) -> Result<(IoVecs<'a>, IoVecs<'a>), IoVecError> {
    let (mut readable, mut writable) = (IoVecs::new(), IoVecs::new());
    for descriptor in chain {
        let iovecs = if descriptor.is_write_only() { &mut writable } else { &mut readable };
        iovecs.add(memory, descriptor.addr(), descriptor.len())?;
    }
    Ok((readable, writable))
}

/// Executes a request. `readable` is the header, followed by the data to be written; `writable` is the room for data
/// that is read. Returns the status, and how many bytes were to be moved.
fn execute(
    mut readable: IoVecs<'_>,
    writable: IoVecs<'_>,
    disk: &Disk,
    serial: &[u8; SERIAL_SIZE],
    counters: &Counters,
) -> (Status, u64) {
    let mut header = [0; HEADER_SIZE];
    if readable.take_first(HEADER_SIZE as u64).copy_to(&mut header) < HEADER_SIZE {
        return (Status::IoError, 0);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let status = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let length = writable.length();
            let Some(offset) = offset(disk, sector, length) else { return (Status::IoError, 0) };
            counters.reads.add(1);
            counters.read_bytes.add(length);
            return (status_of("read", disk.read(offset, writable)), length);
        }
        VIRTIO_BLK_T_OUT if !disk.is_read_only() => {
            let length = readable.length();
            let Some(offset) = offset(disk, sector, length) else { return (Status::IoError, 0) };
            counters.writes.add(1);
            counters.write_bytes.add(length);
            return (status_of("written", disk.write(offset, readable)), length);
        }
        VIRTIO_BLK_T_OUT => Status::IoError,
        VIRTIO_BLK_T_FLUSH if !disk.is_read_only() => {
            counters.flushes.add(1);
            status_of("flushed", disk.flush())
        }
        VIRTIO_BLK_T_GET_ID if writable.length() < SERIAL_SIZE as u64 => Status::IoError,
        VIRTIO_BLK_T_GET_ID => {
            writable.copy_from(serial);
            Status::Ok
        }
        _ => Status::Unsupported,
    };
    (status, 0)
}

/// The offset in bytes at which a request begins on the disk. `None` if a part of it is beyond the end, if it is not in
/// whole sectors, or if it is too long.
fn offset(disk: &Disk, sector: u64, length: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let inside = offset.checked_add(length)? <= disk.size();
    (inside && length.is_multiple_of(SECTOR) && length <= REQUEST_MAX).then_some(offset)
}

/// The status for an operation's result. `what` is the operation, in its past participle.
fn status_of(what: &str, result: std::io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            tracing::warn!(%error, "blk: something cannot be {what}; the guest sees an I/O error");
            Status::IoError
        }
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
