//! All streams of a machine: who is connected to whom, and whose turn it is to send.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    io,
    net::TcpStream,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    Counters,
    connection::{BUF_ALLOC, Connection, State},
    forward::{self, Forward},
    packet::{Header, Operation, Ports},
    places::{Kind, Place, Places},
};
use crate::config::VsockConfig;

/// How long a guest may take to let go of a connection that has ended on the host; Linux waits as long for its peers
/// (`VSOCK_CLOSE_TIMEOUT`).
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// Connections accepted before those that exist have their turn.
const ACCEPT_BATCH: usize = 32;
/// Resets that are owed to the guest for packets without a connection. While the list is full, no
/// further packet is taken from the guest.
const RESETS_MAX: usize = 256;
/// `CONNECT 4294967295\n`
const GREETING_MAX: usize = 19;
/// Host ports that stand for connections from host programs; above all that anybody listens on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Epoll tokens of the two listeners. Connections count up from [`FIRST_ID`].
pub const LISTENER: u64 = 0;
pub const FORWARD: u64 = 15;
/// Tokens below this belong to the listeners and the worker.
pub const FIRST_ID: u64 = 16;

/// All streams of a machine.
pub struct Mux {
    config: VsockConfig,
    listener: UnixListener,
    /// Connections to the pod's localhost, and the guest's port that takes them.
    forward: Option<(Forward, u32)>,
    epoll: Epoll,
    /// Host programs that have connected and not yet said to which port.
    greetings: HashMap<u64, (UnixStream, Place)>,
    connections: HashMap<u64, Connection>,
    /// Connections by their ports, without those that the guest has dropped.
    by_ports: HashMap<Ports, u64>,
    /// Connections that may have something for the guest, each at most once.
    ready: VecDeque<u64>,
    resets: VecDeque<Ports>,
    /// When connections that wait for the guest's last word are ended without it.
    ending: BTreeSet<(Instant, u64)>,
    places: Places,
    /// Listeners that may have more connections than were accepted in one turn.
    unaccepted: VecDeque<u64>,
    next_id: u64,
    next_host_port: u32,
    counters: Counters,
}

