//! virtio-mem (virtio 1.2, section 5.15): memory that the guest plugs and unplugs, block by block, until it has what
//! was requested of it.
//!
//! The device has no thread: the vCPU that makes a request serves it, which is short. Trust: the guest chooses which
//! blocks it plugs and when, or never; it cannot plug more than was requested ([`blocks`]). It can use memory of the
//! region that it has not plugged, up to the region's limit: what really limits a machine is its pod's cgroup.

mod blocks;

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::mm::{Advice, madvise};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use self::blocks::{BlockState, Blocks, Refusal};
use super::{
    ActivateError, Activation, ActiveQueue, Chain, Counter, Device, F_EVENT_IDX, all_queues, device_type,
    read_config_bytes,
};
use crate::{
    lock::unpoisoned,
    memory::{self, GuestMemory},
};

/// Bytes of a block, the unit in which memory is plugged. Linux has page blocks of this size as well.
pub const BLOCK_SIZE: u64 = 2 << 20;

const QUEUE_SIZE: u16 = 16;
/// Most requests served for one notification. Linux makes one at a time.
const BATCH: usize = QUEUE_SIZE as usize;
const CONFIG_SIZE: usize = 56;
const REQUEST_SIZE: usize = 24;
const RESPONSE_SIZE: u32 = 10;

// Types of requests and responses (`VIRTIO_MEM_REQ_*` and `VIRTIO_MEM_RESP_*`, virtio 1.2, section 5.15.6).
const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

const RESPONSE_ACK: u16 = 0;
const RESPONSE_NACK: u16 = 1;
const RESPONSE_ERROR: u16 = 3;

/// The guest has not plugged what was requested of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitError {
    /// The time is up.
    TimedOut { plugged_bytes: u64 },
    /// Another size has been requested meanwhile.
    Superseded,
}

/// How much memory of a region is plugged, and how much should be. The device and whoever makes requests share it.
#[derive(Clone)]
pub struct HotplugState(Arc<Shared>);

struct Shared {
    start: u64,
    size: u64,
    /// Bytes, as in `blocks`: whoever only reads them does not wait for a guest that keeps the lock busy.
    requested_bytes: AtomicU64,
    plugged_bytes: AtomicU64,
    blocks: Mutex<Blocks>,
    /// Notified when the requested or the plugged size has changed.
    changed: Condvar,
    active: AtomicBool,
}

impl HotplugState {
    /// For a region of guest memory, in bytes, of which nothing is plugged yet.
    pub fn new(start: GuestAddress, size: u64) -> Self {
        Self(Arc::new(Shared {
            start: start.0,
            size,
            requested_bytes: AtomicU64::new(0),
            plugged_bytes: AtomicU64::new(0),
            blocks: Mutex::new(Blocks::new(start.0, size)),
            changed: Condvar::new(),
            active: AtomicBool::new(false),
        }))
    }

    /// Requests that the guest plug this many bytes, in whole blocks. The caller has to announce the change of the
    /// device's configuration to the guest.
    pub fn request(&self, bytes: u64) {
        let mut blocks = self.blocks();
        blocks.requested = bytes;
        self.0.requested_bytes.store(bytes, Ordering::Relaxed);
        drop(blocks);
        self.0.changed.notify_all();
    }

    /// Bytes that the guest should have plugged.
    pub fn requested_bytes(&self) -> u64 {
        self.0.requested_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that the guest has plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.0.plugged_bytes.load(Ordering::Relaxed)
    }

    /// Whether the guest's driver has activated the device.
    pub fn is_active(&self) -> bool {
        self.0.active.load(Ordering::Acquire)
    }

    /// Waits at most `limit` until the guest has plugged what is requested. Returns the bytes that it has plugged.
    pub fn wait_for_request(&self, limit: Duration) -> Result<u64, WaitError> {
        let blocks = self.blocks();
        let requested = blocks.requested;
        let is_unfinished =
            |blocks: &mut Blocks| blocks.requested == requested && blocks.plugged() != requested;
        let waited = self.0.changed.wait_timeout_while(blocks, limit, is_unfinished);
        let (blocks, _) = unpoisoned(waited);
        match blocks.plugged() {
            _ if blocks.requested != requested => Err(WaitError::Superseded),
            plugged if plugged == requested => Ok(plugged),
            plugged_bytes => Err(WaitError::TimedOut { plugged_bytes }),
        }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        unpoisoned(self.0.blocks.lock())
    }
}

/// The memory device.
pub struct Mem {
    state: HotplugState,
    active: Option<(GuestMemory, ActiveQueue)>,
    requests: Counter,
}

impl Mem {
    /// A device through which a guest plugs memory of the state's region.
    pub fn new(state: HotplugState) -> Self {
        Self { state, active: None, requests: Counter::default() }
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let Some((memory, queue)) = &mut self.active else { return Ok(()) };
        queue.queue.disable_notification(&*memory)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(memory)? else { break };
            self.requests.add(1);
            let head = chain.head_index();
            let written = serve_request(memory, chain, &self.state);
            queue.add_used(memory, head, written)?;
        }
        // A guest that makes more requests than a batch, without waiting, has to notify the device once more.
        queue.queue.enable_notification(&*memory)?;
        queue.signal(memory)
    }
}

