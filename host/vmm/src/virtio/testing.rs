//! The guest's side of a queue, for the devices' tests: a driver that can also lie.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{ActiveQueue, Interrupt};
use crate::{
    memory::{self, GuestMemory},
    threads::ThreadSpawner,
};

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITABLE: u16 = 2;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Bytes that a ring takes in guest memory.
pub const RING_SIZE: u64 = 0x4000;

/// What starts a device's threads.
pub fn threads() -> ThreadSpawner {
    ThreadSpawner::start().unwrap()
}

/// 16 MiB of guest memory.
pub fn guest_memory() -> GuestMemory {
    memory::allocate(&[(GuestAddress(0), 16 << 20)]).unwrap()
}

/// One descriptor.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// The driver's side of a ring.
pub struct Ring {
    memory: GuestMemory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used_seen: u16,
}

impl Ring {
    /// A ring at `base` (which must not be 0) and the device's side of it.
    pub fn new(memory: &GuestMemory, base: u64, size: u16) -> (Self, ActiveQueue) {
        let mut queue = Queue::new(size).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(base), Some(0));
        queue.set_avail_ring_address(low(base + AVAILABLE), Some(0));
        queue.set_used_ring_address(low(base + USED), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt(Arc::new(event()));
        let ring =
            Self { memory: memory.clone(), base, size, next_descriptor: 0, available: 0, used_seen: 0 };
        (ring, ActiveQueue::new(queue, event(), interrupt))
    }

    /// Makes a chain available, and returns its head.
    pub fn add(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (index, buffer) in chain.iter().enumerate() {
            let descriptor = self.next_descriptor;
            self.next_descriptor = (descriptor + 1) % self.size;
            let mut flags = if buffer.writable { DESCRIPTOR_WRITABLE } else { 0 };
            if index + 1 < chain.len() {
                flags |= DESCRIPTOR_NEXT;
            }
            let at = self.base + u64::from(descriptor) * 16;
            self.memory.write_obj(buffer.address, GuestAddress(at)).unwrap();
            self.memory.write_obj(buffer.length, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(self.next_descriptor, GuestAddress(at + 14)).unwrap();
        }
        self.offer(head);
        head
    }

    /// Makes a head available, even one that does not exist.
    pub fn offer(&mut self, head: u16) {
        let slot = self.base + AVAILABLE + 4 + u64::from(self.available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Claims to have made everything up to `index` available.
    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        self.memory.write_obj(index, GuestAddress(self.base + AVAILABLE + 2)).unwrap();
    }

    /// Takes the next chain that the device has returned: its head and the number of bytes that were written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        if index == self.used_seen {
            return None;
        }
        let slot = self.base + USED + 4 + u64::from(self.used_seen % self.size) * 8;
        self.used_seen = self.used_seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }
}
