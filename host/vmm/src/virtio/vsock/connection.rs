//! One stream between a host program's socket and the guest, with flow control both ways.

use std::{collections::VecDeque, num::Wrapping, os::fd::OwnedFd, time::Instant};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown},
};

use super::{
    forward,
    packet::{Header, Operation, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    places::Place,
};

/// Bytes that the guest may send before the host program has taken them. Also the most that one
/// connection can make this process hold.
pub const BUF_ALLOC: u32 = 128 * 1024;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host program asked for it; the guest has not answered.
    Requested,
    /// Both sides may send.
    Established,
    /// The guest is done with it; what it sent before is still being written to the host program.
    Draining,
    /// Nothing is left to do: to be removed.
    Closed,
}

/// One stream.
#[allow(clippy::struct_excessive_bools)] // Independent facts; what excludes another is in `state`.
pub struct Connection {
    pub ports: Ports,
    pub state: State,
    /// Whether the mux has it in its list of those that have something for the guest.
    pub queued: bool,
    /// When the mux ends it whatever the guest does, once it is [`ending`](Self::ending).
    pub deadline: Option<Instant>,
    /// Its place among all, for as long as it exists.
    _place: Place,
    /// A unix or TCP socket: non-blocking, watched edge-triggered.
    stream: OwnedFd,
    /// What goes to the guest before the host program's data.
    preamble: VecDeque<u8>,
    /// The guest has yet to say that it has reached the port of a forwarded connection.
    awaits_answer: bool,

    /// The socket may have something to read.
    readable: bool,
    /// The host program has closed both directions.
    hung_up: bool,
    /// The end of the host program's data has been read.
    host_finished: bool,
    /// The host program has been told that the guest sends no more.
    shut: bool,
    /// What the guest has said it will not do any more ([`SHUTDOWN_SEND`], [`SHUTDOWN_RECEIVE`]).
    guest_finished: u32,

    /// From the guest, not yet written to the socket; at most [`BUF_ALLOC`] bytes.
    pending: VecDeque<u8>,
    /// Bytes of the guest's that were written to the socket.
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that the guest knows.
    announced: Wrapping<u32>,

    /// The guest's buffer size, what it has taken from it, and what was sent to it.
    guest_buf_alloc: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,

    owed: Owed,
}

/// Packets without payload that the guest must get. One flag each, so that no guest can make a
/// connection owe more.
#[allow(clippy::struct_excessive_bools)]
#[derive(Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    shutdown: u32,
    credit_update: bool,
    credit_request: bool,
    /// A request for credit is out. There is not another until the guest has given some: a guest
    /// whose program does not read answers each at once, with none.
    credit_requested: bool,
}

impl Connection {
    /// The host program wants to reach the guest's port.
    pub fn to_guest(ports: Ports, stream: impl Into<OwnedFd>, place: Place) -> Connection {
        let owed = Owed { request: true, ..Owed::default() };
        Connection::new(ports, stream.into(), State::Requested, owed, place)
    }

    /// A connection to a port on the pod's localhost, which the guest is to take there: see [`forward`].
    pub fn forwarded(ports: Ports, stream: impl Into<OwnedFd>, port: u16, place: Place) -> Connection {
        Connection {
            preamble: forward::preamble(port).into(),
            awaits_answer: true,
            ..Connection::to_guest(ports, stream, place)
        }
    }

    /// The guest has connected to a host port; `stream` leads to who serves it.
    pub fn from_guest(request: &Header, stream: impl Into<OwnedFd>, place: Place) -> Connection {
        let owed = Owed { response: true, ..Owed::default() };
        let mut connection = Connection::new(request.ports, stream.into(), State::Established, owed, place);
        connection.take_credit(request);
        connection
    }

    fn new(ports: Ports, stream: OwnedFd, state: State, owed: Owed, place: Place) -> Connection {
        Connection {
            ports,
            state,
            queued: false,
            deadline: None,
            _place: place,
            stream,
            preamble: VecDeque::new(),
            awaits_answer: false,
            readable: true,
            hung_up: false,
            host_finished: false,
            shut: false,
            guest_finished: 0,
            pending: VecDeque::new(),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_buf_alloc: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            owed,
        }
    }

