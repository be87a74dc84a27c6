//! The thread that moves packets between the guest's queues and the mux.

use std::io;

use virtio_queue::QueueT as _;
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
use vmm_sys_util::{
    epoll::{ControlOperation, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    GUEST_CID,
    connection::BUF_ALLOC,
    mux::Mux,
    packet::{Header, Operation, Ports},
};
use crate::{
    memory::GuestMemory,
    virtio::{Active, ActiveQueue},
};

const HOST_CID: u64 = 2;
const TYPE_STREAM: u16 = 1;

/// Epoll tokens of the worker's own descriptors; all below [`super::mux::FIRST_ID`].
const TOKEN_RECEIVE: u64 = 1;
const TOKEN_TRANSMIT: u64 = 2;
const TOKEN_STOP: u64 = 3;
const EVENTS: usize = 32;

pub struct Worker {
    memory: GuestMemory,
    /// Buffers that the guest gives for packets to it.
    receive: ActiveQueue,
    /// Packets from the guest.
    transmit: ActiveQueue,
    mux: Mux,
}

impl Worker {
    pub fn new(active: Active, mux: Mux, stop: &EventFd) -> io::Result<Worker> {
        use std::os::fd::AsRawFd as _;
        let Ok([receive, transmit, _events]) = <[ActiveQueue; 3]>::try_from(active.queues) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let watched = [(&receive.notified, TOKEN_RECEIVE), (&transmit.notified, TOKEN_TRANSMIT), (stop, TOKEN_STOP)];
        for (event, token) in watched {
            let interest = EpollEvent::new(EventSet::IN, token);
            mux.epoll().ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        Ok(Worker { memory: active.memory, receive, transmit, mux })
    }

    /// Serves until it is told to stop or the guest breaks a queue.
    pub fn run(mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = match self.mux.epoll().wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "vsock: cannot wait for events; the device stops");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    TOKEN_STOP => return,
                    TOKEN_RECEIVE => drop(self.receive.notified.read()),
                    TOKEN_TRANSMIT => drop(self.transmit.notified.read()),
                    token => self.mux.on_event(token, event.event_set()),
                }
            }
            if let Err(error) = self.move_packets() {
                tracing::warn!(%error, "vsock: the guest broke a queue; the device stops");
                return;
            }
        }
    }

    /// Moves packets both ways until neither has any, or no buffer to put it into.
    fn move_packets(&mut self) -> Result<(), virtio_queue::Error> {
        loop {
            let sent = self.transmit()?;
            let received = self.receive()?;
            if !sent && !received {
                return Ok(());
            }
        }
    }

    /// Takes the guest's packets. Answers whether there was one.
    fn transmit(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut any = false;
        loop {
            self.transmit.queue.disable_notification(&self.memory)?;
            while self.mux.accepts_packets() {
                let Some(mut chain) = self.transmit.queue.pop_descriptor_chain(&self.memory) else { break };
                any = true;
                let head = chain.head_index();
                match VsockPacket::from_tx_virtq_chain(&self.memory, &mut chain, BUF_ALLOC) {
                    Ok(packet) => {
                        if let Some(header) = header_of(&packet) {
                            self.mux.from_guest(&header, packet.data_slice());
                        }
                    }
                    Err(error) => tracing::debug!(%error, "vsock: malformed packet dropped"),
                }
                self.transmit.add_used(&self.memory, head, 0)?;
            }
            // With the list of resets full, the rest waits for room in the receive queue.
            let more = self.transmit.queue.enable_notification(&self.memory)?;
            if !more || !self.mux.accepts_packets() {
                break;
            }
        }
        if any {
            self.transmit.signal(&self.memory)?;
        }
        Ok(any)
    }

    /// Gives the guest what is there for it. Answers whether there was anything.
    fn receive(&mut self) -> Result<bool, virtio_queue::Error> {
        let mut any = false;
        while self.mux.has_output() {
            self.receive.queue.disable_notification(&self.memory)?;
            let Some(mut chain) = self.receive.queue.pop_descriptor_chain(&self.memory) else {
                if self.receive.queue.enable_notification(&self.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let length = match VsockPacket::from_rx_virtq_chain(&self.memory, &mut chain, BUF_ALLOC) {
                Ok(mut packet) => {
                    let filled = packet.data_slice().and_then(|data| self.mux.to_guest(data));
                    let Some(header) = filled else {
                        // Nothing after all: the buffer stays available.
                        let next = self.receive.queue.next_avail();
                        self.receive.queue.set_next_avail(next.wrapping_sub(1));
                        break;
                    };
                    write_header(&mut packet, &header);
                    PKT_HEADER_SIZE as u32 + header.length
                }
                Err(error) => {
                    tracing::debug!(%error, "vsock: unusable buffer returned");
                    0
                }
            };
            any = true;
            self.receive.add_used(&self.memory, head, length)?;
        }
        if any {
            self.receive.signal(&self.memory)?;
        }
        Ok(any)
    }
}

/// The header of a packet from the guest, if it is one that a guest of ours may send.
fn header_of<B: vm_memory::bitmap::BitmapSlice>(packet: &VsockPacket<'_, B>) -> Option<Header> {
    let addressed = packet.src_cid() == GUEST_CID && packet.dst_cid() == HOST_CID && packet.type_() == TYPE_STREAM;
    let operation = Operation::from_number(packet.op()).filter(|_| addressed)?;
    Some(Header {
        ports: Ports { host: packet.dst_port(), guest: packet.src_port() },
        operation,
        length: packet.len(),
        flags: packet.flags(),
        buf_alloc: packet.buf_alloc(),
        fwd_cnt: packet.fwd_cnt(),
    })
}

fn write_header<B: vm_memory::bitmap::BitmapSlice>(packet: &mut VsockPacket<'_, B>, header: &Header) {
    packet
        .set_src_cid(HOST_CID)
        .set_dst_cid(GUEST_CID)
        .set_src_port(header.ports.host)
        .set_dst_port(header.ports.guest)
        .set_type(TYPE_STREAM)
        .set_op(header.operation.number())
        .set_flags(header.flags)
        .set_len(header.length)
        .set_buf_alloc(header.buf_alloc)
        .set_fwd_cnt(header.fwd_cnt);
}
