//! All streams of a machine: who is connected to whom, and whose turn it is to send to the guest.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    net::TcpStream,
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use rustix::net::RecvFlags;
use vmm_sys_util::epoll::EventSet;

use super::{
    Counters, VsockSockets,
    connection::{BUF_ALLOC, Connection, State},
    connection_limits::{ConnectionLimits, ConnectionPermit, Initiator},
    packet::{Header, Operation, Ports},
    port_forward::{self, PortForward},
    token::{Listener, StreamId, Token},
};
use crate::{config::VsockConfig, virtio::wait_context::WaitContext};

/// How long a guest may take to reset a connection that has ended on the host. Linux waits as long for its peers
/// (`VSOCK_CLOSE_TIMEOUT`).
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// Most connections accepted before those that exist have their turn.
const ACCEPT_BATCH: usize = 32;
/// Most resets that wait to be sent to the guest, for packets without a connection. While as many wait, no further
/// packet is taken from the guest.
const RESETS_MAX: usize = 256;
/// Bytes of the longest line with which a host program asks for a port: `CONNECT 4294967295\n`.
const CONNECT_LINE_MAX: usize = 19;
/// The first of the host ports that stand for connections from host programs. They are above all that anybody listens
/// on.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Events of a stream's socket that wake the worker.
const STREAM_EVENTS: EventSet =
    EventSet::IN.union(EventSet::OUT).union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);
/// Events of a listener that wake the worker: edge-triggered, so that running out of descriptors does not become a busy
/// loop.
const LISTENER_EVENTS: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// The outcome of accepting connections from a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AcceptOutcome {
    /// No connection is left.
    Drained,
    /// There may be more, which the listener does not report again.
    BatchFull,
}

/// All streams of a machine.
pub struct Mux {
    listener: UnixListener,
    /// What the guest's connection to the host is connected with, until it has made that, and the port.
    host: Option<(UnixStream, u32)>,
    /// Connections to the pod's localhost, and the guest's port that takes them.
    forward: Option<(PortForward, u32)>,
    wait_context: WaitContext<Token>,
    /// Host programs that have connected and not yet said to which port.
    handshakes: HashMap<StreamId, (UnixStream, ConnectionPermit)>,
    connections: HashMap<StreamId, Connection>,
    /// Connections by their ports, without those that the guest has reset.
    by_ports: HashMap<Ports, StreamId>,
    /// Connections that may have packets for the guest, each at most once.
    ready: VecDeque<StreamId>,
    /// Resets for the guest that belong to no connection.
    resets: VecDeque<Ports>,
    /// Connections that wait for the guest's reset, by the time at which they are closed without it.
    closing: BTreeSet<(Instant, StreamId)>,
    limits: ConnectionLimits,
    /// Listeners that may have more connections than were accepted in one batch.
    unaccepted: VecDeque<Listener>,
    next_id: StreamId,
    next_host_port: u32,
    counters: Counters,
}

impl Mux {
    /// Watches the listeners. None of the sockets may block. One for which the configuration has no port is not used.
    pub fn new(config: VsockConfig, sockets: VsockSockets, counters: Counters) -> io::Result<Self> {
        let VsockSockets { listener, host, forward } = sockets;
        let wait_context = WaitContext::new()?;
        wait_context.add_for(&listener, LISTENER_EVENTS, Token::Listener(Listener::HostPrograms))?;
        let forward = forward.zip(config.forward_port);
        if let Some((forward, _)) = &forward {
            wait_context.add_for(
                &forward.listener,
                LISTENER_EVENTS,
                Token::Listener(Listener::PortForward),
            )?;
        }
        Ok(Self {
            listener,
            host: host.zip(config.host_port),
            forward,
            wait_context,
            handshakes: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            closing: BTreeSet::new(),
            limits: ConnectionLimits::default(),
            unaccepted: VecDeque::new(),
            next_id: StreamId::FIRST,
            next_host_port: FIRST_HOST_PORT,
            counters,
        })
    }

    /// What the worker waits on. It adds its own descriptors.
    pub fn wait_context(&self) -> &WaitContext<Token> {
        &self.wait_context
    }

    /// Handles an event of a listener: accepts a batch of its connections.
    pub fn on_listener_event(&mut self, listener: Listener) {
        let outcome = match listener {
            Listener::HostPrograms => self.accept_host_programs(),
            Listener::PortForward => self.accept_forwarded(),
        };
        // The event is edge-triggered, so what is left over has to be remembered.
        if outcome == AcceptOutcome::BatchFull && !self.unaccepted.contains(&listener) {
            self.unaccepted.push_back(listener);
        }
    }

