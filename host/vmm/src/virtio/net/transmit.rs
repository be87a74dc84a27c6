//! The transmit queue: the guest's frames, out of its memory into the tap.

use std::os::fd::AsFd as _;

use virtio_queue::QueueT as _;

use super::{
    Counters, FRAME_MAX, HEADER_SIZE,
    buffers::{Buffers, Part},
    tap::{Failure, Tap},
};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain},
};

/// Length of an Ethernet header.
const ETHERNET: usize = 14;

/// Why the transmitter has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Its turn is over; there may be more.
    Turn,
    /// The guest has sent everything; it notifies the queue when there is more.
    QueueEmpty,
    /// The tap takes no frame now.
    TapFull,
    /// The tap is gone.
    TapGone,
}

/// What has become of a frame.
enum Fate {
    Sent(usize),
    Dropped,
    NotNow,
    TapGone,
}

pub struct Transmitter {
    pub queue: ActiveQueue,
    memory: GuestMemory,
    counters: Counters,
    /// One frame.
    buffers: Buffers,
}

impl Transmitter {
    pub fn new(queue: ActiveQueue, memory: &GuestMemory, counters: Counters) -> Transmitter {
        Transmitter { queue, memory: memory.clone(), counters, buffers: Buffers::new(memory.clone()) }
    }

    /// Moves up to `turn` frames; drops them if there is no tap. An error means that the guest has
    /// broken the queue.
    pub fn serve(&mut self, tap: Option<&Tap>, turn: usize) -> Result<Stopped, virtio_queue::Error> {
        let stopped = self.empty(tap, turn)?;
        self.queue.signal(&self.memory)?;
        Ok(stopped)
    }

    fn empty(&mut self, tap: Option<&Tap>, turn: usize) -> Result<Stopped, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        for _ in 0..turn {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if self.queue.queue.enable_notification(&self.memory)? {
                    continue;
                }
                return Ok(Stopped::QueueEmpty);
            };
            let head = chain.head_index();
            match send(&mut self.buffers, chain, tap) {
                Fate::Sent(length) => {
                    self.counters.tx_packets.add(1);
                    self.counters.tx_bytes.add((length - usize::from(HEADER_SIZE)) as u64);
                }
                Fate::Dropped => self.counters.tx_dropped.add(1),
                Fate::NotNow => {
                    // Read and checked from scratch when its turn comes.
                    self.queue.unpop();
                    return Ok(Stopped::TapFull);
                }
                Fate::TapGone => {
                    self.queue.unpop();
                    return Ok(Stopped::TapGone);
                }
            }
            self.queue.add_used(&self.memory, head, 0)?;
        }
        Ok(Stopped::Turn)
    }
}

/// Sends one frame. The header that the guest has put before it goes to the kernel as it is: the tun
/// driver is made for headers of whatever process holds the tap, copies each once, and refuses with
/// EINVAL what does not fit the frame that follows (lengths and offsets beyond its end, kinds of
/// segmentation it does not know). Looking at it here, in memory that the guest can still change, would
/// prove nothing about what the kernel reads.
fn send(buffers: &mut Buffers, chain: Chain<'_>, tap: Option<&Tap>) -> Fate {
    buffers.clear();
    let length = match buffers.add(chain, Part::Readable) {
        Ok(added) => added.length,
        Err(error) => {
            tracing::debug!(%error, "net: a frame is dropped");
            return Fate::Dropped;
        }
    };
    let Some(tap) = tap else { return Fate::Dropped };
    if !(usize::from(HEADER_SIZE) + ETHERNET..=FRAME_MAX).contains(&length) {
        tracing::debug!(length, "net: a frame that is too short or too long is dropped");
        return Fate::Dropped;
    }
    match buffers.write_to(tap.as_fd()) {
        Ok(_) => Fate::Sent(length),
        Err(error) => match Failure::of_write(&error) {
            Failure::NotNow => Fate::NotNow,
            Failure::Frame => Fate::Dropped,
            Failure::Gone => Fate::TapGone,
        },
    }
}