/// Serves the request in a chain. Returns the number of bytes written to its response: 0 if there is no valid request,
/// or no room for a response.
fn serve_request(memory: &GuestMemory, chain: Chain<'_>, state: &HotplugState) -> u32 {
    let mut request = [0; REQUEST_SIZE];
    let (mut request_buffer, mut response_buffer) = (None, None);
    // Linux has request and response in one buffer each. A driver that splits them gets no response.
    for descriptor in chain {
        let buffer = (descriptor.addr(), descriptor.len());
        if descriptor.is_write_only() {
            response_buffer.get_or_insert(buffer)
        } else {
            request_buffer.get_or_insert(buffer)
        };
    }
    let (Some((request_address, request_length)), Some((response_address, response_length))) =
        (request_buffer, response_buffer)
    else {
        return 0;
    };
    if (request_length as usize) < REQUEST_SIZE
        || response_length < RESPONSE_SIZE
        || memory.read_slice(&mut request, request_address).is_err()
    {
        return 0;
    }
    let mut response = [0; RESPONSE_SIZE as usize];
    let (code, block_state) = execute(memory, request, state);
    response[0..2].copy_from_slice(&code.to_le_bytes());
    response[8..10].copy_from_slice(&block_state.to_le_bytes());
    match memory.write_slice(&response, response_address) {
        Ok(()) => RESPONSE_SIZE,
        Err(_) => 0,
    }
}

/// Executes a request. Returns the type of its response, and the state of the blocks if the guest has asked for that.
fn execute(memory: &GuestMemory, request: [u8; REQUEST_SIZE], state: &HotplugState) -> (u16, u16) {
    let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = request;
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let count = u16::from_le_bytes([n0, n1]);
    let mut blocks = state.blocks();
    let result = match u16::from_le_bytes([t0, t1]) {
        REQUEST_PLUG => blocks.plug(address, count).map(|()| 0),
        REQUEST_UNPLUG => blocks.unplug(address, count).map(|()| {
            release_to_host(memory, address, u64::from(count) * BLOCK_SIZE);
            0
        }),
        REQUEST_UNPLUG_ALL => {
            blocks.unplug_all();
            release_to_host(memory, state.0.start, state.0.size);
            Ok(0)
        }
        REQUEST_STATE => blocks.state(address, count).map(|state| match state {
            BlockState::Plugged => 0,
            BlockState::Unplugged => 1,
            BlockState::Mixed => 2,
        }),
        _ => Err(Refusal::Error),
    };
    state.0.plugged_bytes.store(blocks.plugged(), Ordering::Relaxed);
    state.0.changed.notify_all();
    match result {
        Ok(block_state) => (RESPONSE_ACK, block_state),
        Err(Refusal::Nack) => (RESPONSE_NACK, 0),
        Err(Refusal::Error) => (RESPONSE_ERROR, 0),
    }
}

/// Gives the pages behind a range of guest memory back to the host.
fn release_to_host(memory: &GuestMemory, address: u64, length: u64) {
    let length = memory::to_usize(length);
    let released = memory.find_region(GuestAddress(address)).and_then(|region| {
        let offset = usize::try_from(address - region.start_addr().0).ok()?;
        let inside = offset.checked_add(length)? <= usize::try_from(region.len()).ok()?;
        // SAFETY: the range lies in the region's mapping, which is the guest's memory: this process has no reference
        // into it, and the guest has asked for the zeroes that it finds there.
        inside.then(|| unsafe { madvise(region.as_ptr().add(offset).cast(), length, Advice::LinuxDontNeed) })
    });
    if !matches!(released, Some(Ok(()))) {
        tracing::warn!(address, length, ?released, "mem: unplugged memory was not given back to the host");
    }
}

impl Device for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn device_type(&self) -> u32 {
        device_type::MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Shared { start, size, .. } = *self.state.0;
        let (requested, plugged) = {
            let blocks = self.state.blocks();
            (blocks.requested, blocks.plugged())
        };
        // block_size, node_id, addr, region_size, usable_region_size, plugged_size, requested_size.
        let fields = [BLOCK_SIZE, 0, start, size, size, plugged, requested];
        let mut config = [0; CONFIG_SIZE];
        for (target, field) in config.chunks_exact_mut(8).zip(fields) {
            target.copy_from_slice(&field.to_le_bytes());
        }
        read_config_bytes(&config, offset, data);
    }

    fn has_changing_config(&self) -> bool {
        true
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = all_queues(activation.queues)?;
        self.active = Some((activation.memory, queue));
        self.state.0.active.store(true, Ordering::Release);
        Ok(())
    }

    fn notified_inline(&self) -> bool {
        true
    }

    fn notify(&mut self, _queue: usize) {
        if let Err(error) = self.serve() {
            tracing::warn!(%error, "mem: the guest broke its queue; the device stops");
            self.active = None;
        }
    }

    fn stop(&mut self) {
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("requests", self.requests.clone())]
    }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
