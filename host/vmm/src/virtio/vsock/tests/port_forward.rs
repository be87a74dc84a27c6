//! Connections to the pod's localhost, carried to a guest that the tests play.

use std::{
    fs::File,
    io::ErrorKind,
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::virtio::vsock::{connection_limits::FORWARDED_MAX, port_forward::set_reset_on_close};

/// A harness with a listener for forwarded connections, and the listener's port.
fn harness() -> (Harness, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let steering = File::open("/dev/null").unwrap().into();
    (Harness::with_forward(Some(PortForward { listener, steering })), port)
}

fn dial(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

/// A connection that the guest has accepted, but not yet reached the port of.
fn requested(harness: &mut Harness, port: u16) -> (TcpStream, Ports) {
    let stream = dial(port);
    let packets = harness.received();
    let [(request, _)] = packets.as_slice() else { panic!("{packets:?}") };
    assert_eq!((request.operation, request.ports.guest), (Operation::Request, FORWARD_PORT));
    let ports = request.ports;
    harness.send(packet(ports, Operation::Response), &[]);
    assert_eq!(payloads(harness), port.to_be_bytes());
    (stream, ports)
}

/// A connection to a port that the guest has reached.
fn reached(harness: &mut Harness, port: u16) -> (TcpStream, Ports) {
    let (stream, ports) = requested(harness, port);
    harness.send(data(ports, &[0]), &[0]);
    (stream, ports)
}

/// The data that the guest has received since the last call. Panics if it has received anything else.
fn payloads(harness: &mut Harness) -> Vec<u8> {
    let packets = harness.received();
    assert!(packets.iter().all(|(header, _)| header.operation == Operation::ReadWrite), "{packets:?}");
    packets.into_iter().flat_map(|(_, payload)| payload).collect()
}

fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Reads a byte. Returns whether the connection was reset instead.
fn reads_reset(stream: &mut TcpStream) -> bool {
    stream.read(&mut [0; 1]).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn a_connection_begins_with_its_port_and_its_client_sees_only_the_servers_bytes() {
    let (mut harness, port) = harness();
    let (mut stream, ports) = reached(&mut harness, port);
    stream.write_all(b"ping").unwrap();
    assert_eq!(payloads(&mut harness), b"ping");
    harness.send(data(ports, b"pong"), b"pong");
    assert_eq!(read(&mut stream, 4), b"pong");
}

#[test]
fn the_answer_may_come_with_data_and_the_client_need_not_wait_for_it() {
    let (mut harness, port) = harness();
    let mut stream = dial(port);
    stream.write_all(b"early").unwrap();
    let ports = harness.received()[0].0.ports;
    harness.send(packet(ports, Operation::Response), &[]);
    assert_eq!(payloads(&mut harness), [&port.to_be_bytes()[..], b"early"].concat());
    harness.send(data(ports, b"\0hello"), b"\0hello");
    assert_eq!(read(&mut stream, 5), b"hello");
}

#[test]
fn the_port_is_sent_in_pieces_to_a_guest_with_room_for_one_byte() {
    let (mut harness, port) = harness();
    let _stream = dial(port);
    let ports = harness.received()[0].0.ports;
    let room = |fwd_cnt| Header { buf_alloc: 1, fwd_cnt, ..packet(ports, Operation::CreditUpdate) };
    harness.send(Header { operation: Operation::Response, ..room(0) }, &[]);
    let packets = harness.received();
    assert_eq!(packets[0].1, port.to_be_bytes()[..1]);
    assert_eq!(packets[1].0.operation, Operation::CreditRequest);
    assert_eq!(packets.len(), 2);
    harness.send(room(1), &[]);
    assert_eq!(harness.received()[0].1, port.to_be_bytes()[1..]);
}

#[test]
fn a_client_that_sends_no_more_still_receives() {
    let (mut harness, port) = harness();
    let (mut stream, ports) = reached(&mut harness, port);
    stream.write_all(b"request").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = harness.received();
    assert_eq!(packets[0].1, b"request");
    assert_eq!((packets[1].0.operation, packets[1].0.flags), (Operation::Shutdown, SHUTDOWN_SEND));
    harness.send(data(ports, b"answer"), b"answer");
    harness.send(Header { flags: SHUTDOWN_BOTH, ..packet(ports, Operation::Shutdown) }, &[]);
    assert_eq!(harness.operations(), [Operation::Reset]);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert!(harness.worker.mux.is_empty());
}

#[test]
fn a_server_that_sends_no_more_still_receives() {
    let (mut harness, port) = harness();
    let (mut stream, ports) = reached(&mut harness, port);
    harness.send(data(ports, b"banner"), b"banner");
    harness.send(Header { flags: SHUTDOWN_SEND, ..packet(ports, Operation::Shutdown) }, &[]);
    let mut banner = String::new();
    stream.read_to_string(&mut banner).unwrap();
    assert_eq!(banner, "banner");
    stream.write_all(b"late").unwrap();
    assert_eq!(payloads(&mut harness), b"late");
    // Once both have finished, so has the stream.
    drop(stream);
    let last = harness.received().pop().unwrap().0;
    assert_eq!((last.operation, last.flags), (Operation::Shutdown, SHUTDOWN_BOTH));
    harness.send(packet(ports, Operation::Reset), &[]);
    assert!(harness.worker.mux.is_empty());
}

#[test]
fn a_client_of_a_port_that_the_guest_does_not_reach_is_reset() {
    let shutdown = |ports, flags| Header { flags, ..packet(ports, Operation::Shutdown) };
    let refusals: [&dyn Fn(Ports) -> Header; 4] = [
        &|ports| packet(ports, Operation::Reset),
        &|ports| shutdown(ports, SHUTDOWN_BOTH),
        &|ports| shutdown(ports, SHUTDOWN_SEND),
        // With another byte than the one that says so.
        &|ports| data(ports, b"\x01no"),
    ];
    for (index, refusal) in refusals.into_iter().enumerate() {
        let (mut harness, port) = harness();
        let (mut stream, ports) = requested(&mut harness, port);
        let header = refusal(ports);
        harness.send(header, &b"\x01no"[..header.length as usize]);
        let expected: &[_] = if index == 0 { &[] } else { &[Operation::Reset] };
        assert_eq!(harness.operations(), expected, "refusal {index}");
        assert!(reads_reset(&mut stream), "refusal {index}");
        assert!(harness.worker.mux.is_empty());
        // Others are not affected.
        reached(&mut harness, port);
    }
}

#[test]
fn a_guest_whose_agent_does_not_listen_resets_the_client() {
    let (mut harness, port) = harness();
    let mut stream = dial(port);
    let ports = harness.received()[0].0.ports;
    harness.send(packet(ports, Operation::Reset), &[]);
    assert!(reads_reset(&mut stream));
}

#[test]
fn a_machine_that_ends_resets_the_clients_that_have_no_answer() {
    let (mut harness, port) = harness();
    let (mut waiting, _) = requested(&mut harness, port);
    let (mut served, _) = reached(&mut harness, port);
    drop(harness);
    assert!(reads_reset(&mut waiting));
    assert_eq!(served.read(&mut [0; 1]).unwrap(), 0);
    TcpStream::connect(("127.0.0.1", port)).unwrap_err();
}

#[test]
fn a_client_that_resets_its_connection_ends_the_guests_stream() {
    let (mut harness, port) = harness();
    // Before the guest has answered the request, before it has reached the port, and after.
    let early = dial(port);
    let request = harness.received()[0].0;
    let waiting = requested(&mut harness, port);
    let served = reached(&mut harness, port);
    for (stream, ports) in [(early, request.ports), waiting, served] {
        set_reset_on_close(&stream, true).unwrap();
        drop(stream);
        let packets = harness.received();
        let [(last, _)] = packets.as_slice() else { panic!("{packets:?}") };
        assert_eq!((last.operation, last.ports), (Operation::Reset, ports));
    }
    assert!(harness.worker.mux.is_empty());
}

#[test]
fn what_the_guest_sends_after_its_answer_waits_for_a_slow_client() {
    let (mut harness, port) = harness();
    let (mut stream, ports) = reached(&mut harness, port);
    let chunk = pattern(60 * 1024);
    let (mut sent, mut forwarded) = (1, 0);
    while sent + chunk.len() - forwarded <= BUF_ALLOC as usize {
        harness.send(data(ports, &chunk), &chunk);
        sent += chunk.len();
        for (header, _) in harness.received() {
            forwarded = header.fwd_cnt as usize;
        }
        assert!(sent < 64 << 20, "the device takes everything");
    }
    harness.send(Header { flags: SHUTDOWN_SEND, ..packet(ports, Operation::Shutdown) }, &[]);
    stream.set_nonblocking(true).unwrap();
    let (mut bytes, mut buffer) = (Vec::<u8>::new(), vec![0; 1 << 20]);
    loop {
        harness.run_until_idle();
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => bytes.extend(&buffer[..length]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    assert_eq!(bytes.len(), sent - 1);
    assert!(bytes.chunks(chunk.len()).all(|received| received == chunk));
}

#[test]
fn a_connection_too_many_is_reset_and_a_freed_place_is_used_again() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();

    let (mut harness, port) = harness();
    let mut programs = Vec::new();
    for _ in 0..1023 {
        programs.push(harness.connect());
        harness.run_until_idle();
    }
    let (_first, _) = requested(&mut harness, port);
    let mut refused = dial(port);
    harness.run_until_idle();
    assert!(reads_reset(&mut refused));
    programs.pop();
    harness.run_until_idle();
    reached(&mut harness, port);
}

#[test]
fn forwarded_connections_leave_places_for_host_programs_and_the_guest() {
    let (mut harness, port) = harness();
    let _forwarded: Vec<_> = (0..FORWARDED_MAX).map(|_| requested(&mut harness, port)).collect();
    // One more is taken and closed.
    let mut more = dial(port);
    assert!(harness.received().is_empty());
    assert!(reads_reset(&mut more) || tcp_reads_end(&mut more));
    let _of_host_program = harness.established();
    let _of_guest = harness.accepted();
}

/// Reads a byte. Returns whether the stream has ended instead.
fn tcp_reads_end(stream: &mut TcpStream) -> bool {
    stream.read(&mut [0; 1]).is_ok_and(|count| count == 0)
}
