//! The receive queue: frames from the tap into the buffers that the guest has given for them.

use std::{collections::VecDeque, os::fd::AsFd as _};

use virtio_queue::QueueT as _;

use super::{
    Counters, FRAME_MAX, HEADER_SIZE,
    buffers::{BadChain, Buffers, Part},
    feature,
    tap::{Failure, Tap},
};
use crate::{memory::GuestMemory, virtio::ActiveQueue};

/// Where `num_buffers` lies in a frame's header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Why the receiver has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Its turn is over; there may be more.
    Turn,
    /// The tap has no frame.
    TapEmpty,
    /// The guest has to give buffers first; it notifies the queue when it does.
    NoBuffers,
    /// The tap is gone.
    TapGone,
}

/// A chain that waits for a frame.
struct Waiting {
    head: u16,
    pieces: usize,
    length: usize,
}

pub struct Receiver {
    pub queue: ActiveQueue,
    memory: GuestMemory,
    counters: Counters,
    /// Whether a frame may fill several chains.
    merge: bool,
    /// Chains that have been taken from the queue, oldest first, and their pieces. They stay when a
    /// frame is smaller: the next one finds them ready.
    waiting: VecDeque<Waiting>,
    room: usize,
    buffers: Buffers,
    /// Takes what does not fit the guest's buffers, so that a frame which is cut off can be told from
    /// one that fits exactly.
    spill: Box<[u8]>,
    /// The chains of one frame, as they are handed back.
    filled: Vec<(u16, u32)>,
}

impl Receiver {
    pub fn new(queue: ActiveQueue, memory: &GuestMemory, features: u64, counters: Counters) -> Receiver {
        Receiver {
            queue,
            memory: memory.clone(),
            counters,
            merge: features & feature::MRG_RXBUF != 0,
            waiting: VecDeque::new(),
            room: 0,
            buffers: Buffers::new(memory.clone()),
            spill: vec![0; FRAME_MAX].into_boxed_slice(),
            filled: Vec::new(),
        }
    }

    /// Moves up to `turn` frames. An error means that the guest has broken the queue.
    pub fn serve(&mut self, tap: &Tap, turn: usize) -> Result<Stopped, virtio_queue::Error> {
        let stopped = self.fill(tap, turn)?;
        self.queue.signal(&self.memory)?;
        Ok(stopped)
    }

    fn fill(&mut self, tap: &Tap, turn: usize) -> Result<Stopped, virtio_queue::Error> {
        for _ in 0..turn {
            if !self.collect()? {
                // Notifications are on if the queue is empty. It is not if it held nothing but bad
                // chains: those have had their turn.
                let more = self.queue.queue.enable_notification(&self.memory)?;
                return Ok(if more { Stopped::Turn } else { Stopped::NoBuffers });
            }
            match self.buffers.read_from(tap.as_fd(), &mut self.spill) {
                // No tap does that; a descriptor at its end would do nothing else any more.
                Ok(0) => return Ok(Stopped::TapGone),
                Ok(length) if length <= self.room => self.hand_back(length)?,
                Ok(_) => self.counters.rx_dropped.add(1),
                Err(error) => match Failure::of_read(&error) {
                    Failure::NotNow => return Ok(Stopped::TapEmpty),
                    Failure::Frame => self.counters.rx_dropped.add(1),
                    Failure::Gone => return Ok(Stopped::TapGone),
                },
            }
        }
        Ok(Stopped::Turn)
    }

    /// Takes chains from the queue until the largest frame fits, or there are no more; one chain if the
    /// guest cannot put several together. Answers whether there is any room.
    fn collect(&mut self) -> Result<bool, virtio_queue::Error> {
        // A guest that gives bad chains as fast as they come back does not keep the worker here.
        let mut patience = self.queue.queue.size();
        while patience > 0 && self.wants_chains() {
            patience -= 1;
            self.queue.queue.disable_notification(&self.memory)?;
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if self.queue.queue.enable_notification(&self.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            match self.buffers.add(chain, Part::Writable) {
                // The header lies in one chain (virtio 1.2, section 5.1.6.3.2).
                Ok(added) if added.length >= usize::from(HEADER_SIZE) => {
                    self.room += added.length;
                    self.waiting.push_back(Waiting { head, pieces: added.pieces, length: added.length });
                }
                Ok(added) => {
                    self.buffers.remove_last(added.pieces);
                    self.refuse(head)?;
                }
                Err(BadChain::TooManyPieces) if !self.waiting.is_empty() => {
                    // Its turn comes when those before it are used up.
                    self.queue.unpop();
                    break;
                }
                Err(error) => {
                    tracing::debug!(%error, "net: a receive buffer is returned empty");
                    self.refuse(head)?;
                }
            }
        }
        Ok(!self.waiting.is_empty())
    }

    fn wants_chains(&self) -> bool {
        self.waiting.is_empty() || self.merge && self.room < FRAME_MAX
    }

    fn refuse(&mut self, head: u16) -> Result<(), virtio_queue::Error> {
        self.counters.rx_dropped.add(1);
        self.queue.add_used(&self.memory, head, 0)
    }

    /// Gives the guest the frame that has been read into the first chains.
    fn hand_back(&mut self, length: usize) -> Result<(), virtio_queue::Error> {
        let mut rest = length;
        let mut pieces = 0;
        self.filled.clear();
        while rest > 0 {
            let Some(chain) = self.waiting.pop_front() else { break };
            let used = rest.min(chain.length);
            rest -= used;
            pieces += chain.pieces;
            self.room -= chain.length;
            // FRAME_MAX at most for each frame, because more is never read.
            self.filled.push((chain.head, u32::try_from(used).unwrap_or(u32::MAX)));
        }
        // The kernel leaves this field alone. Without merging it is 1 as well (virtio 1.2, section
        // 5.1.6.4.1). The guest looks at it only once it has the chains back.
        let count = u16::try_from(self.filled.len()).unwrap_or(u16::MAX);
        self.buffers.overwrite(NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        self.buffers.remove_first(pieces);
        self.queue.add_used_together(&self.memory, &self.filled)?;
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(length.saturating_sub(usize::from(HEADER_SIZE)) as u64);
        Ok(())
    }
}