    /// The host program's socket has something to read, or its end.
    pub fn on_readable(&mut self, hung_up: bool) {
        self.readable = true;
        if hung_up && !self.hung_up {
            self.hung_up = true;
            match self.state {
                // The host program did not wait for the guest's answer.
                State::Requested => self.owed.reset = true,
                // What it sent before is read first.
                State::Established if self.host_finished || self.guest_finished & SHUTDOWN_RECEIVE != 0 => {
                    self.owed.shutdown |= SHUTDOWN_BOTH;
                }
                State::Established | State::Closed => {}
                State::Draining => self.state = State::Closed,
            }
        }
    }

    /// The host program's socket takes bytes again.
    pub fn on_writable(&mut self) {
        while !self.pending.is_empty() {
            let (first, _) = self.pending.as_slices();
            match send(&self.stream, first, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.forward(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.fail();
                    return;
                }
            }
        }
        // A connection that once was slow does not keep its buffer.
        self.pending = VecDeque::new();
        self.finish_if_flushed();
    }

    /// Whether [`next_packet`](Self::next_packet) may have something for the guest.
    pub fn has_output(&self) -> bool {
        let owed = &self.owed;
        match self.state {
            State::Closed | State::Draining => false,
            State::Requested => owed.request || owed.reset,
            State::Established => {
                owed.response
                    || owed.reset
                    || owed.shutdown != 0
                    || owed.credit_update
                    || owed.credit_request
                    || self.may_read()
            }
        }
    }

    /// Whether nothing is left but that the guest hears of its end and answers. What a host program that has gone left
    /// behind for the guest comes first, however long the guest takes.
    pub fn ending(&self) -> bool {
        let finished = self.host_finished || self.guest_finished & SHUTDOWN_RECEIVE != 0;
        match self.state {
            State::Requested | State::Established => self.owed.reset || self.hung_up && finished,
            State::Draining | State::Closed => false,
        }
    }

    fn may_read(&self) -> bool {
        self.readable
            && !self.host_finished
            && self.guest_finished & SHUTDOWN_RECEIVE == 0
            && (self.guest_credit() > 0 || !self.owed.credit_requested)
    }

