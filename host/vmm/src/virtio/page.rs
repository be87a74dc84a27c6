//! A device's page of guest-physical memory: its registers as the guest reads them.
//!
//! The guest may read this memory and not write it (`KVM_MEM_READONLY`), so that reading a register does not leave the
//! guest, which would cost microseconds on every interrupt. What it writes still arrives at the device.

use std::sync::atomic::Ordering;

use vm_memory::{Address as _, Bytes as _, GuestAddress};

use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES},
    memory::{self, GuestMemory, MemoryError},
};

/// Bytes of a page.
pub const SIZE: usize = 0x1000;
const _: () = assert!(SIZE as u64 == DEVICE_SIZE);

/// Memory for the pages of `count` devices; not to be given to any device as the guest's.
pub fn allocate(count: usize) -> Result<GuestMemory, MemoryError> {
    memory::allocate(&[(GuestAddress(DEVICES), count * SIZE)])
}

/// The page of one device.
#[derive(Clone)]
pub struct Page {
    /// What [`allocate`] has made.
    memory: GuestMemory,
    start: GuestAddress,
}

impl Page {
    /// The page of the device in `slot`.
    pub fn new(memory: GuestMemory, slot: u32) -> Page {
        Page { memory, start: GuestAddress(DEVICES + u64::from(slot) * DEVICE_SIZE) }
    }

    /// What the guest reads in the register at `offset` from now on.
    pub fn set(&self, offset: u64, value: u32) {
        let address = self.start.unchecked_add(offset);
        if let Err(error) = self.memory.store(value.to_le(), address, Ordering::Release) {
            tracing::error!(offset, %error, "a register lies outside its device's page");
        }
    }

    /// What the guest reads from `offset` on; there is room up to the end of the page.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        if let Err(error) = self.memory.write_slice(bytes, self.start.unchecked_add(offset)) {
            tracing::error!(offset, %error, "a configuration space does not fit its device's page");
        }
    }

    #[cfg(test)]
    pub fn get(&self, offset: u64) -> u32 {
        u32::from_le(self.memory.load(self.start.unchecked_add(offset), Ordering::Acquire).unwrap())
    }
}
