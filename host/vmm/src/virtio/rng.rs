//! virtio-rng (virtio 1.2, section 5.4): the host's entropy for the guest.
//!
//! The device has no thread, because it is used a few times in the life of a pod: the vCPU that makes a request serves
//! it, which is short and bounded. Trust: the guest chooses where the bytes go and how many it wants; each request gets
//! at most [`REQUEST_MAX`] bytes, and each notification at most [`BATCH`] requests.

use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;

use super::{ActivateError, Activation, ActiveQueue, Counter, Device, F_EVENT_IDX, all_queues, device_type};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 64;
/// Most requests served for one notification: as many as there can be at a time. A vCPU that goes on asking must not
/// keep another vCPU, which has notified the device, in its slot's lock.
const BATCH: usize = QUEUE_SIZE as usize;
/// Most bytes given for one request. The guest asks again if it wants more.
const REQUEST_MAX: usize = 4096;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<(GuestMemory, ActiveQueue)>,
    bytes: Counter,
}

impl Rng {
    fn serve(&mut self, batch: usize) -> Result<(), virtio_queue::Error> {
        let Some((memory, queue)) = &mut self.active else { return Ok(()) };
        queue.queue.disable_notification(&*memory)?;
        for _ in 0..batch {
            let chain = match queue.pop(memory)? {
                Some(chain) => chain,
                // A request may have come before the guest was asked to notify the device.
                None if queue.queue.enable_notification(&*memory)? => continue,
                None => break,
            };
            let head = chain.head_index();
            let given = chain.writable().next().map_or(0, |buffer| fill(memory, buffer.addr(), buffer.len()));
            self.bytes.add(u64::from(given));
            queue.add_used(memory, head, given)?;
        }
        // A guest that makes more requests than a batch, without waiting, has to notify the device once more.
        queue.queue.enable_notification(&*memory)?;
        queue.signal(memory)
    }
}

/// Fills the start of a buffer. Returns the number of bytes written: 0 if the buffer is not in memory.
fn fill(memory: &GuestMemory, address: vm_memory::GuestAddress, length: u32) -> u32 {
    let mut random = [0u8; REQUEST_MAX];
    let wanted = &mut random[..REQUEST_MAX.min(length as usize)];
    let Ok(given) = rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::empty()) else {
        return 0;
    };
    match memory.write_slice(&wanted[..given], address) {
        Ok(()) => {
            let Ok(given) = u32::try_from(given) else {
                unreachable!("at most {REQUEST_MAX} bytes were asked for")
            };
            given
        }
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

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = all_queues(activation.queues)?;
        self.active = Some((activation.memory, queue));
        Ok(())
    }

    fn notified_inline(&self) -> bool {
        true
    }

    fn notify(&mut self, _queue: usize) {
        if let Err(error) = self.serve(BATCH) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, RING_SIZE, Ring, guest_memory};

    #[test]
    fn a_guest_that_goes_on_asking_is_served_a_batch_for_each_notification() {
        let memory = guest_memory();
        let (mut ring, queue) = Ring::new(&memory, RING_SIZE, QUEUE_SIZE);
        let mut device = Rng { active: Some((memory, queue)), bytes: Counter::default() };
        for _ in 0..5 {
            ring.add(&[Buffer { address: 0x10_0000, length: 8, writable: true }]);
        }
        for expected in [2, 2, 1, 0] {
            device.serve(2).unwrap();
            let served = std::iter::from_fn(|| ring.used()).collect::<Vec<_>>();
            assert_eq!(served.len(), expected);
            assert!(served.iter().all(|(_, length)| *length == 8));
        }
        assert_eq!(device.bytes.get(), 40);
    }
}