    /// Bytes that the guest has room for.
    fn guest_credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// The next packet for the guest, its payload read into the start of `data`.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if matches!(self.state, State::Closed | State::Draining) {
            return None;
        }
        if self.owed.reset {
            self.state = State::Closed;
            return Some(self.header(Operation::Reset, 0, 0));
        }
        if std::mem::take(&mut self.owed.request) {
            return Some(self.header(Operation::Request, 0, 0));
        }
        if self.state == State::Requested {
            return None;
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.header(Operation::Response, 0, 0));
        }
        if self.may_read()
            && let Some(header) = self.read(data)
        {
            return Some(header);
        }
        match std::mem::take(&mut self.owed.shutdown) {
            0 => {}
            flags => return Some(self.header(Operation::Shutdown, 0, flags)),
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return Some(self.header(Operation::CreditRequest, 0, 0));
        }
        // Last, for every packet carries the same news.
        if std::mem::take(&mut self.owed.credit_update) {
            return Some(self.header(Operation::CreditUpdate, 0, 0));
        }
        None
    }

    fn read(&mut self, data: &mut [u8]) -> Option<Header> {
        let credit = self.guest_credit();
        if credit == 0 {
            self.owed.credit_requested = true;
            self.owed.credit_request = true;
            return None;
        }
        let room = data.len().min(credit as usize);
        if !self.preamble.is_empty() {
            let bytes = self.preamble.drain(..room.min(self.preamble.len()));
            let length = bytes.zip(data).map(|(byte, place)| *place = byte).count();
            return Some(self.data_header(length));
        }
        match recv(&self.stream, &mut data[..room], RecvFlags::empty()) {
            Ok((_, 0)) => {
                self.host_finished = true;
                self.owed.shutdown |= if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                None
            }
            Ok((_, length)) => Some(self.data_header(length)),
            Err(Errno::AGAIN) => {
                self.readable = false;
                None
            }
            // The caller comes again while the socket may have something.
            Err(Errno::INTR) => None,
            Err(_) => {
                self.state = State::Closed;
                Some(self.header(Operation::Reset, 0, 0))
            }
        }
    }

    fn data_header(&mut self, length: usize) -> Header {
        let length = small(length);
        self.sent += length;
        self.header(Operation::ReadWrite, length, 0)
    }

    fn header(&mut self, operation: Operation, length: u32, flags: u32) -> Header {
        self.announced = self.forwarded;
        self.owed.credit_update = false;
        Header {
            ports: self.ports,
            operation,
            length,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// A packet from the guest. `data` is its payload; `None` if the guest did not supply as much as
    /// the header says.
    pub fn on_packet(&mut self, header: &Header, data: Option<&[u8]>) {
        self.take_credit(header);
        match (self.state, header.operation) {
            (State::Requested, Operation::Response) => self.established(),
            (_, Operation::Reset) => self.guest_closed(),
            (State::Established, Operation::ReadWrite) => match data {
                Some(data) => self.receive(data),
                None => self.owed.reset = true,
            },
            (State::Established, Operation::Shutdown) => {
                self.guest_finished |= header.flags & SHUTDOWN_BOTH;
                self.finish_if_flushed();
            }
            (State::Established, Operation::CreditRequest) => self.owed.credit_update = true,
            (State::Established, Operation::CreditUpdate) => {}
            // A packet that has no meaning in this state.
            _ => self.owed.reset = true,
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.guest_credit() > 0 {
            self.owed.credit_requested = false;
        }
    }

    fn established(&mut self) {
        self.state = State::Established;
        if self.awaits_answer {
            return;
        }
        // Nothing has been written to this socket yet, so the whole line fits or the other end is gone.
        let answer = format!("OK {}\n", self.ports.host);
        if send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL) != Ok(answer.len()) {
            self.owed.reset = true;
        }
    }

    /// Takes what the guest says of a forwarded connection's port off its data. `None` if that is not that it has
    /// reached it.
    fn take_answer<'a>(&mut self, data: &'a [u8]) -> Option<&'a [u8]> {
        let Some((answer, rest)) = data.split_first() else { return Some(data) };
        if *answer != forward::REACHED || forward::reset_on_close(&self.stream, false).is_err() {
            return None;
        }
        self.awaits_answer = false;
        self.forward(1);
        Some(rest)
    }

    fn receive(&mut self, data: &[u8]) {
        let beyond_credit = self.pending.len() + data.len() > BUF_ALLOC as usize;
        if self.guest_finished & SHUTDOWN_SEND != 0 || beyond_credit {
            self.owed.reset = true;
            return;
        }
        let mut rest = data;
        if self.awaits_answer {
            let Some(after) = self.take_answer(data) else {
                self.owed.reset = true;
                return;
            };
            rest = after;
        }
        while self.pending.is_empty() && !rest.is_empty() {
            match send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    rest = &rest[count..];
                    self.forward(count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    self.fail();
                    return;
                }
            }
        }
        self.pending.extend(rest);
    }

    /// The host program does not read any more.
    fn fail(&mut self) {
        self.pending = VecDeque::new();
        if self.state == State::Draining {
            self.state = State::Closed;
        } else {
            self.owed.reset = true;
        }
    }

    /// Counts what has left for the host program, and lets the guest know before it runs dry.
    fn forward(&mut self, count: usize) {
        self.forwarded += small(count);
        if (self.forwarded - self.announced).0 >= BUF_ALLOC / 4 {
            self.owed.credit_update = true;
        }
    }

    fn finish_if_flushed(&mut self) {
        if !self.pending.is_empty() {
            return;
        }
        if self.state == State::Draining {
            self.state = State::Closed;
        } else if self.guest_finished == SHUTDOWN_BOTH
            || self.awaits_answer && self.guest_finished & SHUTDOWN_SEND != 0
        {
            // The guest waits for this before it frees the connection; or it will never answer.
            self.owed.reset = true;
        } else if self.guest_finished & SHUTDOWN_SEND != 0 && !self.shut {
            // Once: it makes an event of its own. Fails only if the host program has closed its end.
            self.shut = true;
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
    }

    /// The guest has dropped the connection; what it sent before still belongs to the host program.
    fn guest_closed(&mut self) {
        self.state = if self.pending.is_empty() { State::Closed } else { State::Draining };
    }

    /// The connection cannot go on: the guest is told, the host program sees its socket closed.
    pub fn reset(&mut self) {
        self.owed.reset = true;
    }
}

/// The size of one packet's payload, or of a part of the pending bytes: both below 2³².
#[allow(clippy::cast_possible_truncation)]
fn small(count: usize) -> u32 {
    debug_assert!(count <= BUF_ALLOC as usize);
    count as u32
}