    /// Handles an event of a stream's socket.
    pub fn on_stream_event(&mut self, id: StreamId, events: EventSet) {
        if self.handshakes.contains_key(&id) {
            self.read_connect_line(id);
        } else if let Some(connection) = self.connections.get_mut(&id) {
            if events.contains(EventSet::OUT) {
                connection.on_writable();
            }
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
            {
                connection.on_readable(events.intersects(EventSet::HANG_UP | EventSet::ERROR));
            }
            self.update_tables(id);
        }
    }

    fn watch_stream(&mut self, stream: &impl AsRawFd) -> io::Result<StreamId> {
        let id = self.next_id;
        self.next_id = id.next();
        self.wait_context.add_for(stream, STREAM_EVENTS, Token::Stream(id))?;
        Ok(id)
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.by_ports.is_empty() && self.handshakes.is_empty()
    }

    /// Whether a listener may have connections that it does not report again.
    pub fn has_unaccepted(&self) -> bool {
        !self.unaccepted.is_empty()
    }

    /// Accepts another batch of connections from a listener of which not all were accepted.
    pub fn accept_remaining(&mut self) {
        if let Some(listener) = self.unaccepted.pop_front() {
            self.on_listener_event(listener);
        }
    }

    fn accept_host_programs(&mut self) -> AcceptOutcome {
        for _ in 0..ACCEPT_BATCH {
            let watched = match self.listener.accept() {
                Ok((stream, _)) => {
                    // A connection that is one too many is closed by dropping it.
                    let Some(permit) = self.limits.try_acquire(Initiator::HostProgram) else { continue };
                    stream
                        .set_nonblocking(true)
                        .and_then(|()| self.watch_stream(&stream))
                        .map(|id| self.handshakes.insert(id, (stream, permit)))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return AcceptOutcome::Drained,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "vsock: cannot accept a host program's connection");
                    return AcceptOutcome::Drained;
                }
            };
            if let Err(error) = watched {
                tracing::warn!(%error, "vsock: cannot watch a host program's connection");
            }
        }
        AcceptOutcome::BatchFull
    }

    fn accept_forwarded(&mut self) -> AcceptOutcome {
        for _ in 0..ACCEPT_BATCH {
            let Some((forward, guest_port)) = &self.forward else { return AcceptOutcome::Drained };
            let guest_port = *guest_port;
            let started = match forward.listener.accept() {
                Ok((stream, _)) => self.start_port_forward(stream, guest_port),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return AcceptOutcome::Drained,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                // The client has closed it before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "vsock: cannot accept a connection to be forwarded");
                    return AcceptOutcome::Drained;
                }
            };
            if let Err(error) = started {
                tracing::warn!(%error, "vsock: cannot watch a connection to be forwarded");
            }
        }
        AcceptOutcome::BatchFull
    }

    /// Begins a stream to the guest for a connection to the pod's localhost.
    fn start_port_forward(&mut self, stream: TcpStream, guest: u32) -> io::Result<()> {
        let port = port_forward::configure_accepted(&stream)?;
        // A connection that is one too many is reset by dropping it.
        if let Some(permit) = self.limits.try_acquire(Initiator::PortForward) {
            let id = self.watch_stream(&stream)?;
            let ports = Ports { host: self.next_free_host_port(guest), guest };
            self.insert(id, Connection::port_forward(ports, stream, port, permit));
        }
        Ok(())
    }

    /// Reads `CONNECT <port>\n` from a host program, and not a byte more: what follows is for the guest.
    fn read_connect_line(&mut self, id: StreamId) {
        let Some((stream, _)) = self.handshakes.get(&id) else { return };
        let mut line = [0; CONNECT_LINE_MAX];
        let length = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK) {
            Ok((_, 0)) => {
                self.handshakes.remove(&id);
                return;
            }
            Ok((_, length)) => length.min(CONNECT_LINE_MAX),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => {
                self.handshakes.remove(&id);
                return;
            }
        };
        let Some(end) = line[..length].iter().position(|byte| *byte == b'\n') else {
            if length == CONNECT_LINE_MAX {
                self.handshakes.remove(&id);
            }
            return;
        };
        let Some((stream, permit)) = self.handshakes.remove(&id) else { return };
        let consumed = rustix::net::recv(&stream, &mut line[..=end], RecvFlags::empty());
        if let (Some(guest), Ok((_, count))) = (parse_connect_line(&line[..end]), consumed)
            && count == end + 1
        {
            let ports = Ports { host: self.next_free_host_port(guest), guest };
            self.insert(id, Connection::to_guest(ports, stream, permit));
        }
    }

    /// A host port that no connection to the guest's port `guest` has.
    fn next_free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, id: StreamId, connection: Connection) {
        self.counters.connections.add(1);
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.update_tables(id);
    }

    /// Brings the tables up to date with a connection that has changed, and removes it if it is closed.
    fn update_tables(&mut self, id: StreamId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.close_deadline.is_none() && connection.is_closing() {
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            connection.close_deadline = Some(deadline);
            self.closing.insert((deadline, id));
        }
        match connection.state {
            State::Requested | State::Established => {
                if connection.has_output() && !connection.in_ready_queue {
                    connection.in_ready_queue = true;
                    self.ready.push_back(id);
                }
                return;
            }
            State::Draining | State::Closed => {}
        }
        // The guest may use the ports again at once, while an earlier stream is still draining.
        if self.by_ports.get(&connection.ports) == Some(&id) {
            self.by_ports.remove(&connection.ports);
        }
        if connection.state == State::Closed {
            if let Some(deadline) = connection.close_deadline {
                self.closing.remove(&(deadline, id));
            }
            if connection.in_ready_queue {
                // Otherwise a guest that takes no packets and makes one connection after the other would make the queue
                // grow without end.
                self.ready.retain(|ready| *ready != id);
            }
            self.connections.remove(&id);
        }
    }

    /// When [`close_expired`](Self::close_expired) has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.closing.first().map(|(deadline, _)| *deadline)
    }

    /// Closes the connections that the guest has not reset in time. Otherwise a guest that ignores their end, or takes
    /// no packets, could use up the connections that host programs need.
    pub fn close_expired(&mut self, now: Instant) {
        while let Some((deadline, id)) = self.closing.first().copied()
            && deadline <= now
        {
            self.closing.pop_first();
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let ports = connection.ports;
            let has_ports = self.by_ports.get(&ports) == Some(&id);
            connection.close_deadline = None;
            connection.state = State::Closed;
            self.update_tables(id);
            if has_ports {
                self.queue_reset(ports);
            }
        }
    }

    /// Whether a packet from the guest can be taken now.
    pub fn can_take_packet(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Handles a packet from the guest. `data` is its payload; `None` if the guest did not supply as many bytes as the
    /// header says.
    pub fn on_packet(&mut self, header: &Header, data: Option<&[u8]>) {
        self.counters.from_guest_packets.add(1);
        self.counters.from_guest_bytes.add(data.map_or(0, |data| data.len() as u64));
        let id = self.by_ports.get(&header.ports).copied();
        match (id, header.operation) {
            (Some(id), Operation::Request) => {
                // A second request for a stream that exists: the two sides disagree.
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.reset();
                }
                self.update_tables(id);
            }
            (Some(id), _) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.on_packet(header, data);
                }
                self.update_tables(id);
            }
            (None, Operation::Request) => {
                if let Err(error) = self.connect_to_host(header) {
                    tracing::debug!(port = header.ports.host, %error, "vsock: the guest's connection is refused");
                    self.queue_reset(header.ports);
                }
            }
            (None, Operation::Reset) => {}
            (None, _) => self.queue_reset(header.ports),
        }
    }

    /// Sends the guest a reset that belongs to no connection. It is lost if too many wait already.
    fn queue_reset(&mut self, ports: Ports) {
        self.counters.resets.add(1);
        if self.can_take_packet() {
            self.resets.push_back(ports);
        }
    }

    /// Connects the guest with the host, which it may be once.
    fn connect_to_host(&mut self, request: &Header) -> io::Result<()> {
        if self.host.as_ref().is_none_or(|(_, port)| *port != request.ports.host) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let permit = self.limits.try_acquire(Initiator::Guest).ok_or(io::ErrorKind::QuotaExceeded)?;
        let (stream, _) = self.host.take().ok_or(io::ErrorKind::ConnectionRefused)?;
        let id = self.watch_stream(&stream)?;
        self.insert(id, Connection::from_guest(request, stream, permit));
        Ok(())
    }

    /// Whether [`next_packet`](Self::next_packet) may have one.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Returns the next packet for the guest, and puts its payload into the start of `data`. The connections take
    /// turns, with one packet each.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            self.counters.to_guest_packets.add(1);
            let operation = Operation::Reset;
            return Some(Header { ports, operation, length: 0, flags: 0, buf_alloc: BUF_ALLOC, fwd_cnt: 0 });
        }
        while let Some(id) = self.ready.pop_front() {
            let packet = self.connections.get_mut(&id).and_then(|connection| {
                connection.in_ready_queue = false;
                connection.next_packet(data)
            });
            self.update_tables(id);
            if let Some(header) = packet {
                self.counters.to_guest_packets.add(1);
                self.counters.to_guest_bytes.add(u64::from(header.length));
                if header.operation == Operation::Reset {
                    self.counters.resets.add(1);
                }
                return Some(header);
            }
        }
        None
    }
}

fn parse_connect_line(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_end_matches('\r').parse().ok()
}
