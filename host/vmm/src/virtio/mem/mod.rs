//! virtio-mem (virtio 1.2, section 5.15): memory that the guest plugs and unplugs, block by block, until it
//! has what it was asked to have.
//!
//! Requests are short, so the vCPU that makes one does the work.

mod blocks;

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::mm::{Advice, madvise};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use self::blocks::{Blocks, Found, Refusal};
use super::{
    ActivateError, Active, ActiveQueue, Chain, Counter, Device, F_EVENT_IDX, all_queues, device_type,
    read_config_bytes,
};
use crate::memory::GuestMemory;

/// What is plugged at a time. Linux deals in this size as well (a page block).
pub const BLOCK_SIZE: u64 = 2 << 20;

const QUEUE_SIZE: u16 = 16;
/// Requests served for one notification; Linux makes one at a time.
const BATCH: usize = QUEUE_SIZE as usize;
const CONFIG_SIZE: usize = 56;
const REQUEST_SIZE: usize = 24;
const RESPONSE_SIZE: usize = 10;

const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

const RESPONSE_ACK: u16 = 0;
const RESPONSE_NACK: u16 = 1;
const RESPONSE_ERROR: u16 = 3;

/// Waiting for the guest has led to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// It has this many bytes plugged when the time is up.
    TimeUp(u64),
    /// Something else has been asked for meanwhile.
    Superseded,
}

/// How much is plugged and how much should be; shared by the device and whoever asks.
#[derive(Clone)]
pub struct Plugged(Arc<State>);

struct State {
    start: u64,
    size: u64,
    /// Bytes, as `blocks` has them: whoever only wants to know does not wait for a guest that keeps the lock busy.
    requested: AtomicU64,
    plugged: AtomicU64,
    blocks: Mutex<Blocks>,
    changed: Condvar,
    active: AtomicBool,
}

impl Plugged {
    /// For a region of guest memory of which nothing is plugged yet.
    pub fn new(start: GuestAddress, size: u64) -> Plugged {
        Plugged(Arc::new(State {
            start: start.0,
            size,
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            blocks: Mutex::new(Blocks::new(start.0, size)),
            changed: Condvar::new(),
            active: AtomicBool::new(false),
        }))
    }

    /// Asks the guest for another size. Its device has to be told that the configuration has changed.
    pub fn request(&self, bytes: u64) {
        let mut blocks = self.blocks();
        blocks.requested = bytes;
        self.0.requested.store(bytes, Ordering::Relaxed);
        drop(blocks);
        self.0.changed.notify_all();
    }

    /// Bytes requested.
    pub fn requested(&self) -> u64 {
        self.0.requested.load(Ordering::Relaxed)
    }

    /// Bytes plugged.
    pub fn bytes(&self) -> u64 {
        self.0.plugged.load(Ordering::Relaxed)
    }

    /// Whether the guest's driver is at work.
    pub fn is_active(&self) -> bool {
        self.0.active.load(Ordering::Acquire)
    }

    /// Waits until the guest has what was requested.
    pub fn wait(&self, limit: Duration) -> Result<u64, Unfinished> {
        let blocks = self.blocks();
        let wanted = blocks.requested;
        let (blocks, _) = self
            .0
            .changed
            .wait_timeout_while(blocks, limit, |blocks| {
                blocks.requested == wanted && blocks.plugged() != wanted
            })
            .unwrap_or_else(PoisonError::into_inner);
        match blocks.plugged() {
            _ if blocks.requested != wanted => Err(Unfinished::Superseded),
            plugged if plugged == wanted => Ok(plugged),
            plugged => Err(Unfinished::TimeUp(plugged)),
        }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.0.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device.
pub struct Mem {
    plugged: Plugged,
    active: Option<(GuestMemory, ActiveQueue)>,
    requests: Counter,
}

impl Mem {
    /// Through which a guest plugs that memory.
    pub fn new(plugged: Plugged) -> Mem {
        Mem { plugged, active: None, requests: Counter::default() }
    }

    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let Some((memory, queue)) = &mut self.active else { return Ok(()) };
        queue.queue.disable_notification(&*memory)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(memory)? else { break };
            self.requests.add(1);
            let head = chain.head_index();
            let written = answer(memory, chain, &self.plugged);
            queue.add_used(memory, head, written)?;
        }
        // A guest that makes more requests than that, without waiting, has to notify once more.
        queue.queue.enable_notification(&*memory)?;
        queue.signal(memory)
    }
}

