//! virtio-rng (virtio 1.2, section 5.4): the host's entropy for the guest.
//!
//! A request is short and bounded, so the vCPU that makes it does the work: no thread for a device
//! that is used a few times in the life of a pod.

use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;

use super::{ActivateError, Active, ActiveQueue, Counter, Device, F_EVENT_IDX, all_queues, device_type};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 64;
/// Most bytes given for one request; the guest asks again if it wants more.
const REQUEST_MAX: usize = 4096;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<(GuestMemory, ActiveQueue)>,
    bytes: Counter,
}

impl Rng {
    fn serve(&mut self) -> Result<(), virtio_queue::Error> {
        let Some((memory, queue)) = &mut self.active else { return Ok(()) };
        loop {
            queue.queue.disable_notification(&*memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head_index();
                let given =
                    chain.writable().next().map_or(0, |buffer| fill(memory, buffer.addr(), buffer.len()));
                self.bytes.add(u64::from(given));
                queue.add_used(memory, head, given)?;
            }
            if !queue.queue.enable_notification(&*memory)? {
                break;
            }
        }
        queue.signal(memory)
    }
}

/// Fills the start of a buffer; answers with the number of bytes written, 0 if the buffer is not in
/// memory.
fn fill(memory: &GuestMemory, address: vm_memory::GuestAddress, length: u32) -> u32 {
    let mut random = [0u8; REQUEST_MAX];
    let wanted = &mut random[..REQUEST_MAX.min(length as usize)];
    let Ok(given) = rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::empty()) else {
        return 0;
    };
    match memory.write_slice(&wanted[..given], address) {
        Ok(()) => u32::try_from(given).unwrap_or(0),
        Err(_) => 0,
    }
}

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        device_type::RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
        let [queue] = all_queues(active.queues)?;
        self.active = Some((active.memory, queue));
        Ok(())
    }

    fn notified_inline(&self) -> bool {
        true
    }

    fn notify(&mut self, _queue: usize) {
        if let Err(error) = self.serve() {
            tracing::warn!(%error, "rng: the guest broke its queue; the device stops");
            self.active = None;
        }
    }

    fn stop(&mut self) {
        self.active = None;
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("bytes", self.bytes.clone())]
    }
}
