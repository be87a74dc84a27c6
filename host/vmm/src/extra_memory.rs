//! Memory that the guest can plug while it runs: how much it should have, and through which device.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestAddress;

use crate::{
    bus::Bus,
    virtio::{
        mem::{BLOCK_SIZE, Mem, Plugged},
        slot::SlotError,
    },
};

/// The machine cannot have that much memory.
#[derive(Debug, Error)]
pub enum MemoryRequestError {
    #[error("{bytes} bytes of memory are asked for; this machine can have {least} to {most}")]
    Range { bytes: u64, least: u64, most: u64 },
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// A machine's memory beyond what its guest is started with.
pub struct ExtraMemory {
    /// Bytes that the guest is started with.
    boot: u64,
    extra: Option<Extra>,
}

struct Extra {
    bus: Arc<Bus>,
    slot: u32,
    plugged: Plugged,
    /// Bytes that may be plugged.
    limit: u64,
}

impl ExtraMemory {
    /// None beyond `boot` bytes.
    pub fn none(boot: u64) -> ExtraMemory {
        ExtraMemory { boot, extra: None }
    }

    /// Up to `limit` bytes of a region of guest memory, through a device in a slot that is empty still.
    pub fn new(
        boot: u64,
        limit: u64,
        (start, size): (GuestAddress, usize),
        bus: Arc<Bus>,
        slot: u32,
    ) -> ExtraMemory {
        let plugged = Plugged::new(start, size as u64);
        ExtraMemory { boot, extra: Some(Extra { bus, slot, plugged, limit }) }
    }

    /// Bytes that the guest has.
    pub fn bytes(&self) -> u64 {
        self.boot + self.extra.as_ref().map_or(0, |extra| extra.plugged.bytes())
    }

    /// Bytes that it should have.
    pub fn requested(&self) -> u64 {
        self.boot + self.extra.as_ref().map_or(0, |extra| extra.plugged.requested())
    }

    /// Bytes that it was started with.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// What says when the guest has what it should have. `None`: it always has.
    pub fn plugged(&self) -> Option<&Plugged> {
        self.extra.as_ref().map(|extra| &extra.plugged)
    }

    /// Asks the guest to have that many bytes, rounded up to whole blocks. Answers with the device that has
    /// to be bound for that, if the guest's driver is not at work yet.
    pub fn request(&self, bytes: u64) -> Result<Option<u32>, MemoryRequestError> {
        let limit = self.extra.as_ref().map_or(0, |extra| extra.limit);
        let most = self.boot + limit;
        let range = || MemoryRequestError::Range { bytes, least: self.boot, most };
        let wanted = bytes
            .checked_sub(self.boot)
            .and_then(|wanted| wanted.checked_next_multiple_of(BLOCK_SIZE))
            .filter(|wanted| *wanted <= limit)
            .ok_or_else(range)?;
        let Some(extra) = &self.extra else { return Ok(None) };
        extra.plugged.request(wanted);
        let Some(mut slot) = extra.bus.slot(extra.slot) else { return Ok(None) };
        if slot.is_empty() {
            if wanted == 0 {
                return Ok(None);
            }
            slot.insert(Box::new(Mem::new(extra.plugged.clone())))?;
        } else {
            slot.config_changed();
        }
        Ok((!extra.plugged.is_active()).then_some(extra.slot))
    }
}
