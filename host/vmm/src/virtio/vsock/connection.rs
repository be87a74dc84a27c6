//! One stream between a host program's socket and the guest, with flow control both ways (virtio 1.2, section
//! 5.10.6.3).

use std::{collections::VecDeque, num::Wrapping, os::fd::OwnedFd, time::Instant};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::{
    connection_limits::ConnectionPermit,
    packet::{Header, Operation, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    port_forward,
};

/// Bytes that the guest may send before the host program has taken them. This is also the most that one connection can
/// make this process hold.
pub const BUF_ALLOC: u32 = 128 * 1024;

/// The states of a connection.
///
/// ```text
///  to the guest ──▶ Requested ──response──▶ Established ◀── from the guest
///                       │                        │
///                       └──── the guest resets ──┤
///                                                ├── bytes for the host are left ──▶ Draining
///                                                ▼                                      │
///                                             Closed ◀──────── all are written ─────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host side has asked for the connection; the guest has not responded.
    Requested,
    /// Both sides may send.
    Established,
    /// The guest has reset the connection; what it sent before is still being written to the host program.
    Draining,
    /// Nothing is left to do: the mux removes the connection.
    Closed,
}

/// One stream.
#[allow(clippy::struct_excessive_bools)] // Independent facts; those that exclude one another are in `state`.
pub struct Connection {
    pub ports: Ports,
    pub state: State,
    /// Whether the mux has the connection in its queue of those that have packets for the guest.
    pub in_ready_queue: bool,
    /// When the mux closes the connection whatever the guest does. Set once it is [`is_closing`](Self::is_closing).
    pub close_deadline: Option<Instant>,
    _permit: ConnectionPermit,
    /// A unix or TCP socket: non-blocking, watched edge-triggered.
    stream: OwnedFd,
    /// Bytes for the guest that go before the host program's data.
    preamble: VecDeque<u8>,
    /// Whether the guest has yet to send [`port_forward::REACHED`].
    awaits_reached_byte: bool,

    /// Whether the socket may have something to read.
    readable: bool,
    /// Whether the host program has closed both directions.
    host_hung_up: bool,
    /// Whether the end of the host program's data has been read.
    host_finished: bool,
    /// Whether the host program has been told that the guest sends no more.
    host_write_shut_down: bool,
    /// What the guest has said it will not do any more: [`SHUTDOWN_SEND`], [`SHUTDOWN_RECEIVE`].
    guest_finished: u32,

    /// Bytes from the guest that the socket has not taken yet, at most [`BUF_ALLOC`].
    host_backlog: VecDeque<u8>,
    /// Bytes from the guest that were written to the socket: our `fwd_cnt`.
    bytes_to_host: Wrapping<u32>,
    /// The value of `bytes_to_host` that the guest was last sent.
    bytes_to_host_announced: Wrapping<u32>,

    /// Size in bytes of the guest's receive buffer.
    peer_buf_alloc: u32,
    /// Bytes that the guest has taken out of its receive buffer.
    peer_fwd_cnt: Wrapping<u32>,
    /// Bytes of payload that were sent to the guest.
    bytes_to_guest: Wrapping<u32>,

    pending_control: PendingControl,
}

/// The packets without payload that are still to be sent to the guest. Each is a flag, so that no guest can make a
/// connection accumulate them.
#[allow(clippy::struct_excessive_bools)]
#[derive(Default)]
struct PendingControl {
    request: bool,
    response: bool,
    reset: bool,
    /// Flags of the SHUTDOWN packet; 0 if there is none to send.
    shutdown: u32,
    credit_update: bool,
    credit_request: bool,
    /// Whether a request for credit was sent and the guest has given none since. Until then there is not another: a
    /// guest whose program does not read responds to each at once, without any credit.
    credit_request_outstanding: bool,
}

impl Connection {
    /// A connection that a host program makes to a port of the guest.
    pub fn to_guest(ports: Ports, stream: impl Into<OwnedFd>, permit: ConnectionPermit) -> Self {
        let control = PendingControl { request: true, ..PendingControl::default() };
        Self::new(ports, stream.into(), State::Requested, control, permit)
    }

