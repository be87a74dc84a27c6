//! A device's page of guest-physical memory: its registers as the guest reads them.
//!
//! The guest may read this memory but not write it (`KVM_MEM_READONLY`). So a read of a register does not leave the
//! guest, which would cost microseconds on every interrupt. A write does, and arrives at the device.

use std::sync::atomic::Ordering;

use vm_memory::{Address as _, Bytes as _, GuestAddress};

use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES},
    memory::{self, GuestMemory, MemoryError},
};

/// Size of a page in bytes.
pub const SIZE: usize = 0x1000;
const _: () = assert!(SIZE as u64 == DEVICE_SIZE);

/// Maps memory for the pages of `count` devices. No device may use it as the guest's memory.
pub fn allocate(count: usize) -> Result<GuestMemory, MemoryError> {
    memory::allocate(&[(GuestAddress(DEVICES), count * SIZE)])
}

/// The page of one device.
#[derive(Clone)]
pub struct RegisterPage {
    /// The memory of all pages, made by [`allocate`].
    memory: GuestMemory,
    start: GuestAddress,
}

impl RegisterPage {
    /// The page of the device in `slot`.
    pub fn new(memory: GuestMemory, slot: u32) -> Self {
        Self { memory, start: GuestAddress(DEVICES + u64::from(slot) * DEVICE_SIZE) }
    }

    /// Sets what the guest reads in the register at `offset`. Panics if that is not in the page.
    pub fn set(&self, offset: u64, value: u32) {
        let address = self.start.unchecked_add(offset);
        if let Err(error) = self.memory.store(value.to_le(), address, Ordering::Release) {
            unreachable!("the register at {offset:#x} lies outside its device's page: {error}");
        }
    }

    /// Sets the bytes that the guest reads from `offset` on. Panics if they do not fit the page.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        if let Err(error) = self.memory.write_slice(bytes, self.start.unchecked_add(offset)) {
            let length = bytes.len();
            unreachable!("{length} bytes at {offset:#x} do not fit their device's page: {error}");
        }
    }

    #[cfg(test)]
    pub fn get(&self, offset: u64) -> u32 {
        u32::from_le(self.memory.load(self.start.unchecked_add(offset), Ordering::Acquire).unwrap())
    }
}
