//! The device between real unix sockets and a guest that is played here.

#[path = "forward_tests.rs"]
mod forward;
#[path = "limits_tests.rs"]
mod limits;

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
};

use tempfile::TempDir;
use vm_memory::GuestAddress;

use super::*;
use crate::{
    config::VsockConfig,
    virtio::{
        testing::{Buffer, RING_SIZE, Ring, guest_memory},
        vsock::{
            Counters, Forward,
            connection::BUF_ALLOC,
            packet::{Operation, Ports, SHUTDOWN_BOTH, SHUTDOWN_SEND, reversed},
        },
    },
};

const QUEUE: u16 = 256;
const RECEIVE_RING: u64 = RING_SIZE;
const TRANSMIT_RING: u64 = 2 * RING_SIZE;
const EVENT_RING: u64 = 3 * RING_SIZE;
const RECEIVE_BUFFERS: u64 = 0x10_0000;
/// As Linux gives them.
const RECEIVE_BUFFER: u32 = 4096;
const TRANSMIT_BUFFER: u64 = 0x80_0000;
const HOST_PORT: u32 = 1025;
const FORWARD_PORT: u32 = 1026;

type Packet = (Header, Vec<u8>);

/// A guest, its device and the host's side.
struct Scene {
    directory: TempDir,
    worker: Worker,
    memory: GuestMemory,
    receive: Ring,
    transmit: Ring,
    buffers: HashMap<u16, u64>,
}

impl Scene {
    fn new() -> Scene {
        Scene::with_forward(None)
    }

    fn with_forward(forward: Option<Forward>) -> Scene {
        let mut scene = Scene::without_buffers_with_forward(forward);
        for index in 0..u64::from(QUEUE) / 2 {
            scene.give_buffer(RECEIVE_BUFFERS + index * u64::from(RECEIVE_BUFFER));
        }
        scene
    }

    fn without_buffers() -> Scene {
        Scene::without_buffers_with_forward(None)
    }

    fn without_buffers_with_forward(forward: Option<Forward>) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let memory = guest_memory();
        let (receive, receive_queue) = Ring::new(&memory, RECEIVE_RING, QUEUE);
        let (transmit, transmit_queue) = Ring::new(&memory, TRANSMIT_RING, QUEUE);
        let (_, event_queue) = Ring::new(&memory, EVENT_RING, 16);
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let config = VsockConfig { path, host_ports: vec![HOST_PORT], forward_port: Some(FORWARD_PORT) };
        let mux = Mux::new(config, listener, forward, Counters::default()).unwrap();
        let queues = [receive_queue, transmit_queue, event_queue];
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let worker = Worker::new(memory.clone(), queues, mux, &stop).unwrap();
        Scene { directory, worker, memory, receive, transmit, buffers: HashMap::new() }
    }

    fn give_buffer(&mut self, address: u64) {
        let head = self.receive.add(&[Buffer { address, length: RECEIVE_BUFFER, writable: true }]);
        self.buffers.insert(head, address);
    }

    /// Lets the device work until it has nothing left to do.
    fn turn(&mut self) {
        for _ in 0..10_000 {
            assert!(self.worker.handle_events(0).unwrap().is_continue());
            if !self.worker.move_packets().unwrap() && !self.has_events() {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn has_events(&mut self) -> bool {
        let mut events = [EpollEvent::default(); 1];
        let count = self.worker.mux.epoll().wait(0, &mut events).unwrap();
        // Edge-triggered events were taken by looking.
        for event in &events[..count] {
            if !matches!(event.data(), TOKEN_RECEIVE | TOKEN_TRANSMIT | TOKEN_STOP) {
                self.worker.mux.on_event(event.data(), event.event_set());
            }
        }
        count > 0
    }

    /// The guest sends a packet in one buffer.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_bytes(&[&reversed(header.to_guest()), payload].concat());
        self.turn();
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        self.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length, writable: false }]);
    }

    /// What the guest has got since it was last asked. Its buffers go back to the device.
    fn received(&mut self) -> Vec<Packet> {
        self.turn();
        let mut packets = Vec::new();
        while let Some((head, length)) = self.receive.used() {
            let address = self.buffers.remove(&head).unwrap();
            let mut bytes = vec![0; length as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            self.give_buffer(address);
            let (header, payload) = bytes.split_first_chunk::<HEADER_SIZE>().unwrap();
            let header = Header::from_guest(&reversed(*header)).unwrap();
            assert_eq!(header.length as usize, payload.len());
            packets.push((header, payload.to_vec()));
        }
        packets
    }

    fn operations(&mut self) -> Vec<Operation> {
        self.received().iter().map(|(header, _)| header.operation).collect()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// A stream from a host program to the guest's port 1024 that the guest has accepted.
    fn established(&mut self) -> (UnixStream, Ports) {
        let mut stream = self.connect();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let packets = self.received();
        let [(request, _)] = packets.as_slice() else { panic!("{packets:?}") };
        assert_eq!((request.operation, request.ports.guest), (Operation::Request, 1024));
        let ports = request.ports;
        self.send(packet(ports, Operation::Response), &[]);
        let mut answer = vec![0; format!("OK {}\n", ports.host).len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {}\n", ports.host).as_bytes());
        (stream, ports)
    }

    /// A stream from the guest to a host program that listens.
    fn accepted(&mut self) -> (UnixStream, Ports) {
        let path = self.directory.path().join(format!("vsock.sock_{HOST_PORT}"));
        let listener = UnixListener::bind(path).unwrap();
        let ports = Ports { host: HOST_PORT, guest: 5000 };
        self.send(packet(ports, Operation::Request), &[]);
        let (stream, _) = listener.accept().unwrap();
        assert_eq!(self.operations(), [Operation::Response]);
        (stream, ports)
    }
}

fn packet(ports: Ports, operation: Operation) -> Header {
    Header { ports, operation, length: 0, flags: 0, buf_alloc: 1 << 20, fwd_cnt: 0 }
}

fn data(ports: Ports, payload: &[u8]) -> Header {
    Header { length: u32::try_from(payload.len()).unwrap(), ..packet(ports, Operation::ReadWrite) }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 31 / 7 % 251).unwrap()).collect()
}