    /// A connection to `port` of the pod's localhost, which the guest is to connect to: see [`port_forward`].
    pub fn port_forward(
        ports: Ports,
        stream: impl Into<OwnedFd>,
        port: u16,
        permit: ConnectionPermit,
    ) -> Self {
        Self {
            preamble: port_forward::preamble(port).into(),
            awaits_reached_byte: true,
            ..Self::to_guest(ports, stream, permit)
        }
    }

    /// A connection that the guest makes to a host port. `stream` is connected to the program that serves the port.
    pub fn from_guest(request: &Header, stream: impl Into<OwnedFd>, permit: ConnectionPermit) -> Self {
        let control = PendingControl { response: true, ..PendingControl::default() };
        let mut connection = Self::new(request.ports, stream.into(), State::Established, control, permit);
        connection.update_peer_credit(request);
        connection
    }

    fn new(
        ports: Ports,
        stream: OwnedFd,
        state: State,
        pending_control: PendingControl,
        permit: ConnectionPermit,
    ) -> Self {
        Self {
            ports,
            state,
            in_ready_queue: false,
            close_deadline: None,
            _permit: permit,
            stream,
            preamble: VecDeque::new(),
            awaits_reached_byte: false,
            readable: true,
            host_hung_up: false,
            host_finished: false,
            host_write_shut_down: false,
            guest_finished: 0,
            host_backlog: VecDeque::new(),
            bytes_to_host: Wrapping(0),
            bytes_to_host_announced: Wrapping(0),
            peer_buf_alloc: 0,
            peer_fwd_cnt: Wrapping(0),
            bytes_to_guest: Wrapping(0),
            pending_control,
        }
    }

    /// Handles an event of the socket: it has something to read, or its end. `hung_up`: the host program has closed
    /// both directions.
    pub fn on_readable(&mut self, hung_up: bool) {
        self.readable = true;
        if hung_up && !self.host_hung_up {
            self.host_hung_up = true;
            match self.state {
                // The host program did not wait for the guest's response.
                State::Requested => self.pending_control.reset = true,
                State::Established if self.host_finished || self.guest_finished & SHUTDOWN_RECEIVE != 0 => {
                    self.pending_control.shutdown |= SHUTDOWN_BOTH;
                }
                // What the host program sent before it hung up is read first.
                State::Established | State::Closed => {}
                State::Draining => self.state = State::Closed,
            }
        }
    }

    /// Handles an event of the socket: it takes bytes again.
    pub fn on_writable(&mut self) {
        while !self.host_backlog.is_empty() {
            let (first, _) = self.host_backlog.as_slices();
            match send(&self.stream, first, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.host_backlog.drain(..count);
                    self.count_bytes_to_host(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.on_host_write_error();
                    return;
                }
            }
        }
        // Frees the buffer too: a connection that once was slow does not keep its memory.
        self.host_backlog = VecDeque::new();
        self.finish_if_flushed();
    }

    /// Whether [`next_packet`](Self::next_packet) may have a packet for the guest.
    pub fn has_output(&self) -> bool {
        let control = &self.pending_control;
        match self.state {
            State::Closed | State::Draining => false,
            State::Requested => control.request || control.reset,
            State::Established => {
                control.response
                    || control.reset
                    || control.shutdown != 0
                    || control.credit_update
                    || control.credit_request
                    || self.may_read()
            }
        }
    }

    /// Whether nothing is left to do except to tell the guest of the connection's end and wait for its reset. As long
    /// as there are bytes for the guest that a host program sent before it hung up, this is not so, however long the
    /// guest takes to read them.
    pub fn is_closing(&self) -> bool {
        let finished = self.host_finished || self.guest_finished & SHUTDOWN_RECEIVE != 0;
        match self.state {
            State::Requested | State::Established => {
                self.pending_control.reset || self.host_hung_up && finished
            }
            State::Draining | State::Closed => false,
        }
    }

    fn may_read(&self) -> bool {
        self.readable
            && !self.host_finished
            && self.guest_finished & SHUTDOWN_RECEIVE == 0
            && (self.peer_credit() > 0 || !self.pending_control.credit_request_outstanding)
    }

