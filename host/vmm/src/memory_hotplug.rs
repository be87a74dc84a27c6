//! Memory that the guest can plug while it runs (virtio-mem): how much it should have, and through which device.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestAddress;

use crate::{
    arch::current::layout,
    bus::Bus,
    config::MachineConfig,
    virtio::{
        device_slot::SlotError,
        mem::{BLOCK_SIZE, HotplugState, Mem},
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

/// The region of guest-physical addresses in which memory is plugged.
#[derive(Clone, Copy, Debug)]
pub struct HotplugRegion {
    pub start: GuestAddress,
    /// Size of the region in bytes, which may be more than `limit`.
    pub size: usize,
    /// Bytes that may be plugged, in whole blocks.
    pub limit: u64,
}

impl HotplugRegion {
    /// The region of a machine with this configuration; `None` if it cannot be given any more memory.
    pub fn new(config: &MachineConfig) -> Option<Self> {
        let boot_bytes = config.boot_memory_bytes();
        let limit = config.memory_max_bytes() - boot_bytes;
        let limit = limit - limit % BLOCK_SIZE;
        (limit > 0).then(|| {
            let (start, size) = layout::hotplug_range(boot_bytes, limit);
            Self { start, size, limit }
        })
    }
}

/// Changes how much memory the guest has.
pub struct MemoryHotplug {
    /// Bytes that the guest is started with.
    boot_bytes: u64,
    device: Option<HotplugDevice>,
}

/// The device through which memory is plugged. It is put into its slot with the first request.
struct HotplugDevice {
    bus: Arc<Bus>,
    slot: u32,
    state: HotplugState,
    /// Bytes that may be plugged.
    limit: u64,
}

impl MemoryHotplug {
    /// For a machine that always has `boot_bytes`.
    pub fn disabled(boot_bytes: u64) -> Self {
        Self { boot_bytes, device: None }
    }

    /// For a machine that is started with `boot_bytes`. `slot` must be empty.
    pub fn new(boot_bytes: u64, region: &HotplugRegion, bus: Arc<Bus>, slot: u32) -> Self {
        let state = HotplugState::new(region.start, region.size as u64);
        let device = HotplugDevice { bus, slot, state, limit: region.limit };
        Self { boot_bytes, device: Some(device) }
    }

    /// Bytes that the guest has.
    pub fn bytes(&self) -> u64 {
        self.boot_bytes + self.device.as_ref().map_or(0, |device| device.state.plugged_bytes())
    }

    /// Bytes that the guest should have.
    pub fn requested_bytes(&self) -> u64 {
        self.boot_bytes + self.device.as_ref().map_or(0, |device| device.state.requested_bytes())
    }

    /// Bytes that the guest was started with.
    pub fn boot_bytes(&self) -> u64 {
        self.boot_bytes
    }

    /// What the guest has plugged of what it should plug; `None` if it can plug nothing.
    pub fn state(&self) -> Option<&HotplugState> {
        self.device.as_ref().map(|device| &device.state)
    }

    /// Asks the guest to have this many bytes, rounded up to whole blocks. Returns the slot of the device that the
    /// guest has to bind before it can do so, if its driver does not use the device yet.
    pub fn request(&self, bytes: u64) -> Result<Option<u32>, MemoryRequestError> {
        let limit = self.device.as_ref().map_or(0, |device| device.limit);
        let most = self.boot_bytes + limit;
        let out_of_range = || MemoryRequestError::Range { bytes, least: self.boot_bytes, most };
        let to_plug = bytes
            .checked_sub(self.boot_bytes)
            .and_then(|to_plug| to_plug.checked_next_multiple_of(BLOCK_SIZE))
            .filter(|to_plug| *to_plug <= limit)
            .ok_or_else(out_of_range)?;
        let Some(device) = &self.device else { return Ok(None) };
        device.state.request(to_plug);
        let mut slot = device.bus.slot(device.slot);
        if slot.is_empty() {
            if to_plug == 0 {
                return Ok(None);
            }
            slot.insert(Box::new(Mem::new(device.state.clone())))?;
        } else {
            slot.announce_config_change();
        }
        Ok((!device.state.is_active()).then_some(device.slot))
    }
}
