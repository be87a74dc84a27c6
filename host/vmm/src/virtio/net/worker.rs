//! The thread that moves frames between a tap and the guest's queues.

use std::{collections::VecDeque, io, ops::ControlFlow, os::fd::AsRawFd as _};

use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{Counters, feature, tap::Tap};
use crate::{
    memory::GuestMemory,
    virtio::{Active, ActiveQueue, Chain},
};

/// Size of `virtio_net_hdr_v1`, which every frame has in front of it on either side.
pub const HEADER_SIZE: usize = 12;
/// Where the number of buffers that a received frame fills is in it.
const NUM_BUFFERS: u64 = 10;
/// The largest frame there is, with its header: a TCP segment of 64 KiB that the guest or the host will
/// cut (virtio 1.2, section 5.1.6.3.1).
const FRAME_MAX: usize = 65550 + HEADER_SIZE;
/// The smallest frame that means anything: an Ethernet header.
const FRAME_MIN: usize = 14 + HEADER_SIZE;
/// Frames moved one way before the other way has its turn.
const BATCH: usize = 64;

const TOKEN_RECEIVE: u64 = 1;
const TOKEN_TRANSMIT: u64 = 2;
const TOKEN_TAP: u64 = 3;
const TOKEN_STOP: u64 = 4;
const EVENTS: usize = 4;

/// A part of the guest's memory, for the kernel to read or write.
type Part = libc::iovec;

/// A chain of the guest's that waits for a frame.
struct Buffer {
    head: u16,
    /// Where its first descriptor is, which holds the header.
    start: GuestAddress,
    /// Bytes that fit into it.
    length: usize,
    parts: usize,
}

/// What a device's thread does next about the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TapState {
    /// It is used.
    Open,
    /// It has been removed from the host. The guest sees a link on which nothing happens.
    Gone,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts about three parties")]
pub struct Worker {
    memory: GuestMemory,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    tap: Tap,
    tap_state: TapState,
    /// What is waited for on the tap.
    interest: EventSet,
    /// The tap may have a frame for the guest.
    readable: bool,
    /// The tap takes frames.
    writable: bool,
    /// Whether a frame may fill several buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    /// Taken from the receive queue and not yet filled.
    buffers: VecDeque<Buffer>,
    /// The parts of all of them, in order.
    parts: VecDeque<Part>,
    /// Buffers have been given back since the guest was last told.
    returned: bool,
    /// Several of them at once.
    merged: bool,
    counters: Counters,
    epoll: Epoll,
}

// SAFETY: the pointers in `parts` lead into `memory`, which the worker owns a share of and which stays
// mapped as long as that lives; nobody else has these copies of them.
unsafe impl Send for Worker {}