fn at_end(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0; 1]).is_ok_and(|count| count == 0)
}

#[test]
fn a_host_program_and_the_guest_exchange_data() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    stream.write_all(b"ping").unwrap();
    assert_eq!(scene.received()[0].1, b"ping");
    scene.send(data(ports, b"pong"), b"pong");
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn a_greeting_in_pieces_is_put_together_and_what_follows_is_for_the_guest() {
    let mut scene = Scene::new();
    let mut stream = scene.connect();
    for piece in ["CONN", "ECT 10", "24"] {
        stream.write_all(piece.as_bytes()).unwrap();
        assert_eq!(scene.operations(), []);
    }
    stream.write_all(b"\nhello").unwrap();
    let request = scene.received()[0].0;
    scene.send(packet(request.ports, Operation::Response), &[]);
    assert_eq!(scene.received()[0].1, b"hello");
}

#[test]
fn a_greeting_that_is_none_ends_the_connection() {
    for greeting in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "nonewlineatallhere!!!",
    ] {
        let mut scene = Scene::new();
        let mut stream = scene.connect();
        stream.write_all(greeting.as_bytes()).unwrap();
        assert_eq!(scene.operations(), [], "{greeting}");
        // Closed, perhaps with bytes that nobody has read.
        assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)), "{greeting}");
    }
}

#[test]
fn a_guest_that_refuses_ends_the_host_programs_connection() {
    let mut scene = Scene::new();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let request = scene.received()[0].0;
    scene.send(packet(request.ports, Operation::Reset), &[]);
    assert!(at_end(&mut stream));
}

#[test]
fn a_host_program_that_does_not_wait_is_taken_back() {
    let mut scene = Scene::new();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(scene.operations(), [Operation::Request]);
    drop(stream);
    assert_eq!(scene.operations(), [Operation::Reset]);
}

#[test]
fn the_guest_reaches_a_host_port_that_it_may_reach_and_no_other() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.accepted();
    scene.send(data(ports, b"ready"), b"ready");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ready");

    UnixListener::bind(scene.directory.path().join("vsock.sock_1026")).unwrap();
    scene.send(packet(Ports { host: 1026, guest: 5001 }, Operation::Request), &[]);
    assert_eq!(scene.operations(), [Operation::Reset]);
}

