//! A request as it was at one moment.
//!
//! The guest can change its memory while a request in it is served: what is checked would not be what is done. So a
//! request's descriptors and all of it but the data of a WRITE are copied, once, into memory that the guest does not have,
//! and only the copy is checked and served. virtiofsd reads requests from nothing but a virtqueue, so the copy is in one.

use thiserror::Error;
use virtio_queue::{Queue, QueueT as _, desc::split::Descriptor};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    fuse::{InHeader, Opcode},
};
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress, GuestMemory as _};

use super::request::{HEADER, Request, WRITE_HEAD};
use crate::{
    memory::{self, GuestMemory, MemoryError},
    virtio::Chain,
};

/// Where the copies are, far above all of the guest's memory. The guest cannot name it: its own buffers are looked up in its
/// own memory.
const BASE: u64 = 1 << 60;
/// Most buffers of a request and its answer; Linux uses one for each page of data, and some more. A virtqueue's size.
const BUFFERS: u16 = 1024;
const AVAILABLE: u64 = BASE + size_of::<Descriptor>() as u64 * BUFFERS as u64;
/// Index of what is available next, and the one element of the ring that is ever looked at: each chain begins at
/// descriptor 0, and so does a ring of zeros.
const AVAILABLE_INDEX: u64 = AVAILABLE + 2;
const COPY: u64 = AVAILABLE + 0x1000;
/// Most bytes of a request without the data of a WRITE: an extended attribute of 64 KiB, its name, and room to spare.
const COPY_MAX: usize = 128 << 10;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITABLE: u16 = 2;

/// There is no request in a chain, and nowhere to answer that.
#[derive(Debug, Error)]
pub enum StagingError {
    #[error("the guest's request has more than {BUFFERS} buffers")]
    Buffers,
    #[error("a buffer of the guest's request is not in its memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    #[error("the guest's request has {0} bytes, which is no header")]
    NoHeader(usize),
    #[error("the guest's request goes on after the room for its answer")]
    Order,
    #[error("the copy of the guest's request cannot be served")]
    Copy(#[source] virtiofsd::descriptor_utils::Error),
}

#[derive(Clone, Copy)]
struct Buffer {
    address: u64,
    length: u32,
}

/// The request that is being served.
pub struct Staging {
    /// The guest's, and what is staged.
    memory: GuestMemory,
    queue: Queue,
    /// Requests served, as the queue counts them.
    served: u16,
    copy: Vec<u8>,
    /// What is left of a WRITE in the guest's memory: its data.
    data: Vec<Buffer>,
    answer: Vec<Buffer>,
}

impl Staging {
    /// For requests in the guest's memory.
    pub fn new(guest: &GuestMemory) -> Result<Staging, MemoryError> {
        let size = usize::try_from(COPY - BASE).unwrap_or(usize::MAX).saturating_add(COPY_MAX);
        let memory = memory::extend(guest, (GuestAddress(BASE), size))?;
        let layout = |_| MemoryError::Layout { mib: 0 };
        let mut queue = Queue::new(BUFFERS).map_err(layout)?;
        queue.try_set_desc_table_address(GuestAddress(BASE)).map_err(layout)?;
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(layout)?;
        queue.set_ready(true);
        Ok(Staging { memory, queue, served: 0, copy: Vec::new(), data: Vec::new(), answer: Vec::new() })
    }

    /// Copies a request out of the guest's memory.
    pub fn take(&mut self, guest: &GuestMemory, chain: Chain<'_>) -> Result<Request<'_>, StagingError> {
        self.data.clear();
        self.answer.clear();
        let (mut length, mut room) = (0, 0);
        for descriptor in chain {
            // One of them is for the copy.
            if self.data.len() + self.answer.len() + 1 >= BUFFERS.into() {
                return Err(StagingError::Buffers);
            }
            let buffer = Buffer { address: descriptor.addr().0, length: descriptor.len() };
            guest.get_slice(descriptor.addr(), buffer.length as usize).map_err(StagingError::Memory)?;
            if descriptor.is_write_only() {
                self.answer.push(buffer);
                room += buffer.length as usize;
            } else if self.answer.is_empty() {
                self.data.push(buffer);
                length += buffer.length as usize;
            } else {
                return Err(StagingError::Order);
            }
        }
        self.copy.clear();
        self.copy(guest, HEADER)?;
        let mut header = InHeader::default();
        let bytes = self.copy.get(..HEADER).ok_or(StagingError::NoHeader(length))?;
        header.as_mut_slice().copy_from_slice(bytes);
        self.copy(guest, if is_write(&header) { WRITE_HEAD } else { COPY_MAX })?;
        Ok(Request { header, body: &self.copy[HEADER..], length, room })
    }

    /// Copies what is not copied yet of a request's first bytes, as far as there are so many.
    fn copy(&mut self, guest: &GuestMemory, until: usize) -> Result<(), StagingError> {
        for buffer in &mut self.data {
            let start = self.copy.len();
            let taken = (until - start.min(until)).min(buffer.length as usize);
            self.copy.resize(start + taken, 0);
            guest
                .read_slice(&mut self.copy[start..], GuestAddress(buffer.address))
                .map_err(StagingError::Memory)?;
            buffer.address += taken as u64;
            // Not more than the buffer's length was.
            buffer.length -= u32::try_from(taken).unwrap_or(buffer.length);
        }
        self.data.retain(|buffer| buffer.length > 0);
        Ok(())
    }

    /// What virtiofsd reads the request that was taken from, and what it writes its answer to, of at most `room` bytes.
    pub fn serve(&mut self, room: usize) -> Result<(Reader<'_>, Writer<'_>), StagingError> {
        let copy = Buffer { address: COPY, length: u32::try_from(self.copy.len()).unwrap_or(0) };
        self.memory.write_slice(&self.copy, GuestAddress(COPY)).map_err(StagingError::Memory)?;
        let readable = std::iter::once(&copy).chain(&self.data).map(|buffer| (*buffer, 0));
        let writable = self.answer.iter().map(|buffer| (*buffer, DESCRIPTOR_WRITABLE));
        let count = 1 + self.data.len() + self.answer.len();
        for (index, (buffer, flags)) in (0u16..).zip(readable.chain(writable)) {
            let next = index + 1;
            let flags = if usize::from(next) < count { flags | DESCRIPTOR_NEXT } else { flags };
            let descriptor = Descriptor::new(buffer.address, buffer.length, flags, next);
            let address = BASE + u64::from(index) * size_of::<Descriptor>() as u64;
            self.memory
                .write_slice(descriptor.as_slice(), GuestAddress(address))
                .map_err(StagingError::Memory)?;
        }
        self.served = self.served.wrapping_add(1);
        self.memory
            .write_obj(self.served.to_le(), GuestAddress(AVAILABLE_INDEX))
            .map_err(StagingError::Memory)?;
        let invalid = || StagingError::Copy(virtiofsd::descriptor_utils::Error::InvalidChain);
        let chain = self.queue.pop_descriptor_chain(&self.memory).ok_or_else(invalid)?;
        let reader = Reader::new(&self.memory, chain.clone()).map_err(StagingError::Copy)?;
        let mut writer = Writer::new(&self.memory, chain).map_err(StagingError::Copy)?;
        writer.split_at(room.min(writer.available_bytes())).map_err(StagingError::Copy)?;
        Ok((reader, writer))
    }
}

fn is_write(header: &InHeader) -> bool {
    header.opcode == Opcode::Write as u32
}
