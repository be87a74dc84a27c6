//! A copy of the request that is being served.
//!
//! The guest can change its memory while a request in it is served, so that what is checked would not be what is
//! executed. Therefore a request's descriptors, and all of it except the data of a WRITE, are copied once into memory
//! that the guest cannot reach, and only the copy is checked and served. virtiofsd reads requests only from virtqueues,
//! so the copy is in one.

use thiserror::Error;
use virtio_queue::{Queue, QueueT as _, desc::split::Descriptor};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    fuse::{InHeader, Opcode},
};
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress, GuestMemory as _};

use super::request::{REQUEST_HEADER_SIZE, Request, WRITE_HEADER_SIZE};
use crate::{
    memory::{self, GuestMemory, MemoryError},
    virtio::Chain,
};

/// The address of the memory for copies, far above all of the guest's memory. The guest cannot reach it, because its
/// buffers are looked up in its own memory.
const BASE: u64 = 1 << 60;
/// Most buffers of a request and its reply: the size of a virtqueue. Linux uses one for each page of data, and a few
/// more.
const BUFFERS_MAX: u16 = 1024;
/// The available ring, behind the descriptors.
const AVAILABLE: u64 = BASE + size_of::<Descriptor>() as u64 * BUFFERS_MAX as u64;
/// The ring's index, which is all of the ring that is ever written: each chain begins at descriptor 0, as the ring's
/// elements say, which are zeroes.
const AVAILABLE_INDEX: u64 = AVAILABLE + 2;
/// The copy of a request, behind the ring.
const COPY: u64 = AVAILABLE + 0x1000;
/// Most bytes of a request without the data of a WRITE: an extended attribute of 64 KiB, its name, and more than the
/// rest.
const COPY_MAX: usize = 128 << 10;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITABLE: u16 = 2;

/// A chain contains no request, so that there is no reply either.
#[derive(Debug, Error)]
pub enum StagingError {
    #[error("the guest's request has more than {BUFFERS_MAX} buffers")]
    Buffers,
    #[error("a buffer of the guest's request is not in its memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    #[error("the guest's request has {0} bytes, which is less than a header")]
    NoHeader(usize),
    #[error("the guest's request continues behind the room for its reply")]
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
    /// The guest's memory, and that for copies.
    memory: GuestMemory,
    queue: Queue,
    /// Requests served, modulo 2¹⁶: the ring's index.
    served: u16,
    /// The bytes of the request that are copied.
    copy: Vec<u8>,
    /// The rest of the request in guest memory: the data of a WRITE.
    data: Vec<Buffer>,
    /// The room for the reply in guest memory.
    reply: Vec<Buffer>,
}

impl Staging {
    /// For requests in the memory of `guest`. Fails if memory for the copies cannot be mapped.
    pub fn new(guest: &GuestMemory) -> Result<Self, MemoryError> {
        let size = memory::to_usize(COPY - BASE) + COPY_MAX;
        let memory = memory::extend(guest, (GuestAddress(BASE), size))?;
        let layout = |_| MemoryError::Layout { mib: 0 };
        let mut queue = Queue::new(BUFFERS_MAX).map_err(layout)?;
        queue.try_set_desc_table_address(GuestAddress(BASE)).map_err(layout)?;
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(layout)?;
        queue.set_ready(true);
        Ok(Self { memory, queue, served: 0, copy: Vec::new(), data: Vec::new(), reply: Vec::new() })
    }

    /// Copies the request in a chain out of guest memory.
    pub fn copy_request(
        &mut self,
        guest: &GuestMemory,
        chain: Chain<'_>,
    ) -> Result<Request<'_>, StagingError> {
        self.data.clear();
        self.reply.clear();
        let (mut length, mut room) = (0, 0);
        for descriptor in chain {
            // One buffer is for the copy.
            if self.data.len() + self.reply.len() + 1 >= BUFFERS_MAX.into() {
                return Err(StagingError::Buffers);
            }
            let buffer = Buffer { address: descriptor.addr().0, length: descriptor.len() };
            guest.get_slice(descriptor.addr(), buffer.length as usize).map_err(StagingError::Memory)?;
            if descriptor.is_write_only() {
                self.reply.push(buffer);
                room += buffer.length as usize;
            } else if self.reply.is_empty() {
                self.data.push(buffer);
                length += buffer.length as usize;
            } else {
                return Err(StagingError::Order);
            }
        }
        self.copy.clear();
        self.copy_up_to(guest, REQUEST_HEADER_SIZE)?;
        let mut header = InHeader::default();
        let bytes = self.copy.get(..REQUEST_HEADER_SIZE).ok_or(StagingError::NoHeader(length))?;
        header.as_mut_slice().copy_from_slice(bytes);
        self.copy_up_to(guest, if is_write(&header) { WRITE_HEADER_SIZE } else { COPY_MAX })?;
        Ok(Request { header, body: &self.copy[REQUEST_HEADER_SIZE..], length, room })
    }

    /// Continues the copy of the request until it has `end` bytes, or all of them. The others stay in `data`.
    fn copy_up_to(&mut self, guest: &GuestMemory, end: usize) -> Result<(), StagingError> {
        for buffer in &mut self.data {
            let start = self.copy.len();
            let length = (end - start.min(end)).min(buffer.length as usize);
            self.copy.resize(start + length, 0);
            guest
                .read_slice(&mut self.copy[start..], GuestAddress(buffer.address))
                .map_err(StagingError::Memory)?;
            let Ok(length) = u32::try_from(length) else { unreachable!("a buffer's length has 32 bits") };
            buffer.address += u64::from(length);
            buffer.length -= length;
        }
        self.data.retain(|buffer| buffer.length > 0);
        Ok(())
    }

    /// What virtiofsd reads the copied request from, and what it writes its reply to, of at most `room` bytes.
    pub fn reader_and_writer(&mut self, room: usize) -> Result<(Reader<'_>, Writer<'_>), StagingError> {
        let Ok(length) = u32::try_from(self.copy.len()) else {
            unreachable!("a copy has at most {COPY_MAX} bytes")
        };
        let copy = Buffer { address: COPY, length };
        self.memory.write_slice(&self.copy, GuestAddress(COPY)).map_err(StagingError::Memory)?;
        let readable = std::iter::once(&copy).chain(&self.data).map(|buffer| (*buffer, 0));
        let writable = self.reply.iter().map(|buffer| (*buffer, DESCRIPTOR_WRITABLE));
        let count = 1 + self.data.len() + self.reply.len();
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