/// Does what one request asks for; answers with the number of bytes written to it.
fn answer(memory: &GuestMemory, chain: Chain<'_>, plugged: &Plugged) -> u32 {
    let mut request = [0; REQUEST_SIZE];
    let (mut asked, mut room) = (None, None);
    // Linux has each in one buffer, and a driver that splits them gets no answer.
    for descriptor in chain {
        let place = (descriptor.addr(), descriptor.len() as usize);
        if descriptor.is_write_only() {
            room.get_or_insert(place)
        } else {
            asked.get_or_insert(place)
        };
    }
    let (Some((asked, asked_length)), Some((room, room_length))) = (asked, room) else { return 0 };
    if asked_length < REQUEST_SIZE
        || room_length < RESPONSE_SIZE
        || memory.read_slice(&mut request, asked).is_err()
    {
        return 0;
    }
    let mut response = [0; RESPONSE_SIZE];
    let (code, state) = perform(memory, request, plugged);
    response[0..2].copy_from_slice(&code.to_le_bytes());
    response[8..10].copy_from_slice(&state.to_le_bytes());
    match memory.write_slice(&response, room) {
        // 10.
        Ok(()) => u32::try_from(RESPONSE_SIZE).unwrap_or(0),
        Err(_) => 0,
    }
}

/// Answers with the response's type, and the state that was asked for.
fn perform(memory: &GuestMemory, request: [u8; REQUEST_SIZE], plugged: &Plugged) -> (u16, u16) {
    let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = request;
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let count = u16::from_le_bytes([n0, n1]);
    let mut blocks = plugged.blocks();
    let done = match u16::from_le_bytes([t0, t1]) {
        REQUEST_PLUG => blocks.plug(address, count).map(|()| 0),
        REQUEST_UNPLUG => blocks.unplug(address, count).map(|()| {
            give_back(memory, address, u64::from(count) * BLOCK_SIZE);
            0
        }),
        REQUEST_UNPLUG_ALL => {
            blocks.unplug_all();
            give_back(memory, plugged.0.start, plugged.0.size);
            Ok(0)
        }
        REQUEST_STATE => blocks.state(address, count).map(|found| match found {
            Found::Plugged => 0,
            Found::Unplugged => 1,
            Found::Mixed => 2,
        }),
        _ => Err(Refusal::Error),
    };
    plugged.0.plugged.store(blocks.plugged(), Ordering::Relaxed);
    plugged.0.changed.notify_all();
    match done {
        Ok(state) => (RESPONSE_ACK, state),
        Err(Refusal::Nack) => (RESPONSE_NACK, 0),
        Err(Refusal::Error) => (RESPONSE_ERROR, 0),
    }
}

/// Lets the host have the pages behind a range, all of which lies in the region.
fn give_back(memory: &GuestMemory, address: u64, length: u64) {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let given = memory.find_region(GuestAddress(address)).and_then(|region| {
        let offset = usize::try_from(address - region.start_addr().0).ok()?;
        let inside = offset.checked_add(length)? <= usize::try_from(region.len()).ok()?;
        // SAFETY: the range lies in the region's mapping, which is the guest's memory: nothing of ours has a
        // reference into it, and that the guest finds zeroes there is what it has asked for.
        inside.then(|| unsafe { madvise(region.as_ptr().add(offset).cast(), length, Advice::LinuxDontNeed) })
    });
    if !matches!(given, Some(Ok(()))) {
        tracing::warn!(address, length, ?given, "mem: unplugged memory was not given back to the host");
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
        let state = &self.plugged.0;
        let (requested, plugged) = {
            let blocks = self.plugged.blocks();
            (blocks.requested, blocks.plugged())
        };
        // Block size, node, address, size, usable size, plugged, requested.
        let fields = [BLOCK_SIZE, 0, state.start, state.size, state.size, plugged, requested];
        let mut config = [0; CONFIG_SIZE];
        for (place, field) in config.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        read_config_bytes(&config, offset, data);
    }

    fn config_changes(&self) -> bool {
        true
    }

    fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
        let [queue] = all_queues(active.queues)?;
        self.active = Some((active.memory, queue));
        self.plugged.0.active.store(true, Ordering::Release);
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
