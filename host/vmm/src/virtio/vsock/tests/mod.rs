//! The device between real unix sockets and a guest that the tests play.

mod connecting;
mod connection_limits;
mod flow_control;
mod port_forward;
mod queues;

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
            Counters, PortForward, VsockSockets,
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
/// Size of the buffers that Linux gives.
const RECEIVE_BUFFER: u32 = 4096;
const TRANSMIT_BUFFER: u64 = 0x80_0000;
const HOST_PORT: u32 = 1025;
const FORWARD_PORT: u32 = 1026;

type Packet = (Header, Vec<u8>);

/// A guest, its device and the host's side.
struct Harness {
    directory: TempDir,
    /// The host's end of the stream that the guest may connect to.
    host: Option<UnixStream>,
    worker: Worker,
    memory: GuestMemory,
    receive: Ring,
    transmit: Ring,
    buffers: HashMap<u16, u64>,
}

impl Harness {
    fn new() -> Self {
        Self::with_forward(None)
    }

    fn with_forward(forward: Option<PortForward>) -> Self {
        let mut harness = Self::without_buffers_with_forward(forward);
        for index in 0..u64::from(QUEUE) / 2 {
            harness.give_buffer(RECEIVE_BUFFERS + index * u64::from(RECEIVE_BUFFER));
        }
        harness
    }

    fn without_buffers() -> Self {
        Self::without_buffers_with_forward(None)
    }

    fn without_buffers_with_forward(forward: Option<PortForward>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let memory = guest_memory();
        let (receive, receive_queue) = Ring::new(&memory, RECEIVE_RING, QUEUE);
        let (transmit, transmit_queue) = Ring::new(&memory, TRANSMIT_RING, QUEUE);
        let (_, event_queue) = Ring::new(&memory, EVENT_RING, 16);
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (ours, host) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let config = VsockConfig { host_port: Some(HOST_PORT), forward_port: Some(FORWARD_PORT) };
        let sockets = VsockSockets { listener, host: Some(host), forward };
        let mux = Mux::new(config, sockets, Counters::default()).unwrap();
        let queues = [receive_queue, transmit_queue, event_queue];
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let worker = Worker::new(memory.clone(), queues, mux, &stop).unwrap();
        Self { directory, host: Some(ours), worker, memory, receive, transmit, buffers: HashMap::new() }
    }

    fn give_buffer(&mut self, address: u64) {
        let head = self.receive.add(&[Buffer { address, length: RECEIVE_BUFFER, writable: true }]);
        self.buffers.insert(head, address);
    }

    /// Lets the worker work until it would wait.
    fn run_until_idle(&mut self) {
        for _ in 0..10_000 {
            assert!(self.worker.handle_events(Some(Duration::ZERO)).unwrap().is_continue());
            if !self.worker.move_packets().unwrap() && !self.handle_next_event() {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Handles one event, if there is one. Returns whether there was.
    fn handle_next_event(&mut self) -> bool {
        let next = self.worker.mux.wait_context().wait::<1>(Some(Duration::ZERO)).unwrap().next();
        // An edge-triggered event is not reported again, so it has to be handled here.
        match next.map(|event| (event.token, event.readiness())) {
            None => return false,
            Some((Token::Listener(listener), _)) => self.worker.mux.on_listener_event(listener),
            Some((Token::Stream(id), events)) => self.worker.mux.on_stream_event(id, events),
            Some((Token::ReceiveQueue | Token::TransmitQueue | Token::Stop, _)) => {}
        }
        true
    }

    /// The guest sends a packet in one buffer.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.send_bytes(&[&reversed(header.to_guest()), payload].concat());
        self.run_until_idle();
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        self.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length, writable: false }]);
    }

    /// The packets that the guest has received since the last call. Its buffers go back to the device.
    fn received(&mut self) -> Vec<Packet> {
        self.run_until_idle();
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

    /// The guest's stream to the host.
    fn accepted(&mut self) -> (UnixStream, Ports) {
        let ports = Ports { host: HOST_PORT, guest: 5000 };
        self.send(packet(ports, Operation::Request), &[]);
        assert_eq!(self.operations(), [Operation::Response]);
        (self.host.take().unwrap(), ports)
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

/// Reads a byte. Returns whether the stream has ended instead.
fn reads_end(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0; 1]).is_ok_and(|count| count == 0)
}
