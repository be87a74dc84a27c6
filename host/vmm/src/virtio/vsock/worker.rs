//! The thread that moves packets between the guest's queues and the mux.

use std::{
    io,
    ops::ControlFlow,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestMemoryError};
use vmm_sys_util::{
    epoll::{ControlOperation, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    mux::Mux,
    packet::{HEADER_SIZE, Header, PAYLOAD_MAX},
};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain},
};

/// Epoll tokens of the worker's own descriptors; all below [`super::mux::FIRST_ID`].
const TOKEN_RECEIVE: u64 = 1;
const TOKEN_TRANSMIT: u64 = 2;
const TOKEN_STOP: u64 = 3;
const EVENTS: usize = 32;
/// Packets moved one way before the other way, and host programs, have their turn.
const BATCH: usize = 64;
const PACKET_MAX: usize = HEADER_SIZE + PAYLOAD_MAX;

pub struct Worker {
    memory: GuestMemory,
    /// Buffers that the guest gives for packets to it.
    receive: ActiveQueue,
    /// Packets from the guest.
    transmit: ActiveQueue,
    mux: Mux,
    /// Holds one packet on its way. A copy costs little beside the system calls on both sides, and
    /// makes the worker independent of how the guest cuts a packet into descriptors.
    packet: Box<[u8]>,
}

impl Worker {
    pub fn new(
        memory: GuestMemory,
        queues: [ActiveQueue; 3],
        mux: Mux,
        stop: &EventFd,
    ) -> io::Result<Worker> {
        let [receive, transmit, _events] = queues;
        let watched =
            [(&receive.notified, TOKEN_RECEIVE), (&transmit.notified, TOKEN_TRANSMIT), (stop, TOKEN_STOP)];
        for (event, token) in watched {
            let interest = EpollEvent::new(EventSet::IN, token);
            mux.epoll().ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        Ok(Worker { memory, receive, transmit, mux, packet: vec![0; PACKET_MAX].into_boxed_slice() })
    }

    /// Serves until it is told to stop or the guest breaks a queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            let patience = if more { Some(0) } else { self.patience() };
            match self.handle_events(patience.unwrap_or(-1)) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(%error, "vsock: cannot wait for events; the device stops");
                    return;
                }
            }
            if self.mux.deadline().is_some() {
                self.mux.expire(Instant::now());
            }
            more = match self.move_packets() {
                Ok(more) => more,
                Err(error) => {
                    tracing::warn!(%error, "vsock: the guest broke a queue; the device stops");
                    return;
                }
            };
        }
    }

    /// How many milliseconds may pass without an event: until a connection has to be ended. `None`: any number.
    fn patience(&self) -> Option<i32> {
        let left = self.mux.deadline()?.saturating_duration_since(Instant::now());
        // Rounded up, so that the time is up when the wait is.
        let left = (left + Duration::from_micros(999)).as_millis();
        Some(i32::try_from(left).unwrap_or(i32::MAX))
    }

    /// Waits for at most `patience` milliseconds (-1: for ever). Breaks when it is time to stop.
    fn handle_events(&mut self, patience: i32) -> io::Result<ControlFlow<()>> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.mux.epoll().wait(patience, &mut events) {
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
                token => self.mux.on_event(token, event.event_set()),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Moves some packets both ways. Answers whether there may be more without another event.
    fn move_packets(&mut self) -> Result<bool, virtio_queue::Error> {
        self.mux.accept_more();
        let more_from_guest = self.transmit()?;
        let more_to_guest = self.receive()?;
        // With the list of resets full, the guest's packets wait until it has taken some of them.
        Ok(more_from_guest && self.mux.accepts_packets() || more_to_guest || self.mux.accepts_more())
    }

    /// Takes a batch of the guest's packets. Answers whether there are more.
    fn transmit(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut taken = 0;
        self.transmit.queue.disable_notification(&self.memory)?;
        while taken < BATCH && self.mux.accepts_packets() {
            let Some(chain) = self.transmit.pop(&self.memory)? else { break };
            let head = chain.head_index();
            match gather(&self.memory, chain, &mut self.packet) {
                Ok(length) => take(&mut self.mux, &self.packet[..length]),
                Err(error) => tracing::debug!(%error, "vsock: a packet outside memory is dropped"),
            }
            self.transmit.add_used(&self.memory, head, 0)?;
            taken += 1;
        }
        let more = self.transmit.queue.enable_notification(&self.memory)?;
        if taken > 0 {
            self.transmit.signal(&self.memory)?;
        }
        Ok(more)
    }

    /// Gives the guest a batch of what is there for it. Answers whether there is more, and a buffer
    /// to put it into.
    fn receive(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut given = 0;
        let mut starved = false;
        while given < BATCH && self.mux.has_output() {
            self.receive.queue.disable_notification(&self.memory)?;
            let Some(chain) = self.receive.pop(&self.memory)? else {
                if self.receive.queue.enable_notification(&self.memory)? {
                    continue;
                }
                starved = true;
                break;
            };
            let head = chain.head_index();
            let room = writable_bytes(&chain).min(PACKET_MAX);
            let length = if room > HEADER_SIZE {
                let Some(header) = self.mux.next_packet(&mut self.packet[HEADER_SIZE..room]) else {
                    // Nothing after all: the buffer stays available.
                    self.receive.unpop();
                    break;
                };
                self.packet[..HEADER_SIZE].copy_from_slice(&header.to_guest());
                scatter(&self.memory, chain, &self.packet[..HEADER_SIZE + header.length as usize])
            } else {
                tracing::debug!(room, "vsock: a buffer that is too small is returned empty");
                0
            };
            self.receive.add_used(&self.memory, head, length)?;
            given += 1;
        }
        if given > 0 {
            self.receive.signal(&self.memory)?;
        }
        Ok(!starved && self.mux.has_output())
    }
}

