//! One request of the guest's (virtio 1.2, section 5.2.6): 16 bytes that say what is wanted, data, and a
//! byte for the answer.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::{
    Counters, SERIAL_SIZE,
    disk::{Disk, SECTOR},
    pieces::{BadBuffers, Pieces},
};
use crate::{memory::GuestMemory, virtio::Chain};

const HEADER_SIZE: usize = 16;
/// Most bytes that one request moves: what fits the limits that the configuration space tells.
pub const REQUEST_MAX: u64 = super::SEGMENTS_MAX as u64 * super::SEGMENT_SIZE_MAX as u64;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Failed,
    Unsupported,
}

impl Answer {
    fn byte(self) -> u8 {
        let status = match self {
            Answer::Done => VIRTIO_BLK_S_OK,
            Answer::Failed => VIRTIO_BLK_S_IOERR,
            Answer::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        // 0, 1 and 2.
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

/// Serves one request; answers with the number of bytes that the device has written to it.
pub fn serve(
    memory: &GuestMemory,
    chain: Chain<'_>,
    disk: &Disk,
    serial: &[u8; SERIAL_SIZE],
    counters: &Counters,
) -> u32 {
    let (readable, mut writable) = match buffers(memory, chain) {
        Ok(buffers) => buffers,
        Err(error) => {
            // Where its answer belongs cannot be told either.
            tracing::debug!(%error, "blk: a request is dropped");
            counters.errors.add(1);
            return 0;
        }
    };
    let Some(status) = writable.take_last_byte() else {
        tracing::debug!("blk: a request without room for its answer is dropped");
        counters.errors.add(1);
        return 0;
    };
    let room = writable.length();
    let answer = perform(readable, writable, disk, serial, counters);
    if answer != Answer::Done {
        counters.errors.add(1);
    }
    status.copy_from(&[answer.byte()]);
    let written = if answer == Answer::Done { room } else { 0 };
    u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX)
}

/// The buffers that the device reads and those that it writes. Each descriptor is read once.
fn buffers<'a>(memory: &'a GuestMemory, chain: Chain<'a>) -> Result<(Pieces<'a>, Pieces<'a>), BadBuffers> {
    let (mut readable, mut writable) = (Pieces::new(), Pieces::new());
    for descriptor in chain {
        let pieces = if descriptor.is_write_only() { &mut writable } else { &mut readable };
        pieces.add(memory, descriptor.addr(), descriptor.len())?;
    }
    Ok((readable, writable))
}

/// Does what is wanted. `readable` begins with the header and goes on with data to be written; `writable`
/// is the room for data that is read.
fn perform(
    mut readable: Pieces<'_>,
    writable: Pieces<'_>,
    disk: &Disk,
    serial: &[u8; SERIAL_SIZE],
    counters: &Counters,
) -> Answer {
    let mut header = [0; HEADER_SIZE];
    if readable.take_first(HEADER_SIZE as u64).copy_to(&mut header) < HEADER_SIZE {
        return Answer::Failed;
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let length = writable.length();
            let Some(offset) = offset(disk, sector, length) else { return Answer::Failed };
            counters.reads.add(1);
            counters.read_bytes.add(length);
            answer("read", disk.read(offset, writable))
        }
        VIRTIO_BLK_T_OUT if !disk.read_only() => {
            let length = readable.length();
            let Some(offset) = offset(disk, sector, length) else { return Answer::Failed };
            counters.writes.add(1);
            counters.write_bytes.add(length);
            answer("written", disk.write(offset, readable))
        }
        VIRTIO_BLK_T_OUT => Answer::Failed,
        VIRTIO_BLK_T_FLUSH if !disk.read_only() => {
            counters.flushes.add(1);
            answer("flushed", disk.flush())
        }
        VIRTIO_BLK_T_GET_ID => {
            if writable.length() < SERIAL_SIZE as u64 {
                return Answer::Failed;
            }
            writable.copy_from(serial);
            Answer::Done
        }
        _ => Answer::Unsupported,
    }
}

/// Where a request begins on the disk, if all of it is there.
fn offset(disk: &Disk, sector: u64, length: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let inside = offset.checked_add(length)? <= disk.size();
    (inside && length.is_multiple_of(SECTOR) && length <= REQUEST_MAX).then_some(offset)
}

fn answer(what: &str, result: std::io::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(error) => {
            tracing::warn!(%error, "blk: something cannot be {what}; the guest gets an error");
            Answer::Failed
        }
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