impl Worker {
    pub fn new(active: Active, tap: Tap, counters: Counters, stop: &EventFd) -> io::Result<Worker> {
        let Ok([receive, transmit]) = <[ActiveQueue; 2]>::try_from(active.queues) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let epoll = Epoll::new()?;
        let watched = [
            (receive.notified.as_raw_fd(), EventSet::IN, TOKEN_RECEIVE),
            (transmit.notified.as_raw_fd(), EventSet::IN, TOKEN_TRANSMIT),
            (stop.as_raw_fd(), EventSet::IN, TOKEN_STOP),
            (tap.as_raw_fd(), EventSet::empty(), TOKEN_TAP),
        ];
        for (fd, events, token) in watched {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))?;
        }
        Ok(Worker {
            memory: active.memory,
            receive,
            transmit,
            tap,
            tap_state: TapState::Open,
            interest: EventSet::empty(),
            readable: true,
            writable: true,
            mergeable: active.features & feature::MRG_RXBUF != 0,
            buffers: VecDeque::new(),
            parts: VecDeque::new(),
            returned: false,
            merged: false,
            counters,
            epoll,
        })
    }

    /// Serves until it is told to stop or the guest breaks a queue.
    pub fn run(mut self) {
        loop {
            let more = match self.move_frames() {
                Ok(more) => more,
                Err(error) => {
                    tracing::warn!(%error, "net: the guest broke a queue; the device stops");
                    return;
                }
            };
            match self.wait(if more { 0 } else { -1 }) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(%error, "net: cannot wait for frames; the device stops");
                    return;
                }
            }
        }
    }

    /// Waits for at most `patience` milliseconds (-1: for ever). Breaks when it is time to stop.
    fn wait(&mut self, patience: i32) -> io::Result<ControlFlow<()>> {
        self.watch_tap()?;
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(patience, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                TOKEN_STOP => return Ok(ControlFlow::Break(())),
                // An error means that the other of two events was faster to be read.
                TOKEN_RECEIVE => drop(self.receive.notified.read()),
                TOKEN_TRANSMIT => drop(self.transmit.notified.read()),
                _ => {
                    let set = event.event_set();
                    // Errors and hang-ups show when it is read.
                    self.readable |= set.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                    self.writable |= set.contains(EventSet::OUT);
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Watches the tap only for what would be used: level-triggered events of no use would not let the
    /// thread sleep.
    fn watch_tap(&mut self) -> io::Result<()> {
        let mut wanted = EventSet::empty();
        if self.tap_state == TapState::Open {
            wanted.set(EventSet::IN, !self.readable);
            wanted.set(EventSet::OUT, !self.writable);
        }
        if wanted != self.interest {
            let fd = self.tap.as_raw_fd();
            if self.tap_state == TapState::Gone {
                // Its hang-up would be told for ever.
                self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
            } else {
                self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(wanted, TOKEN_TAP))?;
            }
            self.interest = wanted;
        }
        Ok(())
    }

    /// Moves some frames both ways. Answers whether there may be more without another event.
    fn move_frames(&mut self) -> Result<bool, virtio_queue::Error> {
        let more_from_guest = self.transmit()?;
        let more_to_guest = self.receive()?;
        Ok(more_from_guest || more_to_guest)
    }

    /// Takes a batch of the guest's frames. Answers whether there are more that the tap would take.
    fn transmit(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut taken = 0;
        if !self.writable {
            return Ok(false);
        }
        self.transmit.queue.disable_notification(&self.memory)?;
        while taken < BATCH {
            let Some(chain) = self.transmit.pop(&self.memory)? else { break };
            let head = chain.head_index();
            let mut parts = Vec::new();
            let length = collect(&self.memory, chain, false, &mut parts).unwrap_or(0);
            // The header goes to the kernel as the guest wrote it: a tap checks it, as it is made for
            // programs that are not trusted.
            if !(FRAME_MIN..=FRAME_MAX).contains(&length) || self.tap_state == TapState::Gone {
                self.counters.tx_dropped.add(1);
            } else {
                match write(&self.tap, &parts) {
                    Ok(written) => {
                        self.counters.tx_packets.add(1);
                        self.counters.tx_bytes.add(written.saturating_sub(HEADER_SIZE) as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.transmit.unpop();
                        self.writable = false;
                        break;
                    }
                    Err(error) => {
                        self.counters.tx_dropped.add(1);
                        self.note(&error);
                    }
                }
            }
            self.transmit.add_used(&self.memory, head, 0)?;
            taken += 1;
        }
        let more = self.transmit.queue.enable_notification(&self.memory)?;
        if taken > 0 {
            self.transmit.signal(&self.memory)?;
        }
        Ok(more && self.writable)
    }

    /// Gives the guest a batch of frames. Answers whether there may be more, and room for them.
    fn receive(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut given = 0;
        let mut starved = false;
        while given < BATCH && self.readable && self.tap_state == TapState::Open {
            self.gather()?;
            if self.buffers.is_empty() {
                starved = true;
                break;
            }
            match read(&self.tap, self.parts.make_contiguous()) {
                Ok(length) => {
                    self.hand_over(length)?;
                    given += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Too large for the buffers that the guest gives: the kernel has dropped it.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL)) => {
                    self.counters.rx_dropped.add(1);
                    given += 1;
                }
                Err(error) => self.note(&error),
            }
        }
        if std::mem::take(&mut self.returned) {
            self.receive.signal(&self.memory)?;
        }
        if std::mem::take(&mut self.merged) {
            self.receive.interrupt.used_buffer();
        }
        Ok(!starved && self.readable && self.tap_state == TapState::Open)
    }

    /// Takes buffers from the guest until the largest frame fits, or there are no more.
    fn gather(&mut self) -> Result<(), virtio_queue::Error> {
        let mut room: usize = self.buffers.iter().map(|buffer| buffer.length).sum();
        let enough = |buffers: usize, room: usize, mergeable: bool| {
            if mergeable { room >= FRAME_MAX } else { buffers >= 1 }
        };
        while !enough(self.buffers.len(), room, self.mergeable) {
            self.receive.queue.disable_notification(&self.memory)?;
            let Some(chain) = self.receive.pop(&self.memory)? else {
                if self.receive.queue.enable_notification(&self.memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let first = chain.clone().writable().next();
            let mut parts = Vec::new();
            let length = collect(&self.memory, chain, true, &mut parts);
            match (first, length) {
                (Some(first), Some(length)) if first.len() as usize >= HEADER_SIZE => {
                    self.buffers.push_back(Buffer { head, start: first.addr(), length, parts: parts.len() });
                    self.parts.extend(parts);
                    room += length;
                }
                // Outside memory, or no room even for the header: given back as it is.
                _ => {
                    self.counters.rx_dropped.add(1);
                    self.receive.add_used(&self.memory, head, 0)?;
                    self.returned = true;
                }
            }
        }
        Ok(())
    }

    /// Gives the guest the buffers that a frame has filled.
    fn hand_over(&mut self, length: usize) -> Result<(), virtio_queue::Error> {
        let Some(start) = self.buffers.front().map(|buffer| buffer.start) else { return Ok(()) };
        let mut rest = length;
        let mut used = Vec::new();
        while let Some(buffer) = self.buffers.pop_front() {
            self.parts.drain(..buffer.parts);
            let filled = rest.min(buffer.length);
            rest -= filled;
            used.push((buffer.head, u32::try_from(filled).unwrap_or(0)));
            if rest == 0 {
                break;
            }
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX).to_le_bytes();
        // It lies inside memory: the header was just written around it.
        let _ = self.memory.write_slice(&count, GuestAddress(start.0.saturating_add(NUM_BUFFERS)));
        self.receive.add_used_together(&self.memory, &used)?;
        self.merged |= used.len() > 1;
        self.returned = true;
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(length.saturating_sub(HEADER_SIZE) as u64);
        Ok(())
    }

    /// An error of the tap that is not about one frame means that it is gone, once and for all.
    fn note(&mut self, error: &io::Error) {
        let gone =
            matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EIO | libc::ENODEV | libc::ENXIO));
        if gone && self.tap_state == TapState::Open {
            tracing::warn!(%error, "net: the tap has been removed from the host");
            self.tap_state = TapState::Gone;
        } else if !gone {
            tracing::debug!(%error, "net: the tap refuses a frame");
        }
    }
}

/// Adds the parts of a chain that the device reads, or writes. Answers how many bytes they are; `None`
/// if one of them lies outside memory.
fn collect(memory: &GuestMemory, chain: Chain<'_>, writable: bool, parts: &mut Vec<Part>) -> Option<usize> {
    let mut length = 0usize;
    for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == writable) {
        let size = descriptor.len() as usize;
        if size == 0 {
            continue;
        }
        // Refused if it is not wholly inside one region of memory.
        let slice = memory.get_slice(descriptor.addr(), size).ok()?;
        parts.push(Part { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: size });
        length = length.checked_add(size)?;
    }
    Some(length)
}

/// The kernel's limit of parts (`UIO_MAXIOV`). A chain has no more descriptors than the queue entries, so a
/// frame never comes near; what is beyond is not used.
const PARTS_MAX: usize = 1024;

fn read(tap: &Tap, parts: &mut [Part]) -> io::Result<usize> {
    let count = i32::try_from(parts.len().min(PARTS_MAX)).unwrap_or(0);
    // SAFETY: each part lies inside guest memory, which is mapped as long as the worker lives and which
    // the guest expects the device to write; its content is only bytes.
    let result = unsafe { libc::readv(tap.as_raw_fd(), parts.as_ptr(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn write(tap: &Tap, parts: &[Part]) -> io::Result<usize> {
    let count = i32::try_from(parts.len().min(PARTS_MAX)).unwrap_or(0);
    // SAFETY: each part lies inside guest memory, which is mapped as long as the worker lives.
    let result = unsafe { libc::writev(tap.as_raw_fd(), parts.as_ptr(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
