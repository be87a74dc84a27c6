//! How connections are made and ended.

use super::*;

#[test]
fn a_host_program_and_the_guest_exchange_data() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    stream.write_all(b"ping").unwrap();
    assert_eq!(harness.received()[0].1, b"ping");
    harness.send(data(ports, b"pong"), b"pong");
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
}

#[test]
fn a_greeting_in_pieces_is_put_together_and_what_follows_is_for_the_guest() {
    let mut harness = Harness::new();
    let mut stream = harness.connect();
    for piece in ["CONN", "ECT 10", "24"] {
        stream.write_all(piece.as_bytes()).unwrap();
        assert_eq!(harness.operations(), []);
    }
    stream.write_all(b"\nhello").unwrap();
    let request = harness.received()[0].0;
    harness.send(packet(request.ports, Operation::Response), &[]);
    assert_eq!(harness.received()[0].1, b"hello");
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
        let mut harness = Harness::new();
        let mut stream = harness.connect();
        stream.write_all(greeting.as_bytes()).unwrap();
        assert_eq!(harness.operations(), [], "{greeting}");
        // Closed, perhaps with bytes that nobody has read.
        assert!(!matches!(stream.read(&mut [0; 1]), Ok(1..)), "{greeting}");
    }
}

#[test]
fn a_guest_that_refuses_ends_the_host_programs_connection() {
    let mut harness = Harness::new();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let request = harness.received()[0].0;
    harness.send(packet(request.ports, Operation::Reset), &[]);
    assert!(reads_end(&mut stream));
}

#[test]
fn a_host_program_that_does_not_wait_is_taken_back() {
    let mut harness = Harness::new();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(harness.operations(), [Operation::Request]);
    drop(stream);
    assert_eq!(harness.operations(), [Operation::Reset]);
}

#[test]
fn the_guest_reaches_the_host_once_and_at_one_port() {
    let mut harness = Harness::new();
    for port in [HOST_PORT - 1, HOST_PORT + 1, FORWARD_PORT, 0, u32::MAX] {
        harness.send(packet(Ports { host: port, guest: 5001 }, Operation::Request), &[]);
        assert_eq!(harness.operations(), [Operation::Reset], "{port}");
    }
    let (mut stream, ports) = harness.accepted();
    harness.send(data(ports, b"ready"), b"ready");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ready");
    for _ in 0..2 {
        harness.send(packet(Ports { host: HOST_PORT, guest: 5001 }, Operation::Request), &[]);
        assert_eq!(harness.operations(), [Operation::Reset], "there is no second connection");
        drop(harness.host.take());
        harness.send(packet(ports, Operation::Reset), &[]);
    }
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_but_resets_are_not() {
    let mut harness = Harness::new();
    let ports = Ports { host: 7, guest: 8 };
    for operation in
        [Operation::ReadWrite, Operation::Response, Operation::Shutdown, Operation::CreditRequest]
    {
        harness.send(packet(ports, operation), &[]);
        assert_eq!(harness.operations(), [Operation::Reset], "{operation:?}");
    }
    harness.send(packet(ports, Operation::Reset), &[]);
    assert_eq!(harness.operations(), []);
}

#[test]
fn a_half_closed_stream_still_carries_the_other_direction() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
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
}

#[test]
fn a_guest_that_sends_no_more_still_receives() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    harness.send(Header { flags: SHUTDOWN_SEND, ..packet(ports, Operation::Shutdown) }, &[]);
    assert!(reads_end(&mut stream));
    stream.write_all(b"late").unwrap();
    assert_eq!(harness.received()[0].1, b"late");
}

#[test]
fn a_host_program_that_closes_lets_the_guest_read_what_it_sent() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    let packets = harness.received();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.operation, packets[1].0.flags), (Operation::Shutdown, SHUTDOWN_BOTH));
    harness.send(packet(ports, Operation::Reset), &[]);
    assert!(harness.worker.mux.is_empty());
}
