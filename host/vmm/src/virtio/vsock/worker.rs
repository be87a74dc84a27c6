//! The thread that moves packets between the guest's queues and the mux.

use std::{
    io,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::{
    mux::Mux,
    packet::{HEADER_SIZE, Header, PAYLOAD_MAX},
    token::Token,
};
use crate::{
    attack,
    memory::GuestMemory,
    thread_kind::ThreadKind,
    virtio::{ActiveQueue, Chain},
};

/// Most events handled before packets are moved.
const EVENT_BATCH: usize = 32;
/// Most packets moved one way before the other way, and host programs, have their turn.
const BATCH: usize = 64;
const PACKET_MAX: usize = HEADER_SIZE + PAYLOAD_MAX;

/// Serves the device's queues and sockets.
pub struct Worker {
    memory: GuestMemory,
    /// The receive queue: buffers for packets to the guest.
    receive: ActiveQueue,
    /// The transmit queue: packets from the guest.
    transmit: ActiveQueue,
    mux: Mux,
    /// Holds the packet that is being moved. A copy costs little beside the system calls on both sides, and makes the
    /// worker independent of how the guest cuts a packet into descriptors.
    packet: Box<[u8]>,
}

impl Worker {
    pub fn new(memory: GuestMemory, queues: [ActiveQueue; 3], mux: Mux, stop: &EventFd) -> io::Result<Self> {
        let [receive, transmit, _events] = queues;
        mux.wait_context().add(&receive.notified, Token::ReceiveQueue)?;
        mux.wait_context().add(&transmit.notified, Token::TransmitQueue)?;
        mux.wait_context().add(stop, Token::Stop)?;
        Ok(Self { memory, receive, transmit, mux, packet: vec![0; PACKET_MAX].into_boxed_slice() })
    }

    /// Serves until the stop event is written or the guest breaks a queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            attack::reached(ThreadKind::Vsock);
            let timeout = if more { Some(Duration::ZERO) } else { self.timeout() };
            match self.handle_events(timeout) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(%error, "vsock: cannot wait for events; the device stops");
                    return;
                }
            }
            if self.mux.next_deadline().is_some() {
                self.mux.close_expired(Instant::now());
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

    /// How long the worker may wait for an event: until a connection has to be closed. `None`: without a limit.
    fn timeout(&self) -> Option<Duration> {
        Some(self.mux.next_deadline()?.saturating_duration_since(Instant::now()))
    }

    /// Waits for events, at most for `timeout` (`None`: without a limit). Breaks when the worker is to stop.
    fn handle_events(&mut self, timeout: Option<Duration>) -> io::Result<ControlFlow<()>> {
        for event in self.mux.wait_context().wait::<EVENT_BATCH>(timeout)? {
            match event.token {
                Token::Stop => return Ok(ControlFlow::Break(())),
                // An error means that there was no notification after all.
                Token::ReceiveQueue => drop(self.receive.notified.read()),
                Token::TransmitQueue => drop(self.transmit.notified.read()),
                Token::Listener(listener) => self.mux.on_listener_event(listener),
                Token::Stream(id) => self.mux.on_stream_event(id, event.readiness()),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Moves some packets both ways. Returns whether there may be more without another event. An error means that the
    /// guest has broken a queue.
    fn move_packets(&mut self) -> Result<bool, virtio_queue::Error> {
        self.mux.accept_remaining();
        let more_from_guest = self.take_from_guest()?;
        let more_to_guest = self.give_to_guest()?;
        // While too many resets wait for the guest, its packets wait until it has taken some of them.
        Ok(more_from_guest && self.mux.can_take_packet() || more_to_guest || self.mux.has_unaccepted())
    }

    /// Takes a batch of the guest's packets. Returns whether there are more.
    fn take_from_guest(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut taken = 0;
        self.transmit.queue.disable_notification(&self.memory)?;
        while taken < BATCH && self.mux.can_take_packet() {
            let Some(chain) = self.transmit.pop(&self.memory)? else { break };
            let head = chain.head_index();
            match gather(&self.memory, chain, &mut self.packet) {
                Ok(length) => deliver_packet(&mut self.mux, &self.packet[..length]),
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

    /// Gives the guest a batch of packets. Returns whether there are more, and a buffer to put them into.
    fn give_to_guest(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut given = 0;
        let mut lacks_buffers = false;
        while given < BATCH && self.mux.has_output() {
            self.receive.queue.disable_notification(&self.memory)?;
            let Some(chain) = self.receive.pop(&self.memory)? else {
                if self.receive.queue.enable_notification(&self.memory)? {
                    continue;
                }
                lacks_buffers = true;
                break;
            };
            let head = chain.head_index();
            let room = writable_bytes(&chain).min(PACKET_MAX);
            let length = if room > HEADER_SIZE {
                let Some(header) = self.mux.next_packet(&mut self.packet[HEADER_SIZE..room]) else {
                    // There was no packet after all: the buffer stays available.
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
        Ok(!lacks_buffers && self.mux.has_output())
    }
}

/// Hands a packet from the guest to the mux, if its header is valid.
fn deliver_packet(mux: &mut Mux, packet: &[u8]) {
    let Some((header, payload)) = packet.split_first_chunk::<HEADER_SIZE>() else {
        tracing::debug!(length = packet.len(), "vsock: a packet without a header is dropped");
        return;
    };
    if let Some(header) = Header::from_guest(header) {
        mux.on_packet(&header, payload.get(..header.length as usize));
    } else {
        tracing::debug!("vsock: a packet to another address, or of another type, is dropped");
    }
}

/// Copies what the guest has put into a chain, up to the size of `buffer`. Returns the number of bytes.
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

/// Copies a packet into a chain with enough room for it. Returns the number of bytes that the guest may read: 0 if its
/// buffer lies outside memory.
fn scatter(memory: &GuestMemory, chain: Chain<'_>, packet: &[u8]) -> u32 {
    let mut rest = packet;
    for descriptor in chain.writable() {
        let (now, later) = rest.split_at(rest.len().min(descriptor.len() as usize));
        if let Err(error) = memory.write_slice(now, descriptor.addr()) {
            tracing::debug!(%error, "vsock: a buffer outside memory loses a packet");
            return 0;
        }
        rest = later;
    }
    let Ok(length) = u32::try_from(packet.len()) else {
        unreachable!("a packet has at most {PACKET_MAX} bytes")
    };
    length
}

#[cfg(test)]
#[path = "tests/mod.rs"]
mod tests;
