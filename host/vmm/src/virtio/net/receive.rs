//! The receive queue: moves frames from the tap into the buffers that the guest has made available.

use std::{collections::VecDeque, os::fd::AsFd as _, time::Instant};

use virtio_queue::QueueT as _;

use super::{
    Counters, FRAME_MAX, HEADER_SIZE, feature,
    iovecs::{ChainPart, FrameIoVecs, IoVecError},
    tap::{Tap, TapFailure},
};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, throttle::Throttle},
};

/// Offset of `num_buffers` in a frame's header (`struct virtio_net_hdr`).
const NUM_BUFFERS_OFFSET: usize = 10;

/// Why the receiver has moved no more frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveOutcome {
    /// It has moved as many as it was to move. There may be more.
    BudgetSpent,
    /// The tap has no frame.
    TapEmpty,
    /// The guest has made no buffers available. It notifies the queue when it does.
    NoBuffers,
    /// No frame may be moved before this time, because of the rate limit.
    Throttled(Instant),
    /// The tap is gone.
    TapGone,
}

/// A chain that was taken from the queue for a frame to come.
struct ReadyChain {
    head: u16,
    /// Number of its ranges of memory.
    iovecs: usize,
    /// Bytes in them.
    length: usize,
}

/// Serves a receive queue.
pub struct Receiver {
    pub queue: ActiveQueue,
    memory: GuestMemory,
    counters: Counters,
    /// The limit of frames to the guest.
    pub throttle: Throttle,
    /// Whether a frame may fill several chains.
    merge: bool,
    /// Chains that were taken from the queue, oldest first. Those that a frame does not fill are used for the next one.
    ready: VecDeque<ReadyChain>,
    /// Bytes in all of them.
    room: usize,
    /// Their memory.
    iovecs: FrameIoVecs,
    /// Takes what does not fit the guest's buffers, which distinguishes a frame that is cut off from one that fits
    /// exactly.
    spill: Box<[u8]>,
    /// The chains of one frame, as they are returned to the guest.
    filled: Vec<(u16, u32)>,
}

impl Receiver {
    pub fn new(
        queue: ActiveQueue,
        memory: &GuestMemory,
        features: u64,
        counters: Counters,
        throttle: Throttle,
    ) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            counters,
            throttle,
            merge: features & feature::MRG_RXBUF != 0,
            ready: VecDeque::new(),
            room: 0,
            iovecs: FrameIoVecs::new(memory.clone()),
            spill: vec![0; FRAME_MAX].into_boxed_slice(),
            filled: Vec::new(),
        }
    }

    /// Moves at most `budget` frames. An error means that the guest has broken the queue.
    pub fn serve(&mut self, tap: &Tap, budget: usize) -> Result<ReceiveOutcome, virtio_queue::Error> {
        let outcome = self.move_frames(tap, budget)?;
        self.queue.signal(&self.memory)?;
        Ok(outcome)
    }

    fn move_frames(&mut self, tap: &Tap, budget: usize) -> Result<ReceiveOutcome, virtio_queue::Error> {
        for _ in 0..budget {
            if !self.gather_chains()? {
                // Notifications are enabled if the queue is empty. It need not be: it may contain more bad chains than
                // were returned in one go.
                let more = self.queue.queue.enable_notification(&self.memory)?;
                return Ok(if more { ReceiveOutcome::BudgetSpent } else { ReceiveOutcome::NoBuffers });
            }
            // How long the frame is, and whether there is one, is not known before it has been read.
            if let Some(not_before) = self.throttle.not_before() {
                return Ok(ReceiveOutcome::Throttled(not_before));
            }
            let read = self.iovecs.read_from(tap.as_fd(), &mut self.spill);
            if let Ok(length) = read {
                self.throttle.charge(frame_bytes(length));
            }
            match read {
                // A tap never returns 0. A descriptor at its end would return nothing else any more.
                Ok(0) => return Ok(ReceiveOutcome::TapGone),
                Ok(length) if length <= self.room => self.return_frame(length)?,
                Ok(_) => self.counters.rx_dropped.add(1),
                Err(error) => match TapFailure::of_read(&error) {
                    TapFailure::WouldBlock => return Ok(ReceiveOutcome::TapEmpty),
                    TapFailure::FrameLost => self.counters.rx_dropped.add(1),
                    TapFailure::Gone => return Ok(ReceiveOutcome::TapGone),
                },
            }
        }
        Ok(ReceiveOutcome::BudgetSpent)
    }

    /// Takes chains from the queue until the largest frame fits, or there are no more; a single chain if the guest
    /// cannot merge several. Returns whether there is any chain.
    fn gather_chains(&mut self) -> Result<bool, virtio_queue::Error> {
        // The number is limited, because a guest may make bad chains available as fast as they are returned.
        let mut attempts = self.queue.queue.size();
        while attempts > 0 && self.needs_chains() {
            attempts -= 1;
            self.queue.queue.disable_notification(&self.memory)?;
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if self.queue.queue.enable_notification(&self.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            match self.iovecs.add(chain, ChainPart::Writable) {
                // The header must lie in one chain (virtio 1.2, section 5.1.6.3.2).
                Ok(added) if added.length >= usize::from(HEADER_SIZE) => {
                    self.room += added.length;
                    self.ready.push_back(ReadyChain { head, iovecs: added.iovecs, length: added.length });
                }
                Ok(added) => {
                    self.iovecs.remove_last(added.iovecs);
                    self.return_empty(head)?;
                }
                Err(IoVecError::TooMany) if !self.ready.is_empty() => {
                    // It fits once the chains before it are used up.
                    self.queue.unpop();
                    break;
                }
                Err(error) => {
                    tracing::debug!(%error, "net: a receive buffer is returned empty");
                    self.return_empty(head)?;
                }
            }
        }
        Ok(!self.ready.is_empty())
    }

    fn needs_chains(&self) -> bool {
        self.ready.is_empty() || self.merge && self.room < FRAME_MAX
    }

    /// Returns a chain that cannot be used to the guest.
    fn return_empty(&mut self, head: u16) -> Result<(), virtio_queue::Error> {
        self.counters.rx_dropped.add(1);
        self.queue.add_used(&self.memory, head, 0)
    }

    /// Returns the first chains, into which a frame of this length was read, to the guest.
    fn return_frame(&mut self, length: usize) -> Result<(), virtio_queue::Error> {
        let mut rest = length;
        let mut iovecs = 0;
        self.filled.clear();
        while rest > 0 {
            let Some(chain) = self.ready.pop_front() else { break };
            let used = rest.min(chain.length);
            rest -= used;
            iovecs += chain.iovecs;
            self.room -= chain.length;
            let Ok(used) = u32::try_from(used) else {
                unreachable!("the spill has room for {FRAME_MAX} bytes")
            };
            self.filled.push((chain.head, used));
        }
        // The kernel does not write this field. Without merging it is 1 as well (virtio 1.2, section 5.1.6.4.1).
        let Ok(count) = u16::try_from(self.filled.len()) else {
            unreachable!("a frame fills no more chains than a queue has")
        };
        self.iovecs.overwrite(NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        self.iovecs.remove_first(iovecs);
        self.queue.add_used_together(&self.memory, &self.filled)?;
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(frame_bytes(length));
        Ok(())
    }
}

/// Bytes of the frame in so many bytes that were read with its header.
fn frame_bytes(length: usize) -> u64 {
    length.saturating_sub(usize::from(HEADER_SIZE)) as u64
}