#[test]
fn a_host_port_that_nobody_serves_is_refused() {
    let mut scene = Scene::new();
    scene.send(packet(Ports { host: HOST_PORT, guest: 5001 }, Operation::Request), &[]);
    assert_eq!(scene.operations(), [Operation::Reset]);
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_but_resets_are_not() {
    let mut scene = Scene::new();
    let ports = Ports { host: 7, guest: 8 };
    for operation in
        [Operation::ReadWrite, Operation::Response, Operation::Shutdown, Operation::CreditRequest]
    {
        scene.send(packet(ports, operation), &[]);
        assert_eq!(scene.operations(), [Operation::Reset], "{operation:?}");
    }
    scene.send(packet(ports, Operation::Reset), &[]);
    assert_eq!(scene.operations(), []);
}

#[test]
fn a_half_closed_stream_still_carries_the_other_direction() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    stream.write_all(b"request").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = scene.received();
    assert_eq!(packets[0].1, b"request");
    assert_eq!((packets[1].0.operation, packets[1].0.flags), (Operation::Shutdown, SHUTDOWN_SEND));
    scene.send(data(ports, b"answer"), b"answer");
    scene.send(Header { flags: SHUTDOWN_BOTH, ..packet(ports, Operation::Shutdown) }, &[]);
    assert_eq!(scene.operations(), [Operation::Reset]);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn a_guest_that_sends_no_more_still_receives() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    scene.send(Header { flags: SHUTDOWN_SEND, ..packet(ports, Operation::Shutdown) }, &[]);
    assert!(at_end(&mut stream));
    stream.write_all(b"late").unwrap();
    assert_eq!(scene.received()[0].1, b"late");
}

#[test]
fn a_host_program_that_closes_lets_the_guest_read_what_it_sent() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    let packets = scene.received();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.operation, packets[1].0.flags), (Operation::Shutdown, SHUTDOWN_BOTH));
    scene.send(packet(ports, Operation::Reset), &[]);
    assert!(scene.worker.mux.is_empty());
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for_and_asked_once_for_more() {
    let mut scene = Scene::new();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    let ports = scene.received()[0].0.ports;
    let room = |fwd_cnt| Header { buf_alloc: 10, fwd_cnt, ..packet(ports, Operation::CreditUpdate) };
    scene.send(Header { buf_alloc: 10, ..packet(ports, Operation::Response) }, &[]);
    stream.write_all(&pattern(25)).unwrap();

    let packets = scene.received();
    assert_eq!(packets[0].1, pattern(25)[..10]);
    assert_eq!(packets[1].0.operation, Operation::CreditRequest);
    // A guest whose program does not read answers at once, with nothing: no packets to and fro.
    for _ in 0..3 {
        scene.send(room(0), &[]);
        assert_eq!(scene.operations(), []);
    }
    scene.send(room(10), &[]);
    let packets = scene.received();
    assert_eq!(packets[0].1, pattern(25)[10..20]);
    assert_eq!(packets[1].0.operation, Operation::CreditRequest);
    scene.send(room(15), &[]);
    assert_eq!(scene.received()[0].1, pattern(25)[20..]);
}

#[test]
fn a_guest_that_claims_to_have_read_more_than_it_was_sent_gets_nothing() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    scene.send(Header { fwd_cnt: 5, buf_alloc: 100, ..packet(ports, Operation::CreditUpdate) }, &[]);
    stream.write_all(b"data").unwrap();
    assert_eq!(scene.operations(), [Operation::CreditRequest]);
}

#[test]
fn a_host_program_that_does_not_read_holds_up_only_itself() {
    let mut scene = Scene::new();
    let (mut slow, slow_ports) = scene.established();
    let (mut quick, quick_ports) = scene.established();
    let all = pattern(8 << 20);
    let mut sent = 0;
    let mut forwarded = 0;
    // As much as the device gives credit for: what the socket takes, and one buffer.
    while sent - forwarded < BUF_ALLOC as usize {
        let chunk = &all[sent..sent + 32 * 1024];
        scene.send(data(slow_ports, chunk), chunk);
        sent += chunk.len();
        for (header, _) in scene.received() {
            forwarded = header.fwd_cnt as usize;
        }
        assert!(sent < 4 << 20, "the device takes everything");
    }
    scene.send(data(quick_ports, b"quick"), b"quick");
    let mut bytes = [0; 5];
    quick.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"quick");

    // Once it reads, it gets all of it, in order, and the guest gets its credit back.
    let mut taken = vec![0; sent];
    let mut count = 0;
    slow.set_nonblocking(true).unwrap();
    while count < sent {
        scene.turn();
        count += slow.read(&mut taken[count..]).unwrap_or(0);
    }
    assert!(taken == all[..sent], "the data arrived changed");
    let last = scene.received().last().unwrap().0;
    assert_eq!(last.operation, Operation::CreditUpdate);
    assert!(sent - last.fwd_cnt as usize <= BUF_ALLOC as usize / 4);
}

