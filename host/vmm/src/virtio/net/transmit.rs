//! The transmit queue: moves the guest's frames from its memory into the tap.

use std::{os::fd::AsFd as _, time::Instant};

use virtio_queue::QueueT as _;

use super::{
    Counters, FRAME_MAX, HEADER_SIZE,
    iovecs::{ChainPart, FrameIoVecs},
    tap::{Tap, TapFailure},
};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain, throttle::Throttle},
};

/// Bytes of an Ethernet header.
const ETHERNET_HEADER_SIZE: usize = 14;

/// Why the transmitter has moved no more frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransmitOutcome {
    /// It has moved as many as it was to move. There may be more.
    BudgetSpent,
    /// The guest has no more frames. It notifies the queue when it has.
    QueueEmpty,
    /// The tap takes no frame at the moment.
    TapFull,
    /// No frame may be moved before this time, because of the rate limit.
    Throttled(Instant),
    /// The tap is gone.
    TapGone,
}

/// The outcome of sending one frame.
enum SendOutcome {
    /// The tap has taken it, with this length in bytes.
    Sent(usize),
    Dropped,
    TapFull,
    TapGone,
}

/// Serves a transmit queue.
pub struct Transmitter {
    pub queue: ActiveQueue,
    memory: GuestMemory,
    counters: Counters,
    throttle: Throttle,
    /// The memory of one frame.
    iovecs: FrameIoVecs,
}

impl Transmitter {
    pub fn new(queue: ActiveQueue, memory: &GuestMemory, counters: Counters, throttle: Throttle) -> Self {
        let iovecs = FrameIoVecs::new(memory.clone());
        Self { queue, memory: memory.clone(), counters, throttle, iovecs }
    }

    /// Moves at most `budget` frames to the tap. Without a tap, they are dropped. An error means that the guest has
    /// broken the queue.
    pub fn serve(
        &mut self,
        tap: Option<&Tap>,
        budget: usize,
    ) -> Result<TransmitOutcome, virtio_queue::Error> {
        let outcome = self.move_frames(tap, budget)?;
        self.queue.signal(&self.memory)?;
        Ok(outcome)
    }

    fn move_frames(
        &mut self,
        tap: Option<&Tap>,
        budget: usize,
    ) -> Result<TransmitOutcome, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        for _ in 0..budget {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if self.queue.queue.enable_notification(&self.memory)? {
                    continue;
                }
                return Ok(TransmitOutcome::QueueEmpty);
            };
            if let Some(not_before) = self.throttle.not_before() {
                self.queue.unpop();
                return Ok(TransmitOutcome::Throttled(not_before));
            }
            let head = chain.head_index();
            match send(&mut self.iovecs, chain, tap) {
                SendOutcome::Sent(length) => {
                    let bytes = (length - usize::from(HEADER_SIZE)) as u64;
                    self.counters.tx_packets.add(1);
                    self.counters.tx_bytes.add(bytes);
                    self.throttle.charge(bytes);
                }
                SendOutcome::Dropped => {
                    self.counters.tx_dropped.add(1);
                    self.throttle.charge(0);
                }
                SendOutcome::TapFull => {
                    // The frame is read and checked again when the tap takes frames again.
                    self.queue.unpop();
                    return Ok(TransmitOutcome::TapFull);
                }
                SendOutcome::TapGone => {
                    self.queue.unpop();
                    return Ok(TransmitOutcome::TapGone);
                }
            }
            self.queue.add_used(&self.memory, head, 0)?;
        }
        Ok(TransmitOutcome::BudgetSpent)
    }
}

/// Sends one frame.
///
/// The header that the guest has put before the frame goes to the kernel as it is. The tun driver expects headers from
/// any process that has the tap: it copies each once, and refuses with EINVAL what does not match the frame that
/// follows (lengths and offsets beyond its end, kinds of segmentation that it does not know). To check the header here,
/// in memory that the guest can still change, would prove nothing about what the kernel reads.
fn send(iovecs: &mut FrameIoVecs, chain: Chain<'_>, tap: Option<&Tap>) -> SendOutcome {
    iovecs.clear();
    let length = match iovecs.add(chain, ChainPart::Readable) {
        Ok(added) => added.length,
        Err(error) => {
            tracing::debug!(%error, "net: a frame is dropped");
            return SendOutcome::Dropped;
        }
    };
    let Some(tap) = tap else { return SendOutcome::Dropped };
    if !(usize::from(HEADER_SIZE) + ETHERNET_HEADER_SIZE..=FRAME_MAX).contains(&length) {
        tracing::debug!(length, "net: a frame that is too short or too long is dropped");
        return SendOutcome::Dropped;
    }
    match iovecs.write_to(tap.as_fd()) {
        Ok(_) => SendOutcome::Sent(length),
        Err(error) => match TapFailure::of_write(&error) {
            TapFailure::WouldBlock => SendOutcome::TapFull,
            TapFailure::FrameLost => SendOutcome::Dropped,
            TapFailure::Gone => SendOutcome::TapGone,
        },
    }
}