    /// Bytes that the guest has room for. Saturates, as both numbers are the guest's: one that claims to have read more
    /// than it was sent gets nothing.
    fn peer_credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub((self.bytes_to_guest - self.peer_fwd_cnt).0)
    }

    /// Returns the next packet for the guest, and reads its payload into the start of `data`.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if matches!(self.state, State::Closed | State::Draining) {
            return None;
        }
        if self.pending_control.reset {
            self.state = State::Closed;
            return Some(self.header(Operation::Reset, 0, 0));
        }
        if std::mem::take(&mut self.pending_control.request) {
            return Some(self.header(Operation::Request, 0, 0));
        }
        if self.state == State::Requested {
            return None;
        }
        if std::mem::take(&mut self.pending_control.response) {
            return Some(self.header(Operation::Response, 0, 0));
        }
        if self.may_read()
            && let Some(header) = self.read(data)
        {
            return Some(header);
        }
        match std::mem::take(&mut self.pending_control.shutdown) {
            0 => {}
            flags => return Some(self.header(Operation::Shutdown, 0, flags)),
        }
        if std::mem::take(&mut self.pending_control.credit_request) {
            return Some(self.header(Operation::CreditRequest, 0, 0));
        }
        // The credit update is last, because every other packet carries the same numbers.
        if std::mem::take(&mut self.pending_control.credit_update) {
            return Some(self.header(Operation::CreditUpdate, 0, 0));
        }
        None
    }

    /// Reads from the host program as much as the guest has room for.
    fn read(&mut self, data: &mut [u8]) -> Option<Header> {
        let credit = self.peer_credit();
        if credit == 0 {
            self.pending_control.credit_request_outstanding = true;
            self.pending_control.credit_request = true;
            return None;
        }
        let room = data.len().min(credit as usize);
        if !self.preamble.is_empty() {
            let bytes = self.preamble.drain(..room.min(self.preamble.len()));
            let length = bytes.zip(data).map(|(byte, target)| *target = byte).count();
            return Some(self.data_header(length));
        }
        match recv(&self.stream, &mut data[..room], RecvFlags::empty()) {
            Ok((_, 0)) => {
                self.host_finished = true;
                let flags = if self.host_hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                self.pending_control.shutdown |= flags;
                None
            }
            Ok((_, length)) => Some(self.data_header(length)),
            Err(Errno::AGAIN) => {
                self.readable = false;
                None
            }
            // `readable` stays set, so that the mux calls again.
            Err(Errno::INTR) => None,
            Err(_) => {
                self.state = State::Closed;
                Some(self.header(Operation::Reset, 0, 0))
            }
        }
    }

    fn data_header(&mut self, length: usize) -> Header {
        let length = byte_count(length);
        self.bytes_to_guest += length;
        self.header(Operation::ReadWrite, length, 0)
    }

    fn header(&mut self, operation: Operation, length: u32, flags: u32) -> Header {
        self.bytes_to_host_announced = self.bytes_to_host;
        self.pending_control.credit_update = false;
        Header {
            ports: self.ports,
            operation,
            length,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.bytes_to_host.0,
        }
    }

    /// Handles a packet from the guest. `data` is its payload; `None` if the guest did not supply as many bytes as the
    /// header says.
    pub fn on_packet(&mut self, header: &Header, data: Option<&[u8]>) {
        self.update_peer_credit(header);
        match (self.state, header.operation) {
            (State::Requested, Operation::Response) => self.on_response(),
            (_, Operation::Reset) => self.on_guest_reset(),
            (State::Established, Operation::ReadWrite) => match data {
                Some(data) => self.on_data(data),
                None => self.pending_control.reset = true,
            },
            (State::Established, Operation::Shutdown) => {
                self.guest_finished |= header.flags & SHUTDOWN_BOTH;
                self.finish_if_flushed();
            }
            (State::Established, Operation::CreditRequest) => self.pending_control.credit_update = true,
            (State::Established, Operation::CreditUpdate) => {}
            // All other packets have no meaning in their state: the two sides disagree.
            _ => self.pending_control.reset = true,
        }
    }

    fn update_peer_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.peer_credit() > 0 {
            self.pending_control.credit_request_outstanding = false;
        }
    }

    fn on_response(&mut self) {
        self.state = State::Established;
        if self.awaits_reached_byte {
            return;
        }
        // Nothing has been written to this socket yet, so either the whole line fits or the other end is gone.
        let line = format!("OK {}\n", self.ports.host);
        if send(&self.stream, line.as_bytes(), SendFlags::NOSIGNAL) != Ok(line.len()) {
            self.pending_control.reset = true;
        }
    }

    /// Takes [`port_forward::REACHED`] off the first data of a forwarded connection and returns the rest. `None` if the
    /// guest has sent another byte, or the client is gone.
    fn strip_reached_byte<'a>(&mut self, data: &'a [u8]) -> Option<&'a [u8]> {
        let Some((first, rest)) = data.split_first() else { return Some(data) };
        if *first != port_forward::REACHED || port_forward::set_reset_on_close(&self.stream, false).is_err() {
            return None;
        }
        self.awaits_reached_byte = false;
        self.count_bytes_to_host(1);
        Some(rest)
    }

    /// Writes data from the guest to the host program, and keeps what its socket does not take.
    fn on_data(&mut self, data: &[u8]) {
        let is_beyond_credit = self.host_backlog.len() + data.len() > BUF_ALLOC as usize;
        if self.guest_finished & SHUTDOWN_SEND != 0 || is_beyond_credit {
            self.pending_control.reset = true;
            return;
        }
        let mut rest = data;
        if self.awaits_reached_byte {
            let Some(after) = self.strip_reached_byte(data) else {
                self.pending_control.reset = true;
                return;
            };
            rest = after;
        }
        while self.host_backlog.is_empty() && !rest.is_empty() {
            match send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    rest = &rest[count..];
                    self.count_bytes_to_host(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.on_host_write_error();
                    return;
                }
            }
        }
        self.host_backlog.extend(rest);
    }

    /// Handles a socket that takes no more bytes: the host program does not read any more.
    fn on_host_write_error(&mut self) {
        self.host_backlog = VecDeque::new();
        if self.state == State::Draining {
            self.state = State::Closed;
        } else {
            self.pending_control.reset = true;
        }
    }

    /// Counts bytes that were written to the host program, and tells the guest before it runs out of credit.
    fn count_bytes_to_host(&mut self, count: usize) {
        self.bytes_to_host += byte_count(count);
        if (self.bytes_to_host - self.bytes_to_host_announced).0 >= BUF_ALLOC / 4 {
            self.pending_control.credit_update = true;
        }
    }

    /// Does what was put off until the host program has taken all bytes from the guest.
    fn finish_if_flushed(&mut self) {
        if !self.host_backlog.is_empty() {
            return;
        }
        if self.state == State::Draining {
            self.state = State::Closed;
        } else if self.guest_finished == SHUTDOWN_BOTH
            || self.awaits_reached_byte && self.guest_finished & SHUTDOWN_SEND != 0
        {
            // In the first case the guest waits for the reset before it frees the connection; in the second the byte
            // that is awaited can never come.
            self.pending_control.reset = true;
        } else if self.guest_finished & SHUTDOWN_SEND != 0 && !self.host_write_shut_down {
            // Once only, because shutdown(2) makes an event of its own. It fails only if the host program has closed
            // its end.
            self.host_write_shut_down = true;
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
    }

    /// Handles a reset from the guest. What the guest sent before still belongs to the host program.
    fn on_guest_reset(&mut self) {
        self.state = if self.host_backlog.is_empty() { State::Closed } else { State::Draining };
    }

    /// Ends the connection: the guest is sent a reset, and the host program sees its socket closed.
    pub fn reset(&mut self) {
        self.pending_control.reset = true;
    }
}

/// The size of one packet's payload, or of a part of the backlog, as the flow control counts it. Neither is above
/// [`BUF_ALLOC`].
fn byte_count(count: usize) -> u32 {
    assert!(count <= BUF_ALLOC as usize, "a connection moves {count} bytes at once");
    #[expect(clippy::cast_possible_truncation, reason = "it is at most BUF_ALLOC")]
    let count = count as u32;
    count
}