#[test]
fn what_a_guest_sent_before_it_reset_the_connection_still_arrives() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    let chunk = pattern(60 * 1024);
    let mut sent = 0;
    let mut forwarded = 0;
    while sent + chunk.len() - forwarded <= BUF_ALLOC as usize {
        scene.send(data(ports, &chunk), &chunk);
        sent += chunk.len();
        for (header, _) in scene.received() {
            forwarded = header.fwd_cnt as usize;
        }
    }
    assert!(forwarded < sent, "nothing is waiting in the device");
    scene.send(packet(ports, Operation::Reset), &[]);
    // The guest may take the ports for another stream at once, while the first is still being written.
    let mut count = 0;
    let mut bytes = vec![0; 1 << 20];
    stream.set_nonblocking(true).unwrap();
    for _ in 0..1000 {
        scene.turn();
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(length) => count += length,
            Err(_) => {}
        }
    }
    assert_eq!(count, sent);
    assert!(scene.worker.mux.is_empty());
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut scene = Scene::new();
    let (stream, ports) = scene.established();
    let chunk = pattern(PAYLOAD_MAX);
    for _ in 0..20 {
        scene.send(data(ports, &chunk), &chunk);
    }
    assert!(scene.operations().contains(&Operation::Reset));
    drop(stream);
}

#[test]
fn megabytes_arrive_unchanged_in_both_directions() {
    let mut scene = Scene::new();
    let (stream, ports) = scene.established();
    let all = pattern(3 << 20);
    let sender = {
        let (mut stream, all) = (stream.try_clone().unwrap(), all.clone());
        std::thread::spawn(move || stream.write_all(&all).unwrap())
    };
    let receiver = {
        let (mut stream, length) = (stream, all.len());
        std::thread::spawn(move || {
            let mut bytes = vec![0; length];
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.read_exact(&mut bytes).unwrap();
            bytes
        })
    };
    let (mut got, mut sent, mut forwarded) = (Vec::new(), 0, 0);
    while got.len() < all.len() || sent < all.len() {
        for (header, payload) in scene.received() {
            got.extend(payload);
            forwarded = header.fwd_cnt as usize;
        }
        let fwd_cnt = u32::try_from(got.len()).unwrap();
        let length = (all.len() - sent).min(BUF_ALLOC as usize - (sent - forwarded)).min(PAYLOAD_MAX);
        let header = Header { fwd_cnt, ..data(ports, &all[sent..sent + length]) };
        scene.send(header, &all[sent..sent + length]);
        sent += length;
    }
    sender.join().unwrap();
    assert!(got == all, "the guest got other data");
    // What the device holds goes on its way only as the host program makes room.
    while !receiver.is_finished() {
        scene.turn();
        std::thread::yield_now();
    }
    assert!(receiver.join().unwrap() == all, "the host program got other data");
}

#[test]
fn a_connection_too_many_is_closed_at_once_and_a_freed_place_is_used_again() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();

    let mut scene = Scene::new();
    let mut streams = Vec::new();
    for _ in 0..1024 {
        streams.push(scene.connect());
        scene.turn();
    }
    let mut refused = scene.connect();
    scene.turn();
    assert!(at_end(&mut refused));
    streams.pop();
    scene.established();
}

#[test]
fn resets_that_the_guest_does_not_take_hold_up_only_its_own_packets() {
    let mut scene = Scene::without_buffers();
    let header = |guest| packet(Ports { host: 7, guest }, Operation::ReadWrite);
    let mut taken = 0;
    for guest in 0..1000 {
        scene.send(header(guest), &[]);
        while scene.transmit.used().is_some() {
            taken += 1;
        }
        if taken <= guest {
            break;
        }
    }
    assert_eq!(taken, 256);
    // A reset that goes out lets a packet in.
    scene.give_buffer(RECEIVE_BUFFERS);
    assert_eq!(scene.operations(), [Operation::Reset]);
    while scene.transmit.used().is_some() {
        taken += 1;
    }
    assert!(taken > 256);
}

#[test]
fn a_packet_cut_into_many_descriptors_is_put_together() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    let bytes = [&reversed(data(ports, b"pieces").to_guest()), &b"pieces"[..]].concat();
    scene.memory.write_slice(&bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
    let chain: Vec<_> = [(0, 1), (1, 30), (31, 15), (46, 4)]
        .map(|(at, length)| Buffer { address: TRANSMIT_BUFFER + at, length, writable: false })
        .to_vec();
    scene.transmit.add(&chain);
    scene.turn();
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"pieces");
}

