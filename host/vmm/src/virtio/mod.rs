//! virtio 1.2 devices on the MMIO transport.
//!
//! A device is a [`Device`] until the guest activates it; from then on its queues belong to the
//! device's own worker, with addresses and sizes that can no longer change.

pub mod blk;
pub mod fs;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod page;
pub mod rng;
pub mod slot;
#[cfg(test)]
pub mod testing;
pub mod vsock;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// Device types (virtio 1.2, section 5).
pub mod device_type {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const RNG: u32 = 4;
    pub const VSOCK: u32 = 19;
    pub const MEM: u32 = 24;
    pub const FS: u32 = 26;
}

/// `VIRTIO_F_VERSION_1`: every device of ours insists on it.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`: each side says from which entry on it wants to be told.
pub const F_EVENT_IDX: u64 = 1 << 29;

/// What the guest can set up and activate.
pub trait Device: Send {
    /// For messages and counters; no two devices of a machine share one: "vsock", "fs", "rng", "net0".
    fn name(&self) -> &str;
    /// Number from virtio 1.2, section 5.
    fn device_type(&self) -> u32;
    /// Largest size of each queue; their number is the device's number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Features offered, without [`F_VERSION_1`].
    fn features(&self) -> u64;
    /// The guest reads the device's configuration space; what lies beyond it stays zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The guest has set the device up. Happens at most once.
    fn activate(&mut self, active: Active) -> Result<(), ActivateError>;
    /// The guest notifies a queue of a device that asked for no eventfd ([`Device::notified_inline`]).
    fn notify(&mut self, _queue: usize) {}
    /// Whether the vCPU thread handles notifications itself, which spares a thread where the work
    /// is short and bounded.
    fn notified_inline(&self) -> bool {
        false
    }
    /// Whether the device's configuration changes while it is in use.
    fn config_changes(&self) -> bool {
        false
    }
    /// The guest has reset the device, or it is taken out of the machine: it stops. It cannot be activated
    /// again.
    fn stop(&mut self);
    /// Numbers for [`Machine.Status`](pericarp_protos::vmm::DeviceCounters), by name. They go on
    /// counting without the device being asked again.
    fn counters(&self) -> Vec<(&'static str, Counter)>;
}

/// A device refused to start; the guest sees FAILED in the status register.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("the guest set up the device's queues wrongly")]
    Queues,
    #[error("cannot start the device's worker")]
    Worker(#[source] io::Error),
}

/// What a device gets when it is activated. Nothing in it can be changed by the guest any more but
/// the contents of memory.
pub struct Active {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The features that the guest's driver has accepted, all of them offered.
    pub features: u64,
    /// One for each of [`Device::queue_sizes`], checked; none where the driver has not made one ready.
    pub queues: Vec<Option<ActiveQueue>>,
}

/// The queues of a device that can do without none of its `N`.
pub fn all_queues<const N: usize>(
    queues: Vec<Option<ActiveQueue>>,
) -> Result<[ActiveQueue; N], ActivateError> {
    let queues: Option<Vec<_>> = queues.into_iter().collect();
    queues.and_then(|queues| queues.try_into().ok()).ok_or(ActivateError::Queues)
}

/// A queue of an active device.
pub struct ActiveQueue {
    /// The frozen queue.
    pub queue: Queue,
    /// Written by KVM when the guest notifies the queue.
    pub notified: EventFd,
    /// Raised when the guest should look at the used ring.
    pub interrupt: Interrupt,
    /// End of the used ring when the guest was last considered for an interrupt.
    signalled: u16,
}

/// A request of the guest's: descriptors that point into its memory.
pub type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// Every `Err` means that the guest has broken the queue: the device cannot go on.
impl ActiveQueue {
    /// Puts a queue that will not change any more into use.
    pub fn new(queue: Queue, notified: EventFd, interrupt: Interrupt) -> ActiveQueue {
        let signalled = queue.next_used();
        ActiveQueue { queue, notified, interrupt, signalled }
    }

    /// The next chain that the guest has made available.
    pub fn pop<'a>(&mut self, memory: &'a GuestMemory) -> Result<Option<Chain<'a>>, virtio_queue::Error> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Makes the chain that was popped last available again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back to the guest, which may look at the first `length` bytes of its writable part.
    pub fn add_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        length: u32,
    ) -> Result<(), virtio_queue::Error> {
        self.queue.add_used(memory, head, length)
    }

    /// Hands several chains (head and length, as in [`ActiveQueue::add_used`]) back at once: the guest
    /// sees all of them or none. A driver that finds the first buffer of a frame expects the others to
    /// be there already (virtio 1.2, section 5.1.6.4).
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
            // The ring was checked to lie inside memory; the element is a 32-bit id and a 32-bit length.
            let slot = self.queue.used_ring() + 4 + 8 * u64::from(next % self.queue.size());
            let element = u64::from(length) << 32 | u64::from(head);
            memory
                .write_obj(element.to_le(), GuestAddress(slot))
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // Publishes all elements up to its own.
        self.queue.add_used(memory, last_head, last_length)
    }

    /// Interrupts the guest if it wants to know of what was added since the last call.
    pub fn signal(&mut self, memory: &GuestMemory) -> Result<(), virtio_queue::Error> {
        if self.guest_wants_interrupt(memory)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// virtio 1.2, section 2.7.10. The queue's own answer counts one entry for each call of its own
    /// `add_used`, and would overlook those of [`ActiveQueue::add_used_together`].
    fn guest_wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, virtio_queue::Error> {
        let end = self.queue.next_used();
        let start = std::mem::replace(&mut self.signalled, end);
        if start == end || !self.queue.event_idx_enabled() {
            return Ok(start != end);
        }
        // The guest must see the entries before its wish is read, or each could wait for the other.
        fence(Ordering::SeqCst);
        let used_event = self.queue.avail_ring() + 4 + 2 * u64::from(self.queue.size());
        let used_event = memory
            .load(GuestAddress(used_event), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(end.wrapping_sub(used_event).wrapping_sub(1) < end.wrapping_sub(start))
    }
}

/// A device's interrupt line: an irqfd, bound to it in KVM.
#[derive(Clone)]
pub struct Interrupt(pub Arc<EventFd>);

impl Interrupt {
    /// Tells the guest that a used ring has grown.
    pub fn used_buffer(&self) {
        self.raise();
    }

    /// Interrupts the guest, whatever the reason.
    pub fn raise(&self) {
        // An eventfd refuses a write only when its counter is about to overflow, and then the guest
        // has an interrupt pending anyway.
        let _ = self.0.write(1);
    }
}

/// A number that a worker adds to and the control server reads.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Copies the part of a configuration space that the guest asked for.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (target, source) in data.iter_mut().zip(available) {
        *target = *source;
    }
}

/// A device's thread, and the event that tells it to stop.
pub type RunningWorker = (std::thread::JoinHandle<()>, EventFd);

/// Starts the thread that does what `prepare` answers, until the event that it is given tells it to stop.
pub fn start_worker<Work: FnOnce() + Send + 'static>(
    name: &str,
    prepare: impl FnOnce(&EventFd) -> std::io::Result<Work>,
) -> std::io::Result<RunningWorker> {
    let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let work = prepare(&stop)?;
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
    Ok((thread, stop))
}

/// Tells a device's worker to stop and waits until it has: afterwards nothing touches the queues.
pub fn stop_worker(worker: Option<RunningWorker>) {
    if let Some((thread, stop)) = worker {
        // An eventfd that has been written once cannot overflow.
        let _ = stop.write(1);
        if thread.join().is_err() {
            tracing::error!("a device's worker had panicked");
        }
    }
}