/// Hands a packet from the guest to the mux, if it is one at all.
fn take(mux: &mut Mux, packet: &[u8]) {
    let Some((header, payload)) = packet.split_first_chunk::<HEADER_SIZE>() else {
        tracing::debug!(length = packet.len(), "vsock: a packet without a header is dropped");
        return;
    };
    if let Some(header) = Header::from_guest(header) {
        mux.take_packet(&header, payload.get(..header.length as usize));
    } else {
        tracing::debug!("vsock: a packet to another address, or of another type, is dropped");
    }
}

/// Copies what the guest has put into a chain, as far as it fits.
fn gather(memory: &GuestMemory, chain: Chain<'_>, buffer: &mut [u8]) -> Result<usize, GuestMemoryError> {
    let mut filled = 0;
    for descriptor in chain.readable() {
        let length = (buffer.len() - filled).min(descriptor.len() as usize);
        memory.read_slice(&mut buffer[filled..filled + length], descriptor.addr())?;
        filled += length;
    }
    Ok(filled)
}

fn writable_bytes(chain: &Chain<'_>) -> usize {
    chain.clone().writable().map(|descriptor| descriptor.len() as usize).sum()
}

/// Copies a packet into a chain with enough room for it. Answers with the number of bytes that the
/// guest may read: none if its buffer lies outside memory.
fn scatter(memory: &GuestMemory, chain: Chain<'_>, packet: &[u8]) -> u32 {
    let mut rest = packet;
    for descriptor in chain.writable() {
        let (part, after) = rest.split_at(rest.len().min(descriptor.len() as usize));
        if let Err(error) = memory.write_slice(part, descriptor.addr()) {
            tracing::debug!(%error, "vsock: a buffer outside memory loses a packet");
            return 0;
        }
        rest = after;
    }
    // PACKET_MAX at most.
    u32::try_from(packet.len()).unwrap_or(0)
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