#[test]
fn a_packet_for_the_guest_is_cut_to_its_descriptors() {
    let mut scene = Scene::without_buffers();
    let chain: Vec<_> = [(0, 44), (0x1000, 2), (0x2000, 10)]
        .map(|(at, length)| Buffer { address: RECEIVE_BUFFERS + at, length, writable: true })
        .to_vec();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    scene.receive.add(&chain);
    scene.turn();
    let ports = Ports { host: 1 << 30, guest: 1024 };
    scene.send(packet(ports, Operation::Response), &[]);
    scene.receive.add(&chain);
    stream.write_all(b"0123456789abcdef").unwrap();
    scene.turn();
    assert_eq!(scene.receive.used(), Some((0, 44)));
    assert_eq!(scene.receive.used(), Some((3, 56)));
    let mut bytes = [0; 10];
    scene.memory.read_slice(&mut bytes[..2], GuestAddress(RECEIVE_BUFFERS + 0x1000)).unwrap();
    assert_eq!(&bytes[..2], b"01");
    scene.memory.read_slice(&mut bytes, GuestAddress(RECEIVE_BUFFERS + 0x2000)).unwrap();
    assert_eq!(&bytes, b"23456789ab");
}

#[test]
fn a_header_that_promises_more_than_there_is_resets_its_connection() {
    for length in [5, u32::MAX] {
        let mut scene = Scene::new();
        let (_stream, ports) = scene.established();
        scene.send(Header { length, ..packet(ports, Operation::ReadWrite) }, b"four");
        assert_eq!(scene.operations(), [Operation::Reset]);
    }
}

#[test]
fn packets_without_a_whole_header_or_outside_memory_are_dropped() {
    let mut scene = Scene::new();
    let (_stream, _) = scene.established();
    scene.send_bytes(&[0xff; 43]);
    scene.transmit.add(&[Buffer { address: 1 << 40, length: 44, writable: false }]);
    scene.transmit.add(&[Buffer { address: u64::MAX, length: u32::MAX, writable: false }]);
    scene.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length: 44, writable: true }]);
    assert_eq!(scene.operations(), []);
    for _ in 0..5 {
        assert!(scene.transmit.used().is_some());
    }
}

#[test]
fn buffers_that_cannot_hold_a_packet_are_given_back_empty() {
    let mut scene = Scene::without_buffers();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    scene.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 44, writable: true }]);
    scene.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 4096, writable: false }]);
    scene.receive.add(&[Buffer { address: 1 << 40, length: 4096, writable: true }]);
    scene.turn();
    for head in 0..3 {
        assert_eq!(scene.receive.used(), Some((head, 0)));
    }
}

#[test]
fn a_guest_that_breaks_a_ring_stops_the_device() {
    let mut scene = Scene::new();
    scene.transmit.set_available(1000);
    assert!(scene.worker.move_packets().is_err());

    let mut scene = Scene::new();
    scene.transmit.offer(QUEUE);
    assert!(scene.worker.move_packets().is_err());

    let mut scene = Scene::new();
    scene.receive.set_available(5000);
    scene.send_bytes(&reversed(packet(Ports { host: 1, guest: 1 }, Operation::Response).to_guest()));
    assert!(scene.worker.move_packets().is_err());
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let mut scene = Scene::new();
    let piece = Buffer { address: TRANSMIT_BUFFER, length: 1, writable: false };
    let chain = vec![piece; usize::from(QUEUE)];
    let head = scene.transmit.add(&chain);
    // The last descriptor now also says that another follows: the first.
    let last = TRANSMIT_RING + u64::from(QUEUE - 1) * 16;
    scene.memory.write_obj(1u16, GuestAddress(last + 12)).unwrap();
    scene.turn();
    assert_eq!(scene.transmit.used(), Some((head, 0)));
}

#[test]
fn a_stopped_worker_returns() {
    let scene = Scene::new();
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interest = EpollEvent::new(EventSet::IN, TOKEN_STOP);
    scene.worker.mux.epoll().ctl(ControlOperation::Add, stop.as_raw_fd(), interest).unwrap();
    let thread = std::thread::spawn(move || scene.worker.run());
    stop.write(1).unwrap();
    thread.join().unwrap();
}