impl Mux {
    pub fn new(
        config: VsockConfig,
        listener: UnixListener,
        forward: Option<Forward>,
        counters: Counters,
    ) -> io::Result<Mux> {
        let epoll = Epoll::new()?;
        let watch = |listener: BorrowedFd<'_>, token| {
            // Edge-triggered, so that running out of descriptors does not become a busy loop.
            let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), interest)
        };
        watch(listener.as_fd(), LISTENER)?;
        let forward = forward.zip(config.forward_port);
        if let Some((forward, _)) = &forward {
            watch(forward.listener.as_fd(), FORWARD)?;
        }
        Ok(Mux {
            config,
            listener,
            forward,
            epoll,
            greetings: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            ending: BTreeSet::new(),
            places: Places::default(),
            unaccepted: VecDeque::new(),
            next_id: FIRST_ID,
            next_host_port: FIRST_HOST_PORT,
            counters,
        })
    }

    /// What to wait on; the worker adds its own descriptors.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Something happened on one of the mux's own descriptors.
    pub fn on_event(&mut self, token: u64, events: EventSet) {
        if token == LISTENER || token == FORWARD {
            // Edge-triggered: what this turn does not take is remembered.
            let all = if token == LISTENER { self.accept() } else { self.accept_forwarded() };
            if !all && !self.unaccepted.contains(&token) {
                self.unaccepted.push_back(token);
            }
        } else if self.greetings.contains_key(&token) {
            self.greet(token);
        } else if let Some(connection) = self.connections.get_mut(&token) {
            if events.contains(EventSet::OUT) {
                connection.on_writable();
            }
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR)
            {
                connection.on_readable(events.intersects(EventSet::HANG_UP | EventSet::ERROR));
            }
            self.settle(token);
        }
    }

    fn watch(&mut self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(events, id))?;
        Ok(id)
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.by_ports.is_empty() && self.greetings.is_empty()
    }

    /// Whether connections wait that can be accepted without another event.
    pub fn accepts_more(&self) -> bool {
        !self.unaccepted.is_empty()
    }

    /// Accepts some of them.
    pub fn accept_more(&mut self) {
        if let Some(token) = self.unaccepted.pop_front() {
            self.on_event(token, EventSet::IN);
        }
    }

    /// Accepts some of the host programs' connections. Answers whether those were all.
    fn accept(&mut self) -> bool {
        for _ in 0..ACCEPT_BATCH {
            let watched = match self.listener.accept() {
                Ok((stream, _)) => {
                    // Dropping the stream is the answer to a host program that is one too many.
                    let Some(place) = self.places.take(Kind::HostProgram) else { continue };
                    stream
                        .set_nonblocking(true)
                        .and_then(|()| self.watch(stream.as_fd()))
                        .map(|id| self.greetings.insert(id, (stream, place)))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!(%error, "vsock: cannot accept a host program's connection");
                    return true;
                }
            };
            if let Err(error) = watched {
                tracing::warn!(%error, "vsock: cannot watch a host program's connection");
            }
        }
        false
    }

    /// The same for connections to the pod's localhost.
    fn accept_forwarded(&mut self) -> bool {
        for _ in 0..ACCEPT_BATCH {
            let Some((forward, guest)) = &self.forward else { return true };
            let guest = *guest;
            let taken = match forward.listener.accept() {
                Ok((stream, _)) => self.carry(stream, guest),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                // Its client has taken it back.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "vsock: cannot accept a connection to be forwarded");
                    return true;
                }
            };
            if let Err(error) = taken {
                tracing::warn!(%error, "vsock: cannot watch a connection to be forwarded");
            }
        }
        false
    }

    /// Begins a stream to the guest for a connection to the pod's localhost.
    fn carry(&mut self, stream: TcpStream, guest: u32) -> io::Result<()> {
        let port = forward::prepare(&stream)?;
        // Dropping the stream resets it.
        if let Some(place) = self.places.take(Kind::Forwarded) {
            let id = self.watch(stream.as_fd())?;
            let ports = Ports { host: self.free_host_port(guest), guest };
            self.insert(id, Connection::forwarded(ports, stream, port, place));
        }
        Ok(())
    }

    /// Reads `CONNECT <port>\n`, and not a byte more: what follows is for the guest.
    fn greet(&mut self, id: u64) {
        let Some((stream, _)) = self.greetings.get(&id) else { return };
        let mut line = [0; GREETING_MAX];
        let length = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK) {
            Ok((_, 0)) => {
                self.greetings.remove(&id);
                return;
            }
            Ok((_, length)) => length.min(GREETING_MAX),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => {
                self.greetings.remove(&id);
                return;
            }
        };
        let Some(end) = line[..length].iter().position(|byte| *byte == b'\n') else {
            if length == GREETING_MAX {
                self.greetings.remove(&id);
            }
            return;
        };
        let Some((stream, place)) = self.greetings.remove(&id) else { return };
        let consumed = rustix::net::recv(&stream, &mut line[..=end], RecvFlags::empty());
        if let (Some(guest), Ok((_, count))) = (parse_greeting(&line[..end]), consumed)
            && count == end + 1
        {
            let ports = Ports { host: self.free_host_port(guest), guest };
            self.insert(id, Connection::to_guest(ports, stream, place));
        }
    }

    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.counters.connections.add(1);
        self.by_ports.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.settle(id);
    }

    /// Brings the tables up to date with a connection that has changed.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.deadline.is_none() && connection.ending() {
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            connection.deadline = Some(deadline);
            self.ending.insert((deadline, id));
        }
        match connection.state {
            State::Requested | State::Established => {
                if connection.has_output() && !connection.queued {
                    connection.queued = true;
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
            if let Some(deadline) = connection.deadline {
                self.ending.remove(&(deadline, id));
            }
            if connection.queued {
                // A guest that takes no packets and makes one connection after the other would have the queue grow for ever.
                self.ready.retain(|ready| *ready != id);
            }
            self.connections.remove(&id);
        }
    }

    /// When [`expire`](Self::expire) has something to do next.
    pub fn deadline(&self) -> Option<Instant> {
        self.ending.first().map(|(deadline, _)| *deadline)
    }

    /// Ends the connections for whose last word from the guest the time is up: their places are needed, and a guest
    /// that ignores their end, or takes no packets, must not keep them.
    pub fn expire(&mut self, now: Instant) {
        while let Some((deadline, id)) = self.ending.first().copied()
            && deadline <= now
        {
            self.ending.pop_first();
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let (ports, known) = (connection.ports, self.by_ports.get(&connection.ports) == Some(&id));
            connection.deadline = None;
            connection.state = State::Closed;
            self.settle(id);
            if known {
                self.refuse(ports);
            }
        }
    }

    /// Whether a packet from the guest can be taken now.
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// A packet from the guest. `data` is its payload; `None` if the guest did not supply as much as
    /// the header says.
    pub fn take_packet(&mut self, header: &Header, data: Option<&[u8]>) {
        self.counters.from_guest_packets.add(1);
        self.counters.from_guest_bytes.add(data.map_or(0, |data| data.len() as u64));
        let known = self.by_ports.get(&header.ports).copied();
        match (known, header.operation) {
            (Some(id), Operation::Request) => {
                // A second request for a stream that exists: the two sides disagree.
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.reset();
                }
                self.settle(id);
            }
            (Some(id), _) => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.on_packet(header, data);
                }
                self.settle(id);
            }
            (None, Operation::Request) => {
                if let Err(error) = self.connect(header) {
                    tracing::debug!(port = header.ports.host, %error, "vsock: the guest's connection is refused");
                    self.refuse(header.ports);
                }
            }
            (None, Operation::Reset) => {}
            (None, _) => self.refuse(header.ports),
        }
    }

    fn refuse(&mut self, ports: Ports) {
        self.counters.resets.add(1);
        if self.accepts_packets() {
            self.resets.push_back(ports);
        }
    }

    /// The guest connects to a host port.
    fn connect(&mut self, request: &Header) -> io::Result<()> {
        if !self.config.host_ports.contains(&request.ports.host) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let place = self.places.take(Kind::Guest).ok_or(io::ErrorKind::QuotaExceeded)?;
        let mut path = self.config.path.clone().into_os_string();
        path.push(format!("_{}", request.ports.host));
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )?;
        // A unix socket connects at once, or not at all (its queue is full).
        rustix::net::connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        let stream = UnixStream::from(socket);
        let id = self.watch(stream.as_fd())?;
        self.insert(id, Connection::from_guest(request, stream, place));
        Ok(())
    }

    /// Whether [`next_packet`](Self::next_packet) may have one.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, its payload in the start of `data`. Connections take turns, a
    /// packet each.
    pub fn next_packet(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            self.counters.to_guest_packets.add(1);
            let operation = Operation::Reset;
            return Some(Header { ports, operation, length: 0, flags: 0, buf_alloc: BUF_ALLOC, fwd_cnt: 0 });
        }
        while let Some(id) = self.ready.pop_front() {
            let packet = self.connections.get_mut(&id).and_then(|connection| {
                connection.queued = false;
                connection.next_packet(data)
            });
            self.settle(id);
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

fn parse_greeting(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim_end_matches('\r').parse().ok()
}
