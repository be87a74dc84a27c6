//! Devices of virtio 1.2 on the MMIO transport.
//!
//! A [`Device`] sits behind the transport ([`mmio`]) in a slot ([`device_slot`]). Once the guest's driver has activated
//! it, its queues belong to the device: their addresses and sizes can no longer change. Devices with much to do serve
//! them on threads of their own, each of which waits on a [`wait_context`] and is started by [`start_worker`]; the
//! others ([`rng`], [`mem`]) on the thread of the vCPU that notifies them. Workers keep to the rate limit of their
//! device, if it has one ([`throttle`]).
//!
//! Trust: everything in the guest's memory is hostile, rings and descriptors included, and can change at any time. A
//! descriptor is read once and what it says is checked; an error of a queue ([`virtio_queue::Error`]) means that the
//! guest has broken it, and stops that device and no other.

pub mod blk;
pub mod device_slot;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod register_page;
pub mod rng;
#[cfg(test)]
pub mod testing;
pub mod throttle;
pub mod vsock;
pub mod wait_context;

use std::{
    io,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub use crate::counter::Counter;
use crate::{memory::GuestMemory, thread_kind::ThreadKind, threads::ThreadSpawner};

/// Device types (virtio 1.2, section 5).
pub mod device_type {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const RNG: u32 = 4;
    pub const VSOCK: u32 = 19;
    pub const MEM: u32 = 24;
    pub const FS: u32 = 26;
}

/// `VIRTIO_F_VERSION_1`: all devices here insist on it.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`: each side says after which entry of a ring it wants to be notified.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// A device that the guest can set up and activate.
pub trait Device: Send {
    /// The device's name in messages and counters, for example "vsock" or "net0". No two devices of a machine share
    /// one.
    fn name(&self) -> &str;
    /// The device's type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each of the device's queues. All are powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// The features that the device offers, except [`F_VERSION_1`], which the transport adds.
    fn features(&self) -> u64;
    /// Copies the part of the configuration space from `offset` on into `data`. What lies beyond its end stays as it
    /// is.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Puts the device into use, when the guest has set it up. Called at most once. After an error the guest sees the
    /// device as failed.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Handles the guest's notification of a queue. Only for devices that are
    /// [`notified_inline`](Self::notified_inline). The index is the guest's: there need not be such a queue.
    fn notify(&mut self, _queue: usize) {}
    /// Whether the thread of the vCPU handles notifications itself, which saves a thread where the work is short and
    /// bounded.
    fn notified_inline(&self) -> bool {
        false
    }
    /// Whether the device's configuration changes while it is in use.
    fn has_changing_config(&self) -> bool {
        false
    }
    /// Stops the device, because the guest has reset it or it is taken out of the machine. When this returns, nothing
    /// touches the queues any more. The device is not activated again.
    fn stop(&mut self);
    /// The device's counters by name, for [`Machine.Status`](pericarp_protos::vmm::DeviceCounters). They share their
    /// values with the device, so that reading them later does not need it.
    fn counters(&self) -> Vec<(&'static str, Counter)>;
}

/// A device cannot be activated. The guest sees FAILED in the status register.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("the guest set up the device's queues wrongly")]
    Queues,
    #[error("cannot start the device's worker")]
    Worker(#[source] io::Error),
}

/// What a device is given when it is activated. The guest can change nothing of it any more, except the contents of
/// memory.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The features that the guest's driver has accepted, all of them offered.
    pub features: u64,
    /// The queues, one for each of [`Device::queue_sizes`], whose rings lie in memory; `None` for each that the driver
    /// has not made ready.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Starts the device's threads.
    pub threads: ThreadSpawner,
}

/// The queues of a device that needs all of its `N` queues.
pub fn all_queues<const N: usize>(
    queues: Vec<Option<ActiveQueue>>,
) -> Result<[ActiveQueue; N], ActivateError> {
    let queues: Option<Vec<_>> = queues.into_iter().collect();
    queues.and_then(|queues| queues.try_into().ok()).ok_or(ActivateError::Queues)
}

/// A queue of an active device.
pub struct ActiveQueue {
    /// The queue, whose configuration does not change any more.
    pub queue: Queue,
    /// Written by KVM when the guest notifies the queue.
    pub notified: EventFd,
    /// Interrupts the guest.
    pub interrupt: Interrupt,
    /// The end of the used ring when it was last decided whether to interrupt the guest.
    signalled: u16,
}

/// A chain of descriptors, which point into the guest's memory. Often it is one request.
pub type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// An error of any of these functions means that the guest has broken the queue, and that the device has to stop.
impl ActiveQueue {
    /// Puts a queue into use whose configuration does not change any more.
    pub fn new(queue: Queue, notified: EventFd, interrupt: Interrupt) -> Self {
        let signalled = queue.next_used();
        Self { queue, notified, interrupt, signalled }
    }

    /// Takes the next chain that the guest has made available.
    pub fn pop<'a>(&mut self, memory: &'a GuestMemory) -> Result<Option<Chain<'a>>, virtio_queue::Error> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Makes the chain that was popped last available again, so that the next [`pop`](Self::pop) returns it.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the guest, which may read the first `length` bytes of its writable part.
    pub fn add_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        length: u32,
    ) -> Result<(), virtio_queue::Error> {
        self.queue.add_used(memory, head, length)
    }

    /// Returns several chains (head and length, as for [`add_used`](Self::add_used)) to the guest at once: it sees all
    /// of them or none. A driver that finds the first buffer of a frame expects the others to be there already (virtio
    /// 1.2, section 5.1.6.4).
    pub fn add_used_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), virtio_queue::Error> {
        let Some((&(last_head, last_length), earlier)) = chains.split_last() else { return Ok(()) };
        let mut next = self.queue.next_used();
        for &(head, length) in earlier {
            if head >= self.queue.size() {
                return Err(virtio_queue::Error::InvalidDescriptorIndex);
            }
            // The transport has checked that the ring lies inside memory. An element is a 32-bit id and a 32-bit
            // length.
            let element_address = self.queue.used_ring() + 4 + 8 * u64::from(next % self.queue.size());
            let element = u64::from(length) << 32 | u64::from(head);
            memory
                .write_obj(element.to_le(), GuestAddress(element_address))
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // This writes the ring's index, which publishes all elements before it too.
        self.queue.add_used(memory, last_head, last_length)
    }

    /// Interrupts the guest if it asks to be notified of what was added since the last call.
    pub fn signal(&mut self, memory: &GuestMemory) -> Result<(), virtio_queue::Error> {
        if self.needs_interrupt(memory)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Decides whether the guest asks for an interrupt (virtio 1.2, section 2.7.10). `Queue::needs_notification` counts
    /// one entry for each call of its own `add_used`, and would overlook those of
    /// [`add_used_together`](Self::add_used_together).
    fn needs_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
        let end = self.queue.next_used();
        let start = std::mem::replace(&mut self.signalled, end);
        if start == end || !self.queue.event_idx_enabled() {
            return Ok(start != end);
        }
        // The guest must see the entries before `used_event` is read, or each side could wait for the other.
        fence(Ordering::SeqCst);
        let used_event = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let used_event = memory
            .load(GuestAddress(used_event), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(end.wrapping_sub(used_event).wrapping_sub(1) < end.wrapping_sub(start))
    }
}

/// A device's interrupt line: an eventfd that KVM is bound to (irqfd).
#[derive(Clone)]
pub struct Interrupt(pub Arc<EventFd>);

impl Interrupt {
    /// Interrupts the guest because a used ring has grown.
    pub fn used_buffer(&self) {
        self.raise();
    }

    /// Interrupts the guest.
    pub fn raise(&self) {
        // An eventfd refuses a write only when its counter is about to overflow, and then the guest
        // has an interrupt pending anyway.
        let _ = self.0.write(1);
    }
}

/// Copies the bytes of a configuration space from `offset` on, as many as there are, into `data`.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (target, source) in data.iter_mut().zip(available) {
        *target = *source;
    }
}

/// A device's thread, and the event that tells it to stop.
pub type RunningWorker = (std::thread::JoinHandle<()>, EventFd);

/// Starts a thread for the function that `prepare` returns. That function has to return when the event that `prepare`
/// is given becomes readable.
pub fn start_worker<Work: FnOnce() + Send + 'static>(
    threads: &ThreadSpawner,
    kind: ThreadKind,
    name: &str,
    prepare: impl FnOnce(&EventFd) -> io::Result<Work>,
) -> io::Result<RunningWorker> {
    let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let work = prepare(&stop)?;
    Ok((threads.spawn(kind, name, work)?, stop))
}

/// Tells a device's worker to stop and waits until it has. Afterwards nothing touches the queues.
pub fn stop_worker(worker: Option<RunningWorker>) {
    if let Some((thread, stop)) = worker {
        // An eventfd that has been written once cannot overflow.
        let _ = stop.write(1);
        // In a machine, a panic would have ended the whole process.
        if thread.join().is_err() {
            tracing::error!("a device's worker had panicked");
        }
    }
}
